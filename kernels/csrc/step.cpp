// The decoder's step: all layers over one ragged batch on the threads of a team, and the head over some of its rows.
//
// A model may be split over ranks (peers.h). Each sums its share of the columns that enter a product, and all add up
// what all have. Where the pages of a slice of the kv heads lie in several groups, each rank attends its own pages for
// the query heads of all, and merges what all found for its own heads.
//
// A stage may end inside the MLP of its last layer. It hands on the residual stream as that MLP finds it, and apart from
// it the sums of the units so far, to which the next stage adds those of the other units. Some pieces of the MLP may be on
// both stages: the first does them until the next one would wait, which does the others. They are added in one order,
// whoever does which, and so the bits are the same.
//
// Every thread runs the same sequence of phases. A phase's work is claimed in pieces and ends at a barrier; rows so few
// that a barrier would cost more are prepared by each thread for itself.
//
// Ranks that sum do so band by band where a step has many rows: a rank goes on with the next band while the others come
// to this one, so that it waits for who is late by most of a product, not for who is late at all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "exports.h"
#include "merge.h"
#include "peers.h"
#include "plan.h"
#include "step.h"
#include "team.h"

namespace quire {
namespace {

constexpr int64_t kOwnRows = 8;       // up to so many rows each thread prepares its own left side of a product
constexpr int64_t kStreamRows = 64;   // up to so many rows a product is dealt out by panels alone
constexpr int64_t kBlockRows = 192;   // rows of a block otherwise: its left side stays in a core's own cache
constexpr int64_t kBlockPanels = 4;
constexpr int64_t kRowsPerClaim = 8;
constexpr int64_t kPhases = 14;       // of a layer and a band, at most

// Bytes of weights to ask for before their turn: ahead of attention, while ranks wait for each other, and ahead of the
// sum of what they gave.
constexpr int64_t kFetchIdle = 128 << 10, kFetchWaiting = 2 << 20, kFetchAdding = 512 << 10;

int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Memory that grows and is not cleared.
class Buffer {
public:
    ~Buffer() { std::free(data_); }
    char* take(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(64, (size_t)divide_up(bytes, 64) * 64);
            if (!data_) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<char*>(data_);
    }
    float* floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }

private:
    void* data_ = nullptr;
    int64_t size_ = 0;
};

// Words from row to row of a product's left side: whole cache lines, and never whole pages of memory, whose rows would
// fall on each other in a cache.
int64_t row_words(int64_t depth) {
    const int64_t words = divide_up(depth, 16) * 16;
    return words % 1024 ? words : words + 16;
}

// Bytes that a rank gives for a sum over the ranks, and for what its pages say to the queries of its slice.
int64_t tensor_bytes(const Model& model, int64_t tokens) { return tokens * model.hidden * 4; }
int64_t found_bytes(const Model& model, int64_t tokens) {
    return tokens * model.attended_heads * (model.head_dim + 1) * 4;
}

}  // namespace

class Engine {
public:
    explicit Engine(int64_t threads, Patience patience = {})
        : team_(threads, patience), own_(new Buffer[team_.size()]) {}

    int64_t forward(const Model& model, const Step& step, char* message, int64_t size);
    int64_t head(const Model& model, const float* hidden, const int64_t* rows, int64_t num_rows, float* logits,
                 int32_t* tokens, float* values, float* totals);

    void choose(const Level& level, const float* logits, int64_t row_stride, int64_t rows, int64_t vocab,
                const Choice* choices, int64_t* tokens) {
        std::atomic<bool> failed{false};
        auto body = [&](int64_t) {
            Counter& counter = team_.counter(0);
            for (int64_t row; (row = counter.claim(rows)) < rows;) {
                try {
                    tokens[row] = level.choose(logits + row * row_stride, vocab, choices[row]);
                } catch (const std::bad_alloc&) {  // on another thread it would end the process
                    failed.store(true);
                }
            }
            team_.barrier();
        };
        team_.run(1, body);
        if (failed.load()) throw std::bad_alloc();
    }

private:
    friend class Forward;
    Team team_;
    std::unique_ptr<Buffer[]> own_;  // by thread
    Buffer angles_, left_, qkv_, q_, attended_, lse_, act_, best_;
};

// One call of forward, as its threads see it.
class Forward {
public:
    Forward(Engine& engine, const Model& model, const Step& step, const Level& level)
        : engine_(engine),
          team_(engine.team_),
          model_(model),
          step_(step),
          level_(level),
          kernels_(model.is_bf16 ? *level.step_bf16 : *level.step_f32),
          tokens_(step.num_tokens),
          element_(model.is_bf16 ? 2 : 4),
          per_word_(model.is_bf16 ? 2 : 1),
          q_columns_(model.q_heads * model.head_dim),
          attended_columns_(model.attended_heads * model.head_dim),
          qkv_columns_((model.q_heads + 2 * model.kv_heads) * model.head_dim) {
        const int64_t widest = std::max(model.hidden, q_columns_);
        angles_ = engine.angles_.floats(tokens_ * model.head_dim);
        left_ = engine.left_.take(tokens_ * row_words(divide_up(widest, per_word_)) * 4);
        qkv_ = engine.qkv_.floats(tokens_ * qkv_columns_);
        q_ = engine.q_.take(tokens_ * attended_columns_ * element_);
        attended_ = engine.attended_.floats(tokens_ * q_columns_);
        out_ = attended_;
        if (step.slice) {  // a layer takes two of its turns: what is found goes into the region of every second
            out_ = reinterpret_cast<float*>(step.slice->turn_regions(1)[step.slice->rank]);
            lse_ = out_ + tokens_ * attended_columns_;
        } else {
            lse_ = engine.lse_.floats(tokens_ * model.q_heads);
        }
        act_row_ = row_words(divide_up(divide_up(model.intermediate, kHalfPanel) * kHalfPanel, per_word_));
        act_ = engine.act_.take(tokens_ * act_row_ * 4);
        for (int64_t thread = 0; tokens_ <= kOwnRows && thread < team_.size(); thread++)
            engine.own_[thread].take(kOwnRows * row_words(divide_up(widest, per_word_)) * 4);
        for (int64_t window = 0; window < step.num_windows; window++) {
            calls_.push_back(call_of(window));
            plans_.push_back(make_plan(calls_.back()));
        }
        for (int64_t layer = 0; layer < model.num_layers; layer++)
            pools_.push_back({step.pool + layer * step.layer_stride, step.block_stride, step.num_blocks});
        // alike on all ranks, so by the threads of the team and not by those that it runs with at the moment
        const int64_t most = step.tensor ? std::max<int64_t>(1, step.tensor->num_bands) : 1;
        const int64_t bands = std::min(divide_up(tokens_, kBlockRows * team_.capacity()), most);
        for (int64_t band = 0; band < bands; band++)
            bands_.push_back({tokens_ * band / bands, tokens_ * (band + 1) / bands,
                              bands > 1 ? step.tensor->bands + band : nullptr, 0});
    }

    int64_t num_phases() const {
        return kPhases * (int64_t)bands_.size() * (model_.num_layers + 1) +
               2 * (model_.num_border_in + model_.num_border_out);
    }
    bool failed() const { return failed_.load(); }
    bool broken() const { return broken_.load(); }
    const std::vector<Call>& calls() const { return calls_; }

    void operator()(int64_t thread) {
        int64_t phase = 0;
        char* const scratch = thread_scratch(level_.scratch_bytes);
        if (!scratch) failed_.store(true);
        start(phase);
        Sum due{};
        if (model_.carried.norm) {
            due = {step_.partial_in, End::kAdd, &behind(-1)};
            for (Band& band : bands_) {
                const Left left = normed(thread, phase, band, model_.carried.norm);
                for (int64_t piece = step_.border_given; piece < model_.num_border_in; piece++)
                    units(thread, phase, band, left, model_.border_in[piece], due);
                units(thread, phase, band, left, model_.carried, due);
            }
            for (Band& band : bands_) {
                if (!finish(thread, phase, band, due)) return;
                rows(phase, band, [&](int64_t row) {
                    kernels_.add(step_.partial_in + row * model_.hidden, model_.hidden,
                                 step_.hidden + row * model_.hidden);
                });
            }
            due = {};
        }
        for (int64_t index = 0; index < model_.num_layers; index++) {
            const Layer& layer = model_.layers[index];
            for (Band& band : bands_) {
                if (!finish(thread, phase, band, due)) return;
                const Left left = normed(thread, phase, band, layer.input_norm);
                multiply(thread, phase, band, left, layer.qkv, End::kStore, qkv_, nullptr, qkv_columns_);
                fetch(thread, layer.o, kFetchIdle);
                rotate(phase, band, layer, index);
            }
            if (step_.slice && !gather_queries(thread, phase, layer.o)) return;
            attend(phase, layer, index, scratch);
            if (step_.slice && !merge_groups(thread, phase, layer.o)) return;
            due = {step_.hidden, End::kAdd, &layer.mlp.gate_up};
            for (Band& band : bands_) begin(thread, phase, band, attended_left(thread, phase, band), layer.o, due);
            const bool is_cut = step_.partial_out && index + 1 == model_.num_layers;
            const Sum sum{is_cut ? step_.partial_out : step_.hidden, is_cut ? End::kStore : End::kAdd, &behind(index)};
            for (Band& band : bands_) {
                if (!finish(thread, phase, band, due)) return;
                const Left left = normed(thread, phase, band, layer.mlp.norm);
                units(thread, phase, band, left, layer.mlp, sum);
                if (is_cut) border(thread, phase, band, left, {sum.to, End::kAdd, sum.next});
            }
            due = sum;
        }
        for (Band& band : bands_)
            if (!finish(thread, phase, band, due)) return;
    }

private:
    struct Left {
        const char* at;
        int64_t row;  // words
    };

    // Rows that are summed together.
    struct Band {
        int64_t begin, end;
        Meeting* meeting;    // null: it is the only one, and the ranks exchange
        uint32_t all_there;  // what to wait for at the meeting
    };

    // What the sums over the ranks of a product's bands become, and what is multiplied then.
    struct Sum {
        float* to;  // [tokens][hidden]; null: there is none
        End end;    // kStore or kAdd
        const Matrix* next;
    };

    // What is multiplied behind a layer: the next one's first matrix, or the head; empty where that is another stage's.
    const Matrix& behind(int64_t index) const {
        return index + 1 < model_.num_layers ? model_.layers[index + 1].qkv : model_.head;
    }

    Call call_of(int64_t window) const {
        Call call{};
        call.q = q_;
        call.q_stride = attended_columns_;
        call.query_start = step_.query_start;
        call.first_position = step_.first_position;
        call.num_pools = 1;
        call.page_start = step_.page_start[window];
        call.page_block = step_.page_block[window];
        call.page_position = step_.page_position[window];
        call.out = out_;
        call.lse = lse_;
        call.num_tokens = tokens_;
        call.num_rows = step_.num_rows;
        call.num_entries = step_.num_entries[window];
        call.q_heads = model_.attended_heads;
        call.kv_heads = model_.kv_heads;
        call.head_dim = model_.head_dim;
        call.block_size = step_.block_size;
        call.window = step_.windows[window];
        call.is_bf16 = model_.is_bf16;
        call.level = model_.level;
        call.threads = team_.size();
        call.is_deterministic = step_.is_deterministic;
        call.is_int8 = step_.is_int8;
        call.scale = 1.0 / std::sqrt((double)model_.head_dim);
        return call;
    }

    // body(row) for all tokens of a band, a few at a time.
    template <class Body>
    void rows(int64_t& phase, const Band& band, Body body) {
        const int64_t count = band.end - band.begin;
        const int64_t some = std::clamp<int64_t>(count / (4 * team_.size()), 1, kRowsPerClaim);
        const int64_t pieces = divide_up(count, some);
        Counter& counter = team_.counter(phase++);
        for (int64_t piece; (piece = counter.claim(pieces)) < pieces;)
            for (int64_t row = piece * some; row < std::min(count, (piece + 1) * some); row++) body(band.begin + row);
        team_.barrier();
    }

    // The same for all tokens.
    template <class Body>
    void rows(int64_t& phase, Body body) {
        rows(phase, Band{0, tokens_, nullptr, 0}, body);
    }

    void start(int64_t& phase) {
        const int64_t half = model_.head_dim / 2;
        rows(phase, [&](int64_t row) {
            if (step_.tokens)
                kernels_.widen(model_.embedding + step_.tokens[row] * model_.hidden * element_, model_.hidden,
                               step_.hidden + row * model_.hidden);
            // in double: float is 0.05 rad off at a million
            for (int64_t i = 0; i < half; i++) {
                const double angle = (double)step_.positions[row] * model_.frequencies[i];
                angles_[row * 2 * half + i] = (float)(std::cos(angle) * model_.rotary_factor);
                angles_[row * 2 * half + half + i] = (float)(std::sin(angle) * model_.rotary_factor);
            }
        });
    }

    // The left side of a product: body(row, to) for all rows of a band, each thread for itself where they are few.
    template <class Body>
    Left prepare(int64_t thread, int64_t& phase, const Band& band, int64_t columns, Body body) {
        const int64_t row_size = row_words(divide_up(columns, per_word_));
        if (tokens_ <= kOwnRows) {
            char* const own = engine_.own_[thread].take(0);
            for (int64_t row = 0; row < tokens_; row++) body(row, own + row * row_size * 4);
            return {own, row_size};
        }
        rows(phase, band, [&](int64_t row) { body(row, left_ + row * row_size * 4); });
        return {left_, row_size};
    }

    Left normed(int64_t thread, int64_t& phase, const Band& band, const float* weight) {
        return prepare(thread, phase, band, model_.hidden, [&](int64_t row, char* to) {
            kernels_.norm(step_.hidden + row * model_.hidden, weight, model_.eps, model_.hidden, to);
        });
    }

    Left attended_left(int64_t thread, int64_t& phase, const Band& band) {
        return prepare(thread, phase, band, q_columns_, [&](int64_t row, char* to) {
            kernels_.convert(attended_ + row * q_columns_, q_columns_, to);
        });
    }

    void multiply(int64_t thread, int64_t& phase, const Band& band, Left left, const Matrix& matrix, End end, float* out,
                  char* words, int64_t out_row) {
        const Product product{left.at, left.row, matrix, end, out, words, out_row, nullptr};
        deal(team_, phase++, thread, kernels_, product, band.begin, band.end);
        team_.barrier();
    }

    // The first panels that a thread will read of a matrix: at most so many bytes, none where work is bound by
    // arithmetic.
    Ahead first_of(int64_t thread, const Matrix& matrix, int64_t bytes) const {
        if (tokens_ > kStreamRows) return {};
        const int64_t panels = divide_up(matrix.columns, kPanel), panel_bytes = matrix.depth * kPanel * 4;
        const int64_t begin = panels * thread / team_.size(), end = panels * (thread + 1) / team_.size();
        return {static_cast<const char*>(matrix.packed) + begin * panel_bytes,
                std::min(bytes, (end - begin) * panel_bytes)};
    }

    // Asks for them, while the memory has nothing else to do.
    void fetch(int64_t thread, const Matrix& matrix, int64_t bytes) const {
        const Ahead ahead = first_of(thread, matrix, bytes);
        for (int64_t i = 0; i < ahead.bytes; i += 64) __builtin_prefetch(ahead.at + i, 0, 2);
    }

public:
    // All panels and some rows of a product, dealt out to the threads that call this.
    static void deal(Team& team, int64_t phase, int64_t thread, const StepKernels& kernels, const Product& product,
                     int64_t begin, int64_t end) {
        const int64_t panels = divide_up(product.matrix.columns, kPanel), rows = end - begin;
        if (rows <= kStreamRows) {
            team.share(phase, thread, panels,
                       [&](int64_t panel) { kernels.product(product, panel, panel + 1, begin, end); });
            return;
        }
        const int64_t blocks = divide_up(rows, kBlockRows), parts = divide_up(panels, kBlockPanels);
        team.share(phase, thread, blocks * parts, [&](int64_t piece) {
            const int64_t block = piece / parts, part = piece % parts;
            kernels.product(product, panels * part / parts, panels * (part + 1) / parts, begin + rows * block / blocks,
                            begin + rows * (block + 1) / blocks);
        });
    }

private:
    // The first thread waits for other ranks, and the others for it. False: a broken group.
    template <class Wait>
    bool await(int64_t thread, Wait wait) {
        if (thread == 0) {
            const auto began = std::chrono::steady_clock::now();
            if (wait()) broken_.store(true);
            team_.waited(std::chrono::steady_clock::now() - began);
        }
        team_.barrier(true);
        return !broken_.load();
    }

    // One turn of a group, after which all threads may read what `peers.last_regions()` gives; who waits may ask
    // for what it reads of `next`. False: a broken group.
    bool exchange(int64_t thread, Peers& peers, int64_t bytes, const Matrix& next) {
        return await(thread, [&] {
            return quire::exchange(peers, bytes, peers.reads_ahead ? first_of(0, next, kFetchWaiting) : Ahead{});
        });
    }

    // The pieces that the next stage has too, for as long as it does not wait. There are some where this rank is alone
    // in its stage, and so there is one band.
    void border(int64_t thread, int64_t& phase, Band& band, Left left, const Sum& sum) {
        for (int64_t piece = 0; piece < step_.border_most; piece++) {
            if (step_.behind) {
                if (thread == 0) is_awaited_.store(step_.behind->is_awaited());
                team_.barrier();
                if (is_awaited_.load()) return;
            }
            units(thread, phase, band, left, model_.border_out[piece], sum);
            if (thread == 0) (*step_.border_made)++;
        }
    }

    // Begins the sum of an MLP's units.
    void units(int64_t thread, int64_t& phase, Band& band, Left left, const Mlp& mlp, const Sum& sum) {
        multiply(thread, phase, band, left, mlp.gate_up, End::kSwish, nullptr, act_, act_row_ * per_word_);
        begin(thread, phase, band, Left{act_, act_row_}, mlp.down, sum);
    }

    // This rank's part of left * matrix; all of it where the rank is alone. Bands come in their order.
    void begin(int64_t thread, int64_t& phase, Band& band, Left left, const Matrix& matrix, const Sum& sum) {
        if (!step_.tensor) {
            multiply(thread, phase, band, left, matrix, sum.end, sum.to, nullptr, model_.hidden);
            return;
        }
        Peers& peers = *step_.tensor;
        float* const own = reinterpret_cast<float*>(peers.turn_regions()[peers.rank]);
        multiply(thread, phase, band, left, matrix, End::kStore, own, nullptr, model_.hidden);
        if (thread || !band.meeting) return;
        band.all_there = band.meeting->come(peers.size);
        if (&band != &bands_.back()) return;
        peers.turn++;  // the other threads look at it behind the next barrier
        peers.given += tensor_bytes(model_, tokens_);
    }

    // What has begun, summed over the ranks in their order: so all have the same bits. False: a broken group.
    bool finish(int64_t thread, int64_t& phase, const Band& band, const Sum& sum) {
        if (!step_.tensor || !sum.to) return true;
        Peers& peers = *step_.tensor;
        const bool all_there = band.meeting
            ? await(thread, [&] { return band.meeting->passed.await(band.all_there); })
            : exchange(thread, peers, tensor_bytes(model_, tokens_), *sum.next);
        if (!all_there) return false;
        if (peers.reads_ahead) fetch(thread, *sum.next, kFetchAdding);
        char* const* const parts = peers.last_regions();
        rows(phase, band, [&](int64_t row) {
            if (sum.end == End::kStore) std::fill_n(sum.to + row * model_.hidden, model_.hidden, 0.f);
            for (int64_t rank = 0; rank < peers.size; rank++)
                kernels_.add(reinterpret_cast<const float*>(parts[rank]) + row * model_.hidden, model_.hidden,
                             sum.to + row * model_.hidden);
        });
        return true;
    }

    // The queries of all groups of the slice, side by side. False: a broken group.
    bool gather_queries(int64_t thread, int64_t& phase, const Matrix& next) {
        Peers& peers = *step_.slice;
        const int64_t row_bytes = q_columns_ * element_;
        if (!exchange(thread, peers, tokens_ * row_bytes, next)) return false;
        char* const* const parts = peers.last_regions();
        rows(phase, [&](int64_t row) {
            for (int64_t rank = 0; rank < peers.size; rank++)
                std::memcpy(q_ + (row * peers.size + rank) * row_bytes, parts[rank] + row * row_bytes, row_bytes);
        });
        return true;
    }

    // What the groups found for this rank's heads becomes one. False: a broken group.
    bool merge_groups(int64_t thread, int64_t& phase, const Matrix& next) {
        Peers& peers = *step_.slice;
        if (!exchange(thread, peers, found_bytes(model_, tokens_), next)) return false;
        char* const* const parts = peers.last_regions();
        const int64_t dim = model_.head_dim;
        rows(phase, [&](int64_t row) {
            for (int64_t head = 0; head < model_.q_heads; head++) {
                const int64_t from = row * model_.attended_heads + peers.rank * model_.q_heads + head;
                const auto part = [&](int64_t rank) {
                    const float* const outs = reinterpret_cast<const float*>(parts[rank]);
                    return Part{outs + from * dim, outs[tokens_ * attended_columns_ + from]};
                };
                float lse;
                merge_parts(part, peers.size, dim, attended_ + row * q_columns_ + head * dim, &lse);
            }
        });
        return true;
    }

    void rotate(int64_t& phase, const Band& band, const Layer& layer, int64_t index) {
        const Rotation rotation{qkv_,           angles_,        layer.q_norm,      layer.k_norm,
                                rotated_q(),    step_.pool + index * step_.layer_stride,
                                step_.block_stride, step_.slots, model_.q_heads,   model_.kv_heads,
                                model_.head_dim, step_.block_size, step_.is_int8,  model_.eps};
        rows(phase, band, [&](int64_t row) { kernels_.rotate(rotation, row); });
    }

    char* rotated_q() const { return step_.slice ? step_.slice->turn_regions()[step_.slice->rank] : q_; }

    void attend(int64_t& phase, const Layer& layer, int64_t index, char* scratch) {
        const Plan& plan = plans_[layer.window];
        Call call = calls_[layer.window];
        call.pools = &pools_[index];
        const Kernel direct = call.is_bf16 ? level_.direct_bf16 : level_.direct_f32;
        const Kernel tiled = call.is_bf16 ? level_.tiled_bf16 : level_.tiled_f32;
        const int64_t items = (int64_t)plan.items.size();
        Counter& counter = team_.counter(phase++);
        for (int64_t item; (item = counter.claim(items)) < items;)
            if (scratch) (item < plan.num_tiled ? tiled : direct)(call, plan.items[item], scratch);
        team_.barrier();
        if (plan.merges.empty()) return;
        const int64_t merges = (int64_t)plan.merges.size();
        Counter& merged = team_.counter(phase++);
        for (int64_t at; (at = merged.claim(merges)) < merges;) merge(call, plan, plan.merges[at]);
        team_.barrier();
    }

    static void merge(const Call& call, const Plan& plan, const Merge& merge) {
        const int64_t heads = merge.num_tokens * call.q_heads, dim = call.head_dim;
        for (int64_t i = 0; i < heads; i++) {
            const int64_t from = merge.part * call.q_heads + i, to = merge.token * call.q_heads + i;
            merge_parts(plan.outs.data() + from * dim, heads * dim, plan.lses.data() + from, heads, merge.num_parts,
                        dim, call.out + to * dim, call.lse + to);
        }
    }

    Engine& engine_;
    Team& team_;
    const Model& model_;
    const Step& step_;
    const Level& level_;
    const StepKernels& kernels_;
    const int64_t tokens_, element_, per_word_, q_columns_, attended_columns_, qkv_columns_;
    float *angles_, *qkv_;
    float *out_, *lse_;  // of this rank's pages: [tokens][attended_heads][head_dim] and [tokens][attended_heads]
    float* attended_;    // of all pages: [tokens][q_heads][head_dim]
    char *left_, *q_, *act_;
    int64_t act_row_;
    std::vector<Call> calls_;
    std::vector<Plan> plans_;
    std::vector<Pool> pools_;
    std::vector<Band> bands_;
    std::atomic<bool> failed_{false}, broken_{false}, is_awaited_{false};
};

namespace {

// Whether the bytes of a step fit into a region of its group; if not, `message` says so.
bool fits(const char* name, const Peers* peers, int64_t tokens, int64_t bytes, char* message, int64_t size) {
    if (!peers || bytes <= peers->capacity) return true;
    std::snprintf(message, (size_t)size,
                  "%s: a step of %lld tokens exchanges %lld bytes, its regions hold %lld; give the group larger ones "
                  "or the step at most %lld tokens",
                  name, (long long)tokens, (long long)bytes, (long long)peers->capacity,
                  (long long)(peers->capacity / (bytes / tokens)));
    return false;
}

}  // namespace

int64_t Engine::forward(const Model& model, const Step& step, char* message, int64_t size) {
    const Level* level = level_of(model.level);
    if (!level) {
        std::snprintf(message, (size_t)size, "level %lld is not built", (long long)model.level);
        return 1;
    }
    const int64_t slice_bytes =
        std::max(found_bytes(model, step.num_tokens),
                 step.num_tokens * model.q_heads * model.head_dim * (model.is_bf16 ? 2 : 4));
    if (!fits("tensor", step.tensor, step.num_tokens, tensor_bytes(model, step.num_tokens), message, size) ||
        !fits("slice", step.slice, step.num_tokens, slice_bytes, message, size))
        return 1;
    if (step.border_given < 0 || step.border_given > model.num_border_in) {
        std::snprintf(message, (size_t)size, "border: got %lld pieces, must be from 0 to %lld",
                      (long long)step.border_given, (long long)model.num_border_in);
        return 1;
    }
    for (int64_t t = 0; t < step.num_tokens; t++) {
        if (step.tokens && (step.tokens[t] < 0 || step.tokens[t] >= model.vocab)) {
            std::snprintf(message, (size_t)size, "tokens[%lld]: got %lld, must be from 0 to %lld", (long long)t,
                          (long long)step.tokens[t], (long long)model.vocab - 1);
            return 1;
        }
        if (step.slots[t] >= step.num_blocks * step.block_size) {
            std::snprintf(message, (size_t)size, "slots[%lld]: got %lld, must be below %lld", (long long)t,
                          (long long)step.slots[t], (long long)(step.num_blocks * step.block_size));
            return 1;
        }
    }
    Forward forward(*this, model, step, *level);
    for (Call call : forward.calls()) {
        const Pool pool{step.pool, step.block_stride, step.num_blocks};
        call.pools = &pool;
        if (faulty(call, message, (size_t)size)) return 1;
    }
    team_.run(forward.num_phases(), forward);
    return forward.broken() ? kBroken : forward.failed() ? 2 : 0;
}

int64_t Engine::head(const Model& model, const float* hidden, const int64_t* rows, int64_t num_rows, float* logits,
                     int32_t* tokens, float* values, float* totals) {
    const Level* level = level_of(model.level);
    const StepKernels& kernels = model.is_bf16 ? *level->step_bf16 : *level->step_f32;
    const int64_t row_size = row_words(divide_up(model.hidden, model.is_bf16 ? 2 : 1));
    char* const left = left_.take(num_rows * row_size * 4);
    const int64_t threads = team_.size();  // of this run: its end may change them
    Best* const best = reinterpret_cast<Best*>(best_.take(threads * num_rows * (int64_t)sizeof(Best)));
    auto body = [&](int64_t thread) {
        Counter& prepared = team_.counter(0);
        for (int64_t row; (row = prepared.claim(num_rows)) < num_rows;)
            kernels.norm(hidden + rows[row] * model.hidden, model.norm, model.eps, model.hidden,
                         left + row * row_size * 4);
        Best* const own = best + thread * num_rows;
        std::fill_n(own, num_rows, Best{-std::numeric_limits<float>::infinity(), 0, 0.f});
        team_.barrier();
        const Product product{left, row_size, model.head, End::kBest, logits, nullptr, model.head.columns, own};
        Forward::deal(team_, 1, thread, kernels, product, 0, num_rows);
    };
    team_.run(2, body);
    for (int64_t row = 0; row < num_rows; row++) {
        Best all = best[row];
        for (int64_t thread = 1; thread < threads; thread++) {
            const Best& other = best[thread * num_rows + row];
            all.total += other.total;
            if (other.value > all.value || (other.value == all.value && other.id < all.id))
                all.value = other.value, all.id = other.id;
        }
        tokens[row] = all.id;
        values[row] = all.value;
        totals[row] = all.total;
    }
    return 0;
}

}  // namespace quire

quire::Engine* quire_engine_new(int64_t threads) try {
    return new quire::Engine(threads);
} catch (const std::exception&) {
    return nullptr;
}

quire::Engine* quire_engine_restless(int64_t threads) try {
    return new quire::Engine(threads, quire::Patience{-1.0, 1, {}, {}});
} catch (const std::exception&) {
    return nullptr;
}

void quire_engine_free(quire::Engine* engine) { delete engine; }

int64_t quire_forward(quire::Engine* engine, const quire::Model* model, const quire::Step* step, char* message,
                      int64_t size) try {
    return engine->forward(*model, *step, message, size);
} catch (const std::bad_alloc&) {
    return 2;
}

int64_t quire_head(quire::Engine* engine, const quire::Model* model, const float* hidden, int64_t num_hidden,
                   const int64_t* rows, int64_t num_rows, float* logits, int32_t* tokens, float* values,
                   float* totals) try {
    for (int64_t row = 0; row < num_rows; row++)
        if (rows[row] < 0 || rows[row] >= num_hidden) return 1;
    return engine->head(*model, hidden, rows, num_rows, logits, tokens, values, totals);
} catch (const std::bad_alloc&) {
    return 2;
}

int64_t quire_choose(quire::Engine* engine, int64_t level, const float* logits, int64_t row_stride, int64_t rows,
                     int64_t vocab, const quire::Choice* choices, int64_t* tokens) try {
    const quire::Level& kernels = *quire::level_of(level);
    if (engine)
        engine->choose(kernels, logits, row_stride, rows, vocab, choices, tokens);
    else
        for (int64_t row = 0; row < rows; row++)
            tokens[row] = kernels.choose(logits + row * row_stride, vocab, choices[row]);
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

void quire_pack(const char* const* rows, int64_t panels, int64_t columns, int64_t is_bf16, uint32_t* to) {
    const int64_t depth = quire::divide_up(columns, is_bf16 ? 2 : 1), bytes = columns * (is_bf16 ? 2 : 4);
    for (int64_t panel = 0; panel < panels; panel++, to += depth * quire::kPanel) {
        for (int64_t lane = 0; lane < quire::kPanel; lane++) {
            const char* from = rows[panel * quire::kPanel + lane];
            for (int64_t k = 0; k < depth; k++) {
                uint32_t word = 0;
                if (from) std::memcpy(&word, from + k * 4, (size_t)std::min<int64_t>(4, bytes - k * 4));
                to[k * quire::kPanel + lane] = word;
            }
        }
    }
}

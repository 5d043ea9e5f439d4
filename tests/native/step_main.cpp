// Runs decoder steps of a small random model at every level, for the sanitizers: prefill and decode rows in one batch,
// windows, odd sizes, pages in any order, teams of several sizes; two ranks that split their sums and their pages; what
// a ring waits on; stages with pieces of an MLP in common; what a step's rows are in block tables. Exit 1 where two teams
// disagree.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../kernels/csrc/exports.h"
#include "../../kernels/csrc/peers.h"
#include "../../kernels/csrc/step.h"
#include "../../kernels/csrc/team.h"
#include "tables_check.h"

using namespace quire;

namespace {

std::mt19937 draw(7);

struct Weights {  // exact sizes on the heap, so that a read beyond is seen
    std::vector<std::unique_ptr<char[]>> kept;
    bool bf16;

    char* values(int64_t count, float scale) {
        std::normal_distribution<float> normal(0.f, scale);
        char* out = kept.emplace_back(new char[count * (bf16 ? 2 : 4)]).get();
        for (int64_t i = 0; i < count; i++) {
            const float x = normal(draw);
            uint32_t bits;
            std::memcpy(&bits, &x, 4);
            if (bf16) {
                const uint16_t half = (uint16_t)(bits >> 16);
                std::memcpy(out + 2 * i, &half, 2);
            } else {
                std::memcpy(out + 4 * i, &x, 4);
            }
        }
        return out;
    }
    float* floats(int64_t count, float value) {
        float* out = reinterpret_cast<float*>(kept.emplace_back(new char[count * 4]).get());
        for (int64_t i = 0; i < count; i++) out[i] = value;
        return out;
    }
    // `paired`: 16 gates and 16 ups to a panel
    Matrix matrix(int64_t columns, int64_t depth, bool paired, bool bias) {
        const int64_t lanes = paired ? (columns + 15) / 16 * 32 : columns, panels = (lanes + kPanel - 1) / kPanel;
        const int64_t row = depth * (bf16 ? 2 : 4), words = bf16 ? (depth + 1) / 2 : depth;
        const char* plain = values((paired ? 2 : 1) * columns * depth, 1.f / std::sqrt((float)depth));
        std::vector<const char*> rows(panels * kPanel, nullptr);
        for (int64_t lane = 0; lane < lanes; lane++) {
            const int64_t column = paired ? lane / 32 * 16 + lane % 16 : lane;
            if (column < columns) rows[lane] = plain + ((paired && lane % 32 >= 16 ? columns : 0) + column) * row;
        }
        char* packed = kept.emplace_back(new char[panels * words * kPanel * 4]).get();
        quire_pack(rows.data(), panels, depth, bf16, reinterpret_cast<uint32_t*>(packed));
        return {packed, bias ? floats(panels * kPanel, 0.01f) : nullptr, words, lanes};
    }
    Mlp mlp(int64_t hidden, int64_t units, bool bias) {
        return {floats(hidden, 1.f), matrix(units, hidden, true, bias), matrix(hidden, units, false, bias)};
    }
};

bool run(int64_t level, bool bf16, bool deterministic, bool int8) {
    const int64_t hidden = 45, heads = 6, kv_heads = 2, dim = 34, intermediate = 37, vocab = 83, layers = 2, block = 4;
    Weights weights{{}, bf16};
    std::vector<Layer> layer(layers);
    for (int64_t i = 0; i < layers; i++) {
        layer[i] = {weights.floats(hidden, 1.f), weights.floats(dim, 1.f), weights.floats(dim, 1.f),
                    weights.matrix((heads + 2 * kv_heads) * dim, hidden, false, true),
                    weights.matrix(hidden, heads * dim, false, false), weights.mlp(hidden, intermediate, true), i};
    }
    std::vector<double> frequencies(dim / 2);
    for (int64_t i = 0; i < dim / 2; i++) frequencies[i] = std::pow(10000.0, -2.0 * (double)i / (double)dim);
    const Model model{layer.data(), {}, nullptr, nullptr, 0, 0, weights.floats(hidden, 1.f), weights.matrix(vocab, hidden, false, false),
                      weights.values(vocab * hidden, 1.f), frequencies.data(), layers, hidden, heads, heads, kv_heads, dim,
                      intermediate, vocab, bf16, level, 1e-5, 1.0};
    // rows: a long prefill, a short one, decodes with a past; every past is computed first as a prefill of its own
    const std::vector<int64_t> lengths = {97, 5, 1, 23, 1};
    const int64_t blocks = 64, element = int8 ? 1 : bf16 ? 2 : 4;
    const int64_t block_bytes = 2 * kv_heads * head_bytes(block, dim, element, int8);
    std::vector<std::vector<float>> results;
    for (int64_t threads : {1, 2, 3, -2}) {  // the last: a team that changes its size between its runs
        std::unique_ptr<char[]> pool(new char[layers * blocks * block_bytes]());
        Engine* engine = threads > 0 ? quire_engine_new(threads) : quire_engine_restless(-threads);
        std::vector<int32_t> order(blocks);
        for (int64_t i = 0; i < blocks; i++) order[i] = (int32_t)((i * 37 + 11) % blocks);
        std::vector<float> all;
        for (int64_t pass = 0; pass < 3; pass++) {  // the prompts, then two tokens more of each
            std::vector<int64_t> tokens, positions, slots;
            std::vector<int32_t> query_start{0}, first, start{0}, ids, at;
            int64_t taken = 0;
            for (size_t row = 0; row < lengths.size(); row++) {
                const int64_t begin = pass ? lengths[row] + pass - 1 : 0, end = lengths[row] + pass;
                const int64_t pages = (lengths[row] + 2 + block - 1) / block;
                for (int64_t p = begin; p < end; p++) {
                    tokens.push_back((p * 31 + (int64_t)row * 7) % vocab);
                    positions.push_back(p);
                    slots.push_back(order[taken + p / block] * block + p % block);
                }
                query_start.push_back((int32_t)tokens.size());
                first.push_back((int32_t)begin);
                for (int64_t page = 0; page * block < end; page++) {
                    ids.push_back(order[taken + page]);
                    at.push_back((int32_t)(page * block));
                }
                start.push_back((int32_t)ids.size());
                taken += pages;
            }
            const int32_t* starts[] = {start.data(), start.data()};
            const int32_t* page_ids[] = {ids.data(), ids.data()};
            const int32_t* page_at[] = {at.data(), at.data()};
            const int64_t windows[] = {0, 9}, entries[] = {(int64_t)ids.size(), (int64_t)ids.size()};
            const int64_t count = (int64_t)tokens.size();
            std::vector<float> hidden_rows(count * hidden);
            const Step step{tokens.data(), positions.data(), slots.data(), query_start.data(), first.data(), starts,
                            page_ids, page_at, windows, entries, pool.get(), hidden_rows.data(), nullptr, nullptr, 0, 0, nullptr, nullptr,
                            blocks * block_bytes, block_bytes, blocks, block, count, (int64_t)lengths.size(), 2,
                            deterministic, int8, nullptr, nullptr};
            char message[200] = "";
            if (quire_forward(engine, &model, &step, message, sizeof message)) {
                std::fprintf(stderr, "forward: %s\n", message);
                return false;
            }
            std::vector<int64_t> rows;
            for (size_t row = 0; row < lengths.size(); row++) rows.push_back(query_start[row + 1] - 1);
            std::vector<float> logits(rows.size() * vocab), values(rows.size()), totals(rows.size());
            std::vector<int32_t> best(rows.size());
            quire_head(engine, &model, hidden_rows.data(), count, rows.data(), (int64_t)rows.size(), logits.data(),
                       best.data(), values.data(), totals.data());
            all.insert(all.end(), hidden_rows.begin(), hidden_rows.end());
            all.insert(all.end(), logits.begin(), logits.end());
            all.insert(all.end(), best.begin(), best.end());
            all.insert(all.end(), values.begin(), values.end());
            const Choice kinds[] = {{0.7, 0.0, 1.0, 0.5, vocab}, {1.3, 0.0, 0.8, 0.9, vocab}, {1.0, 0.1, 1.0, 0.3, 7},
                                    {0.9, 0.0, 0.5, 0.1, 20},    {1.0, 0.0, 0.9, 0.99, vocab - 1}};
            std::vector<Choice> choices;
            for (size_t row = 0; row < rows.size(); row++) choices.push_back(kinds[row % 5]);
            std::vector<int64_t> chosen(rows.size());
            quire_choose(engine, level, logits.data(), vocab, (int64_t)rows.size(), vocab, choices.data(), chosen.data());
            all.insert(all.end(), chosen.begin(), chosen.end());
        }
        quire_engine_free(engine);
        for (float x : all)
            if (!std::isfinite(x)) return std::fprintf(stderr, "not finite\n"), false;
        results.push_back(all);
    }
    for (auto& each : results)
        for (size_t i = 0; i < each.size(); i++)
            if (each[i] != results[0][i]) {
                std::fprintf(stderr, "level %d bf16 %d int8 %d: teams differ at %zu\n", (int)level, bf16, int8, i);
                return false;
            }
    return true;
}

// Two ranks in threads of one process, in what would be shared memory.
struct Pair {
    static constexpr int64_t kCapacity = 1 << 20;
    std::unique_ptr<char[]> memory{new char[4 * kCapacity]};
    static constexpr int64_t kBands = 2;
    alignas(64) char header[(1 + kBands) * sizeof(Meeting)] = {};
    Member member{reinterpret_cast<Meeting*>(header), 2};
    std::vector<char*> regions;
    std::vector<Peers> ranks;

    Pair() {
        for (int i = 0; i < 4; i++) regions.push_back(memory.get() + i * kCapacity);
        for (int64_t rank = 0; rank < 2; rank++)
            ranks.push_back({rank, 2, regions.data(), kCapacity, 0, rank, &member, quire_shared_exchange,
                             member.meeting + 1, kBands});
    }
};

// Each rank has all heads' weights of its own (three of six query heads), and every second page, of a stage whose MLPs
// are cut at both ends; a group that breaks.
bool run_split(int64_t level, bool bf16, bool int8) {
    const int64_t hidden = 45, heads = 3, kv_heads = 2, dim = 34, mlp = 32, vocab = 83, block = 4, blocks = 64;
    const int64_t block_bytes = 2 * kv_heads * head_bytes(block, dim, int8 ? 1 : bf16 ? 2 : 4, int8);
    Weights weights{{}, bf16};
    std::vector<double> frequencies(dim / 2, 0.1);
    Layer layer{weights.floats(hidden, 1.f), nullptr, nullptr,
                weights.matrix((heads + 2 * kv_heads) * dim, hidden, false, true),
                weights.matrix(hidden, heads * dim, false, false), weights.mlp(hidden, mlp, false), 0};
    const Model model{&layer, weights.mlp(hidden, mlp - 5, false), nullptr, nullptr, 0, 0, nullptr, {},
                      weights.values(vocab * hidden, 1.f), frequencies.data(), 1, hidden, heads, 2 * heads, kv_heads, dim, mlp, vocab, bf16, level, 1e-5, 1.0};
    Pair tensor, slice;
    std::vector<float> rows[2];
    int64_t codes[2] = {};
    const auto rank_body = [&](int64_t rank) {
        Engine* engine = rank ? quire_engine_restless(2) : quire_engine_new(2);  // bands are cut alike all the same
        std::unique_ptr<char[]> pool(new char[blocks * block_bytes]());
        for (int64_t length : {40, 500, 3, 1}) {  // each alone, from its first token; one in two bands
            std::vector<int64_t> tokens, positions, slots;
            std::vector<int32_t> ids, at;
            for (int64_t p = 0; p < length; p++) {
                const int64_t page = p / block;
                tokens.push_back(p * 31 % vocab);
                positions.push_back(p);
                slots.push_back(page % 2 == rank ? page / 2 * block + p % block : -1);
                if (page % 2 == rank && p % block == 0) ids.push_back((int32_t)page / 2), at.push_back((int32_t)p);
            }
            const int32_t query_start[] = {0, (int32_t)length}, first[] = {0}, start[] = {0, (int32_t)ids.size()};
            const int32_t *starts[] = {start}, *page_ids[] = {ids.data()}, *page_at[] = {at.data()};
            const int64_t windows[] = {0}, entries[] = {(int64_t)ids.size()};
            std::vector<float> out(length * hidden), partial(length * hidden, 0.5f);
            const Step step{tokens.data(), positions.data(), slots.data(), query_start, first, starts, page_ids,
                            page_at, windows, entries, pool.get(), out.data(), partial.data(), partial.data(), 0, 0, nullptr, nullptr,
                            blocks * block_bytes, block_bytes, blocks, block, length, 1, 1, 0, int8, &tensor.ranks[rank], &slice.ranks[rank]};
            char message[200] = "";
            codes[rank] = quire_forward(engine, &model, &step, message, sizeof message);
            if (codes[rank]) std::fprintf(stderr, "split: %s\n", message);
            rows[rank].insert(rows[rank].end(), out.begin(), out.end());
            rows[rank].insert(rows[rank].end(), partial.begin(), partial.end());
        }
        quire_engine_free(engine);
    };
    std::thread other(rank_body, 1);
    rank_body(0);
    other.join();
    for (float x : rows[0])
        if (!std::isfinite(x)) return std::fprintf(stderr, "split: not finite\n"), false;
    if (codes[0] || codes[1] || rows[0] != rows[1]) return std::fprintf(stderr, "split: ranks differ\n"), false;
    return true;
}

// Two stages in threads, each with a team, that have four pieces of an MLP in common. The same step again and again, of
// which now this and now that stage does more: its bits do not change.
bool a_border_moves(int64_t level, bool bf16) {
    const int64_t hidden = 45, heads = 3, dim = 34, mlp = 32, vocab = 83, block = 4, count = 3, turns = 40;
    const int64_t block_bytes = 2 * heads * head_bytes(block, dim, bf16 ? 2 : 4, false), numbers = count * hidden;
    Weights weights{{}, bf16};
    std::vector<double> frequencies(dim / 2, 0.1);
    std::vector<Mlp> border;
    for (int64_t piece = 0; piece < 4; piece++) border.push_back(weights.mlp(hidden, 16, false));
    Layer layers[2];
    Model models[2];
    for (int64_t stage = 0; stage < 2; stage++) {
        layers[stage] = {weights.floats(hidden, 1.f), nullptr, nullptr, weights.matrix(3 * heads * dim, hidden, false, true),
                         weights.matrix(hidden, heads * dim, false, false), weights.mlp(hidden, mlp, false), 0};
        models[stage] = {&layers[stage], stage ? weights.mlp(hidden, mlp - 5, false) : Mlp{}, border.data(), border.data(),
                         stage ? 4 : 0, stage ? 0 : 4, nullptr, {}, weights.values(vocab * hidden, 1.f),
                         frequencies.data(), 1, hidden, heads, heads, heads, dim, mlp, vocab, bf16, level, 1e-5, 1.0};
    }
    alignas(64) char counts[2][sizeof(SharedCount)] = {};
    const int64_t stride = Ring::kLine + (2 * numbers * 4 + 63) / 64 * 64;
    std::unique_ptr<char[]> slots(new char[2 * stride]);
    auto* const published = reinterpret_cast<SharedCount*>(counts[0]);
    auto* const released = reinterpret_cast<SharedCount*>(counts[1]);
    int64_t codes[2] = {};
    std::vector<std::vector<float>> found;
    const auto stage_body = [&](int64_t stage) {
        Ring ring{published, released, slots.get(), stride, 2, 2 * numbers * 4, 0, 0, {}};
        Engine* engine = quire_engine_new(2);
        std::unique_ptr<char[]> pool(new char[block_bytes]());
        const int64_t tokens[] = {7, 60, 11}, positions[] = {0, 1, 2}, at_slots[] = {0, 1, 2}, windows[] = {0}, entries[] = {1};
        const int32_t query_start[] = {0, 3}, zero[] = {0, 1};
        const int32_t *starts[] = {zero}, *pages[] = {zero};
        for (int64_t turn = 0; turn < turns && !codes[stage]; turn++) {
            char* const message = stage ? ring.receive() + Ring::kLine : ring.slot();
            float* const given = reinterpret_cast<float*>(message);
            std::vector<float> own(given, given + (stage ? numbers : 0));
            int64_t tag = 0, made = 0;
            if (stage) std::memcpy(&tag, message - Ring::kLine, 8);
            const Step step{stage ? nullptr : tokens, positions, at_slots, query_start, zero, starts, pages, pages, windows,
                            entries, pool.get(), stage ? own.data() : given, stage ? given + numbers : nullptr,
                            stage ? nullptr : given + numbers, tag, stage ? 0 : 4, turn % 4 ? &ring : nullptr, &made,
                            block_bytes, block_bytes, 1, block, count, 1, 1, 0, 0, nullptr, nullptr};
            char text[200] = "";
            codes[stage] = quire_forward(engine, &models[stage], &step, text, sizeof text);
            if (codes[stage]) std::fprintf(stderr, "border: %s\n", text);
            if (stage == 0) {
                ring.publish(made, 2 * numbers * 4);
                continue;
            }
            found.push_back(own);
            if (turn % 3) std::this_thread::sleep_for(std::chrono::microseconds(turn * 20));
            ring.release();
        }
        quire_engine_free(engine);
    };
    std::thread other(stage_body, 1);
    stage_body(0);
    other.join();
    for (const auto& rows : found)
        for (size_t i = 0; i < rows.size(); i++)
            if (!(rows[i] == found[0][i])) return std::fprintf(stderr, "border: rows differ\n"), false;
    return !codes[0] && !codes[1] && (int64_t)found.size() == turns;
}

// Numbers through a circle of three, and the end of whoever waits when it breaks.
bool counts_hand_on_and_break() {
    alignas(64) char memory[2][sizeof(SharedCount)] = {};
    auto* const published = reinterpret_cast<SharedCount*>(memory[0]);
    auto* const released = reinterpret_cast<SharedCount*>(memory[1]);
    int64_t slots[3] = {}, sum = 0, code = 0;
    const std::vector<char> behind(3000);
    const Ahead ahead{behind.data(), (int64_t)behind.size()};
    std::thread producer([&] {
        for (int64_t i = 0; i < 3000; i++) {
            if (quire_count_await(released, (uint32_t)(i - 2) & 0x7fffffff, nullptr)) return;
            slots[i % 3] = i;
            quire_count_advance(published);
        }
    });
    for (int64_t i = 0; i < 3000; i++) {
        if (quire_count_await(published, (uint32_t)i + 1, &ahead)) break;
        sum += slots[i % 3];
        quire_count_advance(released);
    }
    producer.join();
    std::thread waiting([&] { code = quire_count_await(published, 3001, &ahead); });
    quire_count_fail(published);
    waiting.join();
    if (sum == 2999 * 1500 && code == kBroken) return true;
    return std::fprintf(stderr, "counts: %d %d\n", (int)sum, (int)code), false;
}

bool tables_tell_what_rows_are() {
    for (int trial = 0; trial < 300; trial++) {
        TablesCheck check(draw);
        const char* fault = nullptr;
        if (!check.rows_are_right()) fault = "rows differ";
        if (!check.pages_are_right()) fault = "pages differ";
        if (!check.misfits_are_refused()) fault = "takes rows that do not fit";
        if (!check.changes_are_right()) fault = "changes wrongly";
        if (fault) return std::fprintf(stderr, "tables: trial %d %s\n", trial, fault), false;
    }
    return true;
}

// Plans of a rank whose vocabulary is empty, so that none is plain: lengths of any kind, in memory of just their size.
bool plans_are_read_within_their_bytes() {
    Model model{};
    Tables tables{};
    tables.group = -1;
    Rank rank{};
    rank.model = &model, rank.tables = &tables;
    const auto any = [](int64_t end) { return (int64_t)(draw() % (uint32_t)end); };
    for (int trial = 0; trial < 20000; trial++) {
        const int64_t words = any(60), bytes = any(4) ? 4 * words : any(240);
        std::unique_ptr<char[]> plan(new char[bytes]), tokens(new char[bytes + 4]);
        for (int64_t at = 0; at < bytes; at++) plan[at] = 0;
        for (int64_t at = 0; at + 4 <= bytes; at += 4) {
            const uint32_t huge = 0xffffffffu >> any(32), value = any(20) ? (uint32_t)any(4) * (any(3) == 0) : huge;
            std::memcpy(plan.get() + at, &value, 4);
        }
        rank.column = any(3);
        int64_t count = 0;
        char message[8];
        if (quire_rank_run(&rank, plan.get(), bytes, reinterpret_cast<int32_t*>(tokens.get()), &count, message, 8) != 4)
            return std::fprintf(stderr, "plans: trial %d is taken\n", trial), false;
        // the same in a slot of a ring, now and then without the digest or longer than a slot
        const int64_t shown = 8 * (any(9) > 0) + bytes;
        SharedCount published{}, released{};
        std::unique_ptr<char[]> slot(new char[64 + shown]);
        std::memset(slot.get() + 64, 0, (size_t)shown);
        if (shown > bytes) std::memcpy(slot.get() + 72, plan.get(), (size_t)bytes);
        Ring ring{&published, &released, slot.get(), 64 + shown, 1, shown, 0, 0, {}};
        ring.publish(any(9) ? 0 : -1, shown + (any(9) ? 0 : 1 << 20));
        Progress progress{};
        if (quire_rank_follow(&rank, &ring, &progress, message, 8) != 4 || ring.done || progress.chain || progress.steps)
            return std::fprintf(stderr, "plans: trial %d is followed\n", trial), false;
    }
    return true;
}

// Threads that sleep while the first waits for another process do have cores.
bool team_stays_through_waits() {
    Patience patience;
    patience.part = 3;  // of the time that is not spent waiting: a busy machine comes to 1, sleep that counts to 30
    Team team(3, patience);
    for (int i = 0; i < 24; i++) {
        auto body = [&](int64_t thread) {
            if (thread == 0) {
                const auto began = std::chrono::steady_clock::now();
                std::this_thread::sleep_for(std::chrono::milliseconds(3));
                team.waited(std::chrono::steady_clock::now() - began);
            }
            team.barrier(true);
        };
        team.run(1, body);
    }
    if (team.size() != 3) return std::fprintf(stderr, "%d threads after waits\n", (int)team.size()), false;
    return true;
}

// A thread without a core holds up a team, which then does without it, and takes it back when it has one again.
bool team_lets_go_and_comes_back() {
    Patience patience;
    patience.shortest_pause = std::chrono::milliseconds(30);
    patience.longest_pause = std::chrono::milliseconds(60);
    Team team(3, patience);
    bool is_held_up = true;
    std::atomic<int64_t> done{0};
    int64_t runs = 0, fewest = 3;
    const auto one_run = [&] {
        done.store(0);
        auto body = [&](int64_t thread) {
            if (thread > 0 && is_held_up) std::this_thread::sleep_for(std::chrono::milliseconds(3));
            team.share(0, thread, 100, [&](int64_t) { done.fetch_add(1); });
            team.barrier();
            Counter& counter = team.counter(1);
            for (int64_t piece; (piece = counter.claim(50)) < 50;) done.fetch_add(1);
        };
        team.run(2, body);
        runs++;
        fewest = std::min(fewest, team.size());
        return done.load() == 150;
    };
    for (int i = 0; i < 2000 && fewest > 1; i++)
        if (!one_run()) return std::fprintf(stderr, "work was lost or done twice\n"), false;
    if (fewest != 1 || runs < 6) return std::fprintf(stderr, "%d threads after %d runs\n", (int)fewest, (int)runs), false;
    is_held_up = false;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (team.size() < 3 && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (!one_run()) return std::fprintf(stderr, "work was lost or done twice\n"), false;
    }
    if (team.size() != 3) return std::fprintf(stderr, "%d threads at the end\n", (int)team.size()), false;
    return true;
}

}  // namespace

int main() {
    if (!tables_tell_what_rows_are() || !plans_are_read_within_their_bytes()) return 1;
    if (!team_lets_go_and_comes_back() || !team_stays_through_waits() || !counts_hand_on_and_break()) return 1;
    for (int64_t level = 0; level < 3; level++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int int8 = 0; int8 < 2; int8++)
                if ((quire_levels() >> level & 1) && !run_split(level, bf16, int8)) return 1;
    for (int64_t level = 0; level < 3; level++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            if ((quire_levels() >> level & 1) && !a_border_moves(level, bf16)) return 1;
    for (int64_t level = 0; level < 3; level++)
        for (int bf16 = 0; bf16 < 2; bf16++)
            for (int deterministic = 0; deterministic < 2; deterministic++)
                for (int int8 = 0; int8 < 2; int8++)
                    if ((quire_levels() >> level & 1) && !run(level, bf16, deterministic, int8)) return 1;
    std::puts("equal");
    return 0;
}

// A rank's part of a plain plan: what nearly all steps of a decode are, without an object for each of its arrays.
//
// The bytes are those of worker/codec.py: a number, how long each array is, how long each column of those by column, the
// arrays, the columns, the admits. Whatever is not plain, or not right, is left to the caller, who can do all plans and
// say what is wrong with them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "chain.h"
#include "exports.h"
#include "peers.h"
#include "step.h"

namespace quire {
namespace {

constexpr int64_t kNotPlain = 4, kAnswered = 5;
constexpr int64_t kPauseNanoseconds = 20'000'000;

// In the order of the bytes; from kCopyFrom to kCopyTo, and from kScoreRow on, a plain plan has none.
enum : int64_t {
    kSlots, kQueryStart, kFirstPosition, kTokens, kTableSlot, kTableIndex, kTableGroup, kCopyFrom, kCopyTo, kSampleRow,
    kSampleSlot, kSamplePosition, kScoreRow, kScoreSlot, kScoreToken, kNumArrays
};
constexpr int64_t kByColumn = 3;  // table_blocks, copy_sources, copy_targets
constexpr int64_t kHeadBytes = 8 + 4 * (kNumArrays + kByColumn + 1), kResultBytes = 24;

struct Ints {
    const int32_t* at;
    int64_t count;
};

struct Plain {
    int64_t number;
    Ints arrays[kNumArrays];
    Ints blocks;  // table_blocks of the rank's column

    const Ints& operator[](int64_t array) const { return arrays[array]; }
};

// Where the arrays of a plan lie; false where it is none, or has what a plain one has not.
bool read(const char* data, int64_t bytes, int64_t column, Plain& plan) {
    if (bytes < kHeadBytes) return false;
    uint32_t counts[kNumArrays + kByColumn + 1];
    std::memcpy(&plan.number, data, 8);
    std::memcpy(counts, data + 8, sizeof counts);
    const uint32_t* const by_column = counts + kNumArrays;
    if (by_column[kByColumn]) return false;  // admits
    const int64_t num_columns = (int64_t)by_column[0] + by_column[1] + by_column[2];
    if (num_columns > (bytes - kHeadBytes) / 4 || column >= by_column[0]) return false;
    const auto* const columns = reinterpret_cast<const uint32_t*>(data + kHeadBytes);
    const auto* const begin = reinterpret_cast<const int32_t*>(columns + num_columns);
    const int64_t room = (bytes - kHeadBytes) / 4 - num_columns;
    int64_t at = 0;
    const auto take = [&](int64_t count) {
        const Ints found{begin + std::min(at, room), count};
        at += count;
        return found;
    };
    for (int64_t i = 0; i < kNumArrays; i++) plan.arrays[i] = take(counts[i]);
    for (int64_t i = 0; i < num_columns; i++) {
        const Ints found = take(columns[i]);
        if (i == column) plan.blocks = found;
        if (i >= by_column[0] && found.count) return false;
    }
    return at == room && bytes == kHeadBytes + 4 * (num_columns + room);
}

// Working memory of the calls of one thread.
struct Scratch {
    std::vector<char> plan;
    std::vector<int32_t> tokens;
    std::vector<int64_t> ids, positions, slots, rows, num_entries;
    std::vector<int32_t> query_start, first;
    std::vector<std::vector<int32_t>> start, block, position;  // by window
    std::vector<const int32_t*> starts, blocks, places;
    std::vector<float> hidden, partial, values, totals;
};

bool all_in(const Ints& values, int64_t end) {
    return std::all_of(values.at, values.at + values.count, [&](int32_t value) { return value >= 0 && value < end; });
}

bool is_plain(const Rank& rank, const Plain& plan) {
    const int64_t rows = plan[kSlots].count, changes = plan.blocks.count, samples = plan[kSampleRow].count;
    for (const int64_t none : {kCopyFrom, kCopyTo, kScoreRow, kScoreSlot, kScoreToken})
        if (plan[none].count) return false;
    if (plan[kTokens].count == 0 || plan[kQueryStart].count != rows + 1 || plan[kFirstPosition].count != rows ||
        plan[kTableSlot].count != changes || plan[kTableIndex].count != changes ||
        (rank.tables->group >= 0 && plan[kTableGroup].count != changes) || plan[kSampleSlot].count != samples)
        return false;
    if (!all_in(plan[kTokens], rank.model->vocab) || !all_in(plan[kSampleRow], plan[kTokens].count) ||
        !all_in(plan[kSampleSlot], rank.num_slots))
        return false;
    const Ints& slots = plan[kSampleSlot];
    return rank.next || std::all_of(slots.at, slots.at + samples, [&](int32_t slot) { return rank.is_plain[slot]; });
}

// The step's arrays; false where the plan's rows do not fit the tables.
bool prepare(const Rank& rank, const Plain& plan, Scratch& scratch, Step& step) {
    const Ints &slot = plan[kTableSlot], &tokens = plan[kTokens];
    if (slot.count && quire_tables_change(rank.tables, slot.at, plan[kTableIndex].at, plan.blocks.at,
                                          rank.tables->group < 0 ? nullptr : plan[kTableGroup].at, slot.count))
        return false;
    const Rows rows{plan[kSlots].at, plan[kQueryStart].at, plan[kFirstPosition].at, tokens.at, plan[kSlots].count,
                    tokens.count};
    for (auto* by_token : {&scratch.ids, &scratch.positions, &scratch.slots}) by_token->resize(tokens.count);
    scratch.query_start.resize(rows.num_rows + 1), scratch.first.resize(rows.num_rows);
    if (quire_tables_rows(rank.tables, &rows, scratch.ids.data(), scratch.positions.data(), scratch.slots.data(),
                          scratch.query_start.data(), scratch.first.data()))
        return false;
    for (auto* by_window : {&scratch.start, &scratch.block, &scratch.position}) by_window->resize(rank.num_windows);
    for (auto* by_window : {&scratch.starts, &scratch.blocks, &scratch.places}) by_window->resize(rank.num_windows);
    scratch.num_entries.resize(rank.num_windows);
    for (int64_t i = 0; i < rank.num_windows; i++) {
        auto &start = scratch.start[i], &block = scratch.block[i], &position = scratch.position[i];
        start.resize(rows.num_rows + 1);
        const int64_t count = quire_tables_starts(rank.tables, &rows, rank.windows[i], start.data());
        block.resize(count), position.resize(count);
        quire_tables_pages(rank.tables, &rows, rank.windows[i], block.data(), position.data());
        scratch.starts[i] = start.data(), scratch.blocks[i] = block.data(), scratch.places[i] = position.data();
        scratch.num_entries[i] = count;
    }
    step.tokens = rank.previous ? nullptr : scratch.ids.data();
    step.positions = scratch.positions.data();
    step.slots = scratch.slots.data();
    step.query_start = scratch.query_start.data();
    step.first_position = scratch.first.data();
    step.page_start = scratch.starts.data();
    step.page_block = scratch.blocks.data();
    step.page_position = scratch.places.data();
    step.windows = rank.windows;
    step.num_entries = scratch.num_entries.data();
    step.pool = rank.pool;
    step.layer_stride = rank.layer_stride, step.block_stride = rank.block_stride, step.num_blocks = rank.num_blocks;
    step.block_size = rank.tables->block_size;
    step.num_tokens = tokens.count, step.num_rows = rows.num_rows, step.num_windows = rank.num_windows;
    step.is_deterministic = rank.is_deterministic, step.is_int8 = rank.is_int8;
    step.tensor = rank.tensor, step.slice = rank.slice;
    return true;
}

// Each sample entry's likeliest token in all of the vocabulary, or -1. 0, or what went wrong.
int64_t sample(const Rank& rank, const Plain& plan, const Step& step, Scratch& scratch, int32_t* tokens) {
    const Ints& rows = plan[kSampleRow];
    scratch.rows.assign(rows.at, rows.at + rows.count);
    scratch.values.resize(rows.count), scratch.totals.resize(rows.count);
    float *const values = scratch.values.data(), *const totals = scratch.totals.data();
    if (quire_head(rank.engine, rank.model, step.hidden, step.num_tokens, scratch.rows.data(), rows.count, nullptr,
                   tokens, values, totals))
        return 2;
    for (int64_t i = 0; i < rows.count; i++) tokens[i] += (int32_t)rank.first_row;
    const int64_t most = rank.tensor ? std::max<int64_t>(1, rank.tensor->capacity / kBestBytes) : rows.count;
    for (int64_t at = 0; rank.tensor && at < rows.count; at += most)
        if (quire_best_of_ranks(rank.tensor, std::min(most, rows.count - at), tokens + at, values + at, totals + at))
            return kBroken;
    for (int64_t i = 0; i < rows.count; i++)
        if (!std::isfinite(totals[i])) tokens[i] = -1;
    return 0;
}

// Sends the tokens as a result (worker/codec.py): the plan's number, how many, no logprobs, scores or failures, the
// tokens. False where the ring is broken.
bool answer(Ring& ring, int64_t number, const int32_t* tokens, int64_t count) {
    char* const message = ring.slot();
    if (!message) return false;
    const uint32_t counts[4] = {(uint32_t)count, 0, 0, 0};
    std::memcpy(message, &number, 8);
    std::memcpy(message + 8, counts, sizeof counts);
    std::memcpy(message + kResultBytes, tokens, 4 * (size_t)count);
    ring.publish(number, kResultBytes + 4 * count);
    return true;
}

// The plan in these bytes with its step's arrays; false where it is not plain, or not right.
bool begin(const Rank& rank, const char* data, int64_t bytes, Scratch& scratch, Plain& plan, Step& step) {
    return read(data, bytes, rank.column, plan) && is_plain(rank, plan) && prepare(rank, plan, scratch, step);
}

// Does what `begin` found, waiting for whatever it needs; kAnswered where the result has been sent, too.
int64_t carry_out(const Rank& rank, const Plain& plan, Step& step, Scratch& scratch, int32_t* tokens,
                  int64_t* num_tokens, char* message, int64_t size) {
    const int64_t numbers = step.num_tokens * rank.model->hidden, bytes = numbers * 4;
    const bool is_carried = rank.model->carried.norm;
    const auto refuse = [&](const char* text, int64_t got, int64_t needed) {
        std::snprintf(message, (size_t)size, text, (long long)got, (long long)step.num_tokens, (long long)needed);
        return int64_t{1};
    };
    const float* given = nullptr;
    int64_t made = 0;
    if (rank.previous) {
        const char* const head = rank.previous->receive();
        if (!head) return kBroken;
        int64_t tag, got;
        std::memcpy(&tag, head, 8), std::memcpy(&got, head + 8, 8);
        step.border_given = tag % kBorderPieces;
        if (tag / kBorderPieces != plan.number) {
            std::snprintf(message, (size_t)size, "hidden rows of plan %lld came for plan %lld",
                          (long long)(tag / kBorderPieces), (long long)plan.number);
            return kBroken;
        }
        if (got != bytes * (1 + is_carried))
            return refuse("hidden rows: got %lld bytes for a step of %lld tokens, must be %lld", got,
                          bytes * (1 + is_carried));
        given = reinterpret_cast<const float*>(head + Ring::kLine);
        // the lines are in another core's cache, from where one after the other takes 0.4 us each
        for (int64_t at = 0; at < got; at += 64) __builtin_prefetch(head + Ring::kLine + at, 0, 2);
    }
    if (rank.next) {
        const int64_t needed = bytes * (1 + rank.is_cut);
        if (needed > rank.next->capacity)
            return refuse("ring: a slot holds %lld bytes, hidden rows of a step of %lld tokens have %lld; give it larger "
                          "slots, or the step fewer tokens", rank.next->capacity, needed);
        step.hidden = reinterpret_cast<float*>(rank.next->slot());
        if (!step.hidden) return kBroken;
    } else {
        scratch.hidden.resize(numbers);
        step.hidden = scratch.hidden.data();
    }
    if (given) std::copy_n(given, numbers, step.hidden);
    if (is_carried) scratch.partial.assign(given + numbers, given + 2 * numbers);  // on lines of this core's own
    step.partial_in = is_carried ? scratch.partial.data() : nullptr;
    step.partial_out = rank.is_cut ? step.hidden + numbers : nullptr;
    step.border_most = rank.model->num_border_out;
    step.behind = rank.next;
    step.border_made = &made;
    if (const int64_t code = quire_forward(rank.engine, rank.model, &step, message, size)) return code;
    *num_tokens = 0;
    if (rank.next) {
        rank.next->publish(plan.number * kBorderPieces + made, bytes * (1 + rank.is_cut));
    } else if (plan[kSampleRow].count) {
        if (const int64_t code = sample(rank, plan, step, scratch, tokens)) return code;
        *num_tokens = plan[kSampleRow].count;
    }
    if (rank.previous) rank.previous->release();
    if (rank.answers && !rank.next && kResultBytes + 4 * *num_tokens <= rank.answers->capacity &&
        std::all_of(tokens, tokens + *num_tokens, [](int32_t token) { return token >= 0; })) {
        if (!answer(*rank.answers, plan.number, tokens, *num_tokens)) return kBroken;
        return kAnswered;
    }
    return 0;
}

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Runs plain plans until there is something for the caller to see to.
int64_t follow(const Rank& rank, Ring& plans, Progress& progress, char* message, int64_t size) {
    thread_local Scratch scratch;
    for (const int64_t until = now() + kPauseNanoseconds;;) {
        if (const int64_t code = plans.look_out()) return code;
        const char* const head = plans.receive();
        if (!head) return kBroken;
        int64_t tag, bytes;
        uint64_t before;
        std::memcpy(&tag, head, 8), std::memcpy(&bytes, head + 8, 8);
        if (tag || bytes < kDigestBytes || bytes > plans.capacity) return kNotPlain;
        std::memcpy(&before, head + Ring::kLine, 8);
        if (before != progress.chain) return kNotPlain;
        const char* const data = head + Ring::kLine + kDigestBytes;
        scratch.plan.assign(data, data + bytes - kDigestBytes);
        scratch.tokens.resize(scratch.plan.size() / 4);  // more than entries can be
        Plain plan;
        Step step{};
        if (!begin(rank, scratch.plan.data(), (int64_t)scratch.plan.size(), scratch, plan, step)) return kNotPlain;
        plans.release();
        progress.number = plan.number, progress.tokens = scratch.tokens.data();
        progress.began = now();
        const int64_t code =
            carry_out(rank, plan, step, scratch, scratch.tokens.data(), &progress.num_tokens, message, size);
        if (code && code != kAnswered) return code;
        // not before: the others wait for this rank's step
        progress.chain = Blake2b::keyed(progress.chain, scratch.plan.data(), (int64_t)scratch.plan.size());
        progress.began = 0, progress.steps++;
        if (!code && progress.tells) return 0;
        if (now() > until) return kPause;
    }
}

}  // namespace
}  // namespace quire

int64_t quire_rank_run(const quire::Rank* rank, const char* data, int64_t bytes, int32_t* tokens, int64_t* num_tokens,
                       char* message, int64_t size) try {
    thread_local quire::Scratch scratch;
    quire::Plain plan;
    quire::Step step{};
    message[0] = 0;
    if (!quire::begin(*rank, data, bytes, scratch, plan, step)) return quire::kNotPlain;
    return quire::carry_out(*rank, plan, step, scratch, tokens, num_tokens, message, size);
} catch (const std::bad_alloc&) {
    return 2;
}

int64_t quire_rank_follow(const quire::Rank* rank, quire::Ring* plans, quire::Progress* progress, char* message,
                          int64_t size) try {
    message[0] = 0;
    return quire::follow(*rank, *plans, *progress, message, size);
} catch (const std::bad_alloc&) {
    return 2;
}

uint64_t quire_digest(uint64_t before, const char* plan, int64_t bytes) {
    return quire::Blake2b::keyed(before, plan, bytes);
}

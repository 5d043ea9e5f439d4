// The C interface that cpu.py loads. Calls return 0, 1 (a mistake in the arguments, told in `message`), 2 (no memory) or
// 3 (the group of ranks is broken).
#pragma once
#include <atomic>

#include "call.h"

#define QUIRE_EXPORT extern "C" __attribute__((visibility("default")))

namespace quire {

// A pool of all layers, for the calls that write; mirrored by cpu.py. Strides and sizes in bytes.
struct Pages {
    char* base;
    int64_t layer_stride, block_stride;
    int64_t num_layers, num_blocks;
    int64_t kv_heads, block_size, head_dim;
    int64_t is_bf16, is_int8;  // of the rows that are written; of the pool
    int64_t level, threads;
};

// A rank's block tables, [num_slots][num_blocks]; mirrored by tables.py.
struct Tables {
    int32_t* blocks;
    int64_t num_slots, num_blocks, block_size;
    int64_t group;  // the only one whose pages are in reach, those of others are -1; below 0: there is one group
};

// A plan's rows as worker/plan.py has them; made by tables.py as an array of 64-bit numbers.
struct Rows {
    const int32_t *slots, *query_start, *first_position, *tokens;
    int64_t num_rows, num_tokens;
};

struct Model;
struct Peers;
struct Ring;
class Engine;

// What a rank does plain plans with; mirrored by rank.py.
struct Rank {
    Engine* engine;
    const Model* model;
    const Tables* tables;
    Peers *tensor, *slice;  // null: this one alone
    Ring *previous, *next;  // the stages before and behind it; null where it is the first, or the last
    Ring* answers;          // to the leader; null where this rank does not answer, or not in shared memory
    char* pool;
    int64_t layer_stride, block_stride, num_blocks;
    const int64_t* windows;
    int64_t num_windows;
    int64_t column;           // of the pages
    int64_t is_cut;           // the next stage goes on with the last layer's MLP
    int64_t is_int8;          // the pool
    int64_t is_deterministic;
    int64_t first_row;        // of the head, in the vocabulary
    const char* is_plain;     // by slot: the likeliest token is taken, whatever came before
    int64_t num_slots;
};

// How far a rank has come with the plans of an epoch that are sent to it; mirrored by rank.py. Other threads read it.
struct Progress {
    uint64_t chain;              // the digest of all plans so far
    int64_t number;              // of the plan at hand, or else the last one
    std::atomic<int64_t> began;  // its step: nanoseconds of the monotonic clock; 0: none is under way
    std::atomic<int64_t> steps;  // done
    int64_t tells;               // results that are not sent natively are the caller's to send
    const int32_t* tokens;       // of the last plan, until the next one
    int64_t num_tokens;
};

}  // namespace quire

// Bit set of the levels that this machine runs: 1 plain, 2 avx2, 4 avx512 with bfloat16.
QUIRE_EXPORT int64_t quire_levels();

QUIRE_EXPORT int64_t quire_attend(const quire::Call* call, char* message, int64_t size);

// outs [parts][rows][dim], lses [parts][rows]; out [rows][dim], lse [rows].
QUIRE_EXPORT void quire_merge(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t dim,
                              float* out, float* lse, int64_t threads);

// k, v: num_tokens rows of kv_heads * head_dim elements, k_stride and v_stride bytes apart. Nothing is written on a
// mistake.
QUIRE_EXPORT int64_t quire_write_kv(const quire::Pages* pages, const char* k, int64_t k_stride, const char* v,
                                    int64_t v_stride, int64_t layer, const int64_t* slots, int64_t num_tokens,
                                    char* message, int64_t size);

QUIRE_EXPORT int64_t quire_copy_pages(const quire::Pages* pages, const int32_t* source, const int32_t* target,
                                      int64_t count, char* message, int64_t size);

// Reads whole multiples of 256 KiB on one thread; the result only keeps the reads alive.
QUIRE_EXPORT uint64_t quire_read(const char* data, int64_t bytes);

namespace quire {
struct Choice;
struct Ahead;
struct Step;
class SharedCount;
}  // namespace quire

// Threads and working memory of decoder steps; null where there is no memory or no thread to be had.
QUIRE_EXPORT quire::Engine* quire_engine_new(int64_t threads);
// For tests: one whose team has another size after each run.
QUIRE_EXPORT quire::Engine* quire_engine_restless(int64_t threads);
QUIRE_EXPORT void quire_engine_free(quire::Engine* engine);

// All layers over one batch; step->hidden is written. Nothing is written or exchanged on a mistake.
QUIRE_EXPORT int64_t quire_forward(quire::Engine* engine, const quire::Model* model, const quire::Step* step,
                                   char* message, int64_t size);

// Final norm and head over some rows of `hidden`: each row's likeliest token, its logit, the sum of its logits, and
// where `logits` is given all of them, [num_rows][columns of the head]. 1, without a message, where a row is not there.
QUIRE_EXPORT int64_t quire_head(quire::Engine* engine, const quire::Model* model, const float* hidden,
                                int64_t num_hidden, const int64_t* rows, int64_t num_rows, float* logits,
                                int32_t* tokens, float* values, float* totals);

// A token for each of `rows` rows of logits, `row_stride` elements apart, all with a finite largest one; on the calling
// thread where engine is null.
QUIRE_EXPORT int64_t quire_choose(quire::Engine* engine, int64_t level, const float* logits, int64_t row_stride,
                                  int64_t rows, int64_t vocab, const quire::Choice* choices, int64_t* tokens);

// Packs weights for products: lane l of panel p takes row rows[32 p + l] of `columns` elements, zeros where null.
QUIRE_EXPORT void quire_pack(const char* const* rows, int64_t panels, int64_t columns, int64_t is_bf16, uint32_t* to);

// Exchanges of ranks (peers.h): one turn; what `Peers::exchange` is for ranks of one host, with a Member for context.
QUIRE_EXPORT int64_t quire_exchange(quire::Peers* peers, int64_t bytes);
QUIRE_EXPORT int64_t quire_shared_exchange(void* context, int64_t parity, int64_t bytes, const quire::Ahead* ahead);

// One exchange after which `tokens`, `values` and `totals` of each row are those of all ranks' logits: of equal values
// the lowest rank's. A region holds 12 bytes of each row.
QUIRE_EXPORT int64_t quire_best_of_ranks(quire::Peers* peers, int64_t rows, int32_t* tokens, float* values,
                                         float* totals);

// A SharedCount: waits until it has come to `least`, asking for `ahead` (or null) meanwhile; adds one; breaks it for good;
// tells whether it is broken.
QUIRE_EXPORT int64_t quire_count_await(quire::SharedCount* count, uint32_t least, const quire::Ahead* ahead);
QUIRE_EXPORT void quire_count_advance(quire::SharedCount* count);
QUIRE_EXPORT void quire_count_fail(quire::SharedCount* count);
QUIRE_EXPORT int64_t quire_count_is_broken(const quire::SharedCount* count);

// tables[slot, index] = block, or -1 where `group` is given and names another. 1, without a message, where a slot or an
// index is out of range; nothing is changed then.
QUIRE_EXPORT int64_t quire_tables_change(const quire::Tables* tables, const int32_t* slot, const int32_t* index,
                                         const int32_t* block, const int32_t* group, int64_t count);

// What a plan's rows are to the kernels: arrays by token, and by row. 1, without a message and with nothing written,
// where the rows do not fit the tables.
QUIRE_EXPORT int64_t quire_tables_rows(const quire::Tables* tables, const quire::Rows* rows, int64_t* tokens,
                                       int64_t* positions, int64_t* slots, int32_t* query_start,
                                       int32_t* first_position);

// The pages that rows which fit attend in layers of a window (0: none). The first writes where each row's begin and
// returns how many there are; the second writes so many, with the tables unchanged since.
QUIRE_EXPORT int64_t quire_tables_starts(const quire::Tables* tables, const quire::Rows* rows, int64_t window,
                                         int32_t* start);
QUIRE_EXPORT void quire_tables_pages(const quire::Tables* tables, const quire::Rows* rows, int64_t window,
                                     int32_t* block, int32_t* position);

// A rank's part of a plan, from the plan's bytes (worker/codec.py): table changes, all layers, hidden rows from stage to
// stage, and on the last the head. Writes each sample entry's token, or -1 where a logit is not finite, and how many
// there are: room for as many as the plan has bytes is enough. 5 where the answer has been sent, too; a rank that can
// does so where all logits are finite. 4, with nothing but the table changes done, where the plan is not plain or not
// right: it admits, copies or scores something, leaves tokens open, does not take the likeliest tokens, or does not fit.
QUIRE_EXPORT int64_t quire_rank_run(const quire::Rank* rank, const char* plan, int64_t bytes, int32_t* tokens,
                                    int64_t* num_tokens, char* message, int64_t size);

// `quire_rank_run` of one plan behind the other as they come through a ring, each behind the digest of all before it.
// Returns 0 behind one whose tokens the caller has to tell; 4 where the next message is no plain plan, or not right,
// which is the caller's to receive, then; 6 now and then, and after a signal where it waits for a plan, so that the caller
// hears of it; or what went wrong.
QUIRE_EXPORT int64_t quire_rank_follow(const quire::Rank* rank, quire::Ring* plans, quire::Progress* progress,
                                       char* message, int64_t size);

// The digest of all plans up to one, from that of all before it: what worker/ranks.py says. For tests.
QUIRE_EXPORT uint64_t quire_digest(uint64_t before, const char* plan, int64_t bytes);

// What the parts of the native kernels hand to each other. Plain data only: the files of a level are compiled with that
// level's instructions, so a function or template shared between them could be linked in from the wrong one.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quire {

struct Pool {
    const char* base;      // block 0 of the layer that is attended
    int64_t block_stride;  // bytes
    int64_t num_blocks;
};

// The arguments of attend; mirrored field by field by cpu.py.
struct Call {
    const char* q;
    int64_t q_stride;  // elements from token to token
    const int32_t* query_start;
    const int32_t* first_position;
    const Pool* pools;
    const int32_t* page_start;
    const int32_t* page_pool;  // null: all in pool 0
    const int32_t* page_block;
    const int32_t* page_position;
    float* out;
    float* lse;
    int64_t num_tokens, num_rows, num_pools, num_entries;
    int64_t q_heads, kv_heads, head_dim, block_size;
    int64_t window, sinks;
    int64_t is_bf16, level, threads;
    int64_t is_deterministic;  // every row is summed in one order, whatever chunk it comes in
    int64_t is_int8;           // the pages, not q
    double scale;
};

// One piece of work: some tokens of a row, some kv heads, some of the row's page entries.
struct Item {
    int64_t token, num_tokens;  // first token, counted in q
    int64_t position;           // of that token
    int64_t head, num_heads;    // kv heads
    int64_t entry, entry_end;
    float* out;  // where the first token's results go, [token][q_heads][head_dim]; maybe a partial result
    float* lse;
};

constexpr int64_t kDirectRows = 16;  // query rows per kv head from which tiles are quicker than streaming
constexpr int64_t kDirectHeads = 8;  // most kv heads of a streaming item: runs of memory long enough to prefetch
constexpr int64_t kTileRows = 512;   // most query rows of a tiled item

// One kv head's keys (or values) of a page: [block_size][head_dim] elements, and behind int8 elements [block_size] float
// scales, one for each token.
constexpr int64_t kScaleBytes = 4;
inline constexpr int64_t head_bytes(int64_t block_size, int64_t head_dim, int64_t element, bool is_int8) {
    return block_size * (head_dim * element + (is_int8 ? kScaleBytes : 0));
}

using Kernel = void (*)(const Call&, const Item&, char* scratch);

struct StepKernels;
struct Choice;

// The kernels compiled for one level of instructions. Scratch is aligned to 64 bytes.
struct Level {
    Kernel direct_f32, direct_bf16, tiled_f32, tiled_bf16;
    size_t scratch_bytes;
    const StepKernels *step_f32, *step_bf16;
    int32_t (*choose)(const float* row, int64_t vocab, const Choice& choice);
};

const Level* level_of(int64_t index);  // null where it is not built
bool faulty(const Call& call, char* message, size_t size);  // the first fault of its ids, as a sentence in `message`
char* thread_scratch(size_t bytes);    // the calling thread's, kept between calls; null without memory

extern const Level level_plain, level_avx2, level_avx512;

}  // namespace quire

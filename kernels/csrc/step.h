// The decoder step's data: what kernels/decoder.py hands over, and what the phases of a step hand to a level's kernels.
// Plain data only, for the reason that call.h gives. Word: a float, or a pair of bfloat16 of consecutive k.
#pragma once
#include "call.h"

namespace quire {

struct Peers;
struct Ring;

constexpr int kPanel = 32;      // columns of a panel of packed weights
constexpr int kHalfPanel = 16;  // of a gate-and-up panel: so many columns of each

// Packed weights: [panels][depth words][kPanel]. Mirrored by decoder.py.
struct Matrix {
    const void* packed;
    const float* bias;  // [panels][kPanel], or null
    int64_t depth, columns;
};

// What becomes of the sums of a product; `bias` is added first.
enum class End : int64_t {
    kStore,  // out[row][column] = sum
    kAdd,    // out[row][column] += sum
    kSwish,  // the panel holds 16 gates and 16 ups: words[row][16 panel + j] = silu(gate) * up
    kBest,   // the row's largest sum and its total are kept in `best`; out is written where it is not null
};

// One row's largest logit so far, the lowest of its ids, and the sum of all (not finite where one logit is not).
struct Best {
    float value;
    int32_t id;
    float total;
};

struct Product {
    const char* a;  // [rows][a_row] words
    int64_t a_row;
    Matrix matrix;
    End end;
    float* out;  // [rows][out_row]
    char* words;  // [rows][out_row] elements
    int64_t out_row;
    Best* best;  // [rows], the thread's own
};

// The rows of q, k, v of some tokens on their way to attention: normed, rotated, rounded; K and V into their pages.
struct Rotation {
    const float* qkv;  // [tokens][(q_heads + 2 kv_heads) * head_dim]
    const float* angles;  // [tokens][cos, sin][head_dim / 2]
    const float *q_norm, *k_norm;  // [head_dim], or null
    char* q;  // [tokens][q_heads * head_dim] elements
    char* pool;  // block 0 of the layer
    int64_t block_stride;
    const int64_t* slots;
    int64_t q_heads, kv_heads, head_dim, block_size, is_int8;
    double eps;
};

// Kernels of the step at one level, for one dtype.
struct StepKernels {
    void (*product)(const Product&, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end);
    // to [columns elements, then zeros to `row` words] = x / rms(x) * weight
    void (*norm)(const float* x, const float* weight, double eps, int64_t columns, char* to);
    void (*convert)(const float* x, int64_t columns, char* to);
    void (*widen)(const char* x, int64_t columns, float* to);
    void (*rotate)(const Rotation&, int64_t token);
    void (*add)(const float* x, int64_t columns, float* to);
    void (*quantize)(const char* x, int64_t columns, char* to, char* scale);
};

// Mirrored by decoder.py from here on. Any units of an MLP: down's sums over all of them add up to the whole.
struct Mlp {
    const float* norm;
    Matrix gate_up, down;
};

struct Layer {
    const float* input_norm;
    const float *q_norm, *k_norm;
    Matrix qkv, o;
    Mlp mlp;
    int64_t window;  // index into Step::calls
};

// A rank's part of a model: its layers, q_heads and units of the MLP, and of the kv heads those of its slice, whose
// attended_heads (the q_heads of all its groups) it attends for the others too.
struct Model {
    const Layer* layers;
    Mlp carried;            // units that the stage before left of its last layer's MLP; norm is null where it left none
    const Mlp *border_in, *border_out;  // pieces of that MLP, and of the last layer's, that both stages have
    int64_t num_border_in, num_border_out;
    const float* norm;      // null, as is the head, where another stage has it
    Matrix head;            // of any rows of the vocabulary
    const char* embedding;  // [vocab][hidden] elements, or null
    const double* frequencies;  // [head_dim / 2]
    int64_t num_layers, hidden, q_heads, attended_heads, kv_heads, head_dim;
    int64_t intermediate;  // units of the widest MLP
    int64_t vocab;
    int64_t is_bf16, level;
    double eps, rotary_factor;
};

// How to draw from one row; worker/draw.py has the ranges. Mirrored by decoder.py.
struct Choice {
    double temperature, min_p, top_p, u;
    int64_t top_k;
};

// One ragged batch.
struct Step {
    const int64_t* tokens;  // null: `hidden` comes from the stage before
    const int64_t* positions;
    const int64_t* slots;  // below 0: another group's
    const int32_t* query_start;
    const int32_t* first_position;
    const int32_t* const* page_start;  // of each window, as are the next two
    const int32_t* const* page_block;
    const int32_t* const* page_position;
    const int64_t* windows;
    const int64_t* num_entries;
    char* pool;
    float* hidden;  // [tokens][hidden]: the residual stream
    float* partial_in;  // [tokens][hidden]: sums of the units that the stage before has done, or null; it is changed
    float* partial_out;  // the same of the last layer's MLP, kept out of `hidden` as the next stage goes on with it; null
                         // where it is whole; it may be partial_in
    int64_t border_given;  // pieces of Model::border_in that are in partial_in
    int64_t border_most;   // pieces of Model::border_out to do here; fewer where the next stage would wait for them
    const Ring* behind;    // to the next stage, which waits once it has released all messages; null: it is not looked at
    int64_t* border_made;  // is set to how many are done
    int64_t layer_stride, block_stride, num_blocks, block_size;
    int64_t num_tokens, num_rows, num_windows;
    int64_t is_deterministic;
    int64_t is_int8;  // the pool
    Peers* tensor;  // the ranks that sum their parts of each product into `hidden`; null: this one alone
    Peers* slice;   // the groups that hold pages of these kv heads; null: this one alone
};
static_assert(sizeof(Step) == 29 * 8, "decoder.py writes it as 29 numbers");

}  // namespace quire

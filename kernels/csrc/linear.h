// Matrix products with packed weights: C[T][N] = A[T][K] * B[N][K]', for one row of A as for thousands.
//
// A panel of B streams through once for up to kPanelRows rows of A, whose words are spread over vectors one by one: so
// one packing serves decoding (bound by the reading of B) and prefill (bound by arithmetic) alike. Every element of C
// is summed over k in one order, whatever the number of rows and threads.
#pragma once
#include "multiply.h"
#include "rows.h"

namespace quire::QUIRE_LEVEL {

#if defined(__AVX512BF16__)
using PackedPairs = PairWords;
#else
// Products of bfloat16 pairs where no instruction has them: in float32, the even one first.
struct PackedPairs {
    using Word = uint32_t;
    struct Pair {
        F low, high;
    };
    QUIRE_INLINE Pair load_words(const Word* p) {
        U words;
        __builtin_memcpy(&words, p, sizeof words);
        return {(F)(words << 16), (F)(words & 0xffff0000u)};
    }
    QUIRE_INLINE Pair spread(Word a) { return {set1(to_float((bf16)a)), set1(to_float((bf16)(a >> 16)))}; }
    QUIRE_INLINE F add(F total, Pair a, Pair b) { return total + a.low * b.low + a.high * b.high; }
};
#endif

constexpr int kPanelRows = W == 16 ? 14 : W == 8 ? 5 : 4;  // as many sums as registers hold
constexpr int kPanelVectors = 2;                           // of a panel, at a time
constexpr int64_t kFetch = 16 * 1024;                      // bytes between a load and its prefetch
constexpr int64_t kFetchOnce = 10 * 1024;                  // the same, where each line is read only once

// Lines to ask for while a panel is read: so many with each of its rows.
struct Fetch {
    const char* at;
    int64_t lines;
    bool is_once;  // past the caches that keep what was read: a step reads weights that no cache holds until the next
};

// sums[i][lane] for R rows of A, `a_row` words apart, and kPanelVectors vectors of a panel.
template <class Words, int R>
static void panel_rows(const typename Words::Word* a, int64_t a_row, const typename Words::Word* b, int64_t depth,
                       Fetch fetch, float* sums) {
    F total[R][kPanelVectors] = {};
    for (int64_t k = 0; k < depth; k++) {
        const auto* row = b + k * kPanel;
        for (int64_t line = 0; line < fetch.lines; line++, fetch.at += 64)
            if (fetch.is_once)
                __builtin_prefetch(fetch.at, 0, 0);
            else
                __builtin_prefetch(fetch.at, 0, 2);
        decltype(Words::load_words(b)) right[kPanelVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; j++) right[j] = Words::load_words(row + j * W);
#pragma GCC unroll 14
        for (int i = 0; i < R; i++) {
            const auto left = Words::spread(a[i * a_row + k]);
#pragma GCC unroll 2
            for (int j = 0; j < kPanelVectors; j++) total[i][j] = Words::add(total[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int j = 0; j < kPanelVectors; j++) store(sums + i * kPanel + j * W, total[i][j]);
}

// sums[i][lane] of a whole panel for `rows` rows, at most R.
template <class Words, int R>
static void panel_tile(int64_t rows, const typename Words::Word* a, int64_t a_row, const typename Words::Word* b,
                       int64_t depth, Fetch fetch, float* sums) {
    if constexpr (R > 0) {
        if (rows < R) return panel_tile<Words, R - 1>(rows, a, a_row, b, depth, fetch, sums);
        for (int j = 0; j < kPanel; j += kPanelVectors * W, fetch.lines = 0)
            panel_rows<Words, R>(a, a_row, b + j, depth, fetch, sums + j);
    }
}

static void keep_best(Best& best, const float* sums, int64_t column, int64_t count, float* out) {
    float lanes[kPanel];
    __builtin_memcpy(lanes, sums, sizeof lanes);
    for (int64_t j = count; j < kPanel; j++) lanes[j] = -kInf;
    F top = load(lanes), total = {};
    for (int j = 0; j < kPanel; j += W) top = max(load(lanes + j), top);
    for (int64_t j = 0; j < round_up(count, W); j += W) total += load(sums + j);  // what pads a panel is 0
    best.total += sum(total);
    const float value = highest(top);
    if (value >= best.value) {
        int64_t at = 0;
        while (at + 1 < count && lanes[at] != value) at++;
        if (value > best.value || column + at < best.id) best.value = value, best.id = (int32_t)(column + at);
    }
    if (out) __builtin_memcpy(out, sums, count * sizeof(float));
}

// What becomes of one row of a panel's sums.
template <class T>
static void end_row(const Product& product, int64_t row, int64_t panel, float* sums) {
    const int64_t column = panel * kPanel, count = lesser<int64_t>(kPanel, product.matrix.columns - column);
    if (product.matrix.bias)
        for (int j = 0; j < kPanel; j += W) store(sums + j, load(sums + j) + load(product.matrix.bias + column + j));
    float* out = product.out ? product.out + row * product.out_row + column : nullptr;
    switch (product.end) {
        case End::kStore:
            __builtin_memcpy(out, sums, count * sizeof(float));
            break;
        case End::kAdd:
            if (count == kPanel)
                for (int j = 0; j < kPanel; j += W) store(out + j, load(out + j) + load(sums + j));
            else
                for (int64_t j = 0; j < count; j++) out[j] += sums[j];
            break;
        case End::kSwish: {
            for (int j = 0; j < kHalfPanel; j += W) {
                const F gate = load(sums + j);
                const F e = exp_neg(gate < 0 ? gate : -gate);
                store(sums + j, gate * ((gate < 0 ? e : set1(1.f)) / (e + 1.f)) * load(sums + kHalfPanel + j));
            }
            // columns counts gates and ups; a missing lane's product is 0 and lies in the padding of the row
            T* to = (T*)product.words + row * product.out_row + panel * kHalfPanel;
            for (int j = 0; j < kHalfPanel; j += W) store(to + j, load(sums + j));
            break;
        }
        case End::kBest:
            keep_best(product.best[row], sums, column, count, out);
            break;
    }
}

// What one of the tiles asks for while it reads the panel from `begin` to `end`: a lone one for what it reads soon, as
// does the first of two, whose second asks for the next panel; of more, the second and third share that.
static Fetch fetch_of(int64_t tile, int64_t tiles, const char* begin, const char* end) {
    if (tiles == 1) return {begin + kFetchOnce, 2, true};
    if (tiles == 2) return {tile == 0 ? begin + kFetch : end, 2, false};
    if (tile == 1) return {end, 1, false};
    if (tile == 2) return {end + (end - begin) / 2, 1, false};
    return {end, 0, false};
}

template <class T, class Words>
static void product(const Product& product, int64_t panel, int64_t panel_end, int64_t row, int64_t row_end) {
    using Word = typename Words::Word;
    alignas(64) float sums[kPanelRows * kPanel];
    const int64_t rows = row_end - row, tiles = (rows + kPanelRows - 1) / kPanelRows;
    for (; panel < panel_end; panel++) {
        const Word* b = (const Word*)product.matrix.packed + panel * product.matrix.depth * kPanel;
        const Word* const next = b + product.matrix.depth * kPanel;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = row + rows * tile / tiles, end = row + rows * (tile + 1) / tiles;
            const Fetch fetch = fetch_of(tile, tiles, (const char*)b, (const char*)next);
            panel_tile<Words, kPanelRows>(end - first, (const Word*)product.a + first * product.a_row, product.a_row,
                                          b, product.matrix.depth, fetch, sums);
            for (int64_t i = first; i < end; i++) end_row<T>(product, i, panel, sums + (i - first) * kPanel);
        }
    }
}

}  // namespace quire::QUIRE_LEVEL

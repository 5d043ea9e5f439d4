// The inner product of the tiled kernel: R rows times NV vectors of columns, held in registers.
//
// A "word" is what one multiply-add consumes per lane: a float, or two bfloat16 in a uint32.
#pragma once
#include "vec.h"

namespace quire::QUIRE_LEVEL {

struct FloatWords {
    using Word = float;
    static constexpr int64_t per_word = 1;
    QUIRE_INLINE F load_words(const Word* p) { return load(p); }
    QUIRE_INLINE F spread(Word a) { return set1(a); }
    QUIRE_INLINE F add(F total, F a, F b) { return total + a * b; }
};

#if defined(__AVX512BF16__)
struct PairWords {
    using Word = uint32_t;
    static constexpr int64_t per_word = 2;
    QUIRE_INLINE __m512i load_words(const Word* p) { return _mm512_loadu_si512(p); }
    QUIRE_INLINE __m512i spread(Word a) { return _mm512_set1_epi32((int)a); }
    QUIRE_INLINE F add(F total, __m512i a, __m512i b) {
        return (F)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
    }
};
#endif

constexpr int kMultiplyRows = 6;
constexpr int kMultiplyVectors = W == 16 ? 4 : 2;

// Element (i, k) of the left matrix is a[i * a_row + k * a_step] (three arguments: a struct of them is passed through
// memory, and read there before it is written). c[i][j] = sum over k of a(i, k) * b[k][j], plus factor[i] * c[i][j] where `factor` is given.
template <class Words, int R, int NV, bool ADD>
static void multiply(const typename Words::Word* a, int64_t a_row, int64_t a_step,
                     const typename Words::Word* b, int64_t b_row, int64_t depth,
                     float* c, int64_t c_row, const float* factor) {
    F total[R][NV];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) total[i][j] = ADD ? load(c + i * c_row + j * W) * factor[i] : F{};
    for (int64_t k = 0; k < depth; k++) {
        decltype(Words::load_words(b)) right[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) right[j] = Words::load_words(b + k * b_row + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const auto left = Words::spread(a[i * a_row + k * a_step]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) total[i][j] = Words::add(total[i][j], left, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(c + i * c_row + j * W, total[i][j]);
}

template <class Words, int NV, bool ADD>
static void multiply_rows(const typename Words::Word* a, int64_t a_row, int64_t a_step, int64_t rows,
                         const typename Words::Word* b, int64_t b_row,
                          int64_t depth, float* c, int64_t c_row, const float* factor) {
    int64_t i = 0;
    for (; i + kMultiplyRows <= rows; i += kMultiplyRows, a += kMultiplyRows * a_row)
        multiply<Words, kMultiplyRows, NV, ADD>(a, a_row, a_step, b, b_row, depth, c + i * c_row, c_row, factor + (ADD ? i : 0));
    c += i * c_row;
    if (ADD) factor += i;
    switch (rows - i) {
        case 5: return multiply<Words, 5, NV, ADD>(a, a_row, a_step, b, b_row, depth, c, c_row, factor);
        case 4: return multiply<Words, 4, NV, ADD>(a, a_row, a_step, b, b_row, depth, c, c_row, factor);
        case 3: return multiply<Words, 3, NV, ADD>(a, a_row, a_step, b, b_row, depth, c, c_row, factor);
        case 2: return multiply<Words, 2, NV, ADD>(a, a_row, a_step, b, b_row, depth, c, c_row, factor);
        case 1: return multiply<Words, 1, NV, ADD>(a, a_row, a_step, b, b_row, depth, c, c_row, factor);
    }
}

// The same for any number of columns that is whole vectors.
template <class Words, bool ADD>
static void multiply_all(const typename Words::Word* a, int64_t a_row, int64_t a_step, int64_t rows,
                         const typename Words::Word* b, int64_t b_row,
                         int64_t columns, int64_t depth, float* c, int64_t c_row, const float* factor) {
    constexpr int64_t wide = kMultiplyVectors * W;
    int64_t j = 0;
    for (; j + wide <= columns; j += wide)
        multiply_rows<Words, kMultiplyVectors, ADD>(a, a_row, a_step, rows, b + j, b_row, depth, c + j, c_row, factor);
    for (; j < columns; j += W) multiply_rows<Words, 1, ADD>(a, a_row, a_step, rows, b + j, b_row, depth, c + j, c_row, factor);
}

}  // namespace quire::QUIRE_LEVEL

// The streaming kernel's inner loops for bfloat16 where an instruction multiplies pairs: no sum across lanes, no widening.
//
// Keys of a run are turned, 16 at a time, so that a lane is a key: a query's pairs are then broadcast, and its scores come
// out next to each other. Values of two keys are interleaved and weighed by a pair of weights. Both are done once for all
// query rows of the kv head.
#pragma once
#include "vec.h"

#if defined(__AVX512BF16__)
namespace quire::QUIRE_LEVEL {

constexpr int64_t kPairRows = 4;  // query rows that share a turned tile, or a pair of values, in registers

// Takes t[i][w] to t[w][i].
QUIRE_INLINE void turn(__m512i* t) {
    __m512i a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(t[2 * i], t[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(t[2 * i], t[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        t[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        t[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        t[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
        t[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
    }
}

QUIRE_INLINE F dot(F total, __m512i a, __m512i b) {
    return (F)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
}
QUIRE_INLINE __m512i spread(const bf16* pair) {
    int32_t word;
    __builtin_memcpy(&word, pair, sizeof word);
    return _mm512_set1_epi32(word);
}

// scores[r][key] (rows `score_row` apart) for R query rows and `count` keys of `dim` values, a multiple of 32.
template <int R>
static void score_pairs(const bf16* k, int64_t count, const bf16* q, int64_t dim, float* scores, int64_t score_row,
                        const char* ahead) {
    constexpr int chains = R == 1 ? 4 : 2;
    for (int64_t n = 0; n < count; n += W) {
        const int64_t keys = lesser<int64_t>(W, count - n);
        F total[R][chains] = {};
        for (int64_t d = 0; d < dim; d += 2 * W) {
            const bf16* from = k + n * dim + d;
            __m512i t[W];
            if (keys == W) {
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) t[i] = _mm512_loadu_si512(from + i * dim);
            } else {
                for (int i = 0; i < W; i++) t[i] = i < keys ? _mm512_loadu_si512(from + i * dim) : _mm512_setzero_si512();
            }
            if (ahead)
                for (int i = 0; i < keys; i++) __builtin_prefetch(ahead + ((n + i) * dim + d) * 2, 0, 3);
            turn(t);
#pragma GCC unroll 16
            for (int w = 0; w < W; w++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    total[r][w % chains] = dot(total[r][w % chains], t[w], spread(q + r * dim + d + 2 * w));
        }
        const __mmask16 mask = (__mmask16)((1u << keys) - 1);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            F sum = total[r][0] + total[r][1];
            if (chains == 4) sum += total[r][2] + total[r][3];
            _mm512_mask_storeu_ps(scores + r * score_row + n, mask, (__m512)sum);
        }
    }
}

// out[r][32 C values] += sum over keys of weights[r][key] * v[key].
template <int R, int C>
static void weigh_pairs(const bf16* v, int64_t count, const bf16* weights, int64_t weight_row, int64_t dim, float* out,
                        const char* ahead) {
    alignas(64) static const uint16_t order[2][2 * W] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    F total[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) total[r][c] = load(out + r * dim + c * W);
    for (int64_t n = 0; n < count; n += 2) {
        const bf16* from = v + n * dim;
        const bool two = n + 1 < count;
        __m512i pair[2 * C];
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const __m512i a = _mm512_loadu_si512(from + c * 2 * W);
            const __m512i b = two ? _mm512_loadu_si512(from + dim + c * 2 * W) : _mm512_setzero_si512();
            pair[2 * c] = _mm512_permutex2var_epi16(a, low, b);
            pair[2 * c + 1] = _mm512_permutex2var_epi16(a, high, b);
            if (ahead) {
                __builtin_prefetch(ahead + (n * dim + c * 2 * W) * 2, 0, 3);
                if (two) __builtin_prefetch(ahead + ((n + 1) * dim + c * 2 * W) * 2, 0, 3);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            // behind the last key lies whatever there was, perhaps NaN, whose product with 0 is not 0
            const bf16* at = weights + r * weight_row + n;
            const __m512i weight = two ? spread(at) : _mm512_set1_epi32(*at);
#pragma GCC unroll 4
            for (int c = 0; c < 2 * C; c++) total[r][c] = dot(total[r][c], pair[c], weight);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * C; c++) store(out + r * dim + c * W, total[r][c]);
}

template <int R>
static void weigh_all_pairs(const bf16* v, int64_t count, const bf16* weights, int64_t weight_row, int64_t dim,
                            float* out, const char* ahead) {
    int64_t d = 0;
    for (; d + 4 * W <= dim; d += 4 * W)
        weigh_pairs<R, 2>(v + d, count, weights, weight_row, dim, out + d, ahead ? ahead + d * 2 : nullptr);
    for (; d < dim; d += 2 * W)
        weigh_pairs<R, 1>(v + d, count, weights, weight_row, dim, out + d, ahead ? ahead + d * 2 : nullptr);
}

// Weights as bfloat16; `count` is rounded up to whole vectors.
QUIRE_INLINE void round_weights(const float* from, int64_t count, bf16* to) {
    for (int64_t n = 0; n < count; n += W) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + n));
        __builtin_memcpy(to + n, &rounded, sizeof rounded);
    }
}

}  // namespace quire::QUIRE_LEVEL
#endif

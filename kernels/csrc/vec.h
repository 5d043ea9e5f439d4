// Vectors of one level. The level's file defines QUIRE_LEVEL (its namespace) and QUIRE_WIDTH (floats per register).
// GCC's vector types keep all arithmetic generic; only reductions and bfloat16 products name instructions.
#pragma once
#include "call.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QUIRE_INLINE static inline __attribute__((always_inline))

namespace quire::QUIRE_LEVEL {

using bf16 = uint16_t;
using int8 = int8_t;
constexpr int W = QUIRE_WIDTH;
typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
constexpr float kInf = __builtin_inff();

template <class A>
QUIRE_INLINE A lesser(A a, A b) {
    return b < a ? b : a;
}
template <class A>
QUIRE_INLINE A greater(A a, A b) {
    return a < b ? b : a;
}
constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

QUIRE_INLINE F set1(float x) { return x - F{}; }
QUIRE_INLINE I set1i(int32_t x) { return x - I{}; }
QUIRE_INLINE F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
QUIRE_INLINE U load_bits(const bf16* p) {
#if QUIRE_WIDTH == 16  // GCC 12 converts vectors of 16 in halves
    return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif QUIRE_WIDTH == 8
    return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    H h;
    __builtin_memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, U);
#endif
}
QUIRE_INLINE F load(const bf16* p) { return (F)(load_bits(p) << 16); }
QUIRE_INLINE F load(const int8* p) {
#if QUIRE_WIDTH == 16
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif QUIRE_WIDTH == 8
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8 B __attribute__((vector_size(W)));
    B b;
    __builtin_memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, F);
#endif
}
QUIRE_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
QUIRE_INLINE float to_float(float x) { return x; }
QUIRE_INLINE float to_float(int8 x) { return x; }
QUIRE_INLINE float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}
QUIRE_INLINE F max(F a, F b) { return a > b ? a : b; }

// exp(x) for x <= 0, to about one unit in the last place; exactly 0 from where the result would be subnormal (so that a
// masked score of -inf weighs nothing); NaN stays NaN.
QUIRE_INLINE F exp_neg(F x) {
    const F low = set1(-87.33654f);
    const F y = x < low ? low : x;
    const F magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    const F shifted = y * 1.44269504f + magic;
    const F n = shifted - magic;
    F r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F p = set1(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    const F power = (F)(((I)shifted - (I)magic + 127) << 23);
    return x < low ? F{} : p * power;
}

#if QUIRE_WIDTH == 16
QUIRE_INLINE float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
QUIRE_INLINE float highest(F v) { return _mm512_reduce_max_ps((__m512)v); }
// Lane i of the result is the sum of a[i].
QUIRE_INLINE F sums(const F* a) {
    __m512 x[8], y[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512 b = (__m512)a[2 * i], c = (__m512)a[2 * i + 1];
        x[i] = _mm512_add_ps(_mm512_unpacklo_ps(b, c), _mm512_unpackhi_ps(b, c));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d b = _mm512_castps_pd(x[2 * i]), c = _mm512_castps_pd(x[2 * i + 1]);
        y[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(b, c)), _mm512_castpd_ps(_mm512_unpackhi_pd(b, c)));
    }
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(y[2], y[3], 0x88), _mm512_shuffle_f32x4(y[2], y[3], 0xdd));
    return (F)_mm512_add_ps(_mm512_shuffle_f32x4(b, c, 0x88), _mm512_shuffle_f32x4(b, c, 0xdd));
}
#elif QUIRE_WIDTH == 8
QUIRE_INLINE F sums(const F* a) {
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = _mm256_hadd_ps((__m256)a[2 * i], (__m256)a[2 * i + 1]);
    const __m256 b = _mm256_hadd_ps(x[0], x[1]), c = _mm256_hadd_ps(x[2], x[3]);
    return (F)_mm256_add_ps(_mm256_permute2f128_ps(b, c, 0x20), _mm256_permute2f128_ps(b, c, 0x31));
}
#else
QUIRE_INLINE F sums(const F* a) {
    F r;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        float total = a[i][0];
        for (int j = 1; j < W; j++) total += a[i][j];
        r[i] = total;
    }
    return r;
}
#endif
#if QUIRE_WIDTH != 16
QUIRE_INLINE float sum(F v) {
    float total = v[0];
    for (int i = 1; i < W; i++) total += v[i];
    return total;
}
QUIRE_INLINE float highest(F v) {
    float best = v[0];
    for (int i = 1; i < W; i++) best = v[i] > best ? v[i] : best;
    return best;
}
#endif

}  // namespace quire::QUIRE_LEVEL

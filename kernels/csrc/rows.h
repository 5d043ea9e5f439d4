// What a step does row by row: RMSNorm, rotary embedding with the writing of K and V, and changes of type.
#pragma once
#include "step.h"
#include "vec.h"

namespace quire::QUIRE_LEVEL {

QUIRE_INLINE void store(bf16* p, F v) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &rounded, sizeof rounded);
#else
    const U bits = (U)v;
    const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const U kept = v == v ? rounded : (bits >> 16 | 0x40u);  // rounding could make a NaN an infinity
    for (int i = 0; i < W; i++) p[i] = (bf16)kept[i];
#endif
}

// A row of bfloat16 that a product takes is whole pairs.
QUIRE_INLINE void pad(bf16* to, int64_t columns) {
    if (columns % 2) to[columns] = 0;
}
QUIRE_INLINE void pad(float*, int64_t) {}

// The same for `count` values, fewer than a vector.
template <class T>
QUIRE_INLINE void store_some(T* p, F v, int64_t count) {
    T lanes[W];
    store(lanes, v);
    __builtin_memcpy(p, lanes, count * sizeof(T));
}
template <class T>
QUIRE_INLINE F load_some(const T* p, int64_t count) {
    T lanes[W] = {};
    __builtin_memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}

// body(offset, load, store) over whole vectors and a rest.
template <class From, class To, class Body>
QUIRE_INLINE void each(const From* from, int64_t count, To* to, Body body) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, body(load(from + i), i, (int64_t)W));
    if (i < count) store_some(to + i, body(load_some(from + i, count - i), i, count - i), count - i);
}

static float inverse_rms(const float* x, int64_t count, double eps) {
    F squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) squares[j] += load(x + i + j * W) * load(x + i + j * W);
    for (; i < count; i += W) {
        const F v = i + W <= count ? load(x + i) : load_some(x + i, count - i);
        squares[0] += v * v;
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)count;
    return 1.f / __builtin_sqrtf(mean + (float)eps);
}

template <class T>
static void norm(const float* x, const float* weight, double eps, int64_t columns, char* to) {
    const float factor = inverse_rms(x, columns, eps);
    each(x, columns, (T*)to, [&](F v, int64_t i, int64_t n) __attribute__((always_inline)) {
        return v * factor * (n == W ? load(weight + i) : load_some(weight + i, n));
    });
    pad((T*)to, columns);
}

template <class T>
static void round_row(const float* x, int64_t columns, T* to) {
    each(x, columns, to, [](F v, int64_t, int64_t) __attribute__((always_inline)) { return v; });
}

template <class T>
static void convert(const float* x, int64_t columns, char* to) {
    round_row(x, columns, (T*)to);
    pad((T*)to, columns);
}

template <class T>
static void widen(const char* x, int64_t columns, float* to) {
    each((const T*)x, columns, to, [](F v, int64_t, int64_t) __attribute__((always_inline)) { return v; });
}

static void add_row(const float* x, int64_t columns, float* to) {
    each(x, columns, to, [&](F v, int64_t i, int64_t n) __attribute__((always_inline)) {
        return v + (n == W ? load(to + i) : load_some(to + i, n));
    });
}

// One head: x / rms(x) * weight where there is a weight, then the pairs (i, i + dim / 2) rotated.
template <class T>
static void rotate_head(const float* x, const float* weight, double eps, const float* angles, int64_t dim, T* to) {
    const int64_t half = dim / 2;
    const float factor = weight ? inverse_rms(x, dim, eps) : 1.f;
    for (int64_t i = 0; i < half; i += W) {
        const int64_t n = lesser<int64_t>(W, half - i);
        const auto get = [&](const float* p) __attribute__((always_inline)) {
            return n == W ? load(p) : load_some(p, n);
        };
        const F cos = get(angles + i), sin = get(angles + half + i);
        F a = get(x + i), b = get(x + half + i);
        if (weight) {
            a = a * factor * get(weight + i);
            b = b * factor * get(weight + half + i);
        }
        const F first = a * cos - b * sin, second = b * cos + a * sin;
        if (n == W) {
            store(to + i, first);
            store(to + half + i, second);
        } else {
            store_some(to + i, first, n);
            store_some(to + half + i, second, n);
        }
    }
}

// One token's key or value of one head as int8 and a scale, symmetric: x is about to[i] * *scale, at most half a scale
// off. It depends on that row alone. A row with a value that is not finite comes back as NaN.
static void quantize(const float* x, int64_t count, int8* to, float* scale) {
    F best = {}, bad = {};
    int64_t i = 0;
    for (; i < count; i += W) {
        const F v = i + W <= count ? load(x + i) : load_some(x + i, count - i);
        best = max(v < 0.f ? -v : v, best);
        bad += v - v;
    }
    const float top = highest(best), poison = sum(bad);
    const float inverse = top > 1e-30f && poison == 0.f ? 127.f / top : 0.f;
    const float factor = (inverse == 0.f ? 0.f : top / 127.f) + poison;
    __builtin_memcpy(scale, &factor, sizeof factor);
    const F magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
    for (i = 0; i < count; i += W) {
        const int64_t n = lesser<int64_t>(W, count - i);
        const F v = n == W ? load(x + i) : load_some(x + i, n);
        const I all = (I)((inverse == 0.f ? F{} : v * inverse) + magic) - (I)magic;
#if QUIRE_WIDTH == 16
        const __m128i lanes = _mm512_cvtepi32_epi8((__m512i)all);
#else
        typedef int8 B __attribute__((vector_size(W)));
        const B lanes = __builtin_convertvector(all, B);
#endif
        __builtin_memcpy(to + i, &lanes, (size_t)n);
    }
}

template <class T>
static void quantize_row(const char* x, int64_t count, char* to, char* scale) {
    alignas(64) float row[256];  // the largest head_dim
    each((const T*)x, count, row, [](F v, int64_t, int64_t) __attribute__((always_inline)) { return v; });
    quantize(row, count, (int8*)to, (float*)scale);
}

// The K and V of a token as int8: `x` is its first key before norm and rotation.
static void write_int8(const Rotation& r, const float* x, const float* angles, int64_t block, int64_t offset) {
    const int64_t dim = r.head_dim, size = head_bytes(r.block_size, dim, 1, true);
    char* page = r.pool + block * r.block_stride;
    alignas(64) float row[256];
    for (int64_t head = 0; head < 2 * r.kv_heads; head++, x += dim, page += size) {
        const bool is_key = head < r.kv_heads;
        if (is_key) rotate_head(x, r.k_norm, r.eps, angles, dim, row);
        quantize(is_key ? row : x, dim, (int8*)page + offset * dim,
                 (float*)(page + r.block_size * dim + offset * kScaleBytes));
    }
}

template <class T>
static void rotate(const Rotation& r, int64_t token) {
    const int64_t dim = r.head_dim;
    const float* x = r.qkv + token * (r.q_heads + 2 * r.kv_heads) * dim;
    const float* angles = r.angles + token * dim;
    T* q = (T*)r.q + token * r.q_heads * dim;
    for (int64_t head = 0; head < r.q_heads; head++, x += dim, q += dim)
        rotate_head(x, r.q_norm, r.eps, angles, dim, q);
    if (r.slots[token] < 0) return;
    const int64_t block = r.slots[token] / r.block_size, offset = r.slots[token] % r.block_size;
    if (r.is_int8) return write_int8(r, x, angles, block, offset);
    T* k = (T*)(r.pool + block * r.block_stride) + offset * dim;
    T* v = k + r.kv_heads * r.block_size * dim;
    for (int64_t head = 0; head < r.kv_heads; head++, x += dim, k += r.block_size * dim)
        rotate_head(x, r.k_norm, r.eps, angles, dim, k);
    for (int64_t head = 0; head < r.kv_heads; head++, x += dim, v += r.block_size * dim)
        round_row(x, dim, v);
}

}  // namespace quire::QUIRE_LEVEL

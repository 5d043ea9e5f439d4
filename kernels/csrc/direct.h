// Attention of few query rows (decode): keys and values are streamed once from their pages, with vectors along head_dim.
//
// The time is that of reading memory, so the order of reading decides: all kv heads of a page before the next page (long
// runs), keys of a tile and then its values, and what comes two steps later is prefetched line by line meanwhile.
#pragma once
#include "segments.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kStream = 64;            // keys of a tile
constexpr int64_t kAheadBytes = 8 * 1024;  // distance of the prefetch
constexpr int kRows = 4;                   // query rows that share one load of a key

// Products of a query and a key in float32.
template <class T>
struct Floats {
    using Query = float;
    static constexpr int step = W;
    static constexpr bool allows(int64_t) { return true; }
    QUIRE_INLINE F load_key(const T* k) { return load(k); }
    QUIRE_INLINE F add(F total, const float* q, F k) { return total + load(q) * k; }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, added up in float32.
struct Pairs {
    using Query = bf16;
    static constexpr int step = 2 * W;
    static constexpr bool allows(int64_t dim) { return dim % step == 0; }
    QUIRE_INLINE __m512i load_key(const bf16* k) { return _mm512_loadu_si512(k); }
    QUIRE_INLINE F add(F total, const bf16* q, __m512i k) {
        return (F)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(q), (__m512bh)k);
    }
};
#endif

QUIRE_INLINE void prefetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}

// scores[r][key] for R query rows and N keys that lie `dim` apart.
template <class Dot, int R, int N, class T>
QUIRE_INLINE void dots(const T* k, const typename Dot::Query* q, int64_t dim, float* scores) {
    F total[W] = {};
    for (int64_t d = 0; d < dim; d += Dot::step) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const auto key = Dot::load_key(k + n * dim + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) total[r * N + n] = Dot::add(total[r * N + n], q + r * dim + d, key);
        }
    }
    alignas(64) float lanes[W];
    store(lanes, sums(total));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) __builtin_memcpy(scores + r * kStream, lanes + r * N, N * sizeof(float));
}

template <class Dot, int R, class T>
static void score_rows(const T* k, int64_t count, const typename Dot::Query* q, int64_t dim, float* scores,
                       const char* ahead) {
    constexpr int N = W / R < 1 ? 1 : (W / R >= 8 ? 8 : (W / R >= 4 ? 4 : (W / R >= 2 ? 2 : 1)));
    const int64_t bytes = dim * sizeof(T);
    int64_t n = 0;
    for (; n + N <= count; n += N) {
        if (ahead) prefetch(ahead + n * bytes, N * bytes);
        dots<Dot, R, N>(k + n * dim, q, dim, scores + n);
    }
    for (; n < count; n++) {
        if (ahead) prefetch(ahead + n * bytes, bytes);
        dots<Dot, R, 1>(k + n * dim, q, dim, scores + n);
    }
}

// out[r][NV vectors] += sum over keys of p[r][key] * v[key].
template <int R, int NV, class T>
static void weigh_columns(const T* v, int64_t count, const float* p, int64_t dim, float* out, const char* ahead) {
    F total[R][NV];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) total[r][j] = load(out + r * dim + j * W);
    for (int64_t n = 0; n < count; n++) {
        if (ahead) prefetch(ahead + n * dim * sizeof(T), NV * W * sizeof(T));
        F value[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) value[j] = load(v + n * dim + j * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const F weight = set1(p[r * kStream + n]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) total[r][j] = total[r][j] + weight * value[j];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(out + r * dim + j * W, total[r][j]);
}

template <int R, class T>
static void weigh_rows(const T* v, int64_t count, const float* p, int64_t dim, float* out, const char* ahead) {
    constexpr int NV = W == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + NV * W <= dim; d += NV * W)
        weigh_columns<R, NV>(v + d, count, p, dim, out + d, ahead ? ahead + d * sizeof(T) : nullptr);
    for (; d < dim; d += W)
        weigh_columns<R, 1>(v + d, count, p, dim, out + d, ahead ? ahead + d * sizeof(T) : nullptr);
}

// Calls body(first row, std::integral_constant-like R) for all rows, kRows at a time.
template <int R>
struct Rows {
    static constexpr int value = R;
};
template <class Body>
QUIRE_INLINE void by_rows(int64_t rows, Body body) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) body(r, Rows<kRows>{});
    if (rows - r == 3) body(r, Rows<3>{});
    if (rows - r == 2) body(r, Rows<2>{});
    if (rows - r == 1) body(r, Rows<1>{});
}

// One query row's step of the running softmax over a tile: scores become weights, out is rescaled to the new maximum.
static void softmax(float* scores, int64_t count, float scale, int64_t dim, float* out, float& top, float& total) {
    const int64_t padded = round_up(count, W);
    for (int64_t n = count; n < padded; n++) scores[n] = -kInf;
    F best = set1(-kInf);
    for (int64_t n = 0; n < padded; n += W) best = max(load(scores + n), best);
    const float new_top = greater(top, highest(best) * scale);
    const float base = new_top == -kInf ? 0.f : new_top;
    F added = {};
    for (int64_t n = 0; n < padded; n += W) {
        const F weight = exp_neg(load(scores + n) * scale - base);
        store(scores + n, weight);
        added += weight;
    }
    if (new_top != top) {
        const float factor = __builtin_expf(top - base);
        total *= factor;
        for (int64_t d = 0; d < dim; d += W) store(out + d, load(out + d) * factor);
        top = new_top;
    }
    total += sum(added);
}

struct Stream {  // a tile of keys
    Segment segments[kStream];
    int64_t num_segments = 0, num_keys = 0;

    void fill(Segments& source) {
        num_segments = num_keys = 0;
        while (num_keys < kStream && source.next(segments[num_segments], kStream - num_keys))
            num_keys += segments[num_segments++].count;
    }
};

struct DirectScratch {  // dimensions padded to whole vectors
    static constexpr int64_t rows = kDirectHeads * kDirectRows, dim = 256;
    alignas(64) float q[rows * dim];
    alignas(64) float out[rows * dim];
    alignas(64) float scores[rows * kStream];
    alignas(64) float widened[kStream * dim];
    float top[rows], total[rows];
    Stream streams[2];
};

// T: of the queries; K: of keys and values. Products with int8 keys are of their elements; a key's scale multiplies its
// scores, and a value's scale its weights.
template <class T, class K, class Dot>
class Direct {
    static constexpr bool is_int8 = sizeof(K) == 1;

public:
    Direct(const Call& call, const Item& item, DirectScratch& scratch)
        : call_(call),
          item_(item),
          scratch_(scratch),
          group_(call.q_heads / call.kv_heads),
          rows_(item.num_tokens * group_),
          dim_(round_up(call.head_dim, W)),
          head_bytes_(head_bytes(call.block_size, call.head_dim, sizeof(K), is_int8)),
          value_bytes_(call.kv_heads * head_bytes_) {}

    void run() {
        load_queries();
        Segments source(call_, item_);
        Stream* now = &scratch_.streams[0];
        Stream* later = &scratch_.streams[1];
        now->fill(source);
        while (now->num_keys) {
            later->fill(source);
            keys(*now, *later);
            for (int64_t head = 0; head < item_.num_heads; head++) {
                if (item_.num_tokens > 1) hide(*now, head);
                for (int64_t row = head * rows_; row < (head + 1) * rows_; row++)
                    softmax(scratch_.scores + row * kStream, now->num_keys, (float)call_.scale, dim_,
                            scratch_.out + row * dim_, scratch_.top[row], scratch_.total[row]);
            }
            values(*now, *later);
            Stream* const swap = now;
            now = later;
            later = swap;
        }
        store_results();
    }

private:
    void load_queries() {
        const T* q = (const T*)call_.q + item_.token * call_.q_stride + item_.head * group_ * call_.head_dim;
        auto* to = (typename Dot::Query*)scratch_.q;
        for (int64_t head = 0; head < item_.num_heads; head++) {
            for (int64_t row = 0; row < rows_; row++) {
                const T* from = q + row / group_ * call_.q_stride + (head * group_ + row % group_) * call_.head_dim;
                for (int64_t d = 0; d < dim_; d++, to++) {
                    set(*to, d < call_.head_dim ? from[d] : (T)0);
                }
            }
        }
        for (int64_t i = 0; i < item_.num_heads * rows_ * dim_; i++) scratch_.out[i] = 0.f;
        for (int64_t i = 0; i < item_.num_heads * rows_; i++) scratch_.top[i] = -kInf, scratch_.total[i] = 0.f;
    }

    static void set(T& to, T from) { to = from; }
    template <class Other>
    static void set(Other& to, T from) {
        to = to_float(from);
    }

    // The address that is read `steps` steps after step `index` of this tile (a step is one segment of one kv head, the
    // keys of the tile first), or null beyond the next tile.
    const char* ahead(const Stream& now, const Stream& later, int64_t index, int64_t steps) const {
        const int64_t heads = item_.num_heads;
        const Stream* stream = &now;
        index += steps;
        if (index >= 2 * now.num_segments * heads) {
            index -= 2 * now.num_segments * heads;
            stream = &later;
            if (index >= 2 * later.num_segments * heads) return nullptr;
        }
        const int64_t half = stream->num_segments * heads;
        const bool value = index >= half;
        if (value) index -= half;
        const Segment& segment = stream->segments[index / heads];
        const char* const k = segment.k + (item_.head + index % heads) * head_bytes_ + (value ? value_bytes_ : 0);
        if (is_int8) __builtin_prefetch(scales(segment, k), 0, 3);
        return k;
    }

    // Of the segment whose first key (or value) of some head is at `k`.
    const char* scales(const Segment& segment, const char* k) const {
        return k + (call_.block_size - segment.offset) * call_.head_dim + segment.offset * kScaleBytes;
    }

    // Multiplies what the query rows of a head have for the segment's keys by their scales.
    void rescale(const Segment& segment, const char* k, float* scores) const {
        const float* const factors = (const float*)scales(segment, k);
        for (int64_t row = 0; row < rows_; row++, scores += kStream) {
            int64_t n = 0;
            for (; n + W <= segment.count; n += W) store(scores + n, load(scores + n) * load(factors + n));
            for (; n < segment.count; n++) scores[n] *= factors[n];
        }
    }

    int64_t steps_ahead(const Stream& now) const {
        const int64_t mean = now.num_keys * call_.head_dim * (int64_t)sizeof(K) / now.num_segments;
        return greater<int64_t>(2, kAheadBytes / mean);
    }

    void keys(const Stream& now, const Stream& later) {
        const auto* q = (const typename Dot::Query*)scratch_.q;
        const int64_t steps = steps_ahead(now);
        int64_t index = 0, first = 0;
        for (int64_t s = 0; s < now.num_segments; first += now.segments[s++].count) {
            const int64_t count = now.segments[s].count;
            for (int64_t head = 0; head < item_.num_heads; head++, index++) {
                const char* next = ahead(now, later, index, steps);
                const K* k = (const K*)(now.segments[s].k + (item_.head + head) * head_bytes_);
                by_rows(rows_, [&](int64_t r, auto R) __attribute__((always_inline)) {
                    const int64_t row = head * rows_ + r;
                    float* scores = scratch_.scores + row * kStream + first;
                    const char* fetch = r ? nullptr : next;
                    if (dim_ == call_.head_dim)
                        score_rows<Dot, R.value>(k, count, q + row * dim_, dim_, scores, fetch);
                    else
                        score_rows<Floats<float>, R.value>(widen(k, count, r), count, scratch_.q + row * dim_, dim_,
                                                           scores, fetch);
                });
                if (is_int8) rescale(now.segments[s], (const char*)k, scratch_.scores + head * rows_ * kStream + first);
            }
        }
    }

    void values(const Stream& now, const Stream& later) {
        const int64_t steps = steps_ahead(now);
        int64_t index = now.num_segments * item_.num_heads, first = 0;
        for (int64_t s = 0; s < now.num_segments; first += now.segments[s++].count) {
            const int64_t count = now.segments[s].count;
            for (int64_t head = 0; head < item_.num_heads; head++, index++) {
                const char* next = ahead(now, later, index, steps);
                const K* v = (const K*)(now.segments[s].k + value_bytes_ + (item_.head + head) * head_bytes_);
                if (is_int8) rescale(now.segments[s], (const char*)v, scratch_.scores + head * rows_ * kStream + first);
                by_rows(rows_, [&](int64_t r, auto R) __attribute__((always_inline)) {
                    const int64_t row = head * rows_ + r;
                    const float* p = scratch_.scores + row * kStream + first;
                    float* out = scratch_.out + row * dim_;
                    const char* fetch = r ? nullptr : next;
                    if (dim_ == call_.head_dim)
                        weigh_rows<R.value>(v, count, p, dim_, out, fetch);
                    else
                        weigh_rows<R.value>((const float*)widen(v, count, r), count, p, dim_, out, fetch);
                });
            }
        }
    }

    // A head_dim that is not whole vectors: a copy padded with zeros, made once for the first of the query rows.
    const float* widen(const K* from, int64_t count, int64_t row) {
        if (row == 0) {
            for (int64_t n = 0; n < count; n++) {
                float* to = scratch_.widened + n * dim_;
                for (int64_t d = 0; d < call_.head_dim; d++) to[d] = to_float(from[n * call_.head_dim + d]);
                for (int64_t d = call_.head_dim; d < dim_; d++) to[d] = 0.f;
            }
        }
        return scratch_.widened;
    }

    void hide(const Stream& now, int64_t head) {
        for (int64_t row = 0; row < rows_; row++) {
            const int64_t query = item_.position + row / group_;
            float* scores = scratch_.scores + (head * rows_ + row) * kStream;
            for (int64_t s = 0; s < now.num_segments; s++)
                for (int64_t n = 0; n < now.segments[s].count; n++, scores++)
                    if (!sees(call_, query, now.segments[s].position + n)) *scores = -kInf;
        }
    }

    void store_results() {
        for (int64_t head = 0; head < item_.num_heads; head++) {
            for (int64_t r = 0; r < rows_; r++) {
                const int64_t row = head * rows_ + r;
                const int64_t to = r / group_ * call_.q_heads + (item_.head + head) * group_ + r % group_;
                const float total = scratch_.total[row];
                const float inverse = total == 0.f ? 0.f : 1.f / total;
                for (int64_t d = 0; d < call_.head_dim; d++)
                    item_.out[to * call_.head_dim + d] = scratch_.out[row * dim_ + d] * inverse;
                item_.lse[to] = total == 0.f ? -kInf : scratch_.top[row] + __builtin_logf(total);
            }
        }
    }

    const Call& call_;
    const Item& item_;
    DirectScratch& scratch_;
    const int64_t group_, rows_, dim_, head_bytes_, value_bytes_;
};

static void direct_f32(const Call& call, const Item& item, char* scratch) {
    if (call.is_int8) return Direct<float, int8, Floats<int8>>(call, item, *(DirectScratch*)scratch).run();
    Direct<float, float, Floats<float>>(call, item, *(DirectScratch*)scratch).run();
}

static void direct_bf16(const Call& call, const Item& item, char* scratch) {
    if (call.is_int8) return Direct<bf16, int8, Floats<int8>>(call, item, *(DirectScratch*)scratch).run();
#if defined(__AVX512BF16__)
    if (Pairs::allows(call.head_dim)) return Direct<bf16, bf16, Pairs>(call, item, *(DirectScratch*)scratch).run();
#endif
    Direct<bf16, bf16, Floats<bf16>>(call, item, *(DirectScratch*)scratch).run();
}

}  // namespace quire::QUIRE_LEVEL

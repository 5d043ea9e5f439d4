// Attention of many query rows (prefill chunks): tiles of keys times groups of query rows.
//
// A tile of keys is gathered from its pages once per kv head and used by all query rows of the item. Scores are kept
// transposed, S'[key][query] = K Q': keys then multiply as they lie (row by row, no packing), the softmax runs down
// vectors of queries with no sum across lanes, and the weights are ready as the left side of P V. Only the queries are
// packed, once per item, and for bfloat16 products the values in pairs of keys.
#pragma once
#include "multiply.h"
#include "rows.h"
#include "segments.h"

namespace quire::QUIRE_LEVEL {

constexpr int64_t kKeys = 128;                    // of a tile; even
constexpr int64_t kLanes = kMultiplyVectors * W;     // query rows of a group
constexpr int64_t kMaxDim = 256;
constexpr int32_t kNowhere = INT32_MAX;  // later than all queries: hidden from them
constexpr float kLog2E = 1.44269504f;
static_assert(kTileRows % kLanes == 0);

struct TiledScratch {  // 32 bits per element, whatever the word
    alignas(64) uint32_t q[kTileRows * kMaxDim];  // [group][head_dim words][lane]
    alignas(64) float out[kTileRows * kMaxDim];   // [query row][head_dim padded]
    alignas(64) uint32_t k[kKeys * kMaxDim];      // [key][head_dim words]
    alignas(64) uint32_t v[kKeys * kMaxDim];      // [key words][head_dim padded]
    alignas(64) float scores[kKeys * kLanes];     // [key][lane], then weights [key words][lane]
    alignas(64) float top[kTileRows], total[kTileRows], factor[kTileRows];
    alignas(64) int32_t position[kTileRows];
    const char* key_at[kKeys];
    int32_t key_offset[kKeys];  // in its page
    alignas(64) float key_scale[kKeys], value_scale[kKeys];
    int32_t key_position[kKeys];
};

// T: of the queries; K: of keys and values. Words are made of int8 elements as they are, exactly; a key's scale multiplies
// its scores, and a value's scale its weights.
template <class T, class K, class Words>
class Tiled {
    using Word = typename Words::Word;
    static constexpr bool is_int8 = sizeof(K) == 1;
    static constexpr int64_t per_word = Words::per_word;

public:
    Tiled(const Call& call, const Item& item, TiledScratch& scratch)
        : call_(call),
          item_(item),
          scratch_(scratch),
          group_(call.q_heads / call.kv_heads),
          rows_(item.num_tokens * group_),
          dim_(round_up(call.head_dim, W)),
          words_((call.head_dim + per_word - 1) / per_word),
          head_bytes_(head_bytes(call.block_size, call.head_dim, sizeof(K), is_int8)),
          value_bytes_(call.kv_heads * head_bytes_) {}

    void run() {
        load_queries();
        Segments source(call_, item_);
        Segment segment;
        // A tile is of keys whose positions have the same quotient by kKeys, and keys at even positions stand first in
        // their pairs: so a row's sums are cut where its keys are, whatever the other rows of the item see.
        bool more = source.next(segment, kKeys, kKeys);
        while (more) {
            num_keys_ = 0;
            has_holes_ = false;
            const int64_t tile = segment.position / kKeys;
            while (more && segment.position / kKeys == tile && num_keys_ + hole(segment) + segment.count <= kKeys) {
                add_segment(segment);
                more = source.next(segment, num_keys_ < kKeys ? kKeys - num_keys_ : kKeys, kKeys);
            }
            gather();
            for (int64_t row = 0; row < rows_; row += kLanes) attend_group(row);
        }
        store_results();
    }

private:
    static Word word_of(float x) { return x; }
    static Word word_of(int8 x) { return x; }  // where words are floats
    static Word word_of(bf16 x) { return per_word == 2 ? (Word)x : (Word)to_float(x); }
    static Word pair_of(bf16 low, bf16 high) { return (uint32_t)low | (uint32_t)high << 16; }
    static Word pair_of(int8 low, int8 high) { return pair_of(bits_of(low), bits_of(high)); }
    static Word pair_of(float low, float) { return low; }  // never called
    static bf16 bits_of(float x) {  // of a float that is a bfloat16
        uint32_t bits;
        __builtin_memcpy(&bits, &x, sizeof bits);
        return (bf16)(bits >> 16);
    }
    static U bits_at(const bf16* p) { return load_bits(p); }
    static U bits_at(const int8* p) { return (U)load(p) >> 16; }
    static U bits_at(const float* p) { return (U)load(p); }  // never called

    // Word `w` of a row of head_dim values; a last half pair is filled with zero.
    template <class Element>
    Word word_at(const Element* row, int64_t w) const {
        if (per_word == 1) return word_of(row[w]);
        return pair_of(row[2 * w], 2 * w + 1 < call_.head_dim ? row[2 * w + 1] : (Element)0);
    }

    void load_queries() {
        const T* q = (const T*)call_.q + item_.token * call_.q_stride + item_.head * group_ * call_.head_dim;
        auto* to = (Word*)scratch_.q;
        for (int64_t row = 0; row < round_up(rows_, kLanes); row++) {
            Word* lane = to + row / kLanes * words_ * kLanes + row % kLanes;
            if (row >= rows_) {
                for (int64_t w = 0; w < words_; w++) lane[w * kLanes] = 0;
                scratch_.position[row] = (int32_t)(item_.position + item_.num_tokens - 1);
                continue;
            }
            const T* from = q + row / group_ * call_.q_stride + row % group_ * call_.head_dim;
            for (int64_t w = 0; w < words_; w++) lane[w * kLanes] = word_at(from, w);
            scratch_.position[row] = (int32_t)(item_.position + row / group_);
        }
        for (int64_t i = 0; i < round_up(rows_, kLanes) * dim_; i++) scratch_.out[i] = 0.f;
        for (int64_t i = 0; i < round_up(rows_, kLanes); i++) scratch_.top[i] = -kInf, scratch_.total[i] = 0.f;
        for (int64_t i = 0; i < kKeys * dim_; i++) scratch_.v[i] = 0;  // the padding stays so
    }

    // Whether a key that nobody sees must stand before the segment.
    int64_t hole(const Segment& segment) const { return per_word == 2 ? (segment.position ^ num_keys_) & 1 : 0; }

    void add_segment(const Segment& segment) {
        if (hole(segment)) {
            scratch_.key_at[num_keys_] = nullptr;
            scratch_.key_position[num_keys_++] = kNowhere;
            has_holes_ = true;
        }
        for (int64_t n = 0; n < segment.count; n++, num_keys_++) {
            scratch_.key_at[num_keys_] =
                segment.k + item_.head * head_bytes_ + n * call_.head_dim * (int64_t)sizeof(K);
            scratch_.key_offset[num_keys_] = (int32_t)(segment.offset + n);
            scratch_.key_position[num_keys_] = (int32_t)(segment.position + n);
        }
    }

    const K* key(int64_t n) const { return scratch_.key_at[n] ? (const K*)scratch_.key_at[n] : zeros(); }
    const K* value(int64_t n) const {
        return scratch_.key_at[n] ? (const K*)(scratch_.key_at[n] + value_bytes_) : zeros();
    }
    static const K* zeros() {
        alignas(64) static const K row[kMaxDim] = {};
        return row;
    }
    float scale_of(int64_t n, const K* row) const {
        const int64_t offset = scratch_.key_offset[n];
        return *(const float*)((const char*)row + (call_.block_size - offset) * call_.head_dim + offset * kScaleBytes);
    }

    void gather() {
        lowest_ = kNowhere;
        highest_ = 0;
        for (int64_t n = 0; n < num_keys_; n++) {
            copy_key((Word*)scratch_.k + n * words_, key(n));
            if (is_int8) {
                scratch_.key_scale[n] = scratch_.key_at[n] ? scale_of(n, key(n)) : 0.f;
                scratch_.value_scale[n] = scratch_.key_at[n] ? scale_of(n, value(n)) : 0.f;
            }
            if (scratch_.key_position[n] == kNowhere) continue;
            lowest_ = lesser(lowest_, scratch_.key_position[n]);
            highest_ = greater(highest_, scratch_.key_position[n]);
        }
        for (int64_t n = 0; n < num_keys_; n += per_word)
            copy_values((Word*)scratch_.v + n / per_word * dim_, value(n), n + 1 < num_keys_ ? value(n + 1) : nullptr);
    }

    void copy_key(Word* to, const K* from) {
        if constexpr (sizeof(K) * per_word == sizeof(Word)) {  // the words lie there already
            __builtin_memcpy(to, from, call_.head_dim * sizeof(K));
            if (call_.head_dim % per_word) to[words_ - 1] = word_at(from, words_ - 1);
        } else if constexpr (per_word == 2) {
            each(from, call_.head_dim, (bf16*)to, [](F v, int64_t, int64_t) __attribute__((always_inline)) { return v; });
            pad((bf16*)to, call_.head_dim);
        } else {
            copy_values(to, from, nullptr);
        }
    }

    // One row of words from the values of one key, or of a pair of keys (of which the second may be missing).
    void copy_values(Word* to, const K* low, const K* high) {
        int64_t d = 0;
        if constexpr (per_word == 2) {
            for (; high && d + W <= call_.head_dim; d += W) {
                const U pairs = bits_at(low + d) | bits_at(high + d) << 16;
                __builtin_memcpy(to + d, &pairs, sizeof pairs);
            }
            for (; d < call_.head_dim; d++) to[d] = pair_of(low[d], high ? high[d] : (K)0);
        } else {
            for (; d + W <= call_.head_dim; d += W) store(to + d, load(low + d));
            for (; d < call_.head_dim; d++) to[d] = word_of(low[d]);
        }
    }

    void attend_group(int64_t row) {
        const int64_t lanes = lesser(kLanes, rows_ - row), vectors = (lanes + W - 1) / W;
        const int64_t first = scratch_.position[row], last = scratch_.position[row + lanes - 1];
        if (lowest_ > last) return;
        if (call_.window && first - highest_ >= call_.window && lowest_ >= call_.sinks) return;
        used_ = num_keys_;  // keys above the diagonal at the tile's end are left out
        while (scratch_.key_position[used_ - 1] > last) used_--;
        const bool masked = has_holes_ || highest_ > first || (call_.window && last - lowest_ >= call_.window);
        const Word* q = (const Word*)scratch_.q + row * words_;
        multiply_all<Words, false>((const Word*)scratch_.k, words_, 1, used_, q, kLanes, vectors * W,
                                   words_, scratch_.scores, kLanes, nullptr);
        for (int64_t v = 0; v < vectors; v++) {
            if (is_int8) rescale(scratch_.scores + v * W);
            if (masked) hide(row + v * W, scratch_.scores + v * W);
            softmax(row + v * W, scratch_.scores + v * W);
        }
        const int64_t depth = (used_ + per_word - 1) / per_word;
        multiply_all<Words, true>((const Word*)scratch_.scores, 1, kLanes, lanes, (const Word*)scratch_.v,
                                  dim_, dim_, depth, scratch_.out + row * dim_, dim_, scratch_.factor + row);
    }

    void rescale(float* scores) {
        for (int64_t n = 0; n < used_; n++)
            store(scores + n * kLanes, load(scores + n * kLanes) * scratch_.key_scale[n]);
    }

    void hide(int64_t row, float* scores) {
        I query;
        __builtin_memcpy(&query, scratch_.position + row, sizeof query);
        const F none = set1(-kInf);
        const I all = set1i(-1);
        const I window = set1i(call_.window ? (int32_t)call_.window : INT32_MAX);
        for (int64_t n = 0; n < used_; n++) {
            const int32_t position = scratch_.key_position[n];
            const I distance = query - position;
            const I near = position < call_.sinks || !call_.window ? all : (I)(distance < window);
            const I seen = (distance >= 0) & near;
            store(scores + n * kLanes, seen ? load(scores + n * kLanes) : none);
        }
    }

    // The running softmax of W query rows over the tile: scores become weights, `factor` what earlier sums count now.
    void softmax(int64_t row, float* scores) {
        const F scale = set1((float)call_.scale);
        F best[4] = {set1(-kInf), set1(-kInf), set1(-kInf), set1(-kInf)};
        int64_t n = 0;
        for (; n + 4 <= used_; n += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) best[j] = max(load(scores + (n + j) * kLanes), best[j]);
        for (; n < used_; n++) best[0] = max(load(scores + n * kLanes), best[0]);
        const F top = load(scratch_.top + row);
        const F new_top = max(max(max(best[0], best[1]), max(best[2], best[3])) * scale, top);
        const F base = new_top == -kInf ? F{} : new_top;
        F added = weigh(scores, scale, base);
        const F factor = exp_neg(top - base);
        store(scratch_.top + row, new_top);
        store(scratch_.factor + row, factor);
        store(scratch_.total + row, load(scratch_.total + row) * factor + added);
    }

#if defined(__AVX512BF16__)
    // Takes [low 0..15, high 0..15] to [low 0, high 0, low 1, ...].
    static __m512i pair_order() {
        alignas(64) uint16_t order[2 * W];
        for (int i = 0; i < W; i++) order[2 * i] = (uint16_t)i, order[2 * i + 1] = (uint16_t)(W + i);
        return _mm512_load_si512(order);
    }

    // 2^x for x <= 0 to 3e-6: the weights are rounded to bfloat16. Exactly 0 for -inf; NaN stays NaN.
    QUIRE_INLINE F exp2_neg(F x) {
        const __m512 y = _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // the second operand where one is NaN
        const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const F r = (F)_mm512_sub_ps(y, n);
        F p = set1(9.5699e-3f);  // fitted for the least largest error over [-0.5, 0.5]
        p = p * r + 5.591738e-2f;
        p = p * r + 2.4024745e-1f;
        p = p * r + 6.9312188e-1f;
        p = p * r + 9.9999926e-1f;
        return (F)_mm512_scalef_ps((__m512)p, n);
    }
#endif

    QUIRE_INLINE F weigh_one(const float* score, F scale, F base) { return exp_neg(load(score) * scale - base); }

    F weigh(float* scores, F scale, F base) {
        F added = {};
        if constexpr (per_word == 1) {
            for (int64_t n = 0; n < used_; n++) {
                const F weight = weigh_one(scores + n * kLanes, scale, base);
                store(scores + n * kLanes, is_int8 ? weight * scratch_.value_scale[n] : weight);
                added += weight;
            }
        } else {
#if defined(__AVX512BF16__)
            // In place: word row n/2 is written after rows n and n+1 were read.
            const F scale2 = scale * kLog2E, base2 = base * kLog2E;
            const __m512i pairs = pair_order();
            F more = {};
            for (int64_t n = 0; n < used_; n += 2) {
                F low = exp2_neg(load(scores + n * kLanes) * scale2 - base2);
                F high = n + 1 < used_ ? exp2_neg(load(scores + (n + 1) * kLanes) * scale2 - base2) : F{};
                added += low;
                more += high;
                if (is_int8) {
                    low *= scratch_.value_scale[n];
                    high *= n + 1 < used_ ? scratch_.value_scale[n + 1] : 0.f;
                }
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
                _mm512_storeu_si512(scores + n / 2 * kLanes, _mm512_permutexvar_epi16(pairs, both));
            }
            added += more;
#endif
        }
        return added;
    }

    void store_results() {
        for (int64_t row = 0; row < rows_; row++) {
            const int64_t to = row / group_ * call_.q_heads + item_.head * group_ + row % group_;
            const float total = scratch_.total[row];
            const float inverse = total == 0.f ? 0.f : 1.f / total;
            float* const out = item_.out + to * call_.head_dim;
            const float* const sums = scratch_.out + row * dim_;
            int64_t d = 0;
            for (; d + W <= call_.head_dim; d += W) store(out + d, load(sums + d) * inverse);
            for (; d < call_.head_dim; d++) out[d] = sums[d] * inverse;
            item_.lse[to] = total == 0.f ? -kInf : scratch_.top[row] + __builtin_logf(total);
        }
    }

    const Call& call_;
    const Item& item_;
    TiledScratch& scratch_;
    const int64_t group_, rows_, dim_, words_, head_bytes_, value_bytes_;
    int64_t num_keys_ = 0;  // of the tile
    int64_t used_ = 0;      // of those, by the group at hand
    bool has_holes_ = false;
    int32_t lowest_ = 0, highest_ = 0;
};

static void tiled_f32(const Call& call, const Item& item, char* scratch) {
    if (call.is_int8) return Tiled<float, int8, FloatWords>(call, item, *(TiledScratch*)scratch).run();
    Tiled<float, float, FloatWords>(call, item, *(TiledScratch*)scratch).run();
}

static void tiled_bf16(const Call& call, const Item& item, char* scratch) {
#if defined(__AVX512BF16__)
    if (call.is_int8) return Tiled<bf16, int8, PairWords>(call, item, *(TiledScratch*)scratch).run();
    Tiled<bf16, bf16, PairWords>(call, item, *(TiledScratch*)scratch).run();
#else
    if (call.is_int8) return Tiled<bf16, int8, FloatWords>(call, item, *(TiledScratch*)scratch).run();
    Tiled<bf16, bf16, FloatWords>(call, item, *(TiledScratch*)scratch).run();
#endif
}

}  // namespace quire::QUIRE_LEVEL

// One token from a row of logits: temperature, then min-p, top-k and top-p, each over what the one before has left, then
// the first token in id order whose cumulative weight is above u times the total. worker/draw.py says the same in torch.
//
// Weights are exp((logit - peak) / temperature) in double. What is kept is always a prefix of the order (larger logit
// first, of equals the lower id), so it is one cut; top-k finds it by keeping the best in a list whose least raises a
// threshold, top-p by the masses of bins of logits, of which only the one that the cut falls into is sorted.
#pragma once
#include <algorithm>
#include <vector>

#include "step.h"
#include "vec.h"

namespace quire::QUIRE_LEVEL {

typedef double D __attribute__((vector_size(W * 4)));
typedef int64_t L __attribute__((vector_size(W * 4)));
typedef float HalfF __attribute__((vector_size(W * 2)));
constexpr int64_t kBlock = 256;  // logits whose weights are summed apart
constexpr int kBins = 4096;
constexpr double kBinsPerUnit = 64;  // of (peak - logit) / temperature
constexpr int64_t kListed = 4096;    // largest top-k that goes through a list

// exp(x) for x <= 0 to about an ulp; 0 from where it would be subnormal.
QUIRE_INLINE D exp_neg(D x) {
    const D low = -708.0 - D{};
    const D y = x > low ? x : low;
    const D magic = 6755399441055744.0 - D{};  // 1.5 * 2^52
    const D shifted = y * 1.4426950408889634 + magic;
    const D n = shifted - magic;
    const D r = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    D p = 1.6059043836821613e-10 - D{};
    constexpr double terms[] = {2.0876756987868099e-09, 2.5052108385441720e-08, 2.7557319223985893e-07,
                                2.7557319223985888e-06, 2.4801587301587302e-05, 1.9841269841269841e-04,
                                1.3888888888888889e-03, 8.3333333333333332e-03, 4.1666666666666664e-02,
                                1.6666666666666666e-01, 0.5,                    1.0,
                                1.0};
#pragma GCC unroll 13
    for (double term : terms) p = p * r + term;
    const D power = (D)(((L)shifted - (L)magic + 1023) << 52);
    return x > low ? p * power : D{};
}

struct Entry {
    float value;
    int32_t id;
    bool operator<(const Entry& other) const {  // comes first
        return value > other.value || (value == other.value && id < other.id);
    }
};

struct Block {
    int64_t first;  // logit
    double sum;
};

// Its vectors are of types of this namespace: what is instantiated for another level must not be linked in.
class Chooser {
public:
    Chooser(const float* row, int64_t vocab, const Choice& choice)
        : row_(row), vocab_(vocab), choice_(choice), inverse_(1.0 / greater(choice.temperature, 1e-300)) {
        F best = set1(-kInf);
        int64_t i = 0;
        for (; i + W <= vocab; i += W) best = max(load(row + i), best);
        float top = highest(best);
        for (; i < vocab; i++) top = greater(top, row[i]);
        peak_ = top;
    }

    int32_t run() {
        if (choice_.top_k < vocab_) return from_list(best(choice_.top_k));
        if (choice_.top_p < 1.0) cut_mass();
        return draw();
    }

private:
    static std::vector<Entry>& entries() {
        thread_local std::vector<Entry> kept;
        kept.clear();
        return kept;
    }

    // Weights of W / 2 logits; 0 where min-p cuts.
    D weights(const float* at) const {
        HalfF half;
        __builtin_memcpy(&half, at, sizeof half);
        return filtered(__builtin_convertvector(half, D));
    }
    D filtered(D logits) const {
        const D weight = exp_neg((logits - peak_) * inverse_);
        return weight >= choice_.min_p ? weight : D{};
    }
    double weight(float logit) const { return filtered((double)logit - D{})[0]; }

    // body(first logit, count, weights) by blocks; those that the cut leaves out whole are passed over.
    template <class Body>
    void blocks(Body body) const {
        double found[kBlock];
        for (int64_t first = 0; first < vocab_; first += kBlock) {
            const int64_t count = lesser(kBlock, vocab_ - first);
            if (!reaches(first, count)) continue;
            int64_t i = 0;
            for (; i + W / 2 <= count; i += W / 2) {
                const D some = weights(row_ + first + i);
                __builtin_memcpy(found + i, &some, sizeof some);
            }
            for (; i < count; i++) found[i] = weight(row_[first + i]);
            if (cut_.value > -kInf)
                for (i = 0; i < count; i++) found[i] = is_kept(first + i) ? found[i] : 0.0;
            body(first, count, found);
        }
    }

    bool reaches(int64_t first, int64_t count) const {
        if (cut_.value == -kInf) return true;
        float top = -kInf;
        for (int64_t i = 0; i < count; i++) top = greater(top, row_[first + i]);
        return top >= cut_.value;
    }

    bool is_kept(int64_t id) const {
        return row_[id] > cut_.value || (row_[id] == cut_.value && id <= cut_.id);
    }

    // The `count` best logits in order.
    std::vector<Entry>& best(int64_t count) const {
        std::vector<Entry>& kept = entries();
        if (count > kListed) {
            for (int64_t id = 0; id < vocab_; id++) kept.push_back({row_[id], (int32_t)id});
            std::nth_element(kept.begin(), kept.begin() + count - 1, kept.end());
        } else {
            float threshold = -kInf;  // what is not above it comes behind `count` others, or is masked
            for (int64_t first = 0; first < vocab_; first += 64) {
                const int64_t end = lesser<int64_t>(vocab_, first + 64);
                float top = -kInf;
                for (int64_t id = first; id < end; id++) top = greater(top, row_[id]);
                if (!(top > threshold)) continue;
                for (int64_t id = first; id < end; id++)
                    if (row_[id] > threshold) kept.push_back({row_[id], (int32_t)id});
                if ((int64_t)kept.size() < 4 * count + 64) continue;
                std::nth_element(kept.begin(), kept.begin() + count - 1, kept.end());
                kept.resize(count);
                threshold = kept.back().value;
            }
        }
        count = lesser<int64_t>(count, (int64_t)kept.size());
        std::partial_sort(kept.begin(), kept.begin() + count, kept.end());
        kept.resize(count);
        return kept;
    }

    int32_t from_list(std::vector<Entry>& kept) const {
        double total = 0.0;
        for (const Entry& entry : kept) total += weight(entry.value);
        size_t count = 0;
        double mass = 0.0;
        while (count < kept.size() && (choice_.top_p >= 1.0 || mass < choice_.top_p * total))
            mass += weight(kept[count++].value);
        kept.resize(count);
        std::sort(kept.begin(), kept.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
        const double target = choice_.u * mass;
        double sum = 0.0;
        int32_t last = kept.front().id;
        for (const Entry& entry : kept) {
            const double some = weight(entry.value);
            sum += some;
            if (some > 0.0) last = entry.id;
            if (some > 0.0 && sum > target) break;
        }
        return last;
    }

    int bin_of(float logit) const {
        const double at = (peak_ - (double)logit) * inverse_ * kBinsPerUnit;
        return at < kBins - 1 ? (int)at : kBins - 1;
    }

    // Sets the cut to the last entry that top-p keeps.
    void cut_mass() {
        double mass[kBins] = {};
        blocks([&](int64_t first, int64_t count, const double* found) {
            for (int64_t i = 0; i < count; i++)
                if (found[i] > 0.0) mass[bin_of(row_[first + i])] += found[i];
        });
        double total = 0.0;
        for (double each : mass) total += each;
        const double wanted = choice_.top_p * total;
        double before = 0.0;
        int bin = 0;
        while (bin < kBins - 1 && before + mass[bin] < wanted) before += mass[bin++];
        std::vector<Entry>& edge = entries();
        for (int64_t id = 0; id < vocab_; id++)
            if (bin_of(row_[id]) == bin) edge.push_back({row_[id], (int32_t)id});
        std::sort(edge.begin(), edge.end());
        for (const Entry& entry : edge) {
            if (before >= wanted && cut_.value > -kInf) break;
            cut_ = entry;
            before += weight(entry.value);
        }
    }

    int32_t draw() const {
        thread_local std::vector<Block> sums;
        sums.clear();
        double total = 0.0;
        blocks([&](int64_t first, int64_t count, const double* found) {
            double part[4] = {};
            int64_t i = 0;
            for (; i + 4 <= count; i += 4)
                for (int j = 0; j < 4; j++) part[j] += found[i + j];
            for (; i < count; i++) part[0] += found[i];
            sums.push_back({first, (part[0] + part[1]) + (part[2] + part[3])});
            total += sums.back().sum;
        });
        const double target = choice_.u * total;
        double sum = 0.0;
        size_t at = 0;
        while (at + 1 < sums.size() && sum + sums[at].sum <= target) sum += sums[at++].sum;
        int32_t chosen = -1;
        for (; at < sums.size(); at++) {
            const int64_t end = lesser(vocab_, sums[at].first + kBlock);
            for (int64_t id = sums[at].first; id < end; id++) {
                const double some = is_kept(id) ? weight(row_[id]) : 0.0;
                if (!(some > 0.0)) continue;
                chosen = (int32_t)id;
                sum += some;
                if (sum > target) return chosen;
            }
        }
        return chosen;
    }

    const float* const row_;
    const int64_t vocab_;
    const Choice choice_;
    const double inverse_;
    double peak_;
    Entry cut_{-kInf, INT32_MAX};
};

static int32_t choose(const float* row, int64_t vocab, const Choice& choice) {
    return Chooser(row, vocab, choice).run();
}

}  // namespace quire::QUIRE_LEVEL

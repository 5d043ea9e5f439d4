// Merging attention over disjoint keys by log-sum-exp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace quire {

struct Part {
    const float* out;  // [dim]
    float lse;
};

// Merges the results that part(0) .. part(parts) give. Of empty parts (lse -inf) `out` is not read.
template <class PartOf>
void merge_parts(PartOf part, int64_t parts, int64_t dim, float* out, float* lse) {
    constexpr float empty = -std::numeric_limits<float>::infinity();
    float top = empty;
    for (int64_t p = 0; p < parts; p++) {
        const float each = part(p).lse;
        if (each > top || std::isnan(each)) top = each;  // a NaN stays: it must not be lost
    }
    std::fill_n(out, dim, 0.f);
    *lse = top;
    if (top == empty) return;
    float total = 0.f;
    for (int64_t p = 0; p < parts; p++) {
        const Part each = part(p);
        if (each.lse == empty) continue;
        const float weight = std::exp(each.lse - top);
        total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * each.out[d];
    }
    const float inverse = 1.f / total;
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    *lse = top + std::log(total);
}

// The same of results that lie out_step (lse_step) floats apart.
inline void merge_parts(const float* outs, int64_t out_step, const float* lses, int64_t lse_step, int64_t parts,
                        int64_t dim, float* out, float* lse) {
    merge_parts([=](int64_t p) { return Part{outs + p * out_step, lses[p * lse_step]}; }, parts, dim, out, lse);
}

}  // namespace quire

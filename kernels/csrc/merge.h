// Merging attention over disjoint keys by log-sum-exp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace quire {

// Merges `parts` results that lie out_step (lse_step) floats apart. Empty parts (lse -inf) are not read.
inline void merge_parts(const float* outs, int64_t out_step, const float* lses, int64_t lse_step, int64_t parts,
                        int64_t dim, float* out, float* lse) {
    constexpr float empty = -std::numeric_limits<float>::infinity();
    float top = empty;
    for (int64_t p = 0; p < parts; p++) {
        const float each = lses[p * lse_step];
        if (!(each <= top)) top = each;  // also takes NaN, which must not be lost
    }
    std::fill_n(out, dim, 0.f);
    *lse = top;
    if (top == empty) return;
    float total = 0.f;
    for (int64_t p = 0; p < parts; p++) {
        if (lses[p * lse_step] == empty) continue;
        const float weight = std::exp(lses[p * lse_step] - top);
        total += weight;
        for (int64_t d = 0; d < dim; d++) out[d] += weight * outs[p * out_step + d];
    }
    const float inverse = 1.f / total;
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    *lse = top + std::log(total);
}

}  // namespace quire

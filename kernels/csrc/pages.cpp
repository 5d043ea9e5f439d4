// Moving keys and values: write_kv, copy_pages; and merge.
#include <cstdio>
#include <cstring>

#include "exports.h"
#include "merge.h"
#include "step.h"

namespace {

constexpr int64_t kBytesPerThread = 256 * 1024;  // below this a thread costs more than it saves

int threads_for(int64_t bytes, int64_t most) {
    const int64_t wanted = bytes / kBytesPerThread;
    return (int)(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

bool outside(const int32_t* ids, int64_t count, int64_t num_blocks, const char* name, char* message, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= num_blocks)
            return std::snprintf(message, (size_t)size, "%s[%lld]: got %d, must be from 0 to %lld", name, (long long)i,
                                 ids[i], (long long)num_blocks - 1) > 0;
    return false;
}

int64_t head_size(const quire::Pages& pages) {
    const int64_t element = pages.is_int8 ? 1 : pages.is_bf16 ? 2 : 4;
    return quire::head_bytes(pages.block_size, pages.head_dim, element, pages.is_int8);
}

}  // namespace

void quire_merge(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t dim, float* out,
                 float* lse, int64_t threads) {
    const int team = threads_for(parts * rows * dim * 4, threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t row = 0; row < rows; row++)
        quire::merge_parts(outs + row * dim, rows * dim, lses + row, rows, parts, dim, out + row * dim, lse + row);
}

int64_t quire_write_kv(const quire::Pages* pages, const char* k, int64_t k_stride, const char* v, int64_t v_stride,
                       int64_t layer, const int64_t* slots, int64_t num_tokens, char* message, int64_t size) {
    const quire::Level* const level = quire::level_of(pages->level);
    if (!level) {
        std::snprintf(message, (size_t)size, "level %lld is not built", (long long)pages->level);
        return 1;
    }
    const auto quantize = (pages->is_bf16 ? level->step_bf16 : level->step_f32)->quantize;
    const int64_t num_slots = pages->num_blocks * pages->block_size, dim = pages->head_dim;
    const int64_t row = dim * (pages->is_bf16 ? 2 : 4);
    for (int64_t t = 0; t < num_tokens; t++) {
        if (slots[t] < num_slots) continue;
        std::snprintf(message, (size_t)size, "slots[%lld]: got %lld, must be below %lld", (long long)t,
                      (long long)slots[t], (long long)num_slots);
        return 1;
    }
    char* const base = pages->base + layer * pages->layer_stride;
    const int64_t head_bytes = head_size(*pages), value_at = pages->kv_heads * head_bytes;
    const int64_t to_row = pages->is_int8 ? dim : row;
    const int team = threads_for(num_tokens * pages->kv_heads * row * 2, pages->threads);
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t t = 0; t < num_tokens; t++) {
        if (slots[t] < 0) continue;
        const int64_t offset = slots[t] % pages->block_size;
        char* const page = base + slots[t] / pages->block_size * pages->block_stride;
        char* const scales = page + pages->block_size * dim + offset * quire::kScaleBytes;
        for (int64_t head = 0; head < pages->kv_heads; head++) {
            for (const bool is_value : {false, true}) {
                const char* const from = (is_value ? v + t * v_stride : k + t * k_stride) + head * row;
                const int64_t at = head * head_bytes + is_value * value_at;
                if (pages->is_int8)
                    quantize(from, dim, page + at + offset * to_row, scales + at);
                else
                    std::memcpy(page + at + offset * to_row, from, (size_t)row);
            }
        }
    }
    return 0;
}

int64_t quire_copy_pages(const quire::Pages* pages, const int32_t* source, const int32_t* target, int64_t count,
                         char* message, int64_t size) {
    if (outside(source, count, pages->num_blocks, "source", message, size) ||
        outside(target, count, pages->num_blocks, "target", message, size))
        return 1;
    const int64_t bytes = 2 * pages->kv_heads * head_size(*pages);
    const int team = threads_for(pages->num_layers * count * bytes, pages->threads);
    // Each layer goes through the list in order, so that a chain of copies means what it says.
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t layer = 0; layer < pages->num_layers; layer++) {
        char* const base = pages->base + layer * pages->layer_stride;
        for (int64_t i = 0; i < count; i++)
            if (source[i] != target[i])
                std::memcpy(base + target[i] * pages->block_stride, base + source[i] * pages->block_stride,
                            (size_t)bytes);
    }
    return 0;
}

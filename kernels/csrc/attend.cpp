// attend: checks the ids, plans, runs the items on threads, merges. Everything that picks a level is here.
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#include "exports.h"
#include "merge.h"
#include "plan.h"

namespace quire {

const Level* level_of(int64_t index) {
    switch (index) {
        case 0: return &level_plain;
#if defined(QUIRE_HAS_AVX2)
        case 1: return &level_avx2;
#endif
#if defined(QUIRE_HAS_AVX512)
        case 2: return &level_avx512;
#endif
        default: return nullptr;
    }
}

// Kept between calls: its pages stay mapped and its cache lines warm.
char* thread_scratch(size_t bytes) {
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<char, Free> scratch;
    thread_local size_t size = 0;
    if (size < bytes) {
        scratch.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
        size = scratch ? bytes : 0;
    }
    return scratch.get();
}

static bool rises(const int32_t* values, int64_t count, int64_t end) {
    for (int64_t i = 0; i < count; i++)
        if (values[i] > values[i + 1]) return false;
    return values[0] == 0 && values[count] == end;
}

// The first fault of the ids in `call`, written to `message`.
bool faulty(const Call& call, char* message, size_t size) {
    if (!rises(call.query_start, call.num_rows, call.num_tokens))
        return std::snprintf(message, size, "query_start: must rise from 0 to %lld", (long long)call.num_tokens) > 0;
    if (!rises(call.page_start, call.num_rows, call.num_entries))
        return std::snprintf(message, size, "pages.start: must rise from 0 to %lld", (long long)call.num_entries) > 0;
    for (int64_t row = 0; row < call.num_rows; row++) {
        const int64_t first = call.first_position[row];
        if (first < 0 || first + (call.query_start[row + 1] - call.query_start[row]) > INT_MAX)
            return std::snprintf(message, size, "mask.first_position[%lld]: got %lld, positions must be from 0 to %d",
                                 (long long)row, (long long)first, INT_MAX) > 0;
    }
    for (int64_t i = 0; i < call.num_entries; i++) {
        const int64_t pool = call.page_pool ? call.page_pool[i] : 0, block = call.page_block[i];
        const int64_t position = call.page_position[i];
        if (pool < 0 || pool >= call.num_pools)
            return std::snprintf(message, size, "pages.pool[%lld]: got %lld, must be from 0 to %lld", (long long)i,
                                 (long long)pool, (long long)call.num_pools - 1) > 0;
        if (block < 0 || block >= call.pools[pool].num_blocks)
            return std::snprintf(message, size, "pages.block[%lld]: got %lld, must be from 0 to %lld", (long long)i,
                                 (long long)block, (long long)call.pools[pool].num_blocks - 1) > 0;
        if (position < 0 || position > INT_MAX - call.block_size)
            return std::snprintf(message, size, "pages.position[%lld]: got %lld, must be from 0 to %lld", (long long)i,
                                 (long long)position, (long long)(INT_MAX - call.block_size)) > 0;
    }
    return false;
}

namespace {

bool run(const Call& call, const Level& level, Plan& plan) {
    const Kernel direct = call.is_bf16 ? level.direct_bf16 : level.direct_f32;
    const Kernel tiled = call.is_bf16 ? level.tiled_bf16 : level.tiled_f32;
    const int64_t num_items = (int64_t)plan.items.size();
    const int threads = (int)std::max<int64_t>(1, std::min(call.threads, num_items));
    bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* const scratch = thread_scratch(level.scratch_bytes);
        if (!scratch) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_items; i++)
            if (scratch) (i < plan.num_tiled ? tiled : direct)(call, plan.items[i], scratch);
#pragma omp for schedule(static)
        for (size_t m = 0; m < plan.merges.size(); m++) {
            const Merge& merge = plan.merges[m];
            const int64_t heads = merge.num_tokens * call.q_heads, dim = call.head_dim;
            for (int64_t i = 0; i < heads; i++) {
                const int64_t from = merge.part * call.q_heads + i, to = merge.token * call.q_heads + i;
                merge_parts(plan.outs.data() + from * dim, heads * dim, plan.lses.data() + from, heads,
                            merge.num_parts, dim, call.out + to * dim, call.lse + to);
            }
        }
    }
    return !failed;
}

}  // namespace
}  // namespace quire

int64_t quire_levels() {
    int64_t levels = 1;
#if defined(QUIRE_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels |= 2;
#endif
#if defined(QUIRE_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"))
        levels |= 4;
#endif
    return levels;
}

int64_t quire_attend(const quire::Call* call, char* message, int64_t size) try {
    const quire::Level* level = quire::level_of(call->level);
    if (!level) {
        std::snprintf(message, (size_t)size, "level %lld is not built", (long long)call->level);
        return 1;
    }
    if (quire::faulty(*call, message, (size_t)size)) return 1;
    quire::Plan plan = quire::make_plan(*call);
    return quire::run(*call, *level, plan) ? 0 : 2;
} catch (const std::bad_alloc&) {
    return 2;
}

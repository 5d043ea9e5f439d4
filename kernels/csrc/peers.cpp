#include "peers.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>

#include "exports.h"
#include "relax.h"

namespace quire {
namespace {

constexpr auto kSpin = std::chrono::microseconds(5);  // ranks outnumber cores: who waits longer makes room
constexpr int64_t kFetchStep = 1024;                  // bytes between two looks
constexpr timespec kLookAgain{0, 100'000'000};        // in case that who should have woken us died before it did

}  // namespace

static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(SharedCount) == 64 && sizeof(Meeting) == 128);

void SharedCount::wake() {  // behind a change of the value; sleepers are counted before they look at it
    if (sleepers_.load()) syscall(SYS_futex, &value_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int64_t SharedCount::await(uint32_t count, Ahead ahead, bool pauses) {
    // The sign of the difference of two numbers of 31 bits, held in the upper bits of 32.
    const auto is_there = [count](uint32_t value) { return (int32_t)((value & ~1u) - (count << 1)) >= 0; };
    uint32_t value = value_.load(std::memory_order_acquire);
    for (int64_t at = 0; at < ahead.bytes && !(value & 1) && !is_there(value); at += kFetchStep) {
        for (int64_t line = at; line < std::min(at + kFetchStep, ahead.bytes); line += 64)
            __builtin_prefetch(ahead.at + line, 0, 2);
        value = value_.load(std::memory_order_acquire);
    }
    for (const auto until = std::chrono::steady_clock::now() + kSpin; !(value & 1) && !is_there(value);) {
        for (int i = 0; i < 16 && !(value & 1) && !is_there(value); i++) {
            relax();
            value = value_.load(std::memory_order_acquire);
        }
        if (std::chrono::steady_clock::now() >= until) break;
    }
    if (!(value & 1) && !is_there(value)) {
        bool is_up = false;  // it has slept long enough
        sleepers_.fetch_add(1);
        while (value = value_.load(), !(value & 1) && !is_there(value) && !is_up)
            is_up = syscall(SYS_futex, &value_, FUTEX_WAIT, value, &kLookAgain, nullptr, 0) && errno != EAGAIN && pauses;
        sleepers_.fetch_sub(1);
        if (!(value & 1) && !is_there(value)) return kPause;
    }
    return value & 1 ? kBroken : 0;
}

}  // namespace quire

int64_t quire_count_await(quire::SharedCount* count, uint32_t least, const quire::Ahead* ahead) {
    return count->await(least, ahead ? *ahead : quire::Ahead{});
}
void quire_count_advance(quire::SharedCount* count) { count->advance(); }
void quire_count_fail(quire::SharedCount* count) { count->fail(); }
int64_t quire_count_is_broken(const quire::SharedCount* count) { return count->is_broken(); }

int64_t quire_exchange(quire::Peers* peers, int64_t bytes) { return quire::exchange(*peers, bytes); }

int64_t quire_shared_exchange(void* context, int64_t, int64_t, const quire::Ahead* ahead) {
    const auto& member = *static_cast<const quire::Member*>(context);
    return member.meeting->passed.await(member.meeting->come(member.size), *ahead);
}

int64_t quire_best_of_ranks(quire::Peers* peers, int64_t rows, int32_t* tokens, float* values, float* totals) {
    const size_t column = (size_t)rows * 4;
    char* const own = peers->turn_regions()[peers->rank];
    std::memcpy(own, tokens, column);
    std::memcpy(own + column, values, column);
    std::memcpy(own + 2 * column, totals, column);
    if (quire::exchange(*peers, 3 * (int64_t)column)) return quire::kBroken;
    char* const* const regions = peers->last_regions();
    for (int64_t rank = 0; rank < peers->size; rank++) {
        const auto* const token = reinterpret_cast<const int32_t*>(regions[rank]);
        const auto* const value = reinterpret_cast<const float*>(regions[rank] + column);
        const auto* const total = reinterpret_cast<const float*>(regions[rank] + 2 * column);
        for (int64_t row = 0; row < rows; row++) {
            if (rank == 0 || value[row] > values[row]) tokens[row] = token[row], values[row] = value[row];
            totals[row] = rank == 0 ? total[row] : totals[row] + total[row];
        }
    }
    return 0;
}

#include "team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

namespace quire {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);

void Signal::raise() {
    value_.fetch_add(1);  // before the look at the sleepers, who are counted before they look at the value
    if (sleepers_.load()) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void Signal::wait(uint32_t passed) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            if (now() != passed) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < until);
    sleepers_.fetch_add(1);
    while (value_.load() == passed) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, passed, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
}

Team::Team(int64_t threads) {
    for (int64_t thread = 1; thread < threads; thread++) others_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
    function_ = nullptr;
    started_.raise();
    for (auto& other : others_) other.join();
}

void Team::barrier() {
    if (others_.empty()) return;
    const uint32_t passed = passed_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.raise();
    } else {
        passed_.wait(passed);
    }
}

void Team::start(int64_t phases, Function function, void* context) {
    const int64_t counters = phases * size();
    if (counters > num_counters_) {
        counters_.reset(new Counter[counters]);
        num_counters_ = counters;
    }
    for (int64_t counter = 0; counter < counters; counter++) counters_[counter].reset();
    function_ = function;
    context_ = context;
    if (!others_.empty()) started_.raise();
    function(context, 0);
    barrier();
}

void Team::serve(int64_t thread) {
    for (uint32_t seen = 0;; seen++) {
        started_.wait(seen);
        if (!function_) return;
        function_(context_, thread);
        barrier();
    }
}

}  // namespace quire

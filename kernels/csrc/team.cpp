#include "team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

#include "relax.h"

namespace quire {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr uint32_t kThreadBits = 16, kThreads = (1u << kThreadBits) - 1;

}  // namespace

static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);

void Signal::raise(uint32_t to) {
    value_.store(to);  // before the look at the sleepers, who are counted before they look at the value
    if (sleepers_.load()) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

std::chrono::nanoseconds Signal::wait(uint32_t passed) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            if (now() != passed) return {};
            relax();
        }
    } while (std::chrono::steady_clock::now() < until);
    sleepers_.fetch_add(1);
    while (value_.load() == passed) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, passed, nullptr, nullptr, 0);
    sleepers_.fetch_sub(1);
    return std::chrono::steady_clock::now() - until;
}

Team::Team(int64_t threads, Patience patience) : patience_(patience), active_(threads) {
    for (int64_t thread = 1; thread < threads; thread++) others_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
    started_.raise(((started_.now() >> kThreadBits) + 1) << kThreadBits);
    for (auto& other : others_) other.join();
}

void Team::barrier(bool is_behind_a_wait) {
    const int64_t threads = size();  // not read behind the last barrier of a run
    if (threads == 1) return;
    const uint32_t passed = passed_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.raise(passed + 1);
    } else if (const auto slept = passed_.wait(passed); slept.count() > 0 && !is_behind_a_wait) {
        slept_.fetch_add(slept.count() / (threads - 1), std::memory_order_relaxed);
    }
}

// Whether the run was held up by threads that had no core, and what follows from it for the next one.
void Team::judge(Clock::time_point began) {
    const auto now = Clock::now();
    const auto worked = now - began - waited_;
    if (size() > 1 && (double)slept_.load() > patience_.part * (double)std::chrono::nanoseconds(worked).count()) {
        good_runs_ = 0;
        if (++bad_runs_ < patience_.runs) return;
        bad_runs_ = 0;
        active_--;
        pause_ = std::min(std::max(2 * pause_, patience_.shortest_pause), patience_.longest_pause);
        try_again_ = now + pause_;
        return;
    }
    bad_runs_ = 0;
    if (size() == capacity()) {
        if (pause_.count() && ++good_runs_ > 8 * patience_.runs) pause_ = {}, good_runs_ = 0;
    } else if (now >= try_again_) {
        active_++;
        try_again_ = now + pause_;
    }
}

void Team::start(int64_t phases, Function function, void* context) {
    const int64_t counters = phases * size();
    if (counters > num_counters_) {
        counters_.reset(new Counter[counters]);
        num_counters_ = counters;
    }
    for (int64_t counter = 0; counter < counters; counter++) counters_[counter].reset();
    if (others_.empty()) return function(context, 0);
    function_ = function;
    context_ = context;
    slept_.store(0);
    waited_ = {};
    const auto began = Clock::now();
    started_.raise(((started_.now() >> kThreadBits) + 1) << kThreadBits | (uint32_t)size());
    function(context, 0);
    barrier();
    judge(began);
}

void Team::serve(int64_t thread) {
    for (uint32_t seen = 0;;) {
        started_.wait(seen);
        seen = started_.now();
        const int64_t threads = seen & kThreads;
        if (threads == 0) return;
        if (thread >= threads) continue;  // not of this run, which may even be over
        function_(context_, thread);
        barrier();
    }
}

}  // namespace quire

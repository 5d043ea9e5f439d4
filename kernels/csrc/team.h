// A team of threads that carries out one function together, with barriers inside it.
//
// OpenMP's barriers either spin (and collapse where a neighbour holds a core) or sleep at once (and cost 50 us each).
// Here a wait spins for some microseconds and then sleeps on a futex; work is claimed piece by piece, so that a thread
// whose core is taken away delays the others by its last piece only.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace quire {

// A number that threads wait on.
class alignas(64) Signal {
public:
    uint32_t now() const { return value_.load(std::memory_order_acquire); }
    void raise();                // adds one and wakes whoever sleeps
    void wait(uint32_t passed);  // until the number is no longer `passed`

private:
    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

// Pieces 0 .. total of one phase of work, given out in order.
class alignas(64) Counter {
public:
    void reset() { next_.store(0, std::memory_order_relaxed); }

    // The next piece, or `total` where none is left.
    int64_t claim(int64_t total) {
        if (next_.load(std::memory_order_relaxed) >= total) return total;
        const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
        return piece < total ? piece : total;
    }

    // Several pieces, fewer the nearer the end, so that all threads end at about the same time.
    bool claim_some(int64_t total, int64_t threads, int64_t& begin, int64_t& end) {
        begin = next_.load(std::memory_order_relaxed);
        do {
            if (begin >= total) return false;
            const int64_t some = (total - begin) / (2 * threads);
            end = begin + (threads == 1 ? total - begin : some < 1 ? 1 : some);
        } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

private:
    std::atomic<int64_t> next_{0};
};

class Team {
public:
    // `threads` counts the caller of `run`, which works too.
    explicit Team(int64_t threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int64_t size() const { return (int64_t)others_.size() + 1; }

    // Calls body(thread) on every thread of the team; 0 is the caller. `phases` counters are fresh. Not reentrant.
    template <class Body>
    void run(int64_t phases, Body& body) {
        start(phases, [](void* context, int64_t thread) { (*static_cast<Body*>(context))(thread); }, &body);
    }

    void barrier();
    Counter& counter(int64_t phase) { return counters_[phase]; }

private:
    using Function = void (*)(void*, int64_t);
    void start(int64_t phases, Function function, void* context);
    void serve(int64_t thread);

    std::vector<std::thread> others_;
    std::unique_ptr<Counter[]> counters_;
    int64_t num_counters_ = 0;
    Function function_ = nullptr;  // null: the end
    void* context_ = nullptr;
    Signal started_, passed_;
    alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace quire

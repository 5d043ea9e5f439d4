// A team of threads that carries out one function together, with barriers inside it.
//
// OpenMP's barriers either spin (and collapse where a neighbour holds a core) or sleep at once (and cost 50 us each).
// Here a wait spins for some microseconds and then sleeps on a futex; work is claimed piece by piece, so that a thread
// whose core is taken away delays the others by its last piece only. That piece may still cost a time slice of the
// scheduler's, so a team that waits too long again and again goes on with a thread less, and tries again later.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace quire {

// A number that threads wait on.
class alignas(64) Signal {
public:
    uint32_t now() const { return value_.load(std::memory_order_acquire); }
    void raise(uint32_t to);                          // wakes whoever sleeps
    std::chrono::nanoseconds wait(uint32_t passed);  // until the number is no longer `passed`; how long it slept

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
        if ((int64_t)next_.load(std::memory_order_relaxed) >= total) return total;
        const int64_t piece = (int64_t)next_.fetch_add(1, std::memory_order_relaxed);
        return piece < total ? piece : total;
    }

    // Of a counter whose pieces are one thread's own: that thread takes them from the front, others from the back.
    int64_t claim_own(int64_t total) { return claim_end(total, 1, [](uint64_t taken, int64_t) { return taken & kLow; }); }
    int64_t steal(int64_t total) {
        return claim_end(total, kLow + 1, [](uint64_t taken, int64_t all) { return all - 1 - (int64_t)(taken >> 32); });
    }

private:
    static constexpr uint64_t kLow = 0xffffffff;

    template <class Piece>
    int64_t claim_end(int64_t total, uint64_t one, Piece piece) {
        uint64_t taken = next_.load(std::memory_order_relaxed);
        do {
            if ((int64_t)((taken & kLow) + (taken >> 32)) >= total) return -1;
        } while (!next_.compare_exchange_weak(taken, taken + one, std::memory_order_relaxed));
        return (int64_t)piece(taken, total);
    }

    std::atomic<uint64_t> next_{0};  // of own pieces: taken from the front, and 32 bits higher from the back
};

// When a team goes on with a thread less: after so many runs one after the other of which it slept so large a part in
// barriers. It tries that thread again after a pause, which doubles each time that this fails.
struct Patience {
    double part = 0.25;
    int64_t runs = 3;
    std::chrono::nanoseconds shortest_pause = std::chrono::milliseconds(250);
    std::chrono::nanoseconds longest_pause = std::chrono::seconds(4);
};

class Team {
public:
    // `threads` counts the caller of `run`, which works too.
    explicit Team(int64_t threads, Patience patience = {});
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Threads of the next run, and of the one at hand; changes only when a run ends.
    int64_t size() const { return active_; }
    int64_t capacity() const { return (int64_t)others_.size() + 1; }

    // Calls body(thread) on every thread of the team; 0 is the caller. `phases` phases have fresh counters. Not
    // reentrant.
    template <class Body>
    void run(int64_t phases, Body& body) {
        start(phases, [](void* context, int64_t thread) { (*static_cast<Body*>(context))(thread); }, &body);
    }

    // Behind a phase in which one thread waited for other processes, sleeping is no sign of a missing core.
    void barrier(bool is_behind_a_wait = false);

    // Thread 0 waited so long for other processes in this run.
    void waited(std::chrono::nanoseconds time) { waited_ += time; }

    // The pieces of a phase that any thread takes next.
    Counter& counter(int64_t phase) { return counters_[phase * size()]; }

    // Calls body(piece) for pieces 0 .. total of a phase: each thread first its own share, in order and next to each
    // other, so that what it reads streams; then what others have left, from their ends.
    template <class Body>
    void share(int64_t phase, int64_t thread, int64_t total, Body body) {
        const int64_t threads = size();
        Counter* const counters = &counters_[phase * threads];
        const int64_t begin = total * thread / threads, count = total * (thread + 1) / threads - begin;
        for (int64_t piece; (piece = counters[thread].claim_own(count)) >= 0;) body(begin + piece);
        for (int64_t other = thread + 1; other < thread + threads; other++) {
            const int64_t from = other % threads;
            const int64_t first = total * from / threads, most = total * (from + 1) / threads - first;
            for (int64_t piece; (piece = counters[from].steal(most)) >= 0;) body(first + piece);
        }
    }

private:
    using Function = void (*)(void*, int64_t);
    using Clock = std::chrono::steady_clock;
    void start(int64_t phases, Function function, void* context);
    void serve(int64_t thread);
    void judge(Clock::time_point began);

    std::vector<std::thread> others_;
    std::unique_ptr<Counter[]> counters_;
    int64_t num_counters_ = 0;
    Function function_ = nullptr;
    void* context_ = nullptr;
    Signal started_;  // number of the run, and in the low 16 bits its threads; none: the end
    Signal passed_;   // barriers
    const Patience patience_;
    int64_t active_;
    int64_t bad_runs_ = 0, good_runs_ = 0;
    std::chrono::nanoseconds pause_{0};
    Clock::time_point try_again_{};
    std::atomic<int64_t> slept_{0};  // nanoseconds in barriers of this run, of the thread that slept longest at each
    std::chrono::nanoseconds waited_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
};

}  // namespace quire

// Ranks of one shard that meet: the exchange, the one collective of a step on CPUs, and what waits between processes.
//
// Every rank writes bytes into its own region, all meet, everybody reads all regions. Two regions a rank, used in turn,
// make one meeting enough: who writes into one for the next turn but one has met everybody who read it since.
#pragma once
#include <atomic>
#include <cstdint>

namespace quire {

constexpr int64_t kBroken = 3;  // the result of a call whose group is broken
constexpr int64_t kPause = 6;   // of one that may go on, once its caller has seen to what else there is
constexpr int64_t kBestBytes = 12;  // of a row in quire_best_of_ranks: token, value, total

// Memory that a rank reads behind an exchange or a message, and may ask for while it waits: of two ranks that read
// weights now one is late and now the other, and else each would lose what either loses.
struct Ahead {
    const char* at = nullptr;
    int64_t bytes = 0;
};

struct Meeting;

// A group of ranks as one of them sees it; mirrored by peers.py. `exchange` returns 0 when all ranks are there and the
// first `bytes` of all regions of the parity can be read, which stays so until the next exchange begins.
//
// A long turn can be done in bands, each of a part of the bytes, where all ranks cut them alike: a rank comes to a band's
// meeting when its part is there, and goes on; it waits there when it reads the others' parts. It has waited at all
// bands of a turn before its next one begins, or at each band of the turn before it comes to the same band of the next.
struct Peers {
    int64_t rank, size;
    char* const* regions;  // [2][size]
    int64_t capacity;      // bytes of a region
    int64_t turn;          // exchanges so far; the parity of the next one is its lowest bit
    int64_t reads_ahead;   // this rank's cores are its own: while it waits it keeps nobody from them
    void* context;
    int64_t (*exchange)(void* context, int64_t parity, int64_t bytes, const Ahead* ahead);
    Meeting* bands;
    int64_t num_bands;  // 0: none
    int64_t given;      // bytes, in all turns so far

    // The regions of the turn to come, or of the one behind it; and those to read of the last one.
    char* const* turn_regions(int64_t ahead = 0) const { return regions + (turn + ahead) % 2 * size; }
    char* const* last_regions() const { return turn_regions(1); }
};

// Runs the exchange of the turn to come.
inline int64_t exchange(Peers& peers, int64_t bytes, Ahead ahead = {}) {
    peers.given += bytes;
    return peers.exchange(peers.context, peers.turn++ % 2, bytes, &ahead) ? kBroken : 0;
}

// A number in shared memory that processes wait on: a count in steps of 2, and in the lowest bit whether it is broken,
// so that one look tells both. Zeroed memory is a fresh one.
class alignas(64) SharedCount {
public:
    uint32_t now() const { return value_.load(std::memory_order_acquire) >> 1; }
    bool is_broken() const { return value_.load(std::memory_order_acquire) & 1; }

    void advance() { value_.fetch_add(2), wake(); }
    void fail() { value_.fetch_or(1), wake(); }

    // Until the count has come to `count` (of 31 bits, in a circle) or is broken: 0, or kBroken. One that `pauses` may
    // return kPause before, at the latest 0.1 s after it fell asleep, and at once when a signal comes.
    int64_t await(uint32_t count, Ahead ahead = {}, bool pauses = false);

private:
    void wake();

    std::atomic<uint32_t> value_;
    std::atomic<uint32_t> sleepers_;  // a process that died asleep stays counted, and costs a call at each wake
};

// Where ranks of one host meet, in shared memory.
struct Meeting {
    SharedCount passed;
    alignas(64) std::atomic<uint32_t> arrived;

    // Comes, the first of `size` ranks or the last; what to wait for at `passed`, before coming again.
    uint32_t come(int64_t size) {
        const uint32_t all_there = passed.now() + 1;  // not before this one has come
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)size) {
            arrived.store(0, std::memory_order_relaxed);
            passed.advance();
        }
        return all_there;
    }
};

// The tag of hidden rows from stage to stage: their plan, and how many pieces of the border are in the sums. Mirrored by
// worker/runner.py.
constexpr int64_t kBorderPieces = 64;

// Messages from one producer to one consumer through slots in shared memory, as one of the two sees them; mirrored by
// peers.py. A slot is a line (tag, bytes) and the message.
struct Ring {
    SharedCount *published, *released;
    char* slots;
    int64_t stride;     // bytes from slot to slot
    int64_t num_slots, capacity;
    int64_t sent, done;  // messages, by this producer and by this consumer
    Ahead ahead;         // what the consumer reads behind a message, if anything

    // The next message to fill, once there is room for it; null where the ring is broken.
    char* slot() {
        return released->await((uint32_t)(sent + 1 - num_slots)) ? nullptr : at(sent) + kLine;
    }
    void publish(int64_t tag, int64_t bytes) {
        auto* const head = reinterpret_cast<int64_t*>(at(sent++));
        head[0] = tag, head[1] = bytes;
        published->advance();
    }
    // The oldest message that is not released, once it is there: its line; null where the ring is broken.
    char* receive() {
        return published->await((uint32_t)(done + 1), ahead) ? nullptr : at(done);
    }
    void release() { done++, released->advance(); }
    // Until `receive` would not wait: 0, kBroken or kPause.
    int64_t look_out() { return published->await((uint32_t)(done + 1), {}, true); }
    // For the producer: whether the consumer waits for the next message.
    bool is_awaited() const { return released->now() == ((uint32_t)sent & 0x7fffffffu); }

    static constexpr int64_t kLine = 64;

private:
    char* at(int64_t message) const { return slots + message % num_slots * stride; }
};

// The context of `shared_exchange`; mirrored by peers.py.
struct Member {
    Meeting* meeting;
    int64_t size;
};

}  // namespace quire

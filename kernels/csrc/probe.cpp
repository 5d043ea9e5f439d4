// The ceiling that benchmarks/attention.py measures against: reading memory and doing nothing with it.
#include <cstring>

#include "exports.h"

uint64_t quire_read(const char* data, int64_t bytes) {
    typedef uint64_t Word __attribute__((vector_size(16)));
    constexpr int64_t kStreams = 4, kRun = 64 * 1024;  // as many address streams as a core's prefetchers follow
    Word total[kStreams][4] = {};
    for (int64_t at = 0; at + kStreams * kRun <= bytes; at += kStreams * kRun)
        for (int64_t i = 0; i < kRun; i += 64)
            for (int s = 0; s < kStreams; s++)
                for (int w = 0; w < 4; w++) {
                    Word word;
                    std::memcpy(&word, data + at + s * kRun + i + w * 16, sizeof word);
                    total[s][w] ^= word;
                }
    uint64_t all = 0;
    for (auto& stream : total)
        for (Word& word : stream) all ^= word[0] ^ word[1];
    return all;
}

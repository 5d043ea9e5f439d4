// The digest of all plans up to one, as worker/ranks.py's digest_with has it: BLAKE2b (RFC 7693) of 8 bytes over the plan,
// under a key of 8, which is the digest of all before it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace quire {

constexpr int64_t kDigestBytes = 8;

class Blake2b {
public:
    // The first 8 bytes are all there is of the digest.
    static uint64_t keyed(uint64_t key, const char* data, int64_t bytes) {
        Blake2b state;
        uint64_t block[16] = {key};
        state.compress(block, kBlock, bytes == 0);
        for (int64_t at = 0; at < bytes; at += kBlock) {
            const int64_t count = std::min(kBlock, bytes - at);
            std::memset(block, 0, sizeof block);
            std::memcpy(block, data + at, (size_t)count);
            state.compress(block, kBlock + at + count, at + count == bytes);
        }
        return state.h_[0];
    }

private:
    static constexpr int64_t kBlock = 128;
    static constexpr uint64_t kIv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                        0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static constexpr uint8_t kSigma[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

    Blake2b() {
        std::copy_n(kIv, 8, h_);
        h_[0] ^= 0x01010000 ^ (uint64_t)(kDigestBytes << 8) ^ (uint64_t)kDigestBytes;  // lengths of key and digest
    }

    void compress(const uint64_t (&block)[16], int64_t so_far, bool is_last) {
        uint64_t v[16];
        std::copy_n(h_, 8, v), std::copy_n(kIv, 8, v + 8);
        v[12] ^= (uint64_t)so_far;
        if (is_last) v[14] = ~v[14];
        const auto turn = [](uint64_t x, int by) { return x >> by | x << (64 - by); };
        const auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
            v[a] += v[b] + x, v[d] = turn(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turn(v[b] ^ v[c], 24);
            v[a] += v[b] + y, v[d] = turn(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turn(v[b] ^ v[c], 63);
        };
        for (int round = 0; round < 12; round++) {
            const uint8_t(&s)[16] = kSigma[round % 10];
            for (int i = 0; i < 4; i++) mix(i, 4 + i, 8 + i, 12 + i, block[s[2 * i]], block[s[2 * i + 1]]);
            for (int i = 0; i < 4; i++)
                mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, block[s[8 + 2 * i]], block[s[9 + 2 * i]]);
        }
        for (int i = 0; i < 8; i++) h_[i] ^= v[i] ^ v[i + 8];
    }

    uint64_t h_[8];
};

}  // namespace quire

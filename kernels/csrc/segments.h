// Walks an item's page entries and yields the runs of keys that some query of the item sees. What no query sees (the
// unwritten tail of a page above all) is thereby never read: it may hold NaN, and 0 * NaN is not 0.
#pragma once
#include "vec.h"

namespace quire::QUIRE_LEVEL {

struct Segment {
    const char* k;     // the run's first key of kv head 0
    int64_t position;  // of that key
    int64_t offset;    // of that key in its page
    int64_t count;
};

class Segments {
public:
    Segments(const Call& call, const Item& item)
        : call_(call),
          entry_(item.entry),
          end_(item.entry_end),
          first_query_(item.position),
          last_query_(item.position + item.num_tokens - 1),
          row_bytes_(call.head_dim * (call.is_int8 ? 1 : call.is_bf16 ? 2 : 4)) {}

    // The next run, of at most `room` keys, and not beyond a position that is a multiple of `cut`; false at the end.
    bool next(Segment& segment, int64_t room, int64_t cut = INT64_MAX) {
        while (begin_ >= stop_) {
            if (!next_run()) return false;
        }
        segment.position = begin_;
        segment.count = lesser(lesser(room, stop_ - begin_), cut - begin_ % cut);
        segment.offset = begin_ - page_position_;
        segment.k = page_ + segment.offset * row_bytes_;
        begin_ += segment.count;
        return true;
    }

private:
    // Keys [position, end) of an entry split by the mask into [position, sinks) and (first_query - window, last_query].
    bool next_run() {
        if (after_sinks_) {
            after_sinks_ = false;
            begin_ = greater(begin_, first_query_ - call_.window + 1);
            stop_ = page_stop_;
            return true;
        }
        if (entry_ == end_) return false;
        const Pool& pool = call_.pools[call_.page_pool ? call_.page_pool[entry_] : 0];
        page_ = pool.base + call_.page_block[entry_] * pool.block_stride;
        page_position_ = call_.page_position[entry_++];
        page_stop_ = lesser(page_position_ + call_.block_size, last_query_ + 1);
        begin_ = page_position_;
        stop_ = page_stop_;
        if (call_.window && first_query_ - call_.window + 1 > begin_) {
            stop_ = lesser(page_stop_, greater(begin_, call_.sinks));
            after_sinks_ = stop_ < page_stop_;
            if (stop_ <= begin_) return after_sinks_ ? next_run() : true;
        }
        return true;
    }

    const Call& call_;
    int64_t entry_, end_, first_query_, last_query_, row_bytes_;
    const char* page_ = nullptr;
    int64_t page_position_ = 0, page_stop_ = 0, begin_ = 0, stop_ = 0;
    bool after_sinks_ = false;
};

// Whether the query at position i sees the key at position j.
QUIRE_INLINE bool sees(const Call& call, int64_t i, int64_t j) {
    return j <= i && (call.window == 0 || i - j < call.window || j < call.sinks);
}

}  // namespace quire::QUIRE_LEVEL

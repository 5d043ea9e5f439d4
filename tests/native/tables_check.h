// One random block table and rows of sequences in it, in arrays of just their sizes; each check says whether the
// native calls agree with the arithmetic that stands here, token by token and page by page.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "../../kernels/csrc/exports.h"

namespace quire {

class TablesCheck {
   public:
    explicit TablesCheck(std::mt19937& draw) : draw_(draw) {
        for (auto& block : table_) block = group_ >= 0 && any(2) ? -1 : (int32_t)any(100);
        for (int64_t i = 0; i < num_rows_; i++) {
            const int64_t end = any(blocks_ * size_ + 1), begin = any(end + 1);
            slot_of_row_[i] = (int32_t)any(slots_), first_[i] = (int32_t)begin;
            query_start_[i + 1] = (int32_t)(query_start_[i] + end - begin);
        }
        num_tokens_ = query_start_[num_rows_];
        ids_ = ints(num_tokens_);
        for (int64_t t = 0; t < num_tokens_; t++) ids_[t] = (int32_t)any(1000);
        rows_ = {slot_of_row_.get(), query_start_.get(), first_.get(), ids_.get(), num_rows_, num_tokens_};
    }

    bool rows_are_right() {
        const auto tokens = longs(num_tokens_), positions = longs(num_tokens_), places = longs(num_tokens_);
        const auto starts = ints(num_rows_ + 1), firsts = ints(num_rows_);
        bool same = !quire_tables_rows(&tables_, &rows_, tokens.get(), positions.get(), places.get(), starts.get(),
                                       firsts.get());
        same &= starts[0] == 0;
        for (int64_t i = 0; i < num_rows_; i++) {
            same &= starts[i + 1] == query_start_[i + 1] && firsts[i] == first_[i];
            for (int64_t t = query_start_[i]; t < query_start_[i + 1]; t++) {
                const int64_t position = first_[i] + t - query_start_[i];
                const int64_t block = table_[slot_of_row_[i] * blocks_ + position / size_];
                same &= tokens[t] == ids_[t] && positions[t] == position;
                same &= places[t] == (block < 0 ? -1 : block * size_ + position % size_);
            }
        }
        return same;
    }

    bool pages_are_right() {
        bool same = true;
        for (const int64_t window : {(int64_t)0, 1 + any(9), (int64_t)1 << 40}) same &= pages_within(window);
        return same;
    }

    bool misfits_are_refused() {
        if (num_rows_ == 0) return true;
        const int64_t row = any(num_rows_);
        bool refused = true;
        for (const int64_t beyond : {(int64_t)-1, slots_, kLowest, kHighest})
            refused &= is_refused(slot_of_row_[row], beyond);
        for (const int64_t beyond : {(int64_t)-1, blocks_ * size_ + 1, kLowest, kHighest})
            refused &= is_refused(first_[row], beyond);
        for (const int64_t beyond : {(int64_t)-1, num_tokens_ + 1, kLowest, kHighest})
            refused &= is_refused(query_start_[any(num_rows_ + 1)], beyond);
        return refused;
    }

    // The table has two changed entries after it.
    bool changes_are_right() {
        std::vector<int32_t> slot{0, (int32_t)slots_ - 1}, index{(int32_t)blocks_ - 1, 0}, to{7, 8}, groups{1, 1};
        const auto fails = [&](const int32_t* of) {
            return quire_tables_change(&tables_, slot.data(), index.data(), to.data(), of, 2) == 1;
        };
        bool same = !fails(group_ < 0 ? nullptr : groups.data());
        // the later one, where both are of one entry
        same &= table_[(slots_ - 1) * blocks_] == (group_ == 0 ? -1 : 8);
        same &= table_[blocks_ - 1] == (group_ == 0 ? -1 : blocks_ * slots_ == 1 ? 8 : 7);
        const std::vector<int32_t> before = table_;
        for (int32_t* value : {&slot[1], &index[1]})
            for (const int64_t beyond : {(int64_t)-1, value == &slot[1] ? slots_ : blocks_, kLowest, kHighest}) {
                const int32_t kept = std::exchange(*value, (int32_t)beyond);
                same &= fails(nullptr);
                *value = kept;
            }
        return same && table_ == before;
    }

   private:
    static constexpr int64_t kLowest = INT32_MIN, kHighest = INT32_MAX;

    // exact sizes on the heap, so that a sanitizer sees what goes beyond
    static std::unique_ptr<int32_t[]> ints(int64_t count) { return std::unique_ptr<int32_t[]>(new int32_t[count]()); }
    static std::unique_ptr<int64_t[]> longs(int64_t count) { return std::unique_ptr<int64_t[]>(new int64_t[count]()); }

    int64_t any(int64_t below) { return (int64_t)(draw_() % (uint32_t)below); }

    bool pages_within(int64_t window) {
        const auto start = ints(num_rows_ + 1);
        const int64_t count = quire_tables_starts(&tables_, &rows_, window, start.get());
        const auto block = ints(count), position = ints(count);
        quire_tables_pages(&tables_, &rows_, window, block.get(), position.get());
        bool same = true;
        int64_t entry = 0;
        for (int64_t i = 0; i < num_rows_; i++) {
            const int64_t end = first_[i] + query_start_[i + 1] - query_start_[i];
            same &= start[i] == entry;
            for (int64_t page = 0; page * size_ < end; page++) {
                const int32_t there = table_[slot_of_row_[i] * blocks_ + page];
                if (there < 0 || (window && (page + 1) * size_ <= first_[i] - window + 1)) continue;
                same &= entry < count && block[entry] == there && position[entry] == page * size_;
                entry++;
            }
        }
        return same && start[num_rows_] == entry && entry == count;
    }

    bool is_refused(int32_t& value, int64_t to) {
        const auto tokens = longs(num_tokens_), positions = longs(num_tokens_), places = longs(num_tokens_);
        const auto starts = ints(num_rows_ + 1), firsts = ints(num_rows_);
        const int32_t before = std::exchange(value, (int32_t)to);
        const bool refused = quire_tables_rows(&tables_, &rows_, tokens.get(), positions.get(), places.get(),
                                               starts.get(), firsts.get()) == 1;
        value = before;
        return refused;
    }

    std::mt19937& draw_;
    const int64_t slots_ = 1 + any(5), blocks_ = 1 + any(7), size_ = 1 + any(5), num_rows_ = any(7);
    const int64_t group_ = any(3) - 1;
    std::vector<int32_t> table_ = std::vector<int32_t>(slots_ * blocks_);
    std::unique_ptr<int32_t[]> slot_of_row_ = ints(num_rows_), query_start_ = ints(num_rows_ + 1);
    std::unique_ptr<int32_t[]> first_ = ints(num_rows_), ids_;
    int64_t num_tokens_ = 0;
    const Tables tables_{table_.data(), slots_, blocks_, size_, group_};
    Rows rows_{};
};

}  // namespace quire

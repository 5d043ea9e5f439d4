#include "plan.h"

#include <algorithm>

namespace quire {
namespace {

constexpr int64_t kDirectKeys = 512;   // fewest keys of a part of a streamed row
constexpr int64_t kDirectParts = 64;   // most parts, which bounds the memory of partial results
constexpr int64_t kTiledKeys = 4096;   // the same for tiled rows, of which only short ones are cut
constexpr int64_t kTiledParts = 16;
constexpr int64_t kTiledCutRows = 256;
constexpr int64_t kFixedKeys = 4096;   // of a part where every row is cut alike; a multiple of a tile and of a page

int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

class Planner {
public:
    explicit Planner(const Call& call) : call_(call), group_(call.q_heads / call.kv_heads) {}

    Plan make() {
        std::vector<int64_t> streamed;
        for (int64_t row = 0; row < call_.num_rows; row++) {
            const int64_t tokens = call_.query_start[row + 1] - call_.query_start[row];
            if (tokens * group_ >= kDirectRows || (call_.is_deterministic && tokens > 0))
                add_tiled(row, tokens);
            else if (tokens > 0)
                streamed.push_back(row);
        }
        plan_.num_tiled = (int64_t)plan_.items.size();
        int64_t parts = 0;
        for (int64_t row : streamed) parts += num_parts(row, kDirectKeys, kDirectParts);
        int64_t heads = std::min(kDirectHeads, call_.kv_heads);
        while (heads > 1 && parts * divide_up(call_.kv_heads, heads) < 2 * call_.threads) heads = divide_up(heads, 2);
        for (int64_t row : streamed) add_direct(row, heads);
        place_parts();
        return std::move(plan_);
    }

private:
    int64_t num_entries(int64_t row) const { return call_.page_start[row + 1] - call_.page_start[row]; }

    int64_t num_parts(int64_t row, int64_t keys, int64_t most) const {
        return std::clamp<int64_t>(divide_up(num_entries(row) * call_.block_size, keys), 1, most);
    }

    Item item_of(int64_t row) const {
        const int64_t token = call_.query_start[row];
        Item item{};
        item.token = token;
        item.num_tokens = call_.query_start[row + 1] - token;
        item.position = call_.first_position[row];
        item.num_heads = call_.kv_heads;
        item.entry = call_.page_start[row];
        item.entry_end = call_.page_start[row + 1];
        item.out = call_.out + token * call_.q_heads * call_.head_dim;
        item.lse = call_.lse + token * call_.q_heads;
        return item;
    }

    // Where each part of a row begins that is cut at multiples of kFixedKeys positions.
    std::vector<int64_t> fixed_cuts(int64_t row) const {
        std::vector<int64_t> cuts;
        for (int64_t entry = call_.page_start[row]; entry < call_.page_start[row + 1]; entry++)
            if (cuts.empty() || call_.page_position[entry] / kFixedKeys != call_.page_position[entry - 1] / kFixedKeys)
                cuts.push_back(entry);
        if (cuts.empty()) cuts.push_back(call_.page_start[row]);
        cuts.push_back(call_.page_start[row + 1]);
        return cuts;
    }

    // Calls body(item) once for each of `parts` cuts of the row's entries.
    template <class Body>
    void by_parts(int64_t row, int64_t parts, Body body) {
        const Item whole = item_of(row);
        const int64_t entries = num_entries(row);
        std::vector<int64_t> cuts;
        if (call_.is_deterministic) {
            cuts = fixed_cuts(row);
            parts = (int64_t)cuts.size() - 1;
        }
        if (parts > 1) plan_.merges.push_back({whole.token, whole.num_tokens, num_part_tokens_, parts});
        for (int64_t part = 0; part < parts; part++) {
            Item item = whole;
            item.entry = cuts.empty() ? whole.entry + entries * part / parts : cuts[part];
            item.entry_end = cuts.empty() ? whole.entry + entries * (part + 1) / parts : cuts[part + 1];
            part_token_ = parts > 1 ? num_part_tokens_ + part * whole.num_tokens : -1;
            body(item);
        }
        if (parts > 1) num_part_tokens_ += parts * whole.num_tokens;
    }

    void add(const Item& item, int64_t token_in_row) {
        plan_.items.push_back(item);
        part_tokens_.push_back(part_token_ < 0 ? -1 : part_token_ + token_in_row);
    }

    void add_tiled(int64_t row, int64_t tokens) {
        const int64_t per_item = std::max<int64_t>(1, kTileRows / group_);
        const int64_t parts = tokens * group_ <= kTiledCutRows ? num_parts(row, kTiledKeys, kTiledParts) : 1;
        by_parts(row, parts, [&](Item item) {
            const Item part = item;
            item.num_heads = 1;
            // The last tokens see most keys: longest first.
            for (int64_t tile = divide_up(tokens, per_item) - 1; tile >= 0; tile--) {
                const int64_t first = tile * per_item;
                item.num_tokens = std::min(per_item, tokens - first);
                item.token = part.token + first;
                item.position = part.position + first;
                item.out = part.out + first * call_.q_heads * call_.head_dim;
                item.lse = part.lse + first * call_.q_heads;
                for (item.head = 0; item.head < call_.kv_heads; item.head++) add(item, first);
            }
        });
    }

    void add_direct(int64_t row, int64_t heads) {
        by_parts(row, num_parts(row, kDirectKeys, kDirectParts), [&](Item item) {
            for (item.head = 0; item.head < call_.kv_heads; item.head += heads) {
                item.num_heads = std::min(heads, call_.kv_heads - item.head);
                add(item, 0);
            }
        });
    }

    void place_parts() {
        plan_.outs.resize(num_part_tokens_ * call_.q_heads * call_.head_dim);
        plan_.lses.resize(num_part_tokens_ * call_.q_heads);
        for (size_t i = 0; i < plan_.items.size(); i++) {
            if (part_tokens_[i] < 0) continue;
            plan_.items[i].out = plan_.outs.data() + part_tokens_[i] * call_.q_heads * call_.head_dim;
            plan_.items[i].lse = plan_.lses.data() + part_tokens_[i] * call_.q_heads;
        }
    }

    const Call& call_;
    const int64_t group_;
    Plan plan_;
    std::vector<int64_t> part_tokens_;  // per item, or -1
    int64_t num_part_tokens_ = 0, part_token_ = -1;
};

}  // namespace

Plan make_plan(const Call& call) { return Planner(call).make(); }

}  // namespace quire

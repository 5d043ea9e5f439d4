// Cuts one call of attend into items that threads take one by one.
#pragma once
#include <vector>

#include "call.h"

namespace quire {

// Parts of one row over disjoint keys, merged into the row's results afterwards.
struct Merge {
    int64_t token, num_tokens;  // in q
    int64_t part, num_parts;    // first slot of the partial results, in tokens of [q_heads] rows
};

struct Plan {
    std::vector<Item> items;  // tiled ones first, since they last longest
    int64_t num_tiled = 0;
    std::vector<Merge> merges;
    std::vector<float> outs, lses;  // partial results
};

// The cut depends on shapes alone, never on the number of threads, except that kv heads may be dealt out more finely:
// each row is summed in the same order on every machine of one level.
Plan make_plan(const Call& call);

}  // namespace quire

// A rank's block tables: a plan's changes of them, and what its rows are to the kernels.
#include <limits>

#include "exports.h"

namespace {

using quire::Rows;
using quire::Tables;

struct Row {
    const int32_t* blocks;
    int64_t token, num_tokens, first, num_pages;

    // The first query, at `first`, sees keys from first - window + 1 on; later ones see less of the past.
    int64_t first_page(int64_t window, int64_t block_size) const {
        return window > 0 && first >= window ? (first - window + 1) / block_size : 0;
    }
};

// Whether an entry is listed: where there is one group, all are, and the kernels refuse what is no block.
bool is_here(const Tables& tables, int64_t block) { return block >= 0 || tables.group < 0; }

// Of a row of rows that fit.
Row row_of(const Tables& tables, const Rows& rows, int64_t index) {
    const int64_t token = rows.query_start[index], num_tokens = rows.query_start[index + 1] - token;
    const int64_t first = rows.first_position[index];
    const int64_t num_pages = (first + num_tokens + tables.block_size - 1) / tables.block_size;
    return {tables.blocks + rows.slots[index] * tables.num_blocks, token, num_tokens, first, num_pages};
}

bool fit(const Tables& tables, const Rows& rows) {
    if (rows.query_start[0] != 0 || rows.query_start[rows.num_rows] != rows.num_tokens) return false;
    int64_t num_pages = 0;
    for (int64_t i = 0; i < rows.num_rows; i++) {
        if (rows.slots[i] < 0 || rows.slots[i] >= tables.num_slots || rows.first_position[i] < 0 ||
            rows.query_start[i + 1] < rows.query_start[i])
            return false;
        const Row row = row_of(tables, rows, i);
        if (row.num_pages > tables.num_blocks) return false;
        num_pages += row.num_pages;
    }
    return num_pages <= std::numeric_limits<int32_t>::max();
}

}  // namespace

int64_t quire_tables_change(const Tables* tables, const int32_t* slot, const int32_t* index, const int32_t* block,
                            const int32_t* group, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (slot[i] < 0 || slot[i] >= tables->num_slots || index[i] < 0 || index[i] >= tables->num_blocks) return 1;
    for (int64_t i = 0; i < count; i++)
        tables->blocks[slot[i] * tables->num_blocks + index[i]] = group && group[i] != tables->group ? -1 : block[i];
    return 0;
}

int64_t quire_tables_rows(const Tables* tables, const Rows* rows, int64_t* tokens, int64_t* positions, int64_t* slots,
                          int32_t* query_start, int32_t* first_position) {
    if (!fit(*tables, *rows)) return 1;
    const int64_t block_size = tables->block_size;
    query_start[0] = 0;
    for (int64_t i = 0; i < rows->num_rows; i++) {
        const Row row = row_of(*tables, *rows, i);
        query_start[i + 1] = rows->query_start[i + 1];
        first_position[i] = rows->first_position[i];
        int64_t page = row.first / block_size, offset = row.first % block_size;
        for (int64_t t = row.token; t < row.token + row.num_tokens; t++) {
            const int64_t block = row.blocks[page];
            tokens[t] = rows->tokens[t];
            positions[t] = row.first + t - row.token;
            slots[t] = is_here(*tables, block) ? block * block_size + offset : -1;
            if (++offset == block_size) offset = 0, page++;
        }
    }
    return 0;
}

int64_t quire_tables_starts(const Tables* tables, const Rows* rows, int64_t window, int32_t* start) {
    int32_t count = start[0] = 0;
    for (int64_t i = 0; i < rows->num_rows; i++) {
        const Row row = row_of(*tables, *rows, i);
        for (int64_t page = row.first_page(window, tables->block_size); page < row.num_pages; page++)
            count += is_here(*tables, row.blocks[page]);
        start[i + 1] = count;
    }
    return count;
}

void quire_tables_pages(const Tables* tables, const Rows* rows, int64_t window, int32_t* block, int32_t* position) {
    for (int64_t i = 0; i < rows->num_rows; i++) {
        const Row row = row_of(*tables, *rows, i);
        for (int64_t page = row.first_page(window, tables->block_size); page < row.num_pages; page++) {
            if (!is_here(*tables, row.blocks[page])) continue;
            *block++ = row.blocks[page];
            *position++ = (int32_t)(page * tables->block_size);
        }
    }
}

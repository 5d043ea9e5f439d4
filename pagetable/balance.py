"""Moving pages between the groups of a shard, so that none attends much more of a plan than the others.

Tables that grow are kept even by where their new pages go (pagetable/placement.py). What is left over when some end,
or are in other plans, is moved: a page goes from the group that attends most to one that attends less, out of a table
that has more pages in the first of the two, so that tables stay even in themselves. A move costs a copy between two
devices once, an uneven step costs as much again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pagetable.block_table import BlockTable
from pagetable.ids import BlockId, LogicalPageId, PlanNumber
from pagetable.placement import most_attended

MOST_MOVES = 64  # of a plan: what a step waits for is bounded
_REACH = 64  # pages from a table's end among which one to be moved is looked for; further ahead many are shared


@dataclass(frozen=True, slots=True)
class Move:
    """A page of a table goes to another group.

    Attributes:
        row: which of the tables.
        index: of the page in it.
        source, target: the groups.
        blocks: (from, to) in each column.
    """

    row: int
    index: int
    source: int
    target: int
    blocks: tuple[tuple[BlockId, BlockId], ...]


def even_out(tables: Sequence[BlockTable], after: PlanNumber) -> list[Move]:
    """Move pages until the tables together lie as `most_attended` says, or none can be moved; mutates them.

    Args:
        tables: of the rows of plan `after`, of one pool.
        after: the plan, which copies the pages before anything reads or writes them.
    """
    if not tables or tables[0].pool.num_groups == 1:
        return []
    attended = list(map(sum, zip(*(table.held for table in tables), strict=True)))
    most = most_attended(sum(attended), len(attended))
    moves: list[Move] = []
    while max(attended) > most and len(moves) < MOST_MOVES:
        move = _next_move(tables, attended, most, after)
        if move is None:
            break
        moves.append(move)
        attended[move.source] -= 1
        attended[move.target] += 1
    return moves


def _next_move(tables: Sequence[BlockTable], attended: Sequence[int], most: int, after: PlanNumber) -> Move | None:
    """From the group that attends most, or the next one beyond `most`, to the one that attends least and has room, out
    of the least even table."""
    pool, groups = tables[0].pool, sorted(range(len(attended)), key=attended.__getitem__)
    for source in sorted(groups, key=lambda group: -attended[group]):
        if attended[source] <= most:
            break
        for target in groups:
            if attended[target] + 1 >= attended[source]:
                break
            if not pool.has_room_in(target):
                continue
            gain = [table.held[source] - table.held[target] for table in tables]
            for row in sorted((row for row in range(len(tables)) if gain[row] > 0), key=lambda row: -gain[row]):
                table = tables[row]
                index = _movable(table, source)
                if index is None:
                    continue
                page = LogicalPageId(table.pages[index])
                before = [pool.block(page, column) for column in range(pool.num_columns)]
                table.move(index, target, after)
                blocks = tuple((old, pool.block(page, column)) for column, old in enumerate(before))
                return Move(row, index, source, target, blocks)
    return None


def _movable(table: BlockTable, group: int) -> int | None:
    """The last page of the table there that may be moved; None where none near its end may."""
    pool, pages = table.pool, table.pages
    for index in range(len(pages) - 1, max(-1, len(pages) - 1 - _REACH), -1):
        page = LogicalPageId(pages[index])
        if pool.group(page) == group and pool.may_move(page):
            return index
    return None

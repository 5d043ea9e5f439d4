"""Which group of a shard each new page of a table goes to.

The groups of a shard step together, so a step takes as long as the group that attends the most pages. A new page goes,
of the groups in which its table has at most one page more than where it has fewest, to the one that attends the fewest
pages per step; then to the one in which the table has fewest; then to the one with the most free blocks, then the
first. So what is left over of one table fills up another's, and yet every table is about even in itself, and with it
any choice of tables: those of one plan, and those that outlive the others.

Measured over random arrivals, forks and ends (tests/pure/test_placement.py): the table's fewest first leaves twice as
many steps beyond 5 % of the mean, as it can't make up for tables that ended; the fewest attended first leaves as many
as this, but tables that are alone later may lie in one group. No rule for new pages makes up for an end at once: what
is then beyond `most_attended` is moved (pagetable/balance.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from pagetable.errors import OutOfBlocks


def most_attended(num_pages: int, num_groups: int) -> int:
    """What a group may attend of a step's pages: from 16 pages a group on 5 % more than the mean, below one page more;
    always as many as whole pages must come to."""
    if num_pages < 16 * num_groups:
        return num_pages // num_groups + 1
    return max(21 * num_pages // (20 * num_groups), -(-num_pages // num_groups))


def spread(count: int, held: Sequence[int], attended: Sequence[int], room: Sequence[int]) -> list[int]:
    """The group of each of `count` new pages of one table, in their order.

    Args:
        held: pages of the table by group.
        attended: pages that a step attends by group, over all tables.
        room: pages that each group could take.

    Errors: OutOfBlocks where `room` is less than `count` in all.
    """
    if sum(room) < count:
        raise OutOfBlocks(f"{count} pages needed, the groups have room for {sum(room)}")
    mine, all_, left = list(held), list(attended), list(room)
    groups = []
    for _ in range(count):
        open_ = [group for group, pages in enumerate(left) if pages]
        most = min([mine[group] for group in open_]) + 1
        group = min([(all_[g], mine[g], -left[g], g) for g in open_ if mine[g] <= most])[3]
        groups.append(group)
        mine[group] += 1
        all_[group] += 1
        left[group] -= 1
    return groups

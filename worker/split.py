"""Cutting a row of costs into runs that are as equal as they can be. Standard library only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


def split_evenly(costs: Sequence[int], parts: int) -> tuple[range, ...]:
    """Cut a row of positive costs into `parts` runs of at least one whose largest sum is the least possible.

    Among the cuts that reach it each is put nearest to an even share of what follows, so that the rest is even too.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise ValueError(f"parts: got {parts}, must be from 1 to {count}")
    sums = [0, *accumulate(costs)]
    low, high = max(max(costs), -(-sums[-1] // parts)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _num_runs(sums, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    # earliest[i]: the first place where run i may begin so that runs i, i + 1, ... hold all that follows
    earliest = [0] * parts + [count]
    for run in range(parts - 1, 0, -1):
        earliest[run] = max(bisect_left(sums, sums[earliest[run + 1]] - low), run)
    runs, begin = [], 0
    for run in range(parts - 1):
        first = max(earliest[run + 1], begin + 1)
        last = min(bisect_right(sums, sums[begin] + low) - 1, count - (parts - run - 1))
        share = sums[begin] + (sums[-1] - sums[begin]) / (parts - run)
        at = bisect_left(sums, share)
        end = at if at <= count and sums[at] - share <= share - sums[at - 1] else at - 1
        runs.append(range(begin, min(max(end, first), last)))
        begin = runs[-1].stop
    return (*runs, range(begin, count))


def _num_runs(sums: Sequence[int], limit: int) -> int:
    """The fewest runs of sums at most `limit`, which no single cost exceeds."""
    runs, begin = 0, 0
    while begin < len(sums) - 1:
        begin = bisect_right(sums, sums[begin] + limit) - 1
        runs += 1
    return runs

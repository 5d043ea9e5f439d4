"""Rows of a ragged attention call dealt over a GPU's multiprocessors, on the host: numbers only, no device.

rows --> tiles: up to M (token, head of the group) pairs of one row
     --> items: a tile over a part of its row's pages, so that there is work for all multiprocessors
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MIN_TOKENS = 256  # of a part: less, and starting it costs more than it wins
WAVES = 4  # parts for each multiprocessor, so that the last ones to end are a small share
SMALL_TILE, LARGE_TILE = 16, 128  # pairs; tensor cores take 16 at least

Ints = npt.NDArray[np.int32]


class Shape(NamedTuple):
    """How a kernel works through one class of rows.

    Attributes:
        tile: (token, head) pairs of a program.
        keys: of one turn of its loop.
    """

    tile: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_of(lengths: Ints, group: int, tile: int, rows: Ints) -> tuple[Ints, Ints]:
    """(row, first pair) of each tile of some rows."""
    counts = -(-lengths[rows] * group // tile)
    row = np.repeat(rows, counts).astype(np.int32)
    first = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, (first * tile).astype(np.int32)


def entries_of(
    positions: Ints, start: int, end: int, first_query: Ints, last_query: Ints, size: int, window: int, sinks: int
) -> tuple[Ints, Ints]:
    """(first entry, entry behind the last) that queries of one row can see, for each of its tiles.

    Entries that are in order are cut to those; entries in any other order are all taken.
    """
    own = positions[start:end]
    begins, ends = np.full(len(last_query), start), np.full(len(last_query), end)
    if len(own) and bool((np.diff(own) >= 0).all()):
        ends = start + np.searchsorted(own, last_query, side="right")
        if window and not sinks:
            begins = start + np.searchsorted(own + size - 1, first_query - window, side="right")
    return np.minimum(begins, ends).astype(np.int32), ends.astype(np.int32)


def split(begins: Ints, ends: Ints, size: int, kv_heads: int, processors: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Cut tiles into items of about equal size: as many as keep all multiprocessors busy, none much below MIN_TOKENS.

    Returns:
        For each item its tile, first entry and the entry behind its last; and the number of items of each tile.
    """
    counts = ends - begins
    most = max(1, MIN_TOKENS // size, -(-int(counts.sum()) * kv_heads // (WAVES * processors)))
    parts = np.maximum(1, -(-counts // most))
    tile = np.repeat(np.arange(len(counts)), parts)
    index = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    # parts of a tile differ by one entry at most
    first = begins[tile] + index * counts[tile] // parts[tile]
    last = begins[tile] + (index + 1) * counts[tile] // parts[tile]
    return tile.astype(np.int32), first.astype(np.int32), last.astype(np.int32), parts.astype(np.int32)


def deal(
    rows: Ints,
    shape: Shape,
    query_start: Ints,
    entry_start: Ints,
    positions: Ints,
    first_position: Ints,
    group: int,
    kv_heads: int,
    size: int,
    window: int,
    sinks: int,
    processors: int,
) -> tuple[Ints, Ints, Ints, int]:
    """The tiles, items, merges and number of slots of some rows. See `triton_attention.Work`."""
    lengths = np.diff(query_start)
    row, first_pair = tiles_of(lengths, group, shape.tile, rows)
    num_pairs = lengths[row] * group
    first_query = first_position[row] + first_pair // group
    last_query = first_position[row] + (np.minimum(first_pair + shape.tile, num_pairs) - 1) // group
    begins, ends = entry_start[row].copy(), entry_start[row + 1].copy()
    if shape.tile > SMALL_TILE:  # a decode's entries are all seen
        bounds = np.flatnonzero(np.r_[True, row[1:] != row[:-1], True])
        for low, high in itertools.pairwise(bounds) if len(row) else ():
            own = slice(int(low), int(high))
            each = int(row[low])
            begins[own], ends[own] = entries_of(
                positions,
                int(entry_start[each]),
                int(entry_start[each + 1]),
                first_query[own],
                last_query[own],
                size,
                window,
                sinks,
            )
    tile, first, last, parts = split(begins, ends, size, kv_heads, processors)
    several = np.flatnonzero(parts > 1)
    slots = np.where(parts[tile] > 1, np.cumsum(parts[tile] > 1) - 1, -1)
    tiles = np.stack([first_pair, num_pairs, query_start[row], first_position[row]], 1)
    items = np.stack([tile, first, last, slots], 1)
    firsts = np.cumsum(parts[several]) - parts[several]
    merges = np.stack([several, firsts, parts[several]], 1)
    return tiles.astype(np.int32), items.astype(np.int32), merges.astype(np.int32), int(parts[several].sum())

"""TableMirror: a rank's copy of the block tables, and the arrays that a step's kernels take.

The leader's scheduler owns the tables; a plan carries their changes. What a step waits for is native code where that is
built (`kernels/tables.py`), and otherwise, as all the rest, whole-array arithmetic: an object or a Python loop per page
would cost more than the step. Whatever the native code refuses, the arithmetic does over, to say what is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from kernels.ops import Mask, PageList, has_native
from kernels.tables import NativeTables
from pagetable.errors import InvariantBroken
from worker.plan import Plan

Ints = npt.NDArray[np.int32]
_NONE: Ints = np.empty(0, np.int32)
_MAX_ENTRIES = 2**31 - 1  # of a page list, whose `start` is int32


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows as the model takes them: R rows, T tokens.

    Attributes:
        tokens, positions: int64 [T].
        slots: int64 [T], where each token's K and V go: block * block_size + offset; -1 is to another group.
        query_start: int32 [R+1].
        pages, masks: by sliding window (0 is none): what layers of that window attend.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    pages: dict[int, PageList]
    masks: dict[int, Mask]


@dataclass(frozen=True, slots=True)
class Moves:
    """Whole pages that go from one group's pool to another's: int32 [M] each.

    Attributes:
        source, target: the groups.
        from_block, to_block: in their pools.
    """

    source: Ints
    target: Ints
    from_block: Ints
    to_block: Ints


class TableMirror:
    """int32 [slots, blocks]: row `slot` is the block table of the sequence that runs there; stale behind its end.

    Args:
        column: the stage whose blocks these are.
        group: the only group whose pages are in reach, those of the others are -1; None where there is one group.

    Attributes:
        native: the same tables for native code; None where that is not built.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks_per_seq: int, block_size: int, column: int = 0, group: int | None = None
    ) -> None:
        self.block_size, self.column, self.group = block_size, column, group
        self.tables: Final[Ints] = np.full((max_num_seqs, max_blocks_per_seq), -1, dtype=np.int32)
        self.native = NativeTables(self.tables, block_size, group) if has_native() else None

    def apply(self, plan: Plan) -> None:
        """Carry out the plan's table changes. InvariantBroken (and nothing changed) where one is out of range."""
        changes = (plan.table_slot, plan.table_index, plan.table_blocks[self.column])
        if not any(changes):
            return
        group = None if self.group is None else plan.table_group
        if self.native is not None and self.native.change(*changes, group):
            return
        slot, index, block = (ints(each) for each in changes)
        _check_range("table_slot", slot, self.tables.shape[0])
        _check_range("table_index", index, self.tables.shape[1])
        if group is not None:
            block[ints(group) != self.group] = -1
        self.tables[slot, index] = block

    def copies(self, plan: Plan) -> tuple[Ints, Ints]:
        """(source, target) blocks that this rank copies inside its pool before the forward pass."""
        if not plan.copy_sources[self.column]:
            return _NONE, _NONE
        source, target = ints(plan.copy_sources[self.column]), ints(plan.copy_targets[self.column])
        if self.group is None:
            return source, target
        here = (ints(plan.copy_from) == self.group) & (ints(plan.copy_to) == self.group)
        return source[here], target[here]

    def moves(self, plan: Plan) -> Moves | None:
        """What the ranks of all groups copy from one's pool to another's before the forward pass; None for nothing."""
        if self.group is None or not plan.copy_from:
            return None
        source, target = ints(plan.copy_from), ints(plan.copy_to)
        away = source != target
        if not away.any():
            return None
        blocks = ints(plan.copy_sources[self.column]), ints(plan.copy_targets[self.column])
        return Moves(source[away], target[away], *(each[away] for each in blocks))

    def digest(self) -> bytes:
        """SHA-256 of the whole table: equal on all ranks of one column and group that have applied the same plans."""
        return sha256(self.tables.tobytes()).digest()

    def batch(self, plan: Plan, windows: Iterable[int]) -> Batch:
        """The arrays of the plan's rows, after `apply`.

        Args:
            windows: the sliding windows that the model's layers have; 0 is full attention.

        Row r attends the pages of positions 0 .. first + length; with a window only those that its first query or a
        later one still sees:

            page      0     1     2     3     4     5
                   |.....|.....|..###|#####|#####|QQ...|     # = seen by the first query, Q = this step's tokens
                               ^ the first page listed

        Pages of other groups are not listed: a row may have none.
        """
        windows = tuple(windows)
        if self.native is not None:
            rows = (plan.slots, plan.query_start, plan.first_position, plan.tokens)
            found = self.native.rows(*rows, windows)
            if found is not None:
                return Batch(*found)
        return self._computed(plan, windows)

    def _computed(self, plan: Plan, windows: tuple[int, ...]) -> Batch:
        query_start, first, slots = ints(plan.query_start), ints(plan.first_position), ints(plan.slots)
        _check_starts(query_start, len(slots), len(first), len(plan.tokens))
        lengths = query_start[1:] - query_start[:-1]
        _check_range("slots", slots, self.tables.shape[0])
        num_pages = -(-(first + lengths) // self.block_size)
        _check_range("first_position", num_pages, self.tables.shape[1] + 1)
        _check_range("first_position", first, self.tables.shape[1] * self.block_size + 1)
        if num_pages.sum(dtype=np.int64) > _MAX_ENTRIES:
            raise InvariantBroken(
                f"plan: slots: got {num_pages.sum(dtype=np.int64)} pages, must be {_MAX_ENTRIES} at most"
            )
        positions = np.arange(query_start[-1]) + np.repeat(first - query_start[:-1], lengths)
        blocks = self.tables[np.repeat(slots, lengths), positions // self.block_size].astype(np.int64)
        first_position = torch.from_numpy(first)
        return Batch(
            tokens=torch.from_numpy(ints(plan.tokens).astype(np.int64)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(self._slots(blocks, positions)),
            query_start=torch.from_numpy(query_start),
            pages={window: self._pages(slots, first, num_pages, window) for window in windows},
            masks={window: Mask(first_position, window) for window in windows},
        )

    def _slots(self, blocks: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        slots = blocks * self.block_size + positions % self.block_size
        if self.group is not None:
            slots[blocks < 0] = -1
        return slots

    def _pages(self, slots: Ints, first: Ints, num_pages: Ints, window: int) -> PageList:
        # the first query, at `first`, sees keys from first - window + 1 on; later ones see less of the past
        first_page = np.maximum(first - window + 1, 0) // self.block_size if window else np.zeros(len(first), np.int32)
        counts = num_pages - first_page
        start = np.zeros(len(slots) + 1, dtype=np.int32)
        np.cumsum(counts, out=start[1:])
        index = np.arange(start[-1], dtype=np.int32) + np.repeat(first_page - start[:-1], counts)
        blocks = self.tables[np.repeat(slots, counts), index]
        if self.group is not None:
            here = blocks >= 0
            before = np.zeros(len(here) + 1, dtype=np.int32)  # [i]: how many of the first i are here
            np.cumsum(here, out=before[1:])
            start, blocks, index = before[start], blocks[here], index[here]
        return PageList(
            start=torch.from_numpy(start),
            block=torch.from_numpy(blocks),
            position=torch.from_numpy(index * np.int32(self.block_size)),
        )


def ints(values: array[int]) -> Ints:
    """A plan's array as numpy. A copy: a view would forbid the plan to grow while it lives."""
    return np.array(values, dtype=np.int32)


def _check_starts(query_start: Ints, num_rows: int, num_first: int, num_tokens: int) -> None:
    if len(query_start) != num_rows + 1 or num_first != num_rows:
        got = f"{len(query_start)} for {num_rows} slots and {num_first} first positions"
        raise InvariantBroken(f"plan: query_start: got {got}, must be one more than of either")
    if query_start[0] or query_start[-1] != num_tokens or (query_start[1:] < query_start[:-1]).any():
        raise InvariantBroken(f"plan: query_start: got {query_start.tolist()}, must rise from 0 to {num_tokens}")


def _check_range(name: str, values: Ints, limit: int) -> None:
    """numpy would take a negative index from the end: a wrong page instead of an error."""
    if values.size and values.view(np.uint32).max() >= limit:  # a negative one is a large one there
        raise InvariantBroken(f"plan: {name}: got {values.min()} to {values.max()}, must be from 0 to {limit - 1}")

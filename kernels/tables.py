"""A rank's block tables in native code (csrc/tables.cpp): a plan's changes, and the arrays of its rows.

Both take a plan's arrays where they lie and answer in new ones. What is wrong with a plan they do not say: the caller,
who can do the same without them, finds that out.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kernels import cpu
from kernels.ops import Mask, PageList

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES = {
    "quire_tables_change": (_INT, *(_ADDRESS,) * 5, _INT),
    "quire_tables_rows": (_INT, *(_ADDRESS,) * 7),
    "quire_tables_starts": (_INT, *(_ADDRESS,) * 2, _INT, _ADDRESS),
    "quire_tables_pages": (None, *(_ADDRESS,) * 2, _INT, *(_ADDRESS,) * 2),
}


class _Tables(ctypes.Structure):
    """`quire::Tables` in csrc/exports.h."""

    _fields_ = [("blocks", _ADDRESS), *((name, _INT) for name in ("num_slots", "num_blocks", "block_size", "group"))]


# tokens, positions, slots, query_start; pages and masks by window
Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[int, PageList], dict[int, Mask]]


class NativeTables:
    """Native calls on one table. Nobody may change a plan's arrays, or the table, while a call has them.

    Attributes:
        address: of what native code gets.
    """

    def __init__(self, tables: npt.NDArray[np.int32], block_size: int, group: int | None) -> None:
        """
        Args:
            tables: int32 [slots, blocks], contiguous; read and changed where it lies.
            group: the only group whose pages are in reach; None where there is one group.
        """
        assert tables.dtype == np.int32 and tables.flags.c_contiguous
        self._library = cpu.library(_SIGNATURES, keeps_lock=True)
        self._tables = tables
        self._struct = _Tables(tables.ctypes.data, *tables.shape, block_size, -1 if group is None else group)
        self.address = ctypes.addressof(self._struct)

    def change(self, slot: array[int], index: array[int], block: array[int], group: array[int] | None) -> bool:
        """tables[slot, index] = block, or -1 where `group` is given and names another.

        Returns: False, and nothing changed, where one is out of range or the lengths differ.
        """
        count = len(slot)
        if len(index) != count or len(block) != count or (group is not None and len(group) != count):
            return False
        arrays = (_address(slot), _address(index), _address(block), None if group is None else _address(group))
        return not self._library.quire_tables_change(self.address, *arrays, count)

    def rows(
        self,
        slots: array[int],
        query_start: array[int],
        first_position: array[int],
        tokens: array[int],
        windows: Iterable[int],
    ) -> Rows | None:
        """What a plan's rows are to the kernels; None where they do not fit together, or the tables."""
        num_rows, num_tokens = len(slots), len(tokens)
        if len(query_start) != num_rows + 1 or len(first_position) != num_rows:
            return None
        inputs = (_address(slots), _address(query_start), _address(first_position), _address(tokens))
        rows = array("q", (*inputs, num_rows, num_tokens))
        what, library = (self.address, _address(rows)), self._library
        # Tensors of their own, each named: parts of one, or loops, cost more in caches that a step has left cold.
        empty, int32, int64 = torch.empty, torch.int32, torch.int64
        ids, positions = empty(num_tokens, dtype=int64), empty(num_tokens, dtype=int64)
        places, starts = empty(num_tokens, dtype=int64), empty(num_rows + 1, dtype=int32)
        first = empty(num_rows, dtype=int32)
        by_token = (ids.data_ptr(), positions.data_ptr(), places.data_ptr())
        if library.quire_tables_rows(*what, *by_token, starts.data_ptr(), first.data_ptr()):
            return None
        pages, masks = {}, {}
        for window in windows:
            start = empty(num_rows + 1, dtype=int32)
            count = library.quire_tables_starts(*what, window, start.data_ptr())
            block, position = empty(count, dtype=int32), empty(count, dtype=int32)
            library.quire_tables_pages(*what, window, block.data_ptr(), position.data_ptr())
            pages[window], masks[window] = PageList(start, block, position), Mask(first, window)
        return ids, positions, places, starts, pages, masks


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]

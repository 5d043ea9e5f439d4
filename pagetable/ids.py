"""Names for numbers: every id has its own type, and `PageRef` says in 64 bits where a page's bytes are.

    bit 63 ........ 48 47 ............ 24 23 ............. 0
        device_id (16)    block_id (24)      generation (24)

The generation of a block grows each time the block is allocated, so a reference kept from an earlier life is
refused instead of read. It wraps after 2**24 lives of one block; a stale reference would have to be
kept through all of them to be taken for a fresh one.
"""

from __future__ import annotations

from typing import NewType

DeviceId = NewType("DeviceId", int)
BlockId = NewType("BlockId", int)
Generation = NewType("Generation", int)
PageRef = NewType("PageRef", int)
LogicalPageId = NewType("LogicalPageId", int)
SequenceId = NewType("SequenceId", int)
PlanNumber = NewType("PlanNumber", int)

DEVICE_BITS, BLOCK_BITS, GENERATION_BITS = 16, 24, 24
MAX_DEVICES = 1 << DEVICE_BITS
MAX_BLOCKS = 1 << BLOCK_BITS
MAX_GENERATIONS = 1 << GENERATION_BITS

_BLOCK_MASK = MAX_BLOCKS - 1
_GENERATION_MASK = MAX_GENERATIONS - 1


def page_ref(device_id: DeviceId, block_id: BlockId, generation: Generation) -> PageRef:
    """Pack the three numbers; ValueError where one does not fit its bits."""
    if not (0 <= device_id < MAX_DEVICES and 0 <= block_id < MAX_BLOCKS and 0 <= generation < MAX_GENERATIONS):
        raise ValueError(f"({device_id}, {block_id}, {generation}) does not fit in 16, 24 and 24 bits")
    return PageRef(device_id << 48 | block_id << 24 | generation)


def device_of(ref: PageRef) -> DeviceId:
    return DeviceId(ref >> 48)


def block_of(ref: PageRef) -> BlockId:
    return BlockId(ref >> 24 & _BLOCK_MASK)


def generation_of(ref: PageRef) -> Generation:
    return Generation(ref & _GENERATION_MASK)

"""Segment: the memory that the ranks of one host share for one epoch, and where each group's part of it lies.

The first rank of each host makes it, without a name: others open it through /proc while its maker lives, and with the
last of them it is gone, whatever ended them. It is zeros when the epoch begins and takes memory as it is written.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from kernels.peers import Ring, SharedPeers
from worker.layout import Layout

MESSAGE_BYTES = 64 << 10  # of a plan or a result in shared memory
BY_SOCKET = -1  # the tag of an empty message there, where the plan or result is longer


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that one message of each kind may have.

    Attributes:
        tensor, slice: of one rank's region in the groups of a stage and of a slice.
        ring: what a stage hands on of one batch: hidden rows, and as many of the sums of an MLP that is cut.
        tokens: what the last stage tells the first, where plans leave tokens open; 0 where none do.
    """

    tensor: int
    slice: int
    ring: int
    tokens: int = 0


class Plan:
    """Offsets of all groups of a shard; the same on every rank."""

    def __init__(self, layout: Layout, sizes: Sizes) -> None:
        self._offsets: dict[tuple[str, int, int], int] = {}
        self.num_bytes = 0
        for stage in range(layout.pipeline):
            if layout.tensor > 1:
                self._take(("tensor", stage, 0), SharedPeers.num_bytes(layout.tensor, sizes.tensor))
            for each in range(layout.num_slices if layout.page > 1 else 0):
                self._take(("slice", stage, each), SharedPeers.num_bytes(layout.page, sizes.slice))
            for rank in range(layout.tensor if stage + 1 < layout.pipeline else 0):
                self._take(("ring", stage, rank), Ring.num_bytes(ring_slots(layout), sizes.ring))
        if layout.pipeline > 1:
            self._take(("results", 0, 0), Ring.num_bytes(ring_slots(layout), MESSAGE_BYTES))
        for rank in range(1, layout.num_ranks):
            self._take(("plans", 0, rank), Ring.num_bytes(ring_slots(layout), MESSAGE_BYTES))
        for rank in range(layout.tensor if layout.pipeline > 1 and sizes.tokens else 0):
            self._take(("tokens", 0, rank), Ring.num_bytes(ring_slots(layout), sizes.tokens))

    def offset(self, kind: str, stage: int, number: int = 0) -> int:
        return self._offsets[kind, stage, number]

    def _take(self, key: tuple[str, int, int], size: int) -> None:
        self._offsets[key] = self.num_bytes
        self.num_bytes += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def ring_slots(layout: Layout) -> int:
    """Of any ring: as many plans can be in flight, so nobody waits for a slot."""
    return layout.pipeline + 1


class Segment:
    """Shared memory of this process's making."""

    def __init__(self, num_bytes: int) -> None:
        self._file = os.memfd_create("quire", os.MFD_CLOEXEC)
        os.ftruncate(self._file, max(num_bytes, mmap.PAGESIZE))

    @property
    def path(self) -> str:
        """By which processes of this host and user can open it while this object lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        """Nobody can open it any more; those who have keep it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def open_segment(path: str, num_bytes: int) -> mmap.mmap:
    """Map another process's segment. Raises OSError where it is gone, ValueError where it is too small."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(file, max(num_bytes, mmap.PAGESIZE))
    finally:
        os.close(file)


def host_key() -> str:
    """Equal for processes that can share memory by `Segment.path`: one boot of one machine, one process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}/{os.getuid()}"
    except OSError:  # not Linux: no two processes share
        return f"process-{os.getpid()}-{os.urandom(8).hex()}"

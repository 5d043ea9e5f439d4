"""Ranks of one shard that meet: the exchange of a split step, and the ring from stage to stage (csrc/peers.h).

The exchange is the one collective on CPUs: every rank writes bytes into its own region, all meet, everybody reads all
regions. Whoever sums them does so in rank order and has the same bits as everybody. Regions and rings of one host lie
in shared memory; between hosts `CallbackPeers` fills private regions.

A group is broken once and for good (`abort`, by any thread or process that maps it): all who wait in it, and all who
come, get PeersBroken. A rank that dies says nothing, so somebody must watch and abort. One object has one caller at a
time; only `abort` and `is_broken` are for everybody.

Shared memory must be zeros when a group or ring is made in it, and serves one group once. An object keeps its memory
from being closed.
"""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kernels import cpu

LINE, PAGE = 64, 4096  # bytes
BEST_BYTES = 3 * 4  # of a row in `Peers.best`: token, value, total
MEETING_BYTES, BANDS = 2 * LINE, 15  # of a quire::Meeting; of a turn, at most

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_BROKEN = 3  # kBroken in csrc/peers.h
_COUNTS = 2**31  # a SharedCount's numbers go in a circle
Memory = mmap.mmap | memoryview
Gather = Callable[[list[torch.Tensor], int], None]


class PeersBroken(RuntimeError):
    """The group of ranks is broken, and with it the epoch."""


class PeersStruct(ctypes.Structure):
    """`quire::Peers` in csrc/peers.h."""

    _fields_ = [
        *((name, _INT) for name in ("rank", "size")),
        ("regions", _ADDRESS),
        *((name, _INT) for name in ("capacity", "turn", "reads_ahead")),
        *((name, _ADDRESS) for name in ("context", "exchange", "bands")),
        *((name, _INT) for name in ("num_bands", "given")),
    ]


class _Member(ctypes.Structure):
    """`quire::Member` in csrc/peers.h."""

    _fields_ = [("meeting", _ADDRESS), ("size", _INT)]


class RingStruct(ctypes.Structure):
    """`quire::Ring` in csrc/peers.h."""

    _fields_ = [
        *((name, _ADDRESS) for name in ("published", "released", "slots")),
        *((name, _INT) for name in ("stride", "num_slots", "capacity", "sent", "done")),
        ("ahead", _ADDRESS),
        ("ahead_bytes", _INT),
    ]


_EXCHANGE = ctypes.CFUNCTYPE(_INT, _ADDRESS, _INT, _INT, _ADDRESS)
_SIGNATURES = {
    "quire_exchange": (_INT, ctypes.POINTER(PeersStruct), _INT),
    "quire_shared_exchange": (_INT, _ADDRESS, _INT, _INT, _ADDRESS),
    "quire_best_of_ranks": (_INT, ctypes.POINTER(PeersStruct), _INT, *(_ADDRESS,) * 3),
    "quire_count_await": (_INT, _ADDRESS, ctypes.c_uint32, _ADDRESS),
    "quire_count_advance": (None, _ADDRESS),
    "quire_count_fail": (None, _ADDRESS),
    "quire_count_is_broken": (_INT, _ADDRESS),
}


class Peers(ABC):
    """A group of ranks as one of them sees it.

    Attributes:
        struct: what native code gets; it counts the turns for both, and the bytes that this rank gives in them.
    """

    def __init__(self, regions: torch.Tensor, rank: int, library: ctypes.CDLL) -> None:
        """Args: regions: uint8 [2, size, capacity]; a rank writes into its own of either parity."""
        self.size, self.capacity = regions.shape[1:]
        self.rank = rank
        self._library = library
        self._views = [list(parity) for parity in regions]
        self._addresses = (_ADDRESS * (2 * self.size))(*(each.data_ptr() for parity in self._views for each in parity))
        self.struct = PeersStruct(rank, self.size, ctypes.addressof(self._addresses), self.capacity, 0)

    def own(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], what this rank gives in its next exchange: to be written before it."""
        self._check(num_bytes)
        return self._views[self.struct.turn % 2][self.rank][:num_bytes]

    def exchange(self, num_bytes: int) -> list[torch.Tensor]:
        """Meet all ranks, each with as many bytes in its own region.

        Returns:
            uint8 [num_bytes] of each rank, in their order; they hold until the caller's next exchange begins.

        Raises:
            PeersBroken; ValueError where `num_bytes` is more than a region holds.
        """
        self._check(num_bytes)
        views = self._views[self.struct.turn % 2]
        if self._library.quire_exchange(self.struct, num_bytes):
            raise self.broken()
        return [each[:num_bytes] for each in views]

    def best(
        self, tokens: npt.NDArray[np.int32], values: npt.NDArray[np.float32], totals: npt.NDArray[np.float32]
    ) -> None:
        """Meet all ranks, each with what it found of some rows in its part of the columns; leave what that is in all.

        Args:
            tokens: int32 [R], each row's column of the largest value, of equal values the lowest.
            values: float32 [R], that value.
            totals: float32 [R], the sum of the row.

        Raises:
            PeersBroken; ValueError where a region does not hold so many rows.
        """
        self._check(BEST_BYTES * len(tokens))
        arrays = (each.ctypes.data for each in (tokens, values, totals))
        if self._library.quire_best_of_ranks(self.struct, len(tokens), *arrays):
            raise self.broken()

    def broken(self) -> PeersBroken:
        """The error of a broken group."""
        return PeersBroken(f"the exchange of {self.size} ranks is broken: a rank failed or was stopped")

    @abstractmethod
    def abort(self) -> None:
        """Break the group, from any thread."""

    @property
    @abstractmethod
    def is_broken(self) -> bool: ...

    def _check(self, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self.capacity:
            raise ValueError(f"num_bytes: got {num_bytes}, must be from 0 to the region's {self.capacity}")


class SharedPeers(Peers):
    """Ranks of one host, in shared memory: a page for their meetings, then 2 * size regions of whole pages.

    The first meeting is that of exchanges, the others are those of the bands of a long step's sums.
    """

    def __init__(self, memory: Memory, offset: int, rank: int, size: int, capacity: int) -> None:
        """Join the group that lies at `offset` of the memory; all ranks give the same size and capacity.

        Args:
            memory: writable, of at least offset + num_bytes(size, capacity) bytes; the place is a multiple of 64.
            capacity: bytes that a rank can give in one exchange.
        """
        _check_rank(rank, size, capacity)
        stride = _whole(capacity, PAGE)
        place = _place(memory, offset, self.num_bytes(size, capacity))
        regions = torch.frombuffer(place, dtype=torch.uint8)[PAGE:].view(2, size, stride)[:, :, :capacity]
        library = cpu.library(_SIGNATURES)
        super().__init__(regions, rank, library)
        self._meeting = ctypes.addressof(place)
        self._keep = (place, _Member(self._meeting, size))
        self.struct.context = ctypes.addressof(self._keep[1])
        self.struct.exchange = ctypes.cast(library.quire_shared_exchange, _ADDRESS)
        self.struct.bands, self.struct.num_bands = self._meeting + MEETING_BYTES, BANDS

    @staticmethod
    def num_bytes(size: int, capacity: int) -> int:
        """Bytes of a group in shared memory."""
        return PAGE + 2 * size * _whole(capacity, PAGE)

    def abort(self) -> None:
        for meeting in range(1 + BANDS):
            self._library.quire_count_fail(self._meeting + meeting * MEETING_BYTES)

    @property
    def is_broken(self) -> bool:
        return bool(self._library.quire_count_is_broken(self._meeting))


class CallbackPeers(Peers):
    """Ranks of several hosts: private regions, filled by a function."""

    def __init__(self, rank: int, size: int, capacity: int, gather: Gather) -> None:
        """Args:
        gather: called with uint8 [bytes] of all ranks and the own rank, whose bytes are there; fills in the others'.
            It runs on the thread that exchanges or calls a step. An error of its breaks the group.
        """
        _check_rank(rank, size, capacity)
        super().__init__(torch.empty((2, size, capacity), dtype=torch.uint8), rank, cpu.library(_SIGNATURES))
        self._gather = gather
        self._error: BaseException | None = None
        self._is_broken = False
        self._function = _EXCHANGE(self._exchange)
        self.struct.exchange = ctypes.cast(self._function, _ADDRESS)

    def broken(self) -> PeersBroken:
        error = super().broken()
        error.__cause__ = self._error
        return error

    def abort(self) -> None:
        """Fail the next exchange; one that has begun ends when `gather` does."""
        self._is_broken = True

    @property
    def is_broken(self) -> bool:
        return self._is_broken

    def _exchange(self, _: int | None, parity: int, num_bytes: int, __: int | None) -> int:
        if not self._is_broken:
            try:
                self._gather([each[:num_bytes] for each in self._views[parity]], self.rank)
            except BaseException as error:  # it can't pass through native code; `broken` tells it
                self._error = error
                self._is_broken = True
        return _BROKEN if self._is_broken else 0


class Ring:
    """Messages from one producer to one consumer through slots in shared memory, in order.

    Two lines of counts, then for each slot a line (tag, bytes) and the message.

    Attributes:
        struct: what native code gets; it counts the messages for both.
    """

    def __init__(self, memory: Memory, offset: int, slots: int, capacity: int) -> None:
        """Join the ring that lies at `offset` of the memory, as either side; both give the same sizes.

        Args:
            memory: as for SharedPeers.
            slots: messages that can be under way.
            capacity: bytes of a message, at most.
        """
        if slots < 1 or capacity < 1:
            raise ValueError(f"slots, capacity: got {slots} and {capacity}, both must be at least 1")
        self.slots, self.capacity = slots, capacity
        self._library = cpu.library(_SIGNATURES)
        self._place = _place(memory, offset, self.num_bytes(slots, capacity))
        self._published, self._released = (ctypes.addressof(self._place) + at for at in (0, LINE))
        places = torch.frombuffer(self._place, dtype=torch.uint8)[2 * LINE :].view(slots, -1)
        words = memoryview(self._place).cast("B").cast("q")  # a tensor's numbers cost more to take
        size = places.shape[1]
        self._heads = [words[at // 8 : at // 8 + 2] for at in range(2 * LINE, 2 * LINE + slots * size, size)]
        self._messages = [each[LINE : LINE + capacity] for each in places]
        self._bytes = [memoryview(each.numpy()) for each in self._messages]
        self._received = [(0, each[:0]) for each in self._messages]  # bytes and message, the last one of each slot
        first = self._released + LINE
        self.struct = RingStruct(self._published, self._released, first, size, slots, capacity)
        self._ahead = ctypes.addressof(self.struct) + RingStruct.ahead.offset

    @staticmethod
    def num_bytes(slots: int, capacity: int) -> int:
        """Bytes of a ring in shared memory."""
        return 2 * LINE + slots * (LINE + _whole(capacity, LINE))

    def read_ahead(self, address: int, num_bytes: int) -> None:
        """What the consumer reads behind a message: asked for while it waits. Only where its cores are its own."""
        self.struct.ahead, self.struct.ahead_bytes = address, num_bytes

    def slot(self) -> torch.Tensor:
        """uint8 [capacity], the next message to fill, until `publish`; waits while all slots are under way."""
        sent = self.struct.sent
        self._await(self._released, sent + 1 - self.slots)
        return self._messages[sent % self.slots]

    def publish(self, tag: int, num_bytes: int) -> None:
        """Send what `slot` gave.

        Args:
            tag: any int64, for the consumer.
            num_bytes: of the message.
        """
        self._check(num_bytes)
        struct = self.struct
        sent = struct.sent
        head = self._heads[sent % self.slots]
        head[0], head[1] = tag, num_bytes
        struct.sent = sent + 1
        self._library.quire_count_advance(self._published)

    def receive(self) -> tuple[int, torch.Tensor]:
        """The oldest message that is not released: its tag, and its bytes (uint8) where they lie; waits for one."""
        done = self.struct.done
        self._await(self._published, done + 1, self._ahead)
        index = done % self.slots
        tag, num_bytes = self._heads[index]
        if self._received[index][0] != num_bytes:
            self._received[index] = (num_bytes, self._messages[index][:num_bytes])
        return tag, self._received[index][1]

    def release(self) -> None:
        """Give back the slot of the message that `receive` gave, which may not be read any more."""
        self.struct.done += 1
        self._library.quire_count_advance(self._released)

    def put(self, tag: int, data: bytes) -> None:
        """`slot` and `publish` of a few bytes."""
        self._check(len(data))
        sent = self.struct.sent
        self._await(self._released, sent + 1 - self.slots)
        self._bytes[sent % self.slots][: len(data)] = data
        self.publish(tag, len(data))

    def take(self) -> tuple[int, bytes]:
        """`receive` and `release` of a few bytes."""
        done = self.struct.done
        self._await(self._published, done + 1, self._ahead)
        index = done % self.slots
        tag, num_bytes = self._heads[index]
        data = bytes(self._bytes[index][:num_bytes])
        self.release()
        return tag, data

    def abort(self) -> None:
        """Break the ring for both sides, from any thread."""
        for count in (self._published, self._released):
            self._library.quire_count_fail(count)

    @staticmethod
    def broken() -> PeersBroken:
        """The error of a broken ring."""
        return PeersBroken("the ring between two ranks is broken: a rank failed or was stopped")

    @property
    def is_broken(self) -> bool:
        return bool(self._library.quire_count_is_broken(self._published))

    def _check(self, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self.capacity:
            raise ValueError(f"num_bytes: got {num_bytes}, must be from 0 to the slot's {self.capacity}")

    def _await(self, count: int, least: int, ahead: int | None = None) -> None:
        if self._library.quire_count_await(count, least % _COUNTS, ahead):
            raise self.broken()


def _whole(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit) * unit


def _check_rank(rank: int, size: int, capacity: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(f"rank: got {rank} of {size}, must be from 0 to {size - 1}")
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity}, must be at least 1")


def _place(memory: Memory, offset: int, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """A part of some memory, which stays open as long as this lives."""
    size = memoryview(memory).nbytes
    if not 0 <= offset <= size - num_bytes:
        raise ValueError(f"offset: got {offset}, {num_bytes} bytes from there must lie in the memory's {size}")
    place = (ctypes.c_char * num_bytes).from_buffer(memory, offset)
    if ctypes.addressof(place) % LINE:
        raise ValueError(f"offset: got {offset}, the place must be a multiple of {LINE} bytes")
    return place

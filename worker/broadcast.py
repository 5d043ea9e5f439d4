"""Broadcast: plans, and with them table changes, from a shard's leader to all its other ranks. Metadata only.

    Star               to each rank through shared memory where it is on the leader's host, or over a framed socket
    TorchBroadcast     torch.distributed's: a tree over gloo, or NCCL into memory of the device

Both belong to one epoch. A rank waits in `receive` for as long as nobody asks the shard anything; what ends the epoch
breaks the memory and shuts the sockets beneath.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from kernels.peers import PeersBroken, Ring
from pagetable.frames import MAX_FRAME_BYTES, BadFrame, Kind, encode_frame
from worker.channel import Channel
from worker.segment import BY_SOCKET

FIRST_BYTES = 16 << 10  # of a torch broadcast: a decode step of 256 sequences goes over in one
IDLE_TIMEOUT = timedelta(days=3650)  # a rank may wait for a plan that long
_HEAD_BYTES = 8


class Broadcast(Protocol):
    """One epoch's way of plans. Its leader only sends, the others only receive, each from one thread."""

    def send(self, data: bytes) -> None:
        """Give `data` to every other rank. Raises PeersBroken where one does not take it."""
        ...

    def receive(self) -> bytes:
        """What the leader sent next; waits for it. Raises PeersBroken where the epoch is over, or BadFrame."""
        ...


class Star:
    """Messages in memory, and frames over the connections that the ranks have with their leader.

    Args:
        channels: by the rank at the other end; others than the leader have one.
        rings: the same, of those that share memory. What is too long for a ring goes over the connection.
    """

    def __init__(self, channels: Mapping[int, Channel], rings: Mapping[int, Ring]) -> None:
        self._channels, self._rings = channels, rings

    def send(self, data: bytes) -> None:
        frame = b""
        for rank, channel in self._channels.items():
            if (ring := self._rings.get(rank)) is not None:
                if len(data) <= ring.capacity:
                    ring.put(0, data)
                    continue
                ring.put(BY_SOCKET, b"")
            frame = frame or encode_frame(Kind.PLAN, data)
            try:
                channel.send_frame(frame)
            except OSError as error:
                raise PeersBroken(f"rank {rank} does not take a plan ({error.strerror or error})") from error

    def receive(self) -> bytes:
        ((leader, channel),) = self._channels.items()
        if leader in self._rings:
            tag, data = self._rings[leader].take()
            if tag != BY_SOCKET:
                return data
        try:
            kind, payload = channel.receive()
        except OSError as error:
            raise PeersBroken(f"no plan comes any more ({error.strerror or error})") from error
        if kind is not Kind.PLAN:
            raise BadFrame(f"a {kind.name} instead of a plan")
        return payload


class TorchBroadcast:
    """A broadcast of FIRST_BYTES with the length at its head, and a second one for what does not fit.

    Args:
        group: of all ranks of the shard, made for this alone: nobody else may use it. Its timeout is the caller's.
        device: where `buffer` lies: gloo takes memory of CPUs, NCCL that of its GPU.

    Attributes:
        buffer: uint8, the last message: its length (int64), then its bytes. On every rank and on `device`, so that
            kernels there can read tables from it without another copy; overwritten by the next one.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | None = None) -> None:
        self._group, self._device = group, device or torch.device("cpu")
        self.buffer = torch.zeros(FIRST_BYTES, dtype=torch.uint8, device=self._device)

    def send(self, data: bytes) -> None:
        size = _HEAD_BYTES + len(data)
        message = np.empty(max(FIRST_BYTES, size), dtype=np.uint8)
        message[:_HEAD_BYTES].view(np.int64)[0] = len(data)
        message[_HEAD_BYTES:size] = np.frombuffer(data, dtype=np.uint8)
        self._fit(len(message))[: len(message)].copy_(torch.from_numpy(message))
        self._pass(self.buffer[:FIRST_BYTES])
        if size > FIRST_BYTES:
            self._pass(self.buffer[FIRST_BYTES:size])

    def receive(self) -> bytes:
        self._pass(self.buffer[:FIRST_BYTES])
        length = int(self.buffer[:_HEAD_BYTES].view(torch.int64).item())
        if not 0 <= length <= MAX_FRAME_BYTES:
            raise BadFrame(f"a plan of {length} bytes; must be from 0 to {MAX_FRAME_BYTES}")
        size = _HEAD_BYTES + length
        if size > FIRST_BYTES:
            self._pass(self._fit(size)[FIRST_BYTES:size])
        return self.buffer[_HEAD_BYTES:size].cpu().numpy().tobytes()

    def _fit(self, size: int) -> torch.Tensor:
        """The buffer, of at least `size` bytes; what the first message left at its head stays."""
        if size > len(self.buffer):
            larger = torch.zeros(1 << (size - 1).bit_length(), dtype=torch.uint8, device=self._device)
            larger[:FIRST_BYTES].copy_(self.buffer[:FIRST_BYTES])
            self.buffer = larger
        return self.buffer

    def _pass(self, part: torch.Tensor) -> None:
        try:
            dist.broadcast(part, 0, group=self._group)
        except RuntimeError as error:
            raise PeersBroken(f"the broadcast of plans is broken ({str(error).splitlines()[0]})") from error

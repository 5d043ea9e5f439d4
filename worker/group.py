"""Group: the collectives of one rank for one epoch, formed by the leader's word and never mended.

    Form(epoch, members) --> Group --> tensor: the T ranks of the stage      sums of partial rows, logits
                                       slice: the G ranks of the slice       queries, partial attention
                                       previous, next: the neighbour stages  hidden rows
                                       back: last stage to first             tokens that plans leave open
                                       plans, results: leader to all others, last stage to leader
       an error, a death --> abort --> every wait ends in PeersBroken --> close; the next Form makes the next Group

Ranks of one host share memory, others meet in gloo; each group of ranks takes the one that all its members can, where
`Ways` does not say gloo for all.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from kernels.peers import Peers, PeersBroken, Ring, SharedPeers
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.broadcast import IDLE_TIMEOUT, Broadcast, Star, TorchBroadcast
from worker.channel import Channel
from worker.gloo import GlooRing, World
from worker.layout import Layout, Part
from worker.segment import MESSAGE_BYTES, Plan, Sizes, open_segment, ring_slots
from worker.ways import Ways


class Way(Protocol):
    """Messages from one rank to another; see `kernels.peers.Ring`."""

    def slot(self) -> torch.Tensor: ...
    def publish(self, tag: int, num_bytes: int) -> None: ...
    def receive(self) -> tuple[int, torch.Tensor]: ...
    def release(self) -> None: ...
    def abort(self) -> None: ...


class Group:
    """See the module.

    Attributes:
        epoch: of which this group is the one life.
        owns_cores: this rank's threads run on no core of another's, as given.
        tensor, slice: None where the rank would be alone.
        previous, next: None on the first and the last stage.
        back: to receive on the first stage, to publish on the last; None elsewhere, and where plans leave nothing open.
        results: to take on the leader, to put on the first rank of the last of several stages, where the two share
            memory; None elsewhere.
        plans: to put on the leader, by rank; to take on another, from rank 0; where that rank and this one share
            memory.
    """

    def __init__(self, part: Part, sizes: Sizes, form: pb.Form, ways: Ways, *, owns_cores: bool = False) -> None:
        self.epoch = int(form.epoch)
        self.tensor: Peers | None = None
        self.slice: Peers | None = None
        self.previous: Way | None = None
        self.next: Way | None = None
        self.back: Way | None = None
        self.results: Ring | None = None
        self.plans: dict[int, Ring] = {}
        self._everybody: dist.ProcessGroup | None = None
        self._part, self._sizes, self._members, self._ways = part, sizes, form.members, ways
        self.owns_cores = owns_cores
        self._store = form.store
        self._plan = Plan(part.layout, sizes)
        self._memory: mmap.mmap | None = None
        self._world = World() if form.store else None
        self._is_over = False

    def form(self) -> None:
        """Meet the others.

        Raises:
            OSError, ValueError, RuntimeError: a member is gone, or `abort` was called; `close` is due all the same.
        """
        layout = self._part.layout
        if self._world is not None:
            own = self._members[self._part.rank].address
            self._world.form(self._store, self.epoch, self._part.rank, layout.num_ranks, own)
        self._form(layout)
        for each in (self.tensor, self.slice):
            if each is not None:
                each.struct.reads_ahead = self.owns_cores
        if self._ways.plans_by_torch:
            assert self._world is not None
            self._everybody = self._world.group(range(layout.num_ranks), IDLE_TIMEOUT)
        if self._world is not None:
            self._world.seal()
        if self._is_over:  # it may have come before there was anything to abort
            self.abort()
            raise PeersBroken("the epoch was over before it began")

    def make_broadcast(self, channels: Mapping[int, Channel]) -> Broadcast:
        """The way of plans in this epoch.

        Args:
            channels: to the other ranks, by number, on the leader; to rank 0 on others.
        """
        if self._everybody is None:
            return Star(channels, self.plans)
        return TorchBroadcast(self._everybody)

    def abort(self) -> None:
        """End every wait in this group, of all ranks whose memory this one maps. From any thread, at any time."""
        self._is_over = True
        for each in (self.tensor, self.slice, self.previous, self.next, self.back, self.results, *self.plans.values()):
            if each is not None:
                each.abort()
        if self._world is not None:
            self._world.abort()

    def close(self) -> None:
        """Give everything back. No thread may wait in this group."""
        self.abort()
        self.tensor = self.slice = self._everybody = None
        self.previous = self.next = self.back = self.results = None
        self.plans = {}
        if self._world is not None:
            self._world.close()
        self._memory = None  # unmapped with the last tensor that looks into it

    def _form(self, layout: Layout) -> None:
        """Every rank walks through all groups in the same order, as gloo wants it, and keeps its own."""
        part = self._part
        for stage in range(layout.pipeline):
            first = stage * layout.tensor
            if layout.tensor > 1:
                found = self._peers(range(first, first + layout.tensor), "tensor", stage, 0, self._sizes.tensor)
                self.tensor = found or self.tensor
            for each in range(layout.num_slices if layout.page > 1 else 0):
                start = first + each * layout.page
                found = self._peers(range(start, start + layout.page), "slice", stage, each, self._sizes.slice)
                self.slice = found or self.slice
        if part.stage > 0:
            self.previous = self._ring(part.rank - layout.tensor, part.rank)
        if part.stage + 1 < layout.pipeline:
            self.next = self._ring(part.rank, part.rank + layout.tensor)
        answering = layout.num_ranks - layout.tensor
        if part.rank in (0, answering) and answering and self._share_memory((0, answering)):
            self.results = self._messages("results", 0)
        if self._ways.plans_in_memory:
            for rank in range(1, layout.num_ranks) if part.rank == 0 else (part.rank,):
                if self._share_memory((0, rank)):
                    self.plans[rank if part.rank == 0 else 0] = self._messages("plans", rank)
        first, last = part.tensor_rank, part.tensor_rank + (layout.pipeline - 1) * layout.tensor
        if self._sizes.tokens and first != last and part.rank in (first, last):
            self.back = self._way(last, first, ("tokens", 0, part.tensor_rank), self._sizes.tokens)

    def _peers(self, ranks: range, kind: str, stage: int, number: int, capacity: int) -> Peers | None:
        own = self._part.rank
        if self._share_memory(ranks):
            if own not in ranks:
                return None
            offset = self._plan.offset(kind, stage, number)
            return SharedPeers(self._map(), offset, own - ranks.start, len(ranks), capacity)
        assert self._world is not None
        group = self._world.group(ranks)
        if own not in ranks or group is None:
            return None
        return self._world.peers(group, own - ranks.start, len(ranks), capacity)

    def _messages(self, kind: str, rank: int) -> Ring:
        layout = self._part.layout
        return Ring(self._map(), self._plan.offset(kind, 0, rank), ring_slots(layout), MESSAGE_BYTES)

    def _ring(self, sender: int, receiver: int) -> Way:
        place = ("ring", *divmod(sender, self._part.layout.tensor))
        return self._way(sender, receiver, place, self._sizes.ring)

    def _way(self, sender: int, receiver: int, place: tuple[str, int, int], capacity: int) -> Way:
        slots = ring_slots(self._part.layout)
        if self._share_memory((sender, receiver)):
            return Ring(self._map(), self._plan.offset(*place), slots, capacity)
        own = self._part.rank
        return GlooRing(own, receiver if own == sender else sender, slots, capacity)

    def _share_memory(self, ranks: Sequence[int]) -> bool:
        return share_memory(self._members, ranks, self._ways)

    def _map(self) -> mmap.mmap:
        if self._memory is None:
            host = self._members[self._part.rank].host
            first = next(member for member in self._members if member.host == host)
            self._memory = open_segment(first.segment, self._plan.num_bytes)
        return self._memory


def share_memory(members: Sequence[pb.RankReady], ranks: Sequence[int], ways: Ways) -> bool:
    """Whether all these ranks are on one host, and shall use its memory."""
    return ways.shares_memory and len({members[rank].host for rank in ranks}) == 1


def needs_store(layout: Layout, members: Sequence[pb.RankReady], ways: Ways) -> bool:
    """Whether some ranks that must talk to each other do so through torch.distributed."""
    stages = [range(s * layout.tensor, (s + 1) * layout.tensor) for s in range(layout.pipeline)]
    neighbours = [(rank, rank + layout.tensor) for rank in range(layout.num_ranks - layout.tensor)]
    return ways.plans_by_torch or not all(share_memory(members, ranks, ways) for ranks in [*stages, *neighbours])

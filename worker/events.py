"""What a shard tells the global scheduler: every sequence's table as (device_id, block_id), by changes.

A shard of several stages tells of the first one's pages; the others hold the same logical pages in the same groups.
"""

from __future__ import annotations

from pagetable.allocator import BlockState
from pagetable.ids import LogicalPageId, SequenceId
from pagetable.page import PagePool
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.plan import Plan
from worker.scheduler import ShardScheduler
from worker.sequence import Sequence


class Journal:
    """Collects changes after each plan and hands them out as one Events message.

    The first message after `begin` is whole; those behind it carry what changed since. A view that applies them in
    order equals the shard's own tables.
    """

    def __init__(self, scheduler: ShardScheduler, epoch: int) -> None:
        self._scheduler, self._epoch = scheduler, epoch
        self._number = 0
        self._names: dict[str, tuple[str, str]] = {}  # internal request id -> (the user's, owner)
        self._slots: dict[int, SequenceId] = {}
        self._known: set[SequenceId] = set()
        self._events = pb.Events()

    def name(self, internal: str, request_id: str, owner: str) -> None:
        """A request that is called `internal` here is known to its user as `request_id`."""
        self._names[internal] = request_id, owner

    def forget(self, internal: str) -> None:
        self._names.pop(internal, None)

    def begin(self) -> None:
        """Somebody listens from now on: start with everything."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        self._number = 0
        self._events = events = pb.Events(whole=True)
        scheduler.departed, pool.log = [], []
        self._slots = {s.slot: s.sequence_id for s in scheduler.running if s.num_sent >= 0}
        self._known = set(self._slots.values())
        for sequence in scheduler.running:
            if sequence.num_sent >= 0:
                self._start(sequence)
                for index, (device, block) in enumerate(sequence.table.entries()[: sequence.num_sent]):
                    self._enter(sequence.sequence_id, index, device, block)
        events.sealed.extend(short_digest(pool.tree.digest(page)) for page in pool.tree)

    def stop(self) -> None:
        """Nobody listens: keep no log."""
        self._scheduler.departed = self._scheduler.pool.log = None

    def record(self, plan: Plan) -> None:
        """A plan was made: who entered, and which entries of which tables changed."""
        if self._scheduler.departed is None:
            return
        self._flush_departed()
        if plan.admits:
            by_slot = {s.slot: s for s in self._scheduler.running}
            for admit in plan.admits:
                self._slots[admit.slot] = admit.sequence_id
                self._known.add(admit.sequence_id)
                self._start(by_slot[admit.slot])
        devices = [int(allocator.device_id) for allocator in self._scheduler.pool.columns[0]]
        changes = zip(plan.table_slot, plan.table_index, plan.table_group, plan.table_blocks[0], strict=True)
        for slot, index, group, block in changes:
            self._enter(self._slots[slot], index, devices[group], block)

    def take(self, load: pb.Load) -> pb.Events | None:
        """What changed since the last call, or None where nobody listens."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        if scheduler.departed is None or pool.log is None:
            return None
        self._flush_departed()
        for sequence in scheduler.running:
            for index in sequence.resend:  # swapped for a page of equal content; ranks hear of it with their next row
                page = LogicalPageId(sequence.table.pages[index])
                self._enter(sequence.sequence_id, index, *pool.place(page))
        events = self._events
        for sealed, digest in pool.log:
            (events.sealed if sealed else events.forgotten).append(short_digest(digest))
        pool.log.clear()
        self._number += 1
        events.epoch, events.number = self._epoch, self._number
        events.load.CopyFrom(load)
        self._events = pb.Events()
        return events

    def _start(self, sequence: Sequence) -> None:
        name, owner = self._names.get(sequence.request.request_id, ("", ""))
        self._events.started.add(
            sequence=sequence.sequence_id,
            request_id=name,
            owner=owner,
            sample=sequence.sample_index,
            prompt_tokens=sequence.prompt_length,
        )

    def _enter(self, sequence: SequenceId, index: int, device: int, block: int) -> None:
        events = self._events
        events.entry_sequence.append(sequence)
        events.entry_index.append(index)
        events.entry_device.append(device)
        events.entry_block.append(block)

    def _flush_departed(self) -> None:
        departed = self._scheduler.departed or []
        for sequence, ended in departed:
            if sequence in self._known:
                (self._events.ended if ended else self._events.released).append(sequence)
                self._known.discard(sequence)
        departed.clear()


def short_digest(digest: bytes) -> int:
    """The first 8 bytes of a prefix digest: enough to guess where a prefix lies, never to share a page."""
    return int.from_bytes(digest[:8], "little")


def page_load(pool: PagePool) -> pb.Load:
    """Counts of a shard's pages, over all its groups; free, cached and used ones sum to what the pool holds."""
    pools = [
        pb.Pool(
            device_id=allocator.device_id,
            num_blocks=allocator.num_blocks,
            free_blocks=allocator.num_free,
            cached_blocks=allocator.counts[BlockState.CACHED],
            used_blocks=allocator.counts[BlockState.RESERVED] + allocator.counts[BlockState.LIVE],
        )
        for column in pool.columns
        for allocator in column
    ]
    return pb.Load(
        pools=pools,
        free_blocks=pool.num_free,
        cached_blocks=len(pool.order),
        used_blocks=pool.num_used,
        allocations=sum(allocator.num_allocations for allocator in pool.columns[0]),
        evictions=pool.num_evictions,
    )

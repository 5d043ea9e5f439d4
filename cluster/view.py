"""What the global scheduler knows of each shard: sequences, tables as (device_id, block_id), sealed prefixes, load.

A view is made of Events alone, in their order. It equals the shard's own tables as of the last message that it took.
Tables are arrays of packed 64-bit entries: 328 million pages of 10,000 sequences are 2.6 GB; an object per page would
be twenty times that.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from pagetable.errors import QuireError
from pagetable.ids import BLOCK_BITS, MAX_BLOCKS, MAX_DEVICES
from quire_pb.worker.v1 import worker_pb2 as pb


class BrokenStream(QuireError):
    """Events that cannot follow those before: ask for everything again."""


class SequenceView:
    """One sequence that runs on a shard.

    Attributes:
        request_id, owner: the user's id of the request, and the tag of the tenant.
        sample: which of the request's samples it is.
        entries: uint64, device_id << 24 | block_id by page index.
    """

    __slots__ = ("entries", "owner", "prompt_tokens", "request_id", "sample")

    def __init__(self, started: pb.Started) -> None:
        self.request_id, self.owner = started.request_id, started.owner
        self.sample, self.prompt_tokens = started.sample, started.prompt_tokens
        self.entries: array[int] = array("Q")

    def pages(self) -> Iterator[tuple[int, int]]:
        """(device_id, block_id) of each page, in order."""
        return map(unpack, self.entries)


def unpack(entry: int) -> tuple[int, int]:
    """(device_id, block_id)."""
    return entry >> BLOCK_BITS, entry & (MAX_BLOCKS - 1)


class ShardView:
    """One life of one shard.

    Attributes:
        number: of the last Events; 0 before the first.
        sequences: by the shard's own sequence id; a preempted sequence is not here until it runs again.
        sealed: first 8 bytes of the digests that the shard's prefix tree finds.
        load: as of the last Events.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.number = 0
        self.sequences: dict[int, SequenceView] = {}
        self.sealed: set[int] = set()
        self.load = pb.Load()

    def apply(self, events: pb.Events) -> None:
        """Take the next message of a connection; the first is whole.

        Raises BrokenStream where it cannot be the next; the view is worth nothing then.
        """
        if events.number != self.number + 1 or events.whole != (events.number == 1):
            raise BrokenStream(f"Events {events.number} (whole: {events.whole}) behind Events {self.number}")
        self.number = events.number
        sequences = self.sequences
        for gone in events.released:
            sequences.pop(gone, None)
        for started in events.started:
            sequences[started.sequence] = SequenceView(started)
        self._enter(events)
        for gone in events.ended:
            sequences.pop(gone, None)
        self._seal(events)
        self.load.CopyFrom(events.load)  # a reference would keep the whole message

    def _enter(self, events: pb.Events) -> None:
        """Write the message's table entries."""
        owners, indices = list(events.entry_sequence), list(events.entry_index)
        devices, blocks = list(events.entry_device), list(events.entry_block)
        if not len(owners) == len(indices) == len(devices) == len(blocks):
            raise BrokenStream("table entries whose arrays differ in length")
        if not owners:
            return
        if max(devices) >= MAX_DEVICES or max(blocks) >= MAX_BLOCKS:
            raise BrokenStream(f"an entry of device {max(devices)} or block {max(blocks)}: no such place can be")
        sequences = self.sequences
        for owner, index, device, block in zip(owners, indices, devices, blocks, strict=True):
            sequence = sequences.get(owner)
            if sequence is None:
                if owner in events.released:  # it gave up its pages behind the plan that this message tells of
                    continue
                raise BrokenStream(f"an entry of sequence {owner}, which has not started")
            entries = sequence.entries
            if index < len(entries):
                entries[index] = device << BLOCK_BITS | block
            elif index == len(entries):
                entries.append(device << BLOCK_BITS | block)
            else:
                raise BrokenStream(f"sequence {owner}: entry {index} of a table of {len(entries)}")

    def _seal(self, events: pb.Events) -> None:
        """A digest that comes and goes within one message ends as it would have, one change after the other."""
        sealed, forgotten = events.sealed, events.forgotten
        both = set(sealed).intersection(forgotten)
        for digest in both:
            held = (digest in self.sealed) + list(sealed).count(digest) > list(forgotten).count(digest)
            (self.sealed.add if held else self.sealed.discard)(digest)
        if both:
            self.sealed.update(digest for digest in sealed if digest not in both)
            self.sealed.difference_update(digest for digest in forgotten if digest not in both)
        else:
            self.sealed.update(sealed)
            self.sealed.difference_update(forgotten)


class ClusterView:
    """The present life of every shard that has one."""

    def __init__(self) -> None:
        self.shards: dict[int, ShardView] = {}

    def begin(self, shard_id: int, epoch: int) -> None:
        """A connection to this life begins; its first Events will be whole. An older life than the known one is not
        taken."""
        known = self.shards.get(shard_id)
        if known is None or known.epoch <= epoch:
            self.shards[shard_id] = ShardView(epoch)

    def apply(self, shard_id: int, events: pb.Events) -> bool:
        """Take a message; False, and nothing changed, where it belongs to another life. Raises BrokenStream."""
        shard = self.shards.get(shard_id)
        if shard is None or shard.epoch != events.epoch:
            return False
        shard.apply(events)
        return True

    def drop(self, shard_id: int) -> None:
        """That shard has no life any more."""
        self.shards.pop(shard_id, None)

    def sequences(self, owner: str = "", request_id: str = "") -> list[tuple[int, SequenceView]]:
        """(shard_id, sequence) of one tenant (empty: all) and one request (empty: all); by shard, oldest first."""
        return [
            (shard_id, sequence)
            for shard_id, shard in sorted(self.shards.items())
            for _, sequence in sorted(shard.sequences.items())
            if (not owner or sequence.owner == owner) and (not request_id or sequence.request_id == request_id)
        ]

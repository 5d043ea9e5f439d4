"""What the global scheduler knows of each shard: sequences, tables as (device_id, block_id), sealed prefixes, load.

A view is made of Events alone, in their order. It equals the shard's own tables as of the last message that it took.
Tables are arrays of packed 64-bit entries and digests lie in a DigestSet: together 18 bytes a page, so that 75 million
pages of 10,000 sequences are 1.3 GB (benchmarks/scale.py); an object per page would be twenty times that.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping

from cluster.digest_set import DigestSet
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
        self.sealed = DigestSet()
        self.load = pb.Load()
        self._by_request: dict[str, dict[int, SequenceView]] = {}

    def of_request(self, request_id: str) -> Mapping[int, SequenceView]:
        """Its sequences here, by the shard's own sequence id."""
        return self._by_request.get(request_id, {})

    def apply(self, events: pb.Events) -> None:
        """Take the next message of a connection; the first is whole.

        Raises BrokenStream where it cannot be the next; the view is worth nothing then.
        """
        if events.number != self.number + 1 or events.whole != (events.number == 1):
            raise BrokenStream(f"Events {events.number} (whole: {events.whole}) behind Events {self.number}")
        self.number = events.number
        for gone in events.released:
            self._leave(gone)
        for started in events.started:
            self._start(started)
        self._enter(events)
        for gone in events.ended:
            self._leave(gone)
        self._seal(events)
        self.load.CopyFrom(events.load)  # a reference would keep the whole message

    def _start(self, started: pb.Started) -> None:
        self._leave(started.sequence)
        sequence = self.sequences[started.sequence] = SequenceView(started)
        self._by_request.setdefault(sequence.request_id, {})[started.sequence] = sequence

    def _leave(self, number: int) -> None:
        sequence = self.sequences.pop(number, None)
        if sequence is not None:
            siblings = self._by_request[sequence.request_id]
            del siblings[number]
            if not siblings:
                del self._by_request[sequence.request_id]

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
        sequences, released = self.sequences, set(events.released)
        for owner, index, device, block in zip(owners, indices, devices, blocks, strict=True):
            sequence = sequences.get(owner)
            if sequence is None:
                if owner in released:  # it gave up its pages behind the plan that this message tells of
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
        sealed, forgotten = list(events.sealed), list(events.forgotten)
        both = set(sealed).intersection(forgotten) if sealed and forgotten else ()
        if both:
            came = Counter(digest for digest in sealed if digest in both)
            went = Counter(digest for digest in forgotten if digest in both)
            for digest in both:
                held = (digest in self.sealed) + came[digest] > went[digest]
                (self.sealed.add if held else self.sealed.discard)(digest)
            sealed = [digest for digest in sealed if digest not in both]
            forgotten = [digest for digest in forgotten if digest not in both]
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
            for _, sequence in sorted((shard.of_request(request_id) if request_id else shard.sequences).items())
            if not owner or sequence.owner == owner
        ]

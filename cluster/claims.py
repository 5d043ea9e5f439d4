"""What was promised to shards and is not yet in their own news.

Between a placement and the shard's word on it lies a *claim*, which stands for the request's seats, blocks and prefix
digests: two requests with one new prefix, a millisecond apart, meet on one shard, and a burst does not pile up on the
shard that was idle in the last report. Its seats and blocks are given back when the shard tells of its sequences, its
digests when the last of them is sealed. Any of these ends a claim as a whole: the request is placed again, its front or
shard is gone, time is up. So a claim can be wrong for a while but never for good.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cluster.digest_set import DigestSet
from quire_pb.worker.v1 import worker_pb2 as pb

K = TypeVar("K")


@dataclass(eq=False, slots=True)
class Claim:
    """A request that a front was told to send to a shard.

    Attributes:
        ticket: (front, its number for the placement).
        key: of prompt and salt: the same request placed again ends the claim at the shard that refused it.
        pages: blocks that it will take beside those that lie there.
        digests: that the shard will seal for it, in order; uint64.
        arrived: the shard tells of its sequences: its own counts hold them from now on.
    """

    ticket: tuple[int, int]
    key: bytes
    shard_id: int
    prompt_tokens: int
    samples: int
    pages: int
    digests: array[int]
    made: float
    arrived: bool = False


class Claims:
    """All claims, by what can end them: ticket, shard, the shard's news, time."""

    def __init__(self) -> None:
        self._by_ticket: dict[tuple[int, int], Claim] = {}  # oldest first
        self._by_shard: dict[int, ShardClaims] = {}

    def __len__(self) -> int:
        return len(self._by_ticket)

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._by_ticket.values())

    def at(self, shard_id: int) -> ShardClaims:
        found = self._by_shard.get(shard_id)
        if found is None:
            found = self._by_shard[shard_id] = ShardClaims()
        return found

    def add(self, claim: Claim) -> None:
        """A ticket that is placed again has left its former shard."""
        self.end_ticket(claim.ticket)
        self._by_ticket[claim.ticket] = claim
        self.at(claim.shard_id).add(claim)

    def end(self, claim: Claim) -> None:
        del self._by_ticket[claim.ticket]
        self.at(claim.shard_id).remove(claim)

    def end_ticket(self, ticket: tuple[int, int]) -> None:
        claim = self._by_ticket.get(ticket)
        if claim is not None:
            self.end(claim)

    def end_refused(self, front: int, key: bytes, shards: Collection[int]) -> None:
        """The front brings the same request again: what it claimed at those shards is void."""
        if shards:
            claims = [claim for shard in shards for claim in self.at(shard).by_key.get(key, ())]
            for claim in claims:
                if claim.ticket[0] == front:
                    self.end(claim)

    def end_front(self, front: int) -> None:
        for claim in [claim for claim in self._by_ticket.values() if claim.ticket[0] == front]:
            self.end(claim)

    def end_shard(self, shard_id: int) -> None:
        at = self._by_shard.pop(shard_id, None)
        if at is not None:
            for claim in at:
                del self._by_ticket[claim.ticket]

    def expire(self, before: float) -> None:
        """End those made before that time."""
        while self._by_ticket:
            oldest = next(iter(self._by_ticket.values()))
            if oldest.made >= before:
                return
            self.end(oldest)

    def cover(self, shard_id: int, events: pb.Events) -> None:
        """The shard's news: who arrived, and which prefixes lie there now."""
        at = self._by_shard.get(shard_id)
        if at is None:
            return
        for started in events.started:
            claim = at.arrive(started.prompt_tokens)
            if claim is not None and not claim.digests:
                self.end(claim)
        if at.by_last:
            for digest in events.sealed:
                for claim in list(at.by_last.get(digest, ())):
                    self.end(claim)


class ShardClaims:
    """The claims on one shard and their sums.

    Attributes:
        samples, pages: of those that have not arrived.
        digests: that some claim will bring.
    """

    def __init__(self) -> None:
        self.samples = self.pages = 0
        self.digests = DigestSet()
        self._more: dict[int, int] = {}  # digest -> claims that will bring it, but for the first
        self.by_key: dict[bytes, dict[Claim, None]] = {}
        self.by_last: dict[int, dict[Claim, None]] = {}
        self._waiting: dict[int, dict[Claim, None]] = {}  # those that have not arrived, by prompt length

    def __iter__(self) -> Iterator[Claim]:
        return (claim for group in self.by_key.values() for claim in group)

    def add(self, claim: Claim) -> None:
        self.samples += claim.samples
        self.pages += claim.pages
        for digest in claim.digests:
            if not self.digests.add(digest):
                self._more[digest] = self._more.get(digest, 0) + 1
        _put(self.by_key, claim.key, claim)
        _put(self._waiting, claim.prompt_tokens, claim)
        if claim.digests:
            _put(self.by_last, claim.digests[-1], claim)

    def remove(self, claim: Claim) -> None:
        if not claim.arrived:
            self._arrived(claim)
        for digest in claim.digests:
            more = self._more.pop(digest, 0)
            if more > 1:
                self._more[digest] = more - 1
            elif not more:
                self.digests.discard(digest)
        _take(self.by_key, claim.key, claim)
        if claim.digests:
            _take(self.by_last, claim.digests[-1], claim)

    def arrive(self, prompt_tokens: int) -> Claim | None:
        """A sequence of that prompt length started. Whose it is only the front knows: the oldest claim of that length
        is as good as any."""
        waiting = self._waiting.get(prompt_tokens)
        if not waiting:
            return None
        claim = next(iter(waiting))
        self._arrived(claim)
        return claim

    def _arrived(self, claim: Claim) -> None:
        claim.arrived = True
        self.samples -= claim.samples
        self.pages -= claim.pages
        _take(self._waiting, claim.prompt_tokens, claim)


def _put(groups: dict[K, dict[Claim, None]], key: K, claim: Claim) -> None:
    groups.setdefault(key, {})[claim] = None


def _take(groups: dict[K, dict[Claim, None]], key: K, claim: Claim) -> None:
    group = groups[key]
    del group[claim]
    if not group:
        del groups[key]

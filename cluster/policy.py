"""Where a request runs: locality of prefixes first while that costs no balance, then load, then empty blocks.

Shared prefixes are followed only where the match is a good part of the prompt (every chat begins with the same few
template tokens) and only to a shard that is not far busier than the idlest: a popular prompt comes to lie on several
shards, as it should.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256

from cluster.claims import Claim, Claims
from cluster.view import ClusterView
from pagetable.errors import ConfigError
from pagetable.prefix_tree import link_digest, root_digest
from quire_pb.worker.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Attributes:
    max_prefix_pages: how far into a prompt locality looks; hashing a page takes about a microsecond.
    min_match: part of the prompt that must be there already before locality counts.
    max_lead: by what part of its seats (and two sequences in any case) a shard with the prefix may be busier than the
        idlest.
    claim_seconds: when a claim of which the shard never told is given up.
    """

    max_prefix_pages: int = 4096
    min_match: float = 0.25
    max_lead: float = 0.25
    claim_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.max_prefix_pages < 0:
            raise ConfigError("max_prefix_pages", self.max_prefix_pages, "be 0 (no locality) or more")
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(each.name, value, "be a number of at least 0")


class Prompt:
    """A prompt to be placed, and its page digests as far as anybody asked.

    Args:
        tokens: int32 little-endian, as in Place.
    """

    def __init__(self, tokens: bytes, salt: str, max_pages: int) -> None:
        self.tokens: array[int] = array("i")
        self.tokens.frombytes(tokens)
        self.key = sha256(salt.encode() + b"\0" + tokens).digest()
        self._salt, self._max_pages = salt, max_pages
        self._chains: dict[tuple[bytes, int], tuple[bytes, array[int]]] = {}  # last link, what is short of all of them

    def __len__(self) -> int:
        return len(self.tokens)

    def matched_pages(self, info: pb.ShardInfo, sealed: Collection[int], claimed: Collection[int]) -> int:
        """How many of its first pages lie on a shard, or will.

        Whoever claims a page brings all before it, too: where such a one was evicted since, it counts as on its way.
        """
        last = self._num_pages(info, len(self.tokens) - 1)  # the last token is computed in any case
        return self._first_absent(info, last, lambda digest: digest in sealed or digest in claimed)

    def unsealed(self, info: pb.ShardInfo, sealed: Collection[int]) -> array[int]:
        """Digests of its full pages that a shard does not hold yet, in order; uint64."""
        num_pages = self._num_pages(info, len(self.tokens))
        first = self._first_absent(info, num_pages, sealed.__contains__)
        return self._short(info, num_pages)[first:num_pages]

    def _first_absent(self, info: pb.ShardInfo, last: int, is_there: Callable[[int], bool]) -> int:
        """The first of its pages that is not there, or `last`. A page is never there without those before it (a prefix
        tree loses leaves only), so steps that double and then halve find it by a few look-ups and hash about twice the
        pages that are there."""

        def holds(index: int) -> bool:
            return is_there(self._short(info, index + 1)[index])

        low = probe = 0  # there: [0, low)
        while probe < last and holds(probe):
            low, probe = probe + 1, 2 * probe + 2
        high = min(probe, last)  # not there, or the end
        while low < high:
            middle = (low + high) // 2
            if holds(middle):
                low = middle + 1
            else:
                high = middle
        return low

    def _num_pages(self, info: pb.ShardInfo, num_tokens: int) -> int:
        return min(num_tokens // info.block_size, self._max_pages)

    def _short(self, info: pb.ShardInfo, num_pages: int) -> array[int]:
        """The first 8 bytes of each page's digest, uint64, for that many pages or more; shards of one model share the
        chain."""
        size = info.block_size
        chain = self._chains.get((info.identity, size))
        link, short = (root_digest(info.identity, self._salt), array("Q")) if chain is None else chain
        if len(short) < num_pages:
            for at in range(len(short) * size, num_pages * size, size):
                link = link_digest(link, self.tokens[at : at + size])
                short.append(int.from_bytes(link[:8], "little"))
            self._chains[info.identity, size] = link, short
        return short


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shard that may take the request, as the placement sees it.

    Attributes:
        matched: pages of the prompt that lie there, or will; match is their part of it.
        needed: blocks that the request would take there at first.
        available: blocks that are free or can be evicted, less what is claimed.
        empty: blocks that hold nothing.
        load: sequences that run, wait or are on their way.
        seats: sequences that can run at once.
    """

    shard_id: int
    matched: int
    match: float
    needed: int
    available: int
    empty: int
    load: int
    seats: int


def choose(candidates: Sequence[Candidate], samples: int, config: PolicyConfig) -> Candidate | None:
    """The shard for a request; None where there is no candidate."""
    if not candidates:
        return None
    roomy = [each for each in candidates if each.needed <= each.available and each.load + samples <= each.seats]
    if not roomy:  # it waits somewhere: where least is before it
        return min(candidates, key=lambda each: (each.load / each.seats, -each.matched, each.shard_id))
    idlest = min(each.load / each.seats for each in roomy)
    local = [
        each
        for each in roomy
        if each.matched
        and each.match >= config.min_match
        and each.load <= idlest * each.seats + max(2.0, config.max_lead * each.seats)
    ]
    if local:
        return min(local, key=lambda each: (-each.matched, each.load / each.seats, each.shard_id))
    return min(roomy, key=lambda each: (each.load / each.seats, -each.empty, each.shard_id))


class Placement:
    """Answers Place from what shards told and what they were promised.

    Args:
        claims: each placement leaves one.
    """

    def __init__(self, config: PolicyConfig, view: ClusterView, claims: Claims) -> None:
        self.config, self.view, self.claims = config, view, claims

    def place(self, front: int, ask: pb.Place, ready: Mapping[int, pb.ShardInfo], now: float) -> pb.Placed:
        """Where the request runs, or why nowhere.

        Args:
            ready: the shards that take requests now.
        """
        if not ask.prompt or len(ask.prompt) % 4:
            return _refusal(ask, "INVALID_ARGUMENT", f"prompt: got {len(ask.prompt)} bytes, must be int32 token ids")
        prompt = Prompt(ask.prompt, ask.cache_salt, self.config.max_prefix_pages)
        self.claims.end_ticket((front, ask.ticket))
        self.claims.end_refused(front, prompt.key, set(ask.exclude))
        if not ready:
            return _refusal(ask, "UNAVAILABLE", "no shard is ready; try again in a few seconds")
        total = len(prompt) + max(1, ask.max_tokens)
        wide = [info for info in ready.values() if total <= _room(info)]
        if not wide:
            return _too_large(ask, len(prompt), max(ready.values(), key=_room))
        samples = max(1, ask.samples)
        candidates = [self._candidate(info, prompt, samples) for info in wide if info.shard_id not in ask.exclude]
        found = choose(candidates, samples, self.config)
        if found is None:
            text = f"each of the {len(wide)} shards that could run this request has refused or lost it; try again later"
            return _refusal(ask, "UNAVAILABLE", text)
        info = ready[found.shard_id]
        self.claims.add(
            Claim(
                ticket=(front, ask.ticket),
                key=prompt.key,
                shard_id=found.shard_id,
                prompt_tokens=len(prompt),
                samples=samples,
                pages=found.needed,
                digests=prompt.unsealed(info, self.view.shards[found.shard_id].sealed),
                made=now,
            )
        )
        return pb.Placed(ticket=ask.ticket, placed=True, shard_id=info.shard_id, epoch=info.epoch, address=info.address)

    def _candidate(self, info: pb.ShardInfo, prompt: Prompt, samples: int) -> Candidate:
        view = self.view.shards[info.shard_id]
        claims, load = self.claims.at(info.shard_id), view.load
        matched = prompt.matched_pages(info, view.sealed, claims.digests)
        return Candidate(
            shard_id=info.shard_id,
            matched=matched,
            match=matched * info.block_size / len(prompt),
            needed=-(-len(prompt) // info.block_size) - matched + samples,
            available=load.free_blocks + load.cached_blocks - claims.pages,
            empty=load.free_blocks - claims.pages,
            load=load.running + load.waiting + claims.samples,
            seats=max(1, info.max_num_seqs),
        )


def _room(info: pb.ShardInfo) -> int:
    """Tokens that one sequence may hold there."""
    return min(info.max_model_len, info.num_blocks * info.block_size)


def _refusal(ask: pb.Place, code: str, message: str) -> pb.Placed:
    return pb.Placed(ticket=ask.ticket, code=code, message=message)


def _too_large(ask: pb.Place, length: int, widest: pb.ShardInfo) -> pb.Placed:
    pool = widest.num_blocks * widest.block_size
    text = (
        f"prompt: got {length} tokens, must with max_tokens {ask.max_tokens} be at most {_room(widest)}, which the "
        f"largest shard can hold (max_model_len {widest.max_model_len}, page pool {pool} tokens) (exceeds_pool); "
        "shorten it or lower max_tokens"
    )
    return _refusal(ask, "INVALID_ARGUMENT", text)

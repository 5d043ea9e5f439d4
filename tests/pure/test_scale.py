"""The global scheduler's tables at a size of thousands of pages a sequence: exact, small, and found by few look-ups.

benchmarks/scale.py times the same at full size.
"""

from __future__ import annotations

import math
import random
import tracemalloc
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import cluster.digest_set
from benchmarks.fleet import BLOCK_SIZE, FRONT, IDENTITY, Fleet, Kinds
from cluster.claims import Claim, ShardClaims
from cluster.digest_set import BUCKET_DIGESTS, DigestSet
from cluster.messages import FrontLeft, SendPlaced
from cluster.policy import Prompt
from cluster.view import ShardView
from pagetable.prefix_tree import extend_digests, root_digest
from quire_pb.worker.v1 import worker_pb2 as pb

MAX_DIGEST = (1 << 64) - 1

# spread as SHA-256 spreads them, or made alike in their first bits, which choose the bucket
digests = st.one_of(
    st.integers(0, MAX_DIGEST),
    st.integers(0, 40),
    st.integers(MAX_DIGEST - 40, MAX_DIGEST),
    st.builds(lambda top, low: top << 58 | low, st.integers(0, 63), st.integers(0, 3)),
)


class DigestSetMachine(RuleBasedStateMachine):
    """A DigestSet of tiny buckets beside a Python set."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.model = DigestSet(), set[int]()

    @initialize(first=st.lists(digests, max_size=200))
    def begin(self, first: list[int]) -> None:
        self.ours, self.model = DigestSet(first), set(first)

    @rule(digest=digests)
    def add(self, digest: int) -> None:
        assert self.ours.add(digest) is (digest not in self.model)
        self.model.add(digest)

    @rule(digest=digests)
    def discard(self, digest: int) -> None:
        assert self.ours.discard(digest) is (digest in self.model)
        self.model.discard(digest)

    @rule(some=st.lists(digests, max_size=60))
    def update(self, some: list[int]) -> None:
        self.ours.update(some)
        self.model.update(some)

    @rule(share=st.integers(0, 8))
    def lose_some(self, share: int) -> None:
        gone = [digest for digest in self.model if digest * 0x9E3779B97F4A7C15 % 8 < share]
        self.ours.difference_update(gone)
        self.model.difference_update(gone)

    @invariant()
    def equal(self) -> None:
        assert list(self.ours) == sorted(self.model) and len(self.ours) == len(self.model)
        model: object = self.model
        assert self.ours == model and model == self.ours
        assert all(digest in self.ours for digest in self.model)
        neighbours = {digest + step & MAX_DIGEST for digest in self.model for step in (-1, 1)}
        assert all((digest in self.ours) is (digest in self.model) for digest in neighbours)


@pytest.mark.parametrize("bucket", [1, 4, 16])
def test_a_digest_set_is_a_set(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.digest_set, "BUCKET_DIGESTS", bucket)
    machine = DigestSetMachine.TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    machine().runTest()


def random_digests(count: int) -> list[int]:
    return list(array("Q", random.Random(count).randbytes(8 * count)))


def test_a_digest_takes_nine_bytes_and_no_bucket_grows_with_the_set() -> None:
    some = random_digests(200_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    ours = DigestSet(some)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 8 * len(some) < taken < 9.5 * len(some)
    assert taken == pytest.approx(ours.num_bytes(), rel=0.02)
    sizes = [len(bucket) for bucket in ours._buckets]
    assert sum(sizes) == len(some) and max(sizes) < 4 * BUCKET_DIGESTS
    ours.difference_update(some[1000:])
    assert set(ours) == set(some[:1000]) and ours.num_bytes() < 64 * 1000


def test_one_add_moves_at_most_one_bucket() -> None:
    ours, most = DigestSet(), 0
    for digest in random_digests(20_000):
        before = {id(bucket): bucket for bucket in ours._buckets}
        ours.add(digest)
        most = max(most, sum(len(bucket) for bucket in ours._buckets if id(bucket) not in before))
    assert 0 < most < 4 * BUCKET_DIGESTS


@pytest.mark.parametrize("bad", [-1, 1 << 64])
def test_what_is_no_digest_is_not_added_and_not_found(bad: int) -> None:
    ours, word = DigestSet([0, MAX_DIGEST]), object()
    with pytest.raises(OverflowError, match="must be an unsigned 64-bit int"):
        ours.add(bad)
    assert bad not in ours and not ours.discard(bad) and word not in ours and list(ours) == [0, MAX_DIGEST]


# A fleet


def test_the_view_of_a_filled_fleet_is_exact_and_takes_eighteen_bytes_a_page() -> None:
    fleet = Fleet(3, num_shards=4)
    for target in (10, 700, 4096, 20_000, 1025, 64, 9000, 333):
        fleet.running.append(fleet.create(target))
    for sequence in fleet.running:
        events = pb.Events()
        fleet.start(events, sequence)
        fleet.tell(sequence.shard_id, events)
    fleet.grow([(sequence, fleet.digests(sequence)) for sequence in fleet.running])
    pages = sum(sequence.target for sequence in fleet.running)
    for shard_id, view in fleet.core.view.shards.items():
        mine = [sequence for sequence in fleet.running if sequence.shard_id == shard_id]
        assert {n: len(s.entries) for n, s in view.sequences.items()} == {s.number: s.target for s in mine}
        assert set(view.sealed) == {digest for sequence in mine for digest in fleet.digests(sequence)}
        devices = {device for s in view.sequences.values() for device, _ in s.pages()}
        assert devices == set(range(16 * shard_id, 16 * shard_id + 16))
    assert fleet.num_pages == pages and fleet.table_bytes() < 18 * pages


def test_after_every_kind_of_event_the_view_has_what_the_shards_have() -> None:
    fleet = Fleet(4, num_shards=4)
    fleet.fill(8)
    kinds = Kinds(fleet, 4)
    view = fleet.core.view

    def seen() -> dict[int, int]:
        return {number: len(s.entries) for shard in view.shards.values() for number, s in shard.sequences.items()}

    counts = {}
    for name in kinds.makers:
        assert all(spent > 0 for spent in kinds.run(name, 2))
        there = {s.number: s.num_pages for s in [*fleet.running, *kinds.short] if s.num_pages}
        assert seen() == there, name
        counts[name] = len(there)
    assert list(counts.values())[:8] == [10, 10, 10, 10, counts["preempted"], 10, 10, 8]
    assert counts["preempted"] < 10 and len(fleet.core.claims) == 0
    first = {s.number: s.num_pages for s in fleet.running if s.shard_id == 0}
    sealed = {digest for s in fleet.running if s.shard_id == 0 for digest in fleet.digests(s)}
    fleet.on(fleet.whole(0))
    assert {number: len(s.entries) for number, s in view.shards[0].sequences.items()} == first
    assert set(view.shards[0].sealed) == sealed


def test_one_requests_sequences_are_found_by_its_name() -> None:
    fleet = Fleet(5, num_shards=2)
    names = pb.Events(
        started=[
            pb.Started(sequence=1, request_id="a", owner="o", sample=0),
            pb.Started(sequence=2, request_id="a", owner="p", sample=1),
            pb.Started(sequence=3, request_id="b", owner="o"),
        ]
    )
    fleet.tell(1, names)
    view = fleet.core.view

    def found(owner: str, request_id: str) -> list[tuple[int, int]]:
        return [(shard_id, sequence.sample) for shard_id, sequence in view.sequences(owner, request_id)]

    assert (found("", "a"), found("p", "a"), found("o", "c")) == ([(1, 0), (1, 1)], [(1, 1)], [])
    fleet.tell(1, pb.Events(released=[2], started=[pb.Started(sequence=1, request_id="b", owner="o", sample=7)]))
    assert (found("", "a"), found("", "b"), len(found("", ""))) == ([], [(1, 7), (1, 0)], 2)
    fleet.tell(1, pb.Events(ended=[1, 3]))
    assert view.shards[1].of_request("b") == {} and not view.shards[1]._by_request


@given(held=st.sets(st.integers(0, 5)), turns=st.lists(st.integers(0, 5)))
def test_a_messages_digests_end_as_its_changes_do_one_after_the_other(held: set[int], turns: list[int]) -> None:
    view = ShardView(1)
    view.apply(pb.Events(epoch=1, number=1, whole=True, sealed=held))
    there, events = set(held), pb.Events(epoch=1, number=2)
    for digest in turns:  # a tree seals what it has not and forgets what it has
        (events.forgotten if digest in there else events.sealed).append(digest)
        there ^= {digest}
    view.apply(events)
    assert set(view.sealed) == there


# Prefixes


class Asked(DigestSet):
    """A set that counts who asks."""

    times = 0

    def __contains__(self, digest: object) -> bool:
        self.times += 1
        return super().__contains__(digest)


def chain(tokens: array[int], pages: int) -> list[int]:
    links: list[bytes] = []
    extend_digests(links, root_digest(IDENTITY), tokens, BLOCK_SIZE, pages)
    return [int.from_bytes(link[:8], "little") for link in links]


def page_tokens(pages: int) -> array[int]:
    return array("i", range(pages * BLOCK_SIZE))


INFO = pb.ShardInfo(block_size=BLOCK_SIZE, identity=IDENTITY)


@given(pages=st.integers(1, 70), sealed=st.integers(0, 70), claimed=st.integers(0, 70), most=st.integers(0, 70))
def test_doubling_and_halving_finds_what_looking_at_every_page_finds(
    pages: int, sealed: int, claimed: int, most: int
) -> None:
    tokens = page_tokens(pages)
    links = chain(tokens, pages)
    there, coming = DigestSet(links[:sealed]), DigestSet(links[sealed : sealed + claimed])
    prompt = Prompt(tokens.tobytes(), "", most)
    last = min(pages - 1, most)  # the last token is computed in any case
    assert prompt.matched_pages(INFO, there, coming) == min(last, sealed + claimed)
    assert prompt.unsealed(INFO, there) == array("Q", links[sealed : min(pages, most)])


def test_what_is_claimed_counts_with_the_pages_before_it_that_were_evicted() -> None:
    tokens = page_tokens(9)
    links = chain(tokens, 9)
    prompt = Prompt(tokens.tobytes(), "", 100)
    assert prompt.matched_pages(INFO, DigestSet(links[:1]), DigestSet(links[4:])) in (1, 8)
    assert prompt.matched_pages(INFO, DigestSet(), DigestSet(links[4:])) == 0  # the first page is looked at first
    assert list(prompt.unsealed(INFO, DigestSet(links[:1]))) == links[1:]


@pytest.mark.parametrize("there", [0, 1, 5, 100, 4095, 4096])
def test_a_long_prompt_costs_a_shard_few_look_ups_and_no_hash_too_many(there: int) -> None:
    tokens = page_tokens(4097)
    sealed, claimed = Asked(chain(tokens, there)), Asked()
    prompt = Prompt(tokens.tobytes(), "", 4096)
    assert prompt.matched_pages(INFO, sealed, claimed) == there
    assert sealed.times <= 2 * math.log2(there + 1) + 2 and claimed.times <= sealed.times
    assert len(prompt._short(INFO, 0)) <= 2 * there + 1


# Claims


def test_claims_that_share_digests_give_each_back_with_the_last_of_them() -> None:
    at = ShardClaims()

    def claim(number: int, *digests: int) -> Claim:
        return Claim((FRONT, number), b"%d" % number, 0, 9, 1, 2, array("Q", digests), 0.0)

    three = [claim(1, 5, 6, 7), claim(2, 5, 6), claim(3, 5, 8)]
    for each in three:
        at.add(each)
    assert set(at.digests) == {5, 6, 7, 8} and list(at) == three
    at.remove(three[0])
    assert set(at.digests) == {5, 6, 8}
    at.remove(three[2])
    assert set(at.digests) == {5, 6}
    at.remove(three[1])
    assert not at.digests and (at.samples, at.pages, list(at)) == (0, 0, []) and not at._more


def test_a_burst_of_long_prompts_claims_about_eighteen_bytes_a_page() -> None:
    fleet = Fleet(6, num_shards=2)
    kinds = Kinds(fleet, 6)
    fleet.on(kinds.place_long())  # what comes once is not counted
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(12):
        (sent,) = fleet.on(fleet.ask(kinds.tokens(4096)))
        assert isinstance(sent, SendPlaced) and sent.placed.placed
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(fleet.core.claims) == 13 and 17 < taken / (12 * 4096) < 19.5
    fleet.on(FrontLeft(FRONT))
    assert len(fleet.core.claims) == 0 and not any(at.digests for at in fleet.core.claims._by_shard.values())

"""The view of a shard equals the shard's own tables after every step (RELIABILITY D16)."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import pytest

from cluster.view import BrokenStream, ClusterView, ShardView
from pagetable.sampling import Request
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.simulation import Simulation
from worker.events import Journal, page_load, short_digest
from worker.plan import Plan

EPOCH = 7
Row = tuple[str, str, int, int, list[tuple[int, int]]]


class Shard:
    """A simulated shard that reports as a ShardServer does: after each plan and after each change from outside."""

    def __init__(self, seed: int, depth: int | None = None, **knobs: int) -> None:
        self.simulation = simulation = Simulation(seed, depth, **knobs)
        self.journal = Journal(simulation.scheduler, EPOCH)
        self.view = ClusterView()
        self.num_events = self.num_released = 0
        self.wholes = 0
        submit, add, fork = simulation.device.submit, simulation.scheduler.add, simulation.scheduler.fork

        def watched_submit(plan: Plan) -> None:
            self.journal.record(plan)
            self.report()
            submit(plan)

        def watched_add(request: Request, resumed: Mapping[int, array[int]] | None = None) -> None:
            self.name(request)
            add(request, resumed)

        def watched_fork(parent: str, sample: int, request: Request, num_outputs: int | None = None) -> None:
            self.name(request)
            fork(parent, sample, request, num_outputs)

        simulation.device.submit = watched_submit  # type: ignore[method-assign]
        simulation.scheduler.add = watched_add  # type: ignore[method-assign]
        simulation.scheduler.fork = watched_fork  # type: ignore[method-assign]

    def name(self, request: Request) -> None:
        self.journal.name(request.request_id, "user-" + request.request_id, request.cache_salt or "nobody")

    def connect(self) -> None:
        self.journal.begin()
        self.view.begin(0, EPOCH)
        self.wholes += 1
        self.report()

    def report(self) -> None:
        events = self.journal.take(page_load(self.simulation.pool))
        if events is None:
            return
        again = pb.Events.FromString(events.SerializeToString())
        self.num_events += 1
        self.num_released += len(again.released)
        assert self.view.apply(0, again)

    def step(self) -> None:
        self.simulation.step()
        self.report()

    def own_tables(self) -> dict[int, Row]:
        """What the ranks know, as of the last plan."""
        rows: dict[int, Row] = {}
        for sequence in self.simulation.scheduler.running:
            if sequence.num_sent >= 0:
                request = sequence.request
                rows[sequence.sequence_id] = (
                    "user-" + request.request_id,
                    request.cache_salt or "nobody",
                    sequence.sample_index,
                    len(request.prompt),
                    [(int(d), int(b)) for d, b in sequence.table.entries()[: sequence.num_sent]],
                )
        return rows

    def compare(self) -> None:
        view, pool = self.view.shards[0], self.simulation.pool
        assert tables(view) == self.own_tables(), f"after step {self.simulation.steps}"
        assert view.sealed == {short_digest(pool.tree.digest(page)) for page in pool.tree}
        assert (view.load.free_blocks, view.load.cached_blocks) == (pool.num_free, len(pool.order))


def tables(view: ShardView) -> dict[int, Row]:
    return {
        number: (s.request_id, s.owner, s.sample, s.prompt_tokens, list(s.pages()))
        for number, s in view.sequences.items()
    }


@pytest.mark.parametrize("seed", range(60))
def test_the_view_equals_the_shards_own_tables_after_every_step(seed: int) -> None:
    shard = Shard(seed)
    shard.connect()
    for _ in range(150):
        shard.step()
        shard.compare()
    assert shard.num_events > 150


@pytest.mark.parametrize("seed", range(60, 80))
def test_a_scheduler_that_connects_in_the_middle_hears_everything_at_once(seed: int) -> None:
    shard = Shard(seed)
    for step in range(200):
        shard.step()
        if step % 40 == 25:
            shard.connect()
            shard.compare()
        elif shard.wholes and step % 40 < 10:
            shard.compare()
        if step % 40 == 12 and shard.wholes:  # the scheduler is gone for a while
            shard.journal.stop()
            shard.view.drop(0)
            shard.wholes = 0


def test_the_seeds_reach_preemption_swaps_forks_and_cancels() -> None:
    released = preemptions = 0
    names = set()
    for seed in range(20):
        shard = Shard(seed, num_blocks=12, block_size=2, enable_prefix_caching=True)
        shard.connect()
        for _ in range(150):
            shard.step()
            shard.compare()
            names |= {row[0][5] for row in shard.own_tables().values()}
        released += shard.num_released
        preemptions += shard.simulation.scheduler.num_preemptions
    assert released > 50 and preemptions >= released
    assert names == {"r", "f", "m"}  # arrived, forked, resumed


def test_the_view_survives_steps_that_fail() -> None:
    failures = 0
    for seed in range(80, 110):
        shard = Shard(seed, depth=1)
        shard.connect()
        simulation = shard.simulation
        for step in range(150):
            shard.step()
            if step % 9 == 5:
                while simulation.scheduler.num_in_flight:
                    for output in simulation.scheduler.retire(simulation.device.finish()):
                        simulation.receive(output)
                plan = simulation.scheduler.schedule()
                if plan is not None:
                    shard.journal.record(plan)
                    for output in simulation.scheduler.abandon("the device is gone"):
                        simulation.receive(output)
                    failures += 1
                shard.report()
            shard.compare()
    assert failures > 200


# Messages by hand


def started(*numbers: int) -> list[pb.Started]:
    return [pb.Started(sequence=number, request_id=f"r{number}", owner="o", prompt_tokens=5) for number in numbers]


def events(number: int, **fields: object) -> pb.Events:
    return pb.Events(epoch=EPOCH, number=number, whole=number == 1, **fields)  # type: ignore[arg-type]


def fresh(**fields: object) -> ShardView:
    view = ShardView(EPOCH)
    view.apply(events(1, **fields))
    return view


def test_a_message_is_applied_as_released_started_entries_ended() -> None:
    view = fresh(
        started=started(1, 2),
        entry_sequence=[1, 1, 2],
        entry_index=[0, 1, 0],
        entry_device=[3] * 3,
        entry_block=[9, 8, 7],
    )
    view.apply(
        events(
            2,
            released=[1],
            started=started(1, 4),
            entry_sequence=[1, 2, 4],
            entry_index=[0, 0, 0],
            entry_device=[3, 0, 65535],
            entry_block=[1, 6, (1 << 24) - 1],
            ended=[2],
        )
    )
    assert {number: row[4] for number, row in tables(view).items()} == {1: [(3, 1)], 4: [(65535, (1 << 24) - 1)]}


def test_a_digest_that_comes_and_goes_within_one_message_ends_as_the_changes_say() -> None:
    view = fresh(sealed=[1, 2, 3])
    view.apply(events(2, sealed=[1, 4, 5], forgotten=[1, 4, 2]))  # 1 went and came, 4 came and went
    assert view.sealed == {1, 3, 5}
    view.apply(events(3, sealed=[1, 9, 9], forgotten=[1, 1, 9]))
    assert view.sealed == {3, 5, 9}


@pytest.mark.parametrize(
    "bad",
    [
        events(1),
        events(3),
        pb.Events(epoch=EPOCH, number=2, whole=True),
        events(2, entry_sequence=[1], entry_index=[0], entry_device=[0]),
        events(2, entry_sequence=[2], entry_index=[0], entry_device=[0], entry_block=[0]),
        events(2, entry_sequence=[1], entry_index=[1], entry_device=[0], entry_block=[0]),
        events(2, entry_sequence=[1], entry_index=[0], entry_device=[1 << 16], entry_block=[0]),
        events(2, entry_sequence=[1], entry_index=[0], entry_device=[0], entry_block=[1 << 24]),
    ],
    ids=["again", "gap", "whole", "lengths", "unknown", "hole", "device", "block"],
)
def test_what_cannot_follow_is_refused(bad: pb.Events) -> None:
    view = fresh(started=started(1))
    with pytest.raises(BrokenStream):
        view.apply(bad)


def test_another_life_changes_nothing() -> None:
    view = ClusterView()
    view.begin(0, EPOCH)
    assert view.apply(0, events(1, started=started(1)))
    old = pb.Events(epoch=EPOCH - 1, number=2, ended=[1])
    new = pb.Events(epoch=EPOCH + 1, number=1, whole=True)
    assert not view.apply(0, old) and not view.apply(0, new) and not view.apply(5, old)
    view.begin(0, EPOCH - 1)
    assert list(view.shards[0].sequences) == [1] and view.shards[0].epoch == EPOCH
    view.begin(0, EPOCH + 1)
    assert view.shards[0].sequences == {} and view.apply(0, new)

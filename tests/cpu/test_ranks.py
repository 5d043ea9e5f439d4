"""Epochs of a shard's ranks: how they begin, what ends them, what they leave. Ranks are threads here."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.peers import PeersBroken
from pagetable.errors import ConfigError
from pagetable.ids import PlanNumber
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.rank_threads import IDENTITY, SECRET, SIZES, Recorder, model, threads
from worker.channel import Channel
from worker.codec import plan_number
from worker.layout import Layout
from worker.loop import EpochOver
from worker.members import Members
from worker.model_config import ModelConfig
from worker.plan import Plan, StepResult
from worker.rank import Rank
from worker.ranks import Ranks, digest_with
from worker.segment import MESSAGE_BYTES, Segment, open_segment
from worker.segment import Plan as SegmentPlan
from worker.ways import Ways

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory by /proc")
SECONDS = 20.0
SOON = 1.0  # what ends an epoch is heard by then, wherever a rank waits
LAYOUTS = [Layout(2), Layout(1, 2), Layout(4, 1, 2), Layout(2, 3)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return model(tmp_path_factory.mktemp("model"))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fail(message: str, at: int) -> Callable[[Recorder, Plan], None]:
    """Raise in plan `at` of the first epoch."""

    def act(runner: Recorder, plan: Plan) -> None:
        if plan.number == at and len([each for each in runner.resets if each is not None]) == 1:
            raise ValueError(message)

    return act


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_gets_every_plan_in_order(layout: Layout, small: ModelConfig) -> None:
    with threads(small, layout) as it:
        assert it.ranks.begin(1) == 1
        assert [it.step(number) for number in range(5)] == [it.expected(number) for number in range(5)]
        assert all(runner.seen == list(range(5)) for runner in it.runners)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_whose_step_raises_ends_the_epoch_by_its_name_and_the_plan_and_all_are_ready_again(
    layout: Layout, small: ModelConfig
) -> None:
    last = layout.num_ranks - 1
    with threads(small, layout, {last: fail("no such page", 3)}) as it:
        it.ranks.begin(1)
        for number in range(3):
            it.step(number)
        with pytest.raises(EpochOver, match=rf"rank {last}: plan 3 failed \(ValueError: no such page\)"):
            for number in range(3, 9):
                it.step(number)
        assert it.ranks.begin(2) == 2
        assert [it.step(number) for number in range(20)] == [it.expected(number) for number in range(20)]
        assert all(rank.is_alive() for _, rank in it.followers.values())  # the same ones: nothing was started anew


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plans_of_any_length_come_in_their_turn(layout: Layout, small: ModelConfig) -> None:
    with threads(small, layout) as it:
        it.ranks.begin(1)
        for number in range(9):
            length = number % 3 * MESSAGE_BYTES // 8  # of int32: within a ring, and beyond it
            it.ranks.send(Plan(PlanNumber(number), tokens=array("i", range(length))))
            assert it.ranks.receive().tokens[0] == it.expected(number)
        assert all(runner.seen == list(range(9)) for runner in it.runners)


def test_plans_that_sockets_cannot_hold_go_out_while_those_before_run(small: ModelConfig) -> None:
    """A later stage reads no plan while it works on one, for which it waits for the stages before it."""
    with threads(small, Layout(1, 3)) as it:
        it.ranks.begin(1)
        for number in range(3):
            it.ranks.send(Plan(PlanNumber(number), tokens=array("i", bytes(32 << 20))))
        assert [it.ranks.receive().tokens[0] for _ in range(3)] == [it.expected(number) for number in range(3)]


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(2, 3)], ids=str)
def test_a_result_of_any_length_comes_in_its_turn(layout: Layout, small: ModelConfig) -> None:
    with threads(small, layout) as it:
        last = it.runners[layout.num_ranks - layout.tensor]
        run = last.run

        def explain(plan: Plan) -> StepResult | None:
            result = run(plan)
            assert result is not None
            result.failed = {0: "x" * (plan.number % 3 * MESSAGE_BYTES // 2)}
            return result

        last.run = explain  # type: ignore[method-assign]
        it.ranks.begin(1)
        for first in range(0, 12, layout.pipeline):
            numbers = range(first, first + layout.pipeline)
            for number in numbers:
                it.ranks.send(Plan(PlanNumber(number)))
            for number in numbers:
                found = it.ranks.receive()
                assert (found.number, found.tokens[0]) == (number, it.expected(number))
                assert len(found.failed[0]) == number % 3 * MESSAGE_BYTES // 2


def test_a_result_that_is_none_of_ours_ends_the_epoch(small: ModelConfig) -> None:
    with threads(small, Layout(1, 2)) as it:
        it.ranks.begin(1)
        ring = it.runners[1].group.results  # type: ignore[union-attr]
        assert ring is not None
        ring.put(0, b"hm")
        it.ranks.send(Plan(PlanNumber(0)))
        with pytest.raises(EpochOver, match="the last stage: a plan or result ends 22 bytes early"):
            it.ranks.receive()
        it.ranks.begin(2)
        assert it.step(0) == it.expected(0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_plan_that_a_rank_cannot_carry_out_ends_the_epoch_by_its_number(layout: Layout, small: ModelConfig) -> None:
    last = layout.num_ranks - 1
    with threads(small, layout) as it:
        runner = it.runners[last]
        run = runner.run_encoded

        def refuse(data: bytes) -> StepResult | None:
            if plan_number(data) == 1 and runner.resets == [1]:
                raise ValueError("no such slot")
            return run(data)

        runner.run_encoded = refuse  # type: ignore[method-assign]
        it.ranks.begin(1)
        it.step(0)
        with pytest.raises(EpochOver, match=rf"rank {last}: plan 1 failed \(ValueError: no such slot\)"):
            it.step(1)
        it.ranks.begin(2)
        assert it.step(1) == it.expected(1)


def test_a_leader_whose_step_raises_ends_the_epoch_by_its_name_and_the_plan(small: ModelConfig) -> None:
    with threads(small, Layout(2), {0: fail("no such page", 1)}) as it:
        it.ranks.begin(1)
        it.step(0)
        with pytest.raises(EpochOver, match="rank 0: plan 1 failed"):
            it.step(1)
        it.ranks.begin(2)
        assert it.step(1) == it.expected(1)


def test_ranks_that_got_other_plans_find_out_before_they_compute(small: ModelConfig) -> None:
    with threads(small, Layout(2)) as it:
        it.ranks.begin(1)
        it.step(0)
        it.ranks._digest = digest_with(b"a plan that nobody else got", it.ranks._digest)
        with pytest.raises(EpochOver, match="rank 1: the plans before this one are not those that the leader sent"):
            it.step(1)
        assert it.runners[1].seen == [0]
        it.ranks.begin(2)
        assert it.step(0) == it.expected(0)


def test_a_rank_of_another_identity_is_refused_with_the_reason_on_both_sides(
    small: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with threads(small, Layout(2), follow=False) as it:
        stranger = it.follow(1, b"another" + IDENTITY)
        until(lambda: len(it.fenced) >= 2)  # it comes again, and is told again
        why = "its model, layout or configuration is another than the leader's"
        assert set(it.fenced) == {why}
        assert sum(f"rank 1 is refused: {why}" in each for each in caplog.messages) == 1
        with pytest.raises(EpochOver, match=rf"epoch 1 cannot begin without rank 1 \({why}\)"):
            it.ranks.form(1, patience=0.2)
        stranger.stop()
        it.follow(1)
        it.ranks.begin(2)
        assert it.step(0) == it.expected(0)


def test_a_rank_that_is_not_there_is_named(small: ModelConfig) -> None:
    with threads(small, Layout(2, 2), follow=False) as it:
        it.follow(2)
        with pytest.raises(EpochOver, match=r"without rank 1 \(it has not come\), 3 \(it has not come\)"):
            it.ranks.form(1, patience=0.2)


def wait_in_exchange(runner: Recorder, plan: Plan) -> None:
    assert runner.group is not None and runner.group.tensor is not None
    runner.group.tensor.exchange(8)  # one more than anybody else


def wait_in_ring(runner: Recorder, plan: Plan) -> None:
    assert runner.group is not None and runner.group.previous is not None
    runner.group.previous.receive()


@pytest.mark.parametrize(
    ("layout", "act", "sent"),
    [
        (Layout(2), wait_in_exchange, True),
        (Layout(1, 2), wait_in_ring, True),  # the second receive is of a message that never comes
        (Layout(2), None, False),  # for a plan
    ],
    ids=["exchange", "ring", "plan"],
)
def test_a_rank_that_waits_leaves_at_once_when_the_epoch_ends(
    layout: Layout, act: Callable[[Recorder, Plan], None] | None, sent: bool, small: ModelConfig
) -> None:
    entered = threading.Event()

    def enter(runner: Recorder, plan: Plan) -> None:
        entered.set()
        if act is not None:
            act(runner, plan)

    with threads(small, layout, {1: enter}) as it:
        it.ranks.begin(1)
        if sent:
            it.ranks._broadcast.send(it.ranks._digest + _encoded(Plan(PlanNumber(0))))  # type: ignore[union-attr]
            assert entered.wait(SECONDS)
        began = time.monotonic()
        it.ranks.end("a test wants it")
        until(lambda: it.runners[1].resets[-1] is None and it.ranks._members.is_ready(1))
        assert time.monotonic() - began < SOON
        with pytest.raises(EpochOver, match="a test wants it"):
            it.ranks.check()
        assert it.overs == ["a test wants it"]


def _encoded(plan: Plan) -> bytes:
    from worker.codec import encode_plan

    return encode_plan(plan)


def test_a_leader_that_waits_is_told_at_once_when_a_rank_goes(small: ModelConfig) -> None:
    with threads(small, Layout(2), {1: lambda runner, plan: it.followers[1][0].stop()}) as it:
        it.ranks.begin(1)
        began = time.monotonic()
        with pytest.raises(EpochOver, match="rank 1"):
            it.step(0)
        assert time.monotonic() - began < SOON


def test_ranks_find_the_next_leader_at_the_same_port(small: ModelConfig) -> None:
    with threads(small, Layout(2, 2)) as it:
        for epoch in (7, 3):  # epochs are one leader's: the next may count from anywhere
            assert it.ranks.begin(epoch) == epoch
            assert it.step(0) == it.expected(0)
            it.ranks.close()
            it.ranks.leave()
            _, port = it.address
            it.lead(port)
        assert it.ranks.begin(1) == 1
        assert it.step(1) == it.expected(1)
        assert [each for each in it.runners[3].resets if each is not None] == [7, 3, 1]


def test_a_rank_of_two_lives_belongs_to_the_later_one(small: ModelConfig) -> None:
    """A process that was thought lost comes back: the epoch with the other one goes on at most until then."""
    with threads(small, Layout(2)) as it:
        it.ranks.begin(1)
        assert it.step(0) == it.expected(0)
        old, thread = it.followers[1]
        it.follow(1)
        with pytest.raises(EpochOver, match="rank 1 came anew"):
            for number in range(1, 10_000):
                it.step(number)
        old.stop()
        thread.join(SECONDS)
        epoch = it.ranks.begin(2)
        assert it.step(0) == it.expected(0) and epoch >= 2


@pytest.mark.parametrize("is_back", [False, True], ids=["lost", "anew"])
def test_a_rank_that_is_lost_before_it_can_form_costs_the_others_nothing(
    is_back: bool, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the one that has come anew by then."""
    monkeypatch.setattr("worker.members.LEAVE_SECONDS", 10 * SECONDS)  # or who counts as not ready is fenced then
    with threads(small, Layout(4)) as it:
        tell, lost = Members.tell, list[Rank]()

        def lose_one(members: Members, form: pb.Form) -> None:
            if not lost:
                rank, thread = it.followers[1]
                if is_back:
                    it.follow(1)
                rank.stop()
                thread.join(SECONDS)
                until(lambda: members.is_ready(1) == is_back and members._members.get(1) is not members._chosen[1])
                lost.append(rank)
            tell(members, form)

        monkeypatch.setattr(Members, "tell", lose_one)
        with pytest.raises(EpochOver, match="rank 1"):
            it.ranks.form(1, patience=SECONDS)
        it.ranks.leave()
        if not is_back:
            it.follow(1)
        it.ranks.form(2, patience=SECONDS)
        assert it.step(0) == it.expected(0)
        assert len(lost) == 1


def test_plans_of_an_epoch_that_is_over_are_refused(small: ModelConfig) -> None:
    with threads(small, Layout(2)) as it:
        it.ranks.begin(5)
        channel = Channel.dial(it.address, "1/4", SECRET)
        with pytest.raises(ConnectionError):
            channel.receive()
        assert it.step(0) == it.expected(0)


def test_a_step_that_runs_for_too_long_ends_its_epoch_and_the_rank_that_does_not_leave_is_fenced(
    small: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.members.PING_SECONDS", 0.05)
    monkeypatch.setattr("worker.members.HANG_SECONDS", 0.5)
    released = threading.Event()

    def hang(runner: Recorder, plan: Plan) -> None:
        if runner.resets == [1]:
            released.wait(SECONDS)

    with threads(small, Layout(4), {2: hang}) as it:
        it.ranks.step_seconds = 0.3
        it.ranks.begin(1)
        with pytest.raises(EpochOver, match="a step has run for more than 0 s"):
            it.step(0)
        it.ranks.leave()
        with pytest.raises(EpochOver, match=r"without rank 2 \(it has not come\)"):
            it.ranks.form(2, patience=2.0)
        assert it.fenced and set(it.fenced) == {"it has not left its epoch for 0 s"}
        released.set()
        it.ranks.begin(3)
        assert it.step(0) == it.expected(0)


def test_a_rank_that_answers_no_ping_is_gone(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.members.PING_SECONDS", 0.05)
    with threads(small, Layout(2)) as it:
        it.ranks.begin(1)
        rank, _ = it.followers[1]
        rank._hear = lambda kind, payload: None  # type: ignore[method-assign]
        until(lambda: it.overs != [])
        assert it.overs == ["rank 1 is gone (it has not answered for 0 s)"]


def test_a_leader_that_says_nothing_is_given_up(small: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host may have lost power: no connection ends."""
    monkeypatch.setattr("worker.rank.LEADER_SECONDS", 0.3)
    with threads(small, Layout(2)) as it:
        it.ranks.begin(1)
        assert it.runners[1].resets == [1]
        until(lambda: it.runners[1].resets[-1] is None)  # the leader's first ping comes after a second


class Counts:
    """What of this process could grow."""

    def __init__(self) -> None:
        gc.collect()
        self.files = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()
        maps = Path("/proc/self/maps").read_text().splitlines()
        self.shared = sum("memfd:quire" in line for line in maps)

    def __repr__(self) -> str:
        return f"{self.files} files, {self.threads} threads, {self.shared} mappings"


@pytest.mark.parametrize("layout", [Layout(4, 1, 2), Layout(2, 2)], ids=str)
def test_twenty_epochs_leave_no_file_thread_or_mapping(layout: Layout, small: ModelConfig) -> None:
    before = Counts()
    with threads(small, layout) as it:
        found = []
        for epoch in range(1, 21):
            assert it.ranks.begin(epoch) == epoch
            assert it.step(epoch) == it.expected(epoch)
            found.append(Counts())
            it.ranks.end("a test wants it")
        few = layout.num_ranks  # of an epoch, perhaps not gone yet: a leak would have twenty times as many
        assert max(each.threads for each in found) <= found[0].threads + few, found
        assert {each.shared for each in found} == {layout.num_ranks}, found
        assert max(each.files for each in found[1:]) <= found[0].files + few, found
    until(lambda: Counts().threads <= before.threads)
    after = Counts()
    assert (after.files, after.shared) == (before.files, before.shared)


def test_a_closed_leader_leaves_its_port_and_no_thread(small: ModelConfig) -> None:
    before = Counts()
    ranks = Ranks(Layout(2).part(small, 0), SIZES, IDENTITY, SECRET)
    host, port = ranks.listen("127.0.0.1", 0)

    def begin() -> None:
        with pytest.raises(EpochOver, match="cannot begin"):
            ranks.begin(1)

    waiting = threading.Thread(target=begin)
    waiting.start()
    ranks.close()
    waiting.join(SOON)
    assert not waiting.is_alive()
    until(lambda: Counts().threads == before.threads)
    again = socket.create_server((host, port))
    again.close()
    assert Counts().files == before.files


def test_parts_of_a_segment_do_not_overlap(small: ModelConfig) -> None:
    for layout in LAYOUTS:
        plan = SegmentPlan(layout, SIZES)
        places = sorted(plan._offsets.values())
        num_groups = layout.pipeline * ((layout.tensor > 1) + (layout.num_slices if layout.page > 1 else 0))
        num_rings = (layout.pipeline - 1) * layout.tensor + (layout.pipeline > 1) + layout.num_ranks - 1
        assert len(places) == len(set(places)) == num_groups + num_rings
        memory = open_segment((segment := Segment(plan.num_bytes)).path, plan.num_bytes)
        marks = torch.frombuffer(memory, dtype=torch.uint8)
        assert not marks.any() and len(marks) == plan.num_bytes
        for number, (start, end) in enumerate(zip(places, [*places[1:], plan.num_bytes], strict=True), 1):
            assert start % 4096 == 0 and not marks[start:end].any()
            marks[start:end] = number
        segment.close()


def test_a_segment_that_is_gone_cannot_be_opened() -> None:
    segment = Segment(100)
    path = segment.path
    open_segment(path, 100)
    segment.close()
    with pytest.raises(OSError):
        open_segment(path, 100)


def test_a_group_ends_all_waits_whoever_aborts(small: ModelConfig) -> None:
    """Of three that meet in vain, one aborts: all get PeersBroken, and so does who comes later."""
    with threads(small, Layout(4)) as it:
        it.ranks.begin(1)
        groups = [runner.group for runner in it.runners]
        peers = [group.tensor for group in groups if group is not None]  # ranks that leave their groups close them
        broken: list[int] = []

        def meet(rank: int) -> None:
            try:
                peers[rank].exchange(8)  # type: ignore[union-attr]
            except PeersBroken:
                broken.append(rank)

        waiting = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1, 2)]
        for each in waiting:
            each.start()
        time.sleep(0.05)
        assert broken == []
        groups[3].abort()  # type: ignore[union-attr]
        for each in waiting:
            each.join(SOON)
        meet(3)
        assert sorted(broken) == [0, 1, 2, 3]


@pytest.mark.parametrize(("field", "value"), [("collectives", "mpi"), ("table_broadcast", "pigeon")])
def test_ways_that_there_are_not_are_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got '{value}', must be one of auto, "):
        Ways(**{field: value})

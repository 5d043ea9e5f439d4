"""Followers: plain plans natively as they come through a ring, one behind the other, and what is left to Python."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import cpu
from kernels.peers import PeersBroken
from kernels.rank import DIGEST_BYTES, Progress
from tests.plan_rig import LAYOUTS, Books, Ends, Shard, plan_of, plan_of_a_row, said, three_layers
from worker.codec import decode_result, encode_plan, encode_result, plan_number
from worker.layout import Layout
from worker.plan import Plan, StepResult
from worker.ranks import NO_PLANS, digest_with
from worker.runner import Runner

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")

SECONDS = 60.0  # generous: only order is asserted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_layers(tmp_path_factory.mktemp("model"))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


class Follower(Thread):
    """A rank that takes plans from its ring, natively as long as it can, until its epoch is over.

    Attributes:
        received: numbers of the plans that native code left to the caller, in order.
        told: of those whose results it left to the caller.
    """

    def __init__(self, runner: Runner, ends: Ends) -> None:
        super().__init__(daemon=True)
        self._runner, self._ends = runner, ends
        self.progress = Progress(tells=runner.answers)
        self.received, self.told = list[int](), list[int]()
        self.start()

    @property
    def num_done(self) -> int:
        return self.progress.steps + len(self.received)

    def run(self) -> None:
        plans, results = self._ends.plans, self._ends.results
        assert plans is not None
        with contextlib.suppress(PeersBroken):
            while True:
                result = self._runner.follow(plans, self.progress)
                if result is not None:
                    self.told.append(result.number)
                else:
                    payload = plans.take()[1]
                    assert payload[:DIGEST_BYTES] == self.progress.digest
                    data = payload[DIGEST_BYTES:]
                    result = self._runner.run_encoded(data)
                    self.progress.digest = digest_with(data, self.progress.digest)
                    self.received.append(plan_number(data))
                if result is not None:
                    assert results is not None
                    results.put(result.number, encode_result(result))


class Followed:
    """A shard whose followers are sent their plans, and their leader."""

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype) -> None:
        self.shard = Shard(folder, layout, dtype)
        self.followers = [Follower(*each) for each in list(zip(self.shard.runners, self.shard.ends, strict=True))[1:]]
        self.digest, self._num_sent = NO_PLANS, 0

    def run(self, plan: Plan) -> StepResult:
        data = encode_plan(plan)
        for ring in self.shard.to_followers:
            ring.put(0, self.digest + data)
        self.digest, self._num_sent = digest_with(data, self.digest), self._num_sent + 1
        found = self.shard.runners[0].run(plan, data)
        if (results := self.shard.ends[0].results) is not None:
            found = decode_result(results.take()[1])
        assert found is not None
        return found

    def end(self) -> None:
        """Once all plans are done."""
        until(lambda: all(each.num_done == self._num_sent for each in self.followers))
        for ring, follower in zip(self.shard.to_followers, self.followers, strict=True):
            ring.abort()
            follower.join(SECONDS)
            assert not follower.is_alive()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_followers_take_one_plan_behind_the_other(layout: Layout, folder: Path) -> None:
    """Among others that native code leaves to them: equal results, tables, pages and digests."""
    followed, plain = Followed(folder, layout, torch.bfloat16), Shard(folder, layout, torch.bfloat16)
    books, others = Books(random.Random(9), layout), list[int]()
    for _ in range(80):
        plan, is_plain = books.plan()
        if not is_plain:
            others.append(plan.number)
        assert said(followed.run(plan)) == said(plain.run(plan, encoded=False))
    followed.end()
    assert followed.shard.state() == plain.state()
    assert followed.followers[-1].received == others and 20 < len(others) < 70
    for each in followed.followers:
        assert set(each.received) <= set(others)  # those before the last stage need not care who samples
        assert each.progress.digest == followed.digest and not each.told


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(2, 2, 2)], ids=str)
def test_a_follower_that_cannot_say_it_natively_leaves_the_result_to_its_caller(layout: Layout, folder: Path) -> None:
    followed, plain = Followed(folder, layout, torch.float32), Shard(folder, layout, torch.float32)
    books = Books(random.Random(5), layout)
    books.lengths[0], books.pages[0], books.greedy[0] = 0, [], True
    last = followed.followers[layout.num_ranks - layout.tensor - 1]
    for number in (1, 2, 3):
        plan = plan_of(number, layout)
        books._row(plan, 0, 1, samples=True)
        if number == 2:
            for runner in (*followed.shard.runners[: layout.tensor], *plain.runners[: layout.tensor]):
                runner.cache.pool.fill_(torch.nan)
        found = followed.run(plan)
        assert said(found) == said(plain.run(plan, encoded=False))
        assert bool(found.failed) == (number >= 2)
    followed.end()
    assert last.told == [2, 3] and last.progress.steps == 3 and last.progress.number == 3 and not last.progress.began


def test_what_is_no_plain_plan_is_left_in_the_ring(folder: Path) -> None:
    """One that is sent otherwise, one behind other plans than were sent, and bytes of any kind."""
    shard = Shard(folder, Layout(1, 2), torch.float32)
    runner, plans = shard.runners[1], shard.ends[1].plans
    assert plans is not None
    data, progress = encode_plan(plan_of_a_row(1, shard.layout)), Progress(tells=True)
    for tag, message in [(-1, b""), (0, b"1234567"), (0, b"1" * 8 + data), (0, NO_PLANS), (0, NO_PLANS + data[:-4])]:
        shard.to_followers[0].put(tag, message)
        assert runner.follow(plans, progress) is None
        assert plans.take() == (tag, message)
        assert (progress.digest, progress.steps, progress.began) == (NO_PLANS, 0, 0)


def test_a_follower_hears_that_the_epoch_is_over_and_says_at_which_plan(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    runner, plans, previous = shard.runners[1], shard.ends[1].plans, shard.ends[1].previous
    assert plans is not None and previous is not None
    progress = Progress(tells=True)
    shard.to_followers[0].put(0, NO_PLANS + encode_plan(plan_of_a_row(7, shard.layout)))
    previous.abort()
    with pytest.raises(PeersBroken, match="ring between two ranks"):
        runner.follow(plans, progress)
    assert progress.number == 7 and progress.steps == 0
    age = time.monotonic_ns() - progress.began
    assert 0 <= age < SECONDS * 1e9
    plans.abort()
    with pytest.raises(PeersBroken, match="ring between two ranks"):
        runner.follow(plans, progress)
    assert shard.ends[1].is_aborted


def test_a_follower_hears_signals_between_plans_that_are_all_plain(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    books, heard = Books(random.Random(5), shard.layout), list[int]()
    books.lengths[0], books.pages[0], books.greedy[0] = 0, [], True
    plans, results = shard.ends[1].plans, shard.ends[0].results
    assert plans is not None and results is not None

    def lead() -> None:
        digest, end = NO_PLANS, time.monotonic() + SECONDS
        for number in range(1, 10_000):
            plan = plan_of(number, shard.layout)
            plan.tokens.append(3)
            plan.slots.append(0)
            plan.query_start.append(1)
            plan.first_position.append(0)
            if number == 1:
                books._place(plan, 0, 0, 0)
            data = encode_plan(plan)
            shard.to_followers[0].put(0, digest + data)
            shard.runners[0].run(plan, data)
            results.take()
            digest = digest_with(data, digest)
            if number == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            if heard or time.monotonic() > end:
                break
        shard.to_followers[0].abort()

    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    leader, progress = Thread(target=lead), Progress(tells=True)
    try:
        leader.start()
        with pytest.raises(PeersBroken):
            shard.runners[1].follow(plans, progress)
        assert heard and 3 <= progress.steps < 9_999
    finally:
        leader.join(SECONDS)
        signal.signal(signal.SIGUSR1, before)


def test_a_follower_hears_signals_while_no_plan_comes(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    plans, heard = shard.ends[1].plans, list[int]()
    assert plans is not None

    def knock() -> None:
        end = time.monotonic() + SECONDS
        while not heard and time.monotonic() < end:
            os.kill(os.getpid(), signal.SIGUSR1)  # it may come before the wait begins
            time.sleep(0.05)
        plans.abort()

    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    knocking = Thread(target=knock)
    try:
        began = time.monotonic()
        knocking.start()
        with pytest.raises(PeersBroken):
            shard.runners[1].follow(plans, Progress())
        assert heard and time.monotonic() - began < SECONDS
    finally:
        knocking.join(SECONDS)
        signal.signal(signal.SIGUSR1, before)


@given(st.binary(min_size=8, max_size=8), st.binary(max_size=600))
def test_the_digest_is_the_one_that_python_makes(before: bytes, plan: bytes) -> None:
    library = cpu.library({"quire_digest": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int64)})
    found = library.quire_digest(int.from_bytes(before, "little"), plan, len(plan))
    assert found.to_bytes(8, "little") == digest_with(plan, before)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 255, 256, 257, 1 << 16])
def test_the_digest_is_right_at_the_ends_of_blocks(length: int) -> None:
    library = cpu.library({"quire_digest": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int64)})
    plan = random.Random(length).randbytes(length)
    assert library.quire_digest(7, plan, length).to_bytes(8, "little") == digest_with(plan, (7).to_bytes(8, "little"))

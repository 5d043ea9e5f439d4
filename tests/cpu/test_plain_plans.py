"""Plain plans in one native call each, and by the runner's own steps: equal tokens, failures, tables and pages."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import struct
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu
from kernels.peers import Peers, PeersBroken, Ring, SharedPeers
from kernels.rank import DIGEST_BYTES, Progress
from pagetable.errors import InvariantBroken
from pagetable.frames import BadFrame
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from tests.models import make_model
from worker.codec import decode_result, encode_plan, encode_result, plan_number
from worker.kv_cache import PagedKVCache
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.plan import Admit, Plan, StepResult, by_column
from worker.ranks import NO_PLANS, digest_with
from worker.runner import NOT_FINITE, Runner
from worker.sampler import Sampler
from worker.tables import TableMirror
from worker.weights import open_weights

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")

VOCAB, SLOTS, BLOCKS, SIZE = 331, 6, 64, 4
PLAN_BYTES = 8192
SECONDS = 60.0  # generous: only order is asserted
LAYOUTS = [Layout(), Layout(1, 2), Layout(1, 3), Layout(2), Layout(2, 2, 2)]


@dataclass
class Ends:
    """What a runner asks of its group."""

    tensor: Peers | None = None
    slice: Peers | None = None
    previous: Ring | None = None
    next: Ring | None = None
    results: Ring | None = None
    plans: Ring | None = None
    back: None = None
    owns_cores: bool = False
    is_aborted: bool = False

    def abort(self) -> None:
        self.is_aborted = True


class Shard:
    """All ranks of a layout in this process."""

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, *, owns_cores: bool = False) -> None:
        config = ModelConfig.from_folder(folder)
        parts = layout.parts(config)
        weights, tensor = open_weights(folder), layout.tensor
        self.layout, self.runners, self.ends = layout, list[Runner](), list[Ends]()
        rows = 64 * 64 * 4 * 2
        for part in parts:
            model = NativeModel(config, weights, dtype, cpu.Native(cpu.levels()[-1]), 1, part=part)
            cache = PagedKVCache(config, BLOCKS, SIZE, dtype, part)
            group = part.group if layout.page > 1 else None
            tables = TableMirror(SLOTS, BLOCKS, SIZE, column=part.stage, group=group)
            widths = tuple(len(each.vocab) for each in parts[:tensor])
            self.runners.append(Runner(model, cache, tables, Sampler(VOCAB, SLOTS, model.choose), part, widths))
            self.ends.append(Ends(owns_cores=owns_cores))
        for stage in range(layout.pipeline):
            first = stage * tensor
            if tensor > 1:
                size = SharedPeers.num_bytes(tensor, rows)
                memory = mmap.mmap(-1, size)
                for t in range(tensor):
                    self.ends[first + t].tensor = SharedPeers(memory, 0, t, tensor, rows)
                if layout.page > 1:
                    memory = mmap.mmap(-1, size)
                    for t in range(tensor):
                        self.ends[first + t].slice = SharedPeers(memory, 0, t, tensor, rows)
            for t in range(tensor if stage + 1 < layout.pipeline else 0):
                memory = mmap.mmap(-1, Ring.num_bytes(2, rows))
                self.ends[first + t].next = Ring(memory, 0, 2, rows)
                self.ends[first + t + tensor].previous = Ring(memory, 0, 2, rows)
        if layout.pipeline > 1:
            memory = mmap.mmap(-1, Ring.num_bytes(2, rows))
            for rank in (0, layout.num_ranks - tensor):
                self.ends[rank].results = Ring(memory, 0, 2, rows)
        self.to_followers = list[Ring]()
        for ends in self.ends[1:]:
            memory = mmap.mmap(-1, Ring.num_bytes(3, PLAN_BYTES))
            self.to_followers.append(Ring(memory, 0, 3, PLAN_BYTES))
            ends.plans = Ring(memory, 0, 3, PLAN_BYTES)
        for runner, ends in zip(self.runners, self.ends, strict=True):
            runner.reset(ends)  # type: ignore[arg-type]

    def run(self, plan: Plan, *, encoded: bool) -> StepResult:
        """All ranks' parts, natively where that can be or step by step; what the one that answers says."""

        def part(runner: Runner) -> StepResult | None:
            if encoded:
                return runner.run_encoded(encode_plan(plan))
            return runner.carry_out(runner.prepare(plan))

        with ThreadPoolExecutor(len(self.runners)) as threads:
            found = [each for each in threads.map(part, self.runners) if each is not None]
        if not found:
            assert encoded and self.ends[0].results is not None
            tag, data = self.ends[0].results.take()
            assert tag == plan.number
            found.append(decode_result(data))
        assert len(found) == 1
        return found[0]

    def state(self) -> list[Any]:
        """Tables and pages, as bits."""
        return [
            (runner.tables.tables.tolist(), runner.cache.pool.contiguous().view(torch.uint8).tolist())
            for runner in self.runners
        ]


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def plan_of(number: int, layout: Layout) -> Plan:
    columns = (by_column(layout.pipeline) for _ in range(3))
    names = ("table_blocks", "copy_sources", "copy_targets")
    return Plan(PlanNumber(number), **dict(zip(names, columns, strict=True)))


@dataclass
class Books:
    """Sequences in slots, and plans that advance them."""

    rng: random.Random
    layout: Layout
    lengths: dict[int, int] = field(default_factory=dict)  # by slot
    pages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # (group, block)
    greedy: dict[int, bool] = field(default_factory=dict)
    free: list[list[int]] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.free = [self.rng.sample(range(BLOCKS), BLOCKS) for _ in range(self.layout.page)]

    def plan(self) -> tuple[Plan, bool]:
        """A plan, and whether it is plain."""
        self.number += 1
        plan = plan_of(self.number, self.layout)
        is_plain = True
        for slot in [slot for slot, length in self.lengths.items() if length > 30]:
            del self.lengths[slot]
            for group, block in self.pages.pop(slot):
                self.free[group].insert(0, block)
        if len(self.lengths) < SLOTS and self.rng.random() < 0.4:
            slot = self.rng.choice([each for each in range(SLOTS) if each not in self.lengths])
            self.lengths[slot], self.pages[slot], self.greedy[slot] = 0, [], self.rng.random() < 0.85
            params = SamplingParams(temperature=0.0 if self.greedy[slot] else 0.8, seed=slot, ignore_eos=True)
            plan.admits.append(Admit(slot, SequenceId(self.number), 0, params, 1, array("i", (3,))))
            is_plain = False
        running = self.rng.sample(sorted(self.lengths), self.rng.randint(1, len(self.lengths))) if self.lengths else []
        for slot in running:
            count = self.rng.choice((1, 1, 1, 2, 7))
            samples = self.rng.random() < 0.8
            self._row(plan, slot, count, samples=samples)
            is_plain &= self.greedy[slot] or not samples
        if plan.tokens and self.rng.random() < 0.1:
            self._copy(plan, self.rng.choice(list(plan.slots)))
            is_plain = False
        return plan, is_plain and bool(plan.tokens)

    def _row(self, plan: Plan, slot: int, count: int, *, samples: bool) -> None:
        first = self.lengths[slot]
        plan.slots.append(slot)
        plan.first_position.append(first)
        plan.tokens.extend(self.rng.randrange(VOCAB) for _ in range(count))
        plan.query_start.append(len(plan.tokens))
        self.lengths[slot] = first + count
        while len(self.pages[slot]) * SIZE < first + count:
            group = self.rng.randrange(self.layout.page)
            self._place(plan, slot, len(self.pages[slot]), group)
        if samples:
            plan.sample_row.append(len(plan.tokens) - 1)
            plan.sample_slot.append(slot)
            plan.sample_position.append(first + count)

    def _place(self, plan: Plan, slot: int, index: int, group: int) -> int:
        block = self.free[group].pop()
        self.pages[slot][index:] = [(group, block), *self.pages[slot][index + 1 :]]
        plan.table_slot.append(slot)
        plan.table_index.append(index)
        plan.table_group.append(group)
        for column in plan.table_blocks:
            column.append(block)
        return block

    def _copy(self, plan: Plan, slot: int) -> None:
        group, source = self.pages[slot][0]
        target = self._place(plan, slot, 0, group)
        plan.copy_from.append(group)
        plan.copy_to.append(group)
        for sources, targets in zip(plan.copy_sources, plan.copy_targets, strict=True):
            sources.append(source)
            targets.append(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("model"),
        seed=3,
        vocab_size=VOCAB,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=150,
    )


def said(result: StepResult) -> tuple[int, list[int], dict[int, str]]:
    return result.number, result.tokens.tolist(), result.failed


def watch(runner: Runner) -> list[bool]:
    """Whether each plan from now on is carried out natively."""
    plain, seen = runner.plain, list[bool]()
    assert plain is not None
    run = plain.run

    def watched(data: bytes) -> array[int] | None:
        found = run(data)
        seen.append(found is not None)
        return found

    plain.run = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_a_plan_does_is_the_same_either_way(layout: Layout, dtype: torch.dtype, folder: Path) -> None:
    native, plain = Shard(folder, layout, dtype, owns_cores=True), Shard(folder, layout, dtype)
    books, tokens = Books(random.Random(8), layout), set[int]()
    seen, expected = [watch(runner) for runner in native.runners], list[bool]()
    for _ in range(60):
        plan, is_plain = books.plan()
        expected.append(is_plain)
        results = native.run(plan, encoded=True), plain.run(plan, encoded=False)
        assert said(results[0]) == said(results[1]) and not results[0].failed
        tokens.update(results[0].tokens)
    assert native.state() == plain.state()
    assert seen[-1] == expected  # those before the last stage need not care who samples
    assert sum(expected) > 10 and len(tokens) > 30
    assert all(sum(each) >= sum(expected) for each in seen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_row_that_is_not_finite_fails_alone(layout: Layout, folder: Path) -> None:
    shards = [Shard(folder, layout, torch.float32) for _ in range(2)]
    books = Books(random.Random(5), layout)
    for slot in range(3):
        books.lengths[slot], books.pages[slot], books.greedy[slot] = 0, [], True
    results = []
    for turn in range(2):
        plan = plan_of(turn + 1, layout)
        for slot in range(3):
            books._row(plan, slot, 5 if turn == 0 else 1, samples=True)
        if turn == 1:
            group, block = books.pages[1][0]
            for shard in shards:
                for runner in shard.runners[: layout.tensor]:
                    if layout.page == 1 or runner.tables.group == group:
                        runner.cache.pool[:, block] = torch.nan
        results = [shard.run(plan, encoded=encoded) for shard, encoded in zip(shards, (True, False), strict=True)]
        assert said(results[0]) == said(results[1])
    assert results[0].failed == {1: NOT_FINITE}
    assert [token < 0 for token in results[0].tokens] == [False, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_stage_asks_for_ahead_is_what_it_reads_first(threads: int, folder: Path) -> None:
    """Weights of its own, all of one piece of memory; as many as wanted, where they are so many."""
    config = ModelConfig.from_folder(folder)
    for part in Layout(1, 3).parts(config):
        model = NativeModel(
            config, open_weights(folder), torch.float32, cpu.Native(cpu.levels()[0]), threads, part=part
        )
        decoder = model.decoder
        address, count = decoder.first_weights(1 << 30)
        first = decoder.model.carried.gate_up if part.is_carrying else decoder.model.layers[0].qkv
        packed = [each for each in decoder._keep if isinstance(each, mmap.mmap)]
        places = [(torch.frombuffer(each, dtype=torch.uint8).data_ptr(), len(each)) for each in packed]
        assert address == first.packed and count > 0
        assert any(base <= address and address + count <= base + size for base, size in places)
        assert (count < 4 * first.depth * first.columns) == (threads > 1)
        assert decoder.first_weights(100) == (address, 100)


def test_only_a_rank_with_cores_of_its_own_asks_ahead(folder: Path) -> None:
    for owns_cores in (True, False):
        shard = Shard(folder, Layout(1, 3), torch.float32, owns_cores=owns_cores)
        asked = [each.previous.struct.ahead_bytes for each in shard.ends[1:] if each.previous is not None]
        assert [count > 0 for count in asked] == [owns_cores] * 2


def plan_of_a_row(number: int, layout: Layout) -> Plan:
    """The first three tokens of a sequence, and a sample of the last."""
    books = Books(random.Random(2), layout)
    books.lengths[0], books.pages[0], books.greedy[0] = 0, [], True
    plan = plan_of(number, layout)
    books._row(plan, 0, 3, samples=True)
    return plan


def test_hidden_rows_of_another_plan_break_the_epoch(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    plan = plan_of_a_row(5, shard.layout)
    shard.runners[0].run_encoded(encode_plan(plan))
    plan.number = PlanNumber(6)
    with pytest.raises(PeersBroken, match="hidden rows of plan 5 came for plan 6"):
        shard.runners[1].run_encoded(encode_plan(plan))
    assert shard.ends[1].is_aborted and not shard.ends[0].is_aborted


def test_hidden_rows_of_another_size_are_refused(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    plan = plan_of_a_row(1, shard.layout)
    ring = shard.ends[0].next
    assert ring is not None
    ring.slot()
    ring.publish(1 * 64, 12)
    with pytest.raises(ValueError, match="hidden rows: got 12 bytes for a step of 3 tokens, must be "):
        shard.runners[1].run_encoded(encode_plan(plan))
    ring.struct.capacity = 100
    with pytest.raises(ValueError, match="ring: a slot holds 100 bytes, hidden rows of a step of 3 tokens have "):
        shard.runners[0].run_encoded(encode_plan(plan))


@pytest.mark.parametrize("end", ["tensor", "previous", "next"])
def test_whoever_waits_hears_that_the_epoch_is_over(end: str, folder: Path) -> None:
    shard = Shard(folder, Layout(2, 2), torch.float32)
    plan = plan_of_a_row(1, shard.layout)
    rank = 2 if end == "previous" else 0
    getattr(shard.ends[rank], end).abort()
    with pytest.raises(PeersBroken, match="exchange of 2 ranks" if end == "tensor" else "ring between two ranks"):
        shard.runners[rank].run_encoded(encode_plan(plan))
    assert shard.ends[rank].is_aborted


def outcome(runner: Runner, data: bytes, *, natively: bool) -> Any:
    plain = runner.plain
    if not natively:
        runner.plain = None
    try:
        result = runner.run_encoded(data)
        return None if result is None else said(result)
    except (BadFrame, InvariantBroken, ValueError, IndexError) as error:
        return type(error), str(error)
    finally:
        runner.plain = plain


@pytest.fixture(scope="module")
def twins(folder: Path) -> Iterator[tuple[Shard, Shard]]:
    yield Shard(folder, Layout(), torch.float32), Shard(folder, Layout(), torch.float32)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_are_no_plan_or_no_right_one_get_the_same_answer(
    twins: tuple[Shard, Shard], data: st.DataObject
) -> None:
    books = Books(random.Random(data.draw(st.integers(0, 99))), Layout())
    for slot in range(3):
        books.lengths[slot], books.pages[slot], books.greedy[slot] = 0, [], True
    plan = plan_of(1, Layout())
    for slot in range(data.draw(st.integers(0, 3))):
        books._row(plan, slot, data.draw(st.integers(1, 5)), samples=data.draw(st.booleans()))
    words = bytearray(encode_plan(plan))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(words) // 4 - 1)) * 4
        struct.pack_into("<I", words, at, data.draw(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))))
    changed = bytes(words[: data.draw(st.sampled_from((len(words), len(words) - 1, len(words) // 2)))])
    for shard in twins:
        shard.runners[0].tables.tables.fill(-1)
    found = [
        outcome(twin.runners[0], changed, natively=natively)
        for twin, natively in zip(twins, (True, False), strict=True)
    ]
    assert found[0] == found[1]
    assert twins[0].runners[0].tables.tables.tolist() == twins[1].runners[0].tables.tables.tolist()


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


def test_a_plan_has_a_number_or_is_none() -> None:
    assert plan_number(encode_plan(Plan(PlanNumber(2**40)))) == 2**40
    with pytest.raises(BadFrame):
        plan_number(bytes(7))

"""Laws of several plans in flight: stages are filled, micro-batches are no smaller than they need be, nobody waits."""

from __future__ import annotations

import random
from array import array
from collections import deque
from typing import Any

import pytest

from pagetable.allocator import BlockAllocator
from pagetable.errors import ConfigError
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import State


class Pipeline:
    """A scheduler and stages that take a plan's time in equal parts; every sampled token is 7.

    Args:
        cost: of a plan, in the time that one of its tokens takes, beside its tokens.
        way: from a plan's end until the scheduler makes the next.
    """

    def __init__(
        self, num_stages: int, num_blocks: int = 8192, cost: float = 16, way: float = 0, **settings: Any
    ) -> None:
        options: dict[str, Any] = {"max_model_len": 40000, "num_stages": num_stages, **settings}
        config = ShardConfig(num_blocks=num_blocks, **options)
        pool = PagePool([[BlockAllocator(DeviceId(stage), num_blocks)] for stage in range(num_stages)])
        self.scheduler = ShardScheduler(config, pool)
        self.num_stages, self.cost, self.way = num_stages, cost, way
        self.ends: dict[int, float] = {}  # of plans, by number
        self.flight: deque[tuple[Plan, float]] = deque()  # with the time of its end
        self.free = [0.0] * num_stages  # when each stage is free
        self.now = 0.0
        self.plans: list[Plan] = []

    def add(self, name: str, prompt: int | list[int], max_tokens: int = 8, **params: Any) -> None:
        tokens = prompt if isinstance(prompt, list) else [len(self.scheduler.sequences()) + 1] * prompt
        self.scheduler.add(Request(name, tuple(tokens), SamplingParams(seed=0, max_tokens=max_tokens, **params), ()))

    def submit(self) -> Plan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            time = self.now
            if min(plan.tokens) < 0:
                time = max(time, self.ends[plan.number - self.num_stages])
            for stage in range(self.num_stages):
                time = max(time, self.free[stage]) + (plan.num_tokens + self.cost) / self.num_stages
                self.free[stage] = time
            self.ends[plan.number] = time
            self.flight.append((plan, time))
        return plan

    def retire(self) -> None:
        plan, end = self.flight.popleft()
        self.now = end + self.way
        self.scheduler.retire(StepResult(plan.number, array("i", [7] * len(plan.sample_row))))

    def step(self) -> None:
        """Fill the stages, then wait for the first plan."""
        while self.submit() is not None:
            pass
        self.retire()

    def run(self) -> float:
        while self.scheduler.has_work:
            self.step()
        while self.flight:
            self.retire()
        return self.now

    def decodes(self) -> None:
        """Until all sequences decode and none of them is new."""
        while any(s.state is not State.DECODE for s in self.scheduler.sequences()):
            self.step()
        for _ in range(2 * self.num_stages):
            self.step()


def rows(plan: Plan) -> int:
    return len(plan.slots)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_no_more_plans_are_in_flight_than_there_are_stages(num_stages: int) -> None:
    pipe = Pipeline(num_stages)
    pipe.add("long", 4000)
    plans = [pipe.submit() for _ in range(num_stages)]
    assert all(plans) and pipe.submit() is None and pipe.scheduler.num_in_flight == num_stages
    pipe.retire()
    assert pipe.submit() is not None


def test_a_number_of_stages_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_stages: got 0, must be at least 1"):
        ShardConfig(num_blocks=100, max_model_len=100, num_stages=0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_made_ahead_a_plan_more_is_in_flight(num_stages: int) -> None:
    pipe = Pipeline(num_stages, async_scheduling=True)
    pipe.add("long", 4000)
    plans = [pipe.submit() for _ in range(num_stages + 1)]
    assert all(plans) and pipe.submit() is None
    pipe.retire()
    assert pipe.submit() is not None


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("sequences", [12, 24])
def test_made_ahead_plans_do_not_wait_for_the_scheduler(num_stages: int, sequences: int) -> None:
    """A round of decodes takes what the stages take; where plans wait for tokens, the way back comes to it."""
    took = {}
    for ahead in (False, True):
        pipe = Pipeline(num_stages, way=5, async_scheduling=ahead)
        for i in range(sequences):
            pipe.add(f"s{i}", 20, max_tokens=400)
        pipe.decodes()
        began, plans = pipe.now, len(pipe.plans)
        while len(pipe.plans) < plans + 40 * num_stages:
            pipe.step()
        took[ahead] = (pipe.now - began) / 40
        opened = [min(plan.tokens) < 0 for plan in pipe.plans[plans:]]
        assert all(opened) if ahead else not any(opened)
    assert took[True] == pytest.approx(sequences / num_stages + pipe.cost, rel=0.06)
    assert took[False] >= took[True] + 4


@pytest.mark.parametrize("num_stages", [2, 3])
def test_nothing_waits_for_a_token_that_comes_late(num_stages: int) -> None:
    """A lone decode is not taken by plans that would wait for it, beside prompts that need not."""
    pipe = Pipeline(num_stages, async_scheduling=True, max_num_batched_tokens=512)
    pipe.add("decode", 20, max_tokens=200)
    pipe.decodes()
    pipe.add("prompt", 8000)
    for _ in range(12):
        pipe.step()
    named = [plan.number for plan in pipe.plans if min(plan.tokens) < 0]
    assert len(named) > 3
    for number in named:
        earlier = [plan for plan in pipe.plans if plan.number < number and len(plan.sample_row)]
        assert earlier[-1].number <= number - num_stages


def test_the_next_chunk_is_planned_while_the_one_before_is_in_flight() -> None:
    pipe = Pipeline(3)
    pipe.add("long", 4000)
    for _ in range(3):
        pipe.submit()
    chunks = [(plan.first_position[0], plan.num_tokens) for plan in pipe.plans]
    assert [start for start, _ in chunks] == [0, chunks[0][1], chunks[0][1] + chunks[1][1]]
    assert all(count % 16 == 0 for _, count in chunks)


def test_decodes_are_dealt_over_the_plans_in_equal_parts() -> None:
    for num_stages, running, parts in ((2, 16, [8, 8]), (3, 16, [6, 6, 4]), (4, 6, [2, 2, 2]), (2, 128, [64, 64])):
        pipe = Pipeline(num_stages, num_blocks=16384)
        for i in range(running):
            pipe.add(f"r{i}", 20, max_tokens=100)
        pipe.decodes()
        start = len(pipe.plans)
        for _ in range(12):
            pipe.step()
        found = [rows(plan) for plan in pipe.plans[start:]]
        assert all(sorted(found[i : i + len(parts)]) == sorted(parts) for i in range(len(found) - len(parts)))


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_fewer_decodes_than_stages_are_one_a_plan(num_stages: int) -> None:
    pipe = Pipeline(num_stages)
    for i in range(num_stages - 1):
        pipe.add(f"r{i}", 20, max_tokens=50)
    pipe.decodes()
    start = len(pipe.plans)
    for _ in range(10):
        pipe.step()
    assert {rows(plan) for plan in pipe.plans[start:]} == {1} and pipe.scheduler.num_in_flight == num_stages - 2


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_decodes_take_turns(num_stages: int, seed: int, ends: bool) -> None:
    """With pages for all, however many retire in between: those ready for longest come first, and the oldest of all.
    While none ends, each is in one of as many plans as there are stages."""
    rng = random.Random(seed)
    pipe = Pipeline(num_stages, num_blocks=600, max_num_seqs=40, max_model_len=600)
    waited: dict[int, int] = {}
    names = most = 0
    for _ in range(300):
        if rng.random() < 0.3 and len(pipe.scheduler.sequences()) < 30:
            names += 1
            length = rng.randrange(1, 40) if ends else 400
            pipe.add(f"r{names}", rng.randrange(1, 60), max_tokens=length, n=rng.choice([1, 1, 3]))
        oldest = pipe.scheduler._oldest()
        ready = [s for s in pipe.scheduler.running if s.state is State.DECODE and not s.pending]
        turns = {s.sequence_id: (s.last_plan, s.order) for s in ready}
        plan = pipe.submit() if rng.random() < 0.7 else None
        if plan is not None:
            rows_of = pipe.scheduler._in_flight[plan.number].rows
            assert oldest is not None and (oldest not in ready or oldest.sequence_id in rows_of)
            taken = [turn for s, turn in turns.items() if s in rows_of and s != oldest.sequence_id]
            left = [turn for s, turn in turns.items() if s not in rows_of]
            assert not taken or not left or max(taken) < min(left), "somebody lost his turn"
            waited = {s: waited.get(s, 0) + 1 for s in turns if s not in rows_of}
            most = max(most, *waited.values(), 0)
            assert ends or most < num_stages, f"passed over by {most} plans"
        elif pipe.flight:
            pipe.retire()
            pipe.scheduler.check()
    assert most >= num_stages - 1, "none had to wait: the load is too small"


def test_rows_of_similar_length_are_neighbours_in_every_part() -> None:
    pipe = Pipeline(2)
    for i, length in enumerate([500, 20, 300, 18, 90, 700, 40, 900]):
        pipe.add(f"r{i}", [i + 1] * length, max_tokens=50)
    pipe.decodes()
    start = len(pipe.plans)
    for _ in range(8):
        pipe.step()
    for plan in pipe.plans[start:]:
        pages = [position // 16 for position in plan.first_position]
        assert rows(plan) == 4 and pages == sorted(pages)


@pytest.mark.parametrize(("num_stages", "least"), [(2, 1.88), (3, 2.70), (4, 3.45)])
def test_long_prompts_fill_the_stages(num_stages: int, least: float) -> None:
    def time(stages: int) -> float:
        pipe = Pipeline(stages)
        for i in range(8):
            pipe.add(f"r{i}", [i + 1] * 2048, max_tokens=1)
        return pipe.run()

    assert time(1) / time(num_stages) >= least


@pytest.mark.parametrize("length", [64, 300, 2048, 16384])
def test_a_lone_prompt_is_cut_about_as_well_as_can_be(length: int) -> None:
    def time(piece: int) -> float:
        pipe = Pipeline(2, max_num_seqs=16, max_num_batched_tokens=piece)
        pipe.scheduler._stages.prompt_tokens = lambda prefills, waiting, most: most  # type: ignore[method-assign]
        pipe.add("lone", length, max_tokens=1)
        return pipe.run()

    best = min(time(piece) for piece in range(32, 4096, 32))
    cut = Pipeline(2)
    cut.add("lone", length, max_tokens=1)
    assert cut.run() <= 1.05 * best


def test_one_stage_takes_prompts_as_big_as_the_budget() -> None:
    pipe = Pipeline(1)
    pipe.add("long", 5000)
    pipe.run()
    assert [plan.num_tokens for plan in pipe.plans[:3]] == [2048, 2048, 904]


def test_the_stages_are_busy_while_decodes_run() -> None:
    """P stages do the work of one rank in a P-th of the time, less the fill at the ends, where a plan's own cost is
    none; where it is all, they gain nothing and lose nothing."""
    for cost, least in ((0.0, 1.9), (1000.0, 0.98)):
        times = []
        for num_stages in (1, 2):
            pipe = Pipeline(num_stages, cost=cost)
            for i in range(32):
                pipe.add(f"r{i}", 16, max_tokens=200)
            times.append(pipe.run())
        assert times[0] / times[1] >= least


def test_a_sequence_waits_for_the_token_of_its_own_plan_only() -> None:
    pipe = Pipeline(2)
    pipe.add("a", 20, max_tokens=30)
    pipe.add("b", 20, max_tokens=30)
    pipe.decodes()
    while pipe.submit() is not None:
        pass
    first, second = (plan.slots[0] for plan, _ in pipe.flight)
    assert first != second
    pipe.retire()
    plan = pipe.submit()
    assert plan is not None and list(plan.slots) == [first], "the other one's plan is still in flight"

"""Laws of the ShardScheduler, on counts alone: each test's name states one."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from pagetable.allocator import BlockAllocator
from pagetable.errors import AlreadyExists, ConfigError, InvalidRequest, NotFound, Overloaded, WrongState
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import FinishReason, State, TokenOutput


class Shard:
    """A scheduler whose every sampled token is 7, and a count of steps."""

    def __init__(self, num_blocks: int = 4096, **settings: Any) -> None:
        config = ShardConfig(num_blocks=num_blocks, **{"max_model_len": min(num_blocks * 16, 40000), **settings})
        self.scheduler = ShardScheduler(config, PagePool([[BlockAllocator(DeviceId(0), num_blocks)]]))
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.steps = 0
        self.plans: list[Plan] = []

    def add(self, name: str, prompt: int | list[int], max_tokens: int = 8, salt: str = "", **params: Any) -> None:
        tokens = prompt if isinstance(prompt, list) else list(range(prompt))
        self.scheduler.add(
            Request(name, tuple(tokens), SamplingParams(seed=0, max_tokens=max_tokens, **params), (), salt)
        )

    def schedule(self) -> Plan:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.plans.append(plan)
        return plan

    def retire(self, plan: Plan) -> list[TokenOutput]:
        self.steps += 1
        outputs = self.scheduler.retire(StepResult(plan.number, array("i", [7] * len(plan.sample_row))))
        for output in outputs:
            if output.token is not None:
                self.first.setdefault(output.request_id, self.steps)
            if output.finish_reason:
                self.last[output.request_id] = self.steps
        self.scheduler.check()
        return outputs

    def step(self) -> list[TokenOutput]:
        return self.retire(self.schedule())

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def state(self, name: str, sample: int = 0) -> State:
        return self.scheduler._find(name, sample).state

    def tokens(self, name: str) -> int:
        return len(self.scheduler._find(name, 0).tokens)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    shard = Shard()
    shard.add("decode", 20, max_tokens=200)
    shard.step()
    shard.add("long", list(range(1000, 33768)), max_tokens=2)
    shard.step()
    shard.add("short", 32, salt="own")
    came = shard.steps
    while "long" not in shard.first:
        before = shard.tokens("decode")
        shard.step()
        assert shard.tokens("decode") == before + 1, "a running decode lost a step"
    assert shard.first["short"] - came <= 4
    assert shard.first["long"] - shard.first["short"] >= 10, "the long prompt was to be still in progress"


@pytest.mark.parametrize("prompt", [32, 100, 400])
def test_equal_requests_finish_together(prompt: int) -> None:
    shard = Shard(num_blocks=8192)
    for i in range(64):
        shard.add(f"r{i}", [i + 1] * prompt, max_tokens=128)
    shard.run()
    assert (max(shard.last.values()) - min(shard.last.values())) / max(shard.last.values()) <= 0.10


def test_prompts_in_progress_share_the_budget_in_equal_parts() -> None:
    shard = Shard(max_num_batched_tokens=512, max_num_seqs=8)
    for i in range(4):
        shard.add(f"r{i}", [i + 1] * 1000)
    plan = shard.schedule()
    counts = [b - a for a, b in zip(plan.query_start, plan.query_start[1:], strict=False)]
    assert counts == [128, 128, 128, 128]


def test_at_most_so_many_prompts_are_in_progress_and_short_ones_pass() -> None:
    shard = Shard(max_num_batched_tokens=512, max_num_seqs=64, max_num_partial_prefills=2)
    for i in range(4):
        shard.add(f"long{i}", [i + 1] * 2000)
    shard.add("short", [9] * 40)
    shard.step()
    partial = [s.request.request_id for s in shard.scheduler.running if s.state is State.PREFILL]
    assert partial == ["long0", "long1"]
    shard.step()
    assert "short" in shard.first


def test_of_prompts_that_came_together_short_ones_begin_first() -> None:
    shard = Shard(max_num_batched_tokens=512, max_num_seqs=64)
    lengths = [40 + 32 * ((7 * i) % 32) for i in range(32)]
    for i, length in enumerate(lengths):
        shard.add(f"r{i}", [i + 1] * length, max_tokens=2)
    while len(shard.first) < 16:
        shard.step()
    computed = sum(plan.num_tokens for plan in shard.plans)
    assert computed < 0.4 * sum(lengths), "in the order of arrival it would be half, and more with equal parts"
    shard.run()
    order = sorted(
        range(1, 32), key=lambda i: (shard.first[f"r{i}"], lengths[i])
    )  # the oldest, r0, advances in any case
    assert [lengths[i] for i in order[:8]] == sorted(lengths[1:])[:8]


@pytest.mark.parametrize("length", [100, 300, 900])
def test_a_prompt_is_passed_only_as_long_as_its_length_says(length: int) -> None:
    """An endless stream of prompts half as long, more than the shard can compute, behind an oldest that never ends."""
    shard = Shard(num_blocks=8192, max_num_batched_tokens=256, max_num_seqs=64, max_num_partial_prefills=1)
    shard.add("oldest", 16, max_tokens=4000)
    shard.add("busy", [1] * 2000, max_tokens=2)  # takes the only place of a prompt in progress
    shard.step()
    shard.add("long", [2] * length, max_tokens=2)
    start = sum(plan.num_tokens for plan in shard.plans)
    came: dict[str, int] = {}
    while "long" not in shard.first:
        computed = sum(plan.num_tokens for plan in shard.plans) - start
        for _ in range(8):
            name = f"short{len(came)}"
            shard.add(name, [3 + len(came)] * (length // 2), max_tokens=2)
            came[name] = computed
        shard.step()
    passed = [came[name] for name in shard.first if name in came and shard.first[name] < shard.first["long"]]
    assert passed, "shorter ones were to pass it"
    assert max(passed) <= 8 * (length - length // 2)
    assert max(came.values()) > max(passed) + 256, "more were to come"


def test_rows_of_similar_length_are_neighbours() -> None:
    shard = Shard()
    for i, length in enumerate([500, 20, 300, 18, 90, 700]):
        shard.add(f"r{i}", [i + 1] * length)
    shard.step()
    plan = shard.schedule()
    pages = [position // 16 for position in plan.first_position]
    assert pages == sorted(pages) and len(set(pages)) == 5


def test_identical_prefixes_in_flight_are_computed_once() -> None:
    shard = Shard(max_num_batched_tokens=512, max_num_seqs=64)
    prefix = list(range(1024))
    for i in range(32):
        shard.add(f"r{i}", [*prefix, 5000 + i], max_tokens=1)
    shard.run()
    computed = sum(plan.num_tokens for plan in shard.plans)
    assert computed == 1024 + 32
    assert shard.steps == 3  # 1056 tokens in steps of 512


def test_followers_go_on_where_the_first_one_was_cancelled() -> None:
    shard = Shard(max_num_batched_tokens=80, max_num_seqs=4)
    prefix = list(range(320))
    shard.add("first", [*prefix, 1])
    plan = shard.schedule()
    shard.add("second", [*prefix, 2])
    shard.scheduler.cancel("first")
    shard.retire(plan)
    shard.run()
    assert sum(plan.num_tokens for plan in shard.plans) == 321 + 7
    assert shard.last.keys() == {"second"}


def test_samples_share_the_prompt_and_copy_its_partial_page_but_once_less_than_they_are() -> None:
    shard = Shard()
    shard.add("r", 40, n=4)
    first = shard.step()
    assert [output.sample_index for output in first] == [0, 1, 2, 3]
    assert shard.scheduler.pool.num_used == 3
    plan = shard.schedule()
    assert len(plan.copy_sources[0]) == 3 and len(set(plan.copy_sources[0])) == 1
    shard.retire(plan)
    assert shard.scheduler.pool.num_used == 6
    tables = [list(s.table.pages) for s in shard.scheduler.running]
    assert len({tuple(table[:2]) for table in tables}) == 1 and len({table[2] for table in tables}) == 4


def test_samples_without_a_slot_wait_and_match_the_prompt() -> None:
    shard = Shard(max_num_seqs=2)
    shard.add("r", 40, n=4)
    shard.step()
    assert [shard.state("r", i) for i in range(4)] == [State.DECODE, State.DECODE, State.WAIT, State.WAIT]
    shard.run()
    assert sum(plan.num_tokens for plan in shard.plans) == 40 + 2 * 7 + 2 * (8 + 7)


def test_samples_outlive_a_first_sample_that_ended_before_the_prompt_was_computed() -> None:
    shard = Shard(max_num_batched_tokens=40, max_num_seqs=4)
    shard.add("r", 100, n=3)
    shard.step()
    assert shard.state("r", 1) is State.FORK
    shard.scheduler.finish("r", 0, FinishReason.CANCELLED)
    assert [shard.state("r", i) for i in (1, 2)] == [State.WAIT, State.WAIT]
    shard.run()
    assert not shard.scheduler.has_work


def test_a_cancel_gives_pages_back_when_the_plan_in_flight_retires() -> None:
    shard = Shard(enable_prefix_caching=False)
    shard.add("r", 100)
    plan = shard.schedule()
    shard.scheduler.cancel("r")
    assert shard.scheduler.pool.num_used == 7
    shard.retire(plan)
    assert shard.scheduler.pool.num_used == 0 and shard.scheduler.pool.num_available == 4096


def test_the_oldest_advances_in_every_step_of_an_overload() -> None:
    shard = Shard(num_blocks=24, max_num_batched_tokens=64, max_num_seqs=16, max_model_len=300)
    for i in range(30):
        shard.add(f"r{i}", [i + 1] * (20 + 7 * i), max_tokens=60)
    progress = (-1, -1)
    while (oldest := shard.scheduler._oldest()) is not None:
        now = (oldest.order[0], len(oldest.tokens) + oldest.num_computed)
        assert now > progress
        progress = now
        shard.step()
    assert len(shard.last) == 30


def test_nothing_is_preempted_more_often_than_allowed() -> None:
    shard = Shard(num_blocks=30, max_num_batched_tokens=64, max_num_seqs=16, max_model_len=300, max_preemptions=2)
    sequences = []
    for i in range(30):
        shard.add(f"r{i}", [i + 1] * 17, max_tokens=100)
        sequences.append(shard.scheduler._find(f"r{i}", 0))
    shard.run()
    assert shard.scheduler.num_preemptions > 5
    assert max(s.preemptions for s in sequences) <= 2 and sequences[0].preemptions == 0


def test_a_share_of_the_pool_is_capped_while_others_wait_for_pages() -> None:
    shard = Shard(num_blocks=40, max_num_batched_tokens=640, max_num_seqs=8, max_pool_share=0.5, max_model_len=640)
    shard.add("old", [1] * 100, max_tokens=100)
    shard.step()
    shard.add("big", [2] * 400, max_tokens=100)
    shard.step()
    big = shard.scheduler._find("big", 0)
    shard.add("waits", [3] * 200)
    shard.step()
    held = len(big.table)
    for _ in range(40):
        shard.step()
    assert held > 20 and len(big.table) == held and shard.state("waits") is State.WAIT
    while shard.scheduler._oldest() is not big:
        shard.step()
    before = len(big.tokens)
    shard.step()
    assert len(big.tokens) == before + 1, "the cap never binds on the oldest"
    shard.run()
    assert len(shard.last) == 3


def test_a_small_request_passes_a_big_one_that_does_not_fit_yet() -> None:
    shard = Shard(num_blocks=40, max_num_batched_tokens=640, max_num_seqs=8, max_model_len=640)
    shard.add("old", [1] * 400, max_tokens=30)
    shard.step()
    shard.add("big", [2] * 500, max_tokens=8)
    shard.add("small", [3] * 20, max_tokens=4)
    shard.step()
    assert (shard.state("big"), shard.state("small")) == (State.WAIT, State.DECODE)
    shard.run()
    assert shard.last["small"] < shard.last["old"] < shard.last["big"]


def test_what_can_never_fit_is_refused_and_the_queue_goes_on() -> None:
    shard = Shard(num_blocks=8, max_num_batched_tokens=64, max_num_seqs=4, max_model_len=128)
    shard.add("exact", [1] * 100, max_tokens=28)
    with pytest.raises(InvalidRequest, match="max_tokens: got 29, must fit with 100 prompt tokens"):
        shard.add("over", [1] * 100, max_tokens=29)
    shard.add("next", [2] * 100, max_tokens=28)
    shard.run()
    assert shard.last.keys() == {"exact", "next"}


def test_ids_are_unique_while_in_flight_and_the_queue_is_bounded() -> None:
    shard = Shard(max_waiting=2)
    shard.add("a", 10)
    with pytest.raises(AlreadyExists, match="'a' is in flight"):
        shard.add("a", 10)
    shard.add("b", 10)
    with pytest.raises(Overloaded, match="2 requests"):
        shard.add("c", 10)
    shard.run()
    shard.add("a", 10)
    with pytest.raises(NotFound):
        shard.scheduler.cancel("nobody")


def test_a_fork_shares_all_but_the_partial_page() -> None:
    shard = Shard()
    shard.add("r", 40, max_tokens=30)
    for _ in range(5):
        shard.step()
    params = SamplingParams(seed=5, max_tokens=30)
    shard.scheduler.fork("r", 0, Request("f", tuple(range(40)), params))
    parent, child = shard.scheduler._find("r", 0), shard.scheduler._find("f", 0)
    assert child.tokens == parent.tokens and child.table.pages == parent.table.pages
    plan = shard.schedule()
    assert len(plan.copy_sources[0]) == 1
    shard.retire(plan)
    assert child.table.pages[:2] == parent.table.pages[:2] and child.table.pages[2] != parent.table.pages[2]
    with pytest.raises(InvalidRequest, match="max_tokens"):
        shard.scheduler.fork("r", 0, Request("g", tuple(range(40)), SamplingParams(seed=5, max_tokens=6)))
    with pytest.raises(InvalidRequest, match="n: got 2"):
        shard.scheduler.fork("r", 0, Request("g", tuple(range(40)), SamplingParams(seed=5, max_tokens=20, n=2)))
    shard.run()
    assert shard.last["r"] == shard.last["f"]


def test_plans_retire_in_order() -> None:
    shard = Shard(num_stages=2)
    shard.add("a", [1] * 40)
    first = shard.schedule()
    shard.add("b", [2] * 40)
    second = shard.schedule()
    with pytest.raises(WrongState, match="plan 2 is not the oldest"):
        shard.retire(second)
    shard.retire(first)
    shard.retire(second)


def test_a_plan_made_ahead_leaves_open_what_the_one_before_finds() -> None:
    shard = Shard(async_scheduling=True)
    shard.add("a", [1] * 5, max_tokens=3)
    shard.add("b", [2] * 9, max_tokens=1)
    first = shard.schedule()
    second = shard.schedule()
    assert list(second.tokens) == [-1 - list(first.sample_slot).index(second.slots[0])]
    assert list(second.first_position) == [5] and list(second.sample_position) == [6]
    assert shard.scheduler.schedule() is None, "no more than two are in flight"
    shard.retire(first)
    third = shard.schedule()
    assert list(third.tokens) == [-1] and list(third.sample_position) == [7]
    shard.retire(second)
    assert shard.scheduler.schedule() is None, "what is in flight ends it"
    shard.retire(third)
    assert not shard.scheduler.has_work and shard.scheduler.pool.num_used == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_every_full_page_of_what_has_ended_is_found(ahead: bool) -> None:
    shard = Shard(async_scheduling=ahead, max_num_seqs=1)
    for name, length in (("a", 12), ("b", 13), ("c", 14)):
        shard.add(name, [length] * 20, max_tokens=length + 1)
        while shard.scheduler.has_work or shard.scheduler.num_in_flight:
            while (plan := shard.scheduler.schedule()) is not None:
                shard.plans.append(plan)
            shard.retire(shard.plans[shard.steps])
        shard.add(name, [*[length] * 20, *[7] * length, 9, 9])
        shard.schedule()
        assert shard.scheduler._find(name, 0).cached_tokens == 32
        shard.scheduler.cancel(name)
        shard.retire(shard.plans[-1])


def test_failed_plans_end_their_sequences_and_spoil_no_page() -> None:
    """Those in the plans end; one that only took over a page which never came computes it itself."""
    shard = Shard(max_num_batched_tokens=36, max_num_seqs=4, num_stages=2)
    prefix = list(range(64))
    shard.add("good", [9] * 20, max_tokens=20)
    shard.step()
    shard.add("doomed", [*prefix, 1])
    shard.schedule()
    shard.scheduler.schedule()
    shard.add("later", [*prefix, 2])
    ended = shard.scheduler.abandon("planted")
    assert {output.request_id for output in ended} == {"good", "doomed"}
    assert all(output.finish_reason is FinishReason.ERROR and output.failure == "planted" for output in ended)
    shard.scheduler.check()
    assert shard.scheduler.pool.num_used == 0
    before = len(shard.plans)
    shard.run()
    assert sum(plan.num_tokens for plan in shard.plans[before:]) == 65 + 7, "no page of a failed plan is found"


def test_a_failed_sample_ends_alone() -> None:
    shard = Shard()
    shard.add("a", [1] * 20)
    shard.add("b", [2] * 20)
    plan = shard.schedule()
    outputs = shard.scheduler.retire(StepResult(plan.number, array("i", [-1, 7]), failed={0: "not finite"}))
    assert [(o.request_id, o.finish_reason, o.failure) for o in outputs] == [
        ("a", FinishReason.ERROR, "not finite"),
        ("b", None, ""),
    ]
    shard.run()
    assert shard.last.keys() == {"b"}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 10, "block_size": 0}, "block_size"),
        ({"num_blocks": 10, "max_num_batched_tokens": 100}, "max_num_batched_tokens"),
        ({"num_blocks": 10, "max_model_len": 161}, "max_model_len"),
        ({"num_blocks": 10, "max_model_len": 100, "max_pool_share": float("nan")}, "max_pool_share"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as found:
        ShardConfig(**settings)
    assert found.value.field == field

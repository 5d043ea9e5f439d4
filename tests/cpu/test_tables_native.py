"""A rank's tables in native code and by numpy: equal arrays of equal plans, equal errors of those that do not fit."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from kernels import cpu
from pagetable.errors import InvariantBroken
from pagetable.ids import PlanNumber
from worker.plan import Plan
from worker.tables import Batch, TableMirror

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")

ROWS = ("slots", "query_start", "first_position", "tokens")
CHANGES = ("table_slot", "table_index", "table_group")
EXTREME = (-(2**31), -(2**31) + 1, -2, -1, 2**31 - 2, 2**31 - 1)


class Pair:
    """Two mirrors of one shape that get the same plans."""

    def __init__(self, slots: int, blocks: int, size: int, group: int | None = None) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUIRE_KERNELS", "auto")
            self.native = TableMirror(slots, blocks, size, 0, group)
            patch.setenv("QUIRE_KERNELS", "reference")
            self.numpy = TableMirror(slots, blocks, size, 0, group)
        assert self.native.native is not None and self.numpy.native is None

    def apply(self, plan: Plan) -> Any:
        """None, or an error's type and text: the same of both, whose tables are equal afterwards."""
        found = [outcome(mirror.apply, plan) for mirror in (self.native, self.numpy)]
        assert found[0] == found[1] and self.native.tables.tolist() == self.numpy.tables.tolist()
        return found[0]

    def batch(self, plan: Plan, windows: Iterable[int]) -> Any:
        """All that the batch says, or an error's type and text: the same of both."""
        found = [outcome(mirror.batch, plan, windows) for mirror in (self.native, self.numpy)]
        assert found[0] == found[1]
        return found[0]


def outcome(call: Callable[..., Batch | None], *arguments: Any) -> Any:
    try:
        found = call(*arguments)
    except (InvariantBroken, ValueError, IndexError) as error:
        return type(error), str(error)
    return None if found is None else listed(found)


def tensors(batch: Batch) -> list[torch.Tensor]:
    """All of a batch; masks of several windows may share one."""
    found = [batch.tokens, batch.positions, batch.slots, batch.query_start]
    for pages in batch.pages.values():
        found += [pages.start, pages.block, pages.position]
    return found + [mask.first_position for mask in batch.masks.values()]


def listed(batch: Batch) -> list[Any]:
    """Everything that a batch says, dtypes and shapes included."""
    assert all(each.is_contiguous() for each in tensors(batch))
    windows = [(window, mask.window, mask.sinks) for window, mask in batch.masks.items()]
    assert list(batch.pages) == list(batch.masks) and all(pages.pool is None for pages in batch.pages.values())
    return [windows, *((each.dtype, each.tolist()) for each in tensors(batch))]


def random_changes(rng: random.Random, slots: int, blocks: int, groups: int) -> Plan:
    plan, count = Plan(PlanNumber(1)), rng.randrange(2 * slots * blocks)
    plan.table_slot = array("i", (rng.randrange(slots) for _ in range(count)))
    plan.table_index = array("i", (rng.randrange(blocks) for _ in range(count)))
    plan.table_group = array("i", (rng.randrange(groups) for _ in range(count)))
    plan.table_blocks = [array("i", (rng.randrange(1000) for _ in range(count)))]
    return plan


def random_rows(rng: random.Random, plan: Plan, slots: int, blocks: int, size: int, is_decode: bool) -> Plan:
    for _ in range(rng.randrange(9)):
        end = rng.randrange(1, blocks * size + 1)
        first = end - 1 if is_decode else rng.randrange(end + 1)
        plan.slots.append(rng.randrange(slots))
        plan.first_position.append(first)
        plan.tokens.extend(rng.randrange(-9, 1000) for _ in range(end - first))
        plan.query_start.append(len(plan.tokens))
    return plan


@pytest.mark.parametrize("group", [None, 0, 2])
@pytest.mark.parametrize("is_decode", [True, False])
def test_both_say_the_same_of_random_plans(group: int | None, is_decode: bool) -> None:
    rng, empty = random.Random(group), 0
    for _ in range(150):
        slots, blocks, size = rng.randrange(1, 6), rng.randrange(1, 9), rng.choice((1, 2, 3, 5, 16))
        pair = Pair(slots, blocks, size, group)
        for _ in range(3):
            plan = random_changes(rng, slots, blocks, 1 if group is None else 3)
            random_rows(rng, plan, slots, blocks, size, is_decode)
            windows = rng.sample((0, 1, 2, size, size + 1, 7, 30, 10**6), rng.randrange(4))
            assert pair.apply(plan) is None
            found = pair.batch(plan, windows)
            assert isinstance(found, list)
            empty += bool(windows) and not found[6][1]  # blocks of the first window
    assert empty > 0


@pytest.mark.parametrize("group", [None, 1])
def test_both_refuse_the_same_plans_and_change_nothing(group: int | None) -> None:
    """One number or one length of a plan that fits is another: the same results, or the same error."""
    rng, refused = random.Random(3), dict.fromkeys((*ROWS, *CHANGES, "table_blocks"), 0)
    for _ in range(1500):
        slots, blocks, size = rng.randrange(1, 4), rng.randrange(1, 5), rng.choice((1, 3, 4))
        plan = random_rows(rng, random_changes(rng, slots, blocks, 2), slots, blocks, size, rng.random() < 0.3)
        name = rng.choice(list(refused))
        values = plan.table_blocks[0] if name == "table_blocks" else getattr(plan, name)
        if values and rng.random() < 0.8:
            values[rng.randrange(len(values))] = rng.choice((*EXTREME, *range(12), blocks * size, blocks * size + 1))
        elif values and rng.random() < 0.5:
            values.pop()
        else:
            values.append(rng.randrange(3))
        pair = Pair(slots, blocks, size, group)
        pair.apply(random_changes(rng, slots, blocks, 2))
        before = pair.native.tables.copy()
        found = pair.apply(plan)
        if found is None:
            found = pair.batch(plan, (0, 3))
        else:
            assert (pair.native.tables == before).all()
        refused[name] += isinstance(found, tuple)
    refused.pop("table_group")  # one that names no group is another's
    assert all(refused.values()), refused


def plan_of(slots: list[int], query_start: list[int], first: list[int]) -> Plan:
    plan = Plan(PlanNumber(1))
    plan.slots, plan.query_start, plan.first_position = array("i", slots), array("i", query_start), array("i", first)
    plan.tokens = array("i", [5] * 3)
    return plan


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (plan_of([0, 2], [0, 1, 3], [0, 0]), "plan: slots: got 0 to 2, must be from 0 to 1"),
        (plan_of([-1, 1], [0, 1, 3], [0, 0]), "plan: slots: got -1 to 1, must be from 0 to 1"),
        (plan_of([0, 1], [0, 1, 3], [0, 11]), "plan: first_position: got 1 to 4, must be from 0 to 3"),
        (plan_of([0, 1], [0, 1, 3], [-2, 4]), "plan: first_position: got -2 to 4, must be from 0 to 12"),
        (plan_of([0, 1], [0, 2, 1], [0, 0]), "plan: query_start: got [0, 2, 1], must rise from 0 to 3"),
        (plan_of([0, 1], [0, 4, 3], [0, 0]), "plan: query_start: got [0, 4, 3], must rise from 0 to 3"),
        (plan_of([0, 1], [0, -1, 3], [0, 0]), "plan: query_start: got [0, -1, 3], must rise from 0 to 3"),
        (plan_of([0, 1], [1, 2, 3], [0, 0]), "plan: query_start: got [1, 2, 3], must rise from 0 to 3"),
        (plan_of([0, 1], [0, 1, 2], [0, 0]), "plan: query_start: got [0, 1, 2], must rise from 0 to 3"),
        (
            plan_of([0, 1], [0, 3], [0, 0]),
            "plan: query_start: got 2 for 2 slots and 2 first positions, must be one more than of either",
        ),
        (
            plan_of([0, 1], [0, 1, 3], [0]),
            "plan: query_start: got 3 for 2 slots and 1 first positions, must be one more than of either",
        ),
    ],
)
@pytest.mark.parametrize("group", [None, 0])
def test_rows_that_do_not_fit_are_named(plan: Plan, text: str, group: int | None) -> None:
    assert Pair(2, 3, 4, group).batch(plan, (0,)) == (InvariantBroken, text)


def test_more_pages_than_a_list_may_have_are_refused_before_there_is_memory_for_them() -> None:
    blocks, rows = 2**16, 2**15
    plan = Plan(PlanNumber(1), slots=array("i", [0] * rows), query_start=array("i", range(rows + 1)))
    plan.first_position, plan.tokens = array("i", [blocks - 1] * rows), array("i", [1] * rows)
    text = "plan: slots: got 2147483648 pages, must be 2147483647 at most"
    assert Pair(1, blocks, 1).batch(plan, (0,)) == (InvariantBroken, text)


def test_a_batch_is_nobody_elses() -> None:
    """Neither of the plan, nor of the tables, nor of the batch before, nor does one array lie in another."""
    mirror = Pair(2, 3, 4).native
    plan = plan_of([0, 1], [0, 1, 3], [9, 3])
    batch, again = (mirror.batch(plan, (0, 5)) for _ in range(2))
    said = listed(batch)
    mirror.tables.fill(77)
    for name in ROWS:
        values = getattr(plan, name)
        values[:] = array("i", [77] * len(values))
        values.append(1)  # nobody looks at its memory any more
    for each in tensors(again):
        each.fill_(77)
    assert listed(batch) == said
    distinct = {each.data_ptr(): each for each in tensors(batch)}.values()
    assert len(distinct) == 4 + 2 * 3 + 1  # both windows' masks are of the same first positions
    for index, each in enumerate(distinct):
        each.fill_(index)
    assert all((each == index).all() for index, each in enumerate(distinct))


@pytest.mark.parametrize("group", [None, 1])
def test_a_plan_without_changes_changes_copies_and_moves_nothing(group: int | None) -> None:
    pair, plan = Pair(2, 2, 4, group), Plan(PlanNumber(1))
    assert pair.apply(plan) is None and (pair.native.tables == -1).all()
    source, target = pair.native.copies(plan)
    assert len(source) == len(target) == 0 and pair.native.moves(plan) is None

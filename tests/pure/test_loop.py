"""A pipe with a thread of its own: order, failures, and its end."""

from __future__ import annotations

import gc
import threading
import weakref
from array import array

import pytest

from pagetable.ids import PlanNumber
from worker.loop import Threaded
from worker.plan import Plan, StepResult

PATIENCE = 20.0


class Counting:
    """A runner that notes the plans it ran and fails at some."""

    def __init__(self, *fails: int) -> None:
        self.ran: list[int] = []
        self.fails = fails
        self.go = threading.Semaphore(0)

    def run(self, plan: Plan) -> StepResult:
        assert self.go.acquire(timeout=PATIENCE)
        self.ran.append(plan.number)
        if plan.number in self.fails:
            raise MemoryError(f"plan {plan.number}")
        return StepResult(plan.number, array("i"))


def plan(number: int) -> Plan:
    return Plan(PlanNumber(number))


def test_plans_run_in_order_while_the_caller_does_something_else() -> None:
    runner = Counting()
    pipe = Threaded(runner)
    pipe.send(plan(1))
    pipe.send(plan(2))
    assert runner.ran == []
    runner.go.release(2)
    assert [pipe.receive().number, pipe.receive().number] == [1, 2]
    assert runner.ran == [1, 2]


def test_what_was_sent_behind_a_plan_that_fails_does_not_run() -> None:
    runner = Counting(1, 4)
    runner.go.release(100)
    pipe = Threaded(runner)
    for first in (1, 4):
        pipe.send(plan(first))
        pipe.send(plan(first + 1))
        with pytest.raises(MemoryError, match=f"plan {first}"):
            pipe.receive()
        pipe.send(plan(first + 2))
        assert pipe.receive().number == first + 2
    assert runner.ran == [1, 3, 4, 6]


def test_its_thread_ends_with_it() -> None:
    runner = Counting()
    runner.go.release(1)
    pipe = Threaded(runner)
    pipe.send(plan(1))
    pipe.receive()
    gone = weakref.ref(runner)
    del runner, pipe
    gc.collect()
    assert gone() is None

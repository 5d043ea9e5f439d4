"""The shard's loop: schedule, run, retire. The only writer of the shard's state."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Protocol, TypeAlias

from pagetable.errors import InvariantBroken, QuireError
from pagetable.sampling import Request
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import FinishReason, TokenOutput

_log = logging.getLogger(__name__)

_Plans: TypeAlias = "queue.SimpleQueue[tuple[int, Plan] | None]"
_Results: TypeAlias = "queue.SimpleQueue[StepResult | BaseException]"


class EpochOver(QuireError):
    """The ranks of a shard have lost one of them, or each other: nothing of what runs there can go on."""


class Runner(Protocol):
    """Whatever executes plans at once, on the caller's thread: the one rank of a shard, or a fake device in tests."""

    def run(self, plan: Plan) -> StepResult | None:
        """Execute `plan` in full. An exception means that nothing of it may be relied on."""
        ...


class Pipe(Protocol):
    """Whatever executes plans while the next ones are made: the ranks of a shard."""

    def send(self, plan: Plan) -> None:
        """Begin a plan; the caller's own part of it may be done before this returns. Raises EpochOver."""
        ...

    def receive(self) -> StepResult:
        """The result of the oldest plan that was sent and not received; waits. Raises EpochOver."""
        ...


class Inline:
    """A pipe of length one: a plan runs when its result is asked for."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._plans: deque[Plan] = deque()

    def send(self, plan: Plan) -> None:
        self._plans.append(plan)

    def receive(self) -> StepResult:
        result = self.runner.run(self._plans.popleft())
        assert result is not None, "a runner that is alone answers"
        return result


class Threaded:
    """A pipe whose plans run on a thread of their own, each as soon as the one before is done.

    Where one fails, those behind it that were sent before its failure was received are dropped, as the loop drops them.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._plans: _Plans = queue.SimpleQueue()
        self._results: _Results = queue.SimpleQueue()
        self._failures = 0  # received
        thread = threading.Thread(
            target=_run_all, args=(runner, self._plans, self._results), name="runner", daemon=True
        )
        thread.start()
        weakref.finalize(self, _end, thread, self._plans)

    def send(self, plan: Plan) -> None:
        self._plans.put((self._failures, plan))

    def receive(self) -> StepResult:
        result = self._results.get()
        if isinstance(result, BaseException):
            self._failures += 1
            raise result
        return result


def _end(thread: threading.Thread, plans: _Plans) -> None:
    plans.put(None)
    if thread is not threading.current_thread():
        thread.join()  # an interpreter that ends with native threads at work aborts


def _run_all(runner: Runner, plans: _Plans, results: _Results) -> None:
    failed = -1
    while (sent := plans.get()) is not None:
        failures, plan = sent
        if failures == failed:
            continue
        try:
            result = runner.run(plan)
            assert result is not None, "a runner that is alone answers"
            results.put(result)
        except BaseException as error:  # the caller's, whatever it is
            failed = failures
            results.put(error)


class Loop:
    """One shard's scheduler and what carries out its plans, stepped by the caller. Not thread-safe.

    A step that raises ends the requests in it with FinishReason.ERROR and gives their pages back; the others go on. Not
    so EpochOver, which leaves the loop for good: the caller makes a new one.
    """

    def __init__(self, scheduler: ShardScheduler, pipe: Pipe) -> None:
        self.scheduler = scheduler
        self.pipe = pipe
        self.on_plan: Callable[[Plan], None] | None = None  # told of each plan before it runs
        self.schedule_seconds = self.run_seconds = self.retire_seconds = 0.0  # spent in the parts of all steps

    @property
    def has_work(self) -> bool:
        """Whether there are unfinished requests, or plans whose pages come free with their results."""
        return self.scheduler.has_work or self.scheduler.num_in_flight > 0

    def add(self, request: Request, resumed: Mapping[int, array[int]] | None = None) -> None:
        """Queue a request, or some of its samples from where they stopped elsewhere. See ShardScheduler.add."""
        self.scheduler.add(request, resumed)

    def fork(self, request_id: str, sample_index: int, request: Request, num_outputs: int | None = None) -> None:
        """Go on with a running sample's tokens as `request`, which shares its pages. See ShardScheduler.fork."""
        self.scheduler.fork(request_id, sample_index, request, num_outputs)

    def finish(
        self, request_id: str, sample_index: int, reason: FinishReason, stop_reason: str | None = None
    ) -> TokenOutput:
        """End one sample now (a stop string was seen)."""
        return self.scheduler.finish(request_id, sample_index, reason, stop_reason)

    def cancel(self, request_id: str) -> list[TokenOutput]:
        """End all samples of a request. Raises NotFound."""
        return self.scheduler.cancel(request_id)

    def step(self) -> list[TokenOutput]:
        """Send what plans can be made, take the result of the oldest; what it says about its sequences.

        Empty where there is no work. Raises EpochOver.
        """
        self._send()
        if not self.scheduler.num_in_flight:
            if self.scheduler.has_work:
                raise InvariantBroken("there is work and room for it, but no plan")
            return []
        began = perf_counter()
        try:
            result = self.pipe.receive()
        except EpochOver:
            raise
        except Exception as error:
            _log.exception("a plan failed")
            return self.scheduler.abandon(f"the step that computed it failed ({type(error).__name__})")
        ran = perf_counter()
        self.run_seconds += ran - began
        outputs = self.scheduler.retire(result)
        self.retire_seconds += perf_counter() - ran
        return outputs

    def _send(self) -> None:
        while True:
            began = perf_counter()
            plan = self.scheduler.schedule()
            if plan is None:
                return
            if self.on_plan is not None:
                self.on_plan(plan)
            sent = perf_counter()
            self.schedule_seconds += sent - began
            self.pipe.send(plan)
            self.run_seconds += perf_counter() - sent
            if self.scheduler.num_in_flight >= self.scheduler.config.max_in_flight:
                return

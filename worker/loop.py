"""The shard's loop: schedule, run, retire. The only writer of the shard's state."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Protocol

from pagetable.errors import InvariantBroken
from pagetable.sampling import Request
from worker.plan import Plan, StepResult
from worker.scheduler import ShardScheduler
from worker.sequence import FinishReason, TokenOutput

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Whatever executes plans: the ranks of a shard, or a fake device in tests."""

    def run(self, plan: Plan) -> StepResult:
        """Execute `plan` in full. An exception means that nothing of it may be relied on."""
        ...


class Loop:
    """One shard's scheduler and the runner of its plans, stepped by the caller. Not thread-safe.

    A step that raises ends the requests in it with FinishReason.ERROR and gives their pages back; the others go on.
    """

    def __init__(self, scheduler: ShardScheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.on_plan: Callable[[Plan], None] | None = None  # told of each plan before it runs
        self.schedule_seconds = self.run_seconds = self.retire_seconds = 0.0  # spent in the parts of all steps

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

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
        """Run one plan; what it says about its sequences. Empty where there is no work."""
        began = perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            if self.scheduler.has_work:
                raise InvariantBroken("there is work and room for it, but no plan")
            return []
        if self.on_plan is not None:
            self.on_plan(plan)
        planned = perf_counter()
        self.schedule_seconds += planned - began
        try:
            result = self.runner.run(plan)
        except Exception as error:
            _log.exception("plan %d failed", plan.number)
            return self.scheduler.abandon(f"the step that computed it failed ({type(error).__name__})")
        ran = perf_counter()
        self.run_seconds += ran - planned
        outputs = self.scheduler.retire(result)
        self.retire_seconds += perf_counter() - ran
        return outputs

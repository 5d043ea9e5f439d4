"""The service's processes on this machine, without Ray: this process starts and restarts them.

    this process --pipes--> scheduler
                 --pipes--> keeper 0 --pipes--> worker 0
                 --pipes--> keeper 1 --pipes--> worker 1          (a keeper and a worker for each rank of a shard)
                 --pipes--> front

When this process dies, pipes end and so do they. A process that dies comes back with the settings it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from cluster.processes import Child, command, environment
from cluster.service import MAX_DEATHS, START_SECONDS, STOP_SECONDS, Breaker, Note, ServicePlan, describe_event, failure
from pagetable.errors import RequestFailed


class LocalService:
    """See `cluster.service.Service`.

    Attributes:
        parts: by name (`scheduler`, `keeper-0` ..., `keeper-0.1` for a shard's second rank, `front`), each with its
            present pid.
    """

    def __init__(self, plan: ServicePlan, note: Note) -> None:
        self._plan, self._note = plan, note
        parts = {"scheduler": _Part("scheduler", plan.scheduler_settings())}
        for index, worker in enumerate(plan.workers):
            rank = f".{worker['rank']}" if worker.get("rank", 0) else ""
            parts[f"keeper-{worker['shard_id']}{rank}"] = _Part("keeper", plan.keeper_settings(index), self._hear)
        parts["front"] = _Part("front", plan.front_settings(), self._hear)
        self.asked_to_stop = asyncio.Event()
        self.parts = parts
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(part.run(), name=name) for name, part in self.parts.items()]
        ready = asyncio.create_task(self._await_ready(), name="ready")
        try:
            done, _ = await asyncio.wait(
                [ready, *self._tasks], timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                waiting = ", ".join(name for name, part in self.parts.items() if not part.ready.is_set())
                raise RequestFailed(f"not ready after {START_SECONDS:.0f} s: {waiting}")
            for task in done:
                task.result()
        finally:
            ready.cancel()

    async def _await_ready(self) -> None:
        for part in self.parts.values():
            await part.ready.wait()

    async def watch(self) -> None:
        for task in asyncio.as_completed(self._tasks):
            await task

    async def stop(self) -> None:
        """The front goes first: its streams need all the others. Then the scheduler, so that it sees no shard die."""
        for part in self.parts.values():
            part.stopping.set()
        await self.parts["front"].stop(self._plan.drain_seconds + STOP_SECONDS)
        await self.parts["scheduler"].stop(STOP_SECONDS)
        await asyncio.gather(*(part.stop(STOP_SECONDS) for part in self.parts.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def hurry(self) -> None:
        self.parts["front"].kill()

    def _hear(self, said: Mapping[str, Any]) -> None:
        if "stop" in said:
            self.asked_to_stop.set()
        text = describe_event(said)
        if text is not None:
            self._note(text)


class _Part:
    """One process, kept alive."""

    def __init__(
        self, role: str, settings: Mapping[str, Any], hear: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        self.role = role
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()
        self._settings, self._hear = settings, hear
        self._breaker = Breaker()
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    async def run(self) -> None:
        """Until it is beyond repair, which raises, or meant to stop."""
        while not self.stopping.is_set():
            child = self._child = await Child.start(command("cluster", self.role), self._settings, environment())
            failed: Mapping[str, Any] | None = None
            async for said in child.lines():
                failed = said.get("failed", failed)
                if "ready" in said:
                    self.ready.set()
                elif self._hear is not None:
                    self._hear(said)
            status = await child.wait()
            if self.stopping.is_set():
                return
            if failed is not None and not self.ready.is_set():
                raise failure(failed)
            if self._breaker.trips():
                why = failure(failed) if failed is not None else f"the last time with status {status}"
                raise RequestFailed(f"the {self.role} ended {MAX_DEATHS} times in a minute, {why}")

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL where it is still there after `seconds`."""
        self.stopping.set()
        child = self._child
        if child is None:
            return
        child.terminate()
        try:
            await asyncio.wait_for(child.wait(), seconds)
        except TimeoutError:
            child.kill()
            await child.wait()

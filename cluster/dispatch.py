"""Where requests run: placed by the scheduler, submitted to a shard, and taken up elsewhere when that shard dies.

    start -> Place -> Submit on a shard --refused: it is full--> Place without it
                              |--the shard dies--> Place again, Submit from the outputs so far

A shard says which requests a step is the first to run, before it runs it. A death counts against those alone: what
waited there, or was sent to a shard that was dead already, just moves on. A request that has seen a shard die is on
trial: on each shard only one such at a time is submitted until it has made a few steps there (PROOF_STEPS), which takes
it past the place where it stood when the first shard died. So what kills shards is known by name after the second one,
and fails; those beside it go on.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable

from cluster.front_config import FrontLimits
from cluster.grpc_errors import unexpected
from cluster.requests import SAMPLING
from cluster.scheduler_link import SchedulerLink
from cluster.shards import Run, ShardLink, ShardLinks
from cluster.streams import Stream
from pagetable.errors import QuireError, RequestFailed, ServiceError
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
DIAL_SECONDS = 1.0
SETTLED_SECONDS = 3.0  # a scheduler that was just restarted has not heard of all shards before
POISON_DEATHS = 2


class Dispatcher:
    """Runs streams. Use from one event loop.

    Args:
        scheduler: host:port.
        name: of this front, for the others' logs.
        on_change: called when shards come or go.
        on_death: called for each request whose shard died under it.
    """

    def __init__(
        self,
        scheduler: str,
        secret: bytes,
        name: str,
        limits: FrontLimits,
        on_change: Callable[[], None],
        on_death: Callable[[], None],
    ) -> None:
        self.limits = limits
        self.scheduler = SchedulerLink(scheduler, secret, name, lambda shards: self.shards.update(shards))
        self.shards = ShardLinks(secret, name, self, self.scheduler.report, on_change)
        self._on_death = on_death
        self._tasks: dict[Stream, asyncio.Task[None]] = {}
        self._dial: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._dial = asyncio.create_task(self.scheduler.run(), name="scheduler")

    async def end(self) -> None:
        tasks = [*self._tasks.values(), *([self._dial] if self._dial is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.shards.close()

    async def infos(self) -> list[pb.ShardInfo]:
        """What is known of the shards. Raises ServiceError UNAVAILABLE where none was ever told of."""
        if not await self.shards.wait_known(self._patience()):
            raise ServiceError("UNAVAILABLE", "no shard is ready; try again in a few seconds")
        return self.shards.infos

    # What fronts do with streams

    async def start(self, stream: Stream) -> None:
        """Returns once it is submitted. Raises QuireError where it can't be."""
        await self._run(stream, set())

    async def fork(self, stream: Stream, parent: Stream, sample: int, num_outputs: int) -> None:
        """Start a stream that has inherited outputs of another one's sample: beside it, where that still runs."""
        run: Run | None = parent.placed
        if run is not None and run.link.is_open and sample in run.open:
            stream.placed = run.link.fork(stream, run, sample, num_outputs)
        else:
            await self.start(stream)

    def cancel(self, stream: Stream) -> None:
        """End it; its shard says the end of each sample, where it is on one."""
        stream.cancelled = True
        run: Run | None = stream.placed
        if run is not None and run.link.is_open:
            run.link.cancel(run)
            return
        stream.end_all(pb.FINISH_REASON_CANCELLED)
        self._stop(stream)

    def close(self, stream: Stream) -> None:
        """Nobody waits for it any more: what still runs of it ends, its pages are free."""
        self._stop(stream)
        run: Run | None = stream.placed
        if run is not None:
            run.link.drop(run)
            stream.placed = None

    # What shards do with runs

    def lost(self, runs: list[Run]) -> None:
        """Their shard is gone: all that is unfinished goes on elsewhere."""
        alone = sum(run.begun for run in runs) == 1
        for run in runs:
            stream = run.stream
            if stream.placed is not run:
                continue
            stream.placed = None
            for sample in stream.samples:
                if sample.matched is not None and not sample.reason:
                    sample.end(pb.FINISH_REASON_STOP)
            if stream.cancelled or not stream.unfinished():
                stream.end_all(pb.FINISH_REASON_CANCELLED)
                continue
            self._on_death()
            stream.refusers.clear()
            stream.refused_at = 0.0
            if run.begun:
                stream.deaths += 1
                blamed = alone or not run.is_proven
                if stream.deaths >= (POISON_DEATHS if blamed else self.limits.max_deaths):
                    text = f"poison: {stream.deaths} shards died while they ran this request; it is not run again"
                    stream.fail(RequestFailed(text))
                    continue
            self._later(stream, {run.link.info.shard_id})

    def refused(self, run: Run, error: ServiceError) -> None:
        """Full: somewhere else. No such parent: from the outputs. Else the request is at fault."""
        stream = run.stream
        if stream.placed is not run:
            return
        stream.placed = None
        if run.is_fork and error.code == "NOT_FOUND":
            self._later(stream, set())
        elif error.code == "RESOURCE_EXHAUSTED":
            stream.refused_at = stream.refused_at or asyncio.get_running_loop().time()
            stream.refusers.add(run.link.info.shard_id)
            self._later(stream, set(stream.refusers), error)
        else:
            if error.field in SAMPLING:
                error.field = f"sampling.{error.field}"
            stream.fail(error)

    # Placing

    def _later(self, stream: Stream, exclude: set[int], full: ServiceError | None = None) -> None:
        """Run it from a task of its own; what goes wrong is the stream's end."""

        async def run() -> None:
            try:
                await self._run(stream, exclude, full)
            except QuireError as error:
                stream.fail(error)
            except Exception as error:
                _log.error("placing a request failed", exc_info=error)
                stream.fail(unexpected(error))

        self._stop(stream)
        task = self._tasks[stream] = asyncio.create_task(run(), name="resume")
        task.add_done_callback(lambda done: self._tasks.pop(stream) if self._tasks.get(stream) is done else None)

    def _stop(self, stream: Stream) -> None:
        task = self._tasks.pop(stream, None)
        if task is not None:
            task.cancel()

    async def _run(self, stream: Stream, exclude: set[int], full: ServiceError | None = None) -> None:
        while not stream.is_over:
            link = await self._find(stream, exclude, full)
            if link is None:
                return
            if not stream.deaths:
                stream.placed = link.submit(stream)
                return
            async with link.trial:
                if link.is_open and not stream.is_over:
                    run = stream.placed = link.submit(stream)
                    await run.proven.wait()
                    return

    async def _find(self, stream: Stream, exclude: set[int], full: ServiceError | None) -> ShardLink | None:
        """A shard with a connection; None where the stream ended meanwhile.

        Raises ServiceError: what the scheduler says, or UNAVAILABLE in time.
        """
        now = asyncio.get_running_loop().time
        began = now()
        while True:
            seconds = max(0.01, began + self.limits.place_seconds - now())
            placed = await self.scheduler.place(self._question(stream, exclude), seconds)
            if stream.is_over:
                return None
            if placed.placed:
                link = await self.shards.get(placed.shard_id, placed.epoch, DIAL_SECONDS)
                if link is not None and link.is_open:
                    return None if stream.is_over else link
                exclude.add(placed.shard_id)
            elif placed.code != "UNAVAILABLE":
                raise ServiceError(placed.code, placed.message)
            elif exclude and full is not None and self._is_refused(stream, now()):
                raise full
            else:
                exclude.clear()
                stream.refusers.clear()
            waited = now() - began
            if waited >= (self.limits.place_seconds if stream.has_begun or stream.deaths else self._patience()):
                raise ServiceError(
                    "UNAVAILABLE", placed.message or "no shard can be reached; try again in a few seconds"
                )
            await asyncio.sleep(RETRY_SECONDS)

    def _is_refused(self, stream: Stream, now: float) -> bool:
        """All shards are full: a new request is told so at once, one that was admitted waits for a seat."""
        return not stream.has_begun or now - stream.refused_at >= self.limits.place_seconds

    def _question(self, stream: Stream, exclude: set[int]) -> pb.Place:
        request = stream.request
        return pb.Place(
            prompt=array("i", request.prompt).tobytes(),
            cache_salt=request.cache_salt,
            samples=len(stream.unfinished()),
            max_tokens=request.params.max_tokens,
            exclude=sorted(exclude),
        )

    def _patience(self) -> float:
        """How long a new request waits for some shard to be ready."""
        settled = self.scheduler.seconds_up >= SETTLED_SECONDS
        return self.limits.no_shard_seconds if settled else self.limits.place_seconds

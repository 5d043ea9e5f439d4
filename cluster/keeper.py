"""A keeper: keeps one shard's worker process alive and answers for it to the global scheduler.

    worker lives:  epoch e: start - loading - ready ......... dies      epoch e+1: start - loading - ready ...
    Register:                              READY, READY, ... DEAD, DEAD, ...               READY, ...

Epochs are milliseconds of the clock at the first life, then one more each: a keeper that was itself restarted never
repeats one. A worker that leads several ranks begins an epoch of its own accord when one of them is lost (`over`, then
`ready` again), and its keeper counts on from there. A worker that dies MAX_DEATHS times in DEATHS_SECONDS stays down:
whatever kills it would kill it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from cluster.processes import Child, command, environment
from cluster.rank_keeper import RankKeeper
from cluster.wire import Link
from pagetable.frames import Kind
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

MAX_DEATHS, DEATHS_SECONDS = 3, 60.0
REGISTER_SECONDS = 1.0
RETRY_SECONDS = 0.2
STOP_SECONDS = 5.0
OVER_SECONDS = 0.5  # in which a leader of several ranks says that it has ended an epoch itself


class Say(Protocol):
    """Tells the parent: `say(ready={...})` is one status line."""

    def __call__(self, **line: Any) -> None: ...


async def main(settings: Mapping[str, Any], say: Say) -> int:
    """Run a keeper until it is cancelled; 1 where its worker never came up.

    Args:
        settings: `scheduler` (host:port), `secret` (hex), `worker` (what `python -m worker` wants, without epoch, host,
            port and secret), perhaps `host` (where the worker listens) and `env` (of the worker).
        say: `loading=[done, total]`, `ready={shard_id, epoch, pid}` at the first life, `restarted={...}` at later ones,
            `died={shard_id, epoch, status}`, `over={shard_id, epoch, why}`, `down={shard_id, message}`,
            `failed={code, message}`.
    """
    if settings["worker"].get("rank", 0):
        return await RankKeeper(settings, say).run()
    return await Keeper(settings, say).run()


class Keeper:
    """Supervises one worker process.

    Args:
        settings, say: see `main`.
        worker: the command to start instead of `python -m worker`.
        now: seconds, for the breaker.

    Attributes:
        info, condition: what is registered; None before the first worker was ready.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        say: Say,
        worker: Sequence[str] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info: pb.ShardInfo | None = None
        self.condition: pb.Condition = pb.CONDITION_DEAD
        self._scheduler, self._secret = str(settings["scheduler"]), bytes.fromhex(settings["secret"])
        self._settings = {
            "host": settings.get("host", "127.0.0.1"),
            "port": 0,
            "secret": settings["secret"],
            **settings["worker"],
        }
        self._environment = settings.get("env", {})
        self._command = list(worker) if worker is not None else command("worker")
        self._say, self._now = say, now
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._child: Child | None = None
        self._fences: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._epoch = int(time.time() * 1000)
        self._lives = 0
        self._is_up = False  # the parent was told that the first worker is registered

    @property
    def shard_id(self) -> int:
        return int(self._settings["shard_id"])

    async def run(self) -> int:
        """Keep the worker alive until cancelled; its process is gone when this returns."""
        report = asyncio.create_task(self._report(), name="report")
        try:
            return await self._supervise()
        finally:
            for task in (report, *self._fences):
                task.cancel()
            if self._child is not None:
                await self._child.stop(STOP_SECONDS)
            await asyncio.gather(report, return_exceptions=True)

    async def _supervise(self) -> int:
        while True:
            failed = await self._live()
            if failed is not None and self._lives == 0:
                self._say(failed=failed)  # the model is refused; another try would be refused too
                return 1
            self._deaths.append(self._now())
            if len(self._deaths) == MAX_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS:
                text = f"the worker of shard {self.shard_id} died {MAX_DEATHS} times in {DEATHS_SECONDS:.0f} s"
                if self._lives == 0:
                    self._say(failed={"code": "INTERNAL", "message": f"{text} before it was ready"})
                    return 1
                _log.error("%s; it stays down", text)
                self._say(down={"shard_id": self.shard_id, "message": f"{text} and stays down"})
                await asyncio.Event().wait()
            self._epoch += 1

    async def _live(self) -> dict[str, Any] | None:
        """One life of the worker, from its start to its death; what it said where it could not be built."""
        failed: dict[str, Any] | None = None
        settings = {**self._settings, "epoch": self._epoch}
        child = self._child = await Child.start(self._command, settings, environment(self._environment))
        async for line in child.lines():
            if "ready" in line:
                info = pb.ShardInfo.FromString(bytes.fromhex(line["ready"]))
                self._epoch = max(self._epoch, info.epoch)
                self._set(info, pb.CONDITION_READY)
            elif "over" in line and self.info is not None:
                self._set(self.info, pb.CONDITION_DEAD)
                self._say(over={"shard_id": self.shard_id, "epoch": self._epoch, "why": line["over"]})
                self._epoch += 1  # who fences the one that is over is late
            elif "loading" in line and not self._is_up:
                self._say(loading=line["loading"])
            elif "failed" in line:
                failed = line["failed"]
        status = await child.wait()
        if self.info is not None and self.condition == pb.CONDITION_READY:
            self._set(self.info, pb.CONDITION_DEAD)
        self._say(died={"shard_id": self.shard_id, "epoch": self._epoch, "status": status})
        return failed

    def _set(self, info: pb.ShardInfo, condition: pb.Condition) -> None:
        if condition == pb.CONDITION_READY:
            self._lives += 1
            if self._is_up:
                self._say(restarted={"shard_id": self.shard_id, "epoch": info.epoch, "pid": info.pid})
        self.info, self.condition = info, condition
        self._changed.set()

    async def _report(self) -> None:
        """Stay connected to the scheduler, whichever life it is in."""
        name = f"keeper-{self.shard_id}"
        while True:
            try:
                link = await Link.connect(self._scheduler, pb.ROLE_KEEPER, name, self._secret)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            register = asyncio.create_task(self._register(link), name="register")
            try:
                async for kind, payload in link.frames():
                    if kind is Kind.FENCE:
                        self._fence(pb.Fence.FromString(payload))
            except DecodeError:
                _log.warning("the scheduler sends what is no Fence")
            finally:
                register.cancel()
                link.close()
            await asyncio.sleep(RETRY_SECONDS)

    async def _register(self, link: Link) -> None:
        while link.is_open:
            self._changed.clear()
            if self.info is not None:
                link.send(Kind.REGISTER, pb.Register(info=self.info, condition=self.condition))
                if not self._is_up and self.condition == pb.CONDITION_READY:
                    self._is_up = True
                    self._say(ready={"shard_id": self.shard_id, "epoch": self.info.epoch, "pid": self.info.pid})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REGISTER_SECONDS)

    def _fence(self, fence: pb.Fence) -> None:
        """The scheduler gave up on an epoch. An older one is over already."""
        if fence.shard_id != self.shard_id or fence.epoch != self._epoch or self._child is None:
            return
        _log.warning("shard %d, epoch %d is fenced: %s", self.shard_id, fence.epoch, fence.why)
        if "leader" in self._settings:
            self._fences.add(task := asyncio.create_task(self._fence_later(fence.epoch, self._child), name="fence"))
            task.add_done_callback(self._fences.discard)
        else:
            self._child.kill()

    async def _fence_later(self, epoch: int, child: Child) -> None:
        """A leader that lost a rank parts from all who are connected, so the scheduler can know before its keeper does.
        Killed for that, it would lose its weights."""
        await asyncio.sleep(OVER_SECONDS)
        if self._epoch == epoch and self._child is child:
            child.kill()

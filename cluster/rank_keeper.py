"""A rank keeper: keeps the process of one rank alive that follows its shard's leader.

It knows nothing of epochs: a process that it starts anew finds the leader, and with it the next epoch. A process that
is stopped says nothing for a while and is ended: it would hold up all the other ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.processes import Child, command, environment

_log = logging.getLogger(__name__)

MAX_DEATHS, DEATHS_SECONDS = 5, 60.0
SILENCE_SECONDS = 5.0  # of a process that says every second that it is alive
STOP_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


class RankKeeper:
    """Supervises one worker process.

    Args:
        settings: as in `cluster.keeper.main`; `worker` has a `rank` above 0 and where its `leader` listens.
        say: `loading=[done, total]`, `ready={shard_id, rank, pid}`, `restarted={...}`, `died={..., status}`,
            `failed={code, message}`.
        worker: the command to start instead of `python -m worker`.
        silence: seconds.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        say: Callable[..., None],
        worker: Sequence[str] | None = None,
        silence: float = SILENCE_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        worker_settings = settings["worker"]
        self._settings = {"secret": settings["secret"], "host": settings.get("host", ""), **worker_settings}
        self._environment = settings.get("env", {})
        self._command = list(worker) if worker is not None else command("worker")
        self._say, self._silence, self._now = say, silence, now
        self._name = {"shard_id": worker_settings["shard_id"], "rank": worker_settings["rank"]}
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._child: Child | None = None
        self._is_up = False

    async def run(self) -> int:
        """Keep the process alive until cancelled; 1 where it never came up."""
        try:
            while True:
                failed = await self._live()
                if failed is not None and not self._is_up:
                    self._say(failed=failed)
                    return 1
                self._deaths.append(self._now())
                if self._is_dying and not self._is_up:
                    text = f"rank {self._name['rank']} died {MAX_DEATHS} times before it was ready"
                    self._say(failed={"code": "INTERNAL", "message": text})
                    return 1
                await asyncio.sleep(self._pause())
        finally:
            if self._child is not None:
                await self._child.stop(STOP_SECONDS)

    @property
    def _is_dying(self) -> bool:
        return len(self._deaths) == MAX_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS

    def _pause(self) -> float:
        """Unlike a leader it never stays down for good: its shard could not come back. It comes back more slowly."""
        recent = sum(self._deaths[-1] - each < DEATHS_SECONDS for each in self._deaths)
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (recent - 1) if recent > 1 else 0.0)

    async def _live(self) -> dict[str, Any] | None:
        """One life of the process; what it said where it could not be built."""
        failed: dict[str, Any] | None = None
        child = self._child = await Child.start(self._command, self._settings, environment(self._environment))
        heard = asyncio.Event()
        watch: asyncio.Task[None] | None = None
        async for line in child.lines():
            heard.set()
            if "ready" in line:
                told = {**self._name, "pid": child.pid}
                if self._is_up:
                    self._say(restarted=told)
                else:
                    self._say(ready=told)
                self._is_up = True
                watch = asyncio.create_task(self._watch(child, heard), name="silence")
            elif "loading" in line and not self._is_up:
                self._say(loading=line["loading"])
            elif "failed" in line:
                failed = line["failed"]
        if watch is not None:
            watch.cancel()
        status = await child.wait()
        self._say(died={**self._name, "status": status})
        return failed

    async def _watch(self, child: Child, heard: asyncio.Event) -> None:
        while True:
            heard.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), self._silence)
                continue
            _log.warning("rank %s says nothing for %.0f s: it is ended", self._name["rank"], self._silence)
            child.kill()
            return

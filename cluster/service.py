"""What a service is made of, whoever starts its processes: Ray (cluster/head.py) or this machine (launch/local.py)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from pagetable.errors import ModelError, QuireError, RequestFailed

Note: TypeAlias = Callable[[str], None]
START_SECONDS = 600.0  # a big model on a slow disk
STOP_SECONDS = 15.0  # for a part to end, beside the time to drain
MAX_DEATHS, DEATHS_SECONDS = 5, 60.0  # of one part: then the service ends


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """The settings of all processes. What restarts gets the same settings again, so every port is chosen before.

    Attributes:
        secret: 32 bytes that all processes of the cluster know.
        scheduler_port: where the scheduler listens, in each of its lives.
        front: of `python -m cluster front`, without scheduler and secret.
        workers: of `python -m worker`, one for each rank of each shard, in that order, without epoch, host, port and
            secret. Where there are several ranks, `leader_port` is where the first of them listens for the others.
        environment: of each worker.
        drain_seconds: how long running streams may go on after the end has begun.
        step_limit: seconds; a shard whose step runs for longer hangs.
        uses_gpus: each worker wants a GPU of its own.
        gpus: what each worker finds in CUDA_VISIBLE_DEVICES, where Ray does not say it.
    """

    secret: bytes
    scheduler_port: int
    front: Mapping[str, Any]
    workers: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, str]
    drain_seconds: float
    step_limit: float = 10.0
    uses_gpus: bool = False
    gpus: tuple[str, ...] = ()

    def scheduler_settings(self, host: str = "127.0.0.1") -> dict[str, Any]:
        where = {"host": host, "port": self.scheduler_port, "secret": self.secret.hex()}
        return {**where, "step_limit": self.step_limit}

    def front_settings(self, host: str = "127.0.0.1") -> dict[str, Any]:
        """`host` is where the scheduler listens."""
        return {**self.front, "scheduler": f"{host}:{self.scheduler_port}", "secret": self.secret.hex()}

    @property
    def num_ranks(self) -> int:
        """Of each shard."""
        return 1 + max((worker.get("rank", 0) for worker in self.workers), default=0)

    def keeper_settings(self, index: int, host: str = "127.0.0.1", leader_host: str = "127.0.0.1") -> dict[str, Any]:
        """
        Args:
            host: where the scheduler listens.
            leader_host: where the first rank of this worker's shard listens for the others.
        """
        worker = dict(self.workers[index])
        if "leader_port" in worker:
            worker["leader"] = [leader_host, worker.pop("leader_port")]
        return {
            "scheduler": f"{host}:{self.scheduler_port}",
            "secret": self.secret.hex(),
            "worker": worker,
            "env": {**self.environment, **({"CUDA_VISIBLE_DEVICES": self.gpus[index]} if self.gpus else {})},
        }


class Service(Protocol):
    """A service's life. `start`, `watch` (both may be cancelled), `stop`.

    Attributes:
        asked_to_stop: somebody asked for its end on the admin socket.
    """

    asked_to_stop: asyncio.Event

    async def start(self) -> None:
        """Returns once requests are served. Raises QuireError where that can't be; `stop` is due all the same."""
        ...

    async def watch(self) -> None:
        """Notes what happens to the parts. Returns only by raising QuireError: the service is beyond repair."""
        ...

    async def stop(self) -> None:
        """Drain, then end every process that `start` made."""
        ...

    async def hurry(self) -> None:
        """While `stop` drains: wait no longer."""
        ...


class Breaker:
    """Counts the deaths of one part."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._now = now

    def trips(self) -> bool:
        """One more death; whether it is one too many in a short time."""
        self._deaths.append(self._now())
        return len(self._deaths) == MAX_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS


def failure(said: Mapping[str, Any]) -> QuireError:
    """The error that a process's `failed` line stands for."""
    kind = ModelError if said.get("code") == "FAILED_PRECONDITION" else RequestFailed
    return kind(str(said.get("message", "it does not say why")))


def describe_event(said: Mapping[str, Any]) -> str | None:
    """A keeper's status line for people; None where they need not know."""
    if "died" in said:
        it = said["died"]
        how = f"by signal {-it['status']}" if it["status"] < 0 else f"with status {it['status']}"
        if "rank" in it:
            return f"rank {it['rank']} of shard {it['shard_id']} ended {how}"
        return f"the worker of shard {it['shard_id']} ended {how}; its requests go on elsewhere"
    if "over" in said:
        it = said["over"]
        return f"shard {it['shard_id']}: {it['why']}; its requests go on elsewhere, or here once all ranks are back"
    if "restarted" in said:
        it = said["restarted"]
        rank = f"rank {it['rank']} of " if "rank" in it else ""
        return f"{rank}shard {it['shard_id']} is back as process {it['pid']}"
    return str(said["down"]["message"]) if "down" in said else None

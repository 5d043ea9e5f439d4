"""Parts of the service inside a Ray actor. Imports no ray: cluster/head.py makes actors of these classes."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from cluster.processes import new_event_loop, package_homes
from pagetable.errors import QuireError

_log = logging.getLogger(__name__)


class Hosted:
    """A part of the service in an actor: its `main` on a thread with an event loop of its own.

    Args:
        homes: where the driver's packages are; this process must have the same ones. Empty on other machines.
    """

    def __init__(self, settings: dict[str, Any], homes: Mapping[str, str]) -> None:
        found = package_homes()
        wrong = [name for name, home in homes.items() if found[name] != home]
        if wrong:
            raise RuntimeError(f"not the driver's packages: {', '.join(wrong)}")
        self._said: dict[str, Any] = {}
        self._events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=1000)
        self._numbers = count(1)
        self._status: int | None = None
        self._loop = new_event_loop()
        self._task: asyncio.Task[int] | None = None
        self._thread = threading.Thread(target=self._run, args=(settings,), name="part", daemon=True)
        self._thread.start()

    async def main(self, settings: dict[str, Any], say: Callable[..., None]) -> int:
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """The process's pid, the last line of each kind under `said`, the last numbered lines under `events`."""
        return {"pid": os.getpid(), "said": dict(self._said), "events": list(self._events), "status": self._status}

    def stop(self, seconds: float) -> bool:
        """Cancel the part, which then ends in good order; whether it did within `seconds`."""
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, settings: dict[str, Any]) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self.main(settings, self._say))
        try:
            self._status = self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            self._status = 0
        except QuireError as error:
            self._status = 1
            self._say(failed={"code": error.code, "message": str(error)})
        except Exception as error:
            if "ready" in self._said:
                _log.exception("the part ended")
                os._exit(1)  # Ray starts it again
            self._status = 1
            self._say(failed={"code": "INTERNAL", "message": f"{type(self).__name__} ended by {error!r}"})

    def _say(self, **line: Any) -> None:
        self._said.update(line)
        if "loading" not in line:
            self._events.append((next(self._numbers), line))


class SchedulerActor(Hosted):
    async def main(self, settings: dict[str, Any], say: Callable[..., None]) -> int:
        from cluster.scheduler_server import main

        return await main(settings, say)


class FrontActor(Hosted):
    async def main(self, settings: dict[str, Any], say: Callable[..., None]) -> int:
        from cluster.front_process import main

        return await main(settings, say)


class DeviceActor(Hosted):
    async def main(self, settings: dict[str, Any], say: Callable[..., None]) -> int:
        from cluster.keeper import main

        # found here, not by the driver: where a machine is lost, Ray starts this again on another one
        return await main({**settings, "host": address_towards(settings["scheduler"])}, say)


def address_towards(target: str) -> str:
    """The address of this machine that reaches `target`, host:port of IPv4; loopback for loopback. Sends nothing."""
    host, _, port = target.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])

"""Processes of ours that a parent starts and talks to over pipes.

    parent                                 child
      settings, one JSON line ----------->   stdin; its end means: nobody wants you any more
      lines()                 <-----------   stdout, JSON lines

Secrets go this way and no other: never as an argument, a variable of the environment or a line of a log. A child has a
session of its own, so Ctrl-C in a terminal reaches the parent alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

OURS = ("cluster", "kernels", "pagetable", "quire_pb", "worker")
MAX_LINE_BYTES = 1 << 20


class Child:
    """One child process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pidfd: int | None = None
        self._is_gone = False
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._is_gone = True
        except (AttributeError, OSError):  # not Linux, or a kernel or sandbox without it: by pid then
            pass

    @classmethod
    async def start(cls, command: Sequence[str], settings: Mapping[str, Any], environment: Mapping[str, str]) -> Child:
        """Start `command` and hand it its settings. Raises OSError where there is no such program."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        child = cls(process)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once: `lines` ends and `wait` says how
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            await process.stdin.drain()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What the child says, until it closes its stdout. Lines that are no JSON object are passed over."""
        assert self._process.stdout is not None
        while True:
            said = None
            try:
                line = await self._process.stdout.readline()
                if not line:
                    return
                said = json.loads(line)
            except ValueError:  # no JSON, or longer than MAX_LINE_BYTES
                pass
            if isinstance(said, dict):
                yield said
            else:
                _log.warning("process %d says something that is no status", self.pid)

    async def wait(self) -> int:
        """Its exit status; negative where a signal ended it."""
        status = await self._process.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        return status

    def kill(self) -> None:
        """SIGKILL, which also ends a process that is stopped."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: end in good order."""
        self._signal(signal.SIGTERM)

    async def stop(self, seconds: float) -> int:
        """Close its stdin, and kill it where it is still there after `seconds`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            self.kill()
            return await self.wait()

    def _signal(self, number: int) -> None:
        """Not by asyncio's `send_signal`: that reaps a child which has just died, and its status is lost."""
        if self._is_gone or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self.pid, number)


def command(module: str, *arguments: str) -> list[str]:
    """`python -m module`, without the current folder in front of the path: a user's own `worker/` must not be ours."""
    return [sys.executable, "-P", "-m", module, *arguments]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed (it is no part of Windows), which costs a third less a message."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child, with our packages first on its path."""
    users = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(dict.fromkeys([*package_folders(), *filter(None, users)]))
    return {**os.environ, "PYTHONPATH": path, **(more or {})}


def package_homes() -> dict[str, str]:
    """Our packages -> the folder that each would be imported from here; empty where there is none."""
    homes = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = list((spec and spec.submodule_search_locations) or ())
        homes[name] = str(Path(places[0]).resolve()) if places else ""
    return homes


def package_folders() -> list[str]:
    """The folders that hold our packages, as they stand on sys.path."""
    return list(dict.fromkeys(str(Path(home).parent) for home in package_homes().values() if home))

"""A command on a pretend host: what it says, line by line, how it ends, and signals to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from tests.serving import SECONDS, children


class LabError(AssertionError):
    """A command on a host failed or did not say what it should; the text has its output."""


class Job:
    """A command that runs on a host.

    Attributes:
        lines: what it has said so far, stdout and stderr together.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.lines: list[str] = []
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._changed = threading.Condition()
        self._is_silent = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Of the command itself, which is a child of `nsenter`."""
        _await(lambda: children(self._process.pid) or self.status is not None, "nsenter to start its command")
        found = children(self._process.pid)
        if not found:
            raise LabError(f"it has ended\n{self}")
        return found[0]

    def wait_line(self, pattern: str, seconds: float = SECONDS) -> re.Match[str]:
        """The first line, of those said and to come, in which `pattern` is found. LabError where there is none."""
        end, seen = time.monotonic() + seconds, 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self.lines)
                if self._is_silent or not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise LabError(f"never said {pattern!r}\n{self}")

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status. LabError where it goes on for longer."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LabError(f"still runs after {seconds:.0f} s\n{self}") from None
        # a daemon that it left behind may hold the pipe open for ever
        self._reader.join(0.5)
        return status

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the command; nothing where it has ended."""
        with contextlib.suppress(LabError, ProcessLookupError):
            os.kill(self.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._is_silent = True
            self._changed.notify_all()

    def __str__(self) -> str:
        return "\n".join([" ".join(self._command), f"status {self.status}", *self.lines[-60:]])


def _await(holds: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise LabError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.01)

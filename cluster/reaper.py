"""Ends what Ray leaves behind: of all processes below this one, those that are still there after its shutdown."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Reaper:
    """Knows the processes below this one by (pid, start time), so that a reused pid is never taken for one of them.

    Does nothing where there is no /proc.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], str] = {}  # -> its name

    def look(self) -> None:
        """Remember every process below this one. Call it while they are still somebody's children."""
        table = _processes()
        below, grown = {os.getpid()}, True
        while grown:
            found = {pid for pid, process in table.items() if process.parent in below} - below
            below |= found
            grown = bool(found)
        self._known |= {(pid, table[pid].start): table[pid].name for pid in below - {os.getpid()}}

    def has_lost(self, name: str) -> bool:
        """Whether one of those that were seen was called `name` and is gone."""
        alive = _identities()
        return any(known == name and process not in alive for process, known in self._known.items())

    def left(self) -> list[int]:
        return sorted(pid for pid, _ in self._known.keys() & _identities())

    def reap(self, seconds: float) -> list[int]:
        """Wait until all are gone, at most `seconds`; kill the rest. Returns what had to be killed."""
        end = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return left


class _Process(NamedTuple):
    parent: int
    start: str
    name: str


def _identities() -> set[tuple[int, str]]:
    return {(pid, process.start) for pid, process in _processes().items()}


def _processes() -> dict[int, _Process]:
    """By pid, without zombies."""
    table = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            head, _, tail = (folder / "stat").read_text(errors="replace").rpartition(")")
            fields = tail.split()
            if fields[0] != "Z":
                table[int(folder.name)] = _Process(int(fields[1]), fields[19], head.partition("(")[2])
    return table

"""The cores of one rank among several: its threads stay there, and no other rank of the host gets them.

A system that may move threads puts one that wakes beside the one that woke it. Ranks wake each other all the time, so
two of them come to share a core for a time slice while another core idles, and who was moved finds its caches empty.

A core is claimed by an abstract socket of its name, which the system gives back however the process ends. Processes in
other network namespaces do not see the claim: containers need cores of their own, or no claims.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_NAME = "\0quire-core-{}"


class Cores:
    """Some cores, this process's until it ends or `release`; none of them: threads run where the system puts them.

    Attributes:
        cpus: their numbers.
    """

    def __init__(self, cpus: frozenset[int] = frozenset(), claims: tuple[socket.socket, ...] = ()) -> None:
        self.cpus, self._claims = cpus, claims

    @classmethod
    def claim(cls, count: int, topology: Path = _TOPOLOGY) -> Cores:
        """`count` cores that this process may use and nobody has claimed; none where so many are not left, or the
        system is not Linux.

        They are next to each other in their numbers, and different cores before hardware threads of one core.

        Args:
            topology: where the system describes its cores (tests hand in a folder).
        """
        if sys.platform != "linux":
            return cls()
        found: dict[int, socket.socket] = {}
        for cpu in sorted(os.sched_getaffinity(0), key=lambda cpu: (_turn(cpu, topology), cpu)):
            if len(found) == count:
                break
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(_NAME.format(cpu))
            except OSError:  # somebody has it
                claim.close()
            else:
                found[cpu] = claim
        cores = cls(frozenset(found), tuple(found.values()))
        if len(found) < count:
            cores.release()
        return cores

    def release(self) -> None:
        """Give them back. Threads that stay there go on doing so."""
        for each in self._claims:
            each.close()
        self.cpus, self._claims = frozenset(), ()

    def stay(self) -> None:
        """Keep the calling thread, and those that it starts from now on, on these cores."""
        if self.cpus:
            with contextlib.suppress(OSError):  # taken from this process meanwhile
                os.sched_setaffinity(0, self.cpus)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """`stay`, until the block ends: for a thread that is not ours. Blocks may stand in each other."""
        before = os.sched_getaffinity(0) if self.cpus else self.cpus
        if before == self.cpus:
            yield
            return
        self.stay()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def _turn(cpu: int, topology: Path) -> int:
    """Which of its core's hardware threads a cpu is; 0 where the system does not say."""
    try:
        text = (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
        siblings = [cpu for part in text.strip().split(",") for cpu in _range(part)]
    except (OSError, ValueError):
        return 0
    return siblings.index(cpu) if cpu in siblings else 0


def _range(text: str) -> range:
    """`4` or `4-7`."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)

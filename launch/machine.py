"""What this process may use of its machine: cores and memory, by affinity, cgroups (v1 and v2) and /proc."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep at barriers, unless the user said otherwise. Call it before torch is imported.

    Threads that spin wait for cores that neighbours hold: on a busy machine two of them were 100 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def available_cores(root: Path = ROOT, affinity: int | None = None) -> int:
    """Cores that this process may keep busy: its affinity, cut by the CPU quotas of its cgroups; at least 1.

    Args:
        root: where `proc` and `sys` are (tests hand in a folder).
        affinity: cores that the process may run on; None asks the system.
    """
    affinity = _affinity() if affinity is None else affinity
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _cpu_quota(folder)) is not None]
    # A quota of 1.5 cores keeps two threads busy three quarters of the time, which beats one thread all the time.
    return max(1, min([affinity, *(math.ceil(quota) for quota in quotas)]))


def has_whole_cores(count: int, root: Path = ROOT, affinity: int | None = None) -> bool:
    """Whether so many threads may each have a core to itself: no quota says that this process shares its cores."""
    affinity = _affinity() if affinity is None else affinity
    return count <= affinity == available_cores(root, affinity)


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process can still take, by the host and by its cgroups; None where neither says."""
    rooms = [room for folder in _folders(root, "memory") if (room := _memory_room(folder)) is not None]
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            rooms.append(int(value.split()[0]) * 1024)
    return max(0, min(rooms)) if rooms else None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The cgroup folders of this process for one controller, innermost first: each may hold a limit.

    Inside a container /proc/self/cgroup may name a path of the host that is not mounted here; its ancestors
    that do exist, down to the mount itself, are the ones that bind.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "":
            mount = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = mount / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount) and folder.is_dir())


def _cpu_quota(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    if not words:
        words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    quota, period = _number(words[0]), _number(words[-1])
    return quota / period if quota is not None and period else None


def _memory_room(folder: Path) -> int | None:
    limit = _number(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
    used = _number(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"))
    if limit is None or used is None:
        return None
    # Cached file pages (mapped weights among them) count as used, but the kernel gives them up before it fails.
    stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return limit - used + (_number(stat.get("total_inactive_file", stat.get("inactive_file", ""))) or 0)


def _number(text: str) -> int | None:
    """A non-negative number, or None for `max`, `-1` and an absent file."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class CpuMeter:
    """CPU seconds since it was made: this process's own, and which share of the machine others took."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._start = self._now()

    def read(self, elsewhere: float = 0.0) -> tuple[float, float]:
        """(CPU seconds of this process and `elsewhere`, share of all cores that others used: 0 is a clean run).

        Args:
            elsewhere: CPU seconds of other processes that count as this one's.
        """
        wall, own, all_of_it = (now - then for now, then in zip(self._now(), self._start, strict=True))
        own += elsewhere
        return own, min(1.0, max(0.0, all_of_it - own) / (max(wall, 1e-9) * (os.cpu_count() or 1)))

    def _now(self) -> tuple[float, float, float]:
        own = time.process_time()
        words = _read(self._root / "proc/stat").partition("\n")[0].split()
        # user, nice, system, irq and softirq; idle, iowait and steal are nobody's work
        busy = sum(int(words[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK") if len(words) > 7 else own
        return time.perf_counter(), own, busy


def wait_quiet(limit_s: float, share: float = 0.12) -> None:
    """Wait until others use less than `share` of the machine, at most `limit_s` seconds."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        meter = CpuMeter()
        time.sleep(0.4)
        if meter.read()[1] < share:
            return

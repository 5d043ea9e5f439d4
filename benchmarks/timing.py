"""Timers for functions of microseconds on a machine that others use too."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Target = tuple[type, str]  # a class and the name of one of its functions


@contextmanager
def timed(targets: list[Target]) -> Iterator[list[int]]:
    """Replace functions by ones that add their nanoseconds and calls to the list that this yields."""
    spent = [0, 0]
    now = time.perf_counter_ns
    originals = [(owner, name, getattr(owner, name)) for owner, name in targets]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any) -> Any:
            start = now()
            result = function(*args)
            spent[0] += now() - start
            spent[1] += 1
            return result

        return wrapped

    try:
        for owner, name, function in originals:
            setattr(owner, name, wrap(function))
        yield spent
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


class _Empty:
    def call(self) -> None:
        pass


def timer_cost() -> float:
    """Nanoseconds that a timer counts for a function that does nothing."""
    empty, samples = _Empty(), []
    with timed([(_Empty, "call")]) as spent:
        for _ in range(200):
            spent[0] = 0
            for _ in range(100):
                empty.call()
            samples.append(spent[0] / 100)
    return statistics.median(samples)


def calibrate() -> float:
    """CPU nanoseconds of a thousand turns of a trivial loop: the median of some."""
    samples = []
    for _ in range(5):
        start, value = time.thread_time_ns(), 0
        for turn in range(20_000):
            value += turn
        samples.append((time.thread_time_ns() - start) / 20)
    return statistics.median(samples)


class Report:
    """Prints what was found, as a table or as JSON lines. The trivial loop is timed before and after each part, since
    a neighbour on the same core slows both alike."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._case = ""
        self._loops = [calibrate()]

    def begin(self, case: str) -> None:
        self._case = case
        if not self._as_json:
            print(f"\n{case:<68} {'median':>9} {'mean':>9} {'p99':>9}  loops", flush=True)

    def whole(self, part: str, samples: Sequence[float]) -> float:
        """What was timed in CPU time; the median in microseconds."""
        ordered = sorted(samples)
        late = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        return self._line(part, 0, len(ordered), statistics.median(ordered), statistics.fmean(ordered), late)

    def part(self, part: str, depth: int, samples: Sequence[float]) -> None:
        """What was timed by the clock on the wall: only the median means something on a busy machine."""
        self._line(part, depth, len(samples), statistics.median(samples))

    def end(self) -> None:
        turn = statistics.median(self._loops) / 1e3
        if self._as_json:
            print(json.dumps({"case": "calibration", "part": "loop", "ns_per_turn": round(turn, 2)}), flush=True)
        else:
            print(f"\none turn of the trivial loop: {turn:.1f} ns (median of the run)")

    def _line(self, part: str, depth: int, steps: int, *nanoseconds: float) -> float:
        self._loops.append(calibrate())
        loops = nanoseconds[0] / statistics.fmean(self._loops[-2:])
        if self._as_json:
            names = ("median_us", "mean_us", "p99_us")
            numbers = {name: round(value / 1e3, 3) for name, value in zip(names, nanoseconds, strict=False)}
            line = {"case": self._case, "part": part, "depth": depth, "steps": steps, **numbers}
            print(json.dumps(line | {"kiloloops": round(loops, 3)}), flush=True)
        else:
            cells = " ".join(f"{value / 1e3:6.1f} us" for value in nanoseconds)
            print(f"  {'  ' * depth + part:<66} {cells:<29} {loops:6.1f}k", flush=True)
        return nanoseconds[0] / 1e3

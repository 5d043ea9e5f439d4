"""`quire plan` beside runs: predicted and measured time of the same work, turn by turn.

    python -m benchmarks.predictions --model DIR [--hardware NAME|FILE] [--cases T=2:decode:8,...] [--turns 5]
                                     [--awake] [--json]

Constants are measured first, as by `quire plan --measure`, or taken from --hardware. But how much cores read changes
within seconds on a virtual machine, and with it whatever reads weights and does little else. So as many readers as the
layout has ranks are timed before and after each turn; a turn is predicted with both rates, and left out where that
makes a difference of more than a twentieth. Turns in which two read at least 1.7 times as much as the table says of one
have a line of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.parallel import KEEPS_UP, ONE, PAGE, STAGES, TENSOR, Awake, begin, decode, prefill, step_seconds
from launch.flags import Parser
from launch.hardware_file import read_hardware
from launch.llm import LLM
from launch.measure import measure, read_rate
from launch.plan import Question, add_plan_flags
from pagetable.cost import Ways
from pagetable.hardware import Hardware

LAYOUTS: dict[str, tuple[dict[str, Any], Ways]] = {
    "T=1": (ONE, Ways()),
    "T=2": (TENSOR, Ways(tensor=2)),
    "G=2": (PAGE, Ways(tensor=2, page=2)),
    "P=2": (STAGES, Ways(pipeline=2)),
}
WORK = {
    "T=1": ("decode:8", "decode:32", "prefill:4x1024", "long:32768"),
    "T=2": ("decode:8", "decode:32", "prefill:4x1024", "long:32768"),
    "G=2": ("decode:8", "decode:32", "long:32768"),
    "P=2": ("decode:16", "decode:32", "decode:128", "prefill:8x2048"),
}
CASES = tuple(f"{layout}:{work}" for layout, each in WORK.items() for work in each)
DECODE_CONTEXT, STEPS = 64, 12
MAX_TOKENS = 512  # of a long sequence, in all turns
STEADY = 0.05  # that a prediction may change during a turn


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of one step (or of all prompts), and how much its ranks could read together."""

    predicted: float
    measured: float
    read_bytes_per_s: float


class Case:
    """One layout at one kind of work."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self._model = name, model
        self.layout, self._kind, size = name.split(":")
        sizes = [int(each) for each in size.split("x")]
        if self._kind == "decode":
            (self._batch,), self.context = sizes, DECODE_CONTEXT + STEPS  # halfway through a turn
        elif self._kind == "prefill":
            self._batch, self.context = sizes
        else:
            self._batch, (self.context,) = 1, sizes

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.layout][1].num_devices

    @property
    def is_long(self) -> bool:
        return self._kind == "long"

    def measure(self, llm: LLM) -> float:
        """Seconds of a step, or of all prompts."""
        if self._kind == "decode":
            return self._batch / decode(self._batch, DECODE_CONTEXT, STEPS)(llm)
        if self._kind == "prefill":
            return self._batch * self.context / prefill(self._batch, self.context)(llm)
        return self._long_step(llm)

    def predict(self, hardware: Hardware) -> float:
        parser = Parser()
        add_plan_flags(parser)
        sizes = ["--devices", "2", "--context", str(self.context), "--batch", str(self._batch)]
        question = Question.of(parser.parse_args([self._model, *sizes, "--dtype", "bfloat16"]))
        cost = replace(question, hardware=hardware).cost(LAYOUTS[self.layout][1])
        found = cost.predict(question.load)
        return self._batch * self.context / found.prefill_tokens_per_s if self._kind == "prefill" else found.step_s

    def _long_step(self, llm: LLM) -> float:
        """The sequence is prefilled in the first turn and goes on in the others."""
        if not llm.loop.has_work:
            begin(llm, 1, self.context, MAX_TOKENS)
        return step_seconds(llm, STEPS)


def turns(cases: Sequence[Case], model: str, hardware: Hardware, count: int) -> Iterator[tuple[Case, Turn]]:
    """Cases of one layout in turn, so that all of them see both states of memory. Its engine is alone: of several, one
    would have cores of its own and the others would not."""
    longest = max(case.context for case in cases) + MAX_TOKENS
    base: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": longest,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 1 << 30,
        "preallocate_kv_cache": True,
    }
    (layout,) = {case.layout for case in cases}
    engine = LLM(model, **base, **LAYOUTS[layout][0])
    try:
        for case in cases:
            case.measure(engine)  # buffers, pages of the pool, a warm team
        for _ in range(count):
            for case in cases:
                before = read_rate(case.num_ranks)
                measured = case.measure(engine)
                rates = before, read_rate(case.num_ranks)
                first, last = (case.predict(replace(hardware, host_read_bytes_per_s=rate)) for rate in rates)
                if abs(last - first) <= STEADY * first:
                    yield case, Turn((first + last) / 2, measured, sum(rates) / 2)
    finally:
        engine.close()


def lines(case: Case, found: Sequence[Turn], alone: float) -> Iterator[dict[str, Any]]:
    """Medians; of several ranks for each state of memory in which there were turns."""
    for keeps_up in (True, False) if case.num_ranks > 1 else (None,):
        least = KEEPS_UP * alone
        some = [turn for turn in found if keeps_up is None or (turn.read_bytes_per_s >= least) == keeps_up]
        if some:
            yield {
                "case": case.name,
                "memory_keeps_up": keeps_up,
                "turns": len(some),
                "read_gb_per_s": round(1e-9 * statistics.median(turn.read_bytes_per_s for turn in some), 1),
                "predicted_ms": round(1e3 * statistics.median(turn.predicted for turn in some), 2),
                "measured_ms": round(1e3 * statistics.median(turn.measured for turn in some), 2),
                "off": round(statistics.median(turn.predicted / turn.measured for turn in some) - 1, 3),
            }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder; benchmarks.compare makes shape mid")
    parser.add_argument("--hardware", help="a table's name or file; default: measured first")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--turns", type=int, default=5, help="at most 32: a long sequence goes on in all; default: 5")
    parser.add_argument("--awake", action="store_true", help="keep cores awake (benchmarks.parallel --await-memory)")
    parser.add_argument("--json", action="store_true", help="one JSON line for each line of the table")
    options = parser.parse_args(arguments)
    say: Callable[[str], None] = lambda text: print(f"measuring {text}", file=sys.stderr)  # noqa: E731
    hardware = read_hardware(options.hardware) if options.hardware else measure(say=say)
    cases = [Case(name, options.model) for name in options.cases.split(",")]
    # engines that hold a long sequence do nothing else meanwhile
    kinds = dict.fromkeys((case.layout, case.is_long) for case in cases)
    groups = [[case for case in cases if (case.layout, case.is_long) == kind] for kind in kinds]
    if not options.json:
        print("case                keeps up  turns  GB/s  predicted ms  measured ms  predicted / measured")
    with Awake() if options.awake else nullcontext():
        for group in groups:
            found: dict[Case, list[Turn]] = {case: [] for case in group}
            for case, turn in turns(group, options.model, hardware, options.turns):
                found[case].append(turn)
            for case, some in found.items():
                for line in lines(case, some, hardware.read_bytes_per_s):
                    print(json.dumps(line) if options.json else _row(line), flush=True)
    return 0


_STATES = {True: "yes", False: "no", None: ""}


def _row(line: dict[str, Any]) -> str:
    return (
        f"{line['case']:<20}{_STATES[line['memory_keeps_up']]:>8}{line['turns']:>7}"
        f"{line['read_gb_per_s']:>6}{line['predicted_ms']:>14}{line['measured_ms']:>13}{line['off']:>+14.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())

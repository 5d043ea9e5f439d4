"""Layouts beside one rank, in the same minutes: what tensor, page and pipeline ranks win on this machine's cores.

    python -m benchmarks.parallel --model DIR [--cases decode:8,prefill,...] [--await-memory 60]

Every engine of a case is up at once and they take turns, there and back in each round: a drift meets all alike. A ratio
is the median over rounds. Steal and foreign load slow both sides of a pair, so trust ratios, and many rounds more.

Two cores of a virtual machine may share a path to memory or not, and its host changes that within seconds: two readers
get 1.2 or 2.0 times the rate of one. So each turn is set between two looks at that, and a ratio is also given for the
rounds in which memory kept up in every turn of the two. A host spreads cores that are busy, and puts one that wakes
beside another: `--await-memory` keeps both from ever halting, as a kernel booted with idle=poll would, and begins a
turn when memory keeps up. Work that does little but read is set beside two ranks apart, too, which find memory in the
same state. Goals beside those are no issue's: 0.85 of them is what 1.7 times one rank would be if memory kept up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from launch.llm import LLM

ONE = {"threads": 1}
BOTH = {"threads": 2}
TENSOR = {"threads": 1, "tensor_parallel_size": 2}
PAGE = {"threads": 1, "tensor_parallel_size": 2, "page_parallel_size": 2}
AHEAD = {"async_scheduling": True}
STAGES = {"threads": 1, "pipeline_parallel_size": 2}
KEEPS_UP = 1.7  # times the rate of one reader, for two


@dataclass(frozen=True)
class Case:
    """Rates of some engines at one kind of work, and the ratios that the issue sets goals for.

    Attributes:
        engines: name -> settings.
        goals: (numerator, denominator, at least).
        apart: what two ranks that have nothing to do with each other do at once, "apart", which read from memory as
            much as two ranks of a shard: those can do no more. It is the same work for tensor ranks, which each do half
            of it, and half of the batch for stages, which each pass both halves. "alone" is twice what one does alone.
    """

    measure: Callable[[LLM], float]
    engines: dict[str, dict[str, Any]]
    goals: tuple[tuple[str, str, float], ...]
    apart: Callable[[LLM], float] | None = None


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    rng = random.Random(time.time_ns())  # no prefix of an earlier turn
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def decode(batch: int, context: int = 64, steps: int = 24) -> Callable[[LLM], float]:
    """Tokens a second of `batch` sequences that all decode."""

    def measure(llm: LLM) -> float:
        ids = begin(llm, batch, context, steps * 8)
        for _ in range(4):
            llm.step()
        start, count = time.perf_counter(), 0
        plans = steps * llm.config.pipeline_parallel_size
        with llm.cores.hold():
            for _ in range(plans):
                count += sum(output.token is not None for output in llm.loop.step())
        rate = count / (time.perf_counter() - start)
        for each in ids:
            llm.abort(each)
        _drain(llm)
        return rate

    return measure


def attention(context: int, steps: int = 12) -> Callable[[LLM], float]:
    """Steps a second of one sequence of so long a context, by what they take beyond the steps of a short one.

    The short one runs on an engine of its own, of the same layout, just before and after: memory may have changed else.
    """
    short: dict[LLM, LLM] = {}

    def measure(llm: LLM) -> float:
        if llm not in short:
            short[llm] = LLM(llm.config.model, config=llm.config)
            begin(short[llm], 1, 64, 1000)
            begin(llm, 1, context, 500)
        before = step_seconds(short[llm], steps)
        long = step_seconds(llm, steps)
        return 1 / (long - (before + step_seconds(short[llm], steps)) / 2)

    return measure


def prefill(count: int, length: int) -> Callable[[LLM], float]:
    """Prompt tokens a second until every prompt has its first token."""

    def measure(llm: LLM) -> float:
        ids = _add(llm, prompts(count, length, llm.limits.vocab_size), 1)
        start = time.perf_counter()
        while llm.loop.has_work:
            llm.step()
        rate = count * length / (time.perf_counter() - start)
        for each in ids:
            llm.pop(each)
        return rate

    return measure


def begin(llm: LLM, batch: int, context: int, max_tokens: int) -> list[str]:
    """So many sequences of random tokens, each with its first output."""
    ids = _add(llm, prompts(batch, context, llm.limits.vocab_size), max_tokens)
    while any(not sequence.num_outputs for sequence in llm.loop.scheduler.sequences()):
        llm.step()
    return ids


def step_seconds(llm: LLM, steps: int) -> float:
    """Of the median step."""
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        llm.step()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _at_once(measure: Callable[[LLM], float], engines: list[LLM]) -> float:
    with ThreadPoolExecutor(len(engines)) as threads:
        return sum(threads.map(measure, engines))


def _add(llm: LLM, many: list[list[int]], max_tokens: int) -> list[str]:
    fields = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}
    return [llm.add_request({"prompt_token_ids": prompt, **fields}) for prompt in many]


def _drain(llm: LLM) -> None:
    while llm.loop.scheduler.num_in_flight:
        llm.loop.scheduler.retire(llm.loop.pipe.receive())


TENSOR_SET = {"one": ONE, "both": BOTH, "T=2": TENSOR}
AHEAD_SET = {"one": ONE, "one ahead": {**ONE, **AHEAD}, "both": BOTH, "both ahead": {**BOTH, **AHEAD}}
AHEAD_GOALS = (("one ahead", "one", 1.0), ("both ahead", "both", 1.0))
CASES = {
    "decode:8": Case(
        decode(8), TENSOR_SET, (("T=2", "one", 1.7), ("T=2", "both", 0.9), ("T=2", "apart", 0.85)), apart=decode(8)
    ),
    "decode:32": Case(decode(32), TENSOR_SET, (("T=2", "one", 1.8), ("T=2", "both", 0.9))),
    "prefill": Case(prefill(4, 1024), TENSOR_SET, (("T=2", "one", 1.9), ("T=2", "both", 0.9))),
    "attention:32768": Case(
        attention(32768),
        {"one": ONE, "both": BOTH, "G=2": PAGE},
        (("G=2", "one", 1.8), ("G=2", "both", 0.9)),
    ),
    "ahead:8": Case(decode(8), AHEAD_SET, AHEAD_GOALS),
    "ahead:64": Case(decode(64), AHEAD_SET, AHEAD_GOALS),
    "stages:prefill": Case(prefill(8, 2048), {"one": ONE, "P=2": STAGES}, (("P=2", "one", 1.8),)),
    "stages:decode:128": Case(decode(128), {"one": ONE, "P=2": STAGES}, (("P=2", "one", 1.6),)),
    "stages:decode:16": Case(
        decode(16),
        {"one": ONE, "P=2": STAGES},
        (("P=2", "one", 0.0), ("alone", "one", 0.0), ("P=2", "alone", 0.95), ("P=2", "apart", 0.95)),
        apart=decode(8),
    ),
}


class Readers:
    """How much quicker two cores read than one, at the moment: 1 to 2."""

    def __init__(self, num_bytes: int = 1 << 28) -> None:
        self._words = torch.ones(num_bytes // 4)  # more than caches hold

    def look(self, patience: float = 0.0) -> float:
        """Args: patience: seconds to wait until it is `KEEPS_UP`."""
        end = time.perf_counter() + patience
        while (found := self._look()) < KEEPS_UP and time.perf_counter() < end:
            time.sleep(0.2)
        return found

    def _look(self) -> float:
        before, seconds = torch.get_num_threads(), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            self._words.sum()
            seconds.append(min(self._seconds() for _ in range(3)))
        torch.set_num_threads(before)
        return seconds[0] / seconds[1]

    def _seconds(self) -> float:
        start = time.perf_counter()
        self._words.sum()
        return time.perf_counter() - start


class Awake:
    """Two cores that never halt: on each a process that runs where nothing else wants to, and does nothing.

    It stays in this session: as one of its own a system that shares cores between sessions gave it 4 ms of every 280.
    It yields all the time: what it is due it takes in microseconds then, not in a tick.
    """

    _CODE = """import os, sys
parent = os.getppid()
os.setpgrp()
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    os.sched_yield()
"""

    def __enter__(self) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:2]
        self._processes = [subprocess.Popen([sys.executable, "-c", self._CODE, str(cpu)]) for cpu in cpus]

    def __exit__(self, *_: object) -> None:
        for each in self._processes:
            each.kill()
            each.wait()


def run(name: str, case: Case, model: str, rounds: int, dtype: str, as_json: bool, patience: float) -> None:
    longest = 2048 + 256 if ":32768" not in name else 32768 + 512
    base = {"dtype": dtype, "max_model_len": longest, "max_num_seqs": 128, "kv_cache_memory_bytes": 1 << 30}
    base["preallocate_kv_cache"] = True  # or a step here and there waits for pages that are new to the machine
    engines = {each: LLM(model, **base, **settings) for each, settings in case.engines.items()}
    pair = [LLM(model, **base, **ONE) for _ in range(2 if case.apart else 0)]
    turns = {each: partial(case.measure, llm) for each, llm in engines.items()}
    if case.apart is not None:
        apart = case.apart
        turns |= {"alone": lambda: 2 * apart(pair[0]), "apart": lambda: _at_once(apart, pair)}
    rates: dict[str, list[float]] = {each: [] for each in turns}  # by round
    keeps: dict[str, list[bool]] = {each: [] for each in turns}
    readers = Readers()
    try:
        for turn in turns.values():
            turn()  # buffers, pages of the pool, a warm team
        for _ in range(rounds):
            seconds, kept = dict.fromkeys(turns, 0.0), dict.fromkeys(turns, True)
            for each in [*turns, *reversed(turns)]:
                before = readers.look(patience)
                seconds[each] += 1 / turns[each]()
                kept[each] &= min(before, readers.look()) >= KEEPS_UP
            for each in turns:
                rates[each].append(2 / seconds[each])
                keeps[each].append(kept[each])
    finally:
        for llm in [*engines.values(), *pair]:
            llm.close()
    found: dict[str, Any] = {"case": name, "tok/s": {each: round(statistics.median(rates[each]), 1) for each in rates}}
    for top, bottom, goal in case.goals:
        pairs = [a / b for a, b in zip(rates[top], rates[bottom], strict=True)]
        low, high = min(pairs), max(pairs)
        found[f"{top} / {bottom}"] = [round(each, 3) for each in (statistics.median(pairs), low, high)] + [goal]
        quick = [each for each, *both in zip(pairs, keeps[top], keeps[bottom], strict=True) if all(both)]
        if quick:
            found[f"{top} / {bottom}, memory keeps up"] = [round(statistics.median(quick), 3), len(quick)]
    if as_json:
        print(json.dumps(found), flush=True)
        return
    print(f"{name:<18} " + "  ".join(f"{each} {rate:.0f}" for each, rate in found["tok/s"].items()) + " tok/s")
    for key, value in found.items():
        if " / " in key:
            print(f"  {key:<40} {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder; goals are for shape mid (benchmarks.compare makes it)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--await-memory", type=float, metavar="SECONDS", help="keep cores awake, and begin turns when memory keeps up"
    )
    found = parser.parse_args()
    patience: float = found.await_memory or 0.0
    with Awake() if found.await_memory is not None else nullcontext():
        for name in found.cases.split(","):
            run(name, CASES[name], found.model, found.rounds, found.dtype, found.json, patience)


if __name__ == "__main__":
    main()

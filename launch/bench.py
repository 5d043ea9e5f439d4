"""`quire bench`: one engine, in this process, over named cases; one line for each.

Cases, seeds and lengths are those of the scripts that measured the peers, so that lines compare directly:

    prefill:N     one N-token prompt, one token out.           value = N / time to first token
    decode:B      B x (128 in, 128 out).                       value = tokens after the last first token / that time
    mixed:N       N requests, 32-1024 in, 16-256 out, seeded.  value = output tokens / total time
    prefix:N      N requests, 1024 shared + 32 own, 64 out, prefix cache on. value = output tokens / total time
    prefixwarm:N  the same after one request with that prefix has finished (untimed)
    noprefix:N    the same with the prefix cache off
    long:N        one N-token prompt, 33 out.                  value = tokens after the first / that time

Each case runs `warmups` times untimed (cut down where a run is long), then `repeats` times, each with fresh
prompts; the median run is reported with all runs. `per_cpu_s` is the rate per CPU second of this process: with one
thread it barely depends on what else the machine does.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launch.config import EngineConfig
from launch.machine import CpuMeter, wait_quiet
from pagetable.errors import ConfigError, RequestFailed
from pagetable.sampling import Request, SamplingParams
from quire import __version__

if TYPE_CHECKING:
    from launch.llm import LLM

# (prompt token ids, tokens to make)
Job = tuple[list[int], int]

VOCAB_LOW, VOCAB_HIGH = 3, 4096
DEFAULT_SIZES = {
    "prefill": 2048,
    "decode": 1,
    "mixed": 64,
    "prefix": 32,
    "prefixwarm": 32,
    "noprefix": 32,
    "long": 8192,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the engine's configuration.

    Attributes:
        cases: comma separated, e.g. `prefill,decode:8`.
        quiet: seconds to wait, at most, for idle cores before each timed run.
        as_json: JSON lines instead of a table.
    """

    cases: str
    repeats: int = 3
    warmups: int = 1
    quiet: float = 0.0
    as_json: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= 1000:
            raise ConfigError("--repeats", self.repeats, "be from 1 to 1000")
        if not 0 <= self.warmups <= 1000:
            raise ConfigError("--warmups", self.warmups, "be from 0 to 1000")
        if not 0 <= self.quiet <= 3600:
            raise ConfigError("--quiet", self.quiet, "be from 0 to 3600 seconds")


@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    size: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """`"decode:8"`; the size may be left out. ConfigError for an unknown kind or a size that is no number."""
        kind, _, size = text.strip().partition(":")
        if kind not in DEFAULT_SIZES:
            raise ConfigError("--case", text, f"name one of {', '.join(DEFAULT_SIZES)}, with or without :N")
        if size and not re.fullmatch("[1-9][0-9]{0,6}", size):
            raise ConfigError("--case", text, "have a whole number from 1 to 9999999 after the colon")
        return cls(kind, int(size) if size else DEFAULT_SIZES[kind])

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.size}"

    def jobs(self, repeat: int | str) -> list[Job]:
        """The requests of one repeat: the same lengths each time, other tokens."""
        rng = random.Random(f"{self.kind}-{self.size}-{repeat}")
        if self.kind == "prefill":
            return [(_ids(rng, self.size), 1)]
        if self.kind == "decode":
            return [(_ids(rng, 128), 128) for _ in range(self.size)]
        if self.kind == "mixed":
            shape = random.Random(f"mixed-{self.size}")
            return [(_ids(rng, shape.randint(32, 1024)), shape.randint(16, 256)) for _ in range(self.size)]
        if self.kind == "long":
            return [(_ids(rng, self.size), 33)]
        shared = _ids(rng, 1024)
        return [(shared + _ids(rng, 32), 64) for _ in range(self.size)]

    def warm_jobs(self, repeat: str) -> list[Job]:
        """The case itself, cut down where a whole run takes long."""
        jobs = self.jobs(repeat)
        if self.kind == "long":
            return [(prompt[:1024], 8) for prompt, _ in jobs]
        if self.kind == "decode":
            return [(prompt, 16) for prompt, _ in jobs]
        return jobs if self.kind == "prefill" else jobs[:4]

    def configure(self, config: EngineConfig) -> EngineConfig:
        """The engine that this case needs."""
        if self.kind == "long":
            length, seqs, sharing = self.size + 64, 1, False
        else:
            length, seqs, sharing = 2304, 64, self.kind in ("prefix", "prefixwarm")
        return dataclasses.replace(config, max_model_len=length, max_num_seqs=seqs, enable_prefix_caching=sharing)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB_LOW, VOCAB_HIGH) for _ in range(count)]


class Watch(Protocol):
    """What can be measured.

    Attributes:
        elsewhere: CPU seconds that the last run took in other processes.
    """

    elsewhere: float

    def run(self, jobs: Sequence[Job]) -> list[list[float]]:
        """All jobs submitted at once, greedy, never stopping early; per job the perf_counter() of its tokens."""
        ...


class Stopwatch:
    """Runs jobs through the engine's loop and notes when each token came."""

    elsewhere = 0.0

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._served = 0

    def run(self, jobs: Sequence[Job]) -> list[list[float]]:
        """See `Watch.run`."""
        loop = self._llm.loop
        times: dict[str, list[float]] = {}
        for prompt, count in jobs:
            self._served += 1
            name = f"bench-{self._served}"
            params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, seed=0)
            times[name] = []
            loop.add(Request(request_id=name, prompt=tuple(prompt), params=params))
        while loop.has_work:
            tokens = loop.step()
            now = time.perf_counter()
            for token in tokens:
                if token.failure:
                    raise RequestFailed(f"{token.request_id}: {token.failure}")
                if token.token is not None:
                    times[token.request_id].append(now)
        return list(times.values())


def measure(watch: Watch, case: Case, repeat: int, quiet: float) -> dict[str, float]:
    """One timed run; all times in seconds."""
    jobs = case.jobs(repeat)
    if case.kind == "prefixwarm":
        watch.run([(jobs[0][0][:1024] + _ids(random.Random(f"other-{repeat}"), 32), 2)])
    wait_quiet(quiet)
    meter, start = CpuMeter(), time.perf_counter()
    times = watch.run(jobs)
    own, foreign = meter.read(watch.elsewhere)
    wanted = [count for _, count in jobs]
    if [len(stamps) for stamps in times] != wanted:
        raise AssertionError(f"{case.name}: {[len(stamps) for stamps in times]} tokens came, {wanted} were asked for")
    end = max(stamps[-1] for stamps in times)
    total = end - start
    first = sorted(stamps[0] - start for stamps in times)
    found = {
        "total_s": total,
        "ttft_p50": first[len(first) // 2],
        "ttft_p99": first[min(len(first) - 1, int(0.99 * len(first)))],
        "ttft_max": first[-1],
        "cpu_s": own,
        "foreign": foreign,
    }
    if case.kind == "prefill":
        found["value"] = case.size / first[0]
    elif case.kind in ("decode", "long"):
        last_first = max(stamps[0] for stamps in times)
        found["value"] = sum(stamp > last_first for stamps in times for stamp in stamps) / (end - last_first)
        found["e2e_tok_s"] = sum(wanted) / total
        if case.kind == "long":
            found["prefill_tok_s"] = case.size / first[0]
    else:
        found["value"] = sum(wanted) / total
    found["per_cpu_s"] = found["value"] * total / own
    return found


def summary(case: Case, config: EngineConfig, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The line of one case: the median's numbers beside those of all runs."""
    values = [run["value"] for run in runs]
    middle = sorted(runs, key=lambda run: run["value"])[len(runs) // 2]
    line: dict[str, Any] = {
        "peer": "quire",
        "version": __version__,
        "model": Path(os.path.normpath(config.model)).name,
        "case": case.name,
        "dtype": config.dtype,
        "threads": config.num_threads,
        "value": round(statistics.median(values), 2),
        "unit": "tok/s",
        "best": round(max(values), 2),
        "per_cpu_s": round(statistics.median(run["per_cpu_s"] for run in runs), 2),
        "per_cpu_s_best": round(max(run["per_cpu_s"] for run in runs), 2),
        "cleanest": round(min(runs, key=lambda run: run["foreign"])["value"], 2),
        "runs": [round(value, 2) for value in values],
        "foreign": [round(run["foreign"], 3) for run in runs],
        "spread": round((max(values) - min(values)) / max(values), 3),
    }
    line |= {name: round(value, 4) for name, value in middle.items() if name not in line}
    return line


def bench(config: EngineConfig, options: Options) -> int:
    """Print one line for each case. Cases that need the same engine share it."""
    from launch.llm import LLM

    cases = [Case.parse(text) for text in options.cases.split(",")]
    by_config: dict[EngineConfig, list[Case]] = {}
    for case in cases:
        by_config.setdefault(case.configure(config), []).append(case)
    if not options.as_json:
        print(f"{'case':>16} {'tok/s':>10} {'spread':>7} {'ttft p50':>9} {'p99':>8} {'per cpu s':>10} {'foreign':>8}")
    for needed, group in by_config.items():
        start = time.perf_counter()
        llm = LLM(needed.model, config=needed)
        build_s = time.perf_counter() - start
        if llm.limits.vocab_size < VOCAB_HIGH:
            found = llm.limits.vocab_size
            raise ConfigError("--model", found, f"have a vocabulary of {VOCAB_HIGH} or more", "the cases use these ids")
        watch = Stopwatch(llm)
        for case in group:
            for repeat in range(options.warmups):
                watch.run(case.warm_jobs(f"warm{repeat}"))
            runs = [measure(watch, case, repeat, options.quiet) for repeat in range(options.repeats)]
            line = summary(case, needed, runs) | {"dtype": llm.plan.dtype, "build_s": round(build_s, 1)}
            print(json.dumps(line) if options.as_json else _row(line), flush=True)
        del llm, watch  # the next engine needs the memory
        gc.collect()
    return 0


def _row(line: dict[str, Any]) -> str:
    return (
        f"{line['case']:>16} {line['value']:>10.1f} {line['spread']:>7.1%} {line['ttft_p50']:>8.3f}s"
        f" {line['ttft_p99']:>7.3f}s {line['per_cpu_s']:>10.1f} {max(line['foreign']):>8.1%}"
    )

"""Quire beside transformers' `generate`: the same model folder, dtype, threads and prompts, in turn, in one run.

    python -m benchmarks.compare [--model DIR | --shape small] [--cases decode:1,mixed:8] [--json]

From the repository's root. The cases are those of `quire bench` (see `launch/bench.py`). Each case is warmed up on both
sides and then run in pairs, Quire first; the ceilings of the machine are probed before each side's turn. What is
reported is the median over the pairs. No second pair begins that would end after its case's part of `--seconds`, and no
case after all of them. transformers gets the requests of a case as static batches, padded on the left; a batch goes on
until its longest output is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import SHAPES, model_folder
from launch.bench import VOCAB_HIGH, Case, Job, Stopwatch, measure
from launch.config import EngineConfig
from launch.machine import sleep_while_waiting
from pagetable.errors import ConfigError, QuireError

if TYPE_CHECKING:
    from benchmarks.roofline import Ceilings, Work

CASES = "prefill:1024,decode:1,decode:8,mixed:8,prefix:8,decode:32,long:2048"
SIDES = ("quire", "transformers")
Run = dict[str, float]


class Transformers:
    """transformers' own model and `generate`, with the one method of `Stopwatch` that `measure` calls.

    Args:
        dtype: a torch dtype's name.
        batch: requests of one static batch.
    """

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        import torch
        import transformers

        untyped: Any = transformers
        untyped.utils.logging.set_verbosity_error()
        untyped.utils.logging.disable_progress_bar()
        self.version: str = transformers.__version__
        self._batch = batch
        self._model = untyped.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def run(self, jobs: Sequence[Job]) -> list[list[float]]:
        """Greedy, never stopping early; per job the perf_counter() of its tokens."""
        times: list[list[float]] = []
        for start in range(0, len(jobs), self._batch):
            times += self._run_batch(jobs[start : start + self._batch])
        return times

    def _run_batch(self, jobs: Sequence[Job]) -> list[list[float]]:
        import torch

        width = max(len(prompt) for prompt, _ in jobs)
        tokens = torch.zeros(len(jobs), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (prompt, _) in enumerate(jobs):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        stamps: list[float] = []
        going = torch.zeros(len(jobs), dtype=torch.bool)

        def stamp(*_: Any, **__: Any) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return going

        with torch.inference_mode():
            self._model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=max(count for _, count in jobs),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[stamp],
            )
        return [stamps[:count] for _, count in jobs]


def engine_config(case: Case, base: EngineConfig) -> EngineConfig:
    """The engine for one case, with pages for all of its requests at once and no more."""
    jobs = case.jobs("size")
    size = base.block_size
    longest = max(len(prompt) + count for prompt, count in jobs)
    pages = sum(-(-(len(prompt) + count) // size) for prompt, count in jobs) + 1
    # behind max_model_len pages it also holds what `prefixwarm` runs before
    pages += -(-longest // size)
    return dataclasses.replace(case.configure(base), max_model_len=longest, num_gpu_blocks_override=pages)


def warm_jobs(case: Case) -> list[Job]:
    """Enough to allocate, to choose kernels and to fill caches on both sides; short."""
    jobs = [(prompt[:1024], min(count, 4)) for prompt, count in case.jobs("warm")]
    return jobs if case.kind == "decode" else jobs[:2]


def run_case(
    case: Case, base: EngineConfig, peer: Transformers, probe: Any, pairs: int, until: float
) -> tuple[list[tuple[Run, Run]], list[Ceilings], Work]:
    """Pairs of one case: at least one, and no more than `pairs` or than are done at `until` (perf_counter)."""
    from benchmarks.roofline import work
    from launch.llm import LLM

    llm = LLM(base.model, config=engine_config(case, base))
    watches = (Stopwatch(llm), peer)
    for watch in watches:
        watch.run(warm_jobs(case))
    found: list[tuple[Run, Run]] = []
    ceilings: list[Ceilings] = []
    while len(found) < pairs:
        start = time.perf_counter()
        sides = []
        for watch in watches:
            ceilings.append(probe.measure())
            sides.append(measure(watch, case, len(found), 0.0))  # type: ignore[arg-type]
        found.append((sides[0], sides[1]))
        now = time.perf_counter()
        if now + (now - start) > until:
            break
    return found, ceilings, work(case, llm.model_config, 2 if llm.plan.dtype == "bfloat16" else 4)


def summary(case: Case, pairs: Sequence[tuple[Run, Run]], ceilings: Sequence[Ceilings], least: Work) -> dict[str, Any]:
    """The numbers of one case: medians over its pairs."""

    def middle(values: Any) -> float:
        return float(statistics.median(values))

    ratios = [ours["value"] / theirs["value"] for ours, theirs in pairs]
    read, gemm, cpu_read, cpu_gemm = (
        middle(column) for column in zip(*map(dataclasses.astuple, ceilings), strict=True)
    )
    roofline, cpu_roofline = least.rate(read, gemm), least.rate(cpu_read, cpu_gemm)
    line: dict[str, Any] = {
        "case": case.name,
        "pairs": len(pairs),
        "ratio": middle(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio": middle(ours["per_cpu_s"] / theirs["per_cpu_s"] for ours, theirs in pairs),
        "roofline": roofline,
        "cpu_roofline": cpu_roofline,
        "read_gb_s": read / 1e9,
        "gemm_gflop_s": gemm / 1e9,
        "cpu_read_gb_s": cpu_read / 1e9,
        "cpu_gemm_gflop_s": cpu_gemm / 1e9,
    }
    for index, side in enumerate(SIDES):
        runs = [pair[index] for pair in pairs]
        line[side] = middle(run["value"] for run in runs)
        line[f"{side}_per_cpu_s"] = middle(run["per_cpu_s"] for run in runs)
        line[f"{side}_of_roofline"] = line[side] / roofline
        line[f"{side}_of_cpu_roofline"] = line[f"{side}_per_cpu_s"] / cpu_roofline
        line[f"{side}_ttft_p50_s"] = middle(run["ttft_p50"] for run in runs)
        line[f"{side}_runs"] = [run["value"] for run in runs]
        line[f"{side}_foreign"] = [run["foreign"] for run in runs]
    return {name: _rounded(value) for name, value in line.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


HEAD = (
    f"{'':13} {'tok/s':>17} {'ratio, lowest':>19} {'of roofline':>15}"
    f"   {'tok per CPU s':>17} {'':6} {'of roofline':>15}\n"
    f"{'case':13} {'Quire':>8} {'transf.':>8} {'and highest':>19} {'Quire':>7} {'transf.':>7}"
    f"   {'Quire':>8} {'transf.':>8} {'ratio':>6} {'Quire':>7} {'transf.':>7} {'pairs':>6} {'others':>7}"
)


def row(line: dict[str, Any]) -> str:
    span = f"{line['ratio']:6.2f} ({line['ratio_low']:.2f}-{line['ratio_high']:.2f})"
    foreign = statistics.median(line["quire_foreign"] + line["transformers_foreign"])
    return (
        f"{line['case']:13} {line['quire']:8.1f} {line['transformers']:8.1f} {span:>19}"
        f" {line['quire_of_roofline']:7.0%} {line['transformers_of_roofline']:7.0%}"
        f"   {line['quire_per_cpu_s']:8.1f} {line['transformers_per_cpu_s']:8.1f} {line['cpu_ratio']:6.2f}"
        f" {line['quire_of_cpu_roofline']:7.0%} {line['transformers_of_cpu_roofline']:7.0%}"
        f" {line['pairs']:6} {foreign:7.0%}"
    )


def footer(dtype: str, lines: Sequence[dict[str, Any]]) -> str:
    names = ("read_gb_s", "gemm_gflop_s", "cpu_read_gb_s", "cpu_gemm_gflop_s")
    read, gemm, cpu_read, cpu_gemm = (statistics.median(line[name] for line in lines) for name in names)
    return (
        f"ceilings: read {read:.1f} GB/s, {dtype} GEMM {gemm:.0f} GFLOP/s;"
        f" per CPU second {cpu_read:.1f} GB/s, {cpu_gemm:.0f} GFLOP/s"
    )


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Run all cases on one model and print a line for each as it is done."""
    import torch

    from benchmarks.roofline import Probe
    from worker.model_config import ModelConfig

    began = time.perf_counter()
    model = ModelConfig.from_folder(folder)
    if model.vocab_size < VOCAB_HIGH:
        limit = f"have a vocabulary of {VOCAB_HIGH} or more"
        raise ConfigError("--model", model.vocab_size, limit, "the cases use these ids")
    dtype = ("float32" if model.dtype == "float32" else "bfloat16") if options.dtype == "auto" else options.dtype
    base = EngineConfig(str(folder), dtype=dtype, threads=options.threads)
    torch.set_num_threads(base.num_threads)
    cases = [Case.parse(text) for text in options.cases.split(",")]
    peer, probe = Transformers(folder, dtype, options.batch), Probe(getattr(torch, dtype))
    shared = {"model": folder.name, "dtype": dtype, "threads": base.num_threads, "transformers": peer.version}
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in shared.items()) + f", torch {torch.__version__}\n{HEAD}")
    lines = []
    for index, case in enumerate(cases):
        left = began + options.seconds - time.perf_counter()
        if index and left <= 0:
            names = ",".join(skipped.name for skipped in cases[index:])
            print(f"compare: --seconds {options.seconds:g} are over: --cases {names} did not run", file=sys.stderr)
            break
        until = time.perf_counter() + left / (len(cases) - index)
        lines.append(summary(case, *run_case(case, base, peer, probe, options.pairs, until)))
        tags = {f"{name}_version" if name == "transformers" else name: value for name, value in shared.items()}
        print(json.dumps(tags | lines[-1]) if options.json else row(lines[-1]), flush=True)
        gc.collect()  # the next engine needs the memory
    if not options.json:
        print(footer(dtype, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder of a Hugging Face model")
    which.add_argument("--shape", default="small", choices=sorted(SHAPES), help="random weights of a shape (small)")
    parser.add_argument("--cache", help="folder that keeps the models of --shape; default: none, written each time")
    parser.add_argument("--cases", default=CASES, help=f"comma separated ({CASES})")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of both sides; default: the cores this process may use")
    parser.add_argument("--pairs", type=int, default=3, help="of each case, as far as the time allows (3)")
    parser.add_argument("--seconds", type=float, default=210.0, help="after which nothing more begins (210)")
    parser.add_argument("--batch", type=int, default=64, help="requests of one static batch of transformers (64)")
    parser.add_argument("--json", action="store_true", help="a JSON line for each case instead of a table")
    options = parser.parse_args(argv)
    sleep_while_waiting()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only
    try:
        where = nullcontext(Path(options.model)) if options.model else model_folder(options.shape, options.cache)
        with where as folder:
            compare(options, folder)
    except QuireError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Quire beside other engines: the same model folder, dtype, threads and prompts, in turn, in one run.

    python -m benchmarks.compare [--peers openvino,vllm] [--model DIR | --shape small] [--cases decode:1,mixed] [--json]

From the repository's root; `quire bench compare` is the same. The cases are those of `quire bench` (see
`launch/bench.py`). For each peer a case is warmed up on both sides and then run in pairs, Quire first, so that a pair's
two runs follow each other; the ceilings of the machine are probed before each side's turn. What is reported is the
median over the pairs. No second pair begins that would end after its part of `--seconds`, and nothing after all of
them. transformers runs in this process and gets the requests of a case as static batches, padded on the left; a batch
goes on until its longest output is done. The other peers run in processes of their own (`benchmarks/peers`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import SHAPES, model_folder
from benchmarks.peers.environments import DEFAULT_CACHE, PEERS, find
from benchmarks.peers.protocol import Settings
from benchmarks.peers.remote import RemotePeer
from launch.bench import VOCAB_HIGH, Case, Job, Stopwatch, Watch, measure
from launch.config import EngineConfig
from launch.machine import sleep_while_waiting
from pagetable.errors import ConfigError, QuireError

if TYPE_CHECKING:
    from benchmarks.roofline import Ceilings, Work

CASES = "prefill:1024,decode:1,decode:8,mixed:8,prefix:8,decode:32,long:2048"
IN_PROCESS = "transformers"
SIDES = ("quire", "theirs")
Run = dict[str, float]


class Transformers:
    """transformers' own model and `generate`, in this process.

    Args:
        dtype: a torch dtype's name.
        batch: requests of one static batch.
    """

    elsewhere = 0.0

    def __init__(self, folder: Path, dtype: str, threads: int, batch: int) -> None:
        import torch
        import transformers

        untyped: Any = transformers
        untyped.utils.logging.set_verbosity_error()
        untyped.utils.logging.disable_progress_bar()
        self.version: str = transformers.__version__
        self._batch, self._threads = batch, threads
        self._model = untyped.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()

    def run(self, jobs: Sequence[Job]) -> list[list[float]]:
        """See `launch.bench.Watch.run`."""
        import torch

        before = torch.get_num_threads()  # one: our engine has threads of its own
        torch.set_num_threads(self._threads)
        times: list[list[float]] = []
        for start in range(0, len(jobs), self._batch):
            times += self._run_batch(jobs[start : start + self._batch])
        torch.set_num_threads(before)
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


class Peers:
    """The peers of one comparison, each built for the case at hand and kept while it serves.

    Args:
        names: transformers, or keys of `environments.PEERS`.
        cache: folder of the environments.
        batch: requests of a static batch of transformers.
    """

    def __init__(self, names: Sequence[str], base: EngineConfig, cache: Path, batch: int) -> None:
        self.names = names
        self._base, self._cache, self._batch = base, cache, batch
        self._found = {name: find(name, cache) for name in names if name != IN_PROCESS}
        self._folders: dict[str, Path] = {}
        self._built: dict[str, tuple[Settings, RemotePeer]] = {}
        self._transformers: Transformers | None = None

    def get(self, name: str, case: Case) -> Transformers | RemotePeer:
        folder = Path(self._base.model)
        if name == IN_PROCESS:
            if self._transformers is None:
                self._transformers = Transformers(folder, self._base.dtype, self._base.num_threads, self._batch)
            return self._transformers
        peer = self._found[name]
        if name not in self._folders:
            self._folders[name] = peer.prepare(self._cache, folder)
        needed = case.configure(self._base)
        assert needed.max_model_len is not None
        settings = Settings(
            str(self._folders[name]),
            needed.dtype,
            needed.num_threads,
            needed.max_model_len,
            needed.max_num_seqs,
            needed.enable_prefix_caching,
        )
        built = self._built.get(name)
        if built is None or built[0] != settings:
            if built is not None:
                built[1].close()
            built = self._built[name] = settings, RemotePeer.of(peer, self._cache, settings)
        return built[1]

    def close(self) -> None:
        for _, peer in self._built.values():
            peer.close()


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Foreign processes that never rest, one on each of the first `count` cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    spin = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", spin, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_pairs(
    case: Case, watches: tuple[Watch, Watch], probe: Any, pairs: int, until: float
) -> tuple[list[tuple[Run, Run]], list[Ceilings]]:
    """Pairs of one case: at least one, and no more than `pairs` or than are done at `until` (perf_counter)."""
    for watch in watches:
        watch.run(warm_jobs(case))
    found: list[tuple[Run, Run]] = []
    ceilings: list[Ceilings] = []
    while len(found) < pairs:
        start = time.perf_counter()
        sides = []
        for watch in watches:
            ceilings.append(probe.measure())
            sides.append(measure(watch, case, len(found), 0.0))
        found.append((sides[0], sides[1]))
        now = time.perf_counter()
        if now + (now - start) > until:
            break
    return found, ceilings


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
        "ttft_ratio": middle(ours["ttft_p50"] / theirs["ttft_p50"] for ours, theirs in pairs),
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
    f"{'':26} {'tok/s':>17} {'ratio, lowest':>19} {'TTFT':>6} {'of roofline':>15} {'per CPU s':>11}\n"
    f"{'case':13} {'peer':12} {'Quire':>8} {'peer':>8} {'and highest':>19} {'ratio':>6} {'Quire':>7} {'peer':>7}"
    f" {'ratio':>11} {'pairs':>6} {'others':>7}"
)


def row(line: dict[str, Any]) -> str:
    span = f"{line['ratio']:.2f} ({line['ratio_low']:.2f}-{line['ratio_high']:.2f})"
    foreign = statistics.median(line["quire_foreign"] + line["theirs_foreign"])
    return (
        f"{line['case']:13} {line['peer']:12} {line['quire']:8.1f} {line['theirs']:8.1f} {span:>19}"
        f" {line['ttft_ratio']:6.2f} {line['quire_of_roofline']:7.0%} {line['theirs_of_roofline']:7.0%}"
        f" {line['cpu_ratio']:11.2f} {line['pairs']:6} {foreign:7.0%}"
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

    from benchmarks.roofline import Probe, work
    from launch.llm import LLM
    from worker.model_config import ModelConfig

    began = time.perf_counter()
    model = ModelConfig.from_folder(folder)
    if model.vocab_size < VOCAB_HIGH:
        limit = f"have a vocabulary of {VOCAB_HIGH} or more"
        raise ConfigError("--model", model.vocab_size, limit, "the cases use these ids")
    dtype = ("float32" if model.dtype == "float32" else "bfloat16") if options.dtype == "auto" else options.dtype
    base = EngineConfig(str(folder), dtype=dtype, threads=options.threads)
    cases = [Case.parse(text) for text in options.cases.split(",")]
    peers = Peers(options.peers.split(","), base, options.cache, options.batch)
    probe = Probe(getattr(torch, dtype), base.num_threads)
    shared = {"model": folder.name, "dtype": dtype, "threads": base.num_threads, "beside": options.beside}
    if not options.json:
        print(", ".join(f"{name} {value}" for name, value in shared.items()) + f", torch {torch.__version__}\n{HEAD}")
    lines = []
    turns = [(case, name) for case in cases for name in peers.names]
    try:
        for index, (case, name) in enumerate(turns):
            left = began + options.seconds - time.perf_counter()
            if index and left <= 0:
                skipped = ", ".join(f"{case.name} beside {name}" for case, name in turns[index:])
                print(f"compare: --seconds {options.seconds:g} are over: {skipped} did not run", file=sys.stderr)
                break
            peer = peers.get(name, case)
            llm = LLM(base.model, config=engine_config(case, base))
            until = time.perf_counter() + left / (len(turns) - index)
            with busy_cores(options.beside):
                found = run_pairs(case, (Stopwatch(llm), peer), probe, options.pairs, until)
            least = work(case, llm.model_config, 2 if dtype == "bfloat16" else 4)
            lines.append({"peer": name, "peer_version": peer.version, **summary(case, *found, least)})
            print(json.dumps(shared | lines[-1]) if options.json else row(lines[-1]), flush=True)
            del llm
            gc.collect()  # the next engine needs the memory
    finally:
        peers.close()
    if not options.json:
        print(footer(dtype, lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder of a Hugging Face model")
    which.add_argument("--shape", default="small", choices=sorted(SHAPES), help="random weights of a shape (small)")
    parser.add_argument("--models", help="folder that keeps the models of --shape; default: none, written each time")
    parser.add_argument("--cases", default=CASES, help=f"comma separated ({CASES})")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="of both sides; default: the cores this process may use")
    parser.add_argument("--pairs", type=int, default=3, help="of each case, as far as the time allows (3)")
    parser.add_argument("--seconds", type=float, default=210.0, help="after which nothing more begins (210)")
    parser.add_argument("--peers", default=IN_PROCESS, help=f"comma separated: {', '.join((IN_PROCESS, *PEERS))}")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the peers' environments")
    parser.add_argument("--beside", type=int, default=0, help="foreign processes that never rest, a core each (0)")
    parser.add_argument("--batch", type=int, default=64, help="requests of one static batch of transformers (64)")
    parser.add_argument("--json", action="store_true", help="a JSON line for each case instead of a table")
    options = parser.parse_args(argv)
    sleep_while_waiting()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders only
    try:
        where = nullcontext(Path(options.model)) if options.model else model_folder(options.shape, options.models)
        with where as folder:
            compare(options, folder)
    except QuireError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One sequence spread over the pages of several devices: exactness, bytes, memory and time per token by context.

    python -m benchmarks.long_context [--length 262144] [--devices 8] [--only rows|recall] [--json] [--plot FILE.svg]

Each device is a process that holds `--share` of the sequence's pages (0.14: eight have 1.12 of what it needs). A prompt
of `--length` random tokens runs through a small random model (`benchmarks/long_model.py`), and:

    rows    the first layer's K and V of every token, and rows at 64 random and the last 8 positions through both
            layers, against float64 over the K and V read back from the devices; at most 3e-3 apart by norm, any row
            at most 9e-3, or exit 1
    recall  the `recall` model, which nobody trained, answers 64 random keys of a context of as many tokens; all right

The peer in the same run is the attention kernel alone, on one core. Others on the machine slow steps, not CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.line_chart import line_chart
from benchmarks.long_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, VOCAB, write_long_model
from benchmarks.long_rows import Errors, Exact, check_rows, read_back
from benchmarks.long_shard import AT_ONCE, Settings, Shard, Step, peak_bytes, shard
from kernels import ops
from kernels.ops import Mask, PageList
from launch.models.recall import make_recall
from launch.models.recall_text import EOS, KEYS, make_context
from pagetable.errors import QuireError
from pagetable.sampling import SamplingParams

TOLERANCE = 3e-3
OUTPUTS = 5  # so that of the last 8 positions half were prompt, half were decoded
RANDOM_ROWS, LAST_ROWS = 64, 8
QUESTIONS = 64
SHORTEST = 1024  # context at which decoding is timed
DECODES = 16


def attention_flops(start: int, stop: int) -> int:
    """Of all layers and heads, for the tokens at these positions: a product with K and one with V of all before."""
    seen = (stop * (stop + 1) - start * (start + 1)) // 2
    return 4 * LAYERS * HEADS * HEAD_DIM * seen


def kernel_rate(new: int, context: int, block_size: int) -> float:
    """Flops per CPU second of the attention kernel alone: the best of three calls on one core."""
    blocks = -(-(context + new) // block_size)
    pool = torch.randn(1, blocks, 2, KV_HEADS, block_size, HEAD_DIM).to(torch.bfloat16)
    q = torch.randn(new, HEADS, HEAD_DIM).to(torch.bfloat16)
    index = torch.arange(blocks, dtype=torch.int32)
    pages = PageList(torch.tensor([0, blocks], dtype=torch.int32), index, index * block_size)
    starts, mask = torch.tensor([0, new], dtype=torch.int32), Mask(torch.tensor([context], dtype=torch.int32))
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    for _ in range(3):
        began = time.process_time()
        ops.attend(q, starts, [pool], 0, pages, mask)
        best = min(best, time.process_time() - began)
    torch.set_num_threads(threads)
    return attention_flops(context, context + new) / LAYERS / best


def by_context(steps: Sequence[Step], least: int = SHORTEST) -> list[dict[str, float]]:
    """Time per token, over stretches of context that end at powers of two and half way between."""
    ends, end = [], least
    while end < steps[-1].context:
        ends += [end, end * 3 // 2]
        end *= 2
    found, taken = [], 0
    for end in [*(each for each in ends if each < steps[-1].context), steps[-1].context]:
        upto = next((index for index, each in enumerate(steps) if each.context > end), len(steps))
        some = steps[taken:upto]
        if some:
            tokens = sum(each.tokens for each in some)
            wall, cpu = (
                round(1e3 * sum(getattr(each, name) for each in some) / tokens, 4) for name in ("seconds", "cpu")
            )
            found.append({"context": some[-1].context, "ms_per_token": wall, "cpu_ms_per_token": cpu})
        taken = upto
    return found


def run_rows(folder: Path, settings: Settings) -> dict[str, Any]:
    """The random model: what `rows` promises, and all that is measured."""
    rng = random.Random(settings.seed)
    prompt = [rng.randrange(2, VOCAB) for _ in range(settings.length)]
    total = settings.length + OUTPUTS - 1  # the last output is never fed
    alone = kernel_rate(settings.step_tokens, min(settings.length, 1 << 15), settings.block_size)
    with shard(folder, settings) as ranks:
        last = range(total - LAST_ROWS, total)
        ranks.wanted = {*rng.sample(range(total - LAST_ROWS), RANDOM_ROWS), *last}
        outputs, pages, steps = ranks.run(prompt, OUTPUTS)
        memory = [peak_bytes(pid) for pid in ranks.llm.pids]
        errors = _check(folder, ranks, settings, [*prompt, *outputs[:-1]], pages)
        ranks.wanted = set()
        prefill, first = [each for each in steps if each.tokens > 1], steps[0]
        whole = [each for each in prefill[1:] if each.tokens == settings.step_tokens] or prefill
        decodes, decode_bytes = _decodes(ranks, prompt)
        pools = [settings.device_blocks * settings.block_size * 2 * LAYERS * KV_HEADS * HEAD_DIM * 2] * settings.devices
    cpu, seconds = sum(each.cpu for each in prefill), sum(each.seconds for each in prefill)
    held = [sum(device == each for device, _ in pages) for each in range(settings.devices)]
    return {
        "what": "rows",
        **dataclasses.asdict(settings),
        "blocks_per_device": settings.device_blocks,
        "pages_per_device": held,
        "metadata_of_first_step": first.metadata // (settings.devices - 1),
        "prefill_bytes": _step_bytes(whole[0], settings),
        "decode_bytes": _step_bytes(decode_bytes, settings),
        "prefill_seconds": round(seconds, 2),
        "prefill_cpu_seconds": round(cpu, 2),
        "prefill_tokens_per_second": round(settings.length / seconds, 1),
        "cores": round(cpu / seconds, 2),
        "of_kernel": round(attention_flops(0, settings.length) / cpu / alone, 3),
        "kernel_gflops": round(alone / 1e9, 1),
        "prefill": by_context(prefill),
        "decode": decodes,
        "pool_bytes": pools[0],
        "peak_bytes": memory,
        "errors": dataclasses.asdict(errors),
        "right": errors.are_within(TOLERANCE),
    }


def _check(
    folder: Path, ranks: Shard, settings: Settings, tokens: list[int], pages: Sequence[tuple[int, int]]
) -> Errors:
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the ranks rest meanwhile
    held = read_back(ranks.ranks, pages, settings.block_size, len(tokens), LAYERS)
    errors = check_rows(Exact(folder), held, torch.tensor(tokens), ranks.rows)
    torch.set_num_threads(threads)
    return errors


def _decodes(ranks: Shard, prompt: Sequence[int]) -> tuple[list[dict[str, float]], Step]:
    """Time of one token at each context, over the pages that are there; and the last step, for its bytes."""
    found, context = [], SHORTEST
    while True:
        context = min(context, len(prompt))
        _, _, steps = ranks.run(prompt[:context], DECODES)
        single = [each for each in steps if each.tokens == 1][1:]
        milliseconds = [1e3 * each.seconds for each in single]
        found.append({"context": context, "ms_per_token": round(statistics.median(milliseconds), 4)})
        if context == len(prompt):
            return found, single[-1]
        context *= 2


def _step_bytes(step: Step, settings: Settings) -> dict[str, int]:
    """Of one step, for one rank: what it is told, and what it gives to the others."""
    followers = settings.devices - 1
    return {
        "tokens": step.tokens,
        "metadata": step.metadata // followers,
        "sums": step.sums,
        "attention": step.attention,
    }


def run_recall(folder: Path, settings: Settings) -> dict[str, Any]:
    """The recall model: 64 random keys of a context with a fact for each of 1,024."""
    rng = random.Random(settings.seed)
    context = make_context(
        settings.length, rng.sample(range(len(KEYS)), min(len(KEYS), settings.length // 4)), settings.seed
    )
    asked = rng.sample(list(context.facts), QUESTIONS)
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    with shard(folder, settings) as ranks:
        began = time.perf_counter()
        first, pages, _ = ranks.run([*context.token_ids, asked[0]], 2)  # computes the pages that the others share
        read = time.perf_counter() - began
        answers, devices = {asked[0]: first}, {device for device, _ in pages}
        for at in range(1, QUESTIONS, AT_ONCE):
            some = asked[at : at + AT_ONCE]
            outputs = ranks.llm.generate([[*context.token_ids, key] for key in some], greedy)
            answers |= {key: output.outputs[0].token_ids for key, output in zip(some, outputs, strict=True)}
        rest = time.perf_counter() - began - read
        memory = [peak_bytes(pid) for pid in ranks.llm.pids]
    right = sum(answers[key] == [context.facts[key], EOS] for key in asked)
    return {
        "what": "recall",
        **dataclasses.asdict(settings),
        "questions": QUESTIONS,
        "answered_right": right,
        "devices_read": len(devices),
        "first_answer_seconds": round(read, 1),
        "seconds_per_question_after": round(rest / (QUESTIONS - 1), 2),
        "peak_bytes": memory,
        "right": right == QUESTIONS and len(devices) == settings.devices,
    }


def measure(what: str, settings: Settings) -> dict[str, Any]:
    """`rows` or `recall`, in a folder of its own."""
    with TemporaryDirectory(prefix="quire-long-") as temporary:
        folder = Path(temporary)
        if what == "rows":
            return run_rows(write_long_model(folder, settings.seed), settings)
        make_recall(folder, settings.devices, 1, 16 * settings.devices)
        return run_recall(folder, settings)


def describe(found: dict[str, Any]) -> list[str]:
    """A result for people."""
    peak = ", ".join(f"{each >> 20}" for each in found["peak_bytes"])
    head = f"{found['what']}: {found['length']:,} tokens over {found['devices']} devices"
    if found["what"] == "recall":
        return [
            f"{head}: {found['answered_right']} of {found['questions']} answers right",
            f"  first answer after {found['first_answer_seconds']} s, then one each "
            f"{found['seconds_per_question_after']} s; peak MiB by rank: {peak}",
        ]
    lines = [
        f"{head} of {found['blocks_per_device']} blocks",
        f"  pages by device: {', '.join(map(str, found['pages_per_device']))}",
        f"  prefill {found['prefill_seconds']} s, {found['prefill_tokens_per_second']:,} tokens/s on {found['cores']} "
        f"cores; attention per CPU second {found['of_kernel']:.2f} of the kernel alone "
        f"({found['kernel_gflops']} GFLOP/s)",
        f"  peak MiB by rank: {peak}; pool {found['pool_bytes'] >> 20} each",
        f"  metadata of the first step, with the prompt: {found['metadata_of_first_step']:,} bytes to each rank",
    ]
    for name in ("prefill_bytes", "decode_bytes"):
        one = found[name]
        lines.append(
            f"  a step of {one['tokens']}: {one['metadata']:,} bytes of metadata to each rank; each gives "
            f"{one['sums']:,} of sums, {one['attention']:,} of queries and attention"
        )
    lines += [f"  {'context':>9} {'prefill ms/token':>17} {'CPU':>9}"]
    lines += [
        f"  {each['context']:>9} {each['ms_per_token']:>17.3f} {each['cpu_ms_per_token']:>9.3f}"
        for each in found["prefill"]
    ]
    lines += [f"  {'context':>9} {'decode ms/token':>17}"]
    lines += [f"  {each['context']:>9} {each['ms_per_token']:>17.3f}" for each in found["decode"]]
    errors = ", ".join(f"{name} {value:.2e}" for name, value in found["errors"].items())
    return [*lines, f"  {'right' if found['right'] else 'WRONG'}: {errors}"]


def plot(found: dict[str, Any]) -> str:
    """Time per token by context, as SVG."""
    lines = {
        f"prefill, a prompt's token in a step of {found['step_tokens']:,}": found["prefill"],
        "decode, one token of one sequence": found["decode"],
    }
    points = {name: [(each["context"], each["ms_per_token"]) for each in many] for name, many in lines.items()}
    title = f"One sequence over {found['devices']} devices: time per token by context"
    return line_chart(title, "context, tokens", "milliseconds per token", points)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1 << 18, help="tokens of the context, 1,024 to 1,048,576")
    parser.add_argument("--devices", type=int, default=8, choices=(2, 4, 8), help="processes")
    parser.add_argument("--share", type=float, default=0.14, help="of the pages that each device has blocks for")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("rows", "recall"))
    parser.add_argument("--json", action="store_true", help="one line of JSON for each part")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="time per token by context")
    options = parser.parse_args(arguments)
    if not SHORTEST <= options.length <= 1 << 20:
        parser.error(f"--length: got {options.length}, must be from {SHORTEST} to {1 << 20}")
    if options.share * options.devices < 1.05:
        parser.error(f"--share: got {options.share}, all devices together must have blocks for 1.05 of the pages")
    settings = Settings(
        options.length, options.devices, options.share, options.block_size, options.step_tokens, options.seed
    )
    is_right = True
    for what in (options.only,) if options.only else ("rows", "recall"):
        try:
            found = measure(what, settings)
        except QuireError as error:
            print(f"long_context: {error}", file=sys.stderr)
            return 2
        print(json.dumps(found) if options.json else "\n".join(describe(found)), flush=True)
        if what == "rows" and options.plot is not None:
            options.plot.write_text(plot(found), encoding="utf-8")
        is_right &= found["right"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""`make demo`: a batch on a tiny model with random weights, and the pages that its requests share."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import EngineConfig
from launch.flags import Effective
from launch.machine import sleep_while_waiting
from launch.models.tiny_llama import make_tiny_llama
from launch.prompts import has_failed, read_lines, result_line

_OPENING = (
    "You are a helpful assistant. Answer in one short sentence. A quire is a gathering of pages. "
    "A book is made of quires, and each quire is folded, sewn and bound with the others. "
    "The memory of a machine is a shelf of blocks. A block holds a page, and a table says where. "
)
# All end in the same step, so no block changes hands and equal numbers mean shared pages.
REQUESTS: Sequence[dict[str, Any]] = (
    {"prompt": _OPENING + "What is a page?"},
    {"prompt": _OPENING + "How many pages does a book have?"},
    {
        "prompt": "When a guest came in from the rain, the keeper asked what they wanted to read, and they often read",
        "n": 3,
        "seed": 1,
    },
    {"prompt": "Once upon a time there was a small library", "temperature": 0.0},
    {"prompt": "The memory of a machine is", "temperature": 0.7, "top_p": 0.9},
    {"messages": [{"role": "user", "content": "Why copy a page that two people read?"}]},
    {"prompt_token_ids": list(range(40, 60)), "temperature": 0.0},
)
DEFAULTS = {"max_tokens": 24, "ignore_eos": True, "temperature": 1.0}


def main() -> int:
    from launch.commands import start

    sleep_while_waiting()
    with tempfile.TemporaryDirectory(prefix="quire-demo-") as folder:
        print("A tiny Llama with RANDOM weights: what it writes means nothing, where its pages lie does.\n")
        make_tiny_llama(Path(folder))
        config = EngineConfig(model=folder, max_model_len=1024, num_gpu_blocks_override=512)
        llm = start(Effective(config, {}))
        raws = list(read_lines((json.dumps(line).encode() for line in REQUESTS), DEFAULTS))
        began = time.perf_counter()
        results = llm.generate_raw(raws)
        seconds = time.perf_counter() - began

    lines = [result_line(index, result) for index, result in enumerate(results)]
    failed = [line for line in lines if has_failed(line)]
    tables = _tables(lines)
    users: dict[tuple[int, int], int] = {}
    for table in tables.values():
        for page in table:
            users[page] = users.get(page, 0) + 1
    for raw, line in zip(REQUESTS, lines, strict=True):
        _print(raw, line, users)
    used, kept = sum(map(len, tables.values())), len(users)
    tokens = sum(len(output["token_ids"]) for line in lines for output in line.get("outputs", ()))
    saved = f"sharing saved {used - kept} ({1 - kept / max(used, 1):.0%})"
    print(f"pages: {used} in the tables of {len(tables)} sequences, {kept} in memory: {saved}")
    print(f"speed: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s")
    if failed or used == kept:
        print(f"demo: {len(failed)} requests failed, {used - kept} pages were shared", file=sys.stderr)
        return 1
    return 0


def _tables(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(request, sample) -> its pages as (device_id, block_id)."""
    return {
        (line["index"], output["index"]): [(device, block) for device, block in output["pages"]]
        for line in lines
        for output in line.get("outputs", ())
    }


def _print(raw: dict[str, Any], line: dict[str, Any], users: dict[tuple[int, int], int]) -> None:
    asked = raw.get("prompt") or json.dumps(raw.get("messages") or raw["prompt_token_ids"])
    print(f"[{line['index']}] {asked if len(asked) <= 100 else '...' + asked[-97:]}")
    if "error" in line:
        print(f"    error: {line['error']['message']}\n")
        return
    print(f"    {line['prompt_tokens']} prompt tokens, {line['cached_tokens']} of them in pages that were there")
    for output in line["outputs"]:
        pages = [(device, block) for device, block in output["pages"]]
        shown = " ".join(f"({device}, {block}){'*' if users[device, block] > 1 else ''}" for device, block in pages)
        print(f"    sample {output['index']}: {output['text']!r}")
        print(f"      pages (device_id, block_id), * shared: {shown}")
    print()


if __name__ == "__main__":
    sys.exit(main())

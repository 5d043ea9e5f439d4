"""The service beside the engine in one process: 64 streams over gRPC, and the first token's added latency.

    python -m benchmarks.service [--model story | DIR] [--streams 64] [--pairs 3] [--json]

From the repository's root. Both run the same requests (mixed lengths, greedy, ids for prompts) with the same settings,
in turn, the engine first; each sits in a process of its own that sleeps while the other runs. The service is `quire
serve --no-ray` with one shard, and its client is one process with one connection, on the same cores. CPU seconds are of
each process over the timed run; what a client or a front costs is thereby seen, wherever it limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

CHILD_SECONDS = 600.0
GREEDY = {"temperature": 0, "ignore_eos": True}


def requests(streams: int, longest: int) -> list[dict[str, Any]]:
    """Prompts of 8 to 71 tokens, outputs of a quarter to the whole of `longest`; the same each time."""
    return [
        {
            "prompt_token_ids": [8 + (31 * index + 7 * at) % 240 for at in range(8 + 13 * index % 64)],
            "max_tokens": longest // 4 + (37 * index) % (3 * longest // 4 + 1),
            **GREEDY,
        }
        for index in range(streams)
    ]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The children: each reads a JSON line of requests and answers with what came of it.


def engine_child(model: str, settings: Mapping[str, Any]) -> None:
    from launch.llm import LLM

    llm = LLM(model, **settings)
    _say({"pid": os.getpid()})
    for line in sys.stdin:
        raws = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        if len(raws) == 1:
            first = 0.0
            for output in llm.stream(raws[0]):
                if output.outputs[0].token_ids and not first:
                    first = time.perf_counter() - began
            _say({"first": first})
            continue
        outputs: list[Any] = llm.generate_raw(raws)
        seconds = time.perf_counter() - began
        _say({"seconds": seconds, "tokens": _count(outputs), "cpu": time.process_time() - cpu})


def client_child(server: str) -> None:
    from launch.client import AsyncClient

    async def serve() -> None:
        client = AsyncClient(server)
        _say({"pid": os.getpid()})
        while line := await asyncio.to_thread(sys.stdin.readline):
            raws = json.loads(line)
            began, cpu = time.perf_counter(), time.process_time()
            if len(raws) == 1:
                first = 0.0
                async for output in client.stream(raws[0]):
                    if output.outputs[0].token_ids and not first:
                        first = time.perf_counter() - began
                _say({"first": first})
                continue
            outputs = await client.generate_raw(raws)
            seconds = time.perf_counter() - began
            _say({"seconds": seconds, "tokens": _count(outputs), "cpu": time.process_time() - cpu})
        await client.close()

    asyncio.run(serve())


def _count(outputs: Sequence[Any]) -> int:
    return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)


def _say(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


class Child:
    """A process that answers lines with lines."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.service", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = int(self._read()["pid"])

    def ask(self, raws: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(raws) + "\n")
        stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        stdout: IO[str] | None = self._process.stdout
        assert stdout is not None
        found: dict[str, float] = json.loads(stdout.readline())
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class Service:
    """`quire serve` and the pids of its parts by what they are."""

    def __init__(self, model: str, flags: Sequence[str]) -> None:
        command = [sys.executable, "-m", "launch.cli", "serve", model, "--no-ray", "--port", "0", *flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        found = re.match(r"ready on (\S+): ", self._process.stdout.readline())
        if found is None:
            raise SystemExit("quire serve did not become ready; run it to see why")
        self.server = found[1]
        self.parts = {}
        for pid, line in _below(self._process.pid):
            words = line.split()
            self.parts[words[-1] if "cluster" in words else "worker"] = pid

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def _below(root: int) -> list[tuple[int, str]]:
    found, todo = [], [root]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((child, line))
                todo.append(child)
    return found


def measure(found: argparse.Namespace) -> dict[str, Any]:
    """Pairs in turn; medians of ratios."""
    settings: dict[str, Any] = {
        "max_num_seqs": found.streams,
        "max_model_len": 1024,
        "num_gpu_blocks_override": found.streams * 64,
        "threads": found.threads,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    raws = requests(found.streams, found.longest)
    engine = Child("--engine", found.model, "--settings", json.dumps(settings))
    service = Service(found.model, flags)
    client = Child("--client", service.server)
    try:
        for child in (engine, client):
            child.ask(raws)
        pairs, firsts = [], []
        for _ in range(found.pairs):
            alone = engine.ask(raws)
            before = {name: cpu_seconds(pid) for name, pid in service.parts.items()}
            over = client.ask(raws)
            spent = {name: round(cpu_seconds(pid) - before[name], 2) for name, pid in service.parts.items()}
            assert alone["tokens"] == over["tokens"], "the service lost tokens"
            pairs.append((alone, over, {"client": round(over["cpu"], 2), **spent}))
        for _ in range(found.firsts):
            one = [{**raws[0], "max_tokens": 4}]
            firsts.append((engine.ask(one)["first"], client.ask(one)["first"]))
    finally:
        client.end()
        service.end()
        engine.end()
    ratios = sorted(over["tokens"] / over["seconds"] * alone["seconds"] / alone["tokens"] for alone, over, _ in pairs)
    return {
        "model": Path(found.model).name,
        "streams": found.streams,
        "threads": found.threads,
        "tokens": pairs[0][0]["tokens"],
        "engine": round(statistics.median(alone["tokens"] / alone["seconds"] for alone, _, _ in pairs), 1),
        "service": round(statistics.median(over["tokens"] / over["seconds"] for _, over, _ in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(ratios[0], 3),
        "ratio_high": round(ratios[-1], 3),
        "engine_cpu": round(statistics.median(alone["cpu"] for alone, _, _ in pairs), 2),
        "service_cpu": {
            name: round(statistics.median(spent[name] for _, _, spent in pairs), 2) for name in pairs[0][2]
        },
        "first_ms": round(1e3 * statistics.median(first for first, _ in firsts), 2),
        "first_over_grpc_ms": round(1e3 * statistics.median(first for _, first in firsts), 2),
    }


def _table(line: Mapping[str, Any]) -> str:
    cpu = ", ".join(f"{name} {seconds}" for name, seconds in line["service_cpu"].items())
    return (
        f"{line['model']}, {line['streams']} streams, {line['tokens']} tokens, {line['threads']} threads\n"
        f"  engine in one process {line['engine']:>10.1f} tokens/s   CPU s: {line['engine_cpu']}\n"
        f"  service over gRPC     {line['service']:>10.1f} tokens/s   CPU s: {cpu}\n"
        f"  ratio {line['ratio']} ({line['ratio_low']} to {line['ratio_high']})\n"
        f"  first token, alone: {line['first_ms']} ms in process, {line['first_over_grpc_ms']} ms over gRPC"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="story", help="bundled name or folder; default: story")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256, help="output tokens of the longest stream; default: 256")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: this machine's cores"
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--firsts", type=int, default=30, help="samples of the first token's latency; default: 30")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    for hidden in ("--engine", "--client", "--settings"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    if found.engine is not None:
        engine_child(found.engine, json.loads(found.settings))
    elif found.client is not None:
        client_child(found.client)
    else:
        line = measure(found)
        print(json.dumps(line) if found.json else _table(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

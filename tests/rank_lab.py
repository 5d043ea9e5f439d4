"""Shards of several ranks in tests: one set of processes, re-formed for each layout, and the loop that leads them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.crew import rank_settings
from pagetable.sampling import Limits, Request, SamplingParams, admit_request
from worker.config import ShardConfig
from worker.layout import Layout
from worker.loop import Loop
from worker.model_config import ModelConfig
from worker.ranks import Ranks
from worker.sequence import TokenOutput
from worker.shard import ShardSpec, build_runner, make_loop, make_pipe, make_ranks

SECRET = b"r" * 32


class Hosts:
    """Processes that can be ranks 1, 2, ...; started as they are first needed."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self._settings: list[dict[str, Any]] = []  # of the present shard

    def need(self, count: int) -> list[subprocess.Popen[str]]:
        more = [_host() for _ in range(count - len(self.processes))]
        self.processes += more
        for process in more:
            assert _heard(process) == "up"
        return self.processes[:count]

    def replace(self, index: int) -> None:
        """End one of them, in whatever state it is; another one becomes the rank that it was."""
        _end(self.processes[index])
        process = self.processes[index] = _host()
        assert _heard(process) == "up"
        _tell(process, self._settings[index])
        assert _heard(process) == "is"

    @contextmanager
    def loop(self, spec: ShardSpec, threads: int = 1) -> Iterator[tuple[Loop, Ranks | None]]:
        """A shard of this layout: its loop, and its ranks where there are several."""
        spec = replace(spec, threads=threads)
        if spec.layout.num_ranks == 1:
            yield make_loop(spec, make_pipe(spec, build_runner(spec, 0))), None
            return
        ranks = make_ranks(spec, SECRET)
        settings = self._settings = rank_settings(spec, SECRET, ranks.listen("127.0.0.1", 0))
        processes = self.need(len(settings))
        for process, each in zip(processes, settings, strict=True):
            _tell(process, each)
        ranks.runner = build_runner(spec, 0)
        try:
            for process in processes:
                assert _heard(process) == "is"
            ranks.begin(1)
            yield make_loop(spec, ranks), ranks
        finally:
            ranks.close()
            ranks.leave()
            for process in self.need(len(settings)):
                _tell(process, None)
            for process in self.need(len(settings)):
                assert _heard(process) == "was"

    def close(self) -> None:
        for process in self.processes:
            _end(process)


@dataclass
class Tape:
    """What a loop has said, by (request id, sample)."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ends: dict[tuple[str, int], TokenOutput] = field(default_factory=dict)
    forks: set[str] = field(default_factory=set)  # that were asked for

    def take(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            key = output.request_id, output.sample_index
            if output.token is not None:
                self.tokens.setdefault(key, []).append(output.token)
            if output.finish_reason is not None:
                self.ends[key] = output


def make_spec(folder: Path, layout: Layout | None = None, dtype: str = "float32", **config: object) -> ShardSpec:
    layout = layout or Layout()
    settings = {"num_blocks": 512, "block_size": 8, "max_model_len": 1024, "max_num_seqs": 32} | config
    shard = ShardConfig(**settings, num_stages=layout.pipeline)  # type: ignore[arg-type]
    return ShardSpec(folder, ModelConfig.from_folder(folder), shard, dtype, layout)


def request(spec: ShardSpec, name: str, prompt: Sequence[int], **params: object) -> Request:
    limits = Limits(spec.model.vocab_size, spec.config.max_model_len, spec.config.num_blocks * spec.config.block_size)
    return admit_request(name, prompt, SamplingParams(**params), limits, seed=1)  # type: ignore[arg-type]


def _host() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.multi.rank_host"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:  # closes its pipes
        process.wait()


def _tell(process: subprocess.Popen[str], what: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


def _heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()

"""What a peer's process says on its pipes: JSON lines. Standard library only: it runs in the peers' environments.

-> {"model": DIR, "dtype": ..., "threads": N, "max_len": N, "max_seqs": N, "prefix_cache": bool}
<- {"version": "..."}
-> {"jobs": [[[token ids], tokens to make], ...]}     all submitted at once, greedy, never stopping early
<- {"times": [[seconds of each token since the jobs were read], ...], "cpu_s": of this process}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Job = tuple[list[int], int]


@dataclass(frozen=True)
class Settings:
    """What an engine is built for.

    Attributes:
        model: a folder that the peer's `prepare` made, or the model's own.
        dtype: float32 or bfloat16.
        max_len: prompt and output of the longest request.
        max_seqs: requests that run at once.
    """

    model: str
    dtype: str
    threads: int
    max_len: int
    max_seqs: int
    prefix_cache: bool


class Engine(Protocol):
    """A peer."""

    version: str

    def run(self, jobs: list[Job]) -> list[list[float]]:
        """Per job the perf_counter() of its tokens."""
        ...


def serve(make: Callable[[Settings], Engine]) -> None:
    """Answer on the standard pipes until the input ends. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, object]) -> None:
        print(json.dumps(line), file=out, flush=True)

    engine = make(Settings(**json.loads(sys.stdin.readline())))
    say({"version": engine.version})
    for line in sys.stdin:
        jobs = [(prompt, count) for prompt, count in json.loads(line)["jobs"]]
        began, cpu = time.perf_counter(), time.process_time()
        times = engine.run(jobs)
        cpu = time.process_time() - cpu
        say({"times": [[stamp - began for stamp in stamps] for stamps in times], "cpu_s": cpu})

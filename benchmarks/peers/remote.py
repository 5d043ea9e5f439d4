"""A peer as the driver sees it: a process in its own environment that answers on pipes (`protocol.py`)."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import HERE, Peer
from benchmarks.peers.protocol import Settings
from launch.bench import Job
from pagetable.errors import RequestFailed


class RemotePeer:
    """Runs jobs like `launch.bench.Stopwatch`; close it when done.

    Attributes:
        elsewhere: CPU seconds that the last run took in the peer's process.
    """

    def __init__(self, python: Path, script: Path, settings: Settings) -> None:
        self._name = script.stem.removeprefix("run_")
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close
        self._process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self.elsewhere = 0.0
        self.version: str = self._ask(asdict(settings))["version"]

    @classmethod
    def of(cls, peer: Peer, cache: Path, settings: Settings) -> RemotePeer:
        return cls(peer.python(cache), HERE / f"run_{peer.name}.py", settings)

    def run(self, jobs: Sequence[Job]) -> list[list[float]]:
        """The perf_counter() of each job's tokens, as if the jobs had come to the peer without a pipe."""
        began = time.perf_counter()
        answer = self._ask({"jobs": jobs})
        self.elsewhere = answer["cpu_s"]
        return [[began + seconds for seconds in stamps] for stamps in answer["times"]]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._said.seek(0)
            words = self._said.read()[-2000:]
            raise RequestFailed(f"{self._name} ended: {words}")
        return json.loads(line)

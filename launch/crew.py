"""The ranks of an engine whose leader is this process: it starts them, hears them load, and ends with them.

this process (rank 0) --pipes--> python -m worker (rank 1), (rank 2) ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.processes import command, environment
from cluster.service import failure
from launch.progress import RankProgress
from pagetable.errors import QuireError, RequestFailed
from worker.shard import ShardSpec

STOP_SECONDS = 5.0


class Crew:
    """One process for each rank behind the first.

    Args:
        settings: of each rank, as `python -m worker` wants them.
        env: of each process, beside this one's.
        progress: told of each rank's loading.
        on_end: called once, when one of them ends (`failure` says how), or by `close`.

    Attributes:
        failure: why the engine cannot go on; None while it can.
    """

    def __init__(
        self,
        settings: Sequence[Mapping[str, Any]],
        env: Mapping[str, str],
        progress: RankProgress | None,
        on_end: Callable[[], None],
    ) -> None:
        self.failure: QuireError | None = None
        self._progress, self._on_end = progress, on_end
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._closed = False
        self._processes: list[subprocess.Popen[str]] = []
        try:
            for each in settings:
                self._processes.append(self._start(each, env))
        except BaseException:
            self.close()
            raise
        for each, process in zip(settings, self._processes, strict=True):
            threading.Thread(target=self._hear, args=(each["rank"], process), name="crew", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def await_failure(self, seconds: float) -> QuireError | None:
        """`failure`, where one is known by then: who loses a connection to a rank is told before how that ended."""
        self._failed.wait(seconds)
        return self.failure

    def close(self) -> None:
        """End all of them, also one that is stopped or hangs. A second time it does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._on_end()
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # it is gone, and has not read what was to say
                    process.stdin.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, settings: Mapping[str, Any], env: Mapping[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command("worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(env),
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(settings) + "\n")
            process.stdin.flush()
        except OSError:  # it died at once: `_hear` says so
            pass
        return process

    def _hear(self, rank: int, process: subprocess.Popen[str]) -> None:
        failed: Mapping[str, Any] | None = None
        assert process.stdout is not None
        for line in process.stdout:
            said = _parsed(line)
            if "loading" in said and self._progress is not None:
                done, total = said["loading"]
                with self._lock:
                    self._progress(rank, done, total)
            failed = said.get("failed", failed)
        status = process.wait()
        process.stdout.close()
        with self._lock:
            if self._closed or self.failure is not None:
                return
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            self.failure = failure(failed) if failed else RequestFailed(f"rank {rank} of this engine ended {how}")
            self._failed.set()
        self._on_end()


def _parsed(line: str) -> Mapping[str, Any]:
    """A line that is none of ours says nothing."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def rank_settings(spec: ShardSpec, secret: bytes, leader: tuple[str, int], pin: bool = False) -> list[dict[str, Any]]:
    """What `python -m worker` gets for each rank behind the first.

    Args:
        pin: ranks claim cores.
    """
    common = {
        "folder": str(spec.folder),
        "dtype": spec.dtype,
        "device_id": spec.first_device,
        "shard": dataclasses.asdict(spec.config),
        "layout": dataclasses.asdict(spec.layout),
        "ways": dataclasses.asdict(spec.ways),
        "threads": spec.threads,
        "pin": pin,
        "secret": secret.hex(),
        "leader": list(leader),
    }
    return [{**common, "rank": rank} for rank in range(1, spec.layout.num_ranks)]


def rank_environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}

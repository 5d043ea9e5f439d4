"""`quire serve --address`: a service on a Ray cluster that somebody else started, and keeps."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import pytest

from cluster.processes import environment
from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from launch.serve_flags import choose_port
from pagetable.sampling import SamplingParams
from tests.serving import SECONDS, Stream, children, command_line, until

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(600)]
PROMPT, LENGTH = [9, 23, 57, 200, 31], 60
_FLAGS = ["--max-model-len", "256", "--num-gpu-blocks-override", "64", "--threads", "1", "--port", "0"]


def test_a_service_on_somebodys_cluster_runs_there_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), max_model_len=256, num_gpu_blocks_override=64, threads=1, dtype="auto")
    (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True))
    expected = list(output.outputs[0].token_ids)
    with tempfile.TemporaryDirectory(prefix="q") as temporary, _cluster(temporary) as (address, raylet):
        serve = [sys.executable, "-P", "-m", "launch.cli", "serve", str(tmp_path), *_FLAGS, "--address", address]
        env = environment({"TMPDIR": temporary})
        for _ in range(2):  # what the first leaves behind does not stand in the way of the second
            server = subprocess.Popen(
                [*serve, "-dp", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            )
            try:
                assert server.stdout is not None and server.stderr is not None
                line = server.stdout.readline()
                assert line.startswith("ready on 127.0.0.1:"), server.stderr.read()
                actors = _actors(raylet)
                assert sorted(actors) == ["DeviceActor", "DeviceActor", "FrontActor", "SchedulerActor"]
                asyncio.run(_generate(int(line.split(":")[1].split()[0].rstrip(":")), expected))
                second = subprocess.run([*serve, "-dp", "1"], capture_output=True, text=True, env=env, timeout=SECONDS)
                assert (second.returncode, second.stdout) == (2, "")
                assert second.stderr.splitlines()[-1] == (
                    "quire: error: --address: got '" + address + "', must be a cluster without a service of Quire; "
                    "stop that one first, or use another cluster"
                )
                wide = subprocess.run([*serve, "-dp", "4"], capture_output=True, text=True, env=env, timeout=SECONDS)
                assert wide.returncode == 2
                assert "data_parallel_size: got 4, must be at most 1: 1 of Ray's 3 devices are free" in wide.stderr
            finally:
                server.send_signal(signal.SIGTERM)
                server.communicate(timeout=SECONDS)
            assert server.returncode == 0
            asyncio.run(until(lambda: _actors(raylet) == []))


async def _generate(port: int, expected: list[int]) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        streams = [Stream(channel, PROMPT, LENGTH) for _ in range(4)]
        await asyncio.gather(*(stream.task for stream in streams))
        for stream in streams:
            assert (stream.failure, stream.tokens) == (None, expected), stream.details


@contextmanager
def _cluster(temporary: str) -> Iterator[tuple[str, int]]:
    """A head with three devices, started by its user; its address and the process of its raylet."""
    port = choose_port("--port", "127.0.0.1", 0)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    command += ["--node-ip-address", "127.0.0.1", "--num-cpus", "4", "--resources", '{"device": 3}']
    command += ["--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", str(80 << 20)]
    head = subprocess.Popen(
        [*command, "--temp-dir", f"{temporary}/ray"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment({"TMPDIR": temporary}),
    )
    try:
        asyncio.run(until(lambda: _raylet(head.pid) or head.poll() is not None))
        assert head.poll() is None, head.stdout and head.stdout.read()
        raylet = _raylet(head.pid)
        assert raylet is not None
        yield f"127.0.0.1:{port}", raylet
        assert head.poll() is None
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=SECONDS)


def _raylet(head: int) -> int | None:
    return next((pid for pid in children(head) if "/raylet/raylet" in command_line(pid)), None)


def _actors(raylet: int) -> list[str]:
    lines = [command_line(pid) for pid in children(raylet)]
    return [
        line.split()[0].removeprefix("ray::").partition(".")[0]
        for line in lines
        if line.startswith("ray::") and "Actor" in line
    ]

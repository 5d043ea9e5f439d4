"""`quire serve` with Ray: a real cluster of two shards, started, used, hurt and ended as a user would."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc.aio
import pytest

from cluster.processes import environment
from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.sampling import SamplingParams
from tests.serving import SECONDS, Processes, Stream, command_line, listeners, until

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(600)]
LENGTH = 700


def test_two_shards_under_ray_survive_their_scheduler_and_leave_nothing(tmp_path: Path) -> None:
    model, folder, notes = tmp_path / "tiny", tmp_path / "folder", tmp_path / "notes"
    make_tiny_llama(model)
    for name in ("cluster", "kernels", "pagetable", "worker"):  # Ray puts the user's folder first on its actors' path
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit(77)")
    draw = random.Random(5)
    prompts = [[draw.randrange(8, 300) for _ in range(24 + 9 * index)] for index in range(4)]
    llm = LLM(str(model), max_model_len=1024, num_gpu_blocks_override=512, threads=1, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    expected = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    flags = ["--port", "0", "-dp", "2", "--max-model-len", "1024", "--num-gpu-blocks-override", "512", "--threads", "1"]
    # as the console script starts: without the current folder on the path
    command = [sys.executable, "-P", "-m", "launch.cli", "serve", str(model), *flags]
    # Ray's sockets lie below TMPDIR, and their paths may be 107 bytes long
    with tempfile.TemporaryDirectory(prefix="q") as temporary:
        env = environment({"TMPDIR": temporary})
        _serve_and_use(command, env, folder, notes, Path(temporary), prompts, expected)


def _serve_and_use(
    command: list[str],
    env: dict[str, str],
    folder: Path,
    notes: Path,
    temporary: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    with notes.open("w") as err:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env, cwd=folder)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("ready on 127.0.0.1:"), notes.read_text()
        (private,) = temporary.glob("quire-*")
        assert private.stat().st_mode & 0o777 == 0o700
        assert (private / "ray-token").stat().st_mode & 0o777 == 0o600
        processes = Processes(server.pid)
        ours = {pid for pid in processes.look() if _name(pid) in ("front", "scheduler", "keeper", "worker")}
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in ours} == {os.getpriority(os.PRIO_PROCESS, 0)}
        asyncio.run(_use(int(line.split(":")[1]), processes, prompts, expected))
        processes.look()
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=SECONDS)
    except BaseException:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=SECONDS)
        raise
    assert (server.returncode, out) == (0, ""), notes.read_text()
    said = [text for text in notes.read_text().splitlines() if not text.startswith("quire: ")]
    assert said == []
    asyncio.run(until(lambda: processes.left() == []))
    assert list(temporary.glob("quire-*")) == []


def test_a_cluster_that_is_not_there_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    with socket.socket() as closed:  # bound, so that nobody else takes it, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        command = [sys.executable, "-P", "-m", "launch.cli", "serve", str(tmp_path), "--port", "0"]
        command += ["--address", address, "--max-model-len", "1024", "--num-gpu-blocks-override", "512"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"quire: error: --address: got '{address}', must be a Ray cluster that can be reached (connection refused); "
        "start one: ray start --head"
    )


def _check_listeners(port: int, processes: Processes) -> None:
    """docs/serving.md, "What listens where": ours on loopback, one port of Ray's own in each actor, and Ray's parts."""
    inside: dict[str, list[int]] = {}
    outside: dict[str, int] = {}
    for pid in processes.look():
        name = _name(pid)
        for address, each in listeners(pid):
            if address == "127.0.0.1":
                inside.setdefault(name, []).append(each)
            else:
                outside[name] = outside.get(name, 0) + 1
    assert {name: len(ports) for name, ports in inside.items()} == {"front": 2, "scheduler": 1, "worker": 2}
    assert port in inside["front"]
    actors = {"front": 1, "scheduler": 1, "keeper": 2}
    assert {name: count for name, count in outside.items() if name in actors} == actors
    ray = {"gcs_server", "raylet", "RuntimeEnvAgent", "DashboardAgent", "monitor.py", "dashboard.py", "log_monitor.py"}
    assert outside.keys() - actors.keys() <= ray, outside


def _name(pid: int) -> str:
    line = command_line(pid)
    for mark, name in (("ray::FrontActor", "front"), ("ray::SchedulerActor", "scheduler"), ("-m worker", "worker")):
        if mark in line:
            return name
    if line.startswith("ray::DeviceActor"):
        return "keeper"
    if line.startswith("ray::"):
        return line.split()[0].removeprefix("ray::").partition(".")[0]
    return next((Path(word).name for word in line.split() if word.endswith((".py", "gcs_server", "raylet"))), line)


async def _use(port: int, processes: Processes, prompts: list[list[int]], expected: list[list[int]]) -> None:
    _check_listeners(port, processes)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        streams = [Stream(channel, prompt, LENGTH) for prompt in prompts]
        for stream in streams:
            await stream.reaches(20)
        os.kill(_actor(processes, "SchedulerActor"), signal.SIGKILL)
        await _finish(streams, expected)
        streams = [Stream(channel, prompt, LENGTH) for prompt in prompts]
        for stream in streams:
            await stream.reaches(20)
        os.kill(_actor(processes, "DeviceActor"), signal.SIGKILL)  # takes its worker with it
        await _finish(streams, expected)


def _actor(processes: Processes, name: str) -> int:
    """Of our own server's: it is looked for below its pid only."""
    return next(pid for pid in processes.look() if command_line(pid).startswith(f"ray::{name}"))


async def _finish(streams: list[Stream], expected: list[list[int]]) -> None:
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(stream.task for stream in streams))
    for stream, tokens in zip(streams, expected, strict=True):
        assert stream.failure is None, stream.details
        assert stream.tokens == tokens

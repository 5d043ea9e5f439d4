"""The service's processes without Ray: equal tokens to the engine's, and what survives which death."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cluster.processes import environment
from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.sampling import SamplingParams
from tests.local_service import ENDLESS, LENGTH, ROOM, SMALL, finish, prompts, run, running, under_way
from tests.planted import Brake
from tests.serving import SECONDS, Processes, Stream, children, files, is_alive, listeners, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    """What the engine in this process says to the first four prompts."""
    llm = LLM(model, **SMALL)
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts(4), params)]


def test_two_shards_say_what_the_engine_says_and_listen_on_loopback_only(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            parts = it.service.parts
            workers = [it.worker(0), it.worker(1)]
            home = "127.0.0.1"
            assert listeners(parts["front"].pid) == {(home, it.ports["grpc"]), (home, it.ports["metrics"])}
            assert listeners(parts["scheduler"].pid) == {(home, it.ports["scheduler"])}
            for index in (0, 1):
                assert listeners(parts[f"keeper-{index}"].pid) == set()
                assert [address for address, _ in listeners(workers[index])] == [home]
            await finish(it.streams(), expected)
            pids = [*(part.pid for part in parts.values()), *workers]
            before = [len(files(pid)) for pid in pids]
            await finish(it.streams(), expected)
            assert [len(files(pid)) for pid in pids] == before
            assert [it.worker(0), it.worker(1)] == workers
            assert it.notes == []

    run(scenario())


def test_streams_go_on_when_a_worker_is_killed(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                await it.all_shards_run()
                victim = it.worker(0)
                os.kill(victim, signal.SIGKILL)
            await finish(streams, expected)
            await until(lambda: len(it.notes) == 2)
            assert it.notes[0] == "the worker of shard 0 ended by signal 9; its requests go on elsewhere"
            assert it.notes[1] == f"shard 0 is back as process {it.worker(0)}"
            await finish(it.streams(), expected)

    run(scenario())


def test_a_worker_that_is_stopped_is_fenced_and_its_streams_move(
    model: str, expected: list[list[int]], brake: Brake
) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                await it.all_shards_run()
                victim = it.worker(1)
                os.kill(victim, signal.SIGSTOP)  # nobody wakes it: only its keeper's SIGKILL ends it
            await finish(streams, expected)
            await until(lambda: len(it.notes) == 2)
            assert not is_alive(victim)
            assert it.notes[0] == "the worker of shard 1 ended by signal 9; its requests go on elsewhere"

    run(scenario())


def test_no_stream_breaks_when_the_scheduler_is_killed_and_new_requests_wait(
    model: str, expected: list[list[int]], brake: Brake
) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                early = it.streams()
                await under_way(early)
                workers = [it.worker(0), it.worker(1)]
                scheduler = it.service.parts["scheduler"].pid
                os.kill(scheduler, signal.SIGKILL)
                late = it.streams()
            await finish(early, expected)
            await finish(late, expected)
            assert it.service.parts["scheduler"].pid != scheduler
            assert [it.worker(0), it.worker(1)] == workers

    run(scenario())


def test_a_killed_keeper_leaves_no_worker_and_comes_back(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                worker, keeper = it.worker(0), it.service.parts["keeper-0"].pid
                os.kill(keeper, signal.SIGKILL)
            await until(lambda: not is_alive(worker))
            await finish(streams, expected)
            await until(lambda: bool(children(it.service.parts["keeper-0"].pid)))
            assert it.service.parts["keeper-0"].pid != keeper
            await finish(it.streams(), expected)

    run(scenario())


def test_streams_outlive_every_worker_one_after_the_other(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model) as it, it.client() as client:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                os.kill(it.worker(0), signal.SIGKILL)
                # A request that sees two deaths and no token in between would rightly be blamed for them. A token
                # behind what tables hold on shard 1 once all are there was not on its way when shard 0 died.
                async with asyncio.timeout(SECONDS):
                    while True:
                        present = (await client.page_map()).sequences
                        held = [16 * len(each.pages) for each in present if each.shard_id == 1 and each.pages]
                        if len(held) == len(present) == len(streams):
                            break
                        await asyncio.sleep(0.005)
                await under_way(streams, max(held) + 1)
                assert not any(stream.task.done() for stream in streams)
                os.kill(it.worker(1), signal.SIGKILL)
            await finish(streams, expected)

    run(scenario())


def test_with_all_workers_gone_new_requests_wait_or_are_told_to_come_back(
    model: str, expected: list[list[int]]
) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            for pid in [it.worker(0), it.worker(1)]:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: sum("ended by signal 9" in note for note in it.notes) == 2)
            failures = set()
            async with asyncio.timeout(SECONDS):
                while True:
                    stream = Stream(it.channel, prompts(1)[0], LENGTH)
                    await stream.task
                    if stream.failure is None:
                        break
                    failures.add(stream.failure)
            assert failures <= {grpc.StatusCode.UNAVAILABLE}  # none where the front has just started: it waits longer
            await until(lambda: len(it.notes) == 4)
            await finish(it.streams(), expected)

    run(scenario())


# The command


def serve(model: str, *flags: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """As the console script starts: without the current folder on the path."""
    small = ["--max-model-len", "1024", "--num-gpu-blocks-override", "512", "--threads", "1"]
    command = [sys.executable, "-P", "-m", "launch.cli", "serve", model, "--no-ray", "--port", "0", *small, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=cwd)


def ready_port(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("ready on 127.0.0.1:"), server.communicate(timeout=SECONDS)
    port = int(line.split(":")[1])
    assert line == (
        f'ready on 127.0.0.1:{port}: quire generate --server 127.0.0.1:{port} --prompt "Once upon a time"\n'
    )
    return port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_quietly(model: str, expected: list[list[int]], number: signal.Signals) -> None:
    server = serve(model)
    port = ready_port(server)
    processes = Processes(server.pid)

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = Stream(channel, prompts(1)[0], LENGTH)
            await stream.reaches(5)
            server.send_signal(number)
            await finish([stream], expected[:1])

    run(scenario())
    out, err = server.communicate(timeout=SECONDS)
    assert (server.returncode, out) == (0, "")
    assert [line for line in err.splitlines() if not line.startswith("quire: ")] == []
    assert processes.left() == []


def test_a_second_signal_does_not_wait_for_streams(model: str) -> None:
    room = [str(each) for flag, value in ROOM.items() for each in (f"--{flag.replace('_', '-')}", value)]
    server = serve(model, "--drain-seconds", "600", *room)
    port = ready_port(server)
    processes = Processes(server.pid)

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            streams = [Stream(channel, prompt, ENDLESS) for prompt in prompts(8)]
            await streams[0].reaches(5)
            server.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            server.send_signal(signal.SIGTERM)
            await asyncio.gather(*(stream.task for stream in streams))
            assert {stream.failure for stream in streams} == {grpc.StatusCode.UNAVAILABLE}

    run(scenario())
    server.communicate(timeout=SECONDS)
    assert server.returncode == 0
    assert processes.left() == []


def test_nothing_outlives_a_killed_parent(model: str) -> None:
    server = serve(model, "-dp", "2")
    ready_port(server)
    processes = Processes(server.pid)
    assert len(processes.known) == 6
    server.kill()
    server.communicate(timeout=SECONDS)
    run(until(lambda: processes.left() == []))


def test_it_starts_from_a_folder_with_packages_of_the_same_names(model: str, tmp_path: Path) -> None:
    for name in ("cluster", "kernels", "pagetable", "worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(77)")
    server = serve(model, cwd=tmp_path)
    ready_port(server)
    server.terminate()
    server.communicate(timeout=SECONDS)
    assert server.returncode == 0


def test_detach_returns_once_ready_and_says_how_to_stop(model: str, tmp_path: Path) -> None:
    small = ["--max-model-len", "1024", "--num-gpu-blocks-override", "512", "--threads", "1"]
    command = [sys.executable, "-P", "-m", "launch.cli", "serve", model, "--no-ray", "--port", "0", "--detach", *small]
    env = environment({"XDG_STATE_HOME": str(tmp_path)})
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ready on 127.0.0.1:")
    first, second = done.stderr.splitlines()
    found = re.fullmatch(r"quire: runs as process (\d+); stop it with: quire (stop --port \d+)", first)
    assert found is not None
    pid = int(found[1])
    (log,) = (tmp_path / "quire").iterdir()
    assert second == f"quire: what it says goes to {log}"
    assert log.stat().st_mode & 0o777 == 0o600
    processes = Processes(pid)
    assert is_alive(pid)
    stop = [sys.executable, "-P", "-m", "launch.cli", *found[2].split()]
    assert subprocess.run(stop, env=env, timeout=SECONDS).returncode == 0
    run(until(lambda: not is_alive(pid)))
    assert processes.left() == []


def test_a_model_that_is_refused_ends_the_command_with_its_reason(model: str, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    server = serve(str(tmp_path))
    processes = Processes(server.pid)
    out, err = server.communicate(timeout=SECONDS)
    assert (server.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("quire: error: model.safetensors")
    assert processes.left() == []

"""Faults of whole processes under gRPC: deaths at once, poison, overload, bursts, clients that vanish or freeze."""

from __future__ import annotations

import asyncio
import os
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
from tests.local_service import LENGTH, SMALL, Running, finish, prompts, run, running
from tests.serving import SECONDS, Stream, is_alive, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
POISON = 301  # a token that no other prompt has

# In the worker's process alone, which takes it from PYTHONPATH: a step that runs the poison's tokens ends the process.
_BOMB = """
import os, signal, sys
if sys.argv[:1] == ["-m"] or "worker" in sys.orig_argv:
    import importlib.abc, importlib.util
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "worker.runner":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                run = module.Runner.run
                def bomb(self, plan):
                    if {token} in plan.tokens:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return run(self, plan)
                module.Runner.run = bomb
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    """What the engine in this process says to the first four prompts."""
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in LLM(model, **SMALL).generate(prompts(4), params)]


def test_streams_outlive_both_workers_dying_at_once(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            streams = it.streams()
            for stream in streams:
                await stream.reaches(10)
            workers = [it.worker(0), it.worker(1)]
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            await finish(streams, expected)
            assert not any(map(is_alive, workers))
            await it.comes_to_rest()

    run(scenario())


def test_a_worker_that_pauses_for_a_second_is_left_alone(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            streams = it.streams()
            for stream in streams:
                await stream.reaches(10)
            workers = [it.worker(0), it.worker(1)]
            os.kill(workers[0], signal.SIGSTOP)
            await asyncio.sleep(1.0)
            os.kill(workers[0], signal.SIGCONT)
            await finish(streams, expected)
            assert [it.worker(0), it.worker(1)] == workers and it.notes == []

    run(scenario())


def test_a_killed_front_ends_its_streams_and_their_pages(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            streams = it.streams()
            for stream in streams:
                await stream.reaches(10)
            workers, front = [it.worker(0), it.worker(1)], it.service.parts["front"].pid
            os.kill(front, signal.SIGKILL)
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*(stream.task for stream in streams))
            assert {stream.failure for stream in streams} == {grpc.StatusCode.UNAVAILABLE}
            await until(lambda: it.service.parts["front"].pid != front)
            async with asyncio.timeout(SECONDS):
                while True:
                    again = Stream(it.channel, prompts(1)[0], LENGTH)
                    await again.task
                    if again.failure is None:
                        break
            assert again.tokens == expected[0]
            await it.comes_to_rest()
            assert [it.worker(0), it.worker(1)] == workers

    run(scenario())


def test_poison_fails_after_two_deaths_and_the_others_go_on(
    model: str, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BOMB.replace("{token}", str(POISON)))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    async def scenario() -> None:
        async with running(model) as it:
            beside = it.streams()
            for stream in beside:
                await stream.reaches(5)
            poison = Stream(it.channel, [POISON, 9, 9], 5)
            await poison.task
            assert poison.failure is grpc.StatusCode.INTERNAL and poison.details.startswith("poison: 2 shards died")
            assert poison.tokens == []
            await finish(beside, expected)
            await until(lambda: len(it.notes) == 4)
            assert sum("ended by signal 9" in note for note in it.notes) == 2
            await it.comes_to_rest()

    run(scenario())


def test_four_times_what_the_pools_hold_is_served_in_turn(model: str) -> None:
    """48 requests that end with 26 blocks each, over two pools of 96 blocks: preempted, never refused."""
    few = {"num_gpu_blocks_override": 96, "max_model_len": 512, "max_num_seqs": 32}
    many = [[8 + (7 * index + at) % 290 for at in range(96)] for index in range(48)]
    params = SamplingParams(temperature=0, max_tokens=320, ignore_eos=True)
    whole = LLM(model, **{**SMALL, **few, "num_gpu_blocks_override": 2048}).generate(many, params)
    assert sum(-(-(96 + 320) // 16) for _ in many) > 4 * 2 * 96

    async def scenario() -> None:
        async with running(model, **few) as it:
            streams = [Stream(it.channel, prompt, 320) for prompt in many]
            await finish(streams, [list(output.outputs[0].token_ids) for output in whole])
            await it.comes_to_rest()
            assert it.notes == []

    run(scenario())


def test_a_burst_beyond_the_bound_is_told_to_try_again_and_the_rest_is_served(model: str) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            pids = {name: part.pid for name, part in it.service.parts.items()}
            memory = _resident(pids["front"])
            early = Stream(it.channel, prompts(1)[0], LENGTH)
            await early.reaches(3)
            burst = [Stream(it.channel, [8 + index % 250, 9], 2) for index in range(10_000)]
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*(stream.task for stream in burst))
            failures = {stream.failure for stream in burst}
            assert failures <= {None, grpc.StatusCode.RESOURCE_EXHAUSTED}
            served = [stream for stream in burst if stream.failure is None]
            assert len(served) >= 512 and all(len(stream.tokens) == 2 for stream in served)
            for stream in burst:
                assert stream.failure is None or "try again" in stream.details
            await early.task
            assert len(early.tokens) == LENGTH
            assert _resident(pids["front"]) - memory < 512 << 20
            assert {name: part.pid for name, part in it.service.parts.items()} == pids
            await it.comes_to_rest()

    run(scenario())


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


_CLIENT = """
import sys
from quire import connect
stream = connect(sys.argv[1]).stream({"prompt_token_ids": [9, 10, 11], "max_tokens": 900, "ignore_eos": True, "n": 16})
next(output for output in stream if output.outputs[0].token_ids)
print("begun", flush=True)
import os, time
while True:
    for _ in stream:
        pass
    time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_is_killed_or_frozen_frees_its_pages(model: str, number: signal.Signals) -> None:
    async def scenario(it: Running) -> None:
        server = f"127.0.0.1:{it.ports['grpc']}"
        pipe = asyncio.subprocess.PIPE
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _CLIENT, server, stdout=pipe, env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            assert client.stdout is not None
            assert await asyncio.wait_for(client.stdout.readline(), SECONDS) == b"begun\n"
            client.send_signal(number)
            await it.comes_to_rest()
        finally:
            if client.returncode is None:
                client.kill()
            await client.wait()
        assert it.notes == []

    async def whole() -> None:
        async with running(model) as it:
            await scenario(it)

    run(whole())

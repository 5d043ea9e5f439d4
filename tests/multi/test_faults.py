"""Faults of whole processes under gRPC: deaths at once, a scheduler that starts over, clients that vanish or freeze."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import grpc
import grpc.aio
import pytest

from cluster.processes import environment
from launch.client import AsyncClient
from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.errors import ServiceError
from pagetable.sampling import SamplingParams
from tests.local_service import ENDLESS, LENGTH, ROOM, SMALL, Running, finish, prompts, run, running, under_way
from tests.planted import Brake
from tests.serving import SECONDS, Stream, is_alive, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


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


def test_streams_outlive_both_workers_dying_at_once(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                workers = [it.worker(0), it.worker(1)]
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
                assert not any(stream.task.done() for stream in streams)
            await finish(streams, expected)
            assert not any(map(is_alive, workers))
            await it.comes_to_rest()

    run(scenario())


def test_a_worker_that_pauses_for_a_second_is_left_alone(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                streams = it.streams()
                await under_way(streams)
                await it.all_shards_run()
                workers = [it.worker(0), it.worker(1)]
                os.kill(workers[0], signal.SIGSTOP)
                await asyncio.sleep(1.0)
                os.kill(workers[0], signal.SIGCONT)
                assert not any(stream.task.done() for stream in streams)
            await finish(streams, expected)
            assert [it.worker(0), it.worker(1)] == workers and it.notes == []

    run(scenario())


def test_a_killed_front_ends_its_streams_and_their_pages(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model, **ROOM) as it:
            streams = it.streams(length=ENDLESS)
            await under_way(streams)
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


def test_a_scheduler_that_starts_over_learns_the_pages_that_shards_hold(model: str, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with running(model) as it, it.client() as client:
            await finish(it.streams(), expected)
            await it.comes_to_rest()
            before = await _pages(client)
            assert sum(cached for _, cached, _ in before) >= 4 * (LENGTH // 16)
            scheduler = it.service.parts["scheduler"].pid
            os.kill(scheduler, signal.SIGKILL)
            await until(lambda: it.service.parts["scheduler"].pid != scheduler)
            async with asyncio.timeout(SECONDS):
                while await _pages(client) != before:
                    await asyncio.sleep(0.05)
            for prompt, tokens in zip(prompts(4), expected, strict=True):
                again = Stream(it.channel, prompt, 5)
                await finish([again], [tokens[:5]])
                assert again.finished is not None  # it was placed where its pages are
                assert again.finished.usage.cached_tokens == (len(prompt) - 1) // 16 * 16 > 0

    run(scenario())


async def _pages(client: AsyncClient) -> list[tuple[int, int, int]]:
    """(shard, cached blocks, used blocks); empty while the scheduler does not answer."""
    try:
        return [(each.shard_id, each.cached_blocks, each.used_blocks) for each in await client.loads()]
    except ServiceError:
        return []


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

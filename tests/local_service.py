"""A service of two shards without Ray, its processes children of the test, and what its streams must say."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio

from launch.client import AsyncClient
from launch.config import EngineConfig
from launch.local import LocalService
from launch.serve import make_plan
from launch.serve_flags import ServeConfig
from tests.serving import SECONDS, Processes, Stream, children, files, until

LENGTH = 700  # output tokens: long enough for something to happen in the middle of
ENDLESS = 3_900  # for streams that must not end by themselves, however late a busy machine lets the test see them
ROOM: dict[str, Any] = {"max_model_len": 4096, "num_gpu_blocks_override": 2048}  # for eight of those
SMALL: dict[str, Any] = {
    "max_model_len": 1024,
    "num_gpu_blocks_override": 512,
    "max_num_seqs": 16,
    "threads": 1,
    "dtype": "float32",
}


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(8, 300) for _ in range(20 + 7 * index)] for index in range(count)]


@dataclass
class Running:
    service: LocalService
    channel: grpc.aio.Channel
    ports: dict[str, int]
    notes: list[str]

    def worker(self, index: int, rank: int = 0) -> int:
        """The present process of a shard's rank."""
        (pid,) = children(self.service.parts[f"keeper-{index}.{rank}" if rank else f"keeper-{index}"].pid)
        return pid

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        client = AsyncClient(f"127.0.0.1:{self.ports['grpc']}")
        try:
            yield client
        finally:
            await client.close()

    async def comes_to_rest(self) -> None:
        """No sequence and no used page is left."""
        async with self.client() as client, asyncio.timeout(SECONDS):
            while (await client.page_map()).sequences or any(each.used_blocks for each in await client.loads()):
                await asyncio.sleep(0.05)

    async def all_shards_run(self) -> None:
        """Every shard has sequences in its steps."""
        async with self.client() as client, asyncio.timeout(SECONDS):
            while not all(load.running for load in await client.loads()):
                await asyncio.sleep(0.02)

    def streams(self, count: int = 4, length: int = LENGTH) -> list[Stream]:
        return [Stream(self.channel, prompt, length) for prompt in prompts(count)]


@asynccontextmanager
async def nothing_left(watched: list[Processes]) -> AsyncIterator[None]:
    """On the way out: no process of `watched` that is not there now, no shared memory and no pipe."""
    shm, pipes = set(os.listdir("/dev/shm")), files(os.getpid(), "pipe:")
    before = set(Processes(os.getpid()).look())
    yield
    for processes in watched:
        processes.known = {each for each in processes.known if each[0] not in before}
    await until(lambda: not any(processes.left() for processes in watched))
    assert set(os.listdir("/dev/shm")) <= shm
    assert files(os.getpid(), "pipe:") <= pipes


@asynccontextmanager
async def running(
    model: str, *, place_seconds: float | None = None, watched: list[Processes] | None = None, **fields: Any
) -> AsyncIterator[Running]:
    """A service of two shards; `fields` are the engine's. On the way out: stopped, and nothing of it is left.

    Args:
        place_seconds: how long the front lets a stream wait for a shard that starts anew, where there is no other one.
        watched: of `nothing_left`, where several services run at once and it is the caller's to ask.
    """
    if watched is None:
        watched = []
        async with nothing_left(watched), running(model, place_seconds=place_seconds, watched=watched, **fields) as it:
            yield it
        return
    notes: list[str] = []
    config = ServeConfig(port=0, ray=False, drain_seconds=0.0)
    plan, _ = make_plan(config, EngineConfig(model, **{"data_parallel_size": 2, **SMALL, **fields}))
    if place_seconds is not None:
        plan = replace(plan, front={**plan.front, "limits": {"place_seconds": place_seconds}})
    service = LocalService(plan, notes.append)
    processes = Processes(os.getpid())
    watched.append(processes)
    processes.look()
    await service.start()
    watch = asyncio.create_task(service.watch())
    ports = {"grpc": plan.front["port"], "metrics": plan.front["metrics_port"], "scheduler": plan.scheduler_port}
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel:
            yield Running(service, channel, ports, notes)
    finally:
        processes.look()
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await service.stop()


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


async def under_way(streams: list[Stream], count: int = 10) -> None:
    """Every stream has so many tokens. A test that needs them to have no more than some presses the brake before."""
    for stream in streams:
        await stream.reaches(count)


async def finish(streams: list[Stream], expected: list[list[int]]) -> None:
    """Every stream ends well and with exactly the tokens of an undisturbed run."""
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(stream.task for stream in streams))
    for stream, tokens in zip(streams, expected, strict=True):
        assert stream.failure is None, stream.details
        assert stream.tokens == tokens
        assert stream.finished is not None

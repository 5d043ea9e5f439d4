"""A Ray cluster over a network, a shard on each of two hosts, users on a third. Hosts lose processes, cables, power."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from launch.client import AsyncClient
from launch.llm import LLM
from pagetable.sampling import SamplingParams
from quire_pb.cluster.v1 import cluster_pb2
from tests.multi.netlab.job import Job
from tests.multi.netlab.lab import Lab
from tests.multi.netlab.ray_hosts import RayHosts
from tests.serving import SECONDS, Stream, listeners, until

pytestmark = pytest.mark.timeout(900)
PORT = 8461
COUNT, LENGTH = 12, 900  # seconds on the fastest machine: long enough for something to happen in the middle
_READY, _DEAD = cluster_pb2.CONDITION_READY, cluster_pb2.CONDITION_DEAD
_ENGINE: dict[str, Any] = {"max_model_len": 1024, "num_gpu_blocks_override": 1024, "threads": 1, "dtype": "float32"}


def test_streams_outlive_a_worker_a_cable_and_a_host(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(4)
    near, far, spare, users = lab.hosts
    ray = RayHosts(lab)
    ray.start_head(devices=1)
    ray.join(far, devices=1)
    flags = [word for name, value in _ENGINE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    service = ray.serve("story", "-dp", "2", "--host", near.address, "--port", str(PORT), "--insecure", *flags)
    service.wait_line(rf"^ready on {near.address}:{PORT}:")
    for host in (near, far):  # a shard on each, which listens where the other reaches it
        (worker,) = host.processes("-m worker")
        assert {address for address, _ in listeners(worker)} == {host.address}
    prompts = _prompts()
    expected = _expected(prompts)

    async def scenario() -> None:
        async with _service(lab.door(users, f"{near.address}:{PORT}"), service) as it:
            streams = await it.running_on_both(prompts)
            (worker,) = far.processes("-m worker")
            os.kill(worker, signal.SIGKILL)
            await it.finish(streams, expected)
            await until(lambda: worker not in far.processes("-m worker") != [])
            await it.becomes(_READY, _READY)

            streams = await it.running_on_both(prompts)
            far.cut()
            await it.finish(streams, expected)
            await it.becomes(_READY, _DEAD)
            far.heal()
            await it.becomes(_READY, _READY)  # its old life was fenced: it is over, whatever it still had to say

            ray.join(spare, devices=1)
            streams = await it.running_on_both(prompts)
            far.power_off()
            await it.finish(streams, expected)
            await until(lambda: len(spare.processes("-m worker")) == 1)  # Ray has moved the shard
            await it.becomes(_READY, _READY)
            await it.finish(await it.running_on_both(prompts), expected)

    asyncio.run(scenario())
    service.kill(signal.SIGTERM)
    assert service.wait() == 0, service
    for host in (near, spare):
        assert host.processes("-m worker") == []
        assert len(host.processes("raylet/raylet")) == 1  # the cluster is somebody else's


class _Service:
    """The service as its users on a host of the lab see it."""

    def __init__(self, channel: grpc.aio.Channel, client: AsyncClient, job: Job) -> None:
        self._channel, self._client, self._job = channel, client, job

    async def running_on_both(self, prompts: list[list[int]]) -> list[Stream]:
        """A stream for each prompt: all have begun, none is done, and both shards run some.

        Tried again where it is not so: a shard that has just come back may not be in the scheduler's books yet."""
        end = asyncio.get_running_loop().time() + SECONDS
        while True:
            streams = [Stream(self._channel, prompt, LENGTH) for prompt in prompts]
            for stream in streams:
                await stream.reaches(10)
            running = [load.running for load in await self._client.loads()]
            if len(running) == 2 and all(running) and not any(stream.task.done() for stream in streams):
                return streams
            assert asyncio.get_running_loop().time() < end, f"{running}\n{self._job}"
            for stream in streams:
                stream.task.cancel()
            await asyncio.gather(*(stream.task for stream in streams), return_exceptions=True)

    async def finish(self, streams: list[Stream], expected: list[list[int]]) -> None:
        """Each ends well, with no token missing and none repeated."""
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*(stream.task for stream in streams))
        for stream, tokens in zip(streams, expected, strict=True):
            assert stream.failure is None, f"{stream.details}\n{self._job}"
            assert stream.tokens == tokens

    async def becomes(self, *conditions: int) -> None:
        """Wait until the shards are in these conditions, whichever is in which: Ray deals them to the hosts."""
        end = asyncio.get_running_loop().time() + SECONDS
        while (found := sorted(shard.condition for shard in await self._client.cluster())) != sorted(conditions):
            assert asyncio.get_running_loop().time() < end, f"{found}, not {conditions}\n{self._job}"
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _service(target: str, job: Job) -> AsyncIterator[_Service]:
    client = AsyncClient(target)
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield _Service(channel, client, job)
    finally:
        await client.close()


def _prompts() -> list[list[int]]:
    draw = random.Random(11)
    return [[1, *(draw.randrange(3, 286) for _ in range(10 + 5 * index))] for index in range(COUNT)]


def _expected(prompts: list[list[int]]) -> list[list[int]]:
    """What the engine in this process says to them."""
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in LLM("story", **_ENGINE).generate(prompts, params)]

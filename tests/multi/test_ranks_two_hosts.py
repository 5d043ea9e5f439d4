"""A shard of two ranks on two hosts: sums over gloo, plans over TCP; a lost rank comes back into the next epoch."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from launch.llm import LLM
from pagetable.sampling import SamplingParams
from tests.models import make_model
from tests.multi.netlab.lab import Lab
from tests.multi.netlab.ray_hosts import RayHosts
from tests.serving import SECONDS, Stream, listeners, until

pytestmark = pytest.mark.timeout(600)
PORT, COUNT, LENGTH = 8461, 6, 300
_ENGINE: dict[str, Any] = {"max_model_len": 512, "num_gpu_blocks_override": 256, "threads": 1, "dtype": "float32"}


@pytest.mark.parametrize("layout", [("-tp", "2", "--page-parallel-size", "2"), ("-pp", "2")], ids=["T2G2", "P2"])
def test_two_ranks_on_two_hosts_say_the_tokens_of_one(layout: tuple[str, ...], make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(3)
    near, far, users = lab.hosts
    model = make_model(lab.folder / "model", seed=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=331)
    ray = RayHosts(lab)
    ray.start_head(devices=1)
    ray.join(far, devices=1)
    flags = [word for name, value in _ENGINE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ("--host", near.address, "--port", str(PORT), "--insecure", *flags, *layout)
    service = ray.serve(str(model), *words)
    service.wait_line(rf"^ready on {near.address}:{PORT}:")
    (first,), (second,) = near.processes("-m worker"), far.processes("-m worker")
    if first in {pid for pid in near.processes("-m worker") if not listeners(pid)}:
        first, second = second, first  # Ray chose the leader's host; the leader alone listens for requests
    prompts = _prompts()
    expected = _expected(model, prompts)

    async def scenario() -> None:
        async with grpc.aio.insecure_channel(lab.door(users, f"{near.address}:{PORT}")) as channel:
            await _finish([Stream(channel, prompt, LENGTH) for prompt in prompts], expected)
            streams = [Stream(channel, prompt, LENGTH) for prompt in prompts]
            for stream in streams:
                await stream.reaches(20)
            os.kill(second, signal.SIGKILL)
            await _finish(streams, expected)
            alive = [*near.processes("-m worker"), *far.processes("-m worker")]
            await until(lambda: len([*near.processes("-m worker"), *far.processes("-m worker")]) == 2)
            assert first in alive  # it kept its weights

    asyncio.run(scenario())
    service.kill(signal.SIGTERM)
    assert service.wait() == 0, service
    assert near.processes("-m worker") == far.processes("-m worker") == []


async def _finish(streams: list[Stream], expected: list[list[int]]) -> None:
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(stream.task for stream in streams))
    for stream, tokens in zip(streams, expected, strict=True):
        assert stream.failure is None, stream.details
        assert stream.tokens == tokens


def _prompts() -> list[list[int]]:
    draw = random.Random(12)
    return [[draw.randrange(2, 331) for _ in range(10 + 15 * index)] for index in range(COUNT)]


def _expected(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in LLM(str(model), **_ENGINE).generate(prompts, params)]

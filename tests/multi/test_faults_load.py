"""More than the service holds: pools four times too small, ten thousand requests at once."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import grpc
import pytest

from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.sampling import SamplingParams
from tests.front_lab import to_refusal
from tests.local_service import LENGTH, SMALL, finish, prompts, run, running
from tests.serving import SECONDS, Stream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SEATS = 1024  # FrontLimits.max_requests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


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
            async with it.client() as client:
                loads = await client.loads()
            assert [each.waiting for each in loads] == [0, 0] and all(each.preemptions for each in loads)
            assert it.notes == []

    run(scenario())


def test_of_a_burst_all_beyond_the_seats_is_told_at_once_to_try_again(model: str) -> None:
    """10,000 calls of 700 tokens: 1,024 have a seat, and every other hears so while those still run."""
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    expected = list(LLM(model, **SMALL).generate(prompts(1), params)[0].outputs[0].token_ids)

    async def scenario() -> None:
        async with running(model) as it:
            pids = {name: part.pid for name, part in it.service.parts.items()}
            memory = _resident(pids["front"])
            early = Stream(it.channel, prompts(1)[0], LENGTH)
            await early.reaches(3)
            burst = [Stream(it.channel, [8 + index % 250, 9], LENGTH) for index in range(10_000)]
            async with asyncio.timeout(SECONDS):
                while sum(stream.task.done() for stream in burst) < len(burst) - SEATS:
                    await asyncio.sleep(0.05)
            refused = [stream for stream in burst if stream.error is not None]
            held = [stream for stream in burst if not stream.task.done()]
            assert len(refused) >= 8_000 and len(held) >= SEATS // 2
            for stream in refused:
                assert stream.error is not None and stream.failure is grpc.StatusCode.RESOURCE_EXHAUSTED
                told = to_refusal(stream.error)
                assert (told.reason, told.has_retry, stream.tokens) == ("OVERLOADED", True, [])
            assert _resident(pids["front"]) - memory < 512 << 20
            for stream in held[32:]:
                stream.task.cancel()
            await finish([early], [expected])
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*(stream.task for stream in held[:32]))
            assert [(stream.failure, len(stream.tokens)) for stream in held[:32]] == [(None, LENGTH)] * 32
            assert {name: part.pid for name, part in it.service.parts.items()} == pids and it.notes == []
            await it.comes_to_rest()

    run(scenario())


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

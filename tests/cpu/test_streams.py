"""When a stream's tokens leave, by the clock that its pushes bring: with the step nearest to when they are due."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from cluster.metrics import Meter
from cluster.streams import Stream
from pagetable.sampling import Request, SamplingParams
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.serving import SECONDS

PACE = 0.05


def stream_of(pace: float) -> Stream:
    request = Request("r", (9,), SamplingParams(seed=0, max_tokens=900))
    meter = Meter(CollectorRegistry(), "m")
    more = {"arrived": 0.0, "max_unsent": 1 << 20, "write_seconds": SECONDS}
    return Stream(request, "t", None, public.GenerateResponse, meter, pace=lambda: pace, **more)


def sent_at(pace: float, step: float, steps: int) -> list[int]:
    """Numbers of the steps whose tokens leave at once, all before them included; the first token comes with step 0."""

    async def drive() -> list[int]:
        stream, found = stream_of(pace), []
        for number in range(steps):
            now = 100.0 + number * step
            stream.push(pb.Delta(sample=0, token=7), now)
            if stream._changed.is_set():
                assert sum(len(each.delta.token_ids) for each in stream._take()) == number - (found or [-1])[-1]
                stream._taken = now  # by this clock
                stream._changed.clear()
                found.append(number)
        return found

    return asyncio.run(drive())


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0.029, [0, 2, 4, 6]),  # 58 ms rather than 29
        (0.040, [0, 1, 2, 3, 4, 5, 6, 7]),  # 40 rather than 80
        (0.030, [0, 2, 4, 6]),  # 60 rather than 30
        (0.021, [0, 2, 4, 6]),  # 42 rather than 63
        (0.080, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_tokens_leave_with_the_step_nearest_to_when_they_are_due(step: float, expected: list[int]) -> None:
    assert sent_at(PACE, step, 8) == expected


def test_short_steps_gather_for_the_whole_pace() -> None:
    assert sent_at(PACE, 0.002, 76) == [0, 25, 50, 75]


def test_without_a_pace_every_step_leaves_at_once() -> None:
    assert sent_at(0.0, 0.002, 5) == [0, 1, 2, 3, 4]


def test_tokens_after_which_nothing_comes_leave_by_themselves() -> None:
    async def drive() -> None:
        stream = stream_of(PACE)
        now = asyncio.get_running_loop().time()
        stream.push(pb.Delta(sample=0, token=7), now)
        assert len(list(stream._take())) == 1
        stream._changed.clear()
        stream.push(pb.Delta(sample=0, token=8), now + 0.01)
        assert not stream._changed.is_set()
        await asyncio.wait_for(stream._changed.wait(), SECONDS)
        assert [list(each.delta.token_ids) for each in stream._take()] == [[8]]

    asyncio.run(drive())

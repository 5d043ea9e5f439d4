"""Ranks that die, stop and fail under a running service: no stream loses or repeats a token, survivors keep their
weights, the others' requests go on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from launch.llm import LLM
from pagetable.sampling import SamplingParams
from tests.local_service import LENGTH, SMALL, Running, finish, nothing_left, prompts, run, running, under_way
from tests.models import make_model
from tests.planted import Brake, plant
from tests.serving import SECONDS, Processes, Stream, is_alive, until

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.timeout(600)]
COUNT, DRAWN = 4, 2  # streams, and how many of them draw their tokens
MARKED = [301, 9, 9]  # a prompt whose tokens stand together nowhere else
ONE: dict[str, Any] = {"data_parallel_size": 1, "place_seconds": SECONDS}  # its streams wait until it is back
T2: dict[str, Any] = {**ONE, "tensor_parallel_size": 2}
P2: dict[str, Any] = {**ONE, "pipeline_parallel_size": 2}
T2G2: dict[str, Any] = {**T2, "page_parallel_size": 2}
AHEAD: dict[str, Any] = {**T2, "async_scheduling": True}
STAGES_AHEAD: dict[str, Any] = {**P2, "async_scheduling": True}
BY_TORCH: dict[str, Any] = {**T2, "table_broadcast": "torch"}
LAYOUTS = {"T2": T2, "P2": P2, "T2G2": T2G2, "T2 by torch": BY_TORCH, "T2 ahead": AHEAD, "P2 ahead": STAGES_AHEAD}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("models"), num_key_value_heads=2))


@pytest.fixture(scope="module")
def expected(model: str) -> list[list[int]]:
    """What the engine in this process says, undisturbed and on one rank."""
    params = [
        SamplingParams(temperature=0.8 if index < DRAWN else 0, seed=index, max_tokens=LENGTH, ignore_eos=True)
        for index in range(COUNT)
    ]
    return [list(output.outputs[0].token_ids) for output in LLM(model, **SMALL).generate(prompts(COUNT), params)]


def streams_of(it: Running, first: int = 0) -> list[Stream]:
    return [
        Stream(it.channel, prompt, LENGTH, temperature=0.8 if index < DRAWN else 0, seed=index)
        for index, prompt in enumerate(prompts(COUNT))
        if index >= first
    ]


async def disturbed(it: Running, brake: Brake, pid: int, number: signal.Signals, expected: list[list[int]]) -> None:
    """Signal a process in the middle of streams; they say what they must, and at the end no page is in use."""
    with brake.pressed():
        streams = streams_of(it)
        await under_way(streams)
        os.kill(pid, number)
        assert not any(stream.task.done() for stream in streams)
    await finish(streams, expected)
    await until(lambda: not is_alive(pid))
    await it.comes_to_rest()


@pytest.mark.parametrize("names", [("T2", "P2", "T2G2"), ("T2 by torch", "T2 ahead", "P2 ahead")], ids=", ".join)
def test_streams_outlive_each_rank(model: str, names: tuple[str, ...], expected: list[list[int]], brake: Brake) -> None:
    """Of three services at a time, since most of this is waiting until a silent rank is given up."""

    watched = list[Processes]()

    async def scenario(layout: dict[str, Any]) -> None:
        async with running(model, watched=watched, **layout) as it:
            for victim in (1, 0):
                for number in (signal.SIGKILL, signal.SIGSTOP):
                    pids = [it.worker(0, rank) for rank in range(2)]
                    await disturbed(it, brake, pids[victim], number, expected)
                    survivor = 1 - victim
                    assert it.worker(0, survivor) == pids[survivor]  # and with it its weights
                    assert it.worker(0, victim) != pids[victim]
            assert sum("rank 1 of shard 0 ended by signal 9" in note for note in it.notes) == 2
            assert sum("the worker of shard 0 ended by signal 9" in note for note in it.notes) == 2

    async def all_of_them() -> None:
        async with nothing_left(watched):
            await asyncio.gather(*(scenario(LAYOUTS[name]) for name in names))

    run(all_of_them())


def test_the_other_shard_goes_on_while_one_has_lost_a_rank(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model, data_parallel_size=2, tensor_parallel_size=2) as it:
            pids = [[it.worker(shard, rank) for rank in range(2)] for shard in range(2)]
            with brake.pressed():
                streams = streams_of(it)
                await under_way(streams)
                await it.all_shards_run()
                os.kill(pids[0][1], signal.SIGSTOP)
                fresh = Stream(it.channel, prompts(COUNT)[2], 40)  # begins before the stopped one is known to be
            await finish([fresh], [expected[2][:40]])
            await finish(streams, expected)
            assert [it.worker(1, rank) for rank in range(2)] == pids[1] and it.worker(0) == pids[0][0]
            await it.comes_to_rest()

    run(scenario())


@pytest.mark.parametrize("layout", [T2, P2], ids=["T2", "P2"])
def test_a_rank_that_is_asked_to_leave_does_so_and_another_comes(
    model: str, layout: dict[str, Any], expected: list[list[int]], brake: Brake
) -> None:
    """While nothing runs, and in the middle of decodes whose plans are all taken natively."""

    async def scenario() -> None:
        async with running(model, **layout) as it:
            idle = it.worker(0, 1)
            os.kill(idle, signal.SIGTERM)
            await until(lambda: not is_alive(idle))
            with brake.pressed():
                streams = streams_of(it, DRAWN)
                await under_way(streams)
                busy = it.worker(0, 1)
                os.kill(busy, signal.SIGTERM)
                await until(lambda: not is_alive(busy))
                assert not any(stream.task.done() for stream in streams)
            await finish(streams, expected[DRAWN:])
            assert len({idle, busy, it.worker(0, 1)}) == 3
            await it.comes_to_rest()

    run(scenario())


def test_a_pause_of_a_second_is_left_alone(model: str, expected: list[list[int]], brake: Brake) -> None:
    async def scenario() -> None:
        async with running(model, **T2) as it:
            pids = [it.worker(0, rank) for rank in range(2)]
            with brake.pressed():
                streams = streams_of(it)
                await under_way(streams)
                for pid in pids:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(1.0)
                    os.kill(pid, signal.SIGCONT)
                assert not any(stream.task.done() for stream in streams)
            await finish(streams, expected)
            assert [it.worker(0, rank) for rank in range(2)] == pids and it.notes == []

    run(scenario())


def plant_on_rank_1(folder: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Rank 1 of every shard that is started from now on does this where a step runs the marked prompt."""
    where = f'array("i", {MARKED}).tobytes() in plan.tokens.tobytes() and self.part.rank == 1'
    plant(folder, monkeypatch, where, act)


@pytest.mark.parametrize("layout", [T2, P2], ids=["T2", "P2"])
def test_a_request_on_which_a_rank_raises_fails_after_two_epochs_and_the_others_go_on(
    model: str,
    layout: dict[str, Any],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    brake: Brake,
) -> None:
    plant_on_rank_1(tmp_path, monkeypatch, "raise ValueError('a page that is not there')")

    async def scenario() -> None:
        async with running(model, **layout) as it:
            pids = [it.worker(0, rank) for rank in range(2)]
            with brake.pressed():
                beside = streams_of(it)
                await under_way(beside)
                poison = Stream(it.channel, MARKED, 5)
                await poison.task
                assert not any(stream.task.done() for stream in beside)
            assert poison.failure is grpc.StatusCode.INTERNAL and poison.details.startswith("poison: 2 shards died")
            assert poison.tokens == []
            await finish(beside, expected)
            overs = [note for note in it.notes if "rank 1: plan" in note]
            assert len(overs) == 2 and all("failed (ValueError: a page that is not there)" in note for note in overs)
            assert [it.worker(0, rank) for rank in range(2)] == pids  # no process had to end for it
            await it.comes_to_rest()

    run(scenario())


def test_a_rank_whose_step_never_ends_is_ended_and_the_leader_stays(
    model: str, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brake: Brake
) -> None:
    fuse = tmp_path / "fuse"
    fuse.touch()
    hang = f"os.path.exists({str(fuse)!r}) and (os.unlink({str(fuse)!r}), time.sleep(3600))"
    plant_on_rank_1(tmp_path, monkeypatch, hang)

    async def scenario() -> None:
        async with running(model, **T2) as it:
            pids = [it.worker(0, rank) for rank in range(2)]
            with brake.pressed():
                streams = streams_of(it)
                await under_way(streams)
                slow = Stream(it.channel, MARKED, 5)
                await until(lambda: not fuse.exists())
                assert not any(stream.task.done() for stream in streams)
            await finish(streams, expected)
            await slow.task
            assert slow.failure is None and len(slow.tokens) == 5 and not fuse.exists()
            assert it.worker(0) == pids[0] and it.worker(0, 1) != pids[1]
            assert any("a step has run for more than 8 s" in note for note in it.notes)
            await it.comes_to_rest()

    run(scenario())

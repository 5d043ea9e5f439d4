"""Requests that kill the process that runs them, and deaths in the middle of a prefill.

A worker of these tests is the real one with one addition of the test's own (sitecustomize, by PYTHONPATH): a step that
runs a marked token ends the process by SIGKILL.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
import pytest

from launch.llm import LLM
from launch.models.tiny_llama import make_tiny_llama
from pagetable.sampling import SamplingParams
from tests.local_service import LENGTH, SMALL, finish, prompts, run, running, under_way
from tests.planted import Brake, plant
from tests.serving import Stream, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MARK = 301  # a token that no other prompt has


class Bomb:
    """Laid into every worker that is started from now on.

    Args:
        token: a step that runs it ends the process.
        fuses: how often, over all processes.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, token: int, fuses: int) -> None:
        self._fuses = folder / "fuses"
        self._fuses.mkdir()
        for number in range(fuses):
            (self._fuses / str(number)).touch()
        fuses_left = f"os.listdir({str(self._fuses)!r})"
        light = f"os.unlink(os.path.join({str(self._fuses)!r}, {fuses_left}[0])); os.kill(os.getpid(), signal.SIGKILL)"
        plant(folder, monkeypatch, f"{token} in plan.tokens and {fuses_left}", light)

    @property
    def left(self) -> int:
        return len(list(self._fuses.iterdir()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(model: str) -> LLM:
    return LLM(model, **SMALL)


def greedy(engine: LLM, asked: list[list[int]], length: int) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in engine.generate(asked, params)]


def test_a_prompt_that_kills_fails_after_two_deaths_and_the_others_go_on(
    model: str, engine: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brake: Brake
) -> None:
    bomb = Bomb(tmp_path, monkeypatch, MARK, fuses=10)

    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                beside = it.streams()
                await under_way(beside)
                poison = Stream(it.channel, [MARK, 9, 9], 5)
                await poison.task
            assert poison.failure is grpc.StatusCode.INTERNAL and poison.details.startswith("poison: 2 shards died")
            assert poison.tokens == []
            await finish(beside, greedy(engine, prompts(4), LENGTH))
            await until(lambda: len(it.notes) == 4)
            assert sum("ended by signal 9" in note for note in it.notes) == 2 and bomb.left == 8
            await it.comes_to_rest()

    run(scenario())


def test_a_request_that_kills_in_the_middle_of_its_outputs_fails_after_two_deaths(
    model: str, engine: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brake: Brake
) -> None:
    """It shares each step with others that have outputs, too: it is known by dying again where it died before."""
    innocent = greedy(engine, prompts(4), LENGTH)
    seen = {token for tokens in [*prompts(4), *innocent] for token in tokens}
    asked = [[8 + first, 9 + 2 * first, 10] for first in range(100)]
    for prompt, tokens in zip(asked, greedy(engine, asked, 60), strict=True):
        places = [at for at, token in enumerate(tokens) if at >= 20 and token not in {*seen, *prompt, *tokens[:at]}]
        if places:
            break
    (at, *_) = places
    bomb = Bomb(tmp_path, monkeypatch, tokens[at], fuses=10)

    async def scenario() -> None:
        async with running(model) as it:
            with brake.pressed():
                beside = it.streams()
                await under_way(beside)
                poison = Stream(it.channel, prompt, 60)
                await poison.task
            assert poison.failure is grpc.StatusCode.INTERNAL and poison.details.startswith("poison: 2 shards died")
            assert poison.tokens == tokens[: len(poison.tokens)] and at <= len(poison.tokens) <= at + 1
            await finish(beside, innocent)
            assert bomb.left == 8
            await it.comes_to_rest()

    run(scenario())


def test_a_death_in_the_middle_of_a_prefill_changes_no_token(
    model: str, engine: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn tokens (temperature 1, a seed) of two requests: one decodes, the other's prompt is half computed."""
    asked = [[20 + at % 270 for at in range(40)], [(at * 7) % 290 + 8 for at in range(600)]]
    asked[1][450] = MARK  # in its fifth step of prefill
    seeds = (11, 12)
    expected = [
        list(engine.generate([prompt], params)[0].outputs[0].token_ids)
        for prompt, params in zip(
            asked,
            [SamplingParams(temperature=1, seed=seed, max_tokens=300, ignore_eos=True) for seed in seeds],
            strict=True,
        )
    ]
    bomb = Bomb(tmp_path, monkeypatch, MARK, fuses=1)

    async def scenario() -> None:
        async with running(model, max_num_batched_tokens=96) as it:
            streams = [
                Stream(it.channel, prompt, 300, temperature=1, seed=seed)
                for prompt, seed in zip(asked, seeds, strict=True)
            ]
            await finish(streams, expected)
            assert bomb.left == 0
            await until(lambda: len(it.notes) == 2)
            await it.comes_to_rest()

    run(scenario())

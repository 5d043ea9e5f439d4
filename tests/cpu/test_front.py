"""The front between gRPC clients and scripted shards: streams, ends, forks, deaths, refusals, tenants, listeners."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from cluster.auth import new_key
from cluster.front_config import FrontConfig
from cluster.front_process import main
from cluster.metrics import Meter
from cluster.streams import Stream
from cluster.tokenizer import Tokenizer
from launch.models.tiny_llama import make_tiny_llama
from pagetable.errors import ConfigError
from pagetable.frames import Kind
from pagetable.sampling import Request, SamplingParams, decode_params
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.front_lab import (
    SECRET,
    SOON,
    FakeScheduler,
    FakeShard,
    Lab,
    hear,
    ints,
    lab,
    refusal,
    to_refusal,
    tokens,
    until,
)

PROMPT = [5, 6, 7]
CERT = """-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIURc0vLFCefunPP2iCprWdZmklt/0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTAyNDI1MloYDzIxMjYxMDI4
MDI0MjUyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARgAvOStLz30AGuWW66rACjIAUEgTKZkNZgIKWNrpx3HuGrVotdVNBt
l+whXiXnf76MGdT/2lBKB0AcjrNLYf7no28wbTAdBgNVHQ4EFgQU0tD1TGJNHSEa
d+Wgpegrd2dMUKgwHwYDVR0jBBgwFoAU0tD1TGJNHSEad+Wgpegrd2dMUKgwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgK9j/sOrqdQqVsFf+GPx7PXZmdVtdhpDeHN1bMNU7zm4CIFG7
oVti+tZqYafF0g9XC8LmkrAgOeszyfxGvyBU06d2
-----END CERTIFICATE-----
"""
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg7qFTfcccZrEQjCRU
jHTwKF5RGyy8+EGmI08kQid+3NWhRANCAARgAvOStLz30AGuWW66rACjIAUEgTKZ
kNZgIKWNrpx3HuGrVotdVNBtl+whXiXnf76MGdT/2lBKB0AcjrNLYf7n
-----END PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("front") / "fake"
    make_tiny_llama(path)
    return path


@pytest.fixture
def run() -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Runs a test's coroutine; no task may be left that nobody awaits."""

    def call(body: Coroutine[Any, Any, None]) -> None:
        asyncio.run(body)

    yield call


Run = Callable[[Coroutine[Any, Any, None]], None]


def decoded(folder: Path, ids: list[int]) -> str:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer.decode(ids)


# One stream


def test_a_stream_is_accepted_then_deltas_then_finished(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            heard = await hear(it.generate(PROMPT, max_tokens=40, request_id="mine", seed=11))
            (accepted,) = heard.accepted
            assert (accepted.request_id, accepted.prompt_tokens, accepted.seed) == ("mine", 3, 11)
            assert heard.tokens == {0: tokens(PROMPT, 40)}
            assert heard.texts == {0: decoded(folder, tokens(PROMPT, 40))}
            finished = heard.finished[0]
            assert finished.finish_reason == public.FINISH_REASON_LENGTH
            assert finished.WhichOneof("stop_reason") is None
            usage = finished.usage
            assert (usage.prompt_tokens, usage.cached_tokens, usage.output_tokens) == (3, 2, 40)
            assert [(page.device_id, page.block_id) for page in usage.pages] == [(0, 10), (0, 11), (0, 12)]

    run(body())


def test_what_a_shard_gets(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            await hear(it.generate(PROMPT, max_tokens=4, request_id="mine", temperature=0, top_k=9, cache_salt="s"))
            (submit,) = it.shards[0].of(Kind.SUBMIT)
            assert (submit.request_id, submit.owner, ints(submit.prompt)) == ("mine", "", PROMPT)
            assert ints(submit.eos_token_ids) == [0] and not submit.samples
            params = decode_params(submit.params)
            assert (params.temperature, params.top_k, params.max_tokens, params.n) == (0.0, 9, 4, 1)
            assert params.seed is not None
            assert len(submit.cache_salt) == 64 and "s" not in submit.cache_salt
            (place,) = it.scheduler.places
            assert (ints(place.prompt), place.samples, place.max_tokens) == (PROMPT, 1, 4)
            assert place.cache_salt == submit.cache_salt

    run(body())


def test_left_out_fields_have_their_defaults_and_set_ones_count(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            request = public.GenerateRequest(text="Once upon", sampling=public.SamplingParams(top_p=0.5))
            call = it.inference.Generate(request, timeout=SOON)
            await call.read()
            params = decode_params(it.shards[0].of(Kind.SUBMIT)[0].params)
            prompt = ints(it.shards[0].of(Kind.SUBMIT)[0].prompt)
            call.cancel()
            assert (params.top_p, params.temperature, params.n) == (0.5, 1.0, 1)
            assert params.max_tokens == 4096 - len(prompt)
            assert decoded(folder, prompt) == "Once upon"

    run(body())


def test_samples_come_interleaved_and_each_ends_once(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            heard = await hear(it.generate(PROMPT, n=3, max_tokens=9))
            assert heard.tokens == {index: tokens(PROMPT, 9, index) for index in range(3)}
            assert sorted(heard.finished) == [0, 1, 2]

    run(body())


def test_logprobs_stand_beside_their_tokens(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            heard = await hear(it.generate(PROMPT, logprobs=1, max_tokens=5))
            assert [each.logprob for each in heard.logprobs] == [-1.0, -2.0, -3.0, -4.0, -5.0]
            assert [(top.token_id, top.logprob) for top in heard.logprobs[0].top] == [(7, -0.5)]

    run(body())


def test_a_stop_string_ends_the_sample_on_its_shard_too(folder: Path, run: Run) -> None:
    async def body() -> None:
        whole = decoded(folder, tokens(PROMPT, 30))
        stop = whole[12:15]
        async with lab(folder, [FakeShard(0)]) as it:
            shard = it.shards[0]
            call = it.generate(PROMPT, stop=[stop], max_tokens=200)
            await until(lambda: shard.runs)
            shard.step(60)  # in one go: the front's Finish comes long after the shard has gone on
            heard = await hear(call)
            assert heard.texts[0] == whole[: whole.index(stop)]
            assert heard.finished[0].stop_string == stop
            assert heard.finished[0].finish_reason == public.FINISH_REASON_STOP
            count = len(heard.tokens[0])
            assert heard.tokens[0] == tokens(PROMPT, count)
            assert stop in decoded(folder, heard.tokens[0]) and stop not in decoded(folder, heard.tokens[0][:-1])
            (finish,) = shard.of(Kind.FINISH)
            assert (finish.sample, finish.stop_reason) == (0, stop)
            assert heard.finished[0].usage.output_tokens == count
            assert not shard.runs and not shard.of(Kind.CANCEL)

    run(body())


def test_what_a_slow_reader_missed_comes_in_one_message() -> None:
    """The law of coalescing, without a network: all tokens since the last write go in one delta."""

    class Context:
        def __init__(self) -> None:
            self.messages: list[Any] = []

        async def write(self, message: Any) -> None:
            self.messages.append(message)

    async def body() -> None:
        request = Request("r", (1,), SamplingParams(max_tokens=5, seed=1))
        meter = Meter(CollectorRegistry(), "m")
        stream = Stream(
            request, "", None, public.GenerateResponse, meter, arrived=0.0, max_unsent=1 << 20, write_seconds=1.0
        )
        context: Any = Context()
        for token in (11, 12, 13):
            assert stream.push(pb.Delta(token=token), 0.0) is None
        serving = asyncio.create_task(stream.serve(context))
        await asyncio.sleep(0)
        assert [each.WhichOneof("event") for each in context.messages] == ["accepted", "delta"]
        assert list(context.messages[1].delta.token_ids) == [11, 12, 13]
        stream.push(pb.Delta(token=14), 0.0)
        stream.push(pb.Delta(token=15, finish=pb.FINISH_REASON_LENGTH), 0.0)
        await serving
        assert list(context.messages[2].delta.token_ids) == [14, 15]
        assert context.messages[3].finished.usage.output_tokens == 5
        assert len(context.messages) == 4

    asyncio.run(body())


def test_a_burst_of_frames_becomes_few_messages(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            call = it.generate(PROMPT, max_tokens=1000)
            await until(lambda: it.shards[0].runs)
            it.shards[0].step(1000)
            heard = await hear(call)
            assert heard.tokens[0] == tokens(PROMPT, 1000)
            assert heard.num_deltas < 500

    run(body())


def test_large_prompts_and_answers_pass(folder: Path, run: Run) -> None:
    async def body() -> None:
        count = 2_000_000  # 8 MB, beyond grpc's own limit of 4
        async with lab(folder, [FakeShard(0, max_model_len=count + 8, num_blocks=count, pace=0.01)]) as it:
            heard = await hear(it.generate([3] * count, max_tokens=2))
            assert heard.accepted[0].prompt_tokens == count
            assert len(heard.finished[0].usage.pages) == count // 16 + 1

    run(body())


# Ends from outside


def test_a_client_that_leaves_frees_its_pages(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            shard = it.shards[0]
            for steps in (0, 1, 5):
                call = it.generate(PROMPT, max_tokens=1000)
                await until(lambda: shard.runs)
                shard.step(steps)
                for _ in range(1 + (steps > 0)):
                    await call.read()
                call.cancel()
                await until(lambda: not shard.runs)
            assert len(shard.of(Kind.CANCEL)) == 3

    run(body())


def test_a_deadline_ends_a_request_wherever_it_is(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            assert (await refusal(it.generate(PROMPT, timeout=0.2))).code == "DEADLINE_EXCEEDED"
            await until(lambda: it.shards[0].of(Kind.CANCEL))
            it.scheduler.silent = True
            assert (await refusal(it.generate(PROMPT, timeout=0.2))).code == "DEADLINE_EXCEEDED"
            assert (await refusal(it.generate(PROMPT, timeout=0))).code == "DEADLINE_EXCEEDED"
            assert len(it.shards[0].of(Kind.SUBMIT)) == 1

    run(body())


def test_cancel_generation_finishes_what_runs(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            call = it.generate(PROMPT, n=2, max_tokens=50, request_id="mine")
            await until(lambda: it.shards[0].runs)
            it.shards[0].step(3)
            await it.inference.CancelGeneration(public.CancelGenerationRequest(request_id="mine"))
            heard = await hear(call)
            assert {each.finish_reason for each in heard.finished.values()} == {public.FINISH_REASON_CANCELLED}
            assert heard.tokens == {0: tokens(PROMPT, 3), 1: tokens(PROMPT, 3, 1)}
            assert heard.finished[0].usage.pages
            again = it.inference.CancelGeneration(public.CancelGenerationRequest(request_id="mine"))
            assert (await refusal(again)).code == "NOT_FOUND"

    run(body())


def test_cancel_generation_reaches_a_request_without_a_place(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            it.scheduler.silent = True
            call = it.generate(PROMPT, request_id="mine")
            await until(lambda: it.scheduler.places)
            await it.inference.CancelGeneration(public.CancelGenerationRequest(request_id="mine"))
            it.scheduler.silent = False
            await it.scheduler.stop()
            await it.scheduler.start(int(it.scheduler.address.rpartition(":")[2]))
            heard = await hear(call)
            assert heard.finished[0].finish_reason == public.FINISH_REASON_CANCELLED
            assert not it.shards[0].of(Kind.SUBMIT)

    run(body())


def test_a_request_id_is_taken_while_it_is_in_flight(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            first = it.generate(PROMPT, max_tokens=4, request_id="mine")
            await until(lambda: it.shards[0].runs)
            found = await refusal(it.generate(PROMPT, request_id="mine"))
            assert (found.code, found.reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
            it.shards[0].step(4)
            assert (await hear(first)).tokens[0] == tokens(PROMPT, 4)
            second = it.generate(PROMPT, max_tokens=1, request_id="mine")
            await until(lambda: it.shards[0].runs)
            it.shards[0].step()
            assert (await hear(second)).tokens[0] == tokens(PROMPT, 1)

    run(body())


async def flood(shard: FakeShard) -> None:
    """Frames faster than anybody reads."""
    while True:
        shard.step(50)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("limits", [{"write_seconds": 0.5}, {"max_unsent_bytes": 1 << 16}])
def test_a_client_that_does_not_read_is_cancelled(folder: Path, run: Run, limits: dict[str, Any]) -> None:
    async def body() -> None:
        shard = FakeShard(0, max_model_len=1 << 20, num_blocks=1 << 16)
        async with lab(folder, [shard], **limits) as it:
            call = it.generate(PROMPT, timeout=None, logprobs=1, max_tokens=1_000_000)
            await until(lambda: shard.runs)
            flooding = asyncio.create_task(flood(shard))
            await until(lambda: shard.of(Kind.CANCEL), 60)
            assert not shard.runs
            flooding.cancel()
            found = await refusal(call)  # it reads at last
            assert found.code == "CANCELLED"
            assert "read each message as it comes" in found.message

    run(body())


# Deaths


def two(pace: float | None = None) -> list[FakeShard]:
    return [FakeShard(0, pace=pace), FakeShard(1, epoch=9, pace=pace)]


def test_a_stream_goes_on_elsewhere_without_a_gap(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, n=2, max_tokens=12, request_id="mine", cache_salt="s")
            await until(lambda: one.runs)
            one.step(5)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[1].outputs) == 5)
            await one.die()
            await until(lambda: other.runs)
            (before,), (after,) = one.of(Kind.SUBMIT), other.of(Kind.SUBMIT)
            assert [(each.sample, ints(each.outputs)) for each in after.samples] == [
                (0, tokens(PROMPT, 5)),
                (1, tokens(PROMPT, 5, 1)),
            ]
            assert after.params == before.params and after.prompt == before.prompt
            assert after.cache_salt == before.cache_salt and after.request_id == "mine"
            assert it.scheduler.places[-1].exclude == [0]
            assert [(each.shard_id, each.epoch) for each in it.scheduler.reports] == [(0, 1)]
            other.step(7)
            heard = await hear(call)
            assert heard.tokens == {0: tokens(PROMPT, 12), 1: tokens(PROMPT, 12, 1)}
            assert heard.texts[0] == decoded(folder, tokens(PROMPT, 12))
            assert len(heard.accepted) == 1 and len(heard.finished) == 2

    run(body())


def test_only_what_is_unfinished_moves(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, n=2, max_tokens=6)
            await until(lambda: one.runs)
            (handle,) = one.runs
            one.step(2)
            one.say(pb.Delta(handle=handle, sample=0, finish=pb.FINISH_REASON_STOP, stop_token=77))
            one.runs[handle].outputs.pop(0)
            one.step(1)
            await asyncio.sleep(0.05)
            await one.die()
            await until(lambda: other.runs)
            (after,) = other.of(Kind.SUBMIT)
            assert [(each.sample, ints(each.outputs)) for each in after.samples] == [(1, tokens(PROMPT, 3, 1))]
            other.step(3)
            heard = await hear(call)
            assert heard.tokens == {0: tokens(PROMPT, 2), 1: tokens(PROMPT, 6, 1)}
            assert heard.finished[0].stop_token_id == 77

    run(body())


def test_a_shard_that_is_declared_dead_is_not_listened_to(folder: Path, run: Run) -> None:
    """It was frozen and fenced: what it says when it wakes, on the same socket, changes nothing."""

    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, max_tokens=6, request_id="mine")
            await until(lambda: one.runs)
            one.step(2)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 2)
            it.scheduler.set(one, pb.CONDITION_DEAD)
            await until(lambda: other.runs)
            one.step(3)
            other.step(4)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 6)

    run(body())


def test_what_a_shard_said_before_it_died_counts_though_the_scheduler_was_quicker(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, max_tokens=6)
            await until(lambda: one.runs)
            one.step(2)
            it.scheduler.set(one, pb.CONDITION_DEAD)
            await until(lambda: it.server.dispatcher.shards._shards[0].is_over)
            one.step(2)
            await one.die()
            await until(lambda: other.runs)
            assert [ints(each.submit.samples[0].outputs) for each in other.runs.values()] == [tokens(PROMPT, 4)]
            other.step(2)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 6)

    run(body())


def test_frames_of_another_epoch_change_nothing(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0, epoch=5)]) as it:
            (shard,) = it.shards
            call = it.generate(PROMPT, max_tokens=2)
            await until(lambda: shard.runs)
            (handle,) = shard.runs
            shard.say(pb.Delta(handle=handle, token=400), epoch=4)
            shard.say(pb.Delta(handle=handle + 1000, token=400))
            shard.step(2)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 2)

    run(body())


def test_a_restarted_shard_takes_its_own_requests_up_again(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (one,) = it.shards
            call = it.generate(PROMPT, max_tokens=6)
            await until(lambda: one.runs)
            one.step(2)
            await call.read(), await call.read()
            await one.die()
            again = FakeShard(0, epoch=2)
            await again.start()
            it.scheduler.set(again, pb.CONDITION_READY)
            await until(lambda: again.runs)
            again.step(6)
            left = await asyncio.wait_for(_rest(call), SOON)
            assert left == tokens(PROMPT, 6)[-len(left) :]
            await again.die()

    run(body())


async def _rest(call: Any) -> list[int]:
    """The tokens that are still to come of a call that was begun with `read`."""
    found: list[int] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        found += message.delta.token_ids
    return found


def test_a_dead_shard_ends_what_its_stop_string_had_ended(folder: Path, run: Run) -> None:
    async def body() -> None:
        stop = decoded(folder, tokens(PROMPT, 30))[12:15]
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, stop=[stop], max_tokens=200)
            await until(lambda: one.runs)
            one.runs[next(iter(one.runs))].submit.handle = 0
            one._take = lambda *_: None  # type: ignore[method-assign]  # it never hears of the Finish
            one.step(60)
            await asyncio.sleep(0.1)
            await one.die()
            heard = await hear(call)
            assert heard.finished[0].stop_string == stop
            assert not other.of(Kind.SUBMIT)

    run(body())


def test_a_dead_shard_ends_what_was_cancelled(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, max_tokens=200, request_id="mine")
            await until(lambda: one.runs)
            one._take = lambda *_: None  # type: ignore[method-assign]
            await it.inference.CancelGeneration(public.CancelGenerationRequest(request_id="mine"))
            await one.die()
            assert (await hear(call)).finished[0].finish_reason == public.FINISH_REASON_CANCELLED
            assert not other.of(Kind.SUBMIT)

    run(body())


def test_prompt_logprobs_are_not_told_twice(folder: Path, run: Run) -> None:
    async def body() -> None:
        def scores(*values: float) -> list[pb.Logprobs]:
            return [pb.Logprobs(logprob=value, rank=1) for value in values]

        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate([5, 6, 7, 8], prompt_logprobs=0, max_tokens=1, request_id="mine")
            await until(lambda: one.runs)
            one.say(pb.Delta(handle=next(iter(one.runs)), scores=scores(-1, -2)))
            await until(lambda: it.server.front._streams[("", "mine")]._num_scores == 2)
            await one.die()
            await until(lambda: other.runs)
            assert not other.of(Kind.SUBMIT)[0].samples  # it starts over
            other.say(pb.Delta(handle=next(iter(other.runs)), scores=scores(-1, -2, -3)))
            other.step()
            assert [each.logprob for each in (await hear(call)).scores] == [-1.0, -2.0, -3.0]

    run(body())


def test_what_kills_shards_fails_and_those_beside_it_go_on(folder: Path, run: Run) -> None:
    def is_poison(run: Any) -> bool:
        return bool(run.prompt == [13])

    async def body() -> None:
        shards = [FakeShard(index, pace=0.005, kills=is_poison) for index in range(3)]
        async with lab(folder, shards) as it:
            beside = [it.generate([20, index], max_tokens=300) for index in range(4)]
            for call in beside:
                await call.read(), await call.read()
            found = await refusal(it.generate([13], max_tokens=5))
            assert (found.code, found.reason) == ("INTERNAL", "REQUEST_FAILED")
            assert found.message.startswith("poison: 2 shards died")
            for index, call in enumerate(beside):
                left = await asyncio.wait_for(_rest(call), SOON)
                assert left == tokens([20, index], 300)[-len(left) :]
            assert [len([s for s in shard.of(Kind.SUBMIT) if ints(s.prompt) == [13]]) for shard in shards] == [1, 1, 0]

    run(body())


def test_what_kills_in_the_middle_of_its_outputs_fails_and_those_beside_it_go_on(folder: Path, run: Run) -> None:
    """The last token before its death was on its way: it is taken up one step before the one that kills."""

    def is_poison(run: Any) -> bool:
        taken_up = ints(run.submit.samples[0].outputs) if run.submit.samples else []
        return bool(run.prompt == [13] and len(run.outputs[0]) > max(3, len(taken_up)))

    async def body() -> None:
        shards = [FakeShard(index, pace=0.005, kills=is_poison) for index in range(3)]
        async with lab(folder, shards) as it:
            beside = [it.generate([20, index], max_tokens=300) for index in range(4)]
            for call in beside:
                await call.read(), await call.read()
            poison = it.generate([13], max_tokens=50)
            with pytest.raises(grpc.aio.AioRpcError, match="poison: 2 shards died"):
                await _rest(poison)
            for index, call in enumerate(beside):
                left = await asyncio.wait_for(_rest(call), SOON)
                assert left == tokens([20, index], 300)[-len(left) :]
            assert [len([s for s in shard.of(Kind.SUBMIT) if ints(s.prompt) == [13]]) for shard in shards] == [1, 1, 0]

    run(body())


def test_a_shard_that_was_dead_already_counts_no_death(folder: Path, run: Run) -> None:
    """Both shards die at once: the request moves from the first to the second, of whose death the front hears later."""

    async def body() -> None:
        shards = [FakeShard(index) for index in range(3)]
        async with lab(folder, shards) as it:
            one, two, three = shards
            call = it.generate(PROMPT, max_tokens=6)
            await until(lambda: one.runs)
            one.step(2)
            await call.read(), await call.read()
            two.deaf = True
            await one.die()
            stream = next(iter(it.server.front._streams.values()))
            await until(lambda: stream.placed is not None and stream.placed.link.info.shard_id == 1)
            assert stream.deaths == 1
            await two.die()
            await until(lambda: three.runs)
            assert stream.deaths == 1
            three.step(6)
            left = await asyncio.wait_for(_rest(call), SOON)
            assert left == tokens(PROMPT, 6)[-len(left) :]

    run(body())


def test_among_many_streams_tokens_gather_but_first_ones_and_ends_do_not_wait(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PACED_STREAMS", 1), ("PACE_SECONDS", 1e6), ("MAX_PACE_SECONDS", 1e6)):
        monkeypatch.setattr(f"cluster.front.{name}", value)

    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            call = it.generate(PROMPT, max_tokens=6)
            await until(lambda: shard.runs)
            assert (await call.read()).WhichOneof("event") == "accepted"
            shard.step()
            assert list((await call.read()).delta.token_ids) == tokens(PROMPT, 6)[:1]
            shard.step(3)
            stream = next(iter(it.server.front._streams.values()))
            await until(lambda: len(stream.samples[0].outputs) == 4)
            assert stream.samples[0].sent == 1
            shard.step(2)
            assert list((await call.read()).delta.token_ids) == tokens(PROMPT, 6)[1:]
            assert (await call.read()).WhichOneof("event") == "finished"

    run(body())


def test_what_waited_in_a_shard_that_died_is_not_blamed(folder: Path, run: Run) -> None:
    async def body() -> None:
        shards = [FakeShard(index) for index in range(5)]
        async with lab(folder, shards) as it:
            for shard in shards[:4]:
                shard.deaf = True  # its steps never come to the request
            call = it.generate(PROMPT, max_tokens=3)
            for index, shard in enumerate(shards[:4]):
                await until(
                    lambda index=index: any(
                        stream.placed is not None and stream.placed.link.info.shard_id == index
                        for stream in it.server.front._streams.values()
                    )
                )
                await shard.die()
            await until(lambda: shards[4].runs)
            shards[4].step(3)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 3)

    run(body())


def test_one_request_that_fails_leaves_the_others(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            bad, good = it.generate(PROMPT, n=2, max_tokens=9), it.generate([8, 9], max_tokens=3)
            await until(lambda: len(shard.runs) == 2)
            handle = next(h for h, run in shard.runs.items() if run.prompt == PROMPT)
            shard.say(pb.Delta(handle=handle, sample=1, finish=pb.FINISH_REASON_ERROR, failure="its logits were NaN"))
            found = await refusal(bad)
            assert (found.code, found.message) == ("INTERNAL", "its logits were NaN")
            await until(lambda: handle not in shard.runs)  # its other sample was cancelled
            shard.step(3)
            assert (await hear(good)).tokens[0] == tokens([8, 9], 3)

    run(body())


# Placing


def test_a_full_shard_passes_a_request_on(folder: Path, run: Run) -> None:
    async def body() -> None:
        one = FakeShard(0, refuse={Kind.SUBMIT: "RESOURCE_EXHAUSTED"})
        other = FakeShard(1, pace=0.002)
        async with lab(folder, [one, other]) as it:
            assert (await hear(it.generate(PROMPT))).tokens[0] == tokens(PROMPT, 8)
            assert [list(place.exclude) for place in it.scheduler.places] == [[], [0]]
            other.refuse[Kind.SUBMIT] = "RESOURCE_EXHAUSTED"
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.message, found.has_retry) == ("RESOURCE_EXHAUSTED", "the fake refuses", True)

    run(body())


def test_a_stream_that_lost_its_shard_waits_for_a_seat(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            call = it.generate(PROMPT, max_tokens=6, request_id="mine")
            await until(lambda: one.runs)
            one.step(2)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 2)
            other.refuse[Kind.SUBMIT] = "RESOURCE_EXHAUSTED"
            await one.die()
            await until(lambda: len(other.of(Kind.SUBMIT)) == 3)
            other.refuse.clear()
            await until(lambda: other.runs)
            other.step(4)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 6)

    run(body())


def test_what_a_shard_refuses_for_good_is_the_clients(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0, refuse={Kind.SUBMIT: "INVALID_ARGUMENT"})]) as it:
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.message) == ("INVALID_ARGUMENT", "the fake refuses")
            assert len(it.scheduler.places) == 1

    run(body())


def test_without_a_shard_requests_wait_then_are_told_to_come_back(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, place_seconds=0.5) as it:
            (shard,) = it.shards
            it.scheduler.set(shard, pb.CONDITION_DEAD)
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.has_retry) == ("UNAVAILABLE", True)
            it.scheduler.states.clear()
            call = it.generate(PROMPT, max_tokens=3)
            await asyncio.sleep(0.1)
            again = FakeShard(0, epoch=2, pace=0.002)
            await again.start()
            it.scheduler.set(again, pb.CONDITION_READY)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 3)
            await again.die()

    run(body())


def test_a_dead_scheduler_stops_nothing_that_runs(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            call = it.generate(PROMPT, max_tokens=10)
            await until(lambda: shard.runs)
            shard.step(4)
            await it.scheduler.stop()
            shard.step(6)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 10)
            waiting = it.generate(PROMPT, max_tokens=2)
            await asyncio.sleep(0.1)
            fresh = FakeScheduler([])  # it has not heard of any shard yet
            await fresh.start(int(it.scheduler.address.rpartition(":")[2]))
            await until(lambda: fresh.places)
            assert len(it.server.dispatcher.shards.links) == 1
            fresh.set(shard, pb.CONDITION_READY)
            await until(lambda: shard.runs)
            shard.step(2)
            assert (await hear(waiting)).tokens[0] == tokens(PROMPT, 2)
            await fresh.stop()

    run(body())


def test_an_unreachable_scheduler_is_unavailable(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, place_seconds=0.4) as it:
            await it.scheduler.stop()
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.has_retry) == ("UNAVAILABLE", True)

    run(body())


def test_more_requests_than_allowed_are_told_to_come_back(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)], max_requests=2) as it:
            (shard,) = it.shards
            calls = [it.generate(PROMPT, max_tokens=1) for _ in range(2)]
            await until(lambda: len(shard.runs) == 2)
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.reason, found.has_retry) == ("RESOURCE_EXHAUSTED", "OVERLOADED", True)
            shard.step()
            for call in calls:
                assert (await hear(call)).tokens[0] == tokens(PROMPT, 1)

    run(body())


# Forks


def test_a_fork_begins_with_its_parents_outputs(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            parent = it.generate(PROMPT, max_tokens=10, request_id="mine", logprobs=1, temperature=0.5, cache_salt="s")
            await until(lambda: shard.runs)
            shard.step(4)
            for _ in range(2):
                await parent.read()
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 4)
            child = it.fork("mine", request_id="fork", max_tokens=7, top_k=3)
            await until(lambda: shard.of(Kind.FORK))
            (fork,), (submit,) = shard.of(Kind.FORK), shard.of(Kind.SUBMIT)
            assert (fork.parent_handle, fork.parent_sample, fork.num_outputs) == (submit.handle, 0, 4)
            assert fork.handle != fork.parent_handle and fork.request.request_id == "fork"
            assert fork.request.prompt == submit.prompt and fork.request.cache_salt == submit.cache_salt
            assert not fork.request.samples
            params, own = decode_params(submit.params), decode_params(fork.request.params)
            assert (own.temperature, own.top_k, own.max_tokens, own.n) == (0.5, 3, 7, 1)
            assert own.seed != params.seed
            shard.step(6)
            heard = await hear(child)
            assert heard.tokens[0] == tokens(PROMPT, 7)
            assert heard.texts[0] == decoded(folder, tokens(PROMPT, 7))
            assert [each.logprob for each in heard.logprobs] == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
            assert heard.accepted[0].request_id == "fork"

    run(body())


def test_a_fork_whose_parent_has_just_ended_starts_from_the_outputs(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0, refuse={Kind.FORK: "NOT_FOUND"})]) as it:
            (shard,) = it.shards
            parent = it.generate(PROMPT, max_tokens=10, request_id="mine")
            await until(lambda: shard.runs)
            shard.step(4)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 4)
            child = it.fork("mine", max_tokens=6)
            await until(lambda: len(shard.of(Kind.SUBMIT)) == 2)
            assert [(each.sample, ints(each.outputs)) for each in shard.of(Kind.SUBMIT)[1].samples] == [
                (0, tokens(PROMPT, 4))
            ]
            shard.step(2)
            assert (await hear(child)).tokens[0] == tokens(PROMPT, 6)
            parent.cancel()

    run(body())


def test_a_fork_outlives_its_parents_shard(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, two()) as it:
            one, other = it.shards
            parent = it.generate(PROMPT, max_tokens=10, request_id="mine")
            await until(lambda: one.runs)
            one.step(4)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 4)
            it.scheduler.silent = True  # the parent finds no new place
            await one.die()
            await until(lambda: it.server.front._streams[("", "mine")].placed is None)
            child = it.fork("mine", max_tokens=6)
            await asyncio.sleep(0.05)
            it.scheduler.silent = False
            await it.scheduler.stop()
            await it.scheduler.start(int(it.scheduler.address.rpartition(":")[2]))
            await until(lambda: len(other.runs) >= 1)
            for _ in range(100):
                other.step()
                await asyncio.sleep(0.01)
                if len(other.of(Kind.SUBMIT)) == 2 and not other.runs:
                    break
            assert (await hear(child)).tokens[0] == tokens(PROMPT, 6)
            assert (await hear(parent)).tokens[0] == tokens(PROMPT, 10)
            assert not one.of(Kind.FORK) and not other.of(Kind.FORK)

    run(body())


def test_what_can_not_be_forked(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            parent = it.generate(PROMPT, n=2, max_tokens=10, request_id="mine")
            await until(lambda: shard.runs)
            shard.step(4)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[1].outputs) == 4)
            rows: list[tuple[Any, str, list[str]]] = [
                (it.fork("other"), "NOT_FOUND", []),
                (it.fork("mine", index=2), "NOT_FOUND", []),
                (it.fork("mine", n=2), "INVALID_ARGUMENT", ["sampling.n"]),
                (it.fork("mine", logprobs=1), "INVALID_ARGUMENT", ["sampling.logprobs"]),
                (it.fork("mine", prompt_logprobs=1), "INVALID_ARGUMENT", ["sampling.prompt_logprobs"]),
                (it.fork("mine", max_tokens=4), "INVALID_ARGUMENT", ["sampling.max_tokens"]),
                (it.fork("mine", temperature=-1.0), "INVALID_ARGUMENT", ["sampling.temperature"]),
                (it.fork("mine", request_id="mine"), "ALREADY_EXISTS", []),
            ]
            for call, code, fields in rows:
                found = await refusal(call)
                assert (found.code, found.fields) == (code, fields), found.message
            assert not shard.of(Kind.FORK)
            parent.cancel()

    run(body())


def test_a_fork_that_has_its_stop_string_already_is_finished(folder: Path, run: Run) -> None:
    async def body() -> None:
        whole = decoded(folder, tokens(PROMPT, 20))
        stop = whole[6:9]
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            parent = it.generate(PROMPT, max_tokens=30, request_id="mine")
            await until(lambda: shard.runs)
            shard.step(20)
            await until(lambda: len(it.server.front._streams[("", "mine")].samples[0].outputs) == 20)
            heard = await hear(it.fork("mine", stop=[stop]))
            assert heard.finished[0].stop_string == stop
            assert heard.texts[0] == whole[: whole.index(stop)]
            assert not shard.of(Kind.FORK)
            parent.cancel()

    run(body())


# The other calls


def test_text_calls(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            ids = (await it.inference.Tokenize(public.TokenizeRequest(text="a page"))).token_ids
            assert (await it.inference.Detokenize(public.DetokenizeRequest(token_ids=ids))).text == "a page"
            chat = public.Chat(messages=[public.ChatMessage(role="user", content="Why?")])
            told = (await it.inference.Tokenize(public.TokenizeRequest(chat=chat))).token_ids
            text = (
                await it.inference.Detokenize(public.DetokenizeRequest(token_ids=told, skip_special_tokens=False))
            ).text
            assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            (model,) = (await it.inference.ListModels(public.ListModelsRequest())).models
            assert (model.name, model.max_model_len, model.vocab_size) == ("fake", 4096, 502)
            assert model.has_tokenizer and model.has_chat_template

    run(body())


def test_seeds_go_by_arrival_where_one_is_configured(folder: Path, run: Run) -> None:
    from launch.llm import _seed

    async def body() -> None:
        async with lab(folder, seed=7) as it:
            seeds = [(await hear(it.generate(PROMPT, max_tokens=1))).accepted[0].seed for _ in range(2)]
            assert seeds == [_seed(7, 1), _seed(7, 2)]

    run(body())


def test_pages_and_loads_are_the_schedulers_answers(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            pages = memory_pb2.GetPageMapResponse(devices=[memory_pb2.Device(device_id=4)])
            loads = cluster_pb2.GetLoadsResponse(loads=[cluster_pb2.Load(shard_id=1, cached_tokens=5)])
            it.scheduler.answers = {"page_map": pages.SerializeToString(), "loads": loads.SerializeToString()}
            assert await it.memory.GetPageMap(memory_pb2.GetPageMapRequest()) == pages
            assert await it.cluster.GetLoads(cluster_pb2.GetLoadsRequest()) == loads
            await it.memory.GetSequencePages(memory_pb2.GetSequencePagesRequest(request_id="r"))
            assert it.scheduler.queries[-1].sequence_pages == "r" and it.scheduler.queries[-1].owner == ""

    run(body())


def test_health_and_drain(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            (shard,) = it.shards
            await _await_health(it, "SERVING")
            assert await it.health_status("quire.inference.v1.InferenceService") == "SERVING"
            it.scheduler.set(shard, pb.CONDITION_DRAINING)
            await _await_health(it, "NOT_SERVING")
            it.scheduler.set(shard, pb.CONDITION_READY)
            await _await_health(it, "SERVING")
            call = it.generate(PROMPT, max_tokens=5)
            await until(lambda: shard.runs)
            draining = asyncio.create_task(it.server.drain(SOON))
            await _await_health(it, "NOT_SERVING")
            found = await refusal(it.generate(PROMPT))
            assert (found.code, found.has_retry) == ("UNAVAILABLE", True)
            assert not draining.done()
            shard.step(5)
            assert (await hear(call)).tokens[0] == tokens(PROMPT, 5)
            assert await draining is True

    run(body())


async def _await_health(it: Lab, status: str) -> None:
    async with asyncio.timeout(SOON):
        while await it.health_status() != status:
            await asyncio.sleep(0.01)


def test_a_drain_gives_up_in_the_end(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder, [FakeShard(0)]) as it:
            call = it.generate(PROMPT, max_tokens=5)
            await until(lambda: it.shards[0].runs)
            assert await it.server.drain(0.1) is False
            await it.server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await hear(call)
            assert to_refusal(ended.value).code in ("UNAVAILABLE", "CANCELLED")

    run(body())


def test_the_process_says_where_it_listens_and_drains_when_cancelled(folder: Path, run: Run) -> None:
    async def body() -> None:
        lines: list[dict[str, Any]] = []
        scheduler = FakeScheduler([])
        await scheduler.start()
        settings = {
            "host": "127.0.0.1",
            "port": 0,
            "metrics_port": 0,
            "scheduler": scheduler.address,
            "secret": SECRET.hex(),
            "folder": str(folder),
            "model": "fake",
            "api_keys": None,
            "tls": None,
            "limits": {},
        }
        task = asyncio.create_task(main(settings, lambda **line: lines.append(line)))
        await until(lambda: lines)
        assert sorted(lines[0]["ready"]) == ["metrics_port", "port"]
        task.cancel()
        assert await task == 0
        assert lines[1:] == [{"draining": {"seconds": 30.0}}]
        await scheduler.stop()

    run(body())


def test_only_public_services_are_served(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            stub = reflection_pb2_grpc.ServerReflectionStub(it.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            async for answer in call:
                names = {each.name for each in answer.list_services_response.service}
            assert names == {
                "quire.inference.v1.InferenceService",
                "quire.memory.v1.MemoryService",
                "quire.cluster.v1.ClusterService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }

    run(body())


# Tenants


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """(keys file, tenant -> key)."""
    made = {tenant: new_key(tenant) for tenant in ("anna", "ben")}
    path = tmp_path / "keys"
    path.write_text("# ours\n\n" + "".join(f"{line}\n" for _, line in made.values()))
    path.chmod(0o600)
    return str(path), {tenant: key for tenant, (key, _) in made.items()}


def _as(it: Lab, key: str) -> Lab:
    it.metadata = (("authorization", f"Bearer {key}"),)
    return it


def test_who_has_no_key_is_not_served(folder: Path, run: Run, keys: tuple[str, dict[str, str]]) -> None:
    async def body() -> None:
        path, known = keys
        async with lab(folder, api_keys=path) as it:
            good = f"Bearer {known['anna']}"
            rows: list[tuple[tuple[str, str], ...]] = [
                (),
                (("authorization", known["anna"]),),
                (("authorization", "Bearer nobody"),),
                (("authorization", good + "x"),),
                (("authorization", "Bearer " + "x" * 5000),),
                (("authorization", good), ("authorization", good)),
                (("x-api-key", known["anna"]),),
            ]
            for metadata in rows:
                it.metadata = metadata
                found = await refusal(it.generate(PROMPT))
                assert (found.code, found.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
                assert known["anna"] not in found.message
                call = it.inference.ListModels(public.ListModelsRequest(), metadata=metadata)
                assert (await refusal(call)).code == "UNAUTHENTICATED"
            assert not it.scheduler.places
            await _await_health(it, "SERVING")  # health is everybody's
            heard = await hear(_as(it, known["anna"]).generate(PROMPT))
            assert heard.tokens[0] == tokens(PROMPT, 8)

    run(body())


def test_tenants_share_no_pages_and_see_no_requests(folder: Path, run: Run, keys: tuple[str, dict[str, str]]) -> None:
    async def body() -> None:
        path, known = keys
        async with lab(folder, [FakeShard(0)], api_keys=path) as it:
            (shard,) = it.shards
            calls = [
                _as(it, known[tenant]).generate(PROMPT, request_id="r", cache_salt=salt)
                if salt
                else _as(it, known[tenant]).generate(PROMPT, request_id=name)
                for tenant, name, salt in (
                    ("anna", "r1", ""),
                    ("ben", "r1", ""),
                    ("anna", "r2", ""),
                    ("anna", "", "s"),
                    ("ben", "", "s"),
                )
            ]
            await until(lambda: len(shard.runs) == 5)
            salts = [submit.cache_salt for submit in shard.of(Kind.SUBMIT)]
            owners = [submit.owner for submit in shard.of(Kind.SUBMIT)]
            by_owner = {
                owner: {s for s, o in zip(salts, owners, strict=True) if o == owner} for owner in ("anna", "ben")
            }
            assert all(salts) and len(set(salts)) == 4
            assert {owner: len(found) for owner, found in by_owner.items()} == {"anna": 2, "ben": 2}
            assert not by_owner["anna"] & by_owner["ben"]

            _as(it, known["ben"])
            cancel = public.CancelGenerationRequest(request_id="r2")
            unknown = public.CancelGenerationRequest(request_id="rX")
            theirs = await refusal(it.inference.CancelGeneration(cancel, metadata=it.metadata))
            nobodys = await refusal(it.inference.CancelGeneration(unknown, metadata=it.metadata))
            assert theirs.code == nobodys.code == "NOT_FOUND"
            assert theirs.message.replace("r2", "rX") == nobodys.message
            assert (await refusal(it.fork("r2"))).code == "NOT_FOUND"
            await it.memory.GetPageMap(memory_pb2.GetPageMapRequest(), metadata=it.metadata)
            assert it.scheduler.queries[-1].owner == "ben"
            request = memory_pb2.GetSequencePagesRequest(request_id="r2")
            await it.memory.GetSequencePages(request, metadata=it.metadata)
            assert it.scheduler.queries[-1].owner == "ben"
            loads = cluster_pb2.GetLoadsResponse(loads=[cluster_pb2.Load(shard_id=1, cached_tokens=5, running=2)])
            it.scheduler.answers["loads"] = loads.SerializeToString()
            (told,) = (await it.cluster.GetLoads(cluster_pb2.GetLoadsRequest(), metadata=it.metadata)).loads
            assert (told.cached_tokens, told.running) == (0, 2)
            shard.step(8)
            for call in calls:
                assert (await hear(call)).tokens[0] == tokens(PROMPT, 8)

    run(body())


# Listeners


def _config(folder: Path, **settings: Any) -> FrontConfig:
    base = {"scheduler": "127.0.0.1:1", "secret": SECRET.hex(), "folder": str(folder), "model": "fake"}
    return FrontConfig.from_settings(base | settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_an_open_listener_needs_keys_and_tls(folder: Path, host: str) -> None:
    tls = {"cert": "c", "key": "k"}
    for given, missing in (({}, "api_keys and tls"), ({"api_keys": "f"}, "give tls"), ({"tls": tls}, "give api_keys")):
        with pytest.raises(ConfigError, match=missing) as refused:
            _config(folder, host=host, **given)
        assert refused.value.field == "host"
    assert _config(folder, host=host, insecure=True).host == host
    assert _config(folder, host=host, api_keys="f", tls=tls).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_a_loopback_listener_needs_neither(folder: Path, host: str) -> None:
    assert _config(folder, host=host).api_keys is None


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"prot": 1}, "prot"),
        ({"port": 65536}, "port"),
        ({"port": "80"}, "port"),
        ({"port": 80, "metrics_port": 80}, "metrics_port"),
        ({"metrics_compat": "sglang"}, "metrics_compat"),
        ({"limits": {"max_requests": 0}}, "limits.max_requests"),
        ({"limits": {"write_seconds": float("nan")}}, "limits.write_seconds"),
        ({"limits": {"max": 1}}, "settings"),
        ({"secret": "no hex"}, "settings"),
    ],
)
def test_settings_that_are_none(folder: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(folder, **settings)
    assert refused.value.field == field
    assert SECRET.hex() not in str(refused.value)


def test_a_taken_port_is_refused(folder: Path, run: Run) -> None:
    async def body() -> None:
        async with lab(folder) as it:
            for name, port in (("port", it.port), ("metrics_port", it.metrics_port)):
                with pytest.raises(ConfigError, match=r"be free on 127\.0\.0\.1") as refused:
                    async with lab(folder, **{name: port}):
                        pass
                assert refused.value.field == name

    run(body())


def test_tls(folder: Path, run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        paths = {name: tmp_path / name for name in ("cert", "key")}
        paths["cert"].write_text(CERT)
        paths["key"].write_text(KEY)
        settings = {"cert": str(paths["cert"]), "key": str(paths["key"]), "client_ca": str(paths["cert"])}
        tls = FrontConfig.from_settings(
            {"scheduler": "h:1", "secret": "00", "folder": "f", "model": "m", "tls": settings}
        ).tls
        async with lab(folder, tls=tls) as it:
            request = public.ListModelsRequest()
            with pytest.raises(grpc.aio.AioRpcError) as plain:
                await it.inference.ListModels(request, timeout=SOON)
            assert plain.value.code() is grpc.StatusCode.UNAVAILABLE
            trusted = CERT.encode()
            name = [("grpc.ssl_target_name_override", "localhost")]
            for pair, is_served in (((None, None), False), ((KEY.encode(), trusted), True)):
                credentials = grpc.ssl_channel_credentials(trusted, *pair)
                async with grpc.aio.secure_channel(f"127.0.0.1:{it.port}", credentials, options=name) as channel:
                    call = channel.unary_unary(
                        "/quire.inference.v1.InferenceService/ListModels",
                        request_serializer=public.ListModelsRequest.SerializeToString,
                        response_deserializer=public.ListModelsResponse.FromString,
                    )(request, timeout=SOON)
                    if is_served:
                        assert (await call).models[0].name == "fake"
                    else:
                        with pytest.raises(grpc.aio.AioRpcError) as refused:
                            await call
                        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    run(body())


def test_a_certificate_that_is_none_is_refused(folder: Path, run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        for name, text in (("cert", "no PEM"), ("gone", None)):
            path = tmp_path / name
            if text is not None:
                path.write_text(text)
            tls = _config(folder, tls={"cert": str(path), "key": str(path)}).tls
            with pytest.raises(ConfigError, match="tls"):
                async with lab(folder, tls=tls):
                    pass

    run(body())

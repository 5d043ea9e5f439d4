"""What users of a running service see over gRPC: tokens, refusals, ends, tenants, health, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.processes import environment
from launch.client import AsyncClient, Client
from launch.llm import LLM, RequestOutput
from launch.models.catalog import resolve
from pagetable.errors import ServiceError
from quire_pb.inference.v1 import inference_pb2 as pb
from quire_pb.inference.v1 import inference_pb2_grpc
from tests.serving import Processes

SETTINGS = {"max_model_len": 512, "num_gpu_blocks_override": 256, "max_num_seqs": 32, "threads": 1}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPT = "Once upon a time there was a brave girl named Tilda."
KEYS = {"red": "key-of-red", "blue": "key-of-blue"}


@dataclass
class Running:
    process: subprocess.Popen[str]
    server: str
    metrics: str

    def pids(self) -> list[int]:
        return Processes(self.process.pid).look()


def start(*arguments: str) -> Running:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "launch.cli", "serve", "story", "--no-ray", "--port=0", "--metrics-port=0"]
    process = subprocess.Popen(
        [*command, *flags, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    ready = re.match(r"ready on (\S+): ", process.stdout.readline())
    assert ready is not None, process.stderr.read()
    metrics = ""
    while not metrics:
        found = re.search(r"metrics on (\S+)", process.stderr.readline())
        metrics = found[1] if found else ""
    return Running(process, ready[1], metrics)


def stop(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = start()
    yield found
    stop(found)


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Client]:
    with Client(running.server) as found:
        yield found


@pytest.fixture(scope="module")
def canary() -> list[int]:
    llm = LLM("story", dtype="auto", **SETTINGS)
    return llm.generate_raw([{"prompt": PROMPT, "max_tokens": 24, **GREEDY}])[0].outputs[0].token_ids  # type: ignore[union-attr]


def used(client: Client) -> int:
    return sum(device.used_blocks for device in client.page_map().devices)


def comes_to_rest(client: Client) -> None:
    deadline = time.monotonic() + 60
    while used(client) or client.page_map().sequences:
        assert time.monotonic() < deadline, "pages were left behind"
        time.sleep(0.05)


def tables(client: Client, request_id: str) -> set[str]:
    """Whose tables are shown; they are a few milliseconds behind the tokens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return {sequence.request_id for sequence in client.sequence_pages(request_id)}
        except ServiceError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def alive(client: Client, canary: list[int]) -> None:
    output = client.complete({"prompt": PROMPT, "max_tokens": 24, **GREEDY})
    assert output.outputs[0].token_ids == canary
    comes_to_rest(client)


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("1", {"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
    ("1", {"temperature": float("inf")}, "INVALID_ARGUMENT", "temperature"),
    ("3", {"top_p": 0.0}, "INVALID_ARGUMENT", "top_p"),
    ("3", {"top_p": 1.01}, "INVALID_ARGUMENT", "top_p"),
    ("3", {"min_p": -0.1}, "INVALID_ARGUMENT", "min_p"),
    ("5", {"repetition_penalty": 0.0}, "INVALID_ARGUMENT", "repetition_penalty"),
    ("5", {"frequency_penalty": 1e9}, "INVALID_ARGUMENT", "frequency_penalty"),
    ("6", {"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens"),
    ("6", {"max_tokens": -1}, "INVALID_ARGUMENT", "max_tokens"),
    ("6", {"max_tokens": 513}, "INVALID_ARGUMENT", "max_tokens"),
    ("7", {"max_tokens": 4, "min_tokens": 5}, "INVALID_ARGUMENT", "min_tokens"),
    ("9", {"n": 17}, "INVALID_ARGUMENT", "n"),
    ("9", {"n": 2**31 - 1}, "INVALID_ARGUMENT", "n"),
    ("10", {"seed": -1}, "INVALID_ARGUMENT", "seed"),
    ("11", {"logprobs": 21}, "INVALID_ARGUMENT", "logprobs"),
    ("11", {"prompt_logprobs": -1}, "INVALID_ARGUMENT", "prompt_logprobs"),
    ("18", {"prompt": ""}, "INVALID_ARGUMENT", "text"),
    ("18", {"prompt": None, "prompt_token_ids": []}, "INVALID_ARGUMENT", "token_ids_le"),
    ("19", {"prompt": None, "prompt_token_ids": [-1]}, "INVALID_ARGUMENT", "token_ids_le"),
    ("19", {"prompt": None, "prompt_token_ids": [2**31 - 1]}, "INVALID_ARGUMENT", "token_ids_le"),
    ("20", {"prompt": None, "prompt_token_ids": [5] * 600}, "INVALID_ARGUMENT", "token_ids_le"),
    ("20", {"prompt": "a " * 500_000}, "INVALID_ARGUMENT", "text"),
    ("30", {"cache_salt": "a/b"}, "INVALID_ARGUMENT", "cache_salt"),
    ("30", {"cache_salt": "s" * 129}, "INVALID_ARGUMENT", "cache_salt"),
    ("33", {"model": "../../etc"}, "NOT_FOUND", ""),
]


@pytest.mark.parametrize(("row", "raw", "code", "field"), BAD, ids=[f"{row}-{list(raw)[-1]}" for row, raw, _, _ in BAD])
def test_a_bad_request_is_refused_alone(
    running: Running, client: Client, canary: list[int], row: str, raw: dict[str, Any], code: str, field: str
) -> None:
    pids = running.pids()
    with pytest.raises(ServiceError) as found:
        client.complete({"prompt": PROMPT, "max_tokens": 8, **raw})
    assert found.value.code == code
    assert field in found.value.field and field in str(found.value)
    assert "/" not in str(found.value).replace("../../etc", "").replace("a/b", "") and "Traceback" not in str(
        found.value
    )
    alive(client, canary)
    assert running.pids() == pids


def test_neither_prompt_nor_unknown_methods_break_it(running: Running, client: Client, canary: list[int]) -> None:
    with grpc.insecure_channel(running.server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as empty:
            list(stub.Generate(pb.GenerateRequest()))
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        for method in ("/quire.inference.v1.InferenceService/Drain", "/quire.worker.v1.Admin/Stop"):
            with pytest.raises(grpc.RpcError) as unknown:
                channel.unary_unary(method)(b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    alive(client, canary)


def test_tokens_are_the_engines_with_samples_logprobs_and_stops(client: Client) -> None:
    raws: list[dict[str, Any]] = [
        {"prompt": PROMPT, "max_tokens": 30, "seed": 4, "n": 3, "temperature": 0.9, "request_id": "many"},
        {"prompt": PROMPT, "max_tokens": 60, **GREEDY, "stop": ["."], "logprobs": 3, "prompt_logprobs": 2},
        {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 40, "temperature": 0},
        {"prompt_token_ids": [1, 9, 8, 7], "max_tokens": 20, "seed": 9, "top_k": 5},
    ]
    here = LLM("story", **SETTINGS).generate_raw(raws)
    there = client.generate_raw(raws)
    for one, other in zip(here, there, strict=True):
        assert isinstance(one, RequestOutput) and isinstance(other, RequestOutput)
        assert [s.token_ids for s in one.outputs] == [s.token_ids for s in other.outputs]
        assert [s.text for s in one.outputs] == [s.text for s in other.outputs]
        ends = [[(s.finish_reason, s.stop_reason) for s in output.outputs] for output in (one, other)]
        assert ends[0] == ends[1]
        assert len(one.prompt_logprobs or ()) == len(other.prompt_logprobs or ())
    assert there[1].outputs[0].stop_reason == "."  # type: ignore[union-attr]


def test_ends_that_the_client_makes_leave_no_page(running: Running, client: Client, canary: list[int]) -> None:
    """A deadline, a cancel, an iterator that is closed, a client that is gone."""
    long = {"prompt": PROMPT, "max_tokens": 450, **GREEDY}
    with pytest.raises(ServiceError) as late:
        for _ in client.stream({**long, "n": 16}, timeout=0.05):
            pass
    assert late.value.code == "DEADLINE_EXCEEDED"
    asked = False
    for output in client.stream({**long, "n": 16, "request_id": "mine"}):
        if output.outputs[0].token_ids and not asked:
            client.cancel("mine")
            asked = True
    assert {sample.finish_reason for sample in output.outputs} == {"cancelled"}
    stream = client.stream(long)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    gone = Client(running.server)
    next(gone.stream(long))
    gone.close()
    with pytest.raises(ServiceError, match="nobody") as unknown:
        client.cancel("nobody")
    assert unknown.value.code == "NOT_FOUND"
    alive(client, canary)


_TWO_WAYS = """
import asyncio, sys
from launch.client import AsyncClient, Client

server, raw = sys.argv[1], {"prompt_token_ids": [9, 10, 11], "max_tokens": 3, "temperature": 0, "ignore_eos": True}

async def beside():
    client = AsyncClient(server)
    output = await client.complete(raw)
    await client.close()
    return output

found = []
for _ in range(5):
    with Client(server) as one, Client(server) as other:
        found += [one.complete(raw), other.complete(raw)]
    found.append(asyncio.run(beside()))
    next(iter(Client(server).stream(raw)))  # neither is closed
assert len({tuple(output.outputs[0].token_ids) for output in found}) == 1
try:
    one.models()
except RuntimeError as error:
    print(error)
"""


def test_clients_of_both_kinds_in_one_process_end_without_a_word(running: Running) -> None:
    command = [sys.executable, "-c", _TWO_WAYS, running.server]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "this client is closed\n", "")


def test_an_id_is_unique_while_in_flight(client: Client) -> None:
    stream = client.stream({"prompt": PROMPT, "max_tokens": 450, **GREEDY, "n": 16, "request_id": "twice"})
    next(output for output in stream if output.outputs[0].token_ids)
    with pytest.raises(ServiceError) as found:
        client.complete({"prompt": PROMPT, "request_id": "twice", "max_tokens": 1})
    assert found.value.code == "ALREADY_EXISTS"
    assert tables(client, "twice") == {"twice"}
    stream.close()  # type: ignore[attr-defined]
    comes_to_rest(client)


def test_a_fork_goes_on_from_its_parents_tokens(client: Client) -> None:
    parent = client.stream({"prompt": PROMPT, "max_tokens": 400, **GREEDY, "request_id": "parent"})
    output = next(o for o in parent if len(o.outputs[0].token_ids) >= 10)
    seen = list(output.outputs[0].token_ids)
    *_, child = client.fork("parent", temperature=0, request_id="child")
    *_, whole = parent
    assert child.outputs[0].token_ids[:10] == seen[:10]
    assert child.outputs[0].token_ids == whole.outputs[0].token_ids
    comes_to_rest(client)


def test_64_streams_with_cancels_and_deadlines_leave_no_page(
    running: Running, client: Client, canary: list[int]
) -> None:
    async def one(server: AsyncClient, index: int) -> int:
        raw = {"prompt": f"{PROMPT} {'She had a red map. ' * (index % 7)}", "max_tokens": 20 + index, **GREEDY}
        count = 0
        try:
            async for output in server.stream(raw, timeout=0.2 if index % 8 == 3 else None):
                count = len(output.outputs[0].token_ids)
                if index % 5 == 2 and count > 6:
                    break
        except ServiceError as error:
            assert error.code == "DEADLINE_EXCEEDED" and index % 8 == 3
            return -1
        return count

    async def run() -> list[int]:
        server = AsyncClient(running.server)
        try:
            return await asyncio.gather(*(one(server, index) for index in range(64)))
        finally:
            await server.close()

    counts = asyncio.run(run())
    for index, count in enumerate(counts):
        if index % 5 != 2 and count >= 0:
            assert count == 20 + index
    alive(client, canary)


def test_health_reflection_models_and_text(running: Running, client: Client) -> None:
    with grpc.insecure_channel(running.server) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert [model.name for model in client.models()] == ["story"]
    ids = client.tokenize(PROMPT)
    tokenizer = LLM("story", **SETTINGS).tokenizer
    assert tokenizer is not None and ids == tokenizer.encode(PROMPT)
    assert client.detokenize(ids) == PROMPT


def test_metrics_are_read_only_and_count(running: Running, client: Client) -> None:
    client.complete({"prompt": PROMPT, "max_tokens": 4})
    wanted = (
        "num_free_blocks",
        "alloc_rate",
        "reuse_rate",
        "fragmentation",
        "refcount_hist",
        "gpu_mem_used",
        "kv_gather_latency",
    )
    deadline = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(running.metrics) as answer:
            text = answer.read().decode()
        missing = [name for name in wanted if not re.search(rf"^quire_{name}\S* [0-9]", text, re.MULTILINE)]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert missing == []
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(running.metrics, data=b"x", method="POST"))


def test_tenants_see_and_share_nothing_of_each_other(tmp_path: Path) -> None:
    lines = [f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}" for tenant, key in KEYS.items()]
    (tmp_path / "keys").write_text("\n".join(lines))
    (tmp_path / "keys").chmod(0o600)
    running = start("--api-keys", str(tmp_path / "keys"))
    try:
        for key in (None, "wrong", KEYS["red"] + "x"):
            with Client(running.server, api_key=key) as stranger, pytest.raises(ServiceError) as refused:
                stranger.complete({"prompt": PROMPT, "max_tokens": 1})
            assert refused.value.code == "UNAUTHENTICATED"
        with Client(running.server, api_key=KEYS["red"]) as red, Client(running.server, api_key=KEYS["blue"]) as blue:
            long = PROMPT + " She had a red map, and nobody else had such a map."
            assert red.complete({"prompt": long, "max_tokens": 1}).num_cached_tokens == 0
            assert red.complete({"prompt": long, "max_tokens": 1}).num_cached_tokens >= 16
            assert blue.complete({"prompt": long, "max_tokens": 1}).num_cached_tokens == 0
            stream = red.stream({"prompt": long, "max_tokens": 440, **GREEDY, "n": 16, "request_id": "secret"})
            next(output for output in stream if output.outputs[0].token_ids)
            assert tables(red, "secret") == {"secret"}
            for look in (blue.sequence_pages, blue.cancel, lambda name: list(blue.fork(name))):
                with pytest.raises(ServiceError) as found:
                    look("secret")
                assert found.value.code == "NOT_FOUND"
            assert "secret" not in json.dumps([s.request_id for s in blue.page_map().sequences])
            stream.close()  # type: ignore[attr-defined]
    finally:
        stop(running)


def test_the_bundled_model_is_found_by_name() -> None:
    assert Path(resolve("story"), "model.safetensors").is_file()

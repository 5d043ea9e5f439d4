"""Rows of RELIABILITY part B over gRPC, against the real processes: scheduler, keeper, worker and front.

After every row: the stated code, the field at fault and its limit in one line of text, nothing of the server's insides;
the same processes; a greedy request that says what it said at first; no page in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import time
from array import array
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from launch.config import EngineConfig
from launch.local import LocalService
from launch.models.tiny_llama import make_tiny_llama
from launch.serve import make_plan
from launch.serve_flags import ServeConfig
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.memory.v1 import memory_pb2
from tests.serving import Processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

VOCAB, CONTEXT = 502, 640
SECONDS = 60
INFERENCE = "/quire.inference.v1.InferenceService/"
LIMITS = {"max_model_len": CONTEXT, "num_gpu_blocks_override": CONTEXT // 16, "max_num_seqs": 32, "threads": 1}
CANARY = public.GenerateRequest(
    text="Once upon a time there was a small library",
    sampling=public.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
)
NAN, INF = math.nan, math.inf


class Service:
    """The processes, without Ray, on a thread with its own event loop; and a client.

    Attributes:
        canary: what the service says to CANARY, before anything bad came.
    """

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._loop.run_forever)
        plan, _ = make_plan(ServeConfig(port=0, ray=False, drain_seconds=0), EngineConfig(str(folder), **LIMITS))  # type: ignore[arg-type]
        self._service = LocalService(plan, lambda text: None)
        self.do(self._service.start())
        self.folder, self.port = folder, int(plan.front["port"])
        options = [("grpc.max_send_message_length", -1), ("grpc.max_metadata_size", 1 << 20)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options=options)
        self.canary = self.say(CANARY)
        self.pids = self._pids()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def stop(self) -> None:
        self.channel.close()
        self.do(self._service.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.shutdown()

    def call(self, method: str, data: bytes, timeout: float = SECONDS, **more: Any) -> list[bytes]:
        """A call of raw bytes; what came back."""
        return list(self.channel.unary_stream(method)(data, timeout=timeout, **more))

    def say(self, request: public.GenerateRequest) -> list[int]:
        found = map(public.GenerateResponse.FromString, self.call(INFERENCE + "Generate", request.SerializeToString()))
        return [token for message in found for token in message.delta.token_ids]

    def check(self) -> None:
        """Alive and as before; at rest."""
        assert self.say(CANARY) == self.canary
        assert self._pids() == self.pids
        for _ in range(1000):
            data = self.call("/quire.memory.v1.MemoryService/GetPageMap", b"")[0]
            pages = memory_pb2.GetPageMapResponse.FromString(data)
            if not pages.sequences and all(device.used_blocks == 0 for device in pages.devices):
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"pages were left behind: {pages}")
        data = self.call("/quire.cluster.v1.ClusterService/GetLoads", b"")[0]
        (load,) = cluster_pb2.GetLoadsResponse.FromString(data).loads
        assert (load.running, load.waiting) == (0, 0)

    def refuse(self, method: str, data: bytes, **more: Any) -> tuple[str, str, list[str]]:
        """(code, text, fields) of a call that must fail."""
        try:
            self.call(method, data, **more)
        except grpc.RpcError as error:
            found: Any = error
        else:
            raise AssertionError("it was to be refused")
        text, fields = found.details() or "", []
        status: Any = rpc_status.from_call(found)
        for detail in status.details if status is not None else ():
            bad = error_details_pb2.BadRequest()
            if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad):
                fields += [violation.field for violation in bad.field_violations]
                assert [violation.description for violation in bad.field_violations] == [text]
        assert text.isprintable() and len(text) < 500, text
        for hidden in ("Traceback", " 0x", ".py", str(self.folder), "object at", "127.0.0.1"):
            assert hidden not in text
        assert found.code() is not grpc.StatusCode.UNKNOWN
        return found.code().name, text, fields

    def _pids(self) -> dict[str, int]:
        parts = {name: part.pid for name, part in self._service.parts.items()}
        (parts["worker"],) = Processes(parts["keeper-0"]).look()
        return parts


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(folder)
    found = Service(folder)
    yield found
    found.stop()


def ids(values: Sequence[int]) -> bytes:
    return array("i", values).tobytes()


def req(**fields: Any) -> public.GenerateRequest:
    """A small good request, but for `fields`: the sampling's, or the request's own."""
    names = public.GenerateRequest.DESCRIPTOR.fields_by_name
    own = {name: value for name, value in fields.items() if name in names}
    sampling = {name: value for name, value in fields.items() if name not in names}
    if not own.keys() & {"text", "token_ids", "token_ids_le", "chat"}:
        own["token_ids"] = public.TokenIds(ids=[5, 6, 7])
    return public.GenerateRequest(sampling=public.SamplingParams(**{"max_tokens": 4, **sampling}), **own)


def free(**fields: Any) -> public.GenerateRequest:
    """The same without max_tokens."""
    request = req(**fields)
    request.sampling.ClearField("max_tokens")
    return request


def chat(*messages: tuple[str, str]) -> public.Chat:
    return public.Chat(messages=[public.ChatMessage(role=role, content=content) for role, content in messages])


def field(message: Message, number: int, value: bytes = b"\x01") -> bytes:
    """The message with one more field, of a number that the contract does not know."""
    return message.SerializeToString() + varint(number << 3 | 2) + varint(len(value)) + value


def inner(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


S = "sampling."
REALS = [
    *((1, req(temperature=x), S + "temperature", "from 0 to 100") for x in (NAN, INF, -INF, -1.0, 100.1)),
    *((3, req(top_p=x), S + "top_p", "above 0 and at most 1") for x in (0.0, -0.0, 1.01, NAN, -INF)),
    *((3, req(min_p=x), S + "min_p", "from 0 to 1") for x in (-0.1, 1.1, NAN)),
    *((3, req(top_k=x), S + "top_k", "whole number from -1") for x in (-2, -(2**31))),
    *((5, req(repetition_penalty=x), S + "repetition_penalty", "from 0.01 to 10") for x in (NAN, 1e9, 0.0, -1.0)),
    *((5, req(presence_penalty=x), S + "presence_penalty", "from -2 to 2") for x in (NAN, 1e9, INF)),
    *((5, req(frequency_penalty=x), S + "frequency_penalty", "from -2 to 2") for x in (NAN, 1e9, -INF)),
    *((5, req(logit_bias={5: x}), S + "logit_bias", "from -100 to 100") for x in (NAN, 1e9, INF)),
]
WHOLES = [
    *((6, req(max_tokens=x), S + "max_tokens", "from 1 to") for x in (0, -1, -(2**31))),
    (6, req(max_tokens=2**31 - 1), S + "max_tokens", f"at most {CONTEXT - 3}"),
    (6, free(token_ids_le=ids([1] * CONTEXT)), "token_ids_le", f"at most {CONTEXT - 1} tokens"),
    (7, req(min_tokens=5), S + "min_tokens", "from 0 to 4"),
    (7, free(min_tokens=2**31 - 1), S + "min_tokens", f"from 0 to {CONTEXT - 3}"),
    *((9, req(n=x), S + "n", "from 1 to 16") for x in (0, -1, 17, 10**9, 2**31 - 1)),
    *((10, req(seed=x), S + "seed", "from 0 to 9223372036854775807") for x in (-1, -(2**63))),
    *((11, req(logprobs=x), S + "logprobs", "from 0 to 20") for x in (-1, 21, VOCAB)),
    *((11, req(prompt_logprobs=x), S + "prompt_logprobs", "from 0 to 20") for x in (-1, 21, VOCAB)),
    *((19, req(stop_token_ids=[x]), S + "stop_token_ids", "from 0 to 501") for x in (-1, VOCAB, 2**31 - 1)),
    *((19, req(logit_bias={x: 1.0}), S + "logit_bias", "from 0 to 501") for x in (-1, VOCAB)),
    (0, req(stop_token_ids=[1] * 65), S + "stop_token_ids", "at most 64 ids"),
    (0, req(logit_bias=dict.fromkeys(range(1025), 1.0)), S + "logit_bias", "at most 1024 entries"),
    (0, req(stop=["x"] * 17), S + "stop", "at most 16 strings"),
    *((0, req(stop=[x]), S + "stop", "1 to 256 bytes") for x in ("", "é" * 129)),
]
PROMPTS = [
    (14, public.GenerateRequest(), "prompt", "exactly one of text, token_ids, token_ids_le, chat"),
    (18, req(text=""), "text", "at least 1 character"),
    (18, req(token_ids=public.TokenIds()), "token_ids", "at least 1 token"),
    (18, req(token_ids_le=b""), "token_ids_le", "at least 1 token"),
    (18, req(chat=public.Chat()), "chat.messages", "1 to 4096 messages"),
    (0, req(token_ids_le=b"abcde"), "token_ids_le", "four bytes each"),
    (0, req(chat=chat(("", "a"))), "chat.messages[0].role", "non-empty string"),
    *((19, req(token_ids=public.TokenIds(ids=[1, x])), "token_ids", "from 0 to 501") for x in (-1, VOCAB, 2**31 - 1)),
    *((19, req(token_ids_le=ids([1, x])), "token_ids_le", "look at index 1") for x in (-1, VOCAB, -(2**31))),
    (20, req(token_ids_le=ids([1] * 100_000)), "token_ids_le", f"max_model_len {CONTEXT}"),
    (20, req(text="a" * (27 << 20)), "text", "max_prompt_bytes"),
    (20, req(chat=chat(("user", "a" * (1 << 20)))), "chat.messages", "max_prompt_bytes"),
    (20, req(chat=chat(*[("user", "a")] * 4097)), "chat.messages", "1 to 4096 messages"),
    (22, req(token_ids_le=ids([1] * 320), max_tokens=321), S + "max_tokens", "at most 320"),
]
NAMES = [
    *((30, req(cache_salt=x), "cache_salt", "1 to 128 characters") for x in ("", "s" * (1 << 20), "/", "a\0", "é")),
    *((16, req(request_id=x), "request_id", "1 to 128 printable") for x in ("", "a\nb", "a\0", "x" * 129)),
]
ROWS: list[tuple[int, public.GenerateRequest, str, str]] = [*REALS, *WHOLES, *PROMPTS, *NAMES]
IDS = [f"row{row}-{name}-{index}" for index, (row, _, name, _) in enumerate(ROWS)]


@pytest.mark.parametrize(("row", "request_", "name", "limit"), ROWS, ids=IDS)
def test_a_bad_request_is_refused_and_nothing_is_left(
    service: Service, row: int, request_: public.GenerateRequest, name: str, limit: str
) -> None:
    code, text, fields = service.refuse(INFERENCE + "Generate", request_.SerializeToString())
    assert (code, fields) == ("INVALID_ARGUMENT", [name])
    assert text.startswith(f"{name}: got ") and limit in text
    service.check()


GENERATE = req()
UNKNOWN_FIELDS = [
    (field(GENERATE, 100), "100"),
    (field(GENERATE, 9, b"gASVpickled"), "9"),
    (req(max_tokens=1).SerializeToString() + inner(7, field(public.SamplingParams(), 77)), "sampling.77"),
    (public.GenerateRequest(chat=chat(("user", "a"))).SerializeToString() + inner(6, inner(1, inner(3, b"x"))),
     "chat.messages.3"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "name"), UNKNOWN_FIELDS, ids=[name for _, name in UNKNOWN_FIELDS])
def test_rows_27_and_28_a_field_that_there_is_not_is_refused(service: Service, data: bytes, name: str) -> None:
    code, text, fields = service.refuse(INFERENCE + "Generate", data)
    assert (code, fields) == ("INVALID_ARGUMENT", [name])
    assert "there is no such field" in text
    service.check()


MANGLED = [
    b"\xff",
    b"\x0a\xff",
    b"\x80" * 20,
    req(text="a").SerializeToString()[:-1],
    b"\x0a\x02\xff\xfe",
    b"GET / HTTP/1.1",
]


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "CancelGeneration"])
@pytest.mark.parametrize("data", MANGLED, ids=range(len(MANGLED)))
def test_row_24_bytes_that_are_no_message(service: Service, method: str, data: bytes) -> None:
    code, text, fields = service.refuse(INFERENCE + method, data)
    assert (code, fields) == ("INVALID_ARGUMENT", ["request"]), text
    service.check()


@pytest.mark.parametrize("method", ["Generate", "Tokenize", "ListModels"])
def test_row_44_exactly_one_message(service: Service, method: str) -> None:
    for messages in ([], [b"", b""]):
        call = service.channel.stream_stream(INFERENCE + method)(iter(messages), timeout=SECONDS)
        with pytest.raises(grpc.RpcError) as refused:
            list(call)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert "must be exactly one" in refused.value.details()  # type: ignore[attr-defined]
    service.check()


@pytest.mark.parametrize(
    "method",
    [
        INFERENCE + "Drain",
        INFERENCE + "Shutdown",
        "/quire.inference.v1.Admin/Pause",
        "/quire.worker.v1.WorkerService/Submit",
        "/quire.cluster.v1.ClusterService/SetLogLevel",
        "/nothing",
        "/",
    ],
)
def test_rows_44_and_48_what_is_not_there_is_unimplemented(service: Service, method: str) -> None:
    assert service.refuse(method, b"")[0] == "UNIMPLEMENTED"
    service.check()


MODELS = ["other", "", "../../etc", "/etc/passwd", "x" * 100_000, "story\0", "tiny "]


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
def test_row_33_a_model_that_is_not_served(service: Service, model: str) -> None:
    for method, request in (
        ("Generate", req(model=model)),
        ("Tokenize", public.TokenizeRequest(model=model, text="a")),
        ("Detokenize", public.DetokenizeRequest(model=model, token_ids=[1])),
    ):
        code, text, _ = service.refuse(INFERENCE + method, request.SerializeToString())
        assert code == "NOT_FOUND" and text.startswith("model: ")
    service.check()


def test_row_15_a_deadline_that_has_passed(service: Service) -> None:
    for seconds in (0.0, -1.0, 1e-6):
        assert service.refuse(INFERENCE + "Generate", CANARY.SerializeToString(), timeout=seconds)[0] == (
            "DEADLINE_EXCEEDED"
        )
    service.check()


def test_row_38_messages_and_metadata_beyond_the_limits(service: Service) -> None:
    big = req(text="a" * (32 << 20)).SerializeToString()
    assert service.refuse(INFERENCE + "Generate", big)[0] == "RESOURCE_EXHAUSTED"
    bomb = req(text="a" * (200 << 20)).SerializeToString()
    assert service.refuse(INFERENCE + "Generate", bomb, compression=grpc.Compression.Gzip)[0] == "RESOURCE_EXHAUSTED"
    wide = (("x-junk", "j" * 20_000),)
    assert service.refuse(INFERENCE + "ListModels", b"", metadata=wide)[0] == "RESOURCE_EXHAUSTED"
    service.check()


JUNK = [
    b"\0" * 100,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x80\x04\x95" + b"pickle" * 50,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 200,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_row_51_bytes_that_are_no_grpc(service: Service, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", service.port), SECONDS) as peer:
        peer.sendall(junk)
        with contextlib.suppress(ConnectionError):
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):  # until the server hangs up, as it must
                pass
    service.check()


def test_row_25_text_at_the_edges_of_unicode(service: Service) -> None:
    for text in ("\0", "\uffff", "\u202eabc", "👨\u200d👩\u200d👧", "a\u0301", "\U0010ffff", "\ufeff"):
        request = req(text=text, max_tokens=24, temperature=1.5, seed=1, ignore_eos=True)
        answer = service.call(INFERENCE + "Generate", request.SerializeToString())
        deltas = [public.GenerateResponse.FromString(data).delta for data in answer]
        assert sum(len(delta.token_ids) for delta in deltas) == 24
        whole = [token for delta in deltas for token in delta.token_ids]
        back = service.call(INFERENCE + "Detokenize", public.DetokenizeRequest(token_ids=whole).SerializeToString())
        assert "".join(delta.text for delta in deltas) == public.DetokenizeResponse.FromString(back[0]).text
    service.check()


def test_row_22_a_request_that_takes_the_whole_pool_and_two_of_them(service: Service) -> None:
    half = CONTEXT // 2
    request = req(token_ids_le=ids([7] * half), max_tokens=half, temperature=0.0, ignore_eos=True)
    alone = service.say(request)
    assert len(alone) == half
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(service.say, [request] * 2)) == [alone] * 2
    service.check()


def test_row_43_clients_that_leave_at_any_time(service: Service) -> None:
    request = req(max_tokens=400, n=8, ignore_eos=True).SerializeToString()
    for messages in (0, 1, 2, 10):
        call = service.channel.unary_stream(INFERENCE + "Generate")(request, timeout=SECONDS)
        for _ in range(messages):
            next(call)
        call.cancel()
    queued = [service.channel.unary_stream(INFERENCE + "Generate")(request, timeout=SECONDS) for _ in range(20)]
    for call in queued:  # most of them wait for pages
        call.cancel()
    service.check()


def test_row_16_an_id_in_flight_and_a_retry_after_its_end(service: Service) -> None:
    data = req(max_tokens=400, n=8, ignore_eos=True, request_id="mine").SerializeToString()
    call = service.channel.unary_stream(INFERENCE + "Generate")(data, timeout=SECONDS)
    next(call)
    code, text, _ = service.refuse(INFERENCE + "Generate", data)
    assert code == "ALREADY_EXISTS" and "'mine' is in flight" in text
    call.cancel()
    deadline = 1000
    while deadline:  # the server hears of the cancel a moment later
        deadline -= 1
        try:
            assert len(service.call(INFERENCE + "Generate", req(request_id="mine").SerializeToString())) > 2
            break
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS  # type: ignore[attr-defined]
            time.sleep(0.01)
    assert deadline
    service.check()


CALLS: list[tuple[str, Message, str, list[str]]] = [
    ("CancelGeneration", public.CancelGenerationRequest(request_id="nobody"), "NOT_FOUND", []),
    ("CancelGeneration", public.CancelGenerationRequest(), "NOT_FOUND", []),
    ("ForkGeneration", public.ForkGenerationRequest(parent_request_id="nobody"), "NOT_FOUND", []),
    ("ForkGeneration", public.ForkGenerationRequest(parent_request_id="x" * 10**6), "NOT_FOUND", []),
    ("Tokenize", public.TokenizeRequest(), "INVALID_ARGUMENT", ["input"]),
    ("Tokenize", public.TokenizeRequest(chat=public.Chat()), "INVALID_ARGUMENT", ["chat.messages"]),
    ("Detokenize", public.DetokenizeRequest(token_ids=[-1]), "INVALID_ARGUMENT", ["token_ids"]),
    ("Detokenize", public.DetokenizeRequest(token_ids=[1, VOCAB]), "INVALID_ARGUMENT", ["token_ids"]),
]


@pytest.mark.parametrize(("method", "request_", "code", "fields"), CALLS, ids=range(len(CALLS)))
def test_the_other_calls_refuse_too(
    service: Service, method: str, request_: Message, code: str, fields: list[str]
) -> None:
    found = service.refuse(INFERENCE + method, request_.SerializeToString())
    assert (found[0], found[2]) == (code, fields)
    service.check()


def test_pages_of_nobody_are_not_found(service: Service) -> None:
    request = memory_pb2.GetSequencePagesRequest(request_id="nobody").SerializeToString()
    assert service.refuse("/quire.memory.v1.MemoryService/GetSequencePages", request)[0] == "NOT_FOUND"
    service.check()


def test_all_rows_at_once_beside_a_stream_that_runs(service: Service) -> None:
    """What is refused holds nobody up: 27 MB of text and all the rest, while good requests are answered."""
    good = [CANARY] * 8

    def one(request: public.GenerateRequest) -> str:
        try:
            return str(service.say(request))
        except grpc.RpcError as error:
            code: str = error.code().name  # type: ignore[attr-defined]
            return code

    rows = [request for _, request, _, _ in ROWS]
    jobs: list[public.GenerateRequest] = []
    for index, row in enumerate(rows):
        jobs.append(row)
        if index % (len(rows) // len(good)) == 0 and good:
            jobs.append(good.pop())
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(one, jobs))
    for request, answer in zip(jobs, answers, strict=True):
        assert answer == (str(service.canary) if request is CANARY else "INVALID_ARGUMENT")
    service.check()

"""A client of a running service: `from quire import connect`.

    with connect("127.0.0.1:8461") as client:
        for output in client.stream({"prompt": "Once upon a time", "max_tokens": 64}):
            ...

`AsyncClient` does the work on grpc.aio; `Client` runs one in a thread of its own. Requests are the JSON objects of a
batch file, outputs those of `LLM`.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from launch.outputs import CompletionOutput, RequestOutput
from pagetable.errors import InvalidRequest, QuireError, ServiceError
from quire_pb.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from quire_pb.inference.v1 import inference_pb2 as pb
from quire_pb.inference.v1 import inference_pb2_grpc
from quire_pb.memory.v1 import memory_pb2, memory_pb2_grpc
from worker.plan import TokenLogprobs

DEFAULT_SERVER = "127.0.0.1:8461"
MAX_MESSAGE_BYTES = 32 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}
_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)
_OWN = frozenset({"model", "request_id", "cache_salt", "prompt", "messages", "prompt_token_ids"})
T = TypeVar("T")


class AsyncClient:
    """One channel to a front. All calls raise ServiceError with the server's code and field.

    Args:
        server: host:port.
        api_key: sent as a bearer token; only over TLS or to this machine.
        tls_ca: PEM file of the authority that signed the server's certificate; turns TLS on.
        tls_cert, tls_key: PEM files that this client shows, where the server wants one.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        api_key: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ) -> None:
        self.server = server
        if tls_ca is None:
            self._channel = grpc.aio.insecure_channel(server, options=_OPTIONS)
        else:
            chain, key = (Path(path).read_bytes() if path else None for path in (tls_cert, tls_key))
            credentials = grpc.ssl_channel_credentials(Path(tls_ca).read_bytes(), key, chain)
            self._channel = grpc.aio.secure_channel(server, credentials, options=_OPTIONS)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._memory = memory_pb2_grpc.MemoryServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        self._admin = cluster_pb2_grpc.AdminServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def stream(self, raw: Mapping[str, Any], timeout: float | None = None) -> AsyncGenerator[RequestOutput, None]:
        """Run one JSON object's request; its output, grown, after each message. Closing the iterator cancels it."""
        request = to_request(raw)
        output = _empty(raw, raw.get("n", 1))
        call = self._inference.Generate(request, timeout=timeout, metadata=self._metadata)
        async for moved in _follow(call, output):
            yield moved

    async def fork(
        self, parent: str, sample_index: int = 0, timeout: float | None = None, **changes: Any
    ) -> AsyncIterator[RequestOutput]:
        """Split a sample of the running request `parent`: a request of its own goes on from its tokens and shares their
        pages. `changes` are sampling fields that differ, and perhaps its `request_id`."""
        name = changes.pop("request_id", None)
        request = pb.ForkGenerationRequest(
            parent_request_id=parent, parent_index=sample_index, request_id=name, sampling=_sampling(changes)
        )
        call = self._inference.ForkGeneration(request, timeout=timeout, metadata=self._metadata)
        async for moved in _follow(call, _empty({}, 1)):
            yield moved

    async def complete(self, raw: Mapping[str, Any], timeout: float | None = None) -> RequestOutput:
        """Run one request to its end."""
        last = None
        async for output in self.stream(raw, timeout):
            last = output
        if last is None:
            raise ServiceError("INTERNAL", "the server ended the stream without a word")
        return last

    async def generate_raw(
        self, raws: Iterable[Mapping[str, Any] | QuireError], concurrency: int = 256
    ) -> list[RequestOutput | QuireError]:
        """Run JSON objects side by side; each is answered in order by its output or by why it was refused."""
        gate = asyncio.Semaphore(concurrency)

        async def one(raw: Mapping[str, Any] | QuireError) -> RequestOutput | QuireError:
            if isinstance(raw, QuireError):
                return raw
            async with gate:
                try:
                    return await self.complete(raw)
                except QuireError as error:
                    return error

        return list(await asyncio.gather(*(one(raw) for raw in raws)))

    async def cancel(self, request_id: str) -> None:
        await self._call(self._inference.CancelGeneration, pb.CancelGenerationRequest(request_id=request_id))

    async def tokenize(self, text: str) -> list[int]:
        found = await self._call(self._inference.Tokenize, pb.TokenizeRequest(text=text))
        return list(found.token_ids)

    async def detokenize(self, token_ids: Iterable[int]) -> str:
        found = await self._call(self._inference.Detokenize, pb.DetokenizeRequest(token_ids=list(token_ids)))
        return str(found.text)

    async def models(self) -> list[Any]:
        return list((await self._call(self._inference.ListModels, pb.ListModelsRequest())).models)

    async def page_map(self) -> memory_pb2.GetPageMapResponse:
        return await self._call(self._memory.GetPageMap, memory_pb2.GetPageMapRequest())

    async def sequence_pages(self, request_id: str) -> list[Any]:
        request = memory_pb2.GetSequencePagesRequest(request_id=request_id)
        return list((await self._call(self._memory.GetSequencePages, request)).sequences)

    async def cluster(self) -> list[Any]:
        return list((await self._call(self._cluster.GetCluster, cluster_pb2.GetClusterRequest())).shards)

    async def loads(self) -> list[Any]:
        return list((await self._call(self._cluster.GetLoads, cluster_pb2.GetLoadsRequest())).loads)

    async def stop_service(self) -> int:
        """End the whole service; on its admin socket only. The pid of what ends last, or 0."""
        return int((await self._call(self._admin.Stop, cluster_pb2.StopRequest())).pid)

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise to_error(error) from None


@functools.cache
def _shared_loop() -> asyncio.AbstractEventLoop:
    """The loop of all Clients of this process, on a thread of its own.

    It is never closed: grpc.aio may wake a loop that it has seen before, and prints a traceback where it is closed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="quire clients", daemon=True).start()
    return loop


class Client:
    """AsyncClient's verbs for code without an event loop. Use as a context manager, or `close` it."""

    def __init__(self, server: str = DEFAULT_SERVER, **options: Any) -> None:
        self._loop, self._is_closed = _shared_loop(), False

        async def make() -> AsyncClient:
            return AsyncClient(server, **options)

        self._client = self._run(make())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the channel; running streams are cancelled."""
        if not self._is_closed:
            self._run(self._client.close())
            self._is_closed = True

    def stream(self, raw: Mapping[str, Any], timeout: float | None = None) -> Iterator[RequestOutput]:
        """See AsyncClient.stream."""
        return self._iterate(self._client.stream(raw, timeout))

    def fork(
        self, parent: str, sample_index: int = 0, timeout: float | None = None, **changes: Any
    ) -> Iterator[RequestOutput]:
        """See AsyncClient.fork."""
        return self._iterate(self._client.fork(parent, sample_index, timeout, **changes))

    def complete(self, raw: Mapping[str, Any], timeout: float | None = None) -> RequestOutput:
        return self._run(self._client.complete(raw, timeout))

    def generate_raw(self, raws: Iterable[Mapping[str, Any] | QuireError]) -> list[RequestOutput | QuireError]:
        return self._run(self._client.generate_raw(raws))

    def cancel(self, request_id: str) -> None:
        self._run(self._client.cancel(request_id))

    def tokenize(self, text: str) -> list[int]:
        return self._run(self._client.tokenize(text))

    def detokenize(self, token_ids: Iterable[int]) -> str:
        return self._run(self._client.detokenize(token_ids))

    def models(self) -> list[Any]:
        return self._run(self._client.models())

    def page_map(self) -> memory_pb2.GetPageMapResponse:
        return self._run(self._client.page_map())

    def sequence_pages(self, request_id: str) -> list[Any]:
        return self._run(self._client.sequence_pages(request_id))

    def cluster(self) -> list[Any]:
        return self._run(self._client.cluster())

    def loads(self) -> list[Any]:
        return self._run(self._client.loads())

    def stop_service(self) -> int:
        return self._run(self._client.stop_service())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._is_closed:
            work.close()
            raise RuntimeError("this client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _iterate(self, outputs: AsyncIterator[RequestOutput]) -> Iterator[RequestOutput]:
        async def advance() -> RequestOutput | None:
            return await anext(outputs, None)

        async def end() -> None:
            await outputs.aclose()  # type: ignore[attr-defined]  # an async generator

        try:
            while (output := self._run(advance())) is not None:
                yield output
        finally:
            if not self._is_closed:
                self._run(end())


def connect(server: str = DEFAULT_SERVER, **options: Any) -> Client:
    """A client of the service at `server`; options as AsyncClient's."""
    return Client(server, **options)


def to_request(raw: Mapping[str, Any]) -> pb.GenerateRequest:
    """A JSON object as a request. Names and types that the wire cannot carry are refused here, all else by the
    server."""
    request = pb.GenerateRequest(sampling=_sampling({k: v for k, v in raw.items() if k not in _OWN}))
    prompts = [name for name in ("prompt", "messages", "prompt_token_ids") if raw.get(name) is not None]
    if len(prompts) != 1:
        raise InvalidRequest(
            "prompt", " and ".join(prompts) or None, "be exactly one of prompt, messages, prompt_token_ids"
        )
    try:
        for name in ("model", "request_id", "cache_salt"):
            if raw.get(name) is not None:
                setattr(request, name, raw[name])
        if prompts == ["prompt"]:
            request.text = raw["prompt"]
        elif prompts == ["messages"]:
            request.chat.messages.extend(pb.ChatMessage(**message) for message in raw["messages"])
        else:
            request.token_ids_le = array("i", raw["prompt_token_ids"]).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(prompts[0], raw[prompts[0]], f"be what the wire can carry ({str(error)[:100]})") from None
    return request


def to_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """The server's status, with the field of its first violation."""
    code, field = error.code().name, ""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what a Call has
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
    return ServiceError(code, error.details() or code, field)


def _sampling(values: Mapping[str, Any]) -> pb.SamplingParams:
    sampling = pb.SamplingParams()
    for name, value in values.items():
        if name not in _SAMPLING:
            raise InvalidRequest(name, value, "not be given: there is no such field", "leave it out")
        if value is None:
            continue
        try:
            if name == "logit_bias":
                sampling.logit_bias.update({int(token): bias for token, bias in value.items()})
            elif name in ("stop", "stop_token_ids"):
                getattr(sampling, name).extend([value] if isinstance(value, str) else value)
            else:
                setattr(sampling, name, value)
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(name, value, f"be what the wire can carry ({str(error)[:100]})") from None
    return sampling


def _empty(raw: Mapping[str, Any], samples: Any) -> RequestOutput:
    count = samples if type(samples) is int and 1 <= samples <= 1024 else 1
    wants = raw.get("logprobs") is not None
    outputs = [
        CompletionOutput(index, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None)
        for index in range(count)
    ]
    ids = raw.get("prompt_token_ids") or ()
    text = raw.get("prompt")
    output = RequestOutput("", text if isinstance(text, str) else None, tuple(ids), outputs)
    if raw.get("prompt_logprobs") is not None:
        output.prompt_logprobs = [None]
    return output


async def _follow(call: Any, output: RequestOutput) -> AsyncIterator[RequestOutput]:
    """Apply a stream's messages to `output`. Leaving early cancels the call."""
    try:
        async for message in call:
            _apply(message, output)
            yield output
    except grpc.aio.AioRpcError as error:
        raise to_error(error) from None
    finally:
        call.cancel()


def _apply(message: Any, output: RequestOutput) -> None:
    kind = message.WhichOneof("event")
    if kind == "accepted":
        output.request_id = message.accepted.request_id
        output.num_prompt_tokens = message.accepted.prompt_tokens
    elif kind == "delta":
        delta, own = message.delta, output.outputs[message.delta.index]
        own.text += delta.text
        own.token_ids += delta.token_ids
        for each in delta.logprobs:
            if own.logprobs is not None and own.cumulative_logprob is not None:
                own.logprobs.append(_logprobs(each))
                own.cumulative_logprob += each.logprob
        if output.prompt_logprobs is not None:
            output.prompt_logprobs += [_logprobs(each) for each in delta.prompt_logprobs]
    elif kind == "finished":
        finished, own = message.finished, output.outputs[message.finished.index]
        own.finish_reason = _FINISH.get(finished.finish_reason, "stop")
        stop = finished.WhichOneof("stop_reason")
        own.stop_reason = getattr(finished, stop) if stop else None
        own.pages = [(page.device_id, page.block_id) for page in finished.usage.pages]
        if finished.index == 0:
            output.num_cached_tokens = finished.usage.cached_tokens


def _logprobs(found: pb.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(found.logprob, found.rank, tuple((top.token_id, top.logprob) for top in found.top))

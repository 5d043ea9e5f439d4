"""The gRPC server that users talk to.

    call -> gate (whose key) -> one message -> parse and tokenize (threads) -> place -> submit -> Stream -> client

Here is what the public contract's methods do; which requests are good is `cluster.requests`', where they run is the
dispatcher's, what their client has had is the Stream's. There are no admin calls on this port.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

from cluster.auth import page_salt
from cluster.chat_template import ChatTemplate, check_messages
from cluster.dispatch import Dispatcher
from cluster.endpoint import Caller
from cluster.front_config import FrontConfig
from cluster.metrics import Meter
from cluster.public_messages import chat_messages, fork_fields, in_public_names, prompt_kind, request_fields
from cluster.requests import Text, parse_request
from cluster.streams import Stream
from cluster.tokenizer import Tokenizer
from pagetable.errors import AlreadyExists, InvalidRequest, NotFound, Overloaded, QuireError, ServiceError, shown
from pagetable.sampling import Limits, Request
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb

T = TypeVar("T")
QUERY_SECONDS = 5.0
# With so many streams each waits between messages: 64 of them send 1,280 a second at most, a third of a core of ours.
PACED_STREAMS, PACE_SECONDS, MAX_PACE_SECONDS = 16, 0.0008, 0.05


class Front:
    """The public services' methods: quire.inference.v1, quire.memory.v1 and quire.cluster.v1.

    Each takes (request, caller) and raises QuireError; see cluster/endpoint.py. Use from one event loop.

    Attributes:
        draining: new work is refused, what runs goes on.
    """

    def __init__(self, config: FrontConfig, dispatcher: Dispatcher, meter: Meter, keyed: bool) -> None:
        self.draining = False
        self._config, self._limits = config, config.limits
        self._dispatcher, self._meter, self._keyed = dispatcher, meter, keyed
        self._tokenizer = Tokenizer.from_folder(config.folder)
        self._text = _text(self._tokenizer)
        self._threads = ThreadPoolExecutor(config.limits.text_threads, thread_name_prefix="text")
        self._streams: dict[tuple[str, str], Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0  # generating calls, from their first line to their last
        self._preparing = 0  # bytes of requests whose text waits for a thread or has one
        self._arrivals = 0

    # quire.inference.v1

    async def Generate(self, request: public.GenerateRequest, caller: Caller) -> None:
        with self._call() as began:
            self._check_model(request)
            field = prompt_kind(request)
            limits, eos = await self._facts()
            seed = self._next_seed()

            def parse() -> Request:
                return parse_request(
                    request_fields(request),
                    limits,
                    text=self._text,
                    request_id=_new_id(),
                    seed=seed,
                    eos_token_ids=eos,
                )

            admitted = await self._in_thread(caller.size, lambda: in_public_names(parse, field))
            salt = page_salt(self._config.secret, caller.tenant, admitted.cache_salt)
            stream = self._stream(replace(admitted, cache_salt=salt), caller, public.GenerateResponse, began)
            with self._registered(stream):
                await self._dispatcher.start(stream)
                await stream.serve(caller.context)

    async def ForkGeneration(self, request: public.ForkGenerationRequest, caller: Caller) -> None:
        with self._call() as began:
            index = request.parent_index
            parent = self._find(caller, "parent_request_id", request.parent_request_id)
            if index >= len(parent.samples) or not parent.samples[index].runs:
                raise NotFound(f"parent_index: sample {index} of {shown(request.parent_request_id)} is not in flight")
            sample = parent.samples[index]
            outputs, logprobs = sample.outputs[:], None if sample.logprobs is None else sample.logprobs[:]
            limits, eos = await self._facts()
            seed = self._next_seed()

            def parse() -> Request:
                return parse_request(
                    fork_fields(request, parent.request),
                    limits,
                    text=self._text,
                    request_id=_new_id(),
                    seed=seed,
                    eos_token_ids=eos,
                )

            admitted = await self._in_thread(4 * len(parent.request.prompt), lambda: in_public_names(parse))
            if len(outputs) >= (admitted.params.max_tokens or 0):
                limit = f"be above the {len(outputs)} that its parent has emitted"
                raise InvalidRequest("sampling.max_tokens", admitted.params.max_tokens, limit, "it counts those, too")
            salted = replace(admitted, cache_salt=parent.request.cache_salt)
            stream = self._stream(salted, caller, public.ForkGenerationResponse, began)
            with self._registered(stream):
                stream.inherit(outputs, logprobs)
                if not stream.is_over:
                    await self._dispatcher.fork(stream, parent, index, len(outputs))
                await stream.serve(caller.context)

    async def CancelGeneration(
        self, request: public.CancelGenerationRequest, caller: Caller
    ) -> public.CancelGenerationResponse:
        self._dispatcher.cancel(self._find(caller, "request_id", request.request_id))
        return public.CancelGenerationResponse()

    async def Tokenize(self, request: public.TokenizeRequest, caller: Caller) -> public.TokenizeResponse:
        self._check_model(request)
        limits, _ = await self._facts()
        ids = await self._in_thread(caller.size, lambda: self._tokenize(request, limits))
        return public.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: public.DetokenizeRequest, caller: Caller) -> public.DetokenizeResponse:
        self._check_model(request)
        limits, _ = await self._facts()
        tokenizer = self._need_text("token_ids").tokenizer
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True

        def decode() -> str:
            ids = list(request.token_ids)
            if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
                bad = next(each for each in ids if not 0 <= each < limits.vocab_size)
                raise InvalidRequest("token_ids", bad, f"hold whole numbers from 0 to {limits.vocab_size - 1} only")
            return tokenizer.decode(ids, skip_special_tokens=skip)

        return public.DetokenizeResponse(text=await self._in_thread(caller.size, decode))

    async def ListModels(self, request: public.ListModelsRequest, caller: Caller) -> public.ListModelsResponse:
        limits, _ = await self._facts()
        model = public.Model(
            name=self._config.model,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            has_tokenizer=self._text is not None,
            has_chat_template=self._text is not None and self._text.chat is not None,
        )
        return public.ListModelsResponse(models=[model])

    # quire.memory.v1 and quire.cluster.v1: the scheduler answers

    async def GetPageMap(self, request: memory_pb2.GetPageMapRequest, caller: Caller) -> bytes:
        return await self._ask(pb.Query(page_map=True, owner=caller.tenant))

    async def GetSequencePages(self, request: memory_pb2.GetSequencePagesRequest, caller: Caller) -> bytes:
        return await self._ask(pb.Query(sequence_pages=request.request_id, owner=caller.tenant))

    async def GetCluster(self, request: cluster_pb2.GetClusterRequest, caller: Caller) -> bytes:
        return await self._ask(pb.Query(cluster=True))

    async def GetLoads(self, request: cluster_pb2.GetLoadsRequest, caller: Caller) -> bytes:
        body = await self._ask(pb.Query(loads=True))
        if not self._keyed:
            return body
        loads = cluster_pb2.GetLoadsResponse.FromString(body)
        for load in loads.loads:  # another tenant's prompts can be guessed from what they find in pages
            load.ClearField("cached_tokens")
            load.ClearField("cached_blocks")
        return loads.SerializeToString()

    # The front's own life

    async def drain(self, seconds: float) -> bool:
        """Refuse new work; whether all that ran had ended after `seconds`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def slots(self) -> Mapping[int, tuple[int, int]]:
        """By shard: tokens of the samples that run there, and token places in the pages that these need."""
        found: dict[int, tuple[int, int]] = {}
        for stream in self._streams.values():
            if stream.placed is None:
                continue
            info = stream.placed.link.info
            for sample in stream.unfinished():
                count = len(stream.request.prompt) + len(sample.outputs)
                tokens, places = found.get(info.shard_id, (0, 0))
                size = max(1, info.block_size)
                found[info.shard_id] = tokens + count, places + -(-count // size) * size
        return found

    # Parts

    @contextlib.contextmanager
    def _call(self) -> Iterator[float]:
        """Around one generating call: bounds their number, counts them, and their outcomes. Gives when it began."""
        if self.draining:
            raise ServiceError("UNAVAILABLE", "this server is shutting down; try another, or again in a few seconds")
        if self._running >= self._limits.max_requests:
            raise Overloaded(f"{self._limits.max_requests} requests are in flight (max_requests); try again later")
        now = asyncio.get_running_loop().time
        began, outcome = now(), "cancelled"
        self._running += 1
        self._idle.clear()
        self._meter.began()
        try:
            yield began
            outcome = "ok"
        except QuireError as error:
            outcome = error.code.lower()
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
            self._meter.ended(outcome, now() - began)

    @contextlib.contextmanager
    def _registered(self, stream: Stream) -> Iterator[None]:
        """Known by its name while it is in flight; whatever ends the block ends it on its shard."""
        key = stream.tenant, stream.request.request_id
        if key in self._streams:
            raise AlreadyExists(
                f"request_id: {shown(stream.request.request_id)} is in flight; choose another or wait for its end"
            )
        self._streams[key] = stream
        try:
            yield
        finally:
            del self._streams[key]
            self._dispatcher.close(stream)

    def _stream(self, request: Request, caller: Caller, event: Any, began: float) -> Stream:
        return Stream(
            request,
            caller.tenant,
            self._tokenizer,
            event,
            self._meter,
            arrived=began,
            max_unsent=self._limits.max_unsent_bytes,
            write_seconds=self._limits.write_seconds,
            pace=self._pace,
        )

    def _pace(self) -> float:
        """Seconds between a stream's messages: longer the more streams there are, and none for a few."""
        return min(MAX_PACE_SECONDS, PACE_SECONDS * self._running) if self._running >= PACED_STREAMS else 0.0

    def _find(self, caller: Caller, field: str, request_id: str) -> Stream:
        """The caller's request of that name; one of another tenant is as unknown as one that never was."""
        stream = self._streams.get((caller.tenant, request_id))
        if stream is None or stream.is_over:
            raise NotFound(f"{field}: no request {shown(request_id)} is in flight")
        return stream

    def _check_model(self, request: Any) -> None:
        if request.HasField("model") and request.model != self._config.model:
            raise NotFound(f"model: {shown(request.model)} is not served here; ListModels says what is")

    def _next_seed(self) -> int:
        self._arrivals += 1
        base = self._config.seed
        if base is None:
            return secrets.randbits(63)
        # as the engine in one process gives them
        return int.from_bytes(sha256(f"quire seed {base} {self._arrivals}".encode()).digest()[:8], "little") >> 1

    async def _facts(self) -> tuple[Limits, tuple[int, ...]]:
        """Limits of requests and the ids that end text, by what the shards say."""
        infos = await self._dispatcher.infos()
        limits = Limits(
            vocab_size=min(info.vocab_size for info in infos),
            max_model_len=min(info.max_model_len for info in infos),
            max_pool_tokens=min(info.num_blocks * info.block_size for info in infos),
        )
        eos = tuple(array("i", infos[0].eos_token_ids))
        if not eos and self._tokenizer is not None and self._tokenizer.eos_id is not None:
            eos = (self._tokenizer.eos_id,)
        return limits, eos

    async def _in_thread(self, size: int, work: Callable[[], T]) -> T:
        """Run `work` where it does not hold up the streams."""
        most = self._limits.max_preparing_bytes
        if self._preparing + size > most:
            raise Overloaded(f"{most} bytes of requests wait to be tokenized (max_preparing_bytes); try again later")
        self._preparing += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._preparing -= size

    def _tokenize(self, request: public.TokenizeRequest, limits: Limits) -> list[int]:
        text = self._need_text("text")
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("input", "none of them", "be exactly one of text, chat")
        if kind == "text":
            value, special = request.text, not request.HasField("add_special_tokens") or request.add_special_tokens
        else:
            if text.chat is None:
                raise InvalidRequest("chat", "messages", "not be given: the model has no chat template", "send text")
            chat = text.chat
            messages = in_public_names(lambda: check_messages(chat_messages(request.chat)))
            value, special = in_public_names(lambda: chat.render(messages)), False
        if len(value.encode()) > limits.max_prompt_bytes:
            raise InvalidRequest(kind, f"{len(value)} characters", f"have at most {limits.max_prompt_bytes} bytes")
        return text.tokenizer.encode(value, add_special_tokens=special)

    def _need_text(self, field: str) -> Text:
        if self._text is None:
            raise InvalidRequest(field, "it", "not be given: the model folder has no tokenizer")
        return self._text

    async def _ask(self, query: pb.Query) -> bytes:
        return await self._dispatcher.scheduler.query(query, QUERY_SECONDS)


def _text(tokenizer: Tokenizer | None) -> Text | None:
    if tokenizer is None:
        return None
    source = tokenizer.chat_template
    chat = None if source is None else ChatTemplate(source, tokenizer.special_tokens, datetime.now)
    return Text(tokenizer, chat)


def _new_id() -> str:
    return f"req-{secrets.token_hex(8)}"

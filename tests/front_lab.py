"""A front in this process, between clients of gRPC and a scheduler and shards that do as they are told.

The fakes speak the real frames through `cluster.wire`. A fake shard's "model" is a formula, so a stream that was moved
from one shard to another must still be exactly what one shard would have said.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from cluster.front_config import FrontConfig, FrontLimits
from cluster.front_server import FrontServer
from cluster.wire import Listener, Peer, listen
from pagetable.frames import Kind
from pagetable.sampling import decode_params
from quire_pb.cluster.v1 import cluster_pb2_grpc
from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.inference.v1 import inference_pb2_grpc
from quire_pb.memory.v1 import memory_pb2_grpc
from quire_pb.worker.v1 import worker_pb2 as pb

SECRET = bytes(range(32))
VOCAB, EOS = 502, 0
SOON = 20.0  # generous: tests assert order, not time


def token_at(prompt: Sequence[int], sample: int, position: int) -> int:
    """The fake model: the token at an output position."""
    return 3 + (sum(prompt) * 31 + sample * 101 + position * 17 + position * position) % (VOCAB - 3)


def tokens(prompt: Sequence[int], count: int, sample: int = 0) -> list[int]:
    return [token_at(prompt, sample, position) for position in range(count)]


def int32(values: Sequence[int]) -> bytes:
    return array("i", values).tobytes()


def ints(data: bytes) -> list[int]:
    return array("i", data).tolist()


@dataclass
class FakeRun:
    """One submission, as a shard sees it."""

    peer: Peer
    submit: pb.Submit
    outputs: dict[int, list[int]]
    logprobs: bool = False

    @property
    def prompt(self) -> list[int]:
        return ints(self.submit.prompt)


@dataclass
class FakeShard:
    """A shard that steps when told to, or by itself where `pace` is set (seconds between steps).

    Attributes:
        frames: what fronts sent: (kind, message).
        refuse: by kind of frame, the code that it is refused with.
        kills: whether the next step of this one ends the process.
        deaf: it is dead already, and its connection does not show it yet: nothing that is sent arrives.
    """

    shard_id: int
    epoch: int = 1
    pace: float | None = None
    block_size: int = 16
    num_blocks: int = 4096
    max_model_len: int = 4096
    frames: list[tuple[Kind, Any]] = field(default_factory=list)
    runs: dict[int, FakeRun] = field(default_factory=dict)
    refuse: dict[Kind, str] = field(default_factory=dict)
    kills: Callable[[FakeRun], bool] | None = None
    deaf: bool = False
    num_steps: int = 0
    peers: list[Peer] = field(default_factory=list)
    address: str = ""
    _listener: Listener | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def info(self) -> pb.ShardInfo:
        return pb.ShardInfo(
            shard_id=self.shard_id,
            epoch=self.epoch,
            address=self.address,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            max_num_seqs=64,
            vocab_size=VOCAB,
            device_ids=[self.shard_id],
            model="fake",
            eos_token_ids=int32([EOS]),
            block_bytes=[1000],
        )

    async def start(self) -> None:
        self.address, self._listener = await listen("127.0.0.1", 0, SECRET, {pb.ROLE_FRONT}, self._serve)
        if self.pace is not None:
            self._task = asyncio.create_task(self._pace(self.pace))

    async def die(self) -> None:
        """The process is gone: connections end, nobody listens."""
        if self._task is not None:
            self._task.cancel()
        for peer in self.peers:
            peer.close()
        if self._listener is not None:
            await self._listener.close()
        self.runs.clear()

    def step(self, count: int = 1) -> None:
        """`count` steps: each one frame with a token for every sample that runs."""
        for _ in range(count):
            if self._is_killed():
                return
            self.num_steps += 1
            by_peer: dict[Peer, pb.Tokens] = {}
            for handle, run in list(self.runs.items()):
                frame = by_peer.setdefault(run.peer, pb.Tokens(step=self.num_steps, epoch=self.epoch))
                for sample in list(run.outputs):
                    self._token(frame, handle, run, sample)
                if not run.outputs:
                    del self.runs[handle]
            for peer, frame in by_peer.items():
                peer.send(Kind.TOKENS, frame)

    def say(self, delta: pb.Delta, epoch: int | None = None) -> None:
        """One delta to the front of the run that it names."""
        frame = pb.Tokens(step=self.num_steps, epoch=self.epoch if epoch is None else epoch, deltas=[delta])
        self.peers[-1].send(Kind.TOKENS, frame)

    def of(self, kind: Kind) -> list[Any]:
        return [message for known, message in self.frames if known is kind]

    def _token(self, frame: pb.Tokens, handle: int, run: FakeRun, sample: int) -> None:
        outputs = run.outputs[sample]
        outputs.append(token_at(run.prompt, sample, len(outputs)))
        delta = frame.deltas.add(handle=handle, sample=sample, token=outputs[-1])
        if run.logprobs:
            delta.logprobs.CopyFrom(pb.Logprobs(logprob=-len(outputs), rank=1, top_tokens=[7], top_logprobs=[-0.5]))
        if len(outputs) >= (decode_params(run.submit.params).max_tokens or 0):
            self._end(delta, run, sample, pb.FINISH_REASON_LENGTH)

    def _end(self, delta: pb.Delta, run: FakeRun, sample: int, reason: pb.FinishReason) -> None:
        delta.finish = reason
        delta.cached_tokens = 2
        total = len(run.prompt) + len(run.outputs.pop(sample))
        pages = range(-(-total // self.block_size))
        delta.page_devices.extend(self.shard_id for _ in pages)
        delta.page_blocks.extend(10 + page for page in pages)

    async def _pace(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            self.step()

    async def _serve(self, peer: Peer) -> None:
        self.peers.append(peer)
        peer.send(Kind.WELCOME, pb.Welcome(shard=self.info))
        async for kind, payload in peer.frames():
            self._take(peer, kind, payload)
        self.runs = {handle: run for handle, run in self.runs.items() if run.peer is not peer}

    def _take(self, peer: Peer, kind: Kind, payload: bytes) -> None:
        types = {Kind.SUBMIT: pb.Submit, Kind.FORK: pb.Fork, Kind.CANCEL: pb.Cancel, Kind.FINISH: pb.Finish}
        message: Any = types[kind].FromString(payload)
        if self.deaf:
            return
        self.frames.append((kind, message))
        if kind in self.refuse:
            refused = pb.Refused(handle=message.handle, code=self.refuse[kind], message="the fake refuses")
            peer.send(Kind.REFUSED, refused)
        elif kind is Kind.SUBMIT:
            self._begin(peer, message.handle, message, [])
        elif kind is Kind.FORK:
            parent = self.runs[message.parent_handle].outputs[message.parent_sample]
            self._begin(peer, message.handle, message.request, parent[: message.num_outputs])
        elif kind is Kind.CANCEL and (run := self.runs.pop(message.handle, None)) is not None:
            frame = pb.Tokens(step=self.num_steps, epoch=self.epoch)
            for sample in list(run.outputs):
                delta = frame.deltas.add(handle=message.handle, sample=sample)
                self._end(delta, run, sample, pb.FINISH_REASON_CANCELLED)
            peer.send(Kind.TOKENS, frame)
        elif kind is Kind.FINISH and message.handle in self.runs:
            run = self.runs[message.handle]
            frame = pb.Tokens(step=self.num_steps, epoch=self.epoch)
            delta = frame.deltas.add(handle=message.handle, sample=message.sample)
            self._end(delta, run, message.sample, pb.FINISH_REASON_STOP)
            if not run.outputs:
                del self.runs[message.handle]
            peer.send(Kind.TOKENS, frame)

    def _begin(self, peer: Peer, handle: int, submit: pb.Submit, outputs: list[int]) -> None:
        params = decode_params(submit.params)
        resumed = {each.sample: ints(each.outputs) for each in submit.samples}
        samples = resumed or {sample: list(outputs) for sample in range(params.n)}
        self.runs[handle] = FakeRun(peer, submit, samples, params.logprobs is not None)
        peer.send(Kind.BEGUN, pb.Begun(epoch=self.epoch, handles=[handle]))
        self._is_killed()

    def _is_killed(self) -> bool:
        if self.kills is None or not any(map(self.kills, self.runs.values())):
            return False
        for each in self.peers:
            each.close()
        return True


class FakeScheduler:
    """Places on the first shard that is announced and not excluded.

    Attributes:
        places: what was asked, in order.
        answers: by the query's kind, the serialized response.
    """

    def __init__(self, shards: Sequence[FakeShard]) -> None:
        self.states: dict[int, pb.ShardState] = {}
        self.places: list[pb.Place] = []
        self.queries: list[pb.Query] = []
        self.reports: list[pb.Report] = []
        self.answers: dict[str, bytes] = {}
        self.silent = False
        self.peers: list[Peer] = []
        self.address = ""
        self._listener: Listener | None = None
        for shard in shards:
            self.states[shard.shard_id] = pb.ShardState(info=shard.info, condition=pb.CONDITION_READY)

    async def start(self, port: int = 0) -> None:
        self.address, self._listener = await listen("127.0.0.1", port, SECRET, {pb.ROLE_FRONT}, self._serve)

    async def stop(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        self.peers.clear()

    def set(self, shard: FakeShard, condition: pb.Condition) -> None:
        """Tell all fronts of a shard's condition."""
        self.states[shard.shard_id] = pb.ShardState(info=shard.info, condition=condition)
        for peer in self.peers:
            peer.send(Kind.SHARDS, self.shards())

    def shards(self) -> pb.Shards:
        return pb.Shards(shards=[self.states[key] for key in sorted(self.states)])

    async def _serve(self, peer: Peer) -> None:
        self.peers.append(peer)
        peer.send(Kind.SHARDS, self.shards())
        async for kind, payload in peer.frames():
            if kind is Kind.PLACE:
                self._place(peer, pb.Place.FromString(payload))
            elif kind is Kind.QUERY:
                query = pb.Query.FromString(payload)
                self.queries.append(query)
                body = self.answers.get(query.WhichOneof("what") or "", b"")
                peer.send(Kind.ANSWER, pb.Answer(ticket=query.ticket, body=body))
            elif kind is Kind.REPORT:
                report = pb.Report.FromString(payload)
                self.reports.append(report)
                if self.states[report.shard_id].info.epoch == report.epoch:
                    self.states[report.shard_id].condition = pb.CONDITION_DEAD

    def _place(self, peer: Peer, place: pb.Place) -> None:
        self.places.append(place)
        if self.silent:
            return
        for shard_id, state in sorted(self.states.items()):
            if state.condition == pb.CONDITION_READY and shard_id not in place.exclude:
                placed = pb.Placed(ticket=place.ticket, placed=True, shard_id=shard_id, epoch=state.info.epoch)
                placed.address = state.info.address
                peer.send(Kind.PLACED, placed)
                return
        peer.send(Kind.PLACED, pb.Placed(ticket=place.ticket, code="UNAVAILABLE", message="no shard is ready"))


@dataclass
class Lab:
    """What a test holds in its hands."""

    scheduler: FakeScheduler
    shards: list[FakeShard]
    server: FrontServer
    port: int
    metrics_port: int
    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.inference: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.memory: Any = memory_pb2_grpc.MemoryServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.cluster: Any = cluster_pb2_grpc.ClusterServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def generate(self, prompt: Sequence[int], timeout: float | None = SOON, **fields: Any) -> Any:
        """A Generate call of token ids; `fields` are the sampling's, or the request's own."""
        own = {name: fields.pop(name) for name in ("request_id", "cache_salt", "model") if name in fields}
        sampling = public.SamplingParams(**{"max_tokens": 8, **fields})
        request = public.GenerateRequest(token_ids_le=int32(prompt), sampling=sampling, **own)
        return self.inference.Generate(request, timeout=timeout, metadata=self.metadata)

    def fork(self, parent: str, timeout: float | None = SOON, index: int = 0, **fields: Any) -> Any:
        request_id = fields.pop("request_id", None)
        request = public.ForkGenerationRequest(
            parent_request_id=parent,
            parent_index=index,
            request_id=request_id,
            sampling=public.SamplingParams(**fields),
        )
        return self.inference.ForkGeneration(request, timeout=timeout, metadata=self.metadata)

    async def health_status(self, service: str = "") -> str:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@contextlib.asynccontextmanager
async def lab(folder: Path, shards: Sequence[FakeShard] | None = None, **settings: Any) -> AsyncIterator[Lab]:
    """A front with its fakes, ready; everything is gone afterwards. `settings` are FrontConfig's and FrontLimits'."""
    found = list(shards) if shards is not None else [FakeShard(0, pace=0.002)]
    for shard in found:
        await shard.start()
    scheduler = FakeScheduler(found)
    await scheduler.start()
    names = FrontLimits.__dataclass_fields__
    limits = FrontLimits(**{name: settings.pop(name) for name in list(settings) if name in names})
    config = FrontConfig(
        scheduler=scheduler.address, secret=SECRET, folder=str(folder), model="fake", limits=limits, **settings
    )
    server = FrontServer(config)
    port, metrics_port = await server.start()
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.bdp_probe", 0),  # the window stays small: a client that does not read is soon noticed
    ]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    try:
        await until(lambda: len(server.dispatcher.shards.links) == len(found))
        yield Lab(scheduler, found, server, port, metrics_port, channel)
    finally:
        await channel.close()
        await server.stop()
        await scheduler.stop()
        for shard in found:
            await shard.die()


async def until(condition: Callable[[], Any], seconds: float = SOON) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Heard:
    """All that a stream said."""

    accepted: list[public.Accepted] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: list[public.Logprobs] = field(default_factory=list)
    scores: list[public.Logprobs] = field(default_factory=list)
    finished: dict[int, public.Finished] = field(default_factory=dict)
    num_deltas: int = 0

    def take(self, message: Any) -> None:
        kind = message.WhichOneof("event")
        if kind == "accepted":
            assert not self.num_deltas
            self.accepted.append(message.accepted)
        elif kind == "delta":
            delta = message.delta
            assert self.accepted
            assert delta.index not in self.finished
            self.num_deltas += 1
            self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
            self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
            self.logprobs.extend(delta.logprobs)
            self.scores.extend(delta.prompt_logprobs)
        else:
            assert message.finished.index not in self.finished
            self.finished[message.finished.index] = message.finished


async def hear(call: Any) -> Heard:
    """The whole stream."""
    heard = Heard()
    async for message in call:
        heard.take(message)
    return heard


@dataclass
class Refusal:
    """How a call failed."""

    code: str
    message: str
    reason: str
    fields: list[str]
    has_retry: bool


async def refusal(call: Any) -> Refusal:
    """The status of a call that must fail, with its details."""
    try:
        if isinstance(call, grpc.aio.UnaryUnaryCall):
            await call
        else:
            await hear(call)
    except grpc.aio.AioRpcError as error:
        return to_refusal(error)
    raise AssertionError("the call did not fail")


def to_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    found = Refusal(error.code().name, error.details() or "", "", [], False)
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            assert info.domain == "quire"
            found.reason = info.reason
        if detail.Is(bad.DESCRIPTOR) and detail.Unpack(bad):
            found.fields = [violation.field for violation in bad.field_violations]
        found.has_retry |= detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    return found

"""A shard's socket: requests in, tokens and events out. One thread runs the loop, one the sockets.

    socket thread (asyncio)                          loop thread
      frames -> inbox ------------------------------> handle, step
      one frame a step and connection <-------------- outbox

The loop thread is the only one that touches the scheduler. The socket thread answers pings, so a long step is seen as
such and not as a dead process.

A shard of several ranks lives from epoch to epoch: where one of them is lost, all connections end, as if this process
had died, and begin anew when the ranks are together again. Fronts place what ran here once more, from the tokens that
they have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from google.protobuf.message import Message

from pagetable.errors import InvalidRequest, QuireError
from pagetable.frames import NONCE_BYTES, BadFrame, FrameReader, Kind, encode_frame, is_proof
from pagetable.sampling import Limits, Request, decode_params, validate_params
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.events import Journal, page_load
from worker.loop import EpochOver, Loop
from worker.plan import Plan, TokenLogprobs
from worker.ranks import Ranks
from worker.sequence import FinishReason, TokenOutput

_log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 << 20  # a peer that reads so slowly is cut off
HELLO_SECONDS = 5.0
MAX_HELLO_BYTES = 1024
SENT_SECONDS, SENT_POLL_SECONDS = 0.5, 50e-6
IDLE_SECONDS, CHECK_SECONDS = 1.0, 60.0
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


class Connection(asyncio.Protocol):
    """One peer. Everything it sends before a valid Hello, and every frame that is none of ours, ends it."""

    def __init__(self, server: ShardServer, number: int) -> None:
        self.server, self.number = server, number
        self.role = pb.ROLE_UNSPECIFIED
        self.epoch = 0  # that the peer was told
        self._nonce = os.urandom(NONCE_BYTES)
        self._reader = FrameReader()
        self._head = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.send(Kind.CHALLENGE, pb.Challenge(nonce=self._nonce))
        asyncio.get_running_loop().call_later(HELLO_SECONDS, self._expire)

    def data_received(self, data: bytes) -> None:
        try:
            if self.role == pb.ROLE_UNSPECIFIED:  # a stranger makes us hold no more than a Hello
                self._head += data[: 4 - len(self._head)]
                if len(self._head) == 4 and int.from_bytes(self._head, "little") > MAX_HELLO_BYTES:
                    raise BadFrame("the first frame must be Hello")
            for kind, payload in self._reader.feed(data):
                if self.role == pb.ROLE_UNSPECIFIED:
                    self._greet(kind, payload)
                elif kind is Kind.PING:
                    self.send(Kind.PONG, self.server.pong(pb.Ping.FromString(payload).number))
                else:
                    self.server.post(self, kind, payload)
        except Exception as error:  # protobuf's DecodeError is no QuireError; whatever it was, this peer is done
            self.server.num_bad_frames += 1
            _log.warning("connection %d: %s", self.number, type(error).__name__)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.server.gone(self)

    def send(self, kind: Kind, message: Message) -> None:
        """From the socket thread."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(encode_frame(kind, message.SerializeToString()))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            _log.warning("connection %d does not read: cut off", self.number)
            transport.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _greet(self, kind: Kind, payload: bytes) -> None:
        if kind is not Kind.HELLO:
            raise BadFrame("the first frame must be Hello")
        hello = pb.Hello.FromString(payload)
        if not is_proof(self.server.secret, self._nonce, hello.role, hello.name, hello.proof):
            raise BadFrame("the proof of the cluster's secret is wrong")
        if hello.role not in (pb.ROLE_FRONT, pb.ROLE_SCHEDULER, pb.ROLE_ADMIN):
            raise BadFrame("no such role here")
        if not self.server.is_serving:
            self.close()
            return
        info = self.server.info
        self.role, self.epoch = hello.role, info.epoch
        self.send(Kind.WELCOME, pb.Welcome(shard=info))
        self.server.post(self, Kind.HELLO, payload)

    def _expire(self) -> None:
        if self.role == pb.ROLE_UNSPECIFIED:
            self.close()


@dataclass(slots=True)
class _Client:
    """What the loop thread knows of a connection: its requests by handle."""

    connection: Connection
    requests: dict[int, str] = field(default_factory=dict)


class ShardServer:
    """Serves one Loop on one socket.

    Args:
        info: what the shard is; its address is filled in once the socket listens.
        secret: the cluster's; who can't prove it is cut off.
        ranks: where the shard has several, formed for `info.epoch`.
        make_loop: a loop over them with no request and no page in use, for the next epoch.
        on_epoch: told of each end of an epoch (why, None), and of each that begins behind it ("", what the
            shard is now).

    Attributes:
        is_serving: whether an epoch is on; strangers are sent away meanwhile.
    """

    def __init__(
        self,
        loop: Loop,
        info: pb.ShardInfo,
        secret: bytes,
        ranks: Ranks | None = None,
        make_loop: Callable[[], Loop] | None = None,
        on_epoch: Callable[[str, pb.ShardInfo | None], None] = lambda why, info: None,
    ) -> None:
        self.loop, self.info, self.secret = loop, info, secret
        self.is_serving = True
        self._ranks, self._make_loop, self._on_epoch = ranks, make_loop, on_epoch
        if ranks is not None:
            ranks.on_over = lambda why: self._wake.set()
        self.num_bad_frames = 0
        self._limits = Limits(info.vocab_size, info.max_model_len, info.num_blocks * info.block_size)
        self._journal = Journal(loop.scheduler, info.epoch)
        loop.on_plan = self._planned
        self._inbox: deque[tuple[Connection, Kind | None, bytes]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._clients: dict[int, _Client] = {}
        self._owners: dict[str, tuple[_Client, int]] = {}  # internal request id -> who asked, and its handle
        self._begun: set[str] = set()  # of those, whom a plan named
        self._listener: _Client | None = None  # the scheduler
        self._num_queued = self._num_earlier = self._num_sent = 0  # frames of tokens; earlier: than the last step's
        self._numbers = iter(range(1 << 62))
        self._sockets: asyncio.AbstractEventLoop | None = None
        self._totals = pb.Load()
        self._step_began = 0.0
        self._checked_steps, self._checked_at = 0, -CHECK_SECONDS

    # Socket thread

    def start(self, host: str, port: int) -> str:
        """Listen; returns host:port. The socket thread runs until the process ends."""
        ready: threading.Event = threading.Event()
        found: list[str | BaseException] = []

        async def serve() -> None:
            try:
                self._sockets = asyncio.get_running_loop()
                server = await self._sockets.create_server(lambda: Connection(self, next(self._numbers)), host, port)
                name = server.sockets[0].getsockname()
                found.append(f"{name[0]}:{name[1]}")
                self.info.address = str(found[0])
            except OSError as error:
                found.append(error)
                return
            finally:
                ready.set()
            await server.serve_forever()

        threading.Thread(target=lambda: asyncio.run(serve()), name="sockets", daemon=True).start()
        ready.wait()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    def post(self, connection: Connection, kind: Kind | None, payload: bytes) -> None:
        """Hand a frame to the loop thread; kind None says that the connection is gone."""
        self._inbox.append((connection, kind, payload))
        self._wake.set()

    def gone(self, connection: Connection) -> None:
        self.post(connection, None, b"")

    def pong(self, number: int) -> pb.Pong:
        began = self._step_began
        return pb.Pong(
            number=number,
            epoch=self.info.epoch,
            steps=self._totals.steps,
            has_work=self.loop.has_work,
            step_age_seconds=time.monotonic() - began if began else 0.0,
        )

    # Loop thread

    def run(self) -> None:
        """Serve until `stop`."""
        with nullcontext() if self._ranks is None else self._ranks.cores.hold():
            self._run()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            while self._inbox:
                self._handle(*self._inbox.popleft())
            try:
                if self._ranks is not None:
                    self._ranks.check()
                if self.loop.has_work:
                    self._step()
                elif not self._wake.wait(IDLE_SECONDS):
                    self._check_when_idle()
            except EpochOver as over:
                self._renew(str(over))

    def stop(self) -> None:
        """From any thread, or a signal handler."""
        self._stopping = True
        self._wake.set()
        if self._ranks is not None:
            self._ranks.close()

    def _renew(self, why: str) -> None:
        """The epoch is over: part from everybody, wait for the ranks, begin the next with nothing of the last."""
        assert self._ranks is not None and self._make_loop is not None
        if self._stopping:
            return
        _log.warning("epoch %d is over: %s", self.info.epoch, why)
        self.is_serving = False
        self._step_began = 0.0
        self._on_epoch(why, None)
        for client in self._clients.values():
            self._call(client.connection.close)
        self._clients.clear()
        self._owners.clear()
        self._begun.clear()
        self._listener = None
        try:
            epoch = self._ranks.begin(self.info.epoch + 1)
        except EpochOver:  # the end of this process is what it was waiting for
            return
        self.loop = self._make_loop()
        self.loop.on_plan = self._planned
        self._journal = Journal(self.loop.scheduler, epoch)
        self._num_earlier = self._num_sent = self._num_queued
        info = pb.ShardInfo()
        info.CopyFrom(self.info)
        info.epoch = epoch
        self.info = info
        self.is_serving = True
        self._on_epoch("", info)

    def _step(self) -> None:
        self._step_began = began = time.monotonic()
        outputs = self.loop.step()
        seconds = time.monotonic() - began
        self._step_began = 0.0
        totals = self._totals
        totals.steps += 1
        totals.busy_seconds += seconds
        totals.last_step_seconds = seconds
        earlier = self._num_queued
        self._deliver(outputs)
        # made ahead, the next plan waits behind one that runs: there is time to send this step's too
        self._num_earlier = self._num_queued if self.loop.scheduler.config.async_scheduling else earlier
        self._report()

    def _planned(self, plan: Plan) -> None:
        """A plan is about to run, and may be what ends this process. On the wire before it does: the word to fronts of
        requests that it is the first to run, and what all steps but the last one said. So a front that takes a request
        up again has it at most one token short."""
        self._journal.record(plan)
        deadline = time.monotonic() + SENT_SECONDS
        while self._num_sent < self._num_earlier and time.monotonic() < deadline:
            time.sleep(SENT_POLL_SECONDS)
        if not plan.admits or not self._owners:
            return
        running = {sequence.sequence_id: sequence.request.request_id for sequence in self.loop.scheduler.running}
        frames: dict[int, pb.Begun] = {}
        for internal in dict.fromkeys(running[admit.sequence_id] for admit in plan.admits):
            if internal in self._owners and internal not in self._begun:
                self._begun.add(internal)
                client, handle = self._owners[internal]
                frame = frames.setdefault(client.connection.number, pb.Begun(epoch=self.info.epoch))
                frame.handles.append(handle)
        for number, frame in frames.items():
            self._send(self._clients[number].connection, Kind.BEGUN, frame)
        if frames:
            sent = threading.Event()
            self._call(self._when_written, sent.set)
            sent.wait(SENT_SECONDS)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """One Tokens frame to each front that has something to hear."""
        frames: dict[int, pb.Tokens] = {}
        ended: dict[str, None] = {}
        for output in outputs:
            found = self._owners.get(output.request_id)
            if output.token is not None:
                self._totals.output_tokens += 1
            if found is None:
                continue
            client, handle = found
            number = client.connection.number
            if number not in frames:
                frames[number] = pb.Tokens(step=self._totals.steps, epoch=self.info.epoch)
            _fill(frames[number].deltas.add(handle=handle, sample=output.sample_index), output)
            if output.finish_reason is not None:
                self._totals.cached_tokens += output.cached_tokens
                ended[output.request_id] = None
        for number, frame in frames.items():
            self._num_queued += 1
            self._call(self._send_tokens, self._clients[number].connection, frame)
        for internal in ended:  # only now: several samples of a request may end at once
            self._settle(internal)

    def _report(self) -> None:
        if self._listener is None:
            return
        scheduler = self.loop.scheduler
        load = page_load(scheduler.pool)
        load.MergeFrom(self._totals)
        load.schedule_seconds, load.run_seconds = self.loop.schedule_seconds, self.loop.run_seconds
        load.retire_seconds = self.loop.retire_seconds
        load.running, load.waiting = len(scheduler.running), len(scheduler.waiting)
        load.preemptions = scheduler.num_preemptions
        events = self._journal.take(load)
        if events is not None:
            self._send(self._listener.connection, Kind.EVENTS, events)

    def _settle(self, internal: str) -> None:
        """Forget a request that has no unfinished sample."""
        if not self.loop.scheduler.is_in_flight(internal):
            client, handle = self._owners.pop(internal)
            self._begun.discard(internal)
            client.requests.pop(handle, None)
            self._journal.forget(internal)

    def _handle(self, connection: Connection, kind: Kind | None, payload: bytes) -> None:
        if kind is None:
            self._disconnect(connection)
        elif kind is Kind.HELLO and connection.epoch != self.info.epoch:
            self._call(connection.close)  # welcomed while that epoch ended: it would drop all that this one says
        elif kind is Kind.HELLO:
            self._clients[connection.number] = client = _Client(connection)
            if connection.role == pb.ROLE_SCHEDULER:
                self._listener = client
                self._journal.begin()
                self._report()
        elif connection.number in self._clients and connection.role == pb.ROLE_FRONT:
            self._handle_front(self._clients[connection.number], kind, payload)

    def _handle_front(self, client: _Client, kind: Kind, payload: bytes) -> None:
        handle = 0
        try:
            if kind is Kind.SUBMIT:
                submit = pb.Submit.FromString(payload)
                handle = submit.handle
                resumed = {each.sample: self._tokens("outputs", each.outputs) for each in submit.samples} or None
                self._take_up(client, submit, lambda request: self.loop.add(request, resumed))
            elif kind is Kind.FORK:
                fork = pb.Fork.FromString(payload)
                handle = fork.handle
                parent = client.requests.get(fork.parent_handle, "")
                self._take_up(
                    client,
                    fork.request,
                    lambda request: self.loop.fork(parent, fork.parent_sample, request, fork.num_outputs),
                    handle,
                )
            elif kind is Kind.CANCEL:
                internal = client.requests.get(pb.Cancel.FromString(payload).handle)
                if internal is not None:  # else it has just ended
                    self._deliver(self.loop.cancel(internal))
                    self._report()
            elif kind is Kind.FINISH:
                finish = pb.Finish.FromString(payload)
                internal = client.requests.get(finish.handle, "")
                if self.loop.scheduler.is_in_flight(internal, finish.sample):
                    ended = self.loop.finish(internal, finish.sample, FinishReason.STOP, finish.stop_reason)
                    self._deliver([ended])
                    self._report()
        except QuireError as error:
            refused = pb.Refused(handle=handle, code=error.code, field=getattr(error, "field", ""), message=str(error))
            self._send(client.connection, Kind.REFUSED, refused)
        except Exception as error:  # a frame that protobuf can't read, ids that are none: this peer is done
            _log.warning("connection %d: %s", client.connection.number, type(error).__name__)
            self.num_bad_frames += 1
            self._call(client.connection.close)

    def _take_up(
        self, client: _Client, submit: pb.Submit, begin: Callable[[Request], None], handle: int | None = None
    ) -> None:
        handle = submit.handle if handle is None else handle
        internal = f"{client.connection.number}:{handle}"
        request = Request(
            internal,
            tuple(self._tokens("prompt", submit.prompt)),
            decode_params(submit.params),
            tuple(_ints(submit.eos_token_ids)),
            submit.cache_salt,
        )
        validate_params(request.params, self._limits)  # what the front let pass must not end a step of all
        begin(request)
        self._journal.name(internal, submit.request_id, submit.owner)
        client.requests[handle] = internal
        self._owners[internal] = client, handle
        self._totals.prompt_tokens += len(request.prompt)

    def _tokens(self, field: str, data: bytes) -> array[int]:
        """int32 little-endian token ids, all in the vocabulary."""
        values = _ints(data)
        if values and not (min(values) >= 0 and max(values) < self.info.vocab_size):
            bad = next(value for value in values if not 0 <= value < self.info.vocab_size)
            raise InvalidRequest(field, bad, f"hold whole numbers from 0 to {self.info.vocab_size - 1} only")
        return values

    def _disconnect(self, connection: Connection) -> None:
        """A front is gone: its requests end. The scheduler is gone: nobody listens."""
        client = self._clients.pop(connection.number, None)
        if client is None:
            return
        if client is self._listener:
            self._listener = None
            self._journal.stop()
        for internal in list(client.requests.values()):
            self.loop.cancel(internal)
            self._owners.pop(internal, None)
            self._begun.discard(internal)
            self._journal.forget(internal)
        self._report()

    def _check_when_idle(self) -> None:
        """Recount all books after work, when nobody waits; a disagreement is a bug and ends the process.

        It takes 0.15 s for 65,536 blocks, so not after each burst.
        """
        now = time.monotonic()
        if self._checked_steps != self._totals.steps and now - self._checked_at > CHECK_SECONDS:
            self._checked_steps, self._checked_at = self._totals.steps, now
            self.loop.scheduler.check()

    def _send_tokens(self, connection: Connection, tokens: pb.Tokens) -> None:
        """On the socket thread."""
        try:
            connection.send(Kind.TOKENS, tokens)
        finally:
            self._when_written(self._count_sent)

    def _count_sent(self) -> None:
        self._num_sent += 1

    def _when_written(self, function: Callable[[], None]) -> None:
        """On the socket thread. uvloop writes at the end of a turn: what the next one calls comes after."""
        assert self._sockets is not None
        self._sockets.call_soon(function)

    def _send(self, connection: Connection, kind: Kind, message: Message) -> None:
        self._call(connection.send, kind, message)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        assert self._sockets is not None
        self._sockets.call_soon_threadsafe(function, *args)


def _fill(delta: pb.Delta, output: TokenOutput) -> None:
    if output.token is not None:
        delta.token = output.token
    if output.logprobs is not None:
        _fill_logprobs(delta.logprobs, output.logprobs)
    for score in output.scores:
        _fill_logprobs(delta.scores.add(), score)
    if output.finish_reason is not None:
        delta.finish = _FINISH[output.finish_reason]
        delta.failure = output.failure
        delta.cached_tokens = output.cached_tokens
        if isinstance(output.stop_reason, int):
            delta.stop_token = output.stop_reason
        for device, block in output.pages:
            delta.page_devices.append(device)
            delta.page_blocks.append(block)


def _fill_logprobs(target: pb.Logprobs, found: TokenLogprobs) -> None:
    target.logprob, target.rank = found.logprob, found.rank
    target.top_tokens.extend(token for token, _ in found.top)
    target.top_logprobs.extend(logprob for _, logprob in found.top)


def _ints(data: bytes) -> array[int]:
    """int32 little-endian."""
    values = array("i")
    values.frombytes(data)
    if values.itemsize != 4:
        raise BadFrame("this machine's int is not 4 bytes")
    return values

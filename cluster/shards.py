"""A front's connections to the shards: one to each that lives; requests go in, one frame of tokens a step comes back.

A connection that ends, a newer epoch and the scheduler's word that a shard is dead are the same to those who run there:
lost, to be run elsewhere. What a lost connection may still say is never read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from google.protobuf.message import DecodeError

from cluster.grpc_errors import unexpected
from cluster.streams import Stream
from cluster.wire import Link
from pagetable.errors import ServiceError
from pagetable.frames import Kind
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

WELCOME_SECONDS = 5.0
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 1.0
PROOF_STEPS = 2  # a shard's last step may be lost with it, so the second one here is again the one that killed it
LAST_WORDS_SECONDS = 0.2  # for what is on its way from a shard that the scheduler calls dead
_SERVING = (pb.CONDITION_READY, pb.CONDITION_DRAINING)


@dataclass(slots=True)
class Run:
    """A submission: a request, or what was left of one, on one shard.

    Attributes:
        open: samples that the shard has not ended.
        begun: the shard has begun a step with it.
        num_steps, last_step: that it has made, counted to PROOF_STEPS, and the shard's number of the last of them.
        proven: it has made PROOF_STEPS, or is over: nobody need wait to see.
        is_fork: of a sequence that the shard already has.
    """

    link: ShardLink
    handle: int
    stream: Stream
    open: set[int]
    begun: bool = False
    num_steps: int = 0
    last_step: int = -1
    proven: asyncio.Event = field(default_factory=asyncio.Event)
    is_fork: bool = False

    @property
    def is_proven(self) -> bool:
        return self.num_steps >= PROOF_STEPS

    def count(self, step: int) -> None:
        """A step has said something about it; the samples of a request share their steps."""
        if step != self.last_step:
            self.begun, self.last_step = True, step
            self.num_steps += 1
            if self.is_proven:
                self.proven.set()


class Owner(Protocol):
    """Who is told of what becomes of runs."""

    def lost(self, runs: list[Run]) -> None:
        """Their shard is gone."""
        ...

    def refused(self, run: Run, error: ServiceError) -> None:
        """Their shard does not take it."""
        ...


class ShardLink:
    """One connection to one life of a shard.

    Attributes:
        runs: by handle; until the shard has ended all samples, or nobody wants them any more.
        trial: held while a request that has seen a shard die is not proven here, so that of several only one can be
            what kills this one.
    """

    _handles = count(1)

    def __init__(self, info: pb.ShardInfo, link: Link, owner: Owner) -> None:
        self.info, self._link, self._owner = info, link, owner
        self.runs: dict[int, Run] = {}
        self.trial = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._link.is_open

    def submit(self, stream: Stream) -> Run:
        """Run all of it that is unfinished."""
        run = self._begin(stream)
        self._link.send(Kind.SUBMIT, stream.submission(run.handle))
        return run

    def fork(self, stream: Stream, parent: Run, sample: int, num_outputs: int) -> Run:
        """Run `stream` from the first outputs of a sample that runs here."""
        run = self._begin(stream)
        run.is_fork = True
        fork = pb.Fork(
            handle=run.handle,
            parent_handle=parent.handle,
            parent_sample=sample,
            num_outputs=num_outputs,
            request=stream.submission(run.handle),
        )
        del fork.request.samples[:]
        self._link.send(Kind.FORK, fork)
        return run

    def cancel(self, run: Run) -> None:
        """Ask for the end of all its samples; the shard says each."""
        self._link.send(Kind.CANCEL, pb.Cancel(handle=run.handle))

    def drop(self, run: Run) -> None:
        """Nobody wants to hear of it any more."""
        if self.runs.pop(run.handle, None) is not None and run.open:
            self.cancel(run)
        run.proven.set()

    async def read(self) -> None:
        """Until the connection is over."""
        async for kind, payload in self._link.frames():
            if kind is Kind.TOKENS:
                self._take(pb.Tokens.FromString(payload))
            elif kind is Kind.BEGUN:
                self._note(pb.Begun.FromString(payload))
            elif kind is Kind.REFUSED:
                self._refuse(pb.Refused.FromString(payload))

    def close(self) -> list[Run]:
        """Hang up; what ran here."""
        self._link.close()
        runs, self.runs = list(self.runs.values()), {}
        for run in runs:
            run.proven.set()
        return runs

    def _begin(self, stream: Stream) -> Run:
        open_samples = {sample.index for sample in stream.unfinished()}
        run = Run(self, next(self._handles), stream, open_samples)
        self.runs[run.handle] = run
        return run

    def _take(self, tokens: pb.Tokens) -> None:
        if tokens.epoch != self.info.epoch:
            return
        now = asyncio.get_running_loop().time()
        for delta in tokens.deltas:
            run = self.runs.get(delta.handle)
            if run is not None:
                if run.num_steps < PROOF_STEPS:
                    run.count(tokens.step)
                self._push(run, delta, now)

    def _note(self, begun: pb.Begun) -> None:
        for handle in begun.handles if begun.epoch == self.info.epoch else ():
            if (run := self.runs.get(handle)) is not None:
                run.begun = True

    def _push(self, run: Run, delta: pb.Delta, now: float) -> None:
        stream = run.stream
        try:
            stop = stream.push(delta, now)
        except Exception as error:  # one request's text or frame: no reason to lose the others
            _log.error("a request failed on what its shard said", exc_info=error)
            stream.fail(unexpected(error))
            stop = None
        if stop is not None:
            finish = pb.Finish(handle=run.handle, sample=delta.sample, stop_reason=stop)
            self._link.send(Kind.FINISH, finish)
        if delta.finish:
            run.open.discard(delta.sample)
        if not run.open or stream.failure is not None:
            self.drop(run)

    def _refuse(self, refused: pb.Refused) -> None:
        run = self.runs.pop(refused.handle, None)
        if run is not None:
            run.open.clear()
            run.proven.set()
            self._owner.refused(run, ServiceError(refused.code, refused.message, refused.field))


@dataclass(slots=True)
class _Shard:
    info: pb.ShardInfo
    condition: int
    task: asyncio.Task[None] | None = None
    link: ShardLink | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False


class ShardLinks:
    """All shards that the scheduler told of.

    Args:
        owner: told of lost and refused runs.
        report: tells the scheduler of a lost connection: shard id, epoch, why.
        on_change: called when a connection comes or goes, or a condition changes.
    """

    def __init__(
        self,
        secret: bytes,
        name: str,
        owner: Owner,
        report: Callable[[int, int, str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._secret, self._name, self._owner = secret, name, owner
        self._report, self._on_change = report, on_change
        self._shards: dict[int, _Shard] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._known = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether some shard takes requests."""
        return any(s.link is not None and s.condition == pb.CONDITION_READY for s in self._shards.values())

    @property
    def infos(self) -> list[pb.ShardInfo]:
        """Of every shard that was ever told of, its newest life."""
        return [shard.info for _, shard in sorted(self._shards.items())]

    @property
    def links(self) -> list[ShardLink]:
        return [shard.link for shard in self._shards.values() if shard.link is not None]

    async def wait_known(self, seconds: float) -> bool:
        """Whether some shard was told of, at the latest after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._known.wait()
        return self._known.is_set()

    def update(self, shards: pb.Shards) -> None:
        """What the scheduler says now. One that it does not name goes on as it is: it may just have been restarted."""
        for state in shards.shards:
            known = self._shards.get(state.info.shard_id)
            if known is not None and state.info.epoch < known.info.epoch:
                continue
            if known is None or state.info.epoch > known.info.epoch:
                if known is not None:
                    self._end(known)
                known = self._shards[state.info.shard_id] = _Shard(state.info, state.condition)
            known.condition = state.condition
            if state.condition == pb.CONDITION_DEAD:
                self._end(known)
            elif state.condition in _SERVING and known.task is None:
                if known.is_over:
                    known = self._shards[state.info.shard_id] = _Shard(state.info, state.condition)
                known.info = state.info
                known.task = asyncio.create_task(self._serve(known), name=f"shard {state.info.shard_id}")
                self._serving.add(known.task)
                known.task.add_done_callback(self._serving.discard)
            if state.info.vocab_size:
                self._known.set()
        self._on_change()

    async def get(self, shard_id: int, epoch: int, seconds: float) -> ShardLink | None:
        """The connection to that life of a shard; None where there is none after `seconds`."""
        shard = self._shards.get(shard_id)
        if shard is None or shard.info.epoch != epoch:
            return None
        if shard.link is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await shard.up.wait()
        return shard.link

    async def close(self) -> None:
        tasks = list(self._serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, shard: _Shard) -> None:
        """This life is over. The scheduler may say so before we have read all that it sent, and that comes first: a
        request that lacks more than the last step's tokens makes progress where it runs next, and is not blamed."""
        task, shard.task = shard.task, None
        if task is None:
            return
        shard.is_over = True
        if shard.link is None:
            task.cancel()
            return
        asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._cut, shard, task)

    def _cut(self, shard: _Shard, task: asyncio.Task[None]) -> None:
        if not task.done():
            task.cancel()
            self._lose(shard)

    def _lose(self, shard: _Shard) -> None:
        link, shard.link = shard.link, None
        shard.up.clear()
        if link is not None:
            runs = link.close()
            self._on_change()
            self._owner.lost(runs)

    async def _serve(self, shard: _Shard) -> None:
        """Dial, and dial again, until that life is over."""
        info, delay = shard.info, MIN_RETRY_SECONDS
        while not shard.is_over:
            why = "closed"
            try:
                link = await Link.connect(info.address, pb.ROLE_FRONT, self._name, self._secret)
                try:
                    await _welcome(link, info)
                    shard.link = ShardLink(info, link, self._owner)
                    shard.up.set()
                    self._on_change()
                    delay = MIN_RETRY_SECONDS
                    await shard.link.read()
                finally:
                    why = link.why
                    link.close()
            except (OSError, DecodeError) as error:
                why = why or type(error).__name__
            if shard.link is not None:
                _log.warning("shard %d, epoch %d: the connection is over: %s", info.shard_id, info.epoch, why)
                self._report(info.shard_id, info.epoch, why)
            self._lose(shard)
            await asyncio.sleep(delay)
            delay = min(MAX_RETRY_SECONDS, 2 * delay)


async def _welcome(link: Link, info: pb.ShardInfo) -> None:
    """Raises ConnectionError where something else than that life of that shard listens there."""
    async with asyncio.timeout(WELCOME_SECONDS):
        async for kind, payload in link.frames():
            told = pb.Welcome.FromString(payload).shard if kind is Kind.WELCOME else pb.ShardInfo()
            if (told.shard_id, told.epoch) == (info.shard_id, info.epoch) and kind is Kind.WELCOME:
                return
            break
    raise ConnectionError("not the shard that was announced")

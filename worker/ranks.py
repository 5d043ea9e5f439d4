"""The ranks of a shard as its leader sees them: one process each, all together for one epoch at a time.

    form:   every rank is ready -> Form to all -> every rank has formed -> plans
    plan:   leader --star of sockets--> all ranks of all stages; hidden rows and sums go between ranks (worker/group.py)
            the last stage's first tensor rank --> leader: the result
    over:   a connection that ends, silence, an error in a step -> abort -> every rank leaves and says ready again

The leader is rank 0 and runs the first stage's part itself. Each plan carries the digest of all plans before it, so
ranks whose tables could differ find out before they compute.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

from kernels.peers import PeersBroken
from pagetable.frames import BadFrame, Kind, encode_frame
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.broadcast import Broadcast
from worker.channel import Channel
from worker.codec import decode_result, encode_plan
from worker.door import Door
from worker.group import Group, needs_store
from worker.layout import Part
from worker.loop import EpochOver
from worker.page_reads import PageReads, refusal
from worker.plan import Plan, StepResult
from worker.runner import Runner
from worker.segment import Plan as SegmentPlan
from worker.segment import Segment, Sizes, host_key
from worker.ways import Ways

_log = logging.getLogger(__name__)

PING_SECONDS = 1.0
MAX_UNANSWERED = 5  # pings in a row: the rank is stopped or its host is gone
LEAVE_SECONDS = 15.0  # a rank that answers but has not left its epoch by then is ended
HANG_SECONDS = 2.0  # the same of one whose step has run for longer than any may
FORM_SECONDS = 30.0  # for all ranks to come in once all are ready
BLAME_SECONDS = 0.5  # whoever broke an epoch has said so by then; others only see it broken
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 2.0  # between tries to form
DIGEST_BYTES = 8


class Chain:
    """The digest of all plans of an epoch so far."""

    def __init__(self) -> None:
        self.value = bytes(DIGEST_BYTES)

    def add(self, plan: bytes) -> None:
        self.value = hashlib.blake2b(plan, digest_size=DIGEST_BYTES, key=self.value).digest()


@dataclass(slots=True)
class _Member:
    """A rank's process, from its control connection to the end of that."""

    control: Channel
    ready: pb.RankReady | None = None
    formed: int = 0
    step_age: float = 0.0  # seconds that its step had run when it last answered
    unanswered: int = 0  # pings; not seconds: a leader that was stopped itself blames nobody for it
    why: str = ""  # it had to go
    since: float = field(default_factory=time.monotonic)
    reads: PageReads = field(init=False)

    def __post_init__(self) -> None:
        self.reads = PageReads(self.control)


class Ranks:
    """A `worker.loop.Pipe` over all ranks of a shard.

    Args:
        part: the leader's own.
        sizes: of messages, equal on all ranks.
        identity: of model, layout and configuration; a rank with another is refused.
        ways: how ranks talk to each other.
        overlaps: with one stage, too, the leader's own part runs on a thread of its own (asynchronous scheduling).
        on_over: told once of each epoch's end, from any thread.

    Attributes:
        runner: the leader's own; to be set before the first epoch. Ranks may come before.
        step_seconds: a plan that has not come back by then ends its epoch; who does not leave then hangs and is ended.
        num_plan_bytes: of all plans sent, to all ranks together.
    """

    def __init__(
        self,
        part: Part,
        sizes: Sizes,
        identity: bytes,
        secret: bytes,
        ways: Ways | None = None,
        overlaps: bool = False,
        on_over: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.part, self.layout = part, part.layout
        self.runner: Runner | None = None
        self.on_over = on_over
        self.step_seconds = math.inf
        self.epoch = 0
        self._num_bad_frames = 0  # beside those at the door
        self.num_plan_bytes = 0
        self._sizes, self._identity, self._secret = sizes, identity, secret
        self._ways = ways or Ways()
        self._overlaps = overlaps or self.layout.pipeline > 1
        self._members: dict[int, _Member] = {}
        self._refused: dict[int, str] = {}  # ranks that came and may not, and why
        self._plans: dict[tuple[int, int], Channel] = {}  # by rank and epoch
        self._broadcast: Broadcast | None = None
        self._num_out = 0  # plans without a result
        self._num_moves = 0  # plans sent and results received
        self._changed = threading.Condition()
        self._group: Group | None = None
        self._over: str | None = "no epoch has begun"
        self._chain = Chain()
        self._own: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        self._computing: threading.Thread | None = None
        self._door: Door | None = None
        self._closed = False
        self._stopped = threading.Event()

    # Ranks come and go: threads of connections

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """Let ranks come; returns where. Raises OSError."""
        self._door = Door(host, port, self.layout.num_ranks, self._secret, self._enter)
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()
        return self._door.address

    @property
    def num_bad_frames(self) -> int:
        """Connections that ended because of what came over them."""
        return self._num_bad_frames + (self._door.num_bad if self._door is not None else 0)

    def close(self) -> None:
        """End the epoch and every connection: the ranks' processes look for another leader. From any thread."""
        self._closed = True
        self._stopped.set()
        self.end("the leader has ended")
        self._own.put(None)  # behind whatever it has to run yet
        if self._door is not None:
            self._door.close()
        with self._changed:
            for member in self._members.values():
                member.control.shut()
            self._changed.notify_all()

    def _enter(self, channel: Channel, rank: int, epoch: int | None) -> None:
        if epoch is None:
            self._serve(rank, channel)
        else:
            self._keep(rank, epoch, channel)

    def _keep(self, rank: int, epoch: int, channel: Channel) -> None:
        """A rank's connection for the plans of one epoch."""
        with self._changed:
            if epoch != self.epoch or self._over is not None:
                channel.shut()
                return
            old = self._plans.pop((rank, epoch), None)
            self._plans[rank, epoch] = channel
            self._changed.notify_all()
        if old is not None:
            old.shut()

    def _serve(self, rank: int, channel: Channel) -> None:
        """A rank's control connection, to its end."""
        member = _Member(channel)
        with self._changed:
            if self._closed:
                channel.shut()
                return
            old = self._members.get(rank)
            self._members[rank] = member
        if old is not None:
            old.control.shut()
            self.end(f"rank {rank} came anew")
        why = "its connection has ended"
        try:
            while True:
                kind, payload = channel.receive()
                self._hear(rank, member, kind, payload)
        except OSError as error:
            why = member.why or str(error) or why
        except (BadFrame, DecodeError) as error:
            self._num_bad_frames += 1
            why = str(error)
        with self._changed:
            is_present = self._members.get(rank) is member
            if is_present:
                del self._members[rank]
            self._changed.notify_all()
        channel.shut()
        member.reads.end()
        if is_present:
            self.end(f"rank {rank} is gone ({why})")

    def _hear(self, rank: int, member: _Member, kind: Kind, payload: bytes) -> None:
        member.unanswered = 0
        if kind is Kind.RANK_READY:
            self._welcome(rank, member, pb.RankReady.FromString(payload))
        elif kind is Kind.PONG:
            member.step_age = pb.Pong.FromString(payload).step_age_seconds
        elif kind is Kind.FORMED:
            formed = pb.Formed.FromString(payload)
            with self._changed:
                member.formed = formed.epoch
                self._changed.notify_all()
        elif kind is Kind.PAGES_READ:
            member.reads.hear(payload)
        elif kind is Kind.BROKEN:
            broken = pb.Broken.FromString(payload)
            if broken.why:
                self.end(f"rank {rank}: {broken.why}", broken.epoch)
            else:
                self._break(f"rank {rank} has lost the others", broken.epoch)

    def _welcome(self, rank: int, member: _Member, ready: pb.RankReady) -> None:
        """Raises BadFrame where it cannot be a rank of this shard."""
        if ready.identity == self._identity and ready.rank == rank:
            with self._changed:
                member.ready = ready
                self._refused.pop(rank, None)
                self._changed.notify_all()
            return
        why = "its model, layout or configuration is another than the leader's"
        if self._refused.get(rank) != why:
            _log.warning("rank %d is refused: %s", rank, why)
        self._refused[rank] = why
        self._fence(member, why)
        raise BadFrame(why)

    def _watch(self) -> None:
        """Ask every rank whether it lives; its answer comes from a thread that a step does not hold up."""
        number = moves = still = 0
        while not self._stopped.wait(PING_SECONDS):
            number += 1
            with self._changed:
                members = list(self._members.items())
            for rank, member in members:
                member.unanswered += 1
                if member.unanswered > MAX_UNANSWERED:
                    member.why = f"it has not answered for {MAX_UNANSWERED * PING_SECONDS:.0f} s"
                    _log.warning("rank %d: %s", rank, member.why)
                    member.control.shut()
                    continue
                with contextlib.suppress(OSError):
                    member.control.send(Kind.PING, pb.Ping(number=number).SerializeToString())
            still = still + 1 if self._num_out and moves == self._num_moves else 0
            moves = self._num_moves
            if still * PING_SECONDS > self.step_seconds:
                self.end(f"a step has run for more than {self.step_seconds:.0f} s")

    # Epochs: the thread that steps

    def begin(self, epoch: int) -> int:
        """Form, however many tries it takes; the epoch's number, `epoch` or above. Raises EpochOver once closed."""
        pause = RETRY_SECONDS
        while True:
            self.leave()
            try:
                self.form(epoch)
                return epoch
            except EpochOver as over:
                if self._closed:
                    raise
                _log.warning("epoch %d did not begin: %s", epoch, over)
                epoch += 1
            with self._changed:  # not the event: a signal's handler may set that while this thread waits
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    def form(self, epoch: int, patience: float | None = None) -> None:
        """Wait for all ranks and begin an epoch with them; `leave` the last one before.

        Raises EpochOver where not all are there after `patience` seconds (None: for ever) or one is lost meanwhile.
        """
        members = self._await_ready(epoch, patience)
        own = pb.RankReady(rank=0, host=host_key(), address=self._own_address(), identity=self._identity)
        form = pb.Form(epoch=epoch)
        segment: Segment | None = None
        store = None
        with self._changed:
            self.epoch, self._over = epoch, None
            ready = [member.ready for _, member in sorted(members.items()) if member.ready is not None]
            for member in members.values():
                member.ready = None
        try:
            segment = Segment(SegmentPlan(self.layout, self._sizes).num_bytes)
            own.segment = segment.path
            form.members.extend([own, *ready])
            if len(form.members) != self.layout.num_ranks:
                raise ConnectionError("a rank has gone")
            if needs_store(self.layout, form.members, self._ways):
                from worker.gloo import Store

                store = Store(own.address)
                form.store = store.address
            group = self._group = Group(self.part, self._sizes, form, self._ways)
            for member in members.values():
                member.control.send(Kind.FORM, form.SerializeToString())
            group.form()
            self._await_formed(epoch, members)
        except (OSError, RuntimeError, ValueError) as error:
            self._break(f"the epoch did not form: {error}")
            self.check()
            raise
        finally:
            if segment is not None:
                segment.close()
            del store
        self.check()
        self._chain = Chain()
        self._num_out = 0
        with self._changed:
            channels = {rank: self._plans[rank, epoch] for rank in members}
        self._broadcast = group.make_broadcast(channels)
        self._own_runner.reset(group)
        self._own, self._found = queue.SimpleQueue(), queue.SimpleQueue()
        if self._overlaps:
            queues = self._own, self._found
            self._computing = threading.Thread(target=self._compute, args=queues, name="stage", daemon=True)
            self._computing.start()

    def leave(self) -> None:
        """The epoch is over and its last plan with it: give its memory back. The thread that steps calls this."""
        self.end("the leader left")
        if self._computing is not None:
            self._own.put(None)
            self._computing.join()
            self._computing = None
        if self.runner is not None:
            self.runner.reset(None)
        if self._group is not None:
            self._group.close()
            self._group = None
        self._broadcast = None
        self._num_out = 0
        with self._changed:
            for channel in self._plans.values():
                channel.shut()
            self._plans.clear()

    def end(self, why: str, epoch: int | None = None) -> None:
        """The present epoch is over, for all ranks. From any thread; the first reason counts.

        Args:
            epoch: which one, where it could be another one by now.
        """
        with self._changed:
            if self._over is not None or epoch not in (None, self.epoch):
                return
            self._over = why
            group, epoch = self._group, self.epoch
            channels = [channel for (_, number), channel in self._plans.items() if number == epoch]
            controls = [member.control for member in self._members.values()]
            self._changed.notify_all()
        if group is not None:
            group.abort()
        for channel in channels:
            channel.shut()
        abort = encode_frame(Kind.ABORT, pb.Abort(epoch=epoch, why=why).SerializeToString())
        for control in controls:
            with contextlib.suppress(OSError):
                control.send_frame(abort)
        self.on_over(why)

    def _break(self, why: str, epoch: int | None = None) -> None:
        """As `end`, from somebody who only sees that others are gone: whoever knows why says it first."""
        with self._changed:
            over = self.epoch if epoch is None else epoch
            self._changed.wait_for(lambda: self._over is not None or self.epoch != over, BLAME_SECONDS)
        self.end(why, over)

    def _await_ready(self, epoch: int, patience: float | None) -> dict[int, _Member]:
        began = time.monotonic()
        ranks = range(1, self.layout.num_ranks)
        with self._changed:
            while True:
                found = {rank: self._members[rank] for rank in ranks if rank in self._members}
                missing = [rank for rank in ranks if rank not in found or found[rank].ready is None]
                if not missing:
                    return found
                now = time.monotonic()
                if self._closed or (patience is not None and now - began > patience):
                    names = ", ".join(f"{rank} ({self._refused.get(rank, 'it has not come')})" for rank in missing)
                    raise EpochOver(f"epoch {epoch} cannot begin without rank {names}")
                for rank, member in found.items():  # it answers, but hangs in a step: its keeper starts it anew
                    limit = HANG_SECONDS if member.step_age > self.step_seconds else LEAVE_SECONDS
                    if member.ready is None and now - max(began, member.since) > limit:
                        _log.warning("rank %d does not leave its epoch: it has to end", rank)
                        self._fence(member, f"it has not left its epoch for {limit:.0f} s")
                self._changed.wait(1.0 if patience is None else min(1.0, patience))

    def _fence(self, member: _Member, why: str) -> None:
        with contextlib.suppress(OSError):
            member.control.send(Kind.FENCE, pb.Fence(epoch=self.epoch, why=why).SerializeToString())

    def _await_formed(self, epoch: int, members: dict[int, _Member]) -> None:
        deadline = time.monotonic() + FORM_SECONDS
        with self._changed:
            while True:
                self.check()
                late = [
                    rank
                    for rank, member in members.items()
                    if member.formed != epoch or (rank, epoch) not in self._plans
                ]
                if not late:
                    return
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(f"rank {', '.join(map(str, late))} did not form in {FORM_SECONDS:.0f} s")
                self._changed.wait(left)

    @property
    def _own_runner(self) -> Runner:
        assert self.runner is not None, "the leader's runner is set before the first epoch"
        return self.runner

    def _own_address(self) -> str:
        assert self._door is not None
        return self._door.address[0]

    def check(self) -> None:
        """Raises EpochOver where the epoch is over."""
        if self._over is not None:
            raise EpochOver(self._over)

    # Plans: the thread that steps

    def send(self, plan: Plan) -> None:
        """See `Pipe.send`."""
        self.check()
        assert self._broadcast is not None
        data = encode_plan(plan)
        before = self._chain.value
        self._chain.add(data)
        self._num_moves += 1
        self._num_out += 1
        try:
            self._broadcast.send(before + data)
        except PeersBroken as error:
            self._break(str(error))
            self.check()
        self.num_plan_bytes += (DIGEST_BYTES + len(data)) * (self.layout.num_ranks - 1)
        self._own.put(plan)

    def receive(self) -> StepResult:
        """See `Pipe.receive`."""
        self.check()  # an epoch that is over has nothing to wait for
        result = self._result() if self.layout.pipeline > 1 else self._own_result()
        self._num_moves += 1
        self._num_out -= 1
        return result

    def _own_result(self) -> StepResult:
        if self._overlaps:
            result = self._found.get()
        else:
            plan = self._own.get()
            result = self._run(plan) if plan is not None else None  # closed meanwhile
        self.check()
        assert result is not None, "the leader is the first rank of the only stage"
        return result

    def gather_kv(self, rank: int, layer: int, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all tokens of some of a rank's blocks, each [tokens, kv_heads, head_dim]; no plan is in flight.

        Args:
            layer: counted from the rank's first.

        Raises EpochOver; ValueError where the rank has no such layer or block, or there is no such rank.
        """
        self.check()
        cache = self._own_runner.cache
        if not 0 <= rank < self.layout.num_ranks:
            raise ValueError(f"rank: got {rank}, must be from 0 to {self.layout.num_ranks - 1}")
        if rank == 0:
            if refused := refusal(cache, layer, blocks):
                raise ValueError(refused)
            return cache.gather_kv(layer, blocks, len(blocks) * cache.block_size)
        with self._changed:
            member = self._members.get(rank)
        try:
            if member is None:
                raise ConnectionError("it is gone")
            return member.reads.read(cache, layer, blocks)
        except (OSError, BadFrame) as error:
            self.end(f"rank {rank} does not give its pages ({error})")
        self.check()
        raise AssertionError("unreachable: an epoch that ended has a reason")

    def _run(self, plan: Plan) -> StepResult | None:
        """The leader's own part; None where the epoch is over, or another rank answers."""
        try:
            return self._own_runner.run(plan)
        except PeersBroken as error:
            self._break(f"rank 0: {error}")
        except Exception as error:
            _log.exception("plan %d failed on rank 0", plan.number)
            self.end(f"rank 0: plan {plan.number} failed ({type(error).__name__})")
        return None

    def _compute(self, plans: queue.SimpleQueue[Plan | None], found: queue.SimpleQueue[StepResult | None]) -> None:
        while (plan := plans.get()) is not None and self._over is None:
            found.put(self._run(plan))
        found.put(None)

    def _result(self) -> StepResult:
        channel = self._plans[self.layout.num_ranks - self.layout.tensor, self.epoch]
        try:
            kind, payload = channel.receive()
            if kind is not Kind.RESULT:
                raise BadFrame(f"a {kind.name} instead of a result")
            return decode_result(payload)
        except OSError as error:
            self._break(f"the last stage: {error}")
        except BadFrame as error:
            self.end(f"the last stage: {error}")
        self.check()
        raise AssertionError("unreachable: an epoch that ended has a reason")

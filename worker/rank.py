"""A rank that is not its shard's leader: plans in, its part of them done, hidden rows and results out.

    control thread: dial the leader, answer pings, hear Form and Abort      main thread: form, plans, leave, form ...

It keeps its weights over any number of epochs and leaders; what it knows of sequences is an epoch's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from kernels.peers import PeersBroken, Ring
from kernels.rank import DIGEST_BYTES, Progress
from pagetable.frames import BadFrame, Kind
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.channel import Channel
from worker.codec import encode_result, plan_number
from worker.cores import Cores
from worker.group import Group
from worker.layout import Part
from worker.page_reads import answer_read
from worker.plan import StepResult
from worker.ranks import NO_PLANS, digest_with
from worker.runner import Runner
from worker.segment import BY_SOCKET, Segment, Sizes, host_key
from worker.segment import Plan as SegmentPlan
from worker.ways import Ways

_log = logging.getLogger(__name__)

RETRY_SECONDS = 0.1
LEADER_SECONDS = 10.0  # without a ping, which come every second: its host is gone, or it is stopped and will be ended


class Rank:
    """One follower.

    Args:
        leader: where the shard's leader listens, in each of its lives.
        host: where other hosts reach this one; "" takes the address that the leader is dialled from.
        ways: how ranks talk to each other.
        on_fence: told why the leader wants this process to end; the default ends it.
        cores: that are this process's own.
        others: as in `worker.ranks.Ranks`.
    """

    def __init__(
        self,
        part: Part,
        runner: Runner,
        sizes: Sizes,
        identity: bytes,
        secret: bytes,
        leader: tuple[str, int],
        host: str = "",
        ways: Ways | None = None,
        on_fence: Callable[[str], None] | None = None,
        *,
        cores: Cores | None = None,
    ) -> None:
        self._part, self._runner, self._sizes, self._identity = part, runner, sizes, identity
        self._secret, self._leader, self._host = secret, leader, host
        self._ways, self._on_fence = ways or Ways(), on_fence or _end_process
        self._cores = cores or Cores()
        self._size = SegmentPlan(part.layout, sizes).num_bytes
        self._forms: queue.SimpleQueue[pb.Form | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # of what follows; `stop` may interrupt who holds it
        self._control: Channel | None = None
        self._segment: Segment | None = None  # while it is ready
        self._given: Segment | None = None  # that of the epoch at hand
        self._epoch = 0
        self._is_over = True  # that epoch
        self._group: Group | None = None
        self._plans: Channel | None = None
        self._progress = Progress()
        self._doing = ""
        self._stopped = threading.Event()

    def run(self) -> None:
        """Serve epoch after epoch until `stop`."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()
        self._be_ready()
        while (form := self._forms.get()) is not None:
            why = ""
            try:
                self._join(form)
            except PeersBroken:  # whoever broke it says why
                pass
            except BadFrame as error:
                why = str(error)
            except Exception as error:
                _log.exception("rank %d, epoch %d", self._part.rank, form.epoch)
                why = _failure(self._doing or f"plan {self._progress.number}", error)
            self._leave(form, why)
            if not self._stopped.is_set():
                self._be_ready()
        self._close()

    def stop(self) -> None:
        """From any thread, or a signal handler: `run` returns once no epoch holds it."""
        self._stopped.set()
        self._forms.put(None)
        self._abort(self._epoch)
        with self._lock:
            control = self._control
        if control is not None:
            control.shut()

    def _close(self) -> None:
        with self._lock:
            for each in (self._segment, self._given):
                if each is not None:
                    each.close()

    # Main thread

    def _join(self, form: pb.Form) -> None:
        """One epoch, to its end; always raises."""
        self._doing = f"forming epoch {form.epoch}"
        group = Group(self._part, self._sizes, form, self._ways, owns_cores=bool(self._cores.cpus))
        with self._lock:
            self._group = group
            is_over = self._is_over
        if is_over:
            raise PeersBroken("the epoch was over before it began")
        try:
            plans = Channel.dial(self._leader, f"{self._part.rank}/{form.epoch}", self._secret)
        except (OSError, BadFrame) as error:
            raise PeersBroken("the leader is gone") from error
        with self._lock:
            self._plans = plans
            is_over = self._is_over
        if is_over:
            raise PeersBroken("the epoch was over before it began")
        group.form()
        self._runner.reset(group)
        self._say(Kind.FORMED, pb.Formed(epoch=form.epoch, rank=self._part.rank))
        broadcast, ring, progress = group.make_broadcast({0: plans}), group.plans.get(0), self._progress
        progress.digest, progress.tells = NO_PLANS, self._runner.answers
        while True:
            self._doing = ""
            if ring is not None and (result := self._runner.follow(ring, progress)) is not None:
                self._answer(group.results, plans, result)
                continue
            payload = broadcast.receive()
            if payload[:DIGEST_BYTES] != progress.digest:
                raise BadFrame("the plans before this one are not those that the leader sent")
            data = payload[DIGEST_BYTES:]
            self._doing = f"plan {plan_number(data)}"
            progress.began = time.monotonic_ns()
            result = self._runner.run_encoded(data)
            progress.began, progress.steps = 0, progress.steps + 1
            if result is not None:
                self._answer(group.results, plans, result)
            progress.digest = digest_with(data, progress.digest)  # not before: the others wait for this rank's step

    def _answer(self, ring: Ring | None, plans: Channel, result: StepResult) -> None:
        data = encode_result(result)
        if ring is not None:
            if len(data) <= ring.capacity:
                ring.put(result.number, data)
                return
            ring.put(BY_SOCKET, b"")
        try:
            plans.send(Kind.RESULT, data)
        except OSError as error:
            raise PeersBroken("the leader is gone") from error

    def _leave(self, form: pb.Form, why: str) -> None:
        """Give back what the epoch had. Why goes first: what comes next shows the others an epoch that is broken."""
        self._progress.began = 0
        self._say(Kind.BROKEN, pb.Broken(epoch=form.epoch, rank=self._part.rank, why=why))
        with self._lock:
            group, plans, self._group, self._plans = self._group, self._plans, None, None
            self._is_over = True
        if plans is not None:
            plans.shut()
        self._runner.reset(None)
        if group is not None:
            group.close()

    def _be_ready(self) -> None:
        with self._lock:
            if self._given is not None:
                self._given.close()
            self._given, self._segment = None, Segment(self._size)
        self._say_ready()

    # Control thread

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                control = Channel.dial(self._leader, f"{self._part.rank}/control", self._secret)
            except (OSError, BadFrame):
                self._stopped.wait(RETRY_SECONDS)
                continue
            control.set_patience(LEADER_SECONDS)
            with self._lock:
                self._control = control
                if self._stopped.is_set():  # too late for `stop` to see it
                    control.shut()
            self._say_ready()
            try:
                while True:
                    self._hear(*control.receive())
            except (OSError, BadFrame, DecodeError) as error:
                _log.info("rank %d: its leader is gone (%s)", self._part.rank, error)
            with self._lock:
                self._control = None
                epoch = self._epoch
            control.shut()
            self._abort(epoch)
            self._stopped.wait(RETRY_SECONDS)

    def _hear(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.PING:
            ping = pb.Ping.FromString(payload)
            began, steps = self._progress.began, self._progress.steps
            age = (time.monotonic_ns() - began) / 1e9 if began else 0.0
            self._say(Kind.PONG, pb.Pong(number=ping.number, epoch=self._epoch, steps=steps, step_age_seconds=age))
        elif kind is Kind.FORM:
            form = pb.Form.FromString(payload)
            with self._lock:
                own = form.members[self._part.rank].segment if self._part.rank < len(form.members) else ""
                if self._segment is None or own != self._segment.path:
                    return  # for another life of this rank
                self._given, self._segment = self._segment, None
                self._epoch, self._is_over = form.epoch, False
            self._forms.put(form)
        elif kind is Kind.READ_PAGES:
            self._say(Kind.PAGES_READ, answer_read(self._runner.cache, payload))
        elif kind is Kind.ABORT:
            self._abort(pb.Abort.FromString(payload).epoch)
        elif kind is Kind.FENCE:
            self._on_fence(pb.Fence.FromString(payload).why)

    def _abort(self, epoch: int) -> None:
        """An epoch is over: whoever waits in it is told."""
        with self._lock:
            if epoch != self._epoch:
                return
            self._is_over = True
            group, plans = self._group, self._plans
        if group is not None:
            group.abort()
        if plans is not None:
            plans.shut()

    def _say_ready(self) -> None:
        with contextlib.suppress(OSError):  # the connection is over, perhaps by this end
            with self._lock:
                control, segment = self._control, self._segment
                if control is None or segment is None:
                    return
                ready = pb.RankReady(
                    rank=self._part.rank,
                    pid=os.getpid(),
                    host=host_key(),
                    segment=segment.path,
                    identity=self._identity,
                    address=self._host or control.own_host,
                )
            control.send(Kind.RANK_READY, ready.SerializeToString())

    def _say(self, kind: Kind, message: pb.Formed | pb.Broken | pb.Pong | pb.PagesRead) -> None:
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):
                control.send(kind, message.SerializeToString())


def _failure(doing: str, error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return f"{doing} failed ({type(error).__name__}{f': {text}' if text else ''})"


def _end_process(why: str) -> None:
    _log.error("the leader ends this rank: %s", why)
    os._exit(1)

"""The ranks that follow, as their leader sees them: who is there, what each last said, and the epoch that they are in.

    RankReady --> assemble --Form--> Formed --> the epoch: plans on a connection of its own to each rank --> end
        ^                                                                                                   |
        +------ the rank has left <------------------------------- Abort to all, plans' connections shut ---+

Each rank has one control connection for as long as its process and the leader's live. Pings go over it every second;
the rank that answers none is cut off, the one that answers but leaves no epoch is told to end (Fence).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from pagetable.frames import BadFrame, Kind, encode_frame
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.channel import Channel
from worker.door import Door
from worker.loop import EpochOver
from worker.page_reads import PageReads

_log = logging.getLogger(__name__)

PING_SECONDS = 1.0
MAX_UNANSWERED = 5  # pings in a row: the rank is stopped or its host is gone
LEAVE_SECONDS = 15.0  # a rank that answers but has not left its epoch by then is ended
HANG_SECONDS = 2.0  # the same of one whose step has run for longer than any may
FORM_SECONDS = 30.0  # for all ranks to come in once all are ready
BLAME_SECONDS = 0.5  # whoever broke an epoch has said so by then; others only see it broken


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


class Members:
    """See the module. One thread assembles and leads epochs; whatever ends one may come from any.

    Args:
        num_ranks: of the shard; the leader is rank 0 and no member.
        identity: of model, layout and configuration; a rank with another is refused.
        on_over: told of each epoch's end once (its number, why), before the ranks are; from any thread.
        on_beat: called behind each round of pings with the seconds from one to the next, by the thread that sends them.

    Attributes:
        epoch: the present one's number, or the last one's.
        over: why it has ended; None while it is on.
        is_closed: for good: no other one begins.
    """

    def __init__(
        self,
        num_ranks: int,
        identity: bytes,
        secret: bytes,
        on_over: Callable[[int, str], None],
        on_beat: Callable[[float], None],
    ) -> None:
        self.epoch = 0
        self.over: str | None = "no epoch has begun"
        self.is_closed = False
        self._numbers = range(1, num_ranks)
        self._identity, self._secret = identity, secret
        self._on_over, self._on_beat = on_over, on_beat
        self._members: dict[int, _Member] = {}  # that are there
        self._refused: dict[int, str] = {}  # ranks that came and may not, and why
        self._plans: dict[int, Channel] = {}  # this epoch's
        self._chosen: dict[int, _Member] = {}  # whose readiness the epoch was begun with
        self._changed = threading.Condition()  # any of these
        self._num_bad_frames = 0  # beside those at the door
        self._door: Door | None = None
        self._stopped = threading.Event()

    def listen(self, host: str, port: int) -> None:
        """Let ranks come. Raises OSError."""
        self._door = Door(host, port, self._numbers.stop, self._secret, self._enter)
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where ranks come."""
        assert self._door is not None, "members listen before an epoch is formed"
        return self._door.address

    @property
    def num_bad_frames(self) -> int:
        """Connections that ended because of what came over them."""
        return self._num_bad_frames + (self._door.num_bad if self._door is not None else 0)

    def close(self) -> None:
        """End the epoch and every connection: the ranks' processes look for another leader. From any thread."""
        self.is_closed = True
        self._stopped.set()
        self.end("the leader has ended")
        if self._door is not None:
            self._door.close()
        with self._changed:
            for member in self._members.values():
                member.control.shut()
            self._changed.notify_all()

    def await_close(self, seconds: float) -> None:
        """Wait for so long, or until `close`."""
        with self._changed:  # not the event: a signal's handler may set that while this thread waits
            self._changed.wait_for(lambda: self.is_closed, seconds)

    # An epoch: the thread that leads it; `end` and `give_up` are any thread's

    def is_ready(self, rank: int) -> bool:
        """It is there, and in no epoch."""
        member = self._members.get(rank)
        return member is not None and member.ready is not None

    def assemble(self, epoch: int, patience: float | None, step_seconds: float) -> list[pb.RankReady]:
        """Wait for all ranks to be ready and begin an epoch, which the first one that is lost ends; all that they said.

        Args:
            patience: in seconds; None: for ever.
            step_seconds: a rank whose step has run for longer hangs.

        Raises EpochOver where not all are there by then, or it is closed.
        """
        began = time.monotonic()
        with self._changed:
            while missing := [rank for rank in self._numbers if not self.is_ready(rank)]:
                now = time.monotonic()
                if self.is_closed or (patience is not None and now - began > patience):
                    names = ", ".join(f"{rank} ({self._refused.get(rank, 'it has not come')})" for rank in missing)
                    raise EpochOver(f"epoch {epoch} cannot begin without rank {names}")
                for rank in missing:
                    member = self._members.get(rank)
                    if member is None:
                        continue
                    limit = HANG_SECONDS if member.step_age > step_seconds else LEAVE_SECONDS
                    if now - max(began, member.since) > limit:  # it answers, but hangs: its keeper starts it anew
                        _log.warning("rank %d does not leave its epoch: it has to end", rank)
                        self._fence(member, f"it has not left its epoch for {limit:.0f} s")
                self._changed.wait(1.0 if patience is None else min(1.0, patience))
            self.epoch, self.over = epoch, None
            self._plans.clear()
            self._chosen = {rank: self._members[rank] for rank in self._numbers}
            return [member.ready for member in self._chosen.values() if member.ready is not None]

    def tell(self, form: pb.Form) -> None:
        """Let all ranks form that were ready for it.

        Raises EpochOver or OSError where one is gone or came anew: those behind it have heard nothing and stay ready.
        """
        frame = encode_frame(Kind.FORM, form.SerializeToString())
        for rank, member in self._chosen.items():
            with self._changed:
                self.check()
                if self._members.get(rank) is not member:
                    raise ConnectionError(f"rank {rank} has gone")
                member.ready = None
            member.control.send_frame(frame)

    def await_formed(self) -> None:
        """Wait until all ranks take plans. Raises EpochOver; TimeoutError where one does not form."""
        deadline = time.monotonic() + FORM_SECONDS
        with self._changed:
            while True:
                self.check()
                formed = {rank for rank, member in self._members.items() if member.formed == self.epoch}
                late = [rank for rank in self._numbers if rank not in formed or rank not in self._plans]
                if not late:
                    return
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError(f"rank {', '.join(map(str, late))} did not form in {FORM_SECONDS:.0f} s")
                self._changed.wait(left)

    def plans(self, rank: int) -> Channel:
        """The connection for the plans of the epoch at hand, which has formed; shut once that is over."""
        with self._changed:
            return self._plans[rank]

    def reads(self, rank: int) -> PageReads:
        """Of its pages, for as long as it lives. Raises ConnectionError where it is gone."""
        with self._changed:
            if rank not in self._members:
                raise ConnectionError("it is gone")
            return self._members[rank].reads

    def check(self) -> None:
        """Raises EpochOver where the epoch is over."""
        if self.over is not None:
            raise EpochOver(self.over)

    def end(self, why: str, epoch: int | None = None) -> None:
        """The present epoch is over, for all ranks; the first reason counts.

        Args:
            epoch: which one, where it could be another one by now.
        """
        with self._changed:
            if self.over is not None or epoch not in (None, self.epoch):
                return
            self.over, epoch = why, self.epoch
            plans = list(self._plans.values())
            controls = [member.control for member in self._members.values()]
            self._changed.notify_all()
        self._on_over(epoch, why)
        for channel in plans:
            channel.shut()
        abort = encode_frame(Kind.ABORT, pb.Abort(epoch=epoch, why=why).SerializeToString())
        for control in controls:
            with contextlib.suppress(OSError):
                control.send_frame(abort)

    def give_up(self, why: str, epoch: int | None = None) -> None:
        """As `end`, from somebody who only sees that others are gone: whoever knows why says it first."""
        with self._changed:
            given_up = self.epoch if epoch is None else epoch
            self._changed.wait_for(lambda: self.over is not None or self.epoch != given_up, BLAME_SECONDS)
        self.end(why, given_up)

    # Ranks come and go: threads of connections

    def _enter(self, channel: Channel, rank: int, epoch: int | None) -> None:
        if epoch is None:
            self._serve(rank, channel)
        else:
            self._keep(rank, epoch, channel)

    def _keep(self, rank: int, epoch: int, channel: Channel) -> None:
        """A rank's connection for the plans of one epoch."""
        with self._changed:
            if epoch != self.epoch or self.over is not None:
                channel.shut()
                return
            old = self._plans.get(rank)
            self._plans[rank] = channel
            self._changed.notify_all()
        if old is not None:
            old.shut()

    def _serve(self, rank: int, channel: Channel) -> None:
        """A rank's control connection, to its end."""
        member = _Member(channel)
        with self._changed:
            if self.is_closed:
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
                self.give_up(f"rank {rank} has lost the others", broken.epoch)

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

    def _fence(self, member: _Member, why: str) -> None:
        with contextlib.suppress(OSError):
            member.control.send(Kind.FENCE, pb.Fence(epoch=self.epoch, why=why).SerializeToString())

    def _watch(self) -> None:
        """Ask every rank whether it lives; its answer comes from a thread that a step does not hold up."""
        number = 0
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
            self._on_beat(PING_SECONDS)

"""The pipe of plans over all ranks of a shard: one process each, all together for one epoch at a time.

    form:   every rank is ready -> Form to all -> every rank has formed (worker/members.py) -> plans
    plan:   leader --Broadcast--> all ranks of all stages; hidden rows and sums go between ranks (worker/group.py)
            the last stage's first tensor rank --> leader: the result, in shared memory or over the socket of plans
    over:   a rank is lost, a step fails or takes too long -> every wait ends -> leave, and form again

The leader is rank 0 and does the first stage's part itself, on the thread that sends: one of its own would have to be
woken for each plan, to run on the same core. So a result of a later stage is seen once the leader has done its part of
the last plan that it sent, which is about when the result comes. Where plans are made ahead, that part has a thread.
Each plan carries the digest of all plans before it, so ranks whose tables could differ find out before they compute.
"""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from kernels.peers import PeersBroken
from kernels.rank import DIGEST_BYTES
from pagetable.frames import BadFrame, Kind
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.broadcast import Broadcast
from worker.codec import decode_result, encode_plan
from worker.cores import Cores
from worker.group import Group, needs_store
from worker.layout import Part
from worker.loop import EpochOver
from worker.members import Members
from worker.page_reads import refusal
from worker.plan import Plan, StepResult
from worker.runner import Runner
from worker.segment import BY_SOCKET, Segment, Sizes, host_key
from worker.segment import Plan as SegmentPlan
from worker.ways import Ways

_log = logging.getLogger(__name__)

RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 2.0  # between tries to form
NO_PLANS = bytes(DIGEST_BYTES)  # the digest of none


def digest_with(plan: bytes, before: bytes) -> bytes:
    """The digest of all plans of an epoch up to one, from that of all before it. Native, too (kernels/csrc/chain.h)."""
    return hashlib.blake2b(plan, digest_size=DIGEST_BYTES, key=before).digest()


class Ranks:
    """A `worker.loop.Pipe` over all ranks of a shard.

    Args:
        part: the leader's own.
        sizes: of messages, equal on all ranks.
        identity: of model, layout and configuration; a rank with another is refused.
        ways: how ranks talk to each other.
        overlaps: the leader's own part runs on a thread of its own (asynchronous scheduling).
        on_over: told once of each epoch's end, from any thread.
        cores: where the leader's own part runs, and the thread that steps belongs (`Cores.hold`); none, where the
            system puts them.

    Attributes:
        cores: as given; released by `close`.
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
        cores: Cores | None = None,
    ) -> None:
        self.part, self.layout = part, part.layout
        self.cores = cores or Cores()
        self.runner: Runner | None = None
        self.on_over = on_over
        self.step_seconds = math.inf
        self.num_plan_bytes = 0
        self._sizes, self._identity, self._ways = sizes, identity, ways or Ways()
        self._overlaps = overlaps
        self._members = Members(self.layout.num_ranks, identity, secret, self._cut_off, self._beat)
        self._group: Group | None = None
        self._broadcast: Broadcast | None = None
        self._digest = NO_PLANS
        self._num_out = 0  # plans without a result
        self._num_moves = 0  # plans sent and results received
        self._num_moves_seen, self._still_seconds = 0, 0.0  # at the last beat, and up to it without another one
        self._own: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        self._computing: threading.Thread | None = None

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """Let ranks come; returns where. Raises OSError."""
        self._members.listen(host, port)
        return self._members.address

    @property
    def num_bad_frames(self) -> int:
        """Connections that ended because of what came over them."""
        return self._members.num_bad_frames

    def close(self) -> None:
        """End the epoch and every connection: the ranks' processes look for another leader. From any thread."""
        self._members.close()
        self._own.put(None)  # behind whatever it has to run yet
        self.cores.release()

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
                if self._members.is_closed:
                    raise
                _log.warning("epoch %d did not begin: %s", epoch, over)
                epoch += 1
            self._members.await_close(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    def form(self, epoch: int, patience: float | None = None) -> None:
        """Wait for all ranks and begin an epoch with them; `leave` the last one before.

        Raises EpochOver where not all are there after `patience` seconds (None: for ever) or one is lost meanwhile.
        """
        own = pb.RankReady(rank=0, host=host_key(), address=self._members.address[0], identity=self._identity)
        form = pb.Form(epoch=epoch)
        segment: Segment | None = None
        store = None
        ready = self._members.assemble(epoch, patience, self.step_seconds)
        try:
            segment = Segment(SegmentPlan(self.layout, self._sizes).num_bytes)
            own.segment = segment.path
            form.members.extend([own, *ready])
            if needs_store(self.layout, form.members, self._ways):
                from worker.gloo import Store

                store = Store(own.address)
                form.store = store.address
            group = self._group = Group(self.part, self._sizes, form, self._ways, owns_cores=bool(self.cores.cpus))
            self._members.tell(form)
            self.check()  # an end that came before the group did has not aborted it
            group.form()
            self._members.await_formed()
        except (OSError, RuntimeError, ValueError) as error:
            self._members.give_up(f"the epoch did not form: {error}")
            self.check()
            raise
        finally:
            if segment is not None:
                segment.close()
            del store
        self.check()
        self._digest = NO_PLANS
        self._num_out = 0
        self._broadcast = group.make_broadcast({each.rank: self._members.plans(each.rank) for each in ready})
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

    def check(self) -> None:
        """Raises EpochOver where the epoch is over."""
        self._members.check()

    def end(self, why: str) -> None:
        """The present epoch is over, for all ranks. From any thread; the first reason counts."""
        self._members.end(why)

    def _cut_off(self, epoch: int, why: str) -> None:
        """An epoch is over: who waits in it is told. From any thread."""
        group = self._group
        if group is not None and group.epoch == epoch:
            group.abort()
        self.on_over(why)

    def _beat(self, seconds: float) -> None:
        """So many seconds after the last one: end an epoch in which plans are out and none has moved for too long."""
        is_still = self._num_out > 0 and self._num_moves == self._num_moves_seen
        self._still_seconds = self._still_seconds + seconds if is_still else 0.0
        self._num_moves_seen = self._num_moves
        if self._still_seconds > self.step_seconds:
            self.end(f"a step has run for more than {self.step_seconds:.0f} s")

    @property
    def _own_runner(self) -> Runner:
        assert self.runner is not None, "the leader's runner is set before the first epoch"
        return self.runner

    # Plans: the thread that steps

    def send(self, plan: Plan) -> None:
        """See `Pipe.send`."""
        self.check()
        assert self._broadcast is not None
        data = encode_plan(plan)
        self._num_moves += 1
        self._num_out += 1
        try:
            self._broadcast.send(self._digest + data)
        except PeersBroken as error:
            self._members.give_up(str(error))
        self.check()  # not within the handler: an EpochOver that somebody keeps would keep the ring's memory, too
        self.num_plan_bytes += (DIGEST_BYTES + len(data)) * (self.layout.num_ranks - 1)
        if self._overlaps:
            self._own.put(plan)
        else:
            self._do_own_part(plan, self._found, data)
        self._digest = digest_with(data, self._digest)  # not before: the others have the plan already

    def receive(self) -> StepResult:
        """See `Pipe.receive`."""
        self.check()  # an epoch that is over has nothing to wait for
        result = self._result() if self.layout.pipeline > 1 else self._own_result()
        self._num_moves += 1
        self._num_out -= 1
        return result

    def _own_result(self) -> StepResult:
        result = self._found.get()
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
        try:
            return self._members.reads(rank).read(cache, layer, blocks)
        except (OSError, BadFrame) as error:
            self.end(f"rank {rank} does not give its pages ({error})")
        self.check()
        raise AssertionError("unreachable: an epoch that ended has a reason")

    def _run(self, plan: Plan, data: bytes) -> StepResult | None:
        """The leader's own part; None where the epoch is over, or another rank answers."""
        try:
            return self._own_runner.run(plan, data)
        except PeersBroken as error:
            self._members.give_up(f"rank 0: {error}")
        except Exception as error:
            _log.exception("plan %d failed on rank 0", plan.number)
            self.end(f"rank 0: plan {plan.number} failed ({type(error).__name__})")
        return None

    def _compute(self, plans: queue.SimpleQueue[Plan | None], found: queue.SimpleQueue[StepResult | None]) -> None:
        self.cores.stay()
        while (plan := plans.get()) is not None and self._members.over is None:
            self._do_own_part(plan, found)
        found.put(None)

    def _do_own_part(self, plan: Plan, found: queue.SimpleQueue[StepResult | None], data: bytes = b"") -> None:
        result = self._run(plan, data)
        if self.layout.pipeline == 1:  # else the last stage answers
            found.put(result)

    def _result(self) -> StepResult:
        try:
            return self._received()
        except (OSError, PeersBroken) as error:
            self._members.give_up(f"the last stage: {error}")
        except BadFrame as error:
            self.end(f"the last stage: {error}")
        self.check()
        raise AssertionError("unreachable: an epoch that ended has a reason")

    def _received(self) -> StepResult:
        assert self._group is not None
        if (ring := self._group.results) is not None:
            tag, payload = ring.take()
            if tag != BY_SOCKET:
                return decode_result(payload)
        kind, payload = self._members.plans(self.layout.num_ranks - self.layout.tensor).receive()
        if kind is not Kind.RESULT:
            raise BadFrame(f"a {kind.name} instead of a result")
        return decode_result(payload)

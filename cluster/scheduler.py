"""The global scheduler: which shards there are, which of them live, and where each request runs. Pure.

    keeper registers (epoch e) --> dial --> Welcome --> whole Events --> READY --silence: lease--> no placements
                                    ^  |                                   |            --grace--> DEAD
                                    |__| nobody there: again               |--the connection ends, a step hangs--> DEAD
                                                                                  DEAD: fence e; wait for epoch e + 1

`on(event, now)` is all there is: one event in, actions out, time handed in. Nothing here needs to survive: a new
scheduler hears of the shards from their keepers within a second and of the sequences from the shards' first Events.
What belongs to an older epoch, or to a connection that was given up, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields

from cluster.answers import answer_query
from cluster.claims import Claims
from cluster.messages import (
    Action,
    BroadcastShards,
    DialShard,
    Event,
    FenceShard,
    FrontJoined,
    FrontLeft,
    HangUp,
    KeeperLost,
    KeeperRegistered,
    PlaceAsked,
    QueryAsked,
    ReportCame,
    SendAnswer,
    SendPing,
    SendPlaced,
    SendShards,
    ShardLost,
    ShardPonged,
    ShardReported,
    ShardWelcomed,
    Ticked,
)
from cluster.policy import Placement, PolicyConfig
from cluster.view import BrokenStream, ClusterView
from pagetable.errors import ConfigError
from quire_pb.worker.v1 import worker_pb2 as pb

NO_LINK = 0
NO_KEEPER = -1


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Seconds.

    Attributes:
        lease: a shard that is silent for so long gets no new requests.
        grace: silent for so much longer, it is dead.
        step_limit: a step that runs for so long hangs: the shard is dead, however promptly it answers pings.
        tick: how often Ticked comes; pings go out with it.
    """

    lease: float = 5.0
    grace: float = 5.0
    step_limit: float = 10.0
    tick: float = 0.5
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        for each in fields(self)[:4]:
            value = getattr(self, each.name)
            if not 0 < value < float("inf"):
                raise ConfigError(each.name, value, "be a number of seconds above 0")
        if self.lease < 2 * self.tick:
            raise ConfigError("lease", self.lease, f"be at least twice the tick, {self.tick}")


@dataclass(slots=True)
class _Shard:
    """The newest life of a shard that is known.

    Attributes:
        keeper: whom to tell to fence it.
        wanted: what its keeper says of it.
        link: of the connection to it, or that is being made.
        joined: it has said Welcome on that connection.
        heard: when it last gave a sign of life; before the first, when its keeper announced it.
        dead: this life is over for good.
    """

    info: pb.ShardInfo
    keeper: int
    wanted: pb.Condition
    heard: float
    link: int = NO_LINK
    joined: bool = False
    dead: bool = False
    pings: int = 0


class GlobalScheduler:
    """See the head of the file. `view` may be read between events."""

    def __init__(self, config: SchedulerConfig | None = None) -> None:
        self.config = config or SchedulerConfig()
        self.view = ClusterView()
        self.claims = Claims()
        self._placement = Placement(self.config.policy, self.view, self.claims)
        self.num_deaths = 0
        self._shards: dict[int, _Shard] = {}
        self._told: dict[int, tuple[int, pb.Condition, str]] = {}
        self._links: dict[int, _Shard] = {}  # those that were not given up
        self._num_links = 0
        self._ticked: float | None = None

    def on(self, event: Event, now: float) -> list[Action]:
        """Take one event; what is to be done about it, in this order.

        Args:
            now: seconds of a clock that never goes back.
        """
        touched = self._touched(event)
        actions = list(self._take(event, now))
        conditions = {shard.info.shard_id: self._told_of(shard) for shard in touched}
        if any(self._told.get(shard_id) != condition for shard_id, condition in conditions.items()):
            self._told.update(conditions)
            actions.append(BroadcastShards(self.shards()))
        return actions

    def shards(self) -> pb.Shards:
        """All shards that are known, by id."""
        return pb.Shards(
            shards=[
                pb.ShardState(info=shard.info, condition=self._condition(shard))
                for _, shard in sorted(self._shards.items())
            ]
        )

    def _take(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case ShardReported():
                yield from self._report(event, now)
            case ShardPonged():
                yield from self._pong(event, now)
            case PlaceAsked():
                yield SendPlaced(event.front, self._place(event, now))
            case Ticked():
                yield from self._tick(now)
            case KeeperRegistered():
                yield from self._register(event, now)
            case KeeperLost():
                for shard in self._shards.values():
                    if shard.keeper == event.keeper:
                        shard.keeper = NO_KEEPER
            case ShardWelcomed():
                yield from self._welcome(event, now)
            case ShardLost():
                yield from self._lose(event)
            case FrontJoined():
                yield SendShards(event.front, self.shards())
            case FrontLeft():
                self.claims.end_front(event.front)
            case ReportCame():
                yield from self._check(event.report)
            case QueryAsked():
                yield SendAnswer(event.peer, answer_query(event.query, self.shards().shards, self.view))

    def _touched(self, event: Event) -> Collection[_Shard]:
        """The shards whose condition it may change; also those that only come to be by it."""
        match event:
            case PlaceAsked() | QueryAsked():
                return ()
            case ShardReported() | ShardPonged():  # most events by far: their cost must not grow with the shards
                shard = self._at(event.link)
                return () if shard is None else (shard,)
        return self._shards.values()

    def _told_of(self, shard: _Shard) -> tuple[int, pb.Condition, str]:
        """What fronts hear of a shard."""
        return shard.info.epoch, self._condition(shard), shard.info.address

    def _condition(self, shard: _Shard) -> pb.Condition:
        if shard.dead:
            return pb.CONDITION_DEAD
        view = self.view.shards.get(shard.info.shard_id)
        if not shard.joined or view is None or not view.number:
            return pb.CONDITION_UNSPECIFIED
        return pb.CONDITION_DRAINING if shard.wanted == pb.CONDITION_DRAINING else pb.CONDITION_READY

    # Keepers

    def _register(self, event: KeeperRegistered, now: float) -> Iterator[Action]:
        info, wanted = event.register.info, event.register.condition
        shard = self._shards.get(info.shard_id)
        if shard is not None and info.epoch < shard.info.epoch:
            return
        if shard is None or info.epoch > shard.info.epoch:
            if shard is not None:
                yield from self._let_go(shard)
            shard = self._shards[info.shard_id] = _Shard(info, event.keeper, wanted, now)
        if shard.dead:
            shard.keeper = event.keeper
            if wanted != pb.CONDITION_DEAD:  # it has not heard, or it was away
                yield FenceShard(event.keeper, info.shard_id, info.epoch, "this life was given up")
            return
        if not _serves(shard.wanted) and _serves(wanted):
            shard.heard = now
        shard.keeper, shard.wanted = event.keeper, wanted
        if not shard.joined:
            shard.info = info
        if wanted == pb.CONDITION_DEAD:
            yield from self._bury(shard)
        elif shard.link == NO_LINK:
            yield from self._dial(shard)

    # Shards

    def _dial(self, shard: _Shard) -> Iterator[Action]:
        if _serves(shard.wanted) and shard.info.address:
            self._num_links += 1
            shard.link, shard.joined = self._num_links, False
            self._links[shard.link] = shard
            yield DialShard(shard.link, shard.info.shard_id, shard.info.address)

    def _welcome(self, event: ShardWelcomed, now: float) -> Iterator[Action]:
        shard = self._at(event.link)
        if shard is None:
            return
        told, known = event.info, shard.info
        if (told.shard_id, told.epoch) != (known.shard_id, known.epoch):  # another process has the address now
            yield from self._hang_up(shard)
            return
        shard.info, shard.joined, shard.heard = told, True, now
        self.view.begin(told.shard_id, told.epoch)

    def _report(self, event: ShardReported, now: float) -> Iterator[Action]:
        shard = self._at(event.link)
        if shard is None or not shard.joined or event.events.epoch != shard.info.epoch:
            return
        shard.heard = now
        try:
            self.view.apply(shard.info.shard_id, event.events)
        except BrokenStream:
            yield from self._hang_up(shard)
            yield from self._dial(shard)  # its first Events will be whole
            return
        self.claims.cover(shard.info.shard_id, event.events)

    def _pong(self, event: ShardPonged, now: float) -> Iterator[Action]:
        shard, pong = self._at(event.link), event.pong
        if shard is None or not shard.joined or pong.epoch != shard.info.epoch:
            return
        shard.heard = now
        if pong.has_work and pong.step_age_seconds > self.config.step_limit:
            yield from self._fence(shard, f"a step has run for {pong.step_age_seconds:.1f} s")

    def _lose(self, event: ShardLost) -> Iterator[Action]:
        shard = self._at(event.link)
        if shard is None:
            return
        joined, shard.link = shard.joined, NO_LINK
        del self._links[event.link]
        if joined:
            yield from self._fence(shard, f"the connection to it ended ({event.why})")

    def _check(self, report: pb.Report) -> Iterator[Action]:
        """A front lost its connection to a shard. That may be the front's trouble: look, and let the shard answer."""
        shard = self._shards.get(report.shard_id)
        if shard is not None and not shard.dead and shard.info.epoch == report.epoch and shard.joined:
            yield self._ping(shard)

    def _tick(self, now: float) -> Iterator[Action]:
        config = self.config
        if self._ticked is not None and now - self._ticked > config.lease / 2:
            # it was this process that slept: what the shards said meanwhile has not been read yet
            for shard in self._shards.values():
                shard.heard = min(now, shard.heard + now - self._ticked)
        self._ticked = now
        self.claims.expire(now - config.policy.claim_seconds)
        for shard in self._shards.values():
            if shard.dead or not (shard.joined or _serves(shard.wanted)):
                continue
            silence = now - shard.heard
            if silence > config.lease + config.grace:
                yield from self._fence(shard, f"silent for {silence:.1f} s")
            elif shard.joined:
                yield self._ping(shard)
            elif shard.link == NO_LINK:
                yield from self._dial(shard)

    def _ping(self, shard: _Shard) -> SendPing:
        shard.pings += 1
        return SendPing(shard.link, shard.pings)

    def _fence(self, shard: _Shard, why: str) -> Iterator[Action]:
        """This life is over, whether its process knows or not."""
        yield from self._bury(shard)
        if shard.keeper != NO_KEEPER:
            yield FenceShard(shard.keeper, shard.info.shard_id, shard.info.epoch, why)

    def _bury(self, shard: _Shard) -> Iterator[Action]:
        shard.dead = True
        self.num_deaths += 1
        yield from self._let_go(shard)

    def _let_go(self, shard: _Shard) -> Iterator[Action]:
        """Forget all that was known of this life's work."""
        yield from self._hang_up(shard)
        self.claims.end_shard(shard.info.shard_id)

    def _hang_up(self, shard: _Shard) -> Iterator[Action]:
        self.view.drop(shard.info.shard_id)
        shard.joined = False
        if shard.link != NO_LINK:
            yield HangUp(shard.link)
            del self._links[shard.link]
            shard.link = NO_LINK

    def _at(self, link: int) -> _Shard | None:
        """The shard at the other end, unless that connection was given up."""
        return self._links.get(link)

    # Placement

    def _place(self, event: PlaceAsked, now: float) -> pb.Placed:
        ready = {
            shard.info.shard_id: shard.info
            for shard in self._shards.values()
            if self._condition(shard) == pb.CONDITION_READY and now - shard.heard <= self.config.lease
        }
        return self._placement.place(event.front, event.place, ready, now)


def _serves(wanted: pb.Condition) -> bool:
    return wanted in (pb.CONDITION_READY, pb.CONDITION_DRAINING)

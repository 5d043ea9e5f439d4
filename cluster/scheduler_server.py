"""The global scheduler on its sockets: fronts, keepers and admins come in, shards are dialed.

Every frame becomes one event, every action at most one frame; all in one event loop, so events reach the core one by
one and in the order of each connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

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
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from cluster.wire import Link, Listener, Peer, listen
from pagetable.frames import BadFrame, Kind
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

ROLES = frozenset((pb.ROLE_FRONT, pb.ROLE_KEEPER, pb.ROLE_ADMIN))


class SchedulerServer:
    """Does what a GlobalScheduler wants done.

    Args:
        secret: the cluster's; it opens connections in both directions.
        now: seconds of a clock that never goes back.

    Attributes:
        core: may be read from the event loop.
    """

    def __init__(
        self, secret: bytes, config: SchedulerConfig | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.core = GlobalScheduler(config)
        self.address = ""
        self._secret, self._now = secret, now
        self._listener: Listener | None = None
        self._numbers = 0
        self._peers: dict[int, Peer] = {}
        self._fronts: dict[int, Peer] = {}
        self._links: dict[int, Link] = {}  # those that are made
        self._dials: dict[int, asyncio.Task[None]] = {}
        self._ticks: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listen; returns host:port. Raises OSError."""
        self.address, self._listener = await listen(host, port, self._secret, ROLES, self._serve)
        self._ticks = asyncio.create_task(self._tick(), name="ticks")
        return self.address

    async def run(self) -> None:
        """Until cancelled. A fault in the core ends this, and the process: a new one knows all within a second."""
        assert self._ticks is not None
        await self._ticks

    async def close(self) -> None:
        """End all connections. Nothing that runs on shards is touched."""
        tasks = [*self._dials.values(), *([self._ticks] if self._ticks is not None else [])]
        for task in tasks:
            task.cancel()
        if self._listener is not None:
            await self._listener.close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, event: Event) -> None:
        """Hand an event to the core and carry out what it wants."""
        for action in self.core.on(event, self._now()):
            self._act(action)

    async def _tick(self) -> None:
        while True:
            self.take(Ticked())
            await asyncio.sleep(self.core.config.tick)

    async def _serve(self, peer: Peer) -> None:
        self._numbers += 1
        number = self._numbers
        self._peers[number] = peer
        try:
            if peer.role == pb.ROLE_FRONT:
                self._fronts[number] = peer
                self.take(FrontJoined(number))
            async for kind, payload in peer.frames():
                self.take(_said(number, peer, kind, payload))
        finally:
            del self._peers[number]
            if self._fronts.pop(number, None) is not None:
                self.take(FrontLeft(number))
            elif peer.role == pb.ROLE_KEEPER:
                self.take(KeeperLost(number))

    async def _dial(self, number: int, shard_id: int, address: str) -> None:
        """One connection to a shard, from its making to its end."""
        why, link = "", None
        try:
            link = await Link.connect(address, pb.ROLE_SCHEDULER, "scheduler", self._secret)
            self._links[number] = link
            async for kind, payload in link.frames():
                self.take(_told(number, kind, payload))
            why = link.why
        except OSError as error:
            why = f"{type(error).__name__} while dialing"
        except (DecodeError, BadFrame):
            why = "it sends what is no message of ours"
        finally:
            if link is not None:
                link.close()
            self._links.pop(number, None)
            self._dials.pop(number, None)
        _log.warning("shard %d: connection %d is over: %s", shard_id, number, why)
        self.take(ShardLost(number, why))

    def _act(self, action: Action) -> None:
        match action:
            case SendPing():
                self._to(self._links.get(action.link), Kind.PING, pb.Ping(number=action.number))
            case SendPlaced():
                self._to(self._peers.get(action.front), Kind.PLACED, action.placed)
            case DialShard():
                dial = self._dial(action.link, action.shard_id, action.address)
                self._dials[action.link] = asyncio.create_task(dial, name=f"shard {action.shard_id}")
            case HangUp():
                task = self._dials.pop(action.link, None)
                if task is not None:
                    task.cancel()
            case FenceShard():
                _log.warning("shard %d, epoch %d is dead: %s", action.shard_id, action.epoch, action.why)
                fence = pb.Fence(shard_id=action.shard_id, epoch=action.epoch, why=action.why)
                self._to(self._peers.get(action.keeper), Kind.FENCE, fence)
            case SendShards():
                self._to(self._peers.get(action.front), Kind.SHARDS, action.shards)
            case BroadcastShards():
                for front in self._fronts.values():
                    front.send(Kind.SHARDS, action.shards)
            case SendAnswer():
                self._to(self._peers.get(action.peer), Kind.ANSWER, action.answer)

    def _to(self, link: Link | None, kind: Kind, message: Any) -> None:
        if link is not None:  # else it has left, and the core hears of it next
            link.send(kind, message)


def _said(number: int, peer: Peer, kind: Kind, payload: bytes) -> Event:
    """What a peer's frame means. Raises BadFrame where its role may not say that, and DecodeError."""
    match peer.role, kind:
        case pb.ROLE_FRONT, Kind.PLACE:
            return PlaceAsked(number, pb.Place.FromString(payload))
        case pb.ROLE_FRONT, Kind.REPORT:
            return ReportCame(pb.Report.FromString(payload))
        case ((pb.ROLE_FRONT | pb.ROLE_ADMIN), Kind.QUERY):
            return QueryAsked(number, pb.Query.FromString(payload))
        case pb.ROLE_KEEPER, Kind.REGISTER:
            return KeeperRegistered(number, pb.Register.FromString(payload))
    raise BadFrame(f"{kind.name} from {pb.Role.Name(peer.role)}")


def _told(link: int, kind: Kind, payload: bytes) -> Event:
    """What a shard's frame means. Raises BadFrame and DecodeError."""
    match kind:
        case Kind.EVENTS:
            return ShardReported(link, pb.Events.FromString(payload))
        case Kind.PONG:
            return ShardPonged(link, pb.Pong.FromString(payload))
        case Kind.WELCOME:
            return ShardWelcomed(link, pb.Welcome.FromString(payload).shard)
    raise BadFrame(f"{kind.name} from a shard")


async def main(settings: dict[str, Any], say: Callable[..., None]) -> int:
    """Serve until cancelled.

    Args:
        settings: host, port, secret (hex), and any of SchedulerConfig's seconds (lease, grace, step_limit, tick).
        say: told ready="host:port".
    """
    times = {name: settings[name] for name in ("lease", "grace", "step_limit", "tick") if name in settings}
    server = SchedulerServer(bytes.fromhex(settings["secret"]), SchedulerConfig(**times))
    try:
        address = await server.start(settings["host"], settings["port"])
        say(ready=address)
        await server.run()
    finally:
        await server.close()
    return 0

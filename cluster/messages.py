"""What happens to the global scheduler (events), and what it wants done (actions).

Fronts, keepers and other peers are numbers that the server gives to their connections; a number is never used twice.
A link is the scheduler's number for one connection to one shard: what comes by a link that it gave up is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from quire_pb.worker.v1 import worker_pb2 as pb


@dataclass(frozen=True, slots=True)
class KeeperRegistered:
    keeper: int
    register: pb.Register


@dataclass(frozen=True, slots=True)
class KeeperLost:
    keeper: int


@dataclass(frozen=True, slots=True)
class ShardWelcomed:
    link: int
    info: pb.ShardInfo


@dataclass(frozen=True, slots=True)
class ShardReported:
    link: int
    events: pb.Events


@dataclass(frozen=True, slots=True)
class ShardPonged:
    link: int
    pong: pb.Pong


@dataclass(frozen=True, slots=True)
class ShardLost:
    """The connection ended, or could not be made."""

    link: int
    why: str


@dataclass(frozen=True, slots=True)
class FrontJoined:
    front: int


@dataclass(frozen=True, slots=True)
class FrontLeft:
    front: int


@dataclass(frozen=True, slots=True)
class PlaceAsked:
    front: int
    place: pb.Place


@dataclass(frozen=True, slots=True)
class ReportCame:
    report: pb.Report


@dataclass(frozen=True, slots=True)
class QueryAsked:
    peer: int
    query: pb.Query


@dataclass(frozen=True, slots=True)
class Ticked:
    """Comes every SchedulerConfig.tick seconds."""


@dataclass(frozen=True, slots=True)
class DialShard:
    """Connect; then tell ShardWelcomed, ShardReported and ShardPonged with this link, and ShardLost at its end."""

    link: int
    shard_id: int
    address: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close that connection, or stop making it. No ShardLost is needed."""

    link: int


@dataclass(frozen=True, slots=True)
class SendPing:
    link: int
    number: int


@dataclass(frozen=True, slots=True)
class FenceShard:
    keeper: int
    shard_id: int
    epoch: int
    why: str


@dataclass(frozen=True, slots=True)
class SendPlaced:
    front: int
    placed: pb.Placed


@dataclass(frozen=True, slots=True)
class SendShards:
    front: int
    shards: pb.Shards


@dataclass(frozen=True, slots=True)
class BroadcastShards:
    """To every front."""

    shards: pb.Shards


@dataclass(frozen=True, slots=True)
class SendAnswer:
    peer: int
    answer: pb.Answer


Event: TypeAlias = (
    KeeperRegistered
    | KeeperLost
    | ShardWelcomed
    | ShardReported
    | ShardPonged
    | ShardLost
    | FrontJoined
    | FrontLeft
    | PlaceAsked
    | ReportCame
    | QueryAsked
    | Ticked
)
Action: TypeAlias = DialShard | HangUp | SendPing | FenceShard | SendPlaced | SendShards | BroadcastShards | SendAnswer

"""The global scheduler, event by event: lives of shards, and where requests go."""

from __future__ import annotations

import ast
from array import array
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

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
from cluster.policy import PolicyConfig
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from pagetable.errors import ConfigError
from pagetable.prefix_tree import link_digest, root_digest
from quire_pb.cluster.v1 import cluster_pb2
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.pure.test_house import IMPURE, ROOT, imports

READY, DRAINING, DEAD = pb.CONDITION_READY, pb.CONDITION_DRAINING, pb.CONDITION_DEAD
KEEPER, FRONT, SIZE = 50, 70, 4
_A = TypeVar("_A")


def info(shard_id: int, epoch: int, **fields: Any) -> pb.ShardInfo:
    known: dict[str, Any] = {
        "address": f"host:{shard_id}",
        "block_size": SIZE,
        "num_blocks": 100,
        "max_model_len": 400,
        "max_num_seqs": 16,
        "identity": b"model",
        "device_ids": [shard_id],
        "model": "toy",
    }
    return pb.ShardInfo(shard_id=shard_id, epoch=epoch, **{**known, **fields})


def only(actions: Sequence[Action], kind: type[_A]) -> list[_A]:
    return [action for action in actions if isinstance(action, kind)]


class Desk:
    """A core, a clock, and the usual events in short."""

    def __init__(self, **config: Any) -> None:
        self.core, self.now = GlobalScheduler(SchedulerConfig(**config)), 0.0
        self.links: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.infos: dict[int, pb.ShardInfo] = {}
        self.tickets = 0

    def on(self, event: Event) -> list[Action]:
        actions = self.core.on(event, self.now)
        for dial in only(actions, DialShard):
            self.links[dial.shard_id] = dial.link
        return actions

    def register(self, shard: pb.ShardInfo, condition: pb.Condition = READY, keeper: int = KEEPER) -> list[Action]:
        return self.on(KeeperRegistered(keeper, pb.Register(info=shard, condition=condition)))

    def up(self, shard_id: int, epoch: int = 1, **fields: Any) -> int:
        """Registered, welcomed, everything told; returns the link."""
        shard = self.infos[shard_id] = info(shard_id, epoch, **fields)
        self.register(shard)
        self.on(ShardWelcomed(self.links[shard_id], shard))
        self.numbers[shard_id] = 0
        self.tell(shard_id)
        return self.links[shard_id]

    def tell(self, shard_id: int, **fields: Any) -> list[Action]:
        self.numbers[shard_id] += 1
        number = self.numbers[shard_id]
        load = fields.setdefault("load", pb.Load(free_blocks=self.infos[shard_id].num_blocks))
        counts = {name: getattr(load, name) for name in ("free_blocks", "cached_blocks", "used_blocks")}
        load.pools.add(device_id=shard_id, num_blocks=self.infos[shard_id].num_blocks, **counts)
        events = pb.Events(epoch=self.infos[shard_id].epoch, number=number, whole=number == 1, **fields)
        return self.on(ShardReported(self.links[shard_id], events))

    def pong(self, shard_id: int, age: float = 0.0, **fields: Any) -> list[Action]:
        known: dict[str, Any] = {"epoch": self.infos[shard_id].epoch, "has_work": age > 0, "step_age_seconds": age}
        return self.on(ShardPonged(self.links[shard_id], pb.Pong(**{**known, **fields})))

    def tick_to(self, until: float, ponging: Sequence[int] = ()) -> list[Action]:
        actions: list[Action] = []
        while self.now < until:
            self.now = round(self.now + 0.5, 6)
            actions += self.on(Ticked())
            for shard_id in ponging:
                actions += self.pong(shard_id)
        return actions

    def place(self, prompt: Sequence[int], front: int = FRONT, **fields: Any) -> pb.Placed:
        self.tickets += 1
        known: dict[str, Any] = {"ticket": self.tickets, "samples": 1, "max_tokens": 4}
        ask = pb.Place(prompt=array("i", prompt).tobytes(), **{**known, **fields})
        (sent,) = self.on(PlaceAsked(front, ask))
        assert isinstance(sent, SendPlaced) and sent.front == front and sent.placed.ticket == ask.ticket
        return sent.placed

    def condition(self, shard_id: int) -> tuple[int, int]:
        """(epoch, condition)"""
        (state,) = [state for state in self.core.shards().shards if state.info.shard_id == shard_id]
        return state.info.epoch, state.condition


def digests(prompt: Sequence[int], salt: str = "") -> list[int]:
    chain, found, tokens = root_digest(b"model", salt), [], array("i", prompt)
    for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
        chain = link_digest(chain, tokens[at : at + SIZE])
        found.append(int.from_bytes(chain[:8], "little"))
    return found


# Lives


def test_a_shard_is_ready_when_it_has_told_everything() -> None:
    desk = Desk()
    shard = info(3, 9)
    assert desk.on(FrontJoined(FRONT)) == [SendShards(FRONT, pb.Shards())]
    actions = desk.register(shard)
    assert only(actions, DialShard) == [DialShard(1, 3, "host:3")]
    assert desk.condition(3) == (9, pb.CONDITION_UNSPECIFIED)
    assert desk.on(ShardWelcomed(1, shard)) == []
    assert desk.place([1, 2]).code == "UNAVAILABLE"
    (told,) = desk.on(ShardReported(1, pb.Events(epoch=9, number=1, whole=True, load=pb.Load(free_blocks=100))))
    assert told == BroadcastShards(pb.Shards(shards=[pb.ShardState(info=shard, condition=READY)]))
    placed = desk.place([1, 2])
    assert (placed.placed, placed.shard_id, placed.epoch, placed.address) == (True, 3, 9, "host:3")


def test_a_worker_that_still_loads_is_not_dialed() -> None:
    desk = Desk()
    assert only(desk.register(info(0, 1, address=""), pb.CONDITION_UNSPECIFIED), DialShard) == []
    assert only(desk.tick_to(60.0), DialShard) == [] and desk.condition(0) == (1, pb.CONDITION_UNSPECIFIED)
    assert only(desk.register(info(0, 1)), DialShard) == [DialShard(1, 0, "host:0")]


def test_registering_again_changes_nothing() -> None:
    desk = Desk()
    desk.up(0)
    for _ in range(3):
        assert desk.register(info(0, 1)) == []


def test_silence_stops_placements_after_the_lease_and_ends_the_life_after_the_grace() -> None:
    desk = Desk()
    desk.up(0)
    actions = desk.tick_to(5.0)
    assert [ping.number for ping in only(actions, SendPing)] == list(range(1, 11))
    assert desk.place([1]).placed
    desk.tick_to(5.5)
    assert desk.place([1]).code == "UNAVAILABLE" and desk.condition(0) == (1, READY)
    desk.tick_to(10.0)
    actions = desk.tick_to(10.5)
    assert only(actions, HangUp) == [HangUp(1)]
    assert only(actions, FenceShard) == [FenceShard(KEEPER, 0, 1, "silent for 10.5 s")]
    assert desk.condition(0) == (1, DEAD) and len(only(actions, BroadcastShards)) == 1
    assert desk.core.view.shards == {} and len(desk.core.claims) == 0


def test_a_pong_within_the_grace_saves_it() -> None:
    desk = Desk()
    desk.up(0)
    desk.tick_to(9.5)
    desk.pong(0)
    assert desk.place([1]).placed
    assert only(desk.tick_to(14.0), FenceShard) == [] and desk.condition(0) == (1, READY)


def test_a_scheduler_that_slept_blames_nobody() -> None:
    desk = Desk()
    desk.up(0)
    desk.tick_to(2.0, ponging=[0])
    desk.now = 62.0
    assert only(desk.on(Ticked()), FenceShard) == []
    assert desk.place([1]).placed
    assert only(desk.tick_to(72.0), FenceShard) == []  # from here on its own silence counts
    assert len(only(desk.tick_to(72.5), FenceShard)) == 1


def test_sleep_does_not_lend_a_lease_into_the_future() -> None:
    desk = Desk()
    desk.up(0)
    desk.tick_to(2.0)
    desk.now = 62.0
    desk.pong(0)  # read before the late tick
    desk.on(Ticked())
    assert len(only(desk.tick_to(72.5), FenceShard)) == 1


def test_a_connection_that_ends_is_death_at_once() -> None:
    desk = Desk()
    link = desk.up(0)
    actions = desk.on(ShardLost(link, "reset"))
    assert only(actions, FenceShard) == [FenceShard(KEEPER, 0, 1, "the connection to it ended (reset)")]
    assert desk.condition(0) == (1, DEAD)
    assert desk.place([1]).code == "UNAVAILABLE"


def test_a_shard_that_cannot_be_reached_is_dialed_until_its_time_is_up() -> None:
    desk = Desk()
    desk.register(info(0, 1))
    dials = fences = 0
    for _ in range(22):
        desk.on(ShardLost(desk.links[0], "refused"))
        actions = desk.tick_to(desk.now + 0.5)
        dials, fences = dials + len(only(actions, DialShard)), fences + len(only(actions, FenceShard))
    assert (dials, fences) == (20, 1) and desk.condition(0) == (1, DEAD)


def test_a_step_that_hangs_is_death_though_pongs_come() -> None:
    desk = Desk()
    desk.up(0)
    assert desk.pong(0, age=10.0) == []
    assert desk.pong(0, age=60.0, epoch=9, has_work=True) == []  # of another life
    assert desk.pong(0, age=60.0, has_work=False) == []
    actions = desk.pong(0, age=10.5)
    assert only(actions, FenceShard) == [FenceShard(KEEPER, 0, 1, "a step has run for 10.5 s")]


def test_a_dead_life_is_fenced_again_whenever_its_keeper_brings_it_back() -> None:
    desk = Desk()
    desk.on(ShardLost(desk.up(0), "EOF"))
    desk.on(KeeperLost(KEEPER))
    fenced = desk.register(info(0, 1), keeper=KEEPER + 1)
    assert fenced == [FenceShard(KEEPER + 1, 0, 1, "this life was given up")]
    assert desk.register(info(0, 1), DEAD) == [] and desk.tick_to(30.0) == []
    assert desk.condition(0) == (1, DEAD)


def test_no_fence_is_sent_to_a_keeper_that_left() -> None:
    desk = Desk()
    link = desk.up(0)
    desk.on(KeeperLost(KEEPER))
    assert only(desk.on(ShardLost(link, "EOF")), FenceShard) == [] and desk.condition(0) == (1, DEAD)


def test_the_next_epoch_replaces_the_last() -> None:
    desk = Desk()
    old = desk.up(0, 1)
    desk.tell(0, started=[pb.Started(sequence=4, request_id="r")])
    desk.place([1] * 9)
    actions = desk.register(info(0, 2))
    assert actions[:2] == [HangUp(old), DialShard(old + 1, 0, "host:0")]
    assert desk.condition(0) == (2, pb.CONDITION_UNSPECIFIED) and len(desk.core.claims) == 0
    assert desk.on(ShardLost(old, "EOF")) == []
    assert desk.on(ShardReported(old, pb.Events(epoch=1, number=3))) == []
    assert desk.on(ShardPonged(old, pb.Pong(epoch=1, has_work=True, step_age_seconds=99))) == []
    assert desk.register(info(0, 1)) == [] and desk.register(info(0, 1), DEAD) == []
    desk.up(0, 2)
    assert desk.condition(0) == (2, READY) and desk.core.view.shards[0].sequences == {}


def test_another_process_at_the_address_is_left_alone() -> None:
    desk = Desk()
    desk.register(info(0, 1))
    assert desk.on(ShardWelcomed(1, info(0, 2))) == [HangUp(1)]
    assert only(desk.tick_to(0.5), DialShard) == [DialShard(2, 0, "host:0")]
    assert desk.on(ShardWelcomed(2, info(1, 1))) == [HangUp(2)]


def test_a_broken_stream_is_begun_again_without_a_death() -> None:
    desk = Desk()
    link = desk.up(0)
    desk.numbers[0] += 1  # one message is missing
    actions = desk.tell(0)
    assert actions[:2] == [HangUp(link), DialShard(link + 1, 0, "host:0")]
    assert desk.condition(0) == (1, pb.CONDITION_UNSPECIFIED) and desk.core.num_deaths == 0
    desk.on(ShardWelcomed(link + 1, desk.infos[0]))
    desk.numbers[0] = 0
    desk.tell(0)
    assert desk.condition(0) == (1, READY)


def test_a_draining_shard_gets_nothing_new_and_is_no_corpse() -> None:
    desk = Desk()
    desk.up(0)
    (told,) = desk.register(info(0, 1), DRAINING)
    assert isinstance(told, BroadcastShards) and desk.condition(0) == (1, DRAINING)
    assert desk.place([1]).code == "UNAVAILABLE"
    assert only(desk.tick_to(20.0, ponging=[0]), FenceShard) == []
    desk.register(info(0, 1))
    assert desk.place([1]).placed


def test_a_report_makes_it_look() -> None:
    desk = Desk()
    link = desk.up(0, 5)
    assert desk.on(ReportCame(pb.Report(shard_id=0, epoch=5))) == [SendPing(link, 1)]
    assert desk.on(ReportCame(pb.Report(shard_id=0, epoch=4))) == []
    assert desk.on(ReportCame(pb.Report(shard_id=8, epoch=5))) == []


# Placement


def test_without_locality_requests_are_balanced() -> None:
    desk = Desk()
    for shard_id in range(4):
        desk.up(shard_id)
    where = [desk.place([1000 + number] * 9).shard_id for number in range(12)]
    assert where == [0, 1, 2, 3] * 3


def test_load_of_a_shard_is_what_it_tells_and_what_it_was_promised() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    desk.tell(0, load=pb.Load(free_blocks=100, running=2, waiting=1))
    where = [desk.place([number] * 9).shard_id for number in range(5)]
    assert where == [1, 1, 1, 0, 1]
    desk.tell(
        1, load=pb.Load(free_blocks=90, running=3), started=[pb.Started(sequence=n, prompt_tokens=9) for n in (1, 2, 3)]
    )
    assert desk.core.claims.at(1).samples == 1  # of four promised three have come
    assert desk.place([77] * 9).shard_id == 0  # 4 on either; more blocks of 0 are empty


def test_a_shard_with_the_prefix_is_preferred() -> None:
    desk = Desk()
    for shard_id in range(3):
        desk.up(shard_id)
    prompt = list(range(20))
    desk.tell(2, sealed=digests(prompt)[:4], load=pb.Load(free_blocks=90, cached_blocks=4, running=1))
    assert desk.place(prompt).shard_id == 2
    assert desk.place(prompt, cache_salt="tenant").shard_id == 0  # another chain
    assert desk.place([99, *prompt[1:]]).shard_id == 1


def test_a_claim_in_flight_counts_as_a_prefix() -> None:
    desk = Desk()
    for shard_id in range(3):
        desk.up(shard_id)
    prompt = list(range(20))
    assert desk.place([7] * 9).shard_id == 0
    first = desk.place(prompt).shard_id
    assert first == 1
    assert [desk.place([*prompt, number]).shard_id for number in range(3)] == [1, 1, 1]


def test_the_longest_prefix_wins() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    prompt = list(range(40))
    desk.tell(0, sealed=digests(prompt)[:3])
    desk.tell(1, sealed=digests(prompt)[:7], load=pb.Load(free_blocks=80, running=1))
    assert desk.place(prompt).shard_id == 1


def test_locality_ends_where_the_shard_has_no_room() -> None:
    prompt = list(range(20))

    def where(**load: int) -> int:
        desk = Desk()
        desk.up(0)
        desk.up(1)
        desk.tell(1, sealed=digests(prompt), load=pb.Load(**load))
        return desk.place(prompt).shard_id

    assert where(free_blocks=2) == 1  # it needs the last page, which is computed again, and one for output
    assert where(free_blocks=1) == 0
    assert where(free_blocks=0, cached_blocks=2) == 1
    assert where(free_blocks=50, running=4) == 1
    assert where(free_blocks=50, running=5) == 0  # more than a quarter of its 16 seats ahead of the other


def test_a_popular_prefix_comes_to_lie_on_several_shards() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    prompt = list(range(20))
    where = [desk.place(prompt).shard_id for _ in range(12)]
    assert where == [0] * 5 + [1] * 5 + [0, 1]


def test_a_prefix_that_is_a_small_part_of_the_prompt_is_not_worth_a_queue() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    prompt = list(range(40))
    desk.tell(1, sealed=digests(prompt)[:2], load=pb.Load(free_blocks=98, running=1))
    assert desk.place(prompt).shard_id == 0  # 8 of 40 tokens
    desk.on(FrontLeft(FRONT))
    assert desk.place(prompt[:20]).shard_id == 1  # 8 of 20


def test_no_placement_goes_to_an_excluded_shard() -> None:
    desk = Desk()
    for shard_id in range(3):
        desk.up(shard_id)
    prompt = list(range(20))
    desk.tell(1, sealed=digests(prompt))
    assert desk.place(prompt).shard_id == 1
    assert desk.place(prompt, exclude=[1]).shard_id == 0
    assert desk.place(prompt, exclude=[0, 1]).shard_id == 2
    refused = desk.place(prompt, exclude=[0, 1, 2])
    assert (refused.placed, refused.code) == (False, "UNAVAILABLE")
    assert "each of the 3 shards that could run this request has refused or lost it" in refused.message


def test_what_no_shard_can_hold_is_refused_with_numbers() -> None:
    desk = Desk()
    desk.up(0, num_blocks=10)
    desk.up(1, num_blocks=20)
    assert desk.place([1] * 70, max_tokens=10).shard_id == 1
    refused = desk.place([1] * 71, max_tokens=10)
    assert (refused.placed, refused.code) == (False, "INVALID_ARGUMENT")
    assert refused.message == (
        "prompt: got 71 tokens, must with max_tokens 10 be at most 80, which the largest shard can hold "
        "(max_model_len 400, page pool 80 tokens) (exceeds_pool); shorten it or lower max_tokens"
    )
    assert desk.place([1] * 70, max_tokens=10, exclude=[1]).code == "UNAVAILABLE"


def test_a_full_cluster_queues_where_least_waits() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    desk.tell(0, load=pb.Load(running=16, waiting=5))
    desk.tell(1, load=pb.Load(running=16, waiting=3))
    assert [desk.place([n] * 9).shard_id for n in range(4)] == [1, 1, 0, 1]


@pytest.mark.parametrize("prompt", [b"", b"abc", b"12345"])
def test_a_prompt_that_is_no_list_of_token_ids_is_refused(prompt: bytes) -> None:
    desk = Desk()
    desk.up(0)
    (sent,) = desk.on(PlaceAsked(FRONT, pb.Place(ticket=1, prompt=prompt)))
    assert isinstance(sent, SendPlaced) and sent.placed.code == "INVALID_ARGUMENT"


# Claims


def claims(desk: Desk, shard_id: int = 0) -> tuple[int, int, int, int]:
    at = desk.core.claims.at(shard_id)
    return len(desk.core.claims), at.samples, at.pages, len(at.digests)


def test_a_claim_ends_when_the_shard_has_told_all_of_it() -> None:
    desk = Desk()
    desk.up(0)
    prompt = list(range(10))
    desk.place(prompt, samples=2)
    assert claims(desk) == (1, 2, 5, 2)  # three pages of prompt, one for each sample's output
    desk.tell(0, started=[pb.Started(sequence=1, prompt_tokens=10)], sealed=digests(prompt)[:1])
    assert claims(desk) == (1, 0, 0, 2)
    desk.tell(0, started=[pb.Started(sequence=2, prompt_tokens=10, sample=1)], sealed=digests(prompt)[1:])
    assert claims(desk) == (0, 0, 0, 0)


def test_a_claim_without_a_whole_page_ends_when_its_sequence_starts() -> None:
    desk = Desk()
    desk.up(0)
    desk.place([1, 2, 3])
    desk.tell(0, started=[pb.Started(sequence=1, prompt_tokens=4)])
    assert claims(desk) == (1, 1, 2, 0)
    desk.tell(0, started=[pb.Started(sequence=2, prompt_tokens=3)])
    assert claims(desk) == (0, 0, 0, 0)


def test_a_claim_ends_when_the_request_is_placed_again() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    prompt = list(range(10))
    assert desk.place(prompt, ticket=1).shard_id == 0
    assert desk.place(prompt, ticket=1, exclude=[0]).shard_id == 1  # by its ticket
    assert claims(desk, 0) == (1, 0, 0, 0)
    assert desk.place(prompt, ticket=2, exclude=[1]).shard_id == 0  # by its prompt
    assert claims(desk, 1) == (1, 0, 0, 0)
    assert desk.place(prompt, ticket=3, exclude=[0], front=FRONT + 1).shard_id == 1  # not by another's
    assert claims(desk, 0)[:2] == (2, 1)


def test_claims_end_with_their_front_their_shard_and_their_time() -> None:
    desk = Desk()
    desk.up(0)
    desk.up(1)
    for number in range(6):
        desk.place([number] * 9, front=FRONT + number % 3)
    assert (claims(desk, 0), claims(desk, 1)) == ((6, 3, 12, 6), (6, 3, 12, 6))
    desk.on(FrontLeft(FRONT))
    assert (claims(desk, 0), claims(desk, 1)) == ((4, 2, 8, 4), (4, 2, 8, 4))
    desk.on(ShardLost(desk.links[1], "EOF"))
    assert (claims(desk, 0), claims(desk, 1)) == ((2, 2, 8, 4), (2, 0, 0, 0))
    desk.tick_to(20.0, ponging=[0])
    desk.place([9] * 9)
    desk.tick_to(30.0, ponging=[0])
    assert claims(desk)[0] == 3
    desk.tick_to(30.5, ponging=[0])
    assert claims(desk)[0] == 1


# Queries


def ask(desk: Desk, owner: str = "", **what: Any) -> pb.Answer:
    (sent,) = desk.on(QueryAsked(5, pb.Query(ticket=8, owner=owner, **what)))
    assert isinstance(sent, SendAnswer) and sent.peer == 5 and sent.answer.ticket == 8
    return sent.answer


def populated() -> Desk:
    desk = Desk()
    desk.up(1)
    desk.up(0)
    desk.tell(
        1,
        started=[
            pb.Started(sequence=7, request_id="a", owner="alice", prompt_tokens=9, sample=1),
            pb.Started(sequence=6, request_id="a", owner="alice", prompt_tokens=9),
            pb.Started(sequence=8, request_id="b", owner="bob", prompt_tokens=5),
        ],
        entry_sequence=[7, 6, 6, 8, 7],
        entry_index=[0, 0, 1, 0, 1],
        entry_device=[1] * 5,
        entry_block=[30, 30, 31, 40, 32],
        load=pb.Load(free_blocks=90, cached_blocks=6, used_blocks=4, running=3, steps=12, busy_seconds=1.5),
    )
    desk.tell(0, started=[pb.Started(sequence=1, request_id="a", owner="bob", prompt_tokens=2)])
    return desk


def test_the_page_map_shows_a_tenants_own_sequences_and_others_as_counts() -> None:
    desk = populated()
    answer = memory_pb2.GetPageMapResponse.FromString(ask(desk, "alice", page_map=True).body)
    assert [(d.device_id, d.shard_id, d.block_size, d.num_blocks) for d in answer.devices] == [
        (0, 0, SIZE, 100),
        (1, 1, SIZE, 100),
    ]
    assert [(d.free_blocks, d.cached_blocks, d.used_blocks) for d in answer.devices] == [(100, 0, 0), (90, 6, 4)]
    assert [
        (s.request_id, s.index, s.shard_id, s.prompt_tokens, [(p.device_id, p.block_id) for p in s.pages])
        for s in answer.sequences
    ] == [("a", 0, 1, 9, [(1, 30), (1, 31)]), ("a", 1, 1, 9, [(1, 30), (1, 32)])]
    assert [(s.page.device_id, s.page.block_id, s.users) for s in answer.shared_pages] == [(1, 30, 2)]
    admin = memory_pb2.GetPageMapResponse.FromString(ask(desk, page_map=True).body)
    assert [(s.request_id, s.shard_id) for s in admin.sequences] == [("a", 0), ("a", 1), ("a", 1), ("b", 1)]
    nobody = memory_pb2.GetPageMapResponse.FromString(ask(desk, "carol", page_map=True).body)
    assert (len(nobody.sequences), len(nobody.shared_pages)) == (0, 0) and nobody.devices == answer.devices


def test_another_tenants_sequence_is_not_found() -> None:
    desk = populated()
    found = memory_pb2.GetSequencePagesResponse.FromString(ask(desk, "alice", sequence_pages="a").body)
    assert [(s.index, [p.block_id for p in s.pages]) for s in found.sequences] == [(0, [30, 31]), (1, [30, 32])]
    hidden, absent = ask(desk, "alice", sequence_pages="b"), ask(desk, "alice", sequence_pages="z")
    assert (hidden.code, absent.code) == ("NOT_FOUND", "NOT_FOUND")
    assert hidden.message.replace("'b'", "'z'") == absent.message
    assert ask(desk, "alice", sequence_pages="").code == "NOT_FOUND"


def test_cluster_and_loads() -> None:
    desk = populated()
    desk.on(ShardLost(desk.links[0], "EOF"))
    cluster = cluster_pb2.GetClusterResponse.FromString(ask(desk, "alice", cluster=True).body)
    assert [(s.shard_id, s.epoch, s.condition, s.model, list(s.device_ids)) for s in cluster.shards] == [
        (0, 1, cluster_pb2.CONDITION_DEAD, "toy", [0]),
        (1, 1, cluster_pb2.CONDITION_READY, "toy", [1]),
    ]
    loads = cluster_pb2.GetLoadsResponse.FromString(ask(desk, "alice", loads=True).body)
    assert loads == cluster_pb2.GetLoadsResponse(
        loads=[
            cluster_pb2.Load(
                shard_id=1,
                epoch=1,
                free_blocks=90,
                cached_blocks=6,
                used_blocks=4,
                running=3,
                steps=12,
                busy_seconds=1.5,
                pools=[
                    cluster_pb2.Pool(device_id=1, num_blocks=100, free_blocks=90, cached_blocks=6, used_blocks=4),
                ],
            )
        ]
    )


def test_a_query_of_nothing_is_answered() -> None:
    assert ask(Desk()).code == "NOT_FOUND"


def test_an_answer_that_no_message_could_hold_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = populated()
    monkeypatch.setattr("cluster.answers.MAX_ANSWER_PAGES", 4)
    refused = ask(desk, page_map=True)
    assert (refused.code, refused.message) == (
        "RESOURCE_EXHAUSTED",
        "page map: 5 entries, must be at most 4; ask for one request's pages",
    )
    assert ask(desk, "alice", page_map=True).code == ""


# Config


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SchedulerConfig(lease=0), "lease: got 0, must be a number of seconds above 0"),
        (lambda: SchedulerConfig(grace=float("nan")), "grace: got nan, must be a number of seconds above 0"),
        (lambda: SchedulerConfig(lease=1.0, tick=0.6), "lease: got 1.0, must be at least twice the tick, 0.6"),
        (lambda: PolicyConfig(max_prefix_pages=-1), "max_prefix_pages: got -1, must be 0 (no locality) or more"),
        (lambda: PolicyConfig(min_match=-0.1), "min_match: got -0.1, must be a number of at least 0"),
    ],
)
def test_config_is_checked(make: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["answers", "claims", "digest_set", "messages", "policy", "scheduler", "view"])
def test_the_core_reads_no_clock_draws_no_number_and_does_no_io(name: str) -> None:
    source = (ROOT / "cluster" / f"{name}.py").read_text(encoding="utf-8")
    found = {module.partition(".")[0] for module, _, _ in imports(ast.parse(source))}
    assert not found & (IMPURE | {"logging"}), name

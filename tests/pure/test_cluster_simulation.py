"""The global scheduler in a small world of keepers, shards and fronts, from a seed: delays, deaths, freezes, restarts.

Connections keep their order and delay everything; what was on its way when a connection was given up arrives all the
same. Shards are models of a few lines that report as real ones do.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from cluster.claims import Claims
from cluster.messages import (
    Action,
    DialShard,
    Event,
    FenceShard,
    FrontJoined,
    FrontLeft,
    HangUp,
    KeeperLost,
    KeeperRegistered,
    PlaceAsked,
    SendPing,
    SendPlaced,
    ShardLost,
    ShardPonged,
    ShardReported,
    ShardWelcomed,
    Ticked,
)
from cluster.scheduler import GlobalScheduler, SchedulerConfig
from pagetable.prefix_tree import link_digest, root_digest
from quire_pb.worker.v1 import worker_pb2 as pb

SIZE = 4
CONFIG = SchedulerConfig()
SLACK = CONFIG.tick + 1e-6


@dataclass
class Table:
    request_id: str
    prompt: bytes
    blocks: list[int]


@dataclass
class Life:
    """One life of a shard: its tables, and what it tells on its present connection."""

    info: pb.ShardInfo
    seq: int = 0
    number: int = 0
    link: tuple[int, int] = (0, 0)  # (which scheduler, which link); (0, 0): nobody listens
    alive: bool = True
    frozen_until: float = 0.0
    stuck_since: float = -1.0
    tables: dict[int, Table] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)
    events: pb.Events = field(default_factory=pb.Events)

    def start(self, request_id: str, prompt: bytes, rng: random.Random) -> None:
        self.seq += 1
        pages = len(prompt) // 4 // SIZE
        table = self.tables[self.seq] = Table(request_id, prompt, [rng.randrange(1 << 24) for _ in range(pages)])
        self.tell(self.seq, table)
        for digest in digests(prompt) - self.sealed:
            self.sealed.add(digest)
            self.events.sealed.append(digest)

    def end(self, number: int) -> None:
        del self.tables[number]
        self.events.ended.append(number)

    def tell(self, number: int, table: Table) -> None:
        self.events.started.add(
            sequence=number, request_id=table.request_id, owner="o", prompt_tokens=len(table.prompt) // 4
        )
        for index, block in enumerate(table.blocks):
            self.events.entry_sequence.append(number)
            self.events.entry_index.append(index)
            self.events.entry_device.append(self.info.shard_id)
            self.events.entry_block.append(block)

    def welcome(self, link: tuple[int, int]) -> None:
        self.link, self.number, self.events = link, 0, pb.Events(whole=True)
        for number, table in self.tables.items():
            self.tell(number, table)
        self.events.sealed.extend(self.sealed)

    def take(self) -> pb.Events:
        self.number += 1
        events, self.events = self.events, pb.Events()
        events.epoch, events.number = self.info.epoch, self.number
        events.load.running = len(self.tables)
        events.load.free_blocks = self.info.num_blocks - sum(len(t.blocks) for t in self.tables.values())
        return events


def digests(prompt: bytes) -> set[int]:
    tokens, chain, found = array("i"), root_digest(b"id"), set()
    tokens.frombytes(prompt)
    for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
        chain = link_digest(chain, tokens[at : at + SIZE])
        found.add(int.from_bytes(chain[:8], "little"))
    return found


class World:
    """Everything around the core, on one heap of (time, order, what happens)."""

    def __init__(self, seed: int, num_shards: int = 3, num_fronts: int = 2) -> None:
        self.rng = random.Random(seed)
        self.now, self.order = 0.0, 0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.faults = True
        self.generation, self.core = 0, GlobalScheduler(CONFIG)
        self.numbers = self.tickets = 0
        self.lives: dict[int, Life] = {}
        self.keepers: dict[int, int] = {}  # shard -> number of its keeper's connection
        self.fronts = [0] * num_fronts
        self.given_up: set[int] = set()
        self.arrivals: dict[object, float] = {}  # connections keep their order
        self.families = [bytes(array("i", [self.rng.randrange(50) for _ in range(24)])) for _ in range(4)]
        self.asked: dict[tuple[int, int], pb.Place] = {}
        self.counts = dict.fromkeys(("placed", "refused", "fenced", "deaths", "restarts", "stale"), 0)
        for shard_id in range(num_shards):
            self.be_born(shard_id, 100)
        self.restart()
        self.at(0.1, self.fault)

    def at(self, delay: float, what: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.heap, (self.now + delay, self.order, what))

    def send(self, channel: object, what: Callable[[], None]) -> None:
        """Deliver after a while, behind what was sent before on the same channel."""
        delay = self.rng.random() * (1.5 if self.faults and self.rng.random() < 0.03 else 0.05)
        due = max(self.now + delay, self.arrivals.get(channel, 0.0))
        self.arrivals[channel] = due
        self.at(due - self.now, what)

    def run(self, until: float) -> None:
        while self.heap and self.heap[0][0] <= until:
            self.now, _, what = heapq.heappop(self.heap)
            what()

    # The scheduler's process

    def restart(self) -> None:
        """A new scheduler; all its connections are new."""
        self.generation += 1
        self.core = GlobalScheduler(CONFIG)
        self.given_up = set()
        for life in self.lives.values():
            life.link = (0, 0)
        self.keepers = {}
        self.fronts = [0] * len(self.fronts)
        self.tick(self.generation)
        for index in range(len(self.fronts)):
            self.at(self.rng.random(), lambda index=index: self.join(index))  # type: ignore[misc]
        for shard_id in self.lives:
            self.at(self.rng.random(), lambda shard_id=shard_id: self.register(shard_id, self.generation))  # type: ignore[misc]

    def tick(self, generation: int) -> None:
        if generation == self.generation:
            self.take(Ticked())
            self.at(CONFIG.tick, lambda: self.tick(generation))

    def take(self, event: Event) -> None:
        link = getattr(event, "link", None)
        self.counts["stale"] += link in self.given_up
        before = None if link not in self.given_up else (self.core.shards(), len(self.core.claims))
        actions = self.core.on(event, self.now)
        if before is not None:
            assert (self.core.shards(), len(self.core.claims)) == before and actions == [], "a stale message had effect"
        for action in actions:
            self.act(action)
        check_claims(self.core.claims, self.now)

    def act(self, action: Action) -> None:
        match action:
            case DialShard():
                self.dial(action)
            case HangUp():
                assert action.link not in self.given_up
                self.given_up.add(action.link)
                for life in self.lives.values():
                    if life.link == (self.generation, action.link):
                        life.link = (0, 0)
            case SendPing():
                assert action.link not in self.given_up, "a ping on a connection that was given up"
                self.ping((self.generation, action.link), action.number)
            case FenceShard():
                self.counts["fenced"] += 1
                state = {s.info.shard_id: s for s in self.core.shards().shards}[action.shard_id]
                assert state.condition == pb.CONDITION_DEAD and state.info.epoch == action.epoch
                self.send(("fence", action.keeper), lambda: self.fence(action.shard_id, action.epoch))
            case SendPlaced():
                if action.placed.placed:
                    state = {s.info.shard_id: s for s in self.core.shards().shards}[action.placed.shard_id]
                    assert state.condition == pb.CONDITION_READY, "placed on a shard that is not ready"
                    assert state.info.epoch == action.placed.epoch and state.info.address == action.placed.address
                    heard = self.core._shards[action.placed.shard_id].heard
                    assert self.now - heard <= CONFIG.lease, "placed on a silent shard"
                self.send(("placed", action.front), lambda: self.placed(action.front, action.placed))

    # Shards and keepers

    def be_born(self, shard_id: int, epoch: int) -> None:
        info = pb.ShardInfo(shard_id=shard_id, epoch=epoch, address=f"h:{epoch}", block_size=SIZE, num_blocks=4000)
        info.max_model_len, info.max_num_seqs, info.identity = 1000, 64, b"id"
        info.device_ids.append(shard_id)
        self.lives[shard_id] = Life(info)
        self.work(self.lives[shard_id])

    def die(self, life: Life) -> None:
        if not life.alive:
            return
        life.alive = False
        self.counts["deaths"] += 1
        generation, link = life.link
        if generation == self.generation:
            self.send((generation, link), lambda: self.deliver(generation, ShardLost(link, "EOF")))
        shard_id, epoch = life.info.shard_id, life.info.epoch
        self.at(0.01, lambda: self.register(shard_id, self.generation, repeat=False))
        self.at(self.rng.uniform(0.2, 2.0), lambda: self.be_born(shard_id, epoch + 1))

    def fence(self, shard_id: int, epoch: int) -> None:
        if self.lives[shard_id].info.epoch == epoch:
            self.die(self.lives[shard_id])

    def register(self, shard_id: int, generation: int, repeat: bool = True) -> None:
        if generation != self.generation:
            return
        if self.faults and self.rng.random() < 0.05 and shard_id in self.keepers:  # its connection breaks
            gone = self.keepers.pop(shard_id)
            self.send(("keeper", gone), lambda: self.deliver(generation, KeeperLost(gone)))
        if shard_id not in self.keepers:
            self.numbers += 1
            self.keepers[shard_id] = self.numbers
        keeper, life = self.keepers[shard_id], self.lives[shard_id]
        message = pb.Register(info=life.info, condition=pb.CONDITION_READY if life.alive else pb.CONDITION_DEAD)
        for _ in range(2 if self.rng.random() < 0.2 else 1):  # now and then twice
            self.send(("keeper", keeper), lambda: self.deliver(generation, KeeperRegistered(keeper, message)))
        if repeat:
            self.at(1.0, lambda: self.register(shard_id, generation))

    def deliver(self, generation: int, event: Event) -> None:
        if generation == self.generation:
            self.take(event)

    def dial(self, action: DialShard) -> None:
        generation, channel = self.generation, (self.generation, action.link)

        def arrive() -> None:
            life = self.lives[action.shard_id]
            if generation != self.generation or action.link in self.given_up:
                return
            if not life.alive or life.info.address != action.address:
                self.send(channel, lambda: self.deliver(generation, ShardLost(action.link, "refused")))
            elif self.now < life.frozen_until:
                self.at(life.frozen_until - self.now + 0.01, arrive)  # the kernel takes it, nobody answers
            else:
                life.welcome(channel)
                self.send(channel, lambda: self.deliver(generation, ShardWelcomed(action.link, life.info)))
                self.report(life)

        self.send(("dial", action.link, generation), arrive)

    def report(self, life: Life) -> None:
        generation, link = life.link
        if generation and life.alive:
            events = life.take()
            self.send((generation, link), lambda: self.deliver(generation, ShardReported(link, events)))

    def ping(self, channel: tuple[int, int], number: int) -> None:
        def arrive() -> None:
            life = next((one for one in self.lives.values() if one.link == channel and one.alive), None)
            if life is None:
                return
            if self.now < life.frozen_until:
                self.at(life.frozen_until - self.now + 0.01, arrive)
                return
            age = self.now - life.stuck_since if life.stuck_since >= 0 else 0.0
            pong = pb.Pong(number=number, epoch=life.info.epoch, has_work=age > 0, step_age_seconds=age)
            self.send(channel, lambda: self.deliver(channel[0], ShardPonged(channel[1], pong)))

        self.send(("ping", *channel), arrive)

    def work(self, life: Life) -> None:
        """A step: something ends, and all is told."""
        if not life.alive or self.lives[life.info.shard_id] is not life:
            return
        if self.now >= life.frozen_until and life.stuck_since < 0:
            for number in list(life.tables):
                if self.rng.random() < 0.1:
                    life.end(number)
            self.report(life)
        self.at(self.rng.uniform(0.05, 0.2), lambda: self.work(life))

    # Fronts

    def join(self, index: int) -> None:
        self.numbers += 1
        self.fronts[index] = front = self.numbers
        self.take(FrontJoined(front))
        self.ask(index, front)

    def ask(self, index: int, front: int) -> None:
        if self.fronts[index] != front:
            return
        self.tickets += 1
        prompt = self.rng.choice(self.families)[: 4 * self.rng.randrange(1, 24)]
        self.place(front, pb.Place(ticket=self.tickets, prompt=prompt, samples=1, max_tokens=8))
        self.at(self.rng.uniform(0.02, 0.4), lambda: self.ask(index, front))

    def place(self, front: int, place: pb.Place) -> None:
        generation = self.generation
        self.asked[front, place.ticket] = place
        self.send(("front", front), lambda: self.deliver(generation, PlaceAsked(front, place)))

    def placed(self, front: int, placed: pb.Placed) -> None:
        place = self.asked.pop((front, placed.ticket))
        if not placed.placed:
            self.counts["refused"] += 1
            assert placed.code == "UNAVAILABLE"
            return
        self.counts["placed"] += 1
        assert placed.shard_id not in place.exclude
        life = self.lives[placed.shard_id]
        roll = self.rng.random()
        if roll < 0.03:
            return  # the client has gone away meanwhile: the shard never hears of it
        if front not in self.fronts or not life.alive or life.info.epoch != placed.epoch or roll < 0.08:
            if front in self.fronts and len(place.exclude) < 2:
                again = pb.Place.FromString(place.SerializeToString())
                again.exclude.append(placed.shard_id)
                self.tickets += 1
                again.ticket = self.tickets if self.rng.random() < 0.5 else place.ticket
                self.place(front, again)
            return
        if life.stuck_since < 0:
            life.start(f"r{front}-{placed.ticket}", place.prompt, self.rng)

    # Faults

    def fault(self) -> None:
        if not self.faults:
            return
        roll, life = self.rng.random(), self.rng.choice(list(self.lives.values()))
        if roll < 0.25:
            self.die(life)
        elif roll < 0.50:
            life.frozen_until = self.now + self.rng.choice([1.0, 6.0, 30.0])
        elif roll < 0.60:
            life.stuck_since = self.now
        elif roll < 0.80:
            self.counts["restarts"] += 1
            self.restart()
        else:
            index = self.rng.randrange(len(self.fronts))
            if front := self.fronts[index]:
                self.fronts[index] = 0
                self.send(("front", front), lambda g=self.generation: self.deliver(g, FrontLeft(front)))  # type: ignore[misc]
                self.at(1.0, lambda g=self.generation: self.join(index) if g == self.generation else None)  # type: ignore[misc]
        self.at(self.rng.expovariate(0.25), self.fault)

    def heal(self) -> None:
        """No more faults; what is frozen or stuck is found out; then all is quiet."""
        self.faults = False
        self.run(self.now + 60.0)
        self.fronts = [0] * len(self.fronts)  # nothing new
        self.run(self.now + CONFIG.policy.claim_seconds + 10.0)


def check_claims(claims: Claims, now: float) -> None:
    """Recount; nothing lives for longer than it may."""
    everything = list(claims)
    assert all(now - claim.made <= CONFIG.policy.claim_seconds + SLACK for claim in everything), "a claim leaked"
    for shard_id in {claim.shard_id for claim in everything}:
        here, at = [claim for claim in everything if claim.shard_id == shard_id], claims.at(shard_id)
        waiting = [claim for claim in here if not claim.arrived]
        assert at.samples == sum(claim.samples for claim in waiting)
        assert at.pages == sum(claim.pages for claim in waiting)
        assert at.digests == {digest for claim in here for digest in claim.digests}


def seen(core: GlobalScheduler) -> dict[int, tuple[int, dict[int, tuple[str, list[int]]], set[int]]]:
    return {
        shard_id: (
            view.epoch,
            {number: (s.request_id, [block for _, block in s.pages()]) for number, s in view.sequences.items()},
            view.sealed,
        )
        for shard_id, view in core.view.shards.items()
    }


@pytest.mark.parametrize("seed", range(40))
def test_after_any_faults_the_scheduler_knows_what_is_and_a_new_one_knows_the_same(seed: int) -> None:
    world = World(seed)
    world.run(100.0)
    world.heal()
    lives = world.lives
    states = {state.info.shard_id: state for state in world.core.shards().shards}
    assert {i: (s.info.epoch, s.condition) for i, s in states.items()} == {
        i: (life.info.epoch, pb.CONDITION_READY) for i, life in lives.items()
    }
    truth = {
        i: (life.info.epoch, {n: (t.request_id, t.blocks) for n, t in life.tables.items()}, life.sealed)
        for i, life in lives.items()
    }
    assert seen(world.core) == truth
    assert len(world.core.claims) == 0
    old = world.core.shards()
    world.fronts = []
    world.restart()
    world.run(world.now + 5.0)
    assert seen(world.core) == truth and world.core.shards() == old


def test_the_seeds_reach_all_of_it() -> None:
    totals: dict[str, int] = {}
    for seed in range(6):
        world = World(seed)
        world.run(80.0)
        for name, count in world.counts.items():
            totals[name] = totals.get(name, 0) + count
    assert all(count > 0 for count in totals.values()), totals
    assert totals["placed"] > 1000 and totals["deaths"] > 20 and totals["restarts"] > 10


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        world = World(5)
        world.run(60.0)
        runs.append((world.counts, world.core.shards().SerializeToString(), world.order))
    assert runs[0] == runs[1]

"""Shards as a global scheduler hears them, of any size, made from a seed: Fleet, and Kinds of events to time on one."""

from __future__ import annotations

import math
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.messages import (
    Action,
    DialShard,
    Event,
    FrontLeft,
    KeeperRegistered,
    PlaceAsked,
    QueryAsked,
    SendAnswer,
    SendPlaced,
    ShardPonged,
    ShardReported,
    ShardWelcomed,
    Ticked,
)
from cluster.scheduler import GlobalScheduler
from pagetable.ids import MAX_BLOCKS
from pagetable.prefix_tree import extend_digests, root_digest
from quire_pb.worker.v1 import worker_pb2 as pb

NUM_SHARDS, NUM_DEVICES = 64, 16
FEWEST_PAGES, MOST_PAGES = 10, 65_536
BLOCK_SIZE, IDENTITY = 16, b"scale"
FILL_PAGES, CHUNK = 1024, 64  # pages of a message while tables fill; of a prefill chunk
SHARED_PAGES, SHARED_SHARDS = 8192, 8  # a prefix that many prompts have, and on how many shards it lies
FRONT = 9_999


@dataclass(slots=True)
class Running:
    """A sequence as its shard knows it."""

    shard_id: int
    number: int
    num_pages: int
    target: int


def log_uniform(rng: random.Random) -> int:
    """Pages of a sequence."""
    return round(math.exp(rng.uniform(math.log(FEWEST_PAGES), math.log(MOST_PAGES))))


class Fleet:
    """Shards that tell a scheduler of their sequences.

    Args:
        seed: of lengths and digests.
        num_devices: of each shard.
    """

    def __init__(self, seed: int, num_shards: int = NUM_SHARDS, num_devices: int = NUM_DEVICES) -> None:
        self.core, self.now = GlobalScheduler(), 0.0
        self.rng = random.Random(seed)
        self.num_shards, self.num_devices = num_shards, num_devices
        self.running: list[Running] = []
        self.num_pages = self.num_events = 0
        self._seed, self._sequences, self._tickets = seed, 0, 0
        self._numbers = [0] * num_shards
        self._links = [0] * num_shards
        self._blocks = [0] * num_shards
        for shard_id in range(num_shards):
            self.join(shard_id)
            self.tell(shard_id, pb.Events())

    def info(self, shard_id: int) -> pb.ShardInfo:
        first = shard_id * self.num_devices
        return pb.ShardInfo(
            shard_id=shard_id,
            epoch=1,
            address=f"host:{shard_id}",
            block_size=BLOCK_SIZE,
            num_blocks=MAX_BLOCKS - 1,
            max_model_len=2 * MOST_PAGES * BLOCK_SIZE,
            max_num_seqs=1024,
            identity=IDENTITY,
            device_ids=range(first, first + self.num_devices),
        )

    def on(self, event: Event) -> list[Action]:
        self.num_events += 1
        return self.core.on(event, self.now)

    def join(self, shard_id: int) -> None:
        """Its keeper brings it and the scheduler dials."""
        info = self.info(shard_id)
        actions = self.on(KeeperRegistered(shard_id, pb.Register(info=info, condition=pb.CONDITION_READY)))
        (self._links[shard_id],) = [action.link for action in actions if isinstance(action, DialShard)]
        self.on(ShardWelcomed(self._links[shard_id], info))

    def reported(self, shard_id: int, events: pb.Events) -> ShardReported:
        """That message as the next of its connection."""
        self._numbers[shard_id] += 1
        events.epoch, events.number = 1, self._numbers[shard_id]
        events.whole = events.number == 1
        events.load.free_blocks, events.load.running = MAX_BLOCKS // 2, 8
        return ShardReported(self._links[shard_id], events)

    def tell(self, shard_id: int, events: pb.Events) -> None:
        self.on(self.reported(shard_id, events))

    def ponged(self, shard_id: int) -> ShardPonged:
        return ShardPonged(self._links[shard_id], pb.Pong(epoch=1))

    def create(self, target: int = 0) -> Running:
        """A sequence without pages; the scheduler hears of it by `start`."""
        self._sequences += 1
        return Running(self._sequences % self.num_shards, self._sequences, 0, target or log_uniform(self.rng))

    def start(self, events: pb.Events, sequence: Running) -> None:
        tokens = sequence.target * BLOCK_SIZE
        name, owner = f"request-{sequence.number}", f"tenant-{sequence.number % 100}"
        events.started.add(sequence=sequence.number, request_id=name, owner=owner, prompt_tokens=tokens)

    def enter(self, events: pb.Events, sequence: Running, count: int) -> None:
        """Its next `count` pages, spread over the shard's devices."""
        first, block = sequence.num_pages, self._blocks[sequence.shard_id]
        device = sequence.shard_id * self.num_devices
        events.entry_sequence.extend([sequence.number] * count)
        events.entry_index.extend(range(first, first + count))
        events.entry_device.extend(device + each % self.num_devices for each in range(block, block + count))
        events.entry_block.extend(each % MAX_BLOCKS for each in range(block, block + count))
        self._blocks[sequence.shard_id] += count
        sequence.num_pages += count

    def digests(self, sequence: Running) -> array[int]:
        """Of all its pages to come; a generator's numbers in place of SHA-256, alike in every call."""
        words = array("Q")
        words.frombytes(random.Random(self._seed << 32 | sequence.number).randbytes(8 * sequence.target))
        return words

    def fill(self, num_sequences: int) -> None:
        """Start that many and let them grow in turns, a message of each at a time, until all are there."""
        growing = []
        for _ in range(num_sequences):
            sequence, events = self.create(), pb.Events()
            self.start(events, sequence)
            self.tell(sequence.shard_id, events)
            self.running.append(sequence)
            growing.append((sequence, self.digests(sequence)))
            if len(growing) == 4 * self.num_shards:  # their digests are this process's memory, too
                self.grow(growing)
        self.grow(growing)

    def grow(self, growing: list[tuple[Running, array[int]]]) -> None:
        while growing:
            for sequence, digests in growing:
                first, events = sequence.num_pages, pb.Events()
                self.enter(events, sequence, min(FILL_PAGES, sequence.target - first))
                events.sealed.extend(digests[first : sequence.num_pages])
                self.num_pages += sequence.num_pages - first
                self.tell(sequence.shard_id, events)
            growing[:] = [each for each in growing if each[0].num_pages < each[0].target]

    def whole(self, shard_id: int) -> ShardReported:
        """The first message of a new connection to a shard, which tells everything."""
        events = pb.Events()
        for sequence in self.running:
            if sequence.shard_id == shard_id:
                count, sequence.num_pages = sequence.num_pages, 0
                self.start(events, sequence)
                self.enter(events, sequence, count)
                events.sealed.extend(self.digests(sequence)[:count])
        broken = ShardReported(self._links[shard_id], pb.Events(epoch=1, number=0))
        (link,) = [action.link for action in self.on(broken) if isinstance(action, DialShard)]
        self._links[shard_id], self._numbers[shard_id] = link, 0
        self.on(ShardWelcomed(link, self.info(shard_id)))
        return self.reported(shard_id, events)

    def ask(self, prompt: bytes) -> PlaceAsked:
        self._tickets += 1
        return PlaceAsked(FRONT, pb.Place(ticket=self._tickets, prompt=prompt, samples=1, max_tokens=BLOCK_SIZE))

    def table_bytes(self) -> int:
        """What the scheduler's tables and digests take, but for what malloc adds."""
        shards = self.core.view.shards.values()
        entries = sum(sys.getsizeof(s.entries) for shard in shards for s in shard.sequences.values())
        return entries + sum(shard.sealed.num_bytes() for shard in shards)


class Kinds:
    """Makes events of each kind, of the same content whatever the fleet's size; what is made must be handed to the
    fleet's core before the next is made.

    Args:
        seed: of prompts.
    """

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet, self.rng = fleet, random.Random(seed)
        self.short: list[Running] = []  # started here, CHUNK pages each
        self.sealed: list[tuple[int, array[int]]] = []
        self.shared = array("i", self.rng.choices(range(4096), k=SHARED_PAGES * BLOCK_SIZE))
        chain: list[bytes] = []
        extend_digests(chain, root_digest(IDENTITY), self.shared, BLOCK_SIZE, SHARED_PAGES)
        for shard_id in range(0, fleet.num_shards, max(1, fleet.num_shards // SHARED_SHARDS)):
            fleet.tell(shard_id, pb.Events(sealed=[int.from_bytes(link[:8], "little") for link in chain]))
        self.makers: dict[str, Callable[[], Event]] = {
            "start with 64 pages found": self.begin,
            "64 pages of a prompt, sealed": self.chunk,
            "64 pages forgotten": self.forget,
            "8 grow by a page, 8 sealed": self.step,
            "preempted": self.preempt,
            "runs again with 64 pages": self.again,
            "pages of one request": self.query,
            "ended": self.end,
            "pong": self.pong,
            "tick": Ticked,
            "place 64 new pages": self.place_new,
            "place 4,096 pages, half shared": self.place_half,
            "place 65,536 pages, 8,192 shared": self.place_long,
        }

    def begin(self) -> Event:
        sequence, events = self.fleet.create(2 * CHUNK), pb.Events()
        self.fleet.start(events, sequence)
        self.fleet.enter(events, sequence, CHUNK)
        self.short.append(sequence)
        return self.fleet.reported(sequence.shard_id, events)

    def chunk(self) -> Event:
        sequence = self._pick(self.fleet.running)
        events, digests = pb.Events(), array("Q", self.rng.randbytes(8 * CHUNK))
        self.fleet.enter(events, sequence, CHUNK)
        events.sealed.extend(digests)
        self.sealed.append((sequence.shard_id, digests))
        return self.fleet.reported(sequence.shard_id, events)

    def forget(self) -> Event:
        shard_id, digests = self.sealed.pop(self.rng.randrange(len(self.sealed)))
        return self.fleet.reported(shard_id, pb.Events(forgotten=digests))

    def step(self) -> Event:
        shard_id = self.rng.randrange(self.fleet.num_shards)
        mine = [sequence for sequence in self.fleet.running if sequence.shard_id == shard_id]
        events = pb.Events(sealed=array("Q", self.rng.randbytes(8 * 8)))
        for sequence in self.rng.sample(mine, min(8, len(mine))):
            self.fleet.enter(events, sequence, 1)
        return self.fleet.reported(shard_id, events)

    def preempt(self) -> Event:
        sequence = self.short[self.rng.randrange(len(self.short))]
        sequence.num_pages = 0
        return self.fleet.reported(sequence.shard_id, pb.Events(released=[sequence.number]))

    def again(self) -> Event:
        waiting = [sequence for sequence in self.short if not sequence.num_pages]
        sequence = self._pick(waiting or self.short)
        sequence.num_pages = 0
        events = pb.Events(released=[sequence.number])
        self.fleet.start(events, sequence)
        self.fleet.enter(events, sequence, CHUNK)
        return self.fleet.reported(sequence.shard_id, events)

    def query(self) -> Event:
        running = [sequence for sequence in self.short if sequence.num_pages]
        return QueryAsked(1, pb.Query(sequence_pages=f"request-{self._pick(running).number}"))

    def end(self) -> Event:
        sequence = self.short.pop(self.rng.randrange(len(self.short)))
        return self.fleet.reported(sequence.shard_id, pb.Events(ended=[sequence.number]))

    def pong(self) -> Event:
        return self.fleet.ponged(self.rng.randrange(self.fleet.num_shards))

    def place_new(self) -> Event:
        return self.fleet.ask(self.tokens(CHUNK))

    def place_half(self) -> Event:
        return self.fleet.ask(self.shared[: 2048 * BLOCK_SIZE].tobytes() + self.tokens(2048))

    def place_long(self) -> Event:
        return self.fleet.ask(self.shared.tobytes() + self.tokens(MOST_PAGES - SHARED_PAGES))

    def _pick(self, among: Sequence[Running]) -> Running:
        return among[self.rng.randrange(len(among))]

    def tokens(self, pages: int) -> bytes:
        return self.rng.randbytes(4 * BLOCK_SIZE * pages)

    def run(self, name: str, count: int) -> Iterator[float]:
        """CPU microseconds of each of that many events of one kind."""
        make, fleet = self.makers[name], self.fleet
        for _ in range(count):
            event = make()
            start = time.thread_time_ns()
            actions = fleet.on(event)
            yield (time.thread_time_ns() - start) / 1e3
            _check(event, actions)
        fleet.on(FrontLeft(FRONT))  # ends what claims the placements left


def _check(event: Event, actions: list[Action]) -> None:
    """The event did what it stands for: nothing was refused, no stream broke."""
    match event:
        case PlaceAsked():
            assert isinstance(actions[0], SendPlaced) and actions[0].placed.placed, actions
        case QueryAsked():
            assert isinstance(actions[0], SendAnswer) and not actions[0].answer.code, actions
        case ShardReported() | ShardPonged():
            assert actions == [], actions

"""What a plan costs on its way to the other ranks of a shard: through shared memory, over sockets and by
torch.distributed's broadcast, in turn.

    python -m benchmarks.broadcast [--ranks 4] [--seqs 256] [--changes 16] [--rounds 400]

Each rank is an idle process of one thread that waits for plans as `worker/rank.py` does. A round begins when the leader
begins to encode the plan and ends when the last rank has checked its digest and decoded it. `decode` is a step in which
each sequence gains a token and a few get a page; in `admit` all are new, with a short prompt. Milliseconds. The goal is
a median below 0.15 ms for a decode step by the quickest way.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import socket
import statistics
import struct
import tempfile
import time
from array import array
from typing import Any

import torch

from kernels.peers import Ring
from pagetable.frames import Kind
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from worker.broadcast import IDLE_TIMEOUT, Broadcast, Star, TorchBroadcast
from worker.channel import Channel
from worker.codec import decode_plan, encode_plan
from worker.gloo import Store, World
from worker.plan import Admit, Plan
from worker.ranks import DIGEST_BYTES, NO_PLANS, digest_with
from worker.segment import MESSAGE_BYTES

GOAL_MS = 0.15
BLOCK = 20  # rounds of one way before it is the other's turn
PAUSE = 0.001  # between rounds: ranks are asleep again
PROMPT = 8  # tokens of each new sequence
SECRET = b"b" * 32
SPAWN = multiprocessing.get_context("spawn")
WAYS = ("memory", "sockets", "torch")
SLOTS = 2
RING_BYTES = -(-Ring.num_bytes(SLOTS, MESSAGE_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
_TIME = struct.Struct("<q")


def decode_step(seqs: int, changes: int) -> Plan:
    """One token of each sequence, some of which get a page."""

    def ints(count: int, first: int = 0) -> array[int]:
        return array("i", range(first, first + count))

    plan = Plan(PlanNumber(1), slots=ints(seqs), query_start=ints(seqs + 1), first_position=ints(seqs, 1000))
    plan.tokens = ints(seqs, 100)
    plan.table_slot, plan.table_index, plan.table_group = ints(changes), ints(changes, 60), ints(changes)
    plan.table_blocks = [ints(changes, 4000)]
    plan.sample_row, plan.sample_slot, plan.sample_position = ints(seqs), ints(seqs), ints(seqs, 1001)
    return plan


def admit_step(seqs: int) -> Plan:
    """All sequences are new, each with a seed and a length of its own."""
    plan = decode_step(seqs, seqs)
    plan.tokens = array("i", range(seqs * PROMPT))
    plan.query_start = array("i", range(0, seqs * PROMPT + 1, PROMPT))
    plan.first_position = array("i", [0] * seqs)
    plan.admits = [
        Admit(
            slot=index,
            sequence_id=SequenceId(index),
            sample_index=0,
            params=SamplingParams(seed=index, max_tokens=100 + index, temperature=0.7),
            prompt_length=PROMPT,
            tokens=array("i", range(PROMPT)),
            eos_token_ids=(1,),
        )
        for index in range(seqs)
    ]
    return plan


def join(world: World, rank: int, ranks: int, store: str) -> TorchBroadcast:
    world.form(store, 1, rank, ranks + 1, "127.0.0.1")
    group = world.group(range(ranks + 1), IDLE_TIMEOUT)
    assert group is not None
    world.seal()
    return TorchBroadcast(group)


def ring(path: str, rank: int) -> Ring:
    """To a rank, in a file of its own part of shared memory."""
    with open(path, "r+b") as file:
        return Ring(mmap.mmap(file.fileno(), 0), (rank - 1) * RING_BYTES, SLOTS, MESSAGE_BYTES)


def follow(rank: int, ranks: int, rounds: int, path: str, leader: tuple[str, int], store: str) -> None:
    """A rank: take as many plans as there are, and write down when each was understood."""
    torch.set_num_threads(1)
    with open(path, "r+b") as file:
        times = mmap.mmap(file.fileno(), 0)
    channel = Channel.dial(leader, str(rank), SECRET)
    stars = Star({0: channel}, {0: ring(f"{path}-plans", rank)}), Star({0: channel}, {})
    ways: tuple[Broadcast, ...] = (*stars, join(World(), rank, ranks, store))
    channel.send(Kind.FORMED, b"")
    digest = NO_PLANS
    for number in range(rounds):
        payload = ways[number // BLOCK % len(ways)].receive()
        if payload[:DIGEST_BYTES] != digest:
            raise SystemExit("a plan is missing")
        data = payload[DIGEST_BYTES:]
        decode_plan(data)
        _TIME.pack_into(times, (number * ranks + rank - 1) * _TIME.size, time.monotonic_ns())
        digest = digest_with(data, digest)


def measure(ranks: int, plan: Plan, rounds: int) -> tuple[list[list[float]], int]:
    """Milliseconds of every round of each way, and the bytes of the plan."""
    rounds = -(-rounds // BLOCK) * BLOCK * len(WAYS)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        open(f"{folder}/times", "w+b") as file,
        open(f"{folder}/times-plans", "wb") as rings,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        size = rounds * ranks * _TIME.size
        file.truncate(size)
        rings.truncate(ranks * RING_BYTES)
        times = mmap.mmap(file.fileno(), 0)
        store = Store("127.0.0.1")
        address: Any = server.getsockname()
        arguments = [(rank, ranks, rounds, file.name, address, store.address) for rank in range(1, ranks + 1)]
        processes = [SPAWN.Process(target=follow, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        channels = dict(sorted(_welcome(server) for _ in range(ranks)))
        world = World()
        memory = {rank: ring(rings.name, rank) for rank in channels}
        ways: tuple[Broadcast, ...] = (
            Star(channels, memory),
            Star(channels, {}),
            join(world, 0, ranks, store.address),
        )
        for channel in channels.values():
            channel.receive()
        found: list[list[float]] = [[] for _ in ways]
        digest = NO_PLANS
        for number in range(rounds):
            time.sleep(PAUSE)
            began = time.monotonic_ns()
            data = encode_plan(plan)
            way = number // BLOCK % len(ways)
            ways[way].send(digest + data)
            digest = digest_with(data, digest)
            found[way].append((_last(times, number, ranks, processes) - began) / 1e6)
        for process in processes:
            process.join(30)
        for channel in channels.values():
            channel.shut()
        world.close()
        return found, DIGEST_BYTES + len(encode_plan(plan))


def _welcome(server: socket.socket) -> tuple[int, Channel]:
    channel, name = Channel.welcome(server.accept()[0], SECRET)
    return int(name), channel


def _last(times: mmap.mmap, number: int, ranks: int, processes: list[Any]) -> int:
    """When the last rank had it."""
    place = number * ranks * _TIME.size
    while True:
        found = struct.unpack_from(f"<{ranks}q", times, place)
        if all(found):
            return int(max(found))
        if not all(process.is_alive() for process in processes) and number * ranks + ranks < len(times) // _TIME.size:
            raise SystemExit("a rank has died")
        time.sleep(50e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="that wait for plans, beside the leader")
    parser.add_argument("--seqs", type=int, default=256)
    parser.add_argument("--changes", type=int, default=16, help="of tables, in a decode step")
    parser.add_argument("--rounds", type=int, default=400, help="of each way and plan")
    options = parser.parse_args()
    plans = {"decode": decode_step(options.seqs, options.changes), "admit": admit_step(options.seqs)}
    heads = " ".join(f"{way + ' p50':>12} {'p99':>8}" for way in WAYS)
    print(f"{'':<24} {heads}   goal for the quickest p50")
    for name, plan in plans.items():
        found, num_bytes = measure(options.ranks, plan, options.rounds)
        cells, medians = [], []
        for samples in found:
            medians.append(statistics.median(samples))
            cells.append(f"{medians[-1]:12.3f} {statistics.quantiles(samples, n=100)[98]:8.3f}")
        goal = f"{min(medians) / GOAL_MS:4.2f} of {GOAL_MS} ms" if name == "decode" else ""
        print(f"{name:<8} {num_bytes:>9} bytes {' '.join(cells)}   {goal}", flush=True)


if __name__ == "__main__":
    main()

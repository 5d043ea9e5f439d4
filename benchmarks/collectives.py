"""What a meeting of ranks on one host costs: exchange and all-reduce in shared memory beside gloo's, in turn.

    python -m benchmarks.collectives [--ranks 2,4] [--bytes 4096,65536,1048576] [--seconds 1.0]

Each rank is a process of one thread. `exchange` is the meeting alone, from Python; `all-reduce` writes a float32
partial into the own region, meets, and adds up all of them. `ring` sends a message there and one back, as stages do;
beside it gloo's send and recv. Medians of rank 0 in microseconds; the ratio is gloo's time over ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels.peers import Ring, SharedPeers

BLOCK = 50  # calls of one kind before it is the other's turn
SPAWN = multiprocessing.get_context("spawn")


class Rank:
    """One rank's side of all that is measured."""

    def __init__(self, folder: Path, rank: int, size: int, num_bytes: int) -> None:
        self.rank, self.size, self.num_bytes = rank, size, num_bytes
        with (folder / "memory").open("r+b") as file:
            memory = mmap(file.fileno(), 0)
        self.peers = SharedPeers(memory, 0, rank, size, num_bytes)
        first = SharedPeers.num_bytes(size, num_bytes)
        self.rings = [Ring(memory, first + each * Ring.num_bytes(2, num_bytes), 2, num_bytes) for each in (0, 1)]
        self.part = torch.zeros(num_bytes // 4)
        self.sum = torch.zeros(num_bytes // 4)
        self.zeros = torch.zeros(num_bytes // 4)

    @staticmethod
    def memory_bytes(size: int, num_bytes: int) -> int:
        return SharedPeers.num_bytes(size, num_bytes) + 2 * Ring.num_bytes(2, num_bytes)

    def exchange(self) -> None:
        self.peers.exchange(self.num_bytes)

    def all_reduce(self) -> None:
        self.peers.own(self.num_bytes).view(torch.float32).copy_(self.part)
        first, *others = self.peers.exchange(self.num_bytes)
        self.sum.copy_(first.view(torch.float32))
        for each in others:
            self.sum += each.view(torch.float32)

    def gloo_all_reduce(self) -> None:
        dist.all_reduce(self.zeros)

    def ping(self) -> None:
        """There and back between ranks 0 and 1; the others rest."""
        if self.rank == 0:
            self._send(self.rings[0])
            self._receive(self.rings[1])
        elif self.rank == 1:
            self._receive(self.rings[0])
            self._send(self.rings[1])

    def gloo_ping(self) -> None:
        for sender in (0, 1):
            if self.rank == sender:
                dist.send(self.zeros, 1 - sender)
            elif self.rank == 1 - sender:
                dist.recv(self.zeros, sender)

    def _send(self, ring: Ring) -> None:
        ring.slot().view(torch.float32).copy_(self.part)
        ring.publish(0, self.num_bytes)

    def _receive(self, ring: Ring) -> None:
        _, message = ring.receive()
        self.sum.copy_(message.view(torch.float32))
        ring.release()


def run(folder: Path, rank: int, size: int, num_bytes: int, seconds: float, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    side = Rank(folder, rank, size, num_bytes)
    calls: list[Callable[[], None]] = [side.exchange, side.all_reduce, side.gloo_all_reduce, side.ping, side.gloo_ping]
    samples: list[list[int]] = [[] for _ in calls]
    end = time.monotonic() + seconds * len(calls)
    goes_on = torch.ones(1)
    while goes_on.item():
        for call, times in zip(calls, samples, strict=True):
            dist.barrier()
            for _ in range(BLOCK):
                start = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - start)
        goes_on.fill_(time.monotonic() < end)
        dist.broadcast(goes_on, 0)
    if rank == 0:
        results.put([statistics.median(each) / 1e3 for each in samples])
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, num_bytes: int, seconds: float) -> list[float]:
    """Microseconds of each kind of call."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder, results = Path(name), SPAWN.Queue()
        with (folder / "memory").open("wb") as file:
            file.truncate(Rank.memory_bytes(size, num_bytes))
        ranks = [
            SPAWN.Process(target=run, args=(folder, rank, size, num_bytes, seconds, results)) for rank in range(size)
        ]
        for each in ranks:
            each.start()
        found: list[float] = results.get(timeout=60 + 10 * seconds)
        for each in ranks:
            each.join()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4", metavar="N,N")
    parser.add_argument("--bytes", default="4096,65536,1048576", metavar="N,N")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each kind of call")
    options = parser.parse_args()
    print(f"{'':<20} {'exchange':>9} {'all-reduce':>11} {'gloo':>9} {'ratio':>7} {'ring':>9} {'gloo':>9} {'ratio':>7}")
    for size in map(int, options.ranks.split(",")):
        for num_bytes in map(int, options.bytes.split(",")):
            meet, ours, gloo, ring, gloo_ring = measure(size, num_bytes, options.seconds)
            print(
                f"{size} ranks {num_bytes:>8} B   {meet:9.1f} {ours:11.1f} {gloo:9.1f} {gloo / ours:6.1f}x"
                f" {ring:9.1f} {gloo_ring:9.1f} {gloo_ring / ring:6.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()

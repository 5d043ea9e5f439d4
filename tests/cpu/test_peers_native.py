"""Exchanges and rings in shared memory: every rank reads what each gave, in order, and nobody waits for the dead."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cpu
from kernels.peers import CallbackPeers, Peers, PeersBroken, Ring, SharedPeers

pytestmark = pytest.mark.skipif(not cpu.levels(), reason="the native kernels are not built")

CAPACITY = 5000  # neither whole lines nor whole pages
SPAWN = multiprocessing.get_context("spawn")
NEAR_END = 2**31 - 3  # of a count's circle
WAIT = 60.0  # seconds; only a hang takes as long


def private(num_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes)


def members(size: int, capacity: int = CAPACITY, offset: int = 0) -> list[SharedPeers]:
    memory = private(offset + SharedPeers.num_bytes(size, capacity))
    return [SharedPeers(memory, offset, rank, size, capacity) for rank in range(size)]


def opened(path: str) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Callable[[int], str]]:
    """Makes a file of so many zeros, in memory where the machine has such a place, for processes to map."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    made: list[Path] = []

    def make(num_bytes: int) -> str:
        path = folder / f"quire-test-{os.getpid()}-{len(made)}"
        with path.open("wb") as file:
            file.truncate(num_bytes)
        made.append(path)
        return str(path)

    yield make
    for path in made:
        path.unlink()


def given(rank: int, turn: int, num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng((rank, turn)).integers(0, 256, num_bytes, np.uint8)


def take_turns(peers: Peers, turns: range, seed: int) -> None:
    """Exchanges of random sizes, each compared with what every rank must have given."""
    sizes = np.random.default_rng(seed).integers(0, peers.capacity + 1, len(turns))
    sizes[::7] = peers.capacity
    sizes[3::7] = 0
    for turn, size in zip(turns, sizes.tolist(), strict=True):
        peers.own(size).numpy()[:] = given(peers.rank, turn, size)
        found = peers.exchange(size)
        assert len(found) == peers.size
        for rank, each in enumerate(found):
            np.testing.assert_array_equal(each.numpy(), given(rank, turn, size))


def in_threads(*bodies: Callable[[], object]) -> list[Any]:
    with ThreadPoolExecutor(len(bodies)) as threads:
        return [each.result(WAIT) for each in [threads.submit(body) for body in bodies]]


def gone(process: Any) -> int:
    process.join(WAIT)
    assert process.exitcode is not None, "a rank hangs"
    return int(process.exitcode)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_reads_what_each_gave(size: int) -> None:
    for offset in (0, 64):
        in_threads(*(lambda each=each: take_turns(each, range(200), 5) for each in members(size, offset=offset)))


def _rank(path: str, rank: int, size: int) -> None:
    take_turns(SharedPeers(opened(path), 0, rank, size, CAPACITY), range(500), 3)


def test_processes_exchange(shared: Callable[[int], str]) -> None:
    path = shared(SharedPeers.num_bytes(3, CAPACITY))
    ranks = [SPAWN.Process(target=_rank, args=(path, rank, 3)) for rank in range(3)]
    for each in ranks:
        each.start()
    assert [gone(each) for each in ranks] == [0, 0, 0]


def test_turns_count_in_a_circle() -> None:
    group = members(2)
    for each in group:
        ctypes.c_uint32.from_address(each._meeting).value = NEAR_END * 2
    in_threads(*(lambda each=each: take_turns(each, range(10), 1) for each in group))
    assert ctypes.c_uint32.from_address(group[0]._meeting).value == (NEAR_END + 10) * 2 % 2**32


def test_a_slow_reader_is_not_overwritten() -> None:
    """What an exchange gave stays until the reader's next one begins, though the other rank is a turn ahead by then."""
    slow, fast = members(2)
    next_is_written = threading.Event()

    def run_ahead() -> None:
        for turn in range(2):
            fast.own(100).fill_(turn + 1)
            if turn == 1:
                next_is_written.set()
            fast.exchange(100)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(run_ahead)
        first = slow.exchange(100)[1]
        assert next_is_written.wait(WAIT)
        assert first.tolist() == [1] * 100
        assert slow.exchange(100)[1].tolist() == [2] * 100
        done.result(WAIT)


def waits(call: Callable[[], object], wake: Callable[[], None]) -> float:
    """Seconds until `call`, asleep by then, has raised PeersBroken behind `wake`."""
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(call)
        time.sleep(0.05)
        assert not done.done()
        began = time.monotonic()
        wake()
        with pytest.raises(PeersBroken):
            done.result(WAIT)
        return time.monotonic() - began


def test_an_abort_wakes_who_waits() -> None:
    first, second, third = members(3)
    assert not first.is_broken
    assert waits(lambda: first.exchange(8), third.abort) < 1
    assert first.is_broken and second.is_broken
    for each in (first, second, third):  # whoever comes late learns it too, the last one to arrive as well
        with pytest.raises(PeersBroken, match="3 ranks"):
            each.exchange(8)


def _dying_rank(path: str) -> None:
    take_turns(SharedPeers(opened(path), 0, 1, 2, CAPACITY), range(5), 2)
    os.kill(os.getpid(), 9)


def test_a_killed_rank_leaves_a_group_that_can_be_aborted(shared: Callable[[int], str]) -> None:
    path = shared(SharedPeers.num_bytes(2, CAPACITY))
    peers, watcher = (SharedPeers(opened(path), 0, 0, 2, CAPACITY) for _ in range(2))
    other = SPAWN.Process(target=_dying_rank, args=(path,))
    other.start()
    take_turns(peers, range(5), 2)
    assert gone(other) == -9
    assert waits(lambda: peers.exchange(1), watcher.abort) < 1


@pytest.mark.parametrize(
    "arguments, name",
    [
        ((0, 2, 2, 100), "rank"),
        ((0, -1, 2, 100), "rank"),
        ((0, 0, 2, 0), "capacity"),
        ((64, 0, 2, 10**6), "offset"),
        ((-64, 0, 2, 100), "offset"),
        ((8, 0, 2, 100), "offset"),
    ],
)
def test_a_place_that_cannot_be(arguments: tuple[int, int, int, int], name: str) -> None:
    memory = private(SharedPeers.num_bytes(2, CAPACITY))
    with pytest.raises(ValueError, match=f"^{name}: got "):
        SharedPeers(memory, *arguments)
    memory.close()


def test_more_bytes_than_a_region_holds() -> None:
    (peers,) = members(1)
    for call in (peers.own, peers.exchange):
        with pytest.raises(ValueError, match=f"num_bytes: got 5001, must be from 0 to the region's {CAPACITY}"):
            call(5001)


def test_memory_stays_open_while_it_is_used() -> None:
    memory = private(SharedPeers.num_bytes(1, 64))
    peers = SharedPeers(memory, 0, 0, 1, 64)
    with pytest.raises(BufferError):
        memory.close()
    del peers
    memory.close()


class Board:
    """A gather among threads, for CallbackPeers."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=WAIT)
        self._given: list[torch.Tensor] = [torch.empty(0)] * size

    def gather(self, regions: list[torch.Tensor], rank: int) -> None:
        self._given[rank] = regions[rank].clone()
        self._barrier.wait()
        for other, region in enumerate(regions):
            if other != rank:
                region.copy_(self._given[other])
        self._barrier.wait()


def test_a_function_can_carry_the_exchange() -> None:
    board = Board(3)
    group = [CallbackPeers(rank, 3, CAPACITY, board.gather) for rank in range(3)]
    in_threads(*(lambda each=each: take_turns(each, range(50), 4) for each in group))


def test_an_error_of_the_function_breaks_the_group() -> None:
    def gather(regions: list[torch.Tensor], rank: int) -> None:
        raise ConnectionError(f"rank {rank} of {len(regions)} is cut off")

    peers = CallbackPeers(1, 2, 64, gather)
    for _ in range(2):
        with pytest.raises(PeersBroken) as raised:
            peers.exchange(3)
        assert str(raised.value.__cause__) == "rank 1 of 2 is cut off"
    assert peers.is_broken


def test_an_aborted_function_is_not_called_again() -> None:
    calls: list[int] = []
    peers = CallbackPeers(0, 1, 64, lambda regions, _: calls.append(len(regions[0])))
    peers.exchange(3)
    peers.abort()
    with pytest.raises(PeersBroken):
        peers.exchange(4)
    assert calls == [3]


def rings(slots: int, capacity: int = 100) -> tuple[Ring, Ring]:
    memory = private(64 + Ring.num_bytes(slots, capacity))
    return Ring(memory, 64, slots, capacity), Ring(memory, 64, slots, capacity)


def send(ring: Ring, turns: int) -> None:
    for turn in range(turns):
        size = turn * 37 % (ring.capacity + 1)
        ring.slot()[:size].numpy()[:] = given(0, turn, size)
        ring.publish(turn - 5, size)


def check(ring: Ring, turns: int) -> None:
    for turn in range(turns):
        tag, message = ring.receive()
        assert (tag, len(message)) == (turn - 5, turn * 37 % (ring.capacity + 1))
        np.testing.assert_array_equal(message.numpy(), given(0, turn, len(message)))
        ring.release()


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_messages_come_in_order(slots: int) -> None:
    producer, consumer = rings(slots)
    in_threads(lambda: send(producer, 300), lambda: check(consumer, 300))


@pytest.mark.parametrize("slots", [1, 3])
def test_bytes_are_messages_too(slots: int) -> None:
    """Whichever way each end takes, in turn."""
    producer, consumer = rings(slots)
    messages = [given(0, turn, turn * 37 % 101) for turn in range(200)]

    def put() -> None:
        for turn, message in enumerate(messages):
            if turn % 3:
                producer.put(turn, message.tobytes())
            else:
                producer.slot()[: len(message)].numpy()[:] = message
                producer.publish(turn, len(message))

    def take() -> None:
        for turn, message in enumerate(messages):
            if turn % 2:
                assert consumer.take() == (turn, message.tobytes())
            else:
                tag, found = consumer.receive()
                assert (tag, found.numpy().tobytes()) == (turn, message.tobytes())
                consumer.release()

    in_threads(put, take)


def _producer(path: str) -> None:
    send(Ring(opened(path), 0, 3, 1000), 300)


def test_messages_go_between_processes(shared: Callable[[int], str]) -> None:
    path = shared(Ring.num_bytes(3, 1000))
    producer = SPAWN.Process(target=_producer, args=(path,))
    producer.start()
    check(Ring(opened(path), 0, 3, 1000), 300)
    assert gone(producer) == 0


@pytest.mark.parametrize("slots", [1, 3])
def test_a_full_ring_holds_its_producer(slots: int) -> None:
    producer, consumer = rings(slots)
    for each in range(slots):
        producer.slot()
        producer.publish(each, 0)
    got_room = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(lambda: (producer.slot(), got_room.set()))
        assert consumer.receive()[0] == 0
        assert not got_room.wait(0.05)
        consumer.release()
        assert got_room.wait(WAIT)
        done.result(WAIT)


def test_messages_count_in_a_circle() -> None:
    producer, consumer = rings(2)
    for word in (producer._published, producer._released):
        ctypes.c_uint32.from_address(word).value = NEAR_END * 2
    producer.struct.sent = consumer.struct.done = NEAR_END
    in_threads(lambda: send(producer, 20), lambda: check(consumer, 20))


def test_an_abort_wakes_both_ends_of_a_ring() -> None:
    producer, consumer = rings(1)
    assert waits(consumer.receive, producer.abort) < 1
    assert producer.is_broken and consumer.is_broken
    producer, consumer = rings(1)
    producer.slot()
    producer.publish(0, 1)
    assert waits(producer.slot, consumer.abort) < 1
    with pytest.raises(PeersBroken):
        consumer.receive()


def test_a_ring_refuses_what_does_not_fit() -> None:
    producer, consumer = rings(1)
    with pytest.raises(ValueError, match="num_bytes: got 101, must be from 0 to the slot's 100"):
        producer.publish(0, 101)
    with pytest.raises(ValueError, match="num_bytes: got 101, must be from 0 to the slot's 100"):
        producer.put(0, bytes(101))
    producer.put(7, bytes(100))  # the refused ones took no slot
    assert consumer.take() == (7, bytes(100))
    with pytest.raises(ValueError, match="slots, capacity: got 0 and 8"):
        Ring(private(4096), 0, 0, 8)
    with pytest.raises(ValueError, match="offset: got 0, 4288 bytes"):
        Ring(private(4096), 0, 1, 4096)

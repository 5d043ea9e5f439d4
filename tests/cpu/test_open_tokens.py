"""Tokens that plans leave open: from the last stage to the first through a ring, or kept by a rank that is both."""

from __future__ import annotations

import random
import threading
from array import array

import numpy as np
import pytest

from kernels.peers import PeersBroken, Ring
from worker.open_tokens import OpenTokens
from worker.plan import pending_token


def ends(num_stages: int, entries: int = 16) -> tuple[OpenTokens, OpenTokens, Ring]:
    """The first stage's end of a ring, the last stage's, and the ring as the first has it."""
    memory = memoryview(bytearray(Ring.num_bytes(num_stages + 1, 4 * entries) + 64))
    at = -np.frombuffer(memory, np.uint8).ctypes.data % 64
    first, last = (Ring(memory, at, num_stages + 1, 4 * entries) for _ in range(2))
    return OpenTokens(num_stages, first), OpenTokens(num_stages, last), first


def test_a_rank_that_is_both_ends_keeps_them() -> None:
    both = OpenTokens()
    both.found(4, array("i", [70, 80, -1]))
    tokens = np.array([5, pending_token(1), 6, pending_token(0), pending_token(2)], np.int64)
    both.fill(5, tokens)
    assert tokens.tolist() == [5, 80, 6, 70, 0]  # a failed entry's row counts for nothing
    with pytest.raises(ValueError, match="plan 7 leaves tokens of plan 6 open; those of plan 4 are known"):
        both.fill(7, np.array([-1], np.int64))


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_open_the_last_stage_never_waits(num_stages: int, seed: int) -> None:
    """One thread is all stages in turn, so whoever waited would wait for ever. Plans do not begin at 1."""
    rng = random.Random(seed)
    first, last, _ = ends(num_stages)
    begin = rng.randrange(1, 50)
    found: dict[int, list[int]] = {}
    for number in range(begin, begin + 60):
        earlier = found.get(number - num_stages, [])
        entries = [rng.randrange(len(earlier)) for _ in range(rng.randrange(4))] if earlier else []
        tokens = np.array([7, *map(pending_token, entries)], np.int64)
        first.fill(number, tokens)
        assert tokens.tolist() == [7, *(earlier[entry] for entry in entries)]
        # the last stage is num_stages - 1 plans behind
        if (done := number - num_stages + 1) >= begin:
            found[done] = [rng.randrange(1000) for _ in range(rng.randrange(17))]
            last.found(done, array("i", found[done]))


def test_who_waits_for_a_token_is_told_of_the_end() -> None:
    first, last, ring = ends(2)
    first.fill(1, np.array([7], np.int64))
    last.found(1, array("i", [9]))
    tokens = np.array([-1], np.int64)
    first.fill(3, tokens)
    assert tokens.tolist() == [9]
    timer = threading.Timer(0.1, ring.abort)
    timer.start()
    with pytest.raises(PeersBroken):
        first.fill(4, np.array([-1], np.int64))
    timer.join()
    with pytest.raises(PeersBroken):
        last.found(2, array("i", [9]))


def test_tokens_out_of_order_end_the_epoch() -> None:
    first, last, _ = ends(2)
    first.fill(2, np.array([7], np.int64))
    last.found(2, array("i", [9]))
    last.found(2, array("i", [9]))
    first.fill(4, np.array([-1], np.int64))
    with pytest.raises(PeersBroken, match="tokens of plan 2 came behind those of plan 2"):
        first.fill(5, np.array([-1], np.int64))

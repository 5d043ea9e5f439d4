"""The head of a split vocabulary: every rank hears the same, and it is what one rank would have found."""

from __future__ import annotations

import threading
from mmap import mmap

import numpy as np
import pytest
import torch

from kernels.decoder import Head
from kernels.peers import SharedPeers
from worker.heads import gather_head, row_bytes

ROWS = 5


def of_part(logits: torch.Tensor, first: int, *, keep: bool) -> Head:
    """What a rank finds of its columns of the logits."""
    tokens = np.array([int(torch.argmax(row)) + first for row in logits], dtype=np.int32)
    values = logits.max(dim=1).values.numpy().copy()
    return Head(tokens, values, logits.sum(dim=1).numpy().copy(), logits.contiguous() if keep else None)


def gather(whole: torch.Tensor, widths: tuple[int, ...], capacity: int, *, keep: bool) -> list[Head]:
    """Each rank's answer, from threads that meet in shared memory."""
    size = len(widths)
    memory = mmap(-1, SharedPeers.num_bytes(size, capacity))
    starts = np.cumsum((0, *widths))
    found: dict[int, Head] = {}

    def run(rank: int) -> None:
        peers = SharedPeers(memory, 0, rank, size, capacity)
        part = whole[:, starts[rank] : starts[rank + 1]]
        found[rank] = gather_head(peers, of_part(part, int(starts[rank]), keep=keep), widths)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(size)]


def same(one: Head, other: Head) -> None:
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.values, other.values)
    assert np.array_equal(one.totals, other.totals, equal_nan=True)
    assert (one.logits is None) == (other.logits is None)
    if one.logits is not None and other.logits is not None:
        assert torch.equal(one.logits.nan_to_num(7.0), other.logits.nan_to_num(7.0))


@pytest.mark.parametrize("keep", [False, True], ids=["likeliest", "logits"])
@pytest.mark.parametrize("rows_at_once", [1, 2, ROWS])
@pytest.mark.parametrize("widths", [(7,), (5, 5), (32, 32, 3), (1, 9, 2, 4)], ids=str)
def test_all_ranks_hear_what_one_would_have_found(widths: tuple[int, ...], rows_at_once: int, keep: bool) -> None:
    whole = torch.randn(ROWS, sum(widths), generator=torch.Generator().manual_seed(sum(widths)))
    heads = gather(whole, widths, rows_at_once * row_bytes(max(widths), logits=keep), keep=keep)
    for each in heads:
        same(each, heads[0])
    head = heads[0]
    assert head.tokens.tolist() == whole.argmax(dim=1).tolist() and head.tokens.dtype == np.int32
    assert head.values.tolist() == whole.max(dim=1).values.tolist()
    assert np.allclose(head.totals, whole.sum(dim=1).numpy(), atol=1e-4)
    assert (head.logits is not None) == keep
    if head.logits is not None:
        assert torch.equal(head.logits, whole)


def test_of_equal_logits_the_lowest_token_is_the_likeliest() -> None:
    widths = (4, 4, 4)
    whole = torch.zeros(3, 12)
    whole[0, [2, 5, 9]] = 1.0
    whole[1, [7, 10]] = 1.0
    heads = gather(whole, widths, 4096, keep=False)
    assert [head.tokens.tolist() for head in heads] == [[2, 7, 0]] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("column", [0, 6, 11])
def test_a_logit_that_is_not_finite_shows_in_the_sum_of_its_row_alone(value: float, column: int) -> None:
    whole = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(column))
    whole[2, column] = value
    for head in gather(whole, (5, 4, 3), 4096, keep=True):
        assert np.isfinite(head.totals).tolist() == [True, True, False, True, True]
        finite = [row for row in range(ROWS) if row != 2]
        assert head.tokens[finite].tolist() == whole[finite].argmax(dim=1).tolist()


def test_no_row_needs_no_meeting() -> None:
    (head,) = gather(torch.zeros(0, 7), (7,), 4096, keep=False)
    assert head.tokens.tolist() == []

"""Sampling on a GPU, in Triton's interpreter or on one, against the sampler's own `choose`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels import triton_sampling as sampling
from tests.triton_inputs import DEVICE, among_nans, randn
from worker.draw import Shape, choose

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
LARGEST_U = 1.0 - 2.0**-53
LESS = -0.75  # of its weight w, 2 / (2 + w) * (2 + w) is exactly 2


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def both(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    u: torch.Tensor,
) -> tuple[list[int], list[int]]:
    """Tokens of our `sample` and of the sampler's `choose`."""
    shape = Shape(*(each[:, None] for each in (temperature, min_p, top_k, top_p, u)))
    return sampling.sample(logits, temperature, top_k, top_p, min_p, u).tolist(), choose(logits, shape).tolist()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_chunks(span: int, tile: int) -> None:
        monkeypatch.setattr(sampling, "SPAN", span)
        monkeypatch.setattr(sampling, "TILE", tile)

    return set_chunks


class TestSample:
    @pytest.mark.parametrize("kind", ["spread", "ties", "flat"])
    def test_is_the_samplers_choice(self, rng: random.Random, small_chunks: Any, kind: str) -> None:
        small_chunks(64, 32)
        rows, vocab = 4, 150
        logits = randn(rows, vocab, scale=0.3 if kind == "flat" else 3.0)
        if kind == "ties":
            logits = logits.round()
            logits[:, ::5] = -0.0
            logits[1, ::3] = -torch.inf
        temperature = torch.rand(rows, device=DEVICE).double() + 0.3
        top_k = torch.tensor([vocab, 7, rng.randrange(1, vocab), vocab], device=DEVICE)
        top_p = doubles(rng.random(), 0.9, 1.0, 0.999)
        min_p = doubles(0.0, 0.0, rng.random() * 0.1, 0.01)
        got, want = both(among_nans(logits), temperature, top_k, top_p, min_p, torch.rand(rows).double().to(DEVICE))
        assert got == want

    def test_cuts_among_equals_leave_the_lowest_ids(self, small_chunks: Any) -> None:
        """All sums here are exact, so the edges are too: a token stays while what stands before it is below top-p."""
        small_chunks(4, 2)
        row = torch.tensor([0.0, 2.0, 0.0, 2.0, -torch.inf, 2.0, 2.0, 0.0, 0.0], device=DEVICE)
        flat = torch.zeros(9, device=DEVICE)
        signs = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0], device=DEVICE)
        low = torch.tensor([1.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], device=DEVICE)
        tail = torch.tensor([0.0, 0.0, LESS, *[-torch.inf] * 6], device=DEVICE)
        cases = [  # logits, top_k, top_p, min_p, u, token
            (row, 9, 0.5, 0.2, LARGEST_U, 3),  # of 1, 3, 5, 6
            (row, 9, 0.51, 0.2, LARGEST_U, 5),
            (row, 3, 1.0, 0.0, LARGEST_U, 5),
            (row, 3, 0.5, 1.0, LARGEST_U, 3),
            (row, 1, 1.0, 0.0, 0.0, 1),
            (flat, 4, 0.75, 0.0, LARGEST_U, 2),
            (flat, 4, 0.75, 0.0, 1 / 3, 1),
            (flat, 5, 0.1, 0.0, LARGEST_U, 0),
            (flat, 6, 0.999, 1.0, LARGEST_U, 5),
            (flat, 8, 1.0, 0.0, 0.5, 4),
            (signs, 2, 1.0, 0.0, LARGEST_U, 1),
            (low, 2, 1.0, 0.0, 0.5, 3),  # of 0 and 3; one tie more before 3 would be drawn
            (tail, 9, 2 / (2 + math.exp(LESS)), 0.0, LARGEST_U, 1),  # exactly what 0 and 1 weigh
        ]
        logits = torch.stack([case[0] for case in cases])
        top_k = torch.tensor([case[1] for case in cases], device=DEVICE)
        top_p, min_p, u = (doubles(*(case[at] for case in cases)) for at in (2, 3, 4))
        got, want = both(logits, torch.ones_like(u), top_k, top_p, min_p, u)
        assert got == want == [case[5] for case in cases]

    def test_the_likeliest_and_rows_that_fail(self, small_chunks: Any) -> None:
        small_chunks(4, 2)
        inf, nan = torch.inf, torch.nan
        logits = torch.tensor(
            [
                [1.0, 3.0, 2.0, 3.0, 3.0, 3.0],
                [-inf, -inf, -inf, -inf, -inf, -5.0],
                [-0.0, 0.0, -1.0, -1.0, -1.0, -1.0],
                [-inf] * 6,
                [1.0, 2.0, 3.0, inf, 0.0, 0.0],
                [1.0, 2.0, 3.0, 4.0, nan, 0.0],
                [nan, 2.0, 3.0, 4.0, 5.0, 0.0],
            ],
            device=DEVICE,
        )
        u = torch.full((7,), 0.5, dtype=torch.float64, device=DEVICE)
        some = torch.full((7,), 3, device=DEVICE)
        for temperature in (0.0, 1e-300):
            heat = torch.full_like(u, temperature)
            got = sampling.sample(logits, heat, None if temperature else some, None, None, u * 0)
            assert got.dtype == torch.int32
            assert got.tolist() == [1, 5, 0, -1, -1, -1, -1]

    def test_a_token_of_no_weight_is_never_drawn(self, small_chunks: Any) -> None:
        small_chunks(4, 4)
        logits = torch.full((2, 11), -torch.inf, device=DEVICE)
        logits[:, 6] = 0.0
        got = sampling.sample(logits, doubles(1.0, 1.0), None, None, None, doubles(0.0, LARGEST_U))
        assert got.tolist() == [6, 6]

    def test_no_rows(self) -> None:
        none = torch.empty(0, dtype=torch.float64)
        assert sampling.sample(torch.empty(0, 5), none, None, None, None, none).shape == (0,)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"logits": torch.zeros(2, 5).bfloat16()}, "logits: got torch.bfloat16 with 5 columns, must be float32"),
            ({"temperature": torch.ones(2)}, "temperature: got torch.float32"),
            ({"top_k": torch.ones(2, dtype=torch.int32)}, "top_k: got torch.int32"),
            ({"top_p": torch.ones(3).double()}, r"top_p: got torch.float64 \(3,\), must be \[2\] of float64"),
            ({"u": torch.ones(2, 1).double()}, "u: got torch.float64"),
        ],
    )
    def test_what_may_not_be(self, change: dict[str, Any], named: str) -> None:
        ones = torch.ones(2).double()
        arguments: dict[str, Any] = {"logits": torch.zeros(2, 5), "temperature": ones, "u": ones}
        arguments |= {"top_k": None, "top_p": None, "min_p": None, **change}
        with pytest.raises(ValueError, match=named):
            sampling.sample(**arguments)

"""The small fused kernels, in Triton's interpreter or on a GPU, against float64.

Memory that may not be read is NaN, memory that may not be written is compared bit by bit.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels import triton_fused as fused
from tests.triton_inputs import DEVICE, among_nans, randn

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)
DTYPES = fused.FLOATS
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, fused.FP8: 2.0**-4}


def assert_rounded_once(got: torch.Tensor, want: torch.Tensor, smallest: float = 1e-6) -> None:
    """`got` is `want` (float64) to half a step of its dtype, besides what float32 arithmetic may be off."""
    bound = want.abs() * (HALF_STEP[got.dtype] + 3e-6) + smallest
    off = (got.double() - want).abs()
    assert (off <= bound).all(), f"off by {(off / bound).max().item():.2f} of what may be"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.double()
    if weight is None:
        return wide
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


class TestRmsNorm:
    @pytest.mark.parametrize("columns", [1, 37, 256])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_divides_by_the_root_of_the_mean_square(self, rng: random.Random, dtype: torch.dtype, columns: int) -> None:
        x, weight = among_nans(randn(3, columns, dtype=dtype, scale=3)), randn(columns, dtype=dtype)
        assert_rounded_once(fused.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5))

    @pytest.mark.parametrize("stream", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_adds_to_the_stream_and_norms_what_was_stored(
        self, rng: random.Random, dtype: torch.dtype, stream: torch.dtype
    ) -> None:
        x, weight = among_nans(randn(3, 45, dtype=dtype)), randn(45, dtype=torch.float32)
        around = torch.full((5, 61), torch.nan, dtype=stream, device=DEVICE)
        residual = around[1:4, 9:54]
        residual.copy_(randn(3, 45, dtype=stream))
        want = (residual.float() + x.float()).to(stream)
        y = fused.rms_norm(x, weight, 1e-6, residual)
        assert torch.equal(residual, want)
        assert y.dtype == dtype
        assert_rounded_once(y, normed(want, weight, 1e-6))
        assert int(around.isnan().sum()) == around.numel() - want.numel()

    def test_a_row_of_zeros_is_zeros_and_nan_stays(self) -> None:
        x = torch.zeros(2, 5, dtype=torch.bfloat16, device=DEVICE)
        x[1, 2] = torch.nan
        y = fused.rms_norm(x, torch.ones(5, device=DEVICE), 1e-5)
        assert (y[0] == 0).all() and y[1].isnan().all()

    def test_no_rows(self) -> None:
        assert fused.rms_norm(torch.empty(0, 5), torch.ones(5), 1e-5).shape == (0, 5)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"x": torch.zeros(2, 5, dtype=torch.int32)}, "x: got torch.int32"),
            ({"x": torch.zeros(2, 0)}, "x: got 0 columns, must be 1 to 32768"),
            ({"x": torch.zeros(5, 2).T}, "x: got strides"),
            ({"weight": torch.zeros(4)}, r"weight: got torch.float32 \(4,\), must be \[5\]"),
            ({"residual": torch.zeros(3, 5)}, r"residual: got shape \(3, 5\), must be \(2, 5\)"),
        ],
    )
    def test_what_may_not_be(self, change: dict[str, Any], named: str) -> None:
        arguments = {"x": torch.zeros(2, 5), "weight": torch.zeros(5), "eps": 1e-5, **change}
        with pytest.raises(ValueError, match=named):
            fused.rms_norm(**arguments)


class TestSiluMul:
    @pytest.mark.parametrize("columns", [1, 37, 1030])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_multiplies(self, rng: random.Random, dtype: torch.dtype, columns: int) -> None:
        x = among_nans(randn(2, 2 * columns, dtype=dtype, scale=3))
        gate, up = x.double().chunk(2, dim=1)
        want = gate * torch.sigmoid(gate) * up
        assert_rounded_once(fused.silu_mul(x), want)
        apart = fused.silu_mul_pair(x[:, :columns].clone(), x[:, columns:].clone())
        assert torch.equal(apart, fused.silu_mul(x))

    def test_far_gates(self) -> None:
        x = torch.tensor([[-1e30, -200.0, -0.0, 200.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
        assert fused.silu_mul(x).tolist() == [[0.0, 0.0, 0.0, 200.0]]

    def test_what_may_not_be(self) -> None:
        with pytest.raises(ValueError, match="gate_up: got 5 columns, must be a multiple of 2"):
            fused.silu_mul(torch.zeros(2, 5))
        with pytest.raises(ValueError, match=r"up: got torch.float32, must be gate's torch.bfloat16"):
            fused.silu_mul_pair(torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5))


def make_pool(dtype: torch.dtype, heads: int, dim: int, page_major: bool) -> torch.Tensor:
    """NaN: 2 layers, 4 blocks of 3 slots, with NaNs between the blocks."""
    if page_major:
        shape = (4, 3, 2, heads, 3, dim)
        pool = torch.full(shape, torch.nan).to(dtype).to(DEVICE)
        return pool[:, :2].transpose(0, 1)
    return torch.full((2, 5, 2, heads, 3, dim), torch.nan).to(dtype).to(DEVICE)[:, :4]


def whole(pool: torch.Tensor) -> torch.Tensor:
    """All memory of a pool, also what lies between its blocks."""
    return torch.frombuffer(bytearray(bytes(pool.untyped_storage().cpu())), dtype=torch.uint8)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def angles(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    each = torch.rand(tokens, dim // 2, dtype=torch.float64) * 100
    return each.cos().float().to(DEVICE), each.sin().float().to(DEVICE)


class TestWriteKv:
    @pytest.mark.parametrize("page_major", [False, True], ids=["layer-major", "page-major"])
    @pytest.mark.parametrize(
        ("dtype", "stored", "heads", "dim", "is_normed"),
        [
            (torch.float32, torch.float32, (5, 1), 6, True),
            (torch.bfloat16, torch.bfloat16, (4, 2), 22, True),
            (torch.bfloat16, torch.bfloat16, (12, 3), 8, False),
            (torch.float16, torch.float16, (11, 9), 16, True),
            (torch.bfloat16, fused.FP8, (3, 3), 10, True),
            (torch.float32, fused.FP8, (2, 1), 2, False),
        ],
    )
    def test_norms_rotates_and_writes_the_named_slots_alone(
        self,
        rng: random.Random,
        dtype: torch.dtype,
        stored: torch.dtype,
        heads: tuple[int, int],
        dim: int,
        is_normed: bool,
        page_major: bool,
    ) -> None:
        q_heads, kv_heads = heads
        slots = rng.sample(range(12), 4) + [-1, -(2**40), 12, 2**40]  # the last two lie beyond the pool
        rng.shuffle(slots)
        tokens = len(slots)
        qkv = among_nans(randn(tokens, q_heads + 2 * kv_heads, dim, dtype=dtype))
        q, k, v = qkv[:, :q_heads], qkv[:, q_heads : q_heads + kv_heads], qkv[:, q_heads + kv_heads :]
        cos, sin = angles(tokens, dim)
        q_weight, k_weight = (randn(dim, dtype=dtype), randn(dim, dtype=dtype)) if is_normed else (None, None)
        pool = make_pool(stored, kv_heads, dim, page_major)
        before = whole(pool)
        k_scale, v_scale = (0.37, 0.011) if stored == fused.FP8 else (1.0, 1.0)
        out = fused.write_kv(
            *(q, k, v, cos, sin, pool, 1, torch.tensor(slots, device=DEVICE)),
            q_weight=q_weight,
            k_weight=k_weight,
            eps=1e-5,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        assert_rounded_once(out, rotated(normed(q, q_weight, 1e-5), cos, sin))
        want_k = rotated(normed(k, k_weight, 1e-5), cos, sin) / k_scale
        want_v = (v.float() / torch.tensor(v_scale)).clamp(-448, 448).to(stored)
        smallest = 2.0**-10 + 1e-5 if stored == fused.FP8 else 1e-6
        for token, slot in enumerate(slots):
            if 0 <= slot < 12:
                written = pool[1, slot // 3, :, :, slot % 3]
                assert_rounded_once(written[0], want_k[token].clamp(-448, 448), smallest)
                assert torch.equal(bits(written[1]), bits(want_v[token]))
                written.copy_(torch.full(written.shape, torch.nan).to(stored))
        assert torch.equal(whole(pool), before)

    def test_fp8_is_torchs_for_every_code_and_every_edge_between_codes(self, rng: random.Random) -> None:
        codes = torch.arange(127, dtype=torch.uint8).view(fused.FP8).float()
        edges = (codes[1:] + codes[:-1]) / 2
        some = torch.cat((codes, edges, edges * (1 + 2**-22), edges * (1 - 2**-22), torch.rand(60) * 2e-3))
        more = torch.tensor([1e30, torch.inf, torch.nan, 449.0, 464.0, 1000.0, 1e-40])
        values = torch.cat((some, -some, more, -more))
        values = torch.cat((values, torch.zeros(-len(values) % 64))).view(-1, 1, 64).to(DEVICE)
        tokens = len(values)
        pool = torch.zeros(1, tokens, 2, 1, 1, 64, device=DEVICE).to(fused.FP8)
        still = torch.ones(tokens, 32, device=DEVICE), torch.zeros(tokens, 32, device=DEVICE)
        slots = torch.arange(tokens, device=DEVICE)
        fused.write_kv(values, values, values, *still, pool, 0, slots)
        # a rotation by nothing makes NaN of the partner of what is not finite, and may turn -0.0 into 0.0
        for which, source in enumerate((rotated(values, *still).float(), values)):
            want = source.clamp(-448, 448).to(fused.FP8).view(torch.uint8)
            want = torch.where(source.isnan(), 0x7F, want)
            got = pool[0, :, which, :, 0].view(torch.uint8)
            same = (got == want) | ((got | want == 0x80) & (which == 0))
            assert same.all(), (which, source[~same], got[~same], want[~same])

    def test_offsets_beyond_32_bits(self, rng: random.Random) -> None:
        stride = 2**30 + 8
        memory = torch.empty(2 * stride + 32, dtype=torch.uint8, device=DEVICE).view(fused.FP8)  # never touched
        pool = memory.as_strided((1, 3, 2, 1, 2, 4), (0, stride, 8, 8, 4, 1))
        x = randn(1, 1, 4)
        still = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
        fused.write_kv(x, x, x, *still, pool, 0, torch.tensor([5], device=DEVICE))
        at = 2 * stride + 4
        want = x.flatten().to(fused.FP8).view(torch.uint8)
        assert torch.equal(memory.view(torch.uint8)[at : at + 4], want)
        assert torch.equal(memory.view(torch.uint8)[at + 8 : at + 12], want)

    def test_no_tokens(self) -> None:
        none, pool = torch.empty(0, 2, 4), torch.zeros(1, 1, 2, 2, 1, 4)
        out = fused.write_kv(none, none, none, none[:, 0, :2], none[:, 0, :2], pool, 0, torch.empty(0).long())
        assert out.shape == (0, 2, 4)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"q": torch.zeros(3, 4, 5)}, "q: got head_dim 5, must be even and at most 512"),
            ({"q": torch.zeros(3, 4, 12)[..., ::2]}, "q: got strides"),
            ({"k": torch.zeros(3, 1, 6)}, r"k: got torch.float32 \(3, 1, 6\), must be torch.float32 \(3, 2, 6\)"),
            ({"v": torch.zeros(3, 2, 6).half()}, "v: got torch.float16"),
            ({"cos": torch.zeros(3, 6)}, r"cos: got torch.float32 \(3, 6\), must be contiguous float32 \(3, 3\)"),
            ({"sin": torch.zeros(3, 3).double()}, "sin: got torch.float64"),
            ({"pool": torch.zeros(2, 4, 2, 2, 3, 6).bfloat16()}, "pool: got torch.bfloat16, must be q's torch.float32"),
            ({"pool": torch.zeros(2, 4, 2, 2, 3, 8)}, "pool: got shape"),
            ({"pool": torch.zeros(2, 4, 2, 3, 2, 6).transpose(3, 4)}, "pool: got strides"),
            ({"layer": 2}, "layer: got 2, must be from 0 to 1"),
            ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots: got torch.int32"),
            ({"q_weight": torch.zeros(3)}, r"q_weight: got torch.float32 \(3,\), must be \[6\]"),
            ({"k_scale": 2.0}, "k_scale: got 2.0, must be positive and finite, and 1 unless the pool is"),
        ],
    )
    def test_what_may_not_be(self, change: dict[str, Any], named: str) -> None:
        arguments: dict[str, Any] = {
            "q": torch.zeros(3, 4, 6),
            "k": torch.zeros(3, 2, 6),
            "v": torch.zeros(3, 2, 6),
            "cos": torch.zeros(3, 3),
            "sin": torch.zeros(3, 3),
            "pool": torch.zeros(2, 4, 2, 2, 3, 6),
            "layer": 0,
            "slots": torch.zeros(3, dtype=torch.int64),
            **change,
        }
        with pytest.raises(ValueError, match=named):
            fused.write_kv(**arguments)


def test_nothing_is_written_behind_what_is_returned(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def guarded(shape: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.full((math.prod(shape) + 100,), torch.nan, dtype=dtype, device=device))
        return made[-1][: math.prod(shape)].view(shape)

    x, heads = randn(2, 10), randn(2, 3, 6)
    cos, sin = angles(2, 6)
    pool, none = make_pool(torch.float32, 3, 6, False), torch.full((2,), -1, device=DEVICE)
    monkeypatch.setattr(torch, "empty", guarded)
    outs = fused.rms_norm(x, x[0].clone(), 1e-5), fused.silu_mul(x)
    outs = *outs, fused.write_kv(heads, heads, heads, cos, sin, pool, 0, none)
    monkeypatch.undo()
    assert len(made) == 3
    for memory, out in zip(made, outs, strict=True):
        assert out.isfinite().all()
        assert memory[out.numel() :].isnan().all()

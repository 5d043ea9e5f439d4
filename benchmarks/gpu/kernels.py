"""Our GPU kernels beside what the same GPU copies and multiplies, FlashInfer and torch: numerics first, then time.

    python -m benchmarks.gpu.kernels [--quick] [--json] [--seconds 540] [--block-size 16]

Every kernel is checked against float64 on the device; one that is wrong is not timed. A time is the median of many
samples between CUDA events. Before each sample another array is read, so that no cache holds the kernel's data, and the
device sleeps until the host has queued the call, so that launching is not in it; that stands apart, as host time.
Exit status 1 where a kernel is wrong or raises; a goal that is missed is told, and is no error.

Shapes in names: T tokens, H query heads, K kv heads, D head_dim, N keys, B blocks, S block_size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch.nn import functional

from kernels import ops
from kernels.ops import Mask, PageList

MIB = 1 << 20
EPS = 1e-6
# Half a unit in the last place, relative; a little more, for what float32 arithmetic adds before the rounding.
ROUNDING = {torch.bfloat16: 1.02 * 2**-8, torch.float16: 1.05 * 2**-11, torch.float32: 2e-6}
# Norm of the error over the norm, of attention: probabilities are rounded to the type of values.
ATTENTION = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}
LSE_LIMIT = 1e-4
FP8 = torch.float8_e4m3fn
FP8_ROUNDING = 1.01 * 2**-4

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of a run.

    Attributes:
        decodes: (rows, context) of decode attention.
        prefills: (new tokens, context before them).
        lengths: contexts of the rows by which attention is checked.
        news: new tokens of those rows.
        tokens, columns: of norms and activations.
        vocab, sampled: logits of a row, and rows.
        gemm: side of the square matrices of the ceiling.
        copied: bytes that the ceiling copies.
    """

    decodes: tuple[tuple[int, int], ...] = (
        (1, 2048),
        (8, 256),
        (1, 8192),
        (8, 1024),
        (2, 8192),
        (64, 256),
        (64, 1024),
        (8, 8192),
        (64, 8192),
        (1, 131072),
        (8, 131072),
        (64, 131072),
    )
    prefills: tuple[tuple[int, int], ...] = ((512, 8192), (512, 0), (64, 8192), (2048, 0), (512, 131072))
    lengths: tuple[int, ...] = (1, 15, 16, 17, 63, 65, 300, 4097, 700, 129)
    news: tuple[int, ...] = (1, 1, 1, 1, 1, 5, 17, 1, 300, 129)
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    tokens: int = 8192
    columns: int = 4096
    vocab: int = 128_256
    sampled: int = 64
    gemm: int = 8192
    copied: int = 4 << 30

    def kv_bytes(self, rows: int, context: int, element: int = 2) -> int:
        """Of keys and values of one layer."""
        return rows * context * 2 * self.kv_heads * self.head_dim * element

    def flops(self, new: int, context: int) -> float:
        """Of causal attention of `new` tokens over `context` ones and themselves."""
        return 4 * self.q_heads * self.head_dim * (new * context + new * (new + 1) / 2)


QUICK = Sizes(
    decodes=((1, 2048), (1, 8192), (8, 8192), (64, 8192), (1, 131072)), prefills=((512, 8192), (512, 0)), copied=1 << 30
)


class Goal(NamedTuple):
    """What the issue asks of a row: a ratio to its ceiling, microseconds, or times FlashInfer's time."""

    kind: Literal["ratio", "us", "flashinfer"]
    limit: float

    def __str__(self) -> str:
        if self.kind == "us":
            return f"<= {self.limit:g} us"
        return f">= {self.limit:.2f}" if self.kind == "ratio" else f"<= {self.limit:.2f} x FlashInfer"


FLASHINFER_GOAL = Goal("flashinfer", 1.10)
PREFILL_GOAL = Goal("ratio", 0.45)
STREAM_GOAL = Goal("ratio", 0.85)


def decode_goals(num_bytes: int) -> tuple[Goal, ...]:
    """Of decode attention over so many bytes of keys and values a layer."""
    if num_bytes >= 256 * MIB:
        return Goal("ratio", 0.80), FLASHINFER_GOAL
    if 32 * MIB <= num_bytes <= 64 * MIB:
        return Goal("ratio", 0.60), FLASHINFER_GOAL
    if num_bytes <= 8 * MIB:
        return Goal("us", 15.0), FLASHINFER_GOAL
    return (FLASHINFER_GOAL,)


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel at a shape.

    Attributes:
        us: microseconds on the device.
        host_us: that the host takes to call it.
        rate: GB/s or TFLOP/s.
        ceiling: what `ratio` is a ratio to.
        peers: microseconds of others at the same, or why there are none.
    """

    kernel: str
    shape: str
    us: float
    host_us: float
    rate: float = math.nan
    ceiling: Literal["copy", "gemm", ""] = ""
    ratio: float = math.nan
    goals: tuple[Goal, ...] = ()
    peers: dict[str, float | str] = field(default_factory=dict)

    def met(self, goal: Goal) -> bool | None:
        """Whether a goal is met; None where that cannot be told, for want of a peer or a ceiling."""
        if goal.kind == "us":
            return self.us <= goal.limit
        if goal.kind == "ratio":
            return None if math.isnan(self.ratio) else self.ratio >= goal.limit
        times = [us for name, us in self.peers.items() if name.startswith("flashinfer") and isinstance(us, float)]
        return self.us <= goal.limit * min(times) if times else None


@dataclass(frozen=True, slots=True)
class Check:
    """An error against float64, and what it may be at most."""

    kernel: str
    case: str
    error: float
    limit: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.limit  # NaN is wrong


class Timing(NamedTuple):
    us: float
    host_us: float


class Timer(Protocol):
    def __call__(self, call: Call) -> Timing: ...


class EventTimer:
    """Times calls between CUDA events, with cold caches and the launch out of the way."""

    def __init__(self, device: torch.device, samples: int, seconds: float = 0.5) -> None:
        """Args:
        samples: of each call at most.
        seconds: that the samples of one call should take in all; 5 are taken however long they take.
        """
        self._samples, self._seconds = samples, seconds
        self._other = torch.zeros(1024, 64 * MIB // 1024, device=device)  # 256 MiB; the caches of an H200 have 50
        self._sink = torch.zeros(1024, device=device)

    def __call__(self, call: Call) -> Timing:
        for _ in range(3):  # compiles, and fills what is remembered
            call()
        torch.cuda.synchronize()
        queued = []
        start = time.perf_counter()
        for _ in range(5):
            begin = time.perf_counter()
            call()
            queued.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        each = (time.perf_counter() - start) / 5
        host = statistics.median(queued)
        cycles = int(min(2 * host + 20e-6, 5e-3) * 2e9)  # the clock has just under 2 GHz
        samples = max(5, min(self._samples, int(self._seconds / each)))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
        for begins, ends in pairs:
            torch.sum(self._other, 1, out=self._sink)
            torch.cuda._sleep(cycles)
            begins.record()
            call()
            ends.record()
        torch.cuda.synchronize()
        times = [begins.elapsed_time(ends) * 1e3 for begins, ends in pairs]
        return Timing(statistics.median(times), host * 1e6)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of attention, as `kernels.ops.attend` takes them; lists lie on the CPU, where plans are made."""

    q_THD: torch.Tensor
    query_start: torch.Tensor
    pools: list[torch.Tensor]
    pages: PageList
    mask: Mask
    k_scale: float = 1.0
    v_scale: float = 1.0


def our_attention(backend: Any, batch: Batch) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """OUR CALL into the attention kernels, planned beforehand. Where their interface changes, this changes."""
    plan = backend.plan(batch.q_THD.shape[1], batch.pools[0], batch.query_start, batch.pages, batch.mask)
    scale = batch.q_THD.shape[2] ** -0.5 * batch.k_scale
    return lambda: backend.run(plan, batch.q_THD, batch.pools, 0, batch.mask, scale, batch.v_scale)


def table(lengths: Sequence[int], block: torch.Tensor, block_size: int, several: bool = False) -> PageList:
    """A CSR over the block ids given, in order; `several`: every other page lies in pool 1."""
    counts = torch.tensor([-(-length // block_size) for length in lengths])
    position = torch.cat([torch.arange(int(count)) * block_size for count in counts] or [torch.empty(0)])
    total = int(counts.sum())
    return PageList(
        start=torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32),
        block=block[:total].to(torch.int32).contiguous(),
        position=position.to(torch.int32),
        pool=(torch.arange(total, dtype=torch.int32) % 2) if several else None,
    )


def starts(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def attention_float64(batch: Batch, row: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [t, H, D], lse [t, H]) of some tokens of a row, counted from its first, in float64."""
    begin, end = (int(batch.pages.start[row + at]) for at in (0, 1))
    device, size, mask = batch.q_THD.device, batch.pools[0].shape[4], batch.mask
    which = batch.pages.pool[begin:end] if batch.pages.pool is not None else torch.zeros(end - begin)
    block = batch.pages.block[begin:end].long()
    # float8 has no index_select: pages are taken one pool at a time and widened
    kv_B2KSD = torch.empty(end - begin, *batch.pools[0].shape[2:], dtype=torch.float64, device=device)
    for index, pool in enumerate(batch.pools):
        own = (which == index).nonzero().flatten()
        if len(own):
            bits = pool[0].view(torch.uint8) if pool.element_size() == 1 else pool[0]
            taken = bits[block[own].to(device)]
            kv_B2KSD[own.to(device)] = (taken.view(pool.dtype).float() if pool.element_size() == 1 else taken).double()
    k_KND, v_KND = kv_B2KSD.permute(1, 2, 0, 3, 4).flatten(2, 3)
    position_N = (batch.pages.position[begin:end, None] + torch.arange(size)).flatten().to(device)
    query_T = (int(batch.mask.first_position[row]) + tokens).to(device)
    distance_TN = query_T[:, None] - position_N
    seen_TN = distance_TN >= 0
    if mask.window:
        seen_TN &= (distance_TN < mask.window) | (position_N < mask.sinks)
    used_N = seen_TN.any(0)
    k_KND, v_KND, seen_TN = k_KND[:, used_N], v_KND[:, used_N], seen_TN[:, used_N]
    q_TKGD = batch.q_THD[int(batch.query_start[row]) + tokens.to(device)].double().unflatten(1, (len(k_KND), -1))
    scores = torch.einsum("tkgd,knd->tkgn", q_TKGD, k_KND * batch.k_scale) * q_TKGD.shape[3] ** -0.5
    scores = scores.masked_fill(~seen_TN[:, None, None], -math.inf)
    lse = scores.logsumexp(3)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("tkgn,knd->tkgd", weights, v_KND * batch.v_scale).flatten(1, 2), lse.flatten(1, 2)


def norm_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def largest_error(found: torch.Tensor, wanted: torch.Tensor, least: float = 1e-2) -> float:
    """The largest error of an element, relative to it or to `least`."""
    return float(((found.double() - wanted).abs() / wanted.abs().clamp_min(least)).max())


def unequal(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found != wanted).sum())


def tokens_float64(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    u: torch.Tensor,
) -> torch.Tensor:
    """What sampling should give, by sorting: min-p, then top-k, then top-p, then the token at u in id order."""
    x = logits.double()
    weights = ((x - x.amax(1, keepdim=True)) / temperature.clamp_min(1e-9)[:, None]).exp()
    weights = weights.masked_fill(weights < min_p[:, None], 0.0)
    order = torch.sort(x, dim=1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    rank = torch.arange(x.shape[1], device=x.device)
    ranked = ranked.masked_fill((rank >= top_k[:, None]) & (top_k > 0)[:, None], 0.0)
    before = ranked.cumsum(1) - ranked
    share = (top_p[:, None] * ranked.sum(1, keepdim=True)).masked_fill((top_p >= 1)[:, None], math.inf)
    ranked = ranked.masked_fill(before >= share, 0.0)
    kept = torch.zeros_like(weights).scatter(1, order, ranked).cumsum(1)
    drawn = (kept > u[:, None] * kept[:, -1:]).int().argmax(1)
    return torch.where(temperature > 0, drawn, x.argmax(1))


class Bench:
    """The checks, and the timed rows, on one device.

    Args:
        device: a GPU; the CPU for tests in Triton's interpreter.
        peers: whether others are timed too.
        room: bytes that pages may take.
        deadline: of `time.monotonic`; what is not begun by then is left out and named.
    """

    def __init__(
        self, device: torch.device, sizes: Sizes, timer: Timer, peers: bool, room: int, deadline: float = math.inf
    ) -> None:
        self.device, self.sizes, self.timer, self.peers, self.room = device, sizes, timer, peers, room
        self.deadline = deadline
        self.backend: Any = ops.pick("triton")
        self.left_out: list[str] = []
        self.failed = False  # whether a row raised
        self.copy_rate = self.gemm_rate = math.nan  # bytes and operations per second
        self._pool: torch.Tensor | None = None
        self._flashinfer = Flashinfer(device) if peers else None
        self.flashinfer_version = self._flashinfer.version if self._flashinfer else "not asked for"

    def _random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def _pages(self, blocks: int, dtype: torch.dtype) -> torch.Tensor:
        s = self.sizes
        shape = (1, blocks, 2, s.kv_heads, s.block_size, s.head_dim)
        if dtype != FP8:
            return self._random(*shape, dtype=dtype)
        return self._random(*shape, dtype=torch.bfloat16).to(FP8)

    def _blocks(self, rows: int, length: int) -> int:
        return rows * -(-length // self.sizes.block_size)

    def _batch(self, news: Sequence[int], length: int, pool: torch.Tensor) -> Batch:
        """Rows of one length over scattered pages of `pool`, each with its last tokens new."""
        s = self.sizes
        return Batch(
            self._random(sum(news), s.q_heads, s.head_dim),
            starts(news),
            [pool],
            table([length] * len(news), torch.randperm(pool.shape[1]), s.block_size),
            Mask(torch.tensor([length - new for new in news], dtype=torch.int32)),
        )

    def _checked(self) -> tuple[int, int]:
        """The timed decode of the longest context that has at most 1 GiB."""
        fits = [each for each in self.sizes.decodes if self.sizes.kv_bytes(*each) <= 1024 * MIB]
        return max(fits, key=lambda each: each[1])

    # Numerics.

    def checks(self) -> Iterator[Check]:
        """Every kernel against float64."""
        parts = (
            ("attend", self.check_attention),
            ("merge", self.check_merge),
            ("norms", self.check_norms),
            ("write_kv", self.check_write),
            ("sample", self.check_sampling),
        )
        for name, part in parts:
            try:
                yield from part()
            except Exception as error:  # one kernel that does not run must not hide what the others do
                yield Check(name, _brief(error), math.nan, 0)

    def check_attention(self) -> Iterator[Check]:
        is_gpu = self.device.type == "cuda"
        kinds = (torch.bfloat16, torch.float16, torch.float32)
        for dtype in (*kinds, FP8) if is_gpu else kinds:  # the interpreter has no float8
            for window, sinks, several in ((0, 0, False), (0, 0, True), (64, 0, False), (64, 4, True)):
                batch = self._checked_batch(dtype, window, sinks, several)
                narrow = dtype == FP8
                if narrow:
                    out, lse = our_attention(self.backend, batch)()
                else:
                    lists = batch.query_start, batch.pools, 0, batch.pages, batch.mask
                    out, lse = ops.attend(batch.q_THD, *lists, backend=self.backend)
                limit = ATTENTION[torch.bfloat16 if narrow else dtype]
                words = f"{dtype} window {window} sinks {sinks} pools {len(batch.pools)}".removeprefix("torch.")
                yield from self._attention_checks("attend", words, batch, out, lse, limit)

        # What is timed: splits of a long context are others than those of a short one.
        for news, context in (([1] * self._checked()[0], self._checked()[1]), (self.sizes.prefills[0][:1], None)):
            total = self.sizes.prefills[0][1] + news[0] if context is None else context
            timed = self._batch(news, total, self._pages(self._blocks(len(news), total), torch.bfloat16))
            out, lse = our_attention(self.backend, timed)()
            words = f"{len(news)} rows of {news[0]} new, {total} in all"
            yield from self._attention_checks("attend", words, timed, out, lse, ATTENTION[torch.bfloat16])

    def _attention_checks(
        self, kernel: str, words: str, batch: Batch, out: torch.Tensor, lse: torch.Tensor, limit: float
    ) -> Iterator[Check]:
        """Of some tokens of some rows: the first, the last and those between."""
        num_rows = len(batch.query_start) - 1
        rows = range(num_rows) if num_rows <= 16 else (0, num_rows // 2, num_rows - 1)
        worst, worst_lse = 0.0, 0.0
        for row in rows:
            begin, end = (int(batch.query_start[row + at]) for at in (0, 1))
            tokens = torch.arange(end - begin)
            tokens = tokens[tokens.lt(16) | tokens.ge(end - begin - 16)]
            wanted, wanted_lse = attention_float64(batch, row, tokens)
            own = begin + tokens.to(out.device)
            worst = _worse(worst, norm_error(out[own], wanted))
            worst_lse = _worse(worst_lse, float((lse[own].double() - wanted_lse).abs().max()))
        yield Check(kernel, words, worst, limit)
        yield Check(f"{kernel} lse", words, worst_lse, LSE_LIMIT)

    def _checked_batch(self, dtype: torch.dtype, window: int, sinks: int, several: bool) -> Batch:
        """Rows of the lengths to be checked; what no query may see is NaN."""
        s = self.sizes
        total = sum(-(-length // s.block_size) for length in s.lengths)
        pools = [self._pages(total + 3, dtype) for _ in range(1 + several)]
        block = torch.randperm(total + 3)
        pages = table(s.lengths, block, s.block_size, several)
        if dtype != FP8:
            for index, pool in enumerate(pools):
                own = pages.block.long() if pages.pool is None else pages.block[pages.pool == index].long()
                unlisted = torch.ones(pool.shape[1], dtype=torch.bool)
                unlisted[own] = False
                pool[:, unlisted.to(self.device)] = math.nan
            for row, length in enumerate(s.lengths):
                last = int(pages.start[row + 1]) - 1
                pool = pools[int(pages.pool[last]) if pages.pool is not None else 0]
                pool[0, int(pages.block[last]), :, :, (length - 1) % s.block_size + 1 :] = math.nan
        return Batch(
            self._random(sum(s.news), s.q_heads, s.head_dim, dtype=torch.bfloat16 if dtype == FP8 else dtype),
            starts(s.news),
            pools,
            pages,
            Mask(torch.tensor([a - b for a, b in zip(s.lengths, s.news, strict=True)]).to(torch.int32), window, sinks),
            *((0.5, 2.0) if dtype == FP8 else ()),
        )

    def check_merge(self) -> Iterator[Check]:
        s = self.sizes
        outs = self._random(5, 7, s.q_heads, s.head_dim, dtype=torch.float32)
        lses = 5 * self._random(5, 7, s.q_heads, dtype=torch.float32)
        lses[1], lses[:, 2] = -math.inf, -math.inf
        outs[1] = math.nan
        out, lse = ops.merge(outs, lses, backend=self.backend)
        norm = lses.double().logsumexp(0)
        weights = (lses.double() - norm).exp().nan_to_num(0.0)
        wanted = (weights[..., None] * outs.double().nan_to_num(0.0)).sum(0)
        yield Check("merge", "5 parts, one empty", norm_error(out, wanted), 1e-6)
        finite = norm.isfinite()
        yield Check("merge lse", "5 parts, one empty", float((lse - norm)[finite].abs().max()), 1e-5)
        empty = unequal(out[2], torch.zeros_like(out[2])) + unequal(lse[2], torch.full_like(lse[2], -math.inf))
        yield Check("merge", "only empty parts", empty, 0)

    def check_norms(self) -> Iterator[Check]:
        from kernels import triton_fused

        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for tokens, columns in ((min(self.sizes.tokens, 512), self.sizes.columns), (3, 136)):
                words = f"{dtype} {tokens} x {columns}".removeprefix("torch.")
                x, weight = self._random(tokens, columns, dtype=dtype), self._random(columns, dtype=dtype)
                residual = self._random(tokens, columns, dtype=dtype)
                summed = residual.double() + x.double()
                out = triton_fused.rms_norm(x, weight, EPS)
                yield Check("norms rms", words, largest_error(out, _normed(x, weight)), ROUNDING[dtype])
                out = triton_fused.rms_norm(x, weight, EPS, residual)
                yield Check("norms rms residual", words, largest_error(out, _normed(residual, weight)), ROUNDING[dtype])
                yield Check("norms rms sum", words, largest_error(residual, summed), ROUNDING[dtype])
                both = self._random(tokens, 2 * columns, dtype=dtype)
                gate, up = both.double().chunk(2, 1)
                out = triton_fused.silu_mul(both)
                yield Check("norms silu_mul", words, largest_error(out, gate * gate.sigmoid() * up), ROUNDING[dtype])

    def check_write(self) -> Iterator[Check]:
        from kernels import triton_fused

        s = self.sizes
        kinds = (torch.bfloat16, torch.float32)
        for dtype in kinds:
            for narrow in (False, True):
                q, k, v, cos, sin, slots = self._written(21, dtype)
                slots[3] = -1
                weights = [self._random(s.head_dim, dtype=dtype) for _ in range(2)]
                pool = self._pages(21 // s.block_size + 4, FP8 if narrow else dtype)
                scales = {"k_scale": 0.5, "v_scale": 2.0} if narrow else {}
                bits = pool.view(torch.uint8)
                before = bits.clone()
                out = triton_fused.write_kv(
                    q, k, v, cos, sin, pool, 0, slots, q_weight=weights[0], k_weight=weights[1], eps=EPS, **scales
                )
                wanted_q = _turned(_normed(q, weights[0]), cos, sin)
                wanted_k = _turned(_normed(k, weights[1]), cos, sin) / scales.get("k_scale", 1.0)
                wanted_v = v.double() / scales.get("v_scale", 1.0)
                real = slots >= 0
                at, offset = slots[real] // s.block_size, slots[real] % s.block_size
                limit = FP8_ROUNDING if narrow else ROUNDING[dtype]
                # Rotation subtracts: float32's error is that of its terms. Float8 is evenly spaced below 2^-6.
                rotated = 1.0 if dtype == torch.float32 else 1e-2
                least = 2.0**-6 if narrow else rotated
                words = f"{dtype}{' to float8' if narrow else ''}".removeprefix("torch.")
                yield Check("write_kv q", words, largest_error(out, wanted_q, rotated), ROUNDING[dtype])
                stored = bits[0].unflatten(-1, (s.head_dim, -1))[at, :, :, offset].contiguous()
                stored = stored.view(pool.dtype).squeeze(-1)
                yield Check("write_kv k", words, largest_error(stored[:, 0], wanted_k[real], least), limit)
                yield Check("write_kv v", words, largest_error(stored[:, 1], wanted_v[real], least), limit)
                bits[0, at, :, :, offset] = before[0, at, :, :, offset]
                yield Check("write_kv elsewhere", words, unequal(bits, before), 0)
        q, k, v, _, _, slots = self._written(21, torch.bfloat16)
        pool = self._pages(21 // s.block_size + 4, torch.bfloat16)
        wanted = pool.clone()
        at, offset = slots // s.block_size, slots % s.block_size
        wanted[0, at, 0, :, offset], wanted[0, at, 1, :, offset] = k, v
        ops.write_kv(k, v, pool, 0, slots, backend=self.backend)
        yield Check("write_kv plain", "bfloat16", unequal(pool, wanted), 0)
        chain = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
        wanted[:, 1] = wanted[:, 2] = wanted[:, 0]
        ops.copy_pages(pool, *chain, backend=self.backend)
        yield Check("copy_pages", "a chain", unequal(pool, wanted), 0)

    def _written(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, k, v, cos, sin and slots of some tokens."""
        s = self.sizes
        q = self._random(tokens, s.q_heads, s.head_dim, dtype=dtype)
        k, v = (self._random(tokens, s.kv_heads, s.head_dim, dtype=dtype) for _ in range(2))
        angle = 6 * torch.rand(tokens, s.head_dim // 2, device=self.device, dtype=torch.float64)
        slots = torch.randperm(tokens + 8, device=self.device)[:tokens]
        return q, k, v, angle.cos().float(), angle.sin().float(), slots

    def check_sampling(self) -> Iterator[Check]:
        from kernels import triton_sampling

        rows = min(self.sizes.sampled, 32)
        inputs = self._sampled(rows)
        found = triton_sampling.sample(*inputs)
        yield Check("sample", f"{rows} x {self.sizes.vocab}", unequal(found, tokens_float64(*inputs)), 0)

    def _sampled(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Logits, temperature, top-k, top-p, min-p and u, of all kinds in turn."""
        turn = torch.arange(rows, device=self.device)

        def by_turn(*values: float) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self.device)[turn % len(values)]

        logits = 3 * self._random(rows, self.sizes.vocab, dtype=torch.float32)
        top_k = by_turn(0, 40, 0, 0, 5, 1000).long()
        u = torch.rand(rows, dtype=torch.float64, device=self.device)
        return (
            logits,
            by_turn(0.0, 1.0, 0.7, 1.0, 1.5),
            top_k,
            by_turn(1.0, 0.9, 0.5, 1.0, 0.95),
            by_turn(0, 0, 0, 0.05),
            u,
        )

    # Time.

    def ceilings(self) -> None:
        """Measure what the device copies and multiplies; the rows' ratios are to these."""
        n = self.sizes.gemm
        left, right = self._random(n, n), self._random(n, n)
        self.gemm_rate = 2 * n**3 / self.timer(lambda: left @ right).us * 1e6
        source = torch.zeros(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        self.copy_rate = 2 * source.numel() / self.timer(lambda: target.copy_(source)).us * 1e6

    def rows(self, wrong: set[str]) -> Iterator[Row]:
        """A row for each kernel and shape, but for kernels that are wrong."""
        parts = (
            ("attend", self.decode_rows),
            ("attend", self.prefill_rows),
            ("merge", self.merge_rows),
            ("norms", self.norm_rows),
            ("norms", self.silu_rows),
            ("write_kv", self.write_rows),
            ("copy_pages", self.copy_rows),
            ("sample", self.sample_rows),
        )
        for kernel, part in parts:
            if any(name.startswith(kernel) for name in wrong):
                self.left_out.append(f"{part.__name__.removesuffix('_rows')}: {kernel} is wrong")
                continue
            for shape, row in part():
                name = f"{part.__name__.removesuffix('_rows')} {shape}"
                if time.monotonic() > self.deadline:
                    self.left_out.append(f"{name}: no time left")
                    continue
                try:
                    made = row()
                except Exception as error:  # told, and an error of the run; the other shapes go on
                    self.left_out.append(f"{name}: {_brief(error)}")
                    self.failed = True
                    continue
                if made is not None:
                    yield made

    def _streamed(
        self,
        kernel: str,
        shape: str,
        num_bytes: float,
        call: Call,
        goals: tuple[Goal, ...] = (),
        peers: dict[str, Call] | None = None,
    ) -> Row:
        """A row whose ceiling is the copy rate."""
        timing = self.timer(call)
        rate = num_bytes / timing.us * 1e6
        others: dict[str, float | str] = {}
        for name, peer in (peers or {}).items() if self.peers else ():
            try:
                others[name] = self.timer(peer).us
            except Exception as error:  # a peer's own failure, whatever it is, is told and is not ours
                others[name] = _brief(error)
        return Row(kernel, shape, *timing, rate / 1e9, "copy", rate / self.copy_rate, goals, others)

    def decode_rows(self) -> Iterator[tuple[str, Callable[[], Row | None]]]:
        for rows, context in self.sizes.decodes:
            yield f"B={rows} x {context}", partial(self._decode, rows, context)
        if self.device.type == "cuda":
            rows, context = 8, 8192
            yield f"B={rows} x {context} float8", partial(self._decode, rows, context, narrow=True)

    def _decode(self, rows: int, context: int, narrow: bool = False) -> Row | None:
        s = self.sizes
        num_bytes = s.kv_bytes(rows, context, 1 if narrow else 2)
        shape = f"B={rows} x {context}{' float8' * narrow}, {num_bytes / MIB:.0f} MiB"
        blocks = self._blocks(rows, context)
        pool = self._pages(blocks, FP8) if narrow else self._shared_pool(blocks)
        if pool is None:
            self.left_out.append(f"decode {shape}: more than the {self.room / MIB:.0f} MiB that pages may take")
            return None
        batch = self._batch([1] * rows, context, pool)
        peers = {} if narrow or not self.peers else self._attention_peers(batch, [context] * rows, num_bytes)
        call = our_attention(self.backend, batch)
        return self._streamed("decode", shape, num_bytes, call, decode_goals(num_bytes), peers)

    def _shared_pool(self, blocks: int) -> torch.Tensor | None:
        """One pool for all cases, as large as the largest that fits; None where `blocks` do not fit."""
        if self._pool is None:
            s = self.sizes
            one = s.kv_bytes(1, s.block_size)
            sizes = [self._blocks(rows, context) for rows, context in s.decodes]
            sizes += [self._blocks(1, new + context) for new, context in s.prefills]
            self._pool = self._pages(max(size for size in sizes if size * one <= self.room), torch.bfloat16)
        return self._pool if blocks <= self._pool.shape[1] else None

    def prefill_rows(self) -> Iterator[tuple[str, Callable[[], Row | None]]]:
        for new, context in self.sizes.prefills:
            yield f"{new} over {context}", partial(self._prefill, new, context)

    def _prefill(self, new: int, context: int) -> Row | None:
        s = self.sizes
        total = new + context
        blocks = self._blocks(1, total)
        pool = self._shared_pool(blocks)
        if pool is None:
            self.left_out.append(f"prefill {new} over {context}: more than pages may take")
            return None
        batch = self._batch([new], total, pool)
        peers = self._attention_peers(batch, [total], s.kv_bytes(1, total)) if self.peers else {}
        goals = (PREFILL_GOAL, FLASHINFER_GOAL) if (new, context) == (512, 8192) else (FLASHINFER_GOAL,)
        row = self._streamed("prefill", f"{new} over {context}", 0, our_attention(self.backend, batch), goals, peers)
        rate = s.flops(new, context) / row.us * 1e6
        return replace(row, rate=rate / 1e12, ceiling="gemm", ratio=rate / self.gemm_rate)

    def _attention_peers(self, batch: Batch, lengths: list[int], num_bytes: int) -> dict[str, Call]:
        """Others over the same keys; torch's are gathered beforehand, at no charge."""
        peers: dict[str, Call] = {}
        if self._flashinfer is not None:
            peers |= self._flashinfer.calls(batch, lengths)
        if num_bytes <= self.room // 8:
            peers["sdpa"] = sdpa(batch, lengths)
        return peers

    def merge_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        s = self.sizes
        for parts, tokens in ((2, 64), (8, 64)):

            def row(parts: int = parts, tokens: int = tokens) -> Row:
                outs = self._random(parts, tokens, s.q_heads, s.head_dim, dtype=torch.float32)
                lses = self._random(parts, tokens, s.q_heads, dtype=torch.float32)
                num_bytes = 4 * (parts + 1) * tokens * s.q_heads * (s.head_dim + 1)
                return self._streamed(
                    "merge", f"{parts} parts x {tokens}", num_bytes, lambda: self.backend.merge(outs, lses)
                )

            yield f"{parts} parts", row

    def norm_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        from kernels import triton_fused

        s = self.sizes
        shape = f"{s.tokens} x {s.columns}"
        one = 2 * s.tokens * s.columns

        def plain() -> Row:
            x, weight = self._random(s.tokens, s.columns), self._random(s.columns)
            peers: dict[str, Call] = {"torch": lambda: functional.rms_norm(x, (s.columns,), weight, EPS)}
            call = lambda: triton_fused.rms_norm(x, weight, EPS)  # noqa: E731
            return self._streamed("rms_norm", shape, 2 * one, call, (STREAM_GOAL,), peers)

        def added() -> Row:
            x, weight, residual = self._random(s.tokens, s.columns), self._random(s.columns), torch.zeros_like(x0)
            call = lambda: triton_fused.rms_norm(x, weight, EPS, residual)  # noqa: E731
            return self._streamed("rms_norm residual", shape, 4 * one, call, (STREAM_GOAL,))

        x0 = torch.empty(s.tokens, s.columns, dtype=torch.bfloat16, device=self.device)
        yield shape, plain
        yield shape, added

    def silu_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        from kernels import triton_fused

        s = self.sizes

        def row() -> Row:
            both = self._random(s.tokens, 2 * s.columns)
            gate, up = both.chunk(2, 1)
            peers: dict[str, Call] = {"torch": lambda: functional.silu(gate) * up}
            num_bytes = 6 * s.tokens * s.columns
            call = lambda: triton_fused.silu_mul(both)  # noqa: E731
            return self._streamed("silu_mul", f"{s.tokens} x {s.columns}", num_bytes, call, (STREAM_GOAL,), peers)

        yield f"{s.tokens} x {s.columns}", row

    def write_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        from kernels import triton_fused

        s = self.sizes
        for tokens in (64, s.tokens):

            def row(tokens: int = tokens) -> Row:
                q, k, v, cos, sin, slots = self._written(tokens, torch.bfloat16)
                pool = self._pages((tokens + 8) // s.block_size + 1, torch.bfloat16)
                weight = self._random(s.head_dim)
                elements = q.numel() + k.numel() + v.numel()
                num_bytes = 4 * elements + 8 * cos.numel() + 8 * tokens
                call = lambda: triton_fused.write_kv(  # noqa: E731
                    q, k, v, cos, sin, pool, 0, slots, q_weight=weight, k_weight=weight, eps=EPS
                )
                return self._streamed("write_kv", f"{tokens} tokens, normed", num_bytes, call)

            yield f"{tokens} tokens", row

    def copy_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        s = self.sizes

        def row() -> Row:
            count = 16 if s.copied < MIB else 1024
            pool = self._pages(2 * count, torch.bfloat16)
            ids = torch.randperm(2 * count).to(torch.int32)
            num_bytes = 2 * count * s.kv_bytes(1, s.block_size)
            call = lambda: self.backend.copy_pages(pool, ids[:count], ids[count:])  # noqa: E731
            return self._streamed(
                "copy_pages", f"{count} of {s.kv_bytes(1, s.block_size) // 1024} KiB", num_bytes, call
            )

        yield "pages", row

    def sample_rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        from kernels import triton_sampling

        s = self.sizes
        for rows in (1, s.sampled):
            for word in ("greedy", "temperature", "top-k, top-p, min-p"):

                def row(rows: int = rows, word: str = word) -> Row:
                    logits, temperature, top_k, top_p, min_p, u = self._sampled(rows)
                    heat = torch.full_like(temperature, float(word != "greedy"))
                    if "top" in word:
                        call = partial(triton_sampling.sample, logits, heat, top_k, top_p, min_p, u)
                    else:
                        call = partial(triton_sampling.sample, logits, heat, None, None, None, u)
                    peers: dict[str, Call] = {"torch": lambda: logits.argmax(1)} if word == "greedy" else {}
                    return self._streamed("sample", f"{rows} x {s.vocab} {word}", 4 * logits.numel(), call, (), peers)

                yield f"{rows} x {s.vocab} {word}", row


class Flashinfer:
    """FlashInfer 0.5, where it is importable. Its HND layout is that of our pages."""

    WORKSPACE = 256 * MIB

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None
        try:
            import flashinfer  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            self.version = f"not there ({error})"
        else:
            self.version, self._module = str(flashinfer.__version__), flashinfer
            self._workspace = torch.zeros(self.WORKSPACE, dtype=torch.uint8, device=device)

    def calls(self, batch: Batch, lengths: list[int]) -> dict[str, Call]:
        """Planned calls by name: decode with and without tensor cores, or prefill."""
        if self._module is None:
            return {}
        if len(batch.q_THD) > len(lengths):
            return {"flashinfer": self._lazily(lambda: self._prefill(batch, lengths))}
        return {
            "flashinfer tc": self._lazily(lambda: self._decode(batch, lengths, True)),
            "flashinfer": self._lazily(lambda: self._decode(batch, lengths, False)),
        }

    @staticmethod
    def _lazily(make: Callable[[], Call]) -> Call:
        """A call that is planned when it is first made, so that a failure is that call's."""
        made: list[Call] = []

        def call() -> object:
            if not made:
                made.append(make())
            return made[0]()

        return call

    def _lists(self, batch: Batch, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = batch.pools[0].shape[4]
        last = torch.tensor([(length - 1) % size + 1 for length in lengths], dtype=torch.int32)
        return batch.pages.start.to(self._device), batch.pages.block.to(self._device), last.to(self._device)

    def _decode(self, batch: Batch, lengths: list[int], tensor_cores: bool) -> Call:
        pool = batch.pools[0]
        made = self._module.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "HND", use_tensor_cores=tensor_cores)
        _, _, _, kv_heads, size, dim = pool.shape
        made.plan(
            *self._lists(batch, lengths),
            batch.q_THD.shape[1],
            kv_heads,
            dim,
            size,
            q_data_type=batch.q_THD.dtype,
            kv_data_type=pool.dtype,
        )
        return self._compared(batch, lambda: made.run(batch.q_THD, pool[0], return_lse=True))

    def _prefill(self, batch: Batch, lengths: list[int]) -> Call:
        pool = batch.pools[0]
        made = self._module.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        _, _, _, kv_heads, size, dim = pool.shape
        made.plan(
            batch.query_start.to(self._device),
            *self._lists(batch, lengths),
            batch.q_THD.shape[1],
            kv_heads,
            dim,
            size,
            causal=True,
            q_data_type=batch.q_THD.dtype,
            kv_data_type=pool.dtype,
        )
        return self._compared(batch, lambda: made.run(batch.q_THD, pool[0], return_lse=True))

    @staticmethod
    def _compared(batch: Batch, call: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Call:
        """The call, once its last token of the first row was compared: a peer that computes something else is none."""
        out, lse = call()
        last = int(batch.query_start[1]) - 1
        wanted, wanted_lse = attention_float64(batch, 0, torch.tensor([last]))
        error = norm_error(out[last : last + 1], wanted)
        lse_error = float((lse[last : last + 1].double() * math.log(2) - wanted_lse).abs().max())  # theirs is log2
        if not (error <= 1e-2 and lse_error <= 1e-2):
            raise ValueError(f"differs from float64 by {error:.1e}, lse by {lse_error:.1e}")
        return call


def sdpa(batch: Batch, lengths: list[int]) -> Call:
    """torch's attention over gathered keys of rows of one length."""
    from torch.nn.attention.bias import causal_lower_right

    pool, rows, length = batch.pools[0], len(lengths), lengths[0]
    kv = pool[0, batch.pages.block.long().to(pool.device)].unflatten(0, (rows, -1))  # [R, B, 2, K, S, D]
    k, v = (each.contiguous() for each in kv.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length])
    q = batch.q_THD.unflatten(0, (rows, -1)).transpose(1, 2).contiguous()
    if q.shape[2] == 1:
        return lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    bias: Any = causal_lower_right(q.shape[2], length)
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.double()
    return y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def _turned(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x_THD.chunk(2, -1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def _worse(a: float, b: float) -> float:
    """The larger; NaN where either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:120] if lines else ''}"


HEAD = (
    f"{'kernel':<18} {'shape':<34} {'us':>9} {'host us':>8} {'rate':>14}  {'ratio':<13} "
    f"{'peers, us':<44} goals of the issue"
)


def line(row: Row) -> str:
    """A row of the table, with its goals and whether they are met."""
    rate = f"{row.rate:.0f} {'TFLOP/s' if row.ceiling == 'gemm' else 'GB/s'}"
    ratio = f"{row.ratio:.2f} of {row.ceiling}"
    peers = ", ".join(
        f"{name} {us:.1f}" if isinstance(us, float) else f"{name}: {us}" for name, us in row.peers.items()
    )
    words = {True: "met", False: "MISSED", None: "not known"}
    goals = "; ".join(f"{goal}: {words[row.met(goal)]}" for goal in row.goals)
    measured = f"{row.kernel:<18} {row.shape:<34} {row.us:>9.1f} {row.host_us:>8.1f} {rate:>14}"
    return f"{measured}  {ratio:<13} {peers:<44} {goals}".rstrip()


def row_json(row: Row) -> str:
    goals = [{"goal": str(goal), "met": row.met(goal)} for goal in row.goals]
    numbers = {"us": row.us, "host_us": row.host_us, "rate": row.rate, "ratio": row.ratio}
    rounded = {name: round(value, 3) for name, value in numbers.items()}
    named = {"kernel": row.kernel, "shape": row.shape, "ceiling": row.ceiling}
    return json.dumps({**named, **rounded, "peers": row.peers, "goals": goals})


def machine(device: torch.device, flashinfer: str) -> dict[str, str]:
    """What was measured on."""
    import subprocess

    import triton

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        driver = f"not known ({type(error).__name__})"
    chip = torch.cuda.get_device_properties(device)
    return {
        "chip": f"{chip.name}, {chip.multi_processor_count} multiprocessors, {chip.total_memory / 2**30:.0f} GiB",
        "driver": driver,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": triton.__version__,
        "flashinfer": flashinfer,
    }


def run(bench: Bench, say: Callable[[str, str], None]) -> int:
    """Ceilings, checks, rows. `say` gets each line as text and as JSON. The exit status."""
    bench.ceilings()
    found = {"copy_gb_s": round(bench.copy_rate / 1e9, 1), "gemm_tflop_s": round(bench.gemm_rate / 1e12, 1)}
    say(
        f"copy {found['copy_gb_s']} GB/s (read + write), bf16 GEMM {found['gemm_tflop_s']} TFLOP/s",
        json.dumps({"ceilings": found}),
    )
    wrong: set[str] = set()
    count = 0
    for check in bench.checks():
        count += 1
        entry = {"check": check.kernel, "case": check.case, "error": check.error, "limit": check.limit}
        text = ""
        if not check.is_right:
            wrong.add(check.kernel)
            text = f"WRONG {check.kernel}, {check.case}: error {check.error:.2e}, must be at most {check.limit:.2e}"
        say(text, json.dumps({**entry, "right": check.is_right}))
    say(f"{count} checks against float64, {len(wrong)} kernels wrong\n\n{HEAD}", "")
    for row in bench.rows(wrong):
        say(line(row), row_json(row))
    for text in bench.left_out:
        say(f"left out: {text}", json.dumps({"left_out": text}))
    return int(bool(wrong) or bench.failed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples: about a minute")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each finding")
    parser.add_argument("--seconds", type=float, default=540.0, help="no shape is begun later than this")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a page")
    parser.add_argument("--no-peers", action="store_true", help="without FlashInfer and torch beside ours")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no CUDA device: torch.cuda.is_available() is false; run this on a machine with one", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    deadline = time.monotonic() + options.seconds
    sizes = replace(QUICK if options.quick else Sizes(), block_size=options.block_size)
    room = int(0.6 * torch.cuda.mem_get_info(device)[0])
    timer = EventTimer(device, 20 if options.quick else 100)

    def say(text: str, entry: str) -> None:
        if chosen := entry if options.json else text:
            print(chosen, flush=True)

    bench = Bench(device, sizes, timer, not options.no_peers, room, deadline)
    facts = machine(device, bench.flashinfer_version)
    say("\n".join(f"{name:<11} {value}" for name, value in facts.items()), json.dumps({"machine": facts}))
    empty = timer(lambda: None).us
    say(f"an empty pair of events takes {empty:.1f} us, which is in all times", json.dumps({"empty_us": empty}))
    return run(bench, say)


if __name__ == "__main__":
    sys.exit(main())

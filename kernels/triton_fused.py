"""Small fused kernels on NVIDIA GPUs, in Triton: RMSNorm with residual, SiLU-and-multiply, rotation and writing of keys
and values, and sampling. Arithmetic is float32 with one rounding at the end; sampling is float64, as `worker/draw.py`.

Sampling never sorts. A row's tokens are ordered by a 32-bit key that rises with the logit. The key at which top-k (and
then top-p) cuts is found digit by digit: each pass sums, for the 16 values of the next digit, how many tokens (or how
much weight) have the digits found so far.

    survey -> begin -> [sift x 8 -> finish] for top-k -> [sift x 8 -> finish] for top-p -> tally -> draw
              peak      key and number of ties that stay                                 sums     token in id order

Chunks of a row are programs of their own, and write their sums next to each other. They are added in a fixed order, so
that a row's token depends on nothing but the row. A chunk's size does not depend on the number of rows.

Sharp edges: Triton's interpreter truncates float32 to bfloat16, so there it is rounded by hand (BY_HAND). It also runs
a kernel without its closure, so helpers are globals of this module.

Shapes in names: T tokens, H query heads, K kv heads, D head_dim, C columns, R rows of logits, V the vocabulary.
"""

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kernels.triton_build import Variant

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
MAX_COLUMNS = 1 << 15  # of a row of rms_norm: it stays in registers
MAX_HEAD_DIM = 512
MAX_VOCAB = 1 << 20
SILU_BLOCK = 1024
HEADS = 8  # of one token in a program that rotates
SPAN = 4096  # logits of a chunk
TILE = 512  # of them at a time; divides SPAN
SIFT_WARPS = 8  # 16 sums for each logit of a tile stay in registers
LEVELS = 8  # digits of a key, 4 bits each

triton: Any = None
tl: Any = None
rounded: Any = None
as_fp8: Any = None
turned: Any = None
key_of: Any = None
weight_of: Any = None
weight_of_key: Any = None
settled: Any = None


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels. Triton is imported here, where they are wanted; they look its names up in the module."""
    global triton, tl, rounded, as_fp8, turned, key_of, weight_of, weight_of_key, settled
    import triton
    import triton.language as tl

    @triton.jit
    def rounded(x, KIND: tl.constexpr, BY_HAND: tl.constexpr):
        # float32 to KIND, to the nearest, ties to even
        if BY_HAND and tl.bfloat16 == KIND:
            bits = x.to(tl.int32, bitcast=True)
            up = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
            kept = tl.where(x == x, up, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            kept = x.to(KIND)
        return kept

    @triton.jit
    def as_fp8(x):
        # float32 to the bits of float8_e4m3fn, to the nearest, ties to even, held to +-448. By hand, because sm_80 and
        # the interpreter have no such type.
        size = tl.where(tl.abs(x) > 448.0, 448.0, tl.abs(x))
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 steps are 2^-9, the last bit of a number between 2^14 and 2^15
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, small, normal)
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(x == x, code | sign, 0x7F).to(tl.uint8)

    @triton.jit
    def rms_norm(
        x_ptr,
        weight_ptr,
        residual_ptr,
        out_ptr,
        x_stride,
        residual_stride,
        columns,
        eps,
        ADD: tl.constexpr,
        PAD: tl.constexpr,
        BY_HAND: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, PAD)
        inside = at < columns
        x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            stream = residual_ptr + row * residual_stride + at
            x += tl.load(stream, mask=inside, other=0.0).to(tl.float32)
            kept = rounded(x, residual_ptr.dtype.element_ty, BY_HAND)
            tl.store(stream, kept, mask=inside)
            x = kept.to(tl.float32)  # what the next layer will read
        factor = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / columns + eps)
        y = x * factor * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * columns + at, rounded(y, out_ptr.dtype.element_ty, BY_HAND), mask=inside)

    @triton.jit
    def silu_mul(
        gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, columns, BLOCK: tl.constexpr, BY_HAND: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < columns
        gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + row * columns + at, rounded(y, out_ptr.dtype.element_ty, BY_HAND), mask=inside)

    @triton.jit
    def turned(x_ptr, weight_ptr, cos, sin, inside, at, eps, DIM: tl.constexpr, NORMED: tl.constexpr):
        # Heads of one token, [heads, D/2] twice: x / rms(x) * weight if NORMED, then the pairs (i, i + D/2) rotated.
        half: tl.constexpr = DIM // 2
        a = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            factor = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / DIM + eps)
            a = a * factor[:, None] * tl.load(weight_ptr + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
            b = b * factor[:, None] * tl.load(weight_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
        return a * cos - b * sin, b * cos + a * sin

    @triton.jit
    def write_kv(
        q_ptr,
        k_ptr,
        v_ptr,
        cos_ptr,
        sin_ptr,
        q_weight_ptr,
        k_weight_ptr,
        out_ptr,
        pool_ptr,
        slots_ptr,
        q_stride,
        k_stride,
        v_stride,
        block_stride,
        num_slots,
        eps,
        k_scale,
        v_scale,
        Q_HEADS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        SIZE: tl.constexpr,
        HEADS: tl.constexpr,
        HALF_PAD: tl.constexpr,
        NORM_Q: tl.constexpr,
        NORM_K: tl.constexpr,
        NARROW: tl.constexpr,
        BY_HAND: tl.constexpr,
    ):
        # programs (token, part); parts are HEADS of q, then of k, then of v. NARROW: the pool is fp8.
        half: tl.constexpr = DIM // 2
        q_parts: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
        k_parts: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
        token = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        at = tl.arange(0, HALF_PAD)
        if part < q_parts:
            head = part * HEADS + tl.arange(0, HEADS)
            inside = (head < Q_HEADS)[:, None] & (at < half)[None, :]
            cos = tl.load(cos_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
            sin = tl.load(sin_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
            where = head[:, None] * DIM + at[None, :]
            first, second = turned(
                q_ptr + token * q_stride + where, q_weight_ptr, cos, sin, inside, at, eps, DIM, NORM_Q
            )
            target = out_ptr + token * (Q_HEADS * DIM) + where
            tl.store(target, rounded(first, out_ptr.dtype.element_ty, BY_HAND), mask=inside)
            tl.store(target + half, rounded(second, out_ptr.dtype.element_ty, BY_HAND), mask=inside)
        else:
            slot = tl.load(slots_ptr + token)
            if (slot >= 0) & (slot < num_slots):
                is_key = part < q_parts + k_parts
                head = (part - q_parts) % k_parts * HEADS + tl.arange(0, HEADS)
                inside = (head < KV_HEADS)[:, None] & (at < half)[None, :]
                where = head[:, None] * DIM + at[None, :]
                target = pool_ptr + (slot // SIZE) * block_stride + (slot % SIZE) * DIM
                target = target + (head * (SIZE * DIM))[:, None] + at[None, :]
                if is_key:
                    cos = tl.load(cos_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
                    sin = tl.load(sin_ptr + token * half + at, mask=at < half, other=0.0)[None, :]
                    first, second = turned(
                        k_ptr + token * k_stride + where, k_weight_ptr, cos, sin, inside, at, eps, DIM, NORM_K
                    )
                    if NARROW:
                        tl.store(target, as_fp8(tl.div_rn(first, k_scale)), mask=inside)
                        tl.store(target + half, as_fp8(tl.div_rn(second, k_scale)), mask=inside)
                    else:
                        tl.store(target, rounded(first, pool_ptr.dtype.element_ty, BY_HAND), mask=inside)
                        tl.store(target + half, rounded(second, pool_ptr.dtype.element_ty, BY_HAND), mask=inside)
                else:
                    target += KV_HEADS * SIZE * DIM
                    low = tl.load(v_ptr + token * v_stride + where, mask=inside, other=0.0)
                    high = tl.load(v_ptr + token * v_stride + where + half, mask=inside, other=0.0)
                    if NARROW:
                        tl.store(target, as_fp8(tl.div_rn(low.to(tl.float32), v_scale)), mask=inside)
                        tl.store(target + half, as_fp8(tl.div_rn(high.to(tl.float32), v_scale)), mask=inside)
                    else:
                        tl.store(target, low, mask=inside)
                        tl.store(target + half, high, mask=inside)

    @triton.jit
    def key_of(x):
        # int64 from 0 to 2^32 - 1 that orders float32; -0.0 is 0.0
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(bits == -2147483648, 0, bits)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648

    @triton.jit
    def weight_of(x, peak, temperature, min_p):
        # float64 relative to the likeliest token's; 0 where min-p cuts
        weight = tl.exp((x.to(tl.float64) - peak) / temperature)
        return tl.where(weight >= min_p, weight, 0.0)

    @triton.jit
    def weight_of_key(key, peak, temperature, min_p):
        bits = (key - 2147483648).to(tl.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        return weight_of(bits.to(tl.float32, bitcast=True), peak, temperature, min_p)

    @triton.jit
    def settled(
        sums_ptr, prefix, base, goal, fraction, cut_weight, chunks, FIRST, MASS: tl.constexpr, PAD: tl.constexpr
    ):
        # The digit of one level, from the sums of all chunks: the lowest above which less than the goal lies. Sums over
        # larger digits are masked sums of one shape, so rounding can't make them fall where the digit falls.
        digit = tl.arange(0, 16)
        chunk = tl.arange(0, PAD)
        sums = tl.load(sums_ptr + chunk[:, None] * 16 + digit[None, :], mask=(chunk < chunks)[:, None], other=0.0)
        bins = tl.sum(sums, 0)
        whole = tl.sum(bins, 0)
        if MASS:
            goal = tl.where(FIRST, fraction * (whole + cut_weight), goal)
        above = base + tl.sum(tl.where(digit[None, :] > digit[:, None], bins[None, :], 0.0), 1)
        found = tl.min(tl.where(above < goal, digit, 15), 0)
        base = tl.sum(tl.where(digit == found, above, 0.0), 0)
        return prefix * 16 + found, base, goal, whole

    @triton.jit
    def survey(logits_ptr, tops_ptr, ids_ptr, stride, vocab, SPAN: tl.constexpr, TILE: tl.constexpr):
        # each chunk's largest logit (NaN where it holds one) and the lowest id of that
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        at = chunk * SPAN + tl.arange(0, TILE)
        best = tl.full((TILE,), -float("inf"), tl.float32)
        where = at
        broken = tl.zeros((TILE,), tl.int32)
        for _ in range(SPAN // TILE):
            x = tl.load(logits_ptr + row * stride + at, mask=at < vocab, other=-float("inf"))
            broken = tl.where(x != x, 1, broken)
            where = tl.where(x > best, at, where)
            best = tl.where(x > best, x, best)
            at += TILE
        top = tl.max(best, 0)
        out = row * tl.num_programs(1) + chunk
        tl.store(ids_ptr + out, tl.min(tl.where(best == top, where, 2147483647), 0))
        tl.store(tops_ptr + out, tl.where(tl.max(broken, 0) > 0, float("nan"), top))

    @triton.jit(do_not_specialize=["chunks"])
    def begin(tops_ptr, ids_ptr, temperature_ptr, peak_ptr, token_ptr, random_ptr, chunks, PAD: tl.constexpr):
        # each row's largest logit, its token (-1 where that logit is not finite), and whether one is to be drawn
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.arange(0, PAD)
        top = tl.load(tops_ptr + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
        ids = tl.load(ids_ptr + row * chunks + chunk, mask=chunk < chunks, other=2147483647)
        is_broken = tl.max(tl.where(top != top, 1, 0), 0) > 0
        peak = tl.max(tl.where(top != top, -float("inf"), top), 0)
        token = tl.min(tl.where(top == peak, ids, 2147483647), 0)
        fine = (tl.abs(peak) < float("inf")) & (is_broken == 0)
        tl.store(peak_ptr + row, peak.to(tl.float64))
        tl.store(token_ptr + row, tl.where(fine, token, -1))
        tl.store(random_ptr + row, (fine & (tl.load(temperature_ptr + row) > 0.0)).to(tl.int32))

    @triton.jit(do_not_specialize=["rows", "level"])
    def sift(
        logits_ptr,
        peak_ptr,
        random_ptr,
        temperature_ptr,
        min_p_ptr,
        limit_ptr,
        cut_ptr,
        stays_ptr,
        prefix_ptr,
        base_ptr,
        goal_ptr,
        whole_ptr,
        sums_ptr,
        stride,
        vocab,
        rows,
        level,
        MASS: tl.constexpr,
        MIN_P: tl.constexpr,
        SPAN: tl.constexpr,
        TILE: tl.constexpr,
        PAD: tl.constexpr,
    ):
        # Sums by the digit of this level, of the tokens whose digits before it are those found: their number, or, if
        # MASS, their weight if they lie above top-k's cut. State of a level is written by the row's first chunk.
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        chunks = tl.num_programs(1)
        limit = tl.load(limit_ptr + row)
        if MASS:
            wanted = limit < 1.0
        else:
            wanted = (limit > 0) & (limit < vocab)
        if wanted & (tl.load(random_ptr + row) > 0):
            peak = tl.load(peak_ptr + row)
            temperature = tl.load(temperature_ptr + row)
            min_p = tl.load(min_p_ptr + row) if MIN_P else 0.0
            cut = tl.full((), 0, tl.int64)
            cut_weight = tl.full((), 0.0, tl.float64)
            if MASS:
                cut = tl.load(cut_ptr + row)
                stays = tl.load(stays_ptr + row)
                share = weight_of_key(cut, peak, temperature, min_p) * stays
                cut_weight = tl.where(stays > 0, share, 0.0)
            prefix = tl.full((), 0, tl.int64)
            base = tl.full((), 0.0, tl.float64)
            if level > 0:
                old = (level - 1) * rows + row
                side = ((level - 1) % 2) * rows + row
                goal = limit.to(tl.float64)
                if MASS:
                    goal = tl.load(goal_ptr + old)
                prefix, base, goal, whole = settled(
                    sums_ptr + side * chunks * 16,
                    tl.load(prefix_ptr + old),
                    tl.load(base_ptr + old),
                    goal,
                    limit,
                    cut_weight,
                    chunks,
                    level == 1,
                    MASS,
                    PAD,
                )
                if chunk == 0:
                    tl.store(goal_ptr + level * rows + row, goal)
                    if level == 1:
                        tl.store(whole_ptr + row, whole)
            if chunk == 0:
                tl.store(prefix_ptr + level * rows + row, prefix)
                tl.store(base_ptr + level * rows + row, base)
            shift = 28 - 4 * level
            digit = tl.arange(0, 16)
            at = chunk * SPAN + tl.arange(0, TILE)
            sums = tl.zeros((TILE, 16), tl.float64)
            for _ in range(SPAN // TILE):
                x = tl.load(logits_ptr + row * stride + at, mask=at < vocab, other=-float("inf"))
                key = key_of(x)
                mine = (at < vocab) & (key >> shift >> 4 == prefix)
                if MASS:
                    amount = tl.where(mine & (key > cut), weight_of(x, peak, temperature, min_p), 0.0)
                else:
                    amount = mine.to(tl.float64)
                own = ((key >> shift) & 15).to(tl.int32)
                sums += tl.where(own[:, None] == digit[None, :], amount[:, None], 0.0)
                at += TILE
            target = ((level % 2) * rows + row) * chunks + chunk
            tl.store(sums_ptr + target * 16 + digit, tl.sum(sums, 0))

    @triton.jit(do_not_specialize=["rows", "chunks"])
    def finish(
        peak_ptr,
        random_ptr,
        temperature_ptr,
        min_p_ptr,
        limit_ptr,
        cut_ptr,
        stays_ptr,
        prefix_ptr,
        base_ptr,
        goal_ptr,
        whole_ptr,
        sums_ptr,
        vocab,
        rows,
        chunks,
        MASS: tl.constexpr,
        MIN_P: tl.constexpr,
        LEVELS: tl.constexpr,
        PAD: tl.constexpr,
    ):
        # The cut after the last level: tokens of larger keys stay, and of those of that key the `stays` lowest ids.
        row = tl.program_id(0).to(tl.int64)
        limit = tl.load(limit_ptr + row)
        if MASS:
            wanted = limit < 1.0
        else:
            wanted = (limit > 0) & (limit < vocab)
        if wanted & (tl.load(random_ptr + row) > 0):
            last = (LEVELS - 1) * rows + row
            side = ((LEVELS - 1) % 2) * rows + row
            goal = limit.to(tl.float64)
            if MASS:
                goal = tl.load(goal_ptr + last)
            key, base, goal, _ = settled(
                sums_ptr + side * chunks * 16,
                tl.load(prefix_ptr + last),
                tl.load(base_ptr + last),
                goal,
                limit,
                0.0,
                chunks,
                False,
                MASS,
                PAD,
            )
            if MASS:
                cut = tl.load(cut_ptr + row)
                stays = tl.load(stays_ptr + row)
                whole = tl.load(whole_ptr + row)
                # the goal may lie among top-k's ties, which the sums leave out
                among = (whole < goal) | (key <= cut)
                most = tl.where(among, stays, vocab)
                key = tl.where(among, cut, key)
                base = tl.where(among, whole, base)
                peak = tl.load(peak_ptr + row)
                min_p = tl.load(min_p_ptr + row) if MIN_P else 0.0
                weight = weight_of_key(key, peak, tl.load(temperature_ptr + row), min_p)
                # the least number with base + number * weight >= goal
                share = tl.where(weight > 0.0, (goal - base) / weight, 1e9)
                number = tl.ceil(tl.minimum(tl.maximum(share, 1.0), 1e9))
                number = tl.where((number > 1.0) & (base + (number - 1.0) * weight >= goal), number - 1.0, number)
                number = tl.where(base + number * weight < goal, number + 1.0, number)
                tl.store(stays_ptr + row, tl.minimum(number.to(tl.int64), most))
            else:
                tl.store(stays_ptr + row, limit - base.to(tl.int64))
            tl.store(cut_ptr + row, key)

    @triton.jit
    def tally(
        logits_ptr,
        peak_ptr,
        random_ptr,
        temperature_ptr,
        min_p_ptr,
        cut_ptr,
        ties_ptr,
        sums_ptr,
        stride,
        vocab,
        MIN_P: tl.constexpr,
        SPAN: tl.constexpr,
        TILE: tl.constexpr,
    ):
        # each chunk's weight above the cut, and its number of tokens at the cut
        row = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        if tl.load(random_ptr + row) > 0:
            peak = tl.load(peak_ptr + row)
            temperature = tl.load(temperature_ptr + row)
            min_p = tl.load(min_p_ptr + row) if MIN_P else 0.0
            cut = tl.load(cut_ptr + row)
            at = chunk * SPAN + tl.arange(0, TILE)
            ties = tl.zeros((TILE,), tl.int64)
            sums = tl.zeros((TILE,), tl.float64)
            for _ in range(SPAN // TILE):
                x = tl.load(logits_ptr + row * stride + at, mask=at < vocab, other=-float("inf"))
                key = key_of(x)
                sums += tl.where(key > cut, weight_of(x, peak, temperature, min_p), 0.0)
                ties += ((at < vocab) & (key == cut)).to(tl.int64)
                at += TILE
            out = row * tl.num_programs(1) + chunk
            tl.store(ties_ptr + out, tl.sum(ties, 0))
            tl.store(sums_ptr + out, tl.sum(sums, 0))

    @triton.jit(do_not_specialize=["chunks"])
    def draw(
        logits_ptr,
        peak_ptr,
        random_ptr,
        temperature_ptr,
        min_p_ptr,
        u_ptr,
        cut_ptr,
        stays_ptr,
        ties_ptr,
        sums_ptr,
        token_ptr,
        stride,
        vocab,
        chunks,
        MIN_P: tl.constexpr,
        SPAN: tl.constexpr,
        TILE: tl.constexpr,
        PAD: tl.constexpr,
    ):
        # The first id whose cumulative weight is above u times the total: first its chunk, then inside it. Scans that
        # add in a tree may fall by a rounding, so a token (or chunk) must have weight itself to be taken.
        row = tl.program_id(0).to(tl.int64)
        if tl.load(random_ptr + row) > 0:
            peak = tl.load(peak_ptr + row)
            temperature = tl.load(temperature_ptr + row)
            min_p = tl.load(min_p_ptr + row) if MIN_P else 0.0
            cut = tl.load(cut_ptr + row)
            stays = tl.load(stays_ptr + row)
            chunk = tl.arange(0, PAD)
            ties = tl.load(ties_ptr + row * chunks + chunk, mask=chunk < chunks, other=0)
            ties_before = tl.cumsum(ties, 0) - ties
            stay = tl.minimum(tl.maximum(stays - ties_before, 0), ties)
            each = weight_of_key(cut, peak, temperature, min_p)
            weights = tl.load(sums_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)
            weights += tl.where(stay > 0, stay.to(tl.float64) * each, 0.0)
            reached = tl.cumsum(weights, 0)
            target = tl.load(u_ptr + row) * tl.sum(tl.where(chunk == PAD - 1, reached, 0.0), 0)
            mine = tl.min(tl.where((reached > target) & (weights > 0.0), chunk, PAD), 0)
            mine = tl.where(mine == PAD, tl.max(tl.where(weights > 0.0, chunk, 0), 0), mine)
            before = tl.sum(tl.where(chunk < mine, weights, 0.0), 0)
            rank = tl.sum(tl.where(chunk == mine, ties_before, 0), 0)
            at = mine * SPAN + tl.arange(0, TILE)
            token = tl.full((), 2147483647, tl.int32)
            last = tl.full((), -1, tl.int32)
            for _ in range(SPAN // TILE):
                x = tl.load(logits_ptr + row * stride + at, mask=at < vocab, other=-float("inf"))
                key = key_of(x)
                is_tie = ((at < vocab) & (key == cut)).to(tl.int64)
                ranks = rank + tl.cumsum(is_tie, 0) - is_tie
                kept = (key > cut) | ((is_tie > 0) & (ranks < stays))
                weight = tl.where(kept, weight_of(x, peak, temperature, min_p), 0.0)
                found = (before + tl.cumsum(weight, 0) > target) & (weight > 0.0)
                token = tl.minimum(token, tl.min(tl.where(found, at, 2147483647), 0))
                last = tl.maximum(last, tl.max(tl.where(weight > 0.0, at, -1), 0))
                before += tl.sum(weight, 0)
                rank += tl.sum(is_tie, 0)
                at += TILE
            token = tl.where(token == 2147483647, last, token)
            if token >= 0:
                tl.store(token_ptr + row, token)

    return SimpleNamespace(
        rms_norm=rms_norm,
        silu_mul=silu_mul,
        write_kv=write_kv,
        survey=survey,
        begin=begin,
        sift=sift,
        finish=finish,
        tally=tally,
        draw=draw,
    )


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: for tests."""
    kernels()
    return bool(triton.knobs.runtime.interpret)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension; with `residual`, of residual + x.

    Args:
        x: [T, C], float32, bfloat16 or float16; the stride of rows is free. C is 1 to MAX_COLUMNS.
        weight: [C], any of these types.
        eps: added to the mean square.
        residual: [T, C], any of these types, the stride of rows is free; changed: residual += x, rounded to its type.
            The norm is of what was stored.

    Returns:
        [T, C] in x's dtype. Arithmetic is float32, rounded once.

    Raises:
        ValueError: a dtype, shape or stride that may not be.
    """
    _rows(x, "x", None)
    columns = x.shape[1]
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"x: got {columns} columns, must be 1 to {MAX_COLUMNS}")
    _vector(weight, "weight", columns, FLOATS, x.device)
    if residual is not None:
        _rows(residual, "residual", x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        pad = _padded(columns)
        stream = x if residual is None else residual
        kernels().rms_norm[(len(x),)](
            x,
            weight,
            stream,
            out,
            x.stride(0),
            stream.stride(0),
            columns,
            eps,
            ADD=residual is not None,
            PAD=pad,
            BY_HAND=is_interpreted(),
            num_warps=_warps(pad),
        )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate, up] side by side.

    Args:
        gate_up: [T, 2 * C], float32, bfloat16 or float16; the stride of rows is free.

    Returns:
        [T, C] in the same dtype. Arithmetic is float32, rounded once.

    Raises:
        ValueError: a dtype, shape or stride that may not be.
    """
    _rows(gate_up, "gate_up", None)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: got {gate_up.shape[1]} columns, must be a multiple of 2")
    gate, up = gate_up.chunk(2, dim=1)
    return silu_mul_pair(gate, up)


def silu_mul_pair(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both [T, C] of one dtype: as `silu_mul`."""
    _rows(gate, "gate", None)
    _rows(up, "up", gate)
    if up.dtype != gate.dtype:
        raise ValueError(f"up: got {up.dtype}, must be gate's {gate.dtype}")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        columns = gate.shape[1]
        block = min(SILU_BLOCK, _padded(columns))
        kernels().silu_mul[(len(gate), -(-columns // block))](
            gate,
            up,
            out,
            gate.stride(0),
            up.stride(0),
            columns,
            BLOCK=block,
            BY_HAND=is_interpreted(),
            num_warps=_warps(block),
        )
    return out


def write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Norm and rotate the queries and keys of some tokens, and write keys and values into their slots.

    Per head: x / rms(x) * weight where there is a weight, then the pairs (i, i + D/2) rotated, in float32 with one
    rounding at the end. Nothing waits for the device, so slots are not checked here: one beyond the pool is skipped.

    Args:
        q: [T, H, D]; k, v: [T, K, D]; one dtype of float32, bfloat16 and float16; heads and dims contiguous, the
            stride of tokens is free (slices of one matrix). D is even, 2 to MAX_HEAD_DIM.
        cos, sin: float32 [T, D/2], contiguous.
        pool: [layers, blocks, 2, K, block_size, D], inner four dimensions contiguous, of q's dtype or float8_e4m3fn;
            changed in one layer.
        slots: int64 [T], block * block_size + offset; negative is skipped. Equal slots are a mistake of the caller.
        q_weight, k_weight: [D] of float32, bfloat16 or float16, or None for no norm.
        eps: of the norms.
        k_scale, v_scale: stored is value / scale, held to +-448, in a float8 pool; 1 in any other.

    Returns:
        The rotated queries, [T, H, D] in q's dtype; of skipped tokens too.

    Raises:
        ValueError: a dtype, shape, stride, layer or scale that may not be; nothing was written.
    """
    num_tokens, q_heads, dim = _heads(q, "q", None, None)
    _, blocks, _, kv_heads, size, _ = _pool(pool, dim, q.dtype, q.device)
    _heads(k, "k", q, kv_heads)
    _heads(v, "v", q, kv_heads)
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.dtype != torch.float32 or angles.shape != (num_tokens, dim // 2) or not angles.is_contiguous():
            raise ValueError(
                f"{name}: got {angles.dtype} {tuple(angles.shape)}, must be contiguous float32 {(num_tokens, dim // 2)}"
            )
        _device(angles, name, q.device)
    if not 0 <= layer < pool.shape[0]:
        raise ValueError(f"layer: got {layer}, must be from 0 to {pool.shape[0] - 1}")
    _vector(slots, "slots", num_tokens, (torch.int64,), q.device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _vector(weight, name, dim, FLOATS, q.device)
    narrow = pool.dtype == FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not 0 < scale < float("inf") or (scale != 1.0 and not narrow):
            raise ValueError(f"{name}: got {scale}, must be positive and finite, and 1 unless the pool is {FP8}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens:
        target = pool[layer]
        heads = min(HEADS, _padded(max(q_heads, kv_heads)))
        parts = -(-q_heads // heads) + 2 * -(-kv_heads // heads)
        kernels().write_kv[(num_tokens, parts)](
            q,
            k,
            v,
            cos,
            sin,
            q if q_weight is None else q_weight,
            k if k_weight is None else k_weight,
            out,
            target.view(torch.uint8) if narrow else target,
            slots,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            pool.stride(1),
            blocks * size,
            eps,
            k_scale,
            v_scale,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            SIZE=size,
            HEADS=heads,
            HALF_PAD=_padded(dim // 2),
            NORM_Q=q_weight is not None,
            NORM_K=k_weight is not None,
            NARROW=narrow,
            BY_HAND=is_interpreted(),
            num_warps=4 if heads * dim >= 512 else 1,
        )
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    u: torch.Tensor,
) -> torch.Tensor:
    """A token for each row: the likeliest where its temperature is 0, else as `worker.draw.choose`.

    That is: weights by temperature, then min-p, top-k and top-p, each over what the one before has left; of equal
    logits the lower id stays; the token is the first in id order whose cumulative weight is above u times the total.
    Weights are float64. They are added in another order than there, so the two may differ where u times the total, or
    top-p's share, is within such a rounding of a sum. Values of the arguments are not checked: that would wait for the
    device.

    Args:
        logits: float32 [R, V], the stride of rows is free; not changed. V is 1 to MAX_VOCAB.
        temperature: float64 [R], 0 or above.
        top_k: int64 [R], or None for no row; below 1, or V and above, keeps all.
        top_p: float64 [R], above 0, or None; 1 and above keeps all.
        min_p: float64 [R], 0 to 1, or None.
        u: float64 [R], in [0, 1); see `worker.draw.uniforms`.

    Returns:
        int32 [R] on the logits' device; -1 where the row's largest logit is not finite or the row holds a NaN.

    Raises:
        ValueError: a dtype, shape, stride or device that may not be.
    """
    _rows(logits, "logits", None)
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: got {logits.dtype} with {vocab} columns, must be float32 with 1 to {MAX_VOCAB}")
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "u": u}
    for name, values in columns.items():
        if values is not None:
            _vector(values, name, rows, (torch.int64 if name == "top_k" else torch.float64,), logits.device)
    chunks = -(-vocab // SPAN)
    pad = _padded(chunks)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tokens, is_random = empty(torch.int32, rows), empty(torch.int32, rows)
    if not rows:
        return tokens
    made = kernels()
    tops, ids = empty(torch.float32, rows, chunks), empty(torch.int32, rows, chunks)
    peak = empty(torch.float64, rows)
    spans = {"SPAN": SPAN, "TILE": TILE}
    made.survey[(rows, chunks)](logits, tops, ids, logits.stride(0), vocab, **spans)
    made.begin[(rows,)](tops, ids, temperature, peak, tokens, is_random, chunks, PAD=pad, num_warps=1)
    # with no key below the cut, all stay
    cut = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    stays = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    common = (peak, is_random, temperature, u if min_p is None else min_p)
    if top_k is not None or top_p is not None:
        prefix = empty(torch.int64, LEVELS, rows)
        base, goal, whole = (
            empty(torch.float64, LEVELS, rows),
            empty(torch.float64, LEVELS, rows),
            empty(peak.dtype, rows),
        )
        sums = empty(torch.float64, 2, rows, chunks, 16)
        state = (cut, stays, prefix, base, goal, whole, sums)
        for limit in (top_k, top_p):
            if limit is not None:
                flags = {"MASS": limit is top_p, "MIN_P": min_p is not None, "PAD": pad}
                for level in range(LEVELS):
                    made.sift[(rows, chunks)](
                        logits,
                        *common,
                        limit,
                        *state,
                        logits.stride(0),
                        vocab,
                        rows,
                        level,
                        **flags,
                        **spans,
                        num_warps=SIFT_WARPS,
                    )
                made.finish[(rows,)](*common, limit, *state, vocab, rows, chunks, LEVELS=LEVELS, **flags)
    ties, weights = empty(torch.int64, rows, chunks), empty(torch.float64, rows, chunks)
    made.tally[(rows, chunks)](
        logits, *common, cut, ties, weights, logits.stride(0), vocab, MIN_P=min_p is not None, **spans
    )
    made.draw[(rows,)](
        logits,
        *common,
        u,
        cut,
        stays,
        ties,
        weights,
        tokens,
        logits.stride(0),
        vocab,
        chunks,
        MIN_P=min_p is not None,
        PAD=pad,
        **spans,
        num_warps=SIFT_WARPS,
    )
    return tokens


def _padded(width: int) -> int:
    """The power of two that a block's dimension needs."""
    return 1 << (width - 1).bit_length()


def _warps(block: int) -> int:
    """Of a program over one row of `block` elements: up to 16 elements a thread, then more."""
    return min(max(block // 512, 1), 16)


def _device(tensor: torch.Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, must be on {device} with the others")


def _rows(tensor: torch.Tensor, name: str, like: torch.Tensor | None) -> None:
    """[T, C] with contiguous columns; of the shape and device of `like`."""
    if tensor.dtype not in FLOATS or tensor.dim() != 2:
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [T, C] of {_names(FLOATS)}")
    if like is not None:
        if tensor.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be {tuple(like.shape)}")
        _device(tensor, name, like.device)
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}: got strides {tensor.stride()}, must have contiguous columns")


def _vector(
    tensor: torch.Tensor, name: str, length: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != (length,):
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [{length}] of {_names(dtypes)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, must be contiguous")
    _device(tensor, name, device)


def _heads(tensor: torch.Tensor, name: str, q: torch.Tensor | None, heads: int | None) -> tuple[int, int, int]:
    """[T, heads, D] with contiguous heads and dims; as many tokens, of the same D and dtype, as `q`."""
    if tensor.dtype not in FLOATS or tensor.dim() != 3 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be [T, heads, D] of {_names(FLOATS)}")
    num_tokens, own_heads, dim = tensor.shape
    if dim % 2 or dim > MAX_HEAD_DIM:
        raise ValueError(f"{name}: got head_dim {dim}, must be even and at most {MAX_HEAD_DIM}")
    if q is not None:
        if tensor.dtype != q.dtype or tensor.shape != (len(q), heads, q.shape[2]):
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be {q.dtype} {(len(q), heads, q.shape[2])}"
            )
        _device(tensor, name, q.device)
    if tensor.stride(2) != 1 or (own_heads > 1 and tensor.stride(1) != dim):
        raise ValueError(f"{name}: got strides {tensor.stride()}, must have contiguous heads and dims")
    return num_tokens, own_heads, dim


def _pool(pool: torch.Tensor, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Size:
    if pool.dtype not in (dtype, FP8):
        raise ValueError(f"pool: got {pool.dtype}, must be q's {dtype} or {FP8}")
    if pool.dim() != 6 or pool.shape[2] != 2 or pool.shape[5] != dim or 0 in pool.shape[3:]:
        raise ValueError(
            f"pool: got shape {tuple(pool.shape)}, must be [layers, blocks, 2, kv_heads, block_size, {dim}]"
        )
    heads, size = pool.shape[3:5]
    # A dimension of length one may report any stride, so only those that matter are compared.
    for axis, wanted in ((2, heads * size * dim), (3, size * dim), (4, dim), (5, 1)):
        if pool.shape[axis] > 1 and pool.stride(axis) != wanted:
            raise ValueError(f"pool: got strides {pool.stride()}, must have contiguous inner four dimensions")
    _device(pool, "pool", device)
    return pool.shape


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(each).removeprefix("torch.") for each in dtypes)


def variants() -> "list[Variant]":
    """What is built ahead of time, to see that it fits the chips: see `kernels.triton_build`."""
    from kernels.triton_build import Variant

    made = kernels()
    found = []

    def add(name: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], num_warps: int) -> None:
        signature = arguments | dict.fromkeys(constants, "constexpr")
        found.append(Variant(name, kernel, signature, constants, num_warps, 3, False))

    for kind in ("bf16", "fp32"):
        ints = dict.fromkeys(("x_stride", "residual_stride", "columns"), "i32:16")
        for is_added in (False, True):
            pointers = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), f"*{kind}")
            constants: dict[str, Any] = {"ADD": is_added, "PAD": 4096, "BY_HAND": False}
            name = f"rms_norm {kind} c4096" + " residual" * is_added
            add(name, made.rms_norm, pointers | ints | {"eps": "fp32"}, constants, _warps(4096))
        pointers = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{kind}")
        ints = dict.fromkeys(("gate_stride", "up_stride", "columns"), "i32:16")
        constants = {"BLOCK": SILU_BLOCK, "BY_HAND": False}
        add(f"silu_mul {kind}", made.silu_mul, pointers | ints, constants, _warps(SILU_BLOCK))
        for dim, is_normed, is_narrow in ((64, False, False), (128, True, False), (128, True, True)):
            name = f"write_kv {kind} d{dim}" + " normed" * is_normed + " fp8" * is_narrow
            arguments, constants = _write_variant(kind, dim, is_normed, is_narrow)
            add(name, made.write_kv, arguments, constants, 4)
    logits = {"logits_ptr": "*fp32"}
    common = dict.fromkeys(("peak_ptr", "random_ptr", "temperature_ptr", "min_p_ptr"), "*fp64") | {"random_ptr": "*i32"}
    cut = {"cut_ptr": "*i64", "stays_ptr": "*i64"}
    state = {"prefix_ptr": "*i64"} | dict.fromkeys(("base_ptr", "goal_ptr", "whole_ptr", "sums_ptr"), "*fp64")
    sizes = {"stride": "i32:16", "vocab": "i32:16"}
    spans, pad = {"SPAN": SPAN, "TILE": TILE}, {"PAD": 64}
    add("sample survey", made.survey, {**logits, "tops_ptr": "*fp32", "ids_ptr": "*i32", **sizes}, spans, 4)
    arguments = {"tops_ptr": "*fp32", "ids_ptr": "*i32", "temperature_ptr": "*fp64", "peak_ptr": "*fp64"}
    arguments |= {"token_ptr": "*i32", "random_ptr": "*i32", "chunks": "i32"}
    add("sample begin", made.begin, arguments, pad, 1)
    for is_mass, limit in ((False, {"limit_ptr": "*i64"}), (True, {"limit_ptr": "*fp64"})):
        flags = {"MASS": is_mass, "MIN_P": True}
        word = "top_p" if is_mass else "top_k"
        arguments = logits | common | limit | cut | state | sizes | {"rows": "i32", "level": "i32"}
        add(f"sample sift {word}", made.sift, arguments, flags | spans | pad, SIFT_WARPS)
        arguments = common | limit | cut | state | {"vocab": "i32:16", "rows": "i32", "chunks": "i32"}
        add(f"sample finish {word}", made.finish, arguments, flags | {"LEVELS": LEVELS} | pad, 4)
    sums = {"ties_ptr": "*i64", "sums_ptr": "*fp64"}
    arguments = logits | common | {"cut_ptr": "*i64"} | sums | sizes
    add("sample tally", made.tally, arguments, {"MIN_P": True} | spans, 4)
    arguments = logits | common | {"u_ptr": "*fp64"} | cut | sums | {"token_ptr": "*i32"} | sizes | {"chunks": "i32"}
    add("sample draw", made.draw, arguments, {"MIN_P": True} | spans | pad, SIFT_WARPS)
    return found


def _write_variant(kind: str, dim: int, is_normed: bool, is_narrow: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Arguments and constants of one build of `write_kv`."""
    arguments = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}"),
        **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
        **dict.fromkeys(("q_weight_ptr", "k_weight_ptr", "out_ptr"), f"*{kind}"),
        "pool_ptr": "*u8" if is_narrow else f"*{kind}",
        "slots_ptr": "*i64",
        **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16"),
        **dict.fromkeys(("block_stride", "num_slots"), "i64:16"),
        **dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32"),
    }
    constants = {
        "Q_HEADS": 32,
        "KV_HEADS": 8,
        "DIM": dim,
        "SIZE": 16,
        "HEADS": HEADS,
        "HALF_PAD": dim // 2,
        "NORM_Q": is_normed,
        "NORM_K": is_normed,
        "NARROW": is_narrow,
        "BY_HAND": False,
    }
    return arguments, constants

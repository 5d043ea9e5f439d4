"""Sampling on NVIDIA GPUs, in Triton: a token for each row of logits, without sorting. Arithmetic is float64, as in
`worker/draw.py`.

A row's tokens are ordered by a 32-bit key that rises with the logit. The key at which top-k (and then top-p) cuts is
found digit by digit: each pass sums, for the 16 values of the next digit, how many tokens (or how much weight) have the
digits found so far.

    survey -> begin -> [sift x 8 -> finish] for top-k -> [sift x 8 -> finish] for top-p -> tally -> draw
              peak      key and number of ties that stay                                 sums     token in id order

Chunks of a row are programs of their own, and write their sums next to each other. They are added in a fixed order, so
that a row's token depends on nothing but the row. A chunk's size does not depend on the number of rows.

Helpers are globals of this module: Triton's interpreter runs a kernel without its closure.

Shapes in names: R rows of logits, V the vocabulary.
"""

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kernels.triton_fused import check_rows, check_vector, padded

if TYPE_CHECKING:
    from kernels.triton_build import Variant

MAX_VOCAB = 1 << 20
SPAN = 4096  # logits of a chunk
TILE = 512  # of them at a time; divides SPAN
SIFT_WARPS = 8  # 16 sums for each logit of a tile stay in registers
LEVELS = 8  # digits of a key, 4 bits each

triton: Any = None
tl: Any = None
key_of: Any = None
weight_of: Any = None
weight_of_key: Any = None
settled: Any = None


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels. Triton is imported here, where they are wanted; they look its names up in the module."""
    global triton, tl, key_of, weight_of, weight_of_key, settled
    import triton
    import triton.language as tl

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

    return SimpleNamespace(survey=survey, begin=begin, sift=sift, finish=finish, tally=tally, draw=draw)


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
    check_rows(logits, "logits", None)
    rows, vocab = logits.shape
    if logits.dtype != torch.float32 or not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(f"logits: got {logits.dtype} with {vocab} columns, must be float32 with 1 to {MAX_VOCAB}")
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "u": u}
    for name, values in columns.items():
        if values is not None:
            check_vector(values, name, rows, (torch.int64 if name == "top_k" else torch.float64,), logits.device)
    chunks = -(-vocab // SPAN)
    pad = padded(chunks)

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


def variants() -> "list[Variant]":
    """What is built ahead of time, to see that it fits the chips: see `kernels.triton_build`."""
    from kernels.triton_build import Variant

    made = kernels()
    found = []

    def add(*what: Any) -> None:
        found.append(Variant.plain(*what))

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

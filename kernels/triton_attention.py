"""Paged attention on NVIDIA GPUs, in Triton: decodes, prefill chunks and mixes of both as rows of one ragged call.

    rows --plan (host, once for all layers)--> tiles: up to M (token, head of the group) pairs of one row
                                          --> items: a tile over a part of its row's pages, so that there is work for
                                              all multiprocessors whatever the batch and the lengths
    items --attend_tiles--> tiles of one item are done; of several: partial outputs --merge_tiles--> done

Pages are read where they lie: a pool's base address and the stride of its blocks come by pool index, so pages of mapped
peers are read in place. Scores are kept in units of log2 (one exp2 each), log-sum-exps leave in natural log.

Flash-decoding's split over keys (Dao et al., 2023) and FlashAttention-2's online softmax (arXiv 2307.08691).
"""

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kernels import checks
from kernels.tiles import LARGE_TILE, SMALL_TILE, Ints, Shape, deal
from kernels.upload import upload

if TYPE_CHECKING:
    from kernels.ops import Mask, PageList
    from kernels.triton_build import Variant

LOG2_E = math.log2(math.e)
KINDS = (torch.float32, torch.bfloat16, torch.float16)
_PLANS = 4  # kept: a model's windows, and a call in between

triton: Any = None
tl: Any = None


def small_shape(element_size: int, head_dim: int) -> Shape:
    """For rows whose pairs fit one tile of SMALL_TILE: decodes."""
    if element_size == 4:
        return Shape(SMALL_TILE, 16, 4, 2)
    return Shape(SMALL_TILE, 64, 4, 3) if head_dim <= 128 else Shape(SMALL_TILE, 32, 4, 2)


def large_shape(element_size: int, head_dim: int) -> Shape:
    """For all other rows: prefill chunks. Products in float32 are not the tensor cores', and take registers."""
    if element_size == 4:
        return Shape(2 * SMALL_TILE, 16, 8, 1)
    return Shape(LARGE_TILE, 64, 8, 2) if head_dim <= 128 else Shape(LARGE_TILE // 2, 32, 4, 2)


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels. Triton is imported here, where they are wanted; they look its names up in the module."""
    global triton, tl
    import triton
    import triton.language as tl

    @triton.jit
    def attend_tiles(
        q_ptr,
        out_ptr,
        lse_ptr,
        part_ptr,
        part_lse_ptr,
        items_ptr,
        tiles_ptr,
        pool_ptr,
        bases_ptr,
        strides_ptr,
        page_pool_ptr,
        page_block_ptr,
        page_position_ptr,
        block_stride,
        q_stride,
        scale_log2,
        v_scale,
        window,
        sinks,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        PAD: tl.constexpr,
        SIZE: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
        SEVERAL_POOLS: tl.constexpr,
        ALIGNED: tl.constexpr,
        WINDOWED: tl.constexpr,
        NARROW: tl.constexpr,
        EXACT: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        # ALIGNED: rows of q and pages begin at multiples of 16 elements, so that 16 bytes are loaded at once. NARROW:
        # pages of 8 bits, widened to q's type. EXACT: float32 products without TF32. UPCAST: the interpreter multiplies
        # bfloat16 wrongly.
        item = tl.program_id(0)
        kv_head = tl.program_id(1)
        tile = tl.load(items_ptr + item * 4)
        begin = tl.load(items_ptr + item * 4 + 1)
        end = tl.load(items_ptr + item * 4 + 2)
        slot = tl.load(items_ptr + item * 4 + 3)
        first_pair = tl.load(tiles_ptr + tile * 4)
        num_pairs = tl.load(tiles_ptr + tile * 4 + 1)  # of the row
        first_token = tl.load(tiles_ptr + tile * 4 + 2)
        first_position = tl.load(tiles_ptr + tile * 4 + 3)

        pair = first_pair + tl.arange(0, M)
        is_pair = pair < num_pairs
        token = (first_token + pair // GROUP).to(tl.int64)
        head = kv_head * GROUP + pair % GROUP
        query = first_position + pair // GROUP
        first_query = first_position + first_pair // GROUP
        last_query = first_position + (tl.minimum(first_pair + M, num_pairs) - 1) // GROUP
        d = tl.arange(0, PAD)
        is_dim = d < DIM
        q_ptrs = q_ptr + token[:, None] * q_stride + head[:, None] * DIM + d[None, :]
        if ALIGNED:
            q_ptrs = tl.max_contiguous(tl.multiple_of(q_ptrs, (1, 16)), (1, 16))
        q = tl.load(q_ptrs, mask=is_pair[:, None] & is_dim[None, :], other=0.0)
        top = tl.full((M,), -float("inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, PAD), tl.float32)
        n = tl.arange(0, N)
        for start in range(begin * SIZE, end * SIZE, N):
            at = start + n
            entry = at // SIZE
            is_entry = at < end * SIZE
            block = tl.load(page_block_ptr + entry, mask=is_entry, other=0).to(tl.int64)
            position = tl.load(page_position_ptr + entry, mask=is_entry, other=0) + at % SIZE
            # keys that no query of the tile sees are not read: what lies there may be anything
            used = is_entry & (position <= last_query)
            if WINDOWED:
                used = used & ((first_query - position < window) | (position < sinks))
            inner = (kv_head * SIZE + at % SIZE) * DIM
            if SEVERAL_POOLS:
                pool = tl.load(page_pool_ptr + entry, mask=is_entry, other=0)
                base = tl.load(bases_ptr + pool).to(tl.pointer_type(pool_ptr.dtype.element_ty))
                stride = tl.load(strides_ptr + pool)
                k_ptrs = (base + block * stride + inner)[:, None] + d[None, :]
            else:
                k_ptrs = pool_ptr + (block * block_stride + inner)[:, None] + d[None, :]
            if ALIGNED:
                k_ptrs = tl.max_contiguous(tl.multiple_of(k_ptrs, (1, 16)), (1, 16))
            wanted = used[:, None] & is_dim[None, :]
            k = tl.load(k_ptrs, mask=wanted, other=0.0)
            v = tl.load(k_ptrs + KV_HEADS * SIZE * DIM, mask=wanted, other=0.0)
            if NARROW:
                k = k.to(q.dtype)
                v = v.to(q.dtype)
            if UPCAST:
                x = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)))
            elif EXACT:
                x = tl.dot(q, tl.trans(k), input_precision="ieee")
            else:
                x = tl.dot(q, tl.trans(k))
            seen = used[None, :] & (position[None, :] <= query[:, None])
            if WINDOWED:
                seen = seen & ((query[:, None] - position[None, :] < window) | (position[None, :] < sinks))
            x = tl.where(seen, x * scale_log2, -float("inf"))
            new = tl.maximum(top, tl.max(x, 1))
            safe = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(x - safe[:, None])
            kept = tl.exp2(top - safe)
            total = total * kept + tl.sum(p, 1)
            top = new
            if UPCAST:
                acc = acc * kept[:, None] + tl.dot(p.to(v.dtype).to(tl.float32), v.to(tl.float32))
            elif EXACT:
                acc = tl.dot(p, v, acc * kept[:, None], input_precision="ieee")
            else:
                acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None])
        safe_total = tl.where(total == 0.0, 1.0, total)
        out = acc * (v_scale / safe_total)[:, None]
        lse = tl.where(total == 0.0, -float("inf"), (top + tl.log2(safe_total)) * 0.6931471805599453)
        if slot < 0:
            row = token * (KV_HEADS * GROUP) + head
            tl.store(out_ptr + row[:, None] * DIM + d[None, :], out, mask=is_pair[:, None] & is_dim[None, :])
            tl.store(lse_ptr + row, lse, mask=is_pair)
        else:
            part = (slot.to(tl.int64) * KV_HEADS + kv_head) * M + tl.arange(0, M)
            tl.store(part_ptr + part[:, None] * DIM + d[None, :], out, mask=is_pair[:, None] & is_dim[None, :])
            tl.store(part_lse_ptr + part, lse, mask=is_pair)

    @triton.jit
    def merge_tiles(
        out_ptr,
        lse_ptr,
        part_ptr,
        part_lse_ptr,
        merges_ptr,
        tiles_ptr,
        KV_HEADS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        PAD: tl.constexpr,
        M: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        # one program for each pair of each tile that has several parts
        merge = tl.program_id(0)
        kv_head = tl.program_id(1)
        m = tl.program_id(2)
        tile = tl.load(merges_ptr + merge * 3)
        slot = tl.load(merges_ptr + merge * 3 + 1)
        count = tl.load(merges_ptr + merge * 3 + 2)
        pair = tl.load(tiles_ptr + tile * 4) + m
        if pair < tl.load(tiles_ptr + tile * 4 + 1):
            d = tl.arange(0, PAD)
            p = tl.arange(0, PARTS)
            top = tl.full((), -float("inf"), tl.float32)
            total = tl.zeros((), tl.float32)
            acc = tl.zeros((PAD,), tl.float32)
            for start in range(0, count, PARTS):
                is_part = start + p < count
                part = ((slot + start + p).to(tl.int64) * KV_HEADS + kv_head) * M + m
                x = tl.load(part_lse_ptr + part, mask=is_part, other=-float("inf"))
                value = tl.load(
                    part_ptr + part[:, None] * DIM + d[None, :], mask=is_part[:, None] & (d < DIM)[None, :], other=0.0
                )
                new = tl.maximum(top, tl.max(x, 0))
                safe = tl.where(new == -float("inf"), 0.0, new)
                weight = tl.exp(x - safe)
                kept = tl.exp(top - safe)
                total = total * kept + tl.sum(weight, 0)
                acc = acc * kept + tl.sum(weight[:, None] * value, 0)
                top = new
            token = (tl.load(tiles_ptr + tile * 4 + 2) + pair // GROUP).to(tl.int64)
            row = token * (KV_HEADS * GROUP) + kv_head * GROUP + pair % GROUP
            safe_total = tl.where(total == 0.0, 1.0, total)
            tl.store(out_ptr + row * DIM + d, acc / safe_total, mask=d < DIM)
            tl.store(lse_ptr + row, tl.where(total == 0.0, -float("inf"), top + tl.log(safe_total)))

    @triton.jit
    def merge_parts(out_ptr, lse_ptr, outs_ptr, lses_ptr, num_parts, num_rows, DIM: tl.constexpr, PAD: tl.constexpr):
        # one program for each (token, head); the value of a part without keys does not count
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, PAD)
        top = tl.full((), -float("inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        acc = tl.zeros((PAD,), tl.float32)
        for part in range(num_parts):
            at = tl.cast(part, tl.int64) * num_rows + row
            x = tl.load(lses_ptr + at)
            value = tl.load(outs_ptr + at * DIM + d, mask=d < DIM, other=0.0)
            value = tl.where(x == -float("inf"), 0.0, value)
            new = tl.maximum(top, x)
            safe = tl.where(new == -float("inf"), 0.0, new)
            weight = tl.exp(x - safe)
            kept = tl.exp(top - safe)
            total = total * kept + weight
            acc = acc * kept + weight * value
            top = new
        safe_total = tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + row * DIM + d, acc / safe_total, mask=d < DIM)
        tl.store(lse_ptr + row, tl.where(total == 0.0, -float("inf"), top + tl.log(safe_total)))

    @triton.jit
    def store_kv(
        k_ptr,
        v_ptr,
        pool_ptr,
        slots_ptr,
        k_stride,
        v_stride,
        block_stride,
        KV_HEADS: tl.constexpr,
        DIM: tl.constexpr,
        SIZE: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        # one program for each token
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            at = tl.arange(0, WIDTH)
            inside = at < KV_HEADS * DIM
            target = pool_ptr + (slot // SIZE) * block_stride + (at // DIM * SIZE + slot % SIZE) * DIM + at % DIM
            tl.store(target, tl.load(k_ptr + token * k_stride + at, mask=inside), mask=inside)
            tl.store(target + KV_HEADS * SIZE * DIM, tl.load(v_ptr + token * v_stride + at, mask=inside), mask=inside)

    return SimpleNamespace(
        attend_tiles=attend_tiles, merge_tiles=merge_tiles, merge_parts=merge_parts, store_kv=store_kv
    )


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU: for tests."""
    kernels()
    return bool(triton.knobs.runtime.interpret)


class Work(NamedTuple):
    """What the tiles of one class of rows do; int32, on the device.

    Attributes:
        tiles: [N, 4] first pair, pairs of the row, first token of the row, position of that token.
        items: [I, 4] tile, first entry, entry behind the last, slot of its partial output or -1.
        merges: [K, 3] tile, first slot, number of slots.
        num_slots: partial outputs in all.
    """

    shape: Shape
    tiles: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor
    num_slots: int


class AttentionPlan(NamedTuple):
    """A step's rows dealt over a GPU; the same for all layers whose pages and windows are the same."""

    work: tuple[Work, ...]
    pool: torch.Tensor | None
    block: torch.Tensor
    position: torch.Tensor


class Triton:
    """The backend of `kernels.ops` for pools on a GPU. In Triton's interpreter its tensors are the CPU's.

    Lists of pages may lie on the CPU: they are needed there to plan, and go over once for all layers.
    """

    name = "triton"

    def __init__(self) -> None:
        kernels()
        self.takes = checks.Takes(KINDS, int8=False, device="cpu" if is_interpreted() else "cuda")
        self._plans: OrderedDict[tuple[object, ...], tuple[object, AttentionPlan]] = OrderedDict()
        self._mapped: tuple[object, torch.Tensor, torch.Tensor] | None = None

    def plan(
        self, q_heads: int, pool: torch.Tensor, query_start: torch.Tensor, pages: "PageList", mask: "Mask"
    ) -> AttentionPlan:
        """Deal a step's rows. The last few are remembered, by their tensors, which layers share. Tensors of inference
        mode must not be changed in place between calls: nothing shows that.

        Raises:
            ValueError: an offset, a block id or a position that may not be.
        """
        inputs = (query_start, pages.start, pages.pool, pages.block, pages.position, mask.first_position)
        lists = ((id(x), 0 if x.is_inference() else x._version) for x in inputs if x is not None)
        key = (*lists, mask.window, mask.sinks, q_heads, pool.shape[3:])
        found = self._plans.pop(key, None)
        if found is None:
            found = inputs, self._plan(q_heads, pool, query_start, pages, mask)
        self._plans[key] = found  # holds the tensors too: their ids stay theirs
        if len(self._plans) > _PLANS:
            self._plans.popitem(last=False)
        return found[1]

    def _plan(
        self, q_heads: int, pool: torch.Tensor, query_start: torch.Tensor, pages: "PageList", mask: "Mask"
    ) -> AttentionPlan:
        kv_heads, size, dim = pool.shape[3:]
        group = q_heads // kv_heads
        starts, entries, positions, first = (
            x.cpu().numpy() for x in (query_start, pages.start, pages.position, mask.first_position)
        )
        lengths = np.diff(starts)
        is_small = lengths * group <= SMALL_TILE
        width = max(2, pool.element_size())
        shapes, slots, arrays = list[Shape](), list[int](), list[Ints]()
        for chosen, shape in ((is_small, small_shape(width, dim)), (~is_small, large_shape(width, dim))):
            rows = np.flatnonzero(chosen & (lengths > 0)).astype(np.int32)
            if not len(rows):
                continue
            tiles, items, merges, num_slots = deal(
                rows,
                shape,
                starts,
                entries,
                positions,
                first,
                group,
                kv_heads,
                size,
                mask.window,
                mask.sinks,
                _processors(pool.device),
            )
            shapes.append(shape)
            slots.append(num_slots)
            arrays += [tiles, items, merges]
        lists = [pages.block, pages.position, *(() if pages.pool is None else (pages.pool,))]
        arrays += [x.numpy() for x in lists if x.is_cpu]
        sent = iter(upload(arrays, pool.device))
        work = tuple(
            Work(shape, next(sent), next(sent), next(sent), num_slots)
            for shape, num_slots in zip(shapes, slots, strict=True)
        )
        block, position, *which = (next(sent) if x.is_cpu else x for x in lists)
        return AttentionPlan(work, which[0] if which else None, block, position)

    def attend(
        self,
        q_THD: torch.Tensor,
        query_start: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        pages: "PageList",
        mask: "Mask",
        scale: float,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.attend`.

        Args:
            k_scale, v_scale: what stored keys and values are multiplied with (8-bit pages).
        """
        pool = pools[0]
        if query_start.is_cpu and pages.block.is_cpu:
            checks.check_ids(q_THD.shape[0], query_start, pools, pages, mask)
        plan = self.plan(q_THD.shape[1], pool, query_start, pages, mask)
        return self.run(plan, q_THD, pools, layer, mask, scale * k_scale, v_scale)

    def run(
        self,
        plan: AttentionPlan,
        q_THD: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        mask: "Mask",
        scale: float,
        v_scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention as planned: no look at ids, no transfer to or from the device."""
        made = kernels()
        pool = pools[0]
        num_tokens, q_heads, dim = q_THD.shape
        _, _, _, kv_heads, size, _ = pool.shape
        out = torch.empty((num_tokens, q_heads, dim), dtype=torch.float32, device=q_THD.device)
        lse = torch.empty((num_tokens, q_heads), dtype=torch.float32, device=q_THD.device)
        several = plan.pool is not None
        bases = strides = plan.block
        if several:
            table, strides = self._addresses(pools)
            bases = table[layer]
        upcast = is_interpreted() and q_THD.dtype != torch.float32
        heads = {"KV_HEADS": kv_heads, "GROUP": q_heads // kv_heads, "DIM": dim, "PAD": _padded(dim)}
        for work in plan.work:
            tile = work.shape.tile
            parts = (work.num_slots, kv_heads, tile)
            part = torch.empty((*parts, dim), dtype=torch.float32, device=q_THD.device) if work.num_slots else out
            part_lse = torch.empty(parts, dtype=torch.float32, device=q_THD.device) if work.num_slots else lse
            made.attend_tiles[(len(work.items), kv_heads)](
                q_THD,
                out,
                lse,
                part,
                part_lse,
                work.items,
                work.tiles,
                pool[layer],
                bases,
                strides,
                plan.pool if several else plan.block,
                plan.block,
                plan.position,
                pool.stride(1),
                q_THD.stride(0),
                scale * LOG2_E,
                v_scale,
                mask.window,
                mask.sinks,
                **heads,
                SIZE=size,
                M=tile,
                N=work.shape.keys,
                SEVERAL_POOLS=several,
                ALIGNED=_is_aligned(q_THD, pools, layer),
                WINDOWED=mask.window > 0,
                NARROW=pool.element_size() == 1,
                EXACT=q_THD.dtype == torch.float32,
                UPCAST=upcast,
                num_warps=work.shape.num_warps,
                num_stages=work.shape.num_stages,
            )
            if len(work.merges):
                made.merge_tiles[(len(work.merges), kv_heads, tile)](
                    out, lse, part, part_lse, work.merges, work.tiles, **heads, M=tile, PARTS=16, num_warps=1
                )
        return out, lse

    def _addresses(self, pools: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the layers of several pools begin, [layers, pools], and the strides of their blocks, on the device.

        Kept until other pools are asked for.
        """
        key = tuple((each.data_ptr(), each.stride(0), each.stride(1), each.shape[0]) for each in pools)
        if self._mapped is None or self._mapped[0] != key:
            first, step, stride, layers = np.array(key, np.int64).T
            bases = first + np.arange(layers.min())[:, None] * step * pools[0].element_size()
            table, strides = upload([bases, stride], pools[0].device)
            self._mapped = key, table, strides
        return self._mapped[1:]

    def merge(self, outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.merge`."""
        num_parts, num_tokens, heads, dim = outs_PTHD.shape
        out = torch.empty((num_tokens, heads, dim), dtype=torch.float32, device=outs_PTHD.device)
        lse = torch.empty((num_tokens, heads), dtype=torch.float32, device=outs_PTHD.device)
        if lse.numel():
            kernels().merge_parts[(lse.numel(),)](
                out, lse, outs_PTHD, lses_PTH, num_parts, lse.numel(), DIM=dim, PAD=_padded(dim), num_warps=1
            )
        return out, lse

    def write_kv(
        self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, pool: torch.Tensor, layer: int, slots: torch.Tensor
    ) -> None:
        """See `kernels.ops.write_kv`. Slots on the device are not looked at: that would wait for it."""
        num_tokens, kv_heads, dim = k_TKD.shape
        size = pool.shape[4]
        if slots.is_cpu:
            checks.check_range(slots[slots >= 0] // size, "slots // block_size", 0, pool.shape[1])
        if num_tokens:
            kernels().store_kv[(num_tokens,)](
                k_TKD,
                v_TKD,
                pool[layer],
                slots.to(pool.device),
                k_TKD.stride(0),
                v_TKD.stride(0),
                pool.stride(1),
                KV_HEADS=kv_heads,
                DIM=dim,
                SIZE=size,
                WIDTH=_padded(kv_heads * dim),
            )

    def copy_pages(self, pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `kernels.ops.copy_pages`."""
        checks.check_range(source, "source", 0, pool.shape[1])
        checks.check_range(target, "target", 0, pool.shape[1])
        origin: dict[int, int] = {}  # of what each block holds in the end
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            origin[b] = origin.get(a, a)
        if origin:
            to, of = upload([np.array(list(each), np.int64) for each in (origin, origin.values())], pool.device)
            pool[:, to] = pool[:, of]


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter plans as for a small one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _is_aligned(q: torch.Tensor, pools: Sequence[torch.Tensor], layer: int) -> bool:
    """Whether all rows of all heads begin at multiples of 16 elements, of which addresses are multiples."""
    steps = [q.stride(0), q.shape[2], *(pool.stride(1) for pool in pools)]
    bases = [pool.data_ptr() // pool.element_size() + layer * pool.stride(0) for pool in pools]
    return all(each % 16 == 0 for each in (*steps, *bases))


def _padded(width: int) -> int:
    """The power of two that a block's dimension needs; tensor cores take 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def variants() -> "list[Variant]":
    """What is built ahead of time, to see that it fits the chips: see `kernels.triton_build`."""
    from kernels.triton_build import Variant

    made = kernels()
    found = []
    for kind, narrow, dim, group, large, windowed, several in (
        ("bf16", False, 128, 4, False, False, False),
        ("bf16", False, 128, 8, False, True, True),
        ("bf16", False, 64, 7, False, False, False),
        ("bf16", False, 128, 4, True, False, False),
        ("bf16", False, 128, 4, True, True, True),
        ("bf16", False, 256, 2, True, False, False),
        ("fp16", False, 128, 4, False, False, False),
        ("bf16", True, 128, 4, False, False, False),
        ("fp32", False, 128, 4, False, False, False),
        ("fp32", False, 64, 1, False, False, False),
        ("fp32", False, 64, 1, True, False, False),
        ("fp32", False, 128, 4, True, True, True),
        ("fp32", False, 256, 1, True, False, False),
        ("fp32", False, 256, 8, False, False, False),
    ):
        width = 4 if kind == "fp32" else 2
        shape = (large_shape if large else small_shape)(width, dim)
        pointers = {
            "q_ptr": f"*{kind}",
            **dict.fromkeys(("out_ptr", "lse_ptr", "part_ptr", "part_lse_ptr"), "*fp32"),
            **dict.fromkeys(("items_ptr", "tiles_ptr"), "*i32"),
            "pool_ptr": "*fp8e4nv" if narrow else f"*{kind}",
            **dict.fromkeys(("bases_ptr", "strides_ptr"), "*i64"),
            **dict.fromkeys(("page_pool_ptr", "page_block_ptr", "page_position_ptr"), "*i32"),
        }
        numbers = {
            **dict.fromkeys(("block_stride", "q_stride"), "i64"),
            **dict.fromkeys(("scale_log2", "v_scale"), "fp32"),
            **dict.fromkeys(("window", "sinks"), "i32"),
        }
        constants: dict[str, Any] = {
            "KV_HEADS": 8,
            "GROUP": group,
            "DIM": dim,
            "PAD": _padded(dim),
            "SIZE": 16,
            "M": shape.tile,
            "N": shape.keys,
            "SEVERAL_POOLS": several,
            "ALIGNED": True,
            "WINDOWED": windowed,
            "NARROW": narrow,
            "EXACT": kind == "fp32",
            "UPCAST": False,
        }
        words = ["prefill" if large else "decode", "fp8" if narrow else kind, f"d{dim}", f"g{group}"]
        words += ["windowed"] * windowed + ["pools"] * several
        found.append(
            Variant(
                " ".join(words),
                made.attend_tiles,
                pointers | numbers | dict.fromkeys(constants, "constexpr"),
                constants,
                shape.num_warps,
                shape.num_stages,
                kind != "fp32",
                89 if narrow else 80,
            )
        )
    merge = {"KV_HEADS": 8, "GROUP": 4, "DIM": 128, "PAD": 128, "M": SMALL_TILE, "PARTS": 16}
    names = ("out_ptr", "lse_ptr", "part_ptr", "part_lse_ptr")
    lists = dict.fromkeys(("merges_ptr", "tiles_ptr"), "*i32")
    signature = dict.fromkeys(names, "*fp32") | lists | dict.fromkeys(merge, "constexpr")
    found.append(Variant("merge tiles d128", made.merge_tiles, signature, merge, 1, 2, False))
    return found

"""Checks of the arguments of `kernels.ops`: types, shapes and strides here, ids by `check_ids` or inside the C++."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels import int8

if TYPE_CHECKING:
    from kernels.ops import Mask, PageList

MAX_BLOCK_SIZE = 256
MAX_HEAD_DIM = 256
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Takes:
    """What a backend takes.

    Attributes:
        kinds: dtypes of rows, and of pools that have the dtype of their rows.
        int8: whether pools of int8 are taken too.
        device: type of the device that tensors lie on; lists of ids may lie on the CPU whatever it is.
    """

    kinds: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    int8: bool = True
    device: str = "cpu"

    @property
    def rows(self) -> str:
        return _either(self.kinds)

    @property
    def pools(self) -> str:
        return _either((*self.kinds, torch.int8) if self.int8 else self.kinds)


def _either(kinds: tuple[torch.dtype, ...]) -> str:
    names = [str(kind).removeprefix("torch.") for kind in kinds if kind != torch.float64]  # for tests alone
    return " or ".join((", ".join(names[:-1]), names[-1]))


def check_attend(
    q: torch.Tensor,
    query_start: torch.Tensor,
    pools: Sequence[torch.Tensor],
    layer: int,
    pages: PageList,
    mask: Mask,
    scale: float,
    takes: Takes,
) -> None:
    """Raise ValueError where the arguments of `attend` break its contract."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, must be positive and finite")
    if not pools:
        raise ValueError("pools: got none, must hold at least one pool")
    pool = pools[0]
    for index, other in enumerate(pools):
        _pool(other, f"pools[{index}]", takes)
        if other.shape[2:] != pool.shape[2:] or other.dtype != pool.dtype:
            raise ValueError(
                f"pools[{index}]: got {other.dtype} {tuple(other.shape)}, must have the dtype and inner "
                f"shape of pools[0], {pool.dtype} {tuple(pool.shape)}"
            )
        _layer(layer, other)
    _rows(q, "q", pool, None, takes)
    kv_heads = pool.shape[3]
    if q.shape[1] == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"q: got {q.shape[1]} heads, must be a multiple of the {kv_heads} kv heads")
    _ints(query_start, "query_start", None, torch.int32, takes)
    if query_start.shape[0] < 1:
        raise ValueError("query_start: got shape (0,), must have one entry more than there are rows")
    num_rows = query_start.shape[0] - 1
    _ints(pages.start, "pages.start", num_rows + 1, torch.int32, takes)
    _ints(pages.block, "pages.block", None, torch.int32, takes)
    _ints(pages.position, "pages.position", pages.block.shape[0], torch.int32, takes)
    if pages.pool is not None:
        _ints(pages.pool, "pages.pool", pages.block.shape[0], torch.int32, takes)
    _ints(mask.first_position, "mask.first_position", num_rows, torch.int32, takes)
    for name, value in (("window", mask.window), ("sinks", mask.sinks)):
        if not 0 <= value <= INT32_MAX:
            raise ValueError(f"mask.{name}: got {value}, must be from 0 to {INT32_MAX}")


def check_ids(
    num_tokens: int, query_start: torch.Tensor, pools: Sequence[torch.Tensor], pages: PageList, mask: Mask
) -> None:
    """Raise ValueError where an id, a position or an offset of `attend` is out of range (C++ has its own)."""
    _offsets(query_start, "query_start", num_tokens)
    _offsets(pages.start, "pages.start", pages.block.shape[0])
    if mask.first_position.numel():
        last = mask.first_position.long() + query_start.diff()
        if int(mask.first_position.min()) < 0 or int(last.max()) > INT32_MAX:
            raise ValueError(f"mask.first_position: positions must be from 0 to {INT32_MAX}")
    if not pages.block.numel():
        return
    if int(pages.position.min()) < 0 or int(pages.position.max()) > INT32_MAX - pools[0].shape[4]:
        raise ValueError(f"pages.position: positions must be from 0 to {INT32_MAX} less a page")
    pool = torch.zeros_like(pages.block) if pages.pool is None else pages.pool
    if int(pool.min()) < 0 or int(pool.max()) >= len(pools):
        raise ValueError(f"pages.pool: got {int(pool.min())} to {int(pool.max())}, must be below {len(pools)} pools")
    sizes = torch.tensor([each.shape[1] for each in pools])[pool.long()]
    wrong = ((pages.block < 0) | (pages.block >= sizes)).nonzero()
    if wrong.numel():
        index = int(wrong[0])
        raise ValueError(
            f"pages.block[{index}]: got {int(pages.block[index])}, must be from 0 to {int(sizes[index]) - 1}"
        )


def check_merge(outs: torch.Tensor, lses: torch.Tensor, takes: Takes) -> None:
    """Raise ValueError where the arguments of `merge` break its contract."""
    # partial results are float32 whatever the rows are; the oracle's may be float64
    allowed = (torch.float32, torch.float64) if torch.float64 in takes.kinds else (torch.float32,)
    for name, tensor, dims in (("outs", outs, 4), ("lses", lses, 3)):
        if tensor.dtype not in allowed or tensor.dtype != outs.dtype or tensor.dim() != dims:
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be float32 of {dims} dimensions")
        _dense(tensor, name)
        _on(tensor, name, takes)
    if outs.shape[:3] != lses.shape or outs.shape[0] == 0:
        raise ValueError(f"lses: got shape {tuple(lses.shape)}, must be {tuple(outs.shape[:3])} with at least one part")


def check_write(
    k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, layer: int, slots: torch.Tensor, takes: Takes
) -> None:
    """Raise ValueError where the arguments of `write_kv` break its contract."""
    _pool(pool, "pool", takes)
    _layer(layer, pool)
    _rows(k, "k", pool, pool.shape[3], takes)
    _rows(v, "v", pool, pool.shape[3], takes)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: got {v.dtype} {tuple(v.shape)}, must be as k, {k.dtype} {tuple(k.shape)}")
    _ints(slots, "slots", k.shape[0], torch.int64, takes)


def check_copy(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor, takes: Takes) -> None:
    """Raise ValueError where the arguments of `copy_pages` break its contract."""
    _pool(pool, "pool", takes)
    _ints(source, "source", None, torch.int32, takes)
    _ints(target, "target", source.shape[0], torch.int32, takes)


def check_range(values: torch.Tensor, name: str, low: int, high: int) -> None:
    """Raise ValueError unless all of `values` lie in low .. high - 1."""
    if values.numel() and not (low <= int(values.min()) and int(values.max()) < high):
        raise ValueError(f"{name}: got {int(values.min())} to {int(values.max())}, must be from {low} to {high - 1}")


def _pool(pool: torch.Tensor, name: str, takes: Takes) -> None:
    if pool.dtype not in takes.kinds and not (takes.int8 and pool.dtype == torch.int8):
        raise ValueError(f"{name}: got {pool.dtype}, must be {takes.pools}")
    if pool.dim() != 6 or pool.shape[2] != 2 or 0 in pool.shape[3:]:
        raise ValueError(
            f"{name}: got shape {tuple(pool.shape)}, must be [layers, blocks, 2, kv_heads, block_size, head_dim]"
        )
    if pool.shape[4] > MAX_BLOCK_SIZE or int8.head_dim(pool) > MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: got block_size {pool.shape[4]} and head_dim {int8.head_dim(pool)}, must be at most "
            f"{MAX_BLOCK_SIZE} and {MAX_HEAD_DIM}"
        )
    if pool.dtype == torch.int8 and (int8.head_dim(pool) < 1 or pool.shape[4] * int8.head_dim(pool) % int8.SCALE_BYTES):
        raise ValueError(
            f"{name}: got block_size {pool.shape[4]} and head_dim {int8.head_dim(pool)}, must have a product that is a "
            f"multiple of {int8.SCALE_BYTES}, so that the scales behind int8 elements are aligned"
        )
    heads, size, dim = pool.shape[3:]
    # A dimension of length one may report any stride, so only those that matter are compared.
    wanted = (heads * size * dim, size * dim, dim, 1)
    strides = pool.stride()
    for axis in range(4):
        if pool.shape[axis + 2] > 1 and strides[axis + 2] != wanted[axis]:
            raise ValueError(f"{name}: got strides {strides}, must have contiguous inner four dimensions")
    _on(pool, name, takes)


def _layer(layer: int, pool: torch.Tensor) -> None:
    if not 0 <= layer < pool.shape[0]:
        raise ValueError(f"layer: got {layer}, must be from 0 to {pool.shape[0] - 1}")


def _rows(tensor: torch.Tensor, name: str, pool: torch.Tensor, heads: int | None, takes: Takes) -> None:
    """[T, heads, head_dim] with contiguous tokens; the stride from token to token is free (slices of one matrix)."""
    dim = int8.head_dim(pool)
    if pool.dtype == torch.int8:
        if tensor.dtype not in takes.kinds:
            raise ValueError(f"{name}: got {tensor.dtype}, must be {takes.rows}")
    elif tensor.dtype != pool.dtype:
        raise ValueError(f"{name}: got {tensor.dtype}, must be the pool's {pool.dtype}")
    if tensor.dim() != 3 or tensor.shape[2] != dim or (heads is not None and tensor.shape[1] != heads):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, must be [tokens, {heads or 'q_heads'}, {dim}]")
    if (dim > 1 and tensor.stride(2) != 1) or (tensor.shape[1] > 1 and tensor.stride(1) != dim):
        raise ValueError(f"{name}: got strides {tensor.stride()}, must have contiguous heads and dims")
    _on(tensor, name, takes)


def _ints(tensor: torch.Tensor, name: str, length: int | None, dtype: torch.dtype, takes: Takes) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        size = "N" if length is None else length
        raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, must be {dtype} [{size}]")
    _dense(tensor, name)
    if not tensor.is_cpu:
        _on(tensor, name, takes)


def _dense(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, must be contiguous")


def _on(tensor: torch.Tensor, name: str, takes: Takes) -> None:
    if tensor.device.type != takes.device:
        where = "the CPU" if takes.device == "cpu" else f"a {takes.device} device"
        raise ValueError(f"{name}: got a tensor on {tensor.device}, must be on {where}")


def _offsets(offsets: torch.Tensor, name: str, end: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != end or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: must rise from 0 to {end}")

"""Pages of int8: each token's key (or value) of one head as int8 elements and one float32 scale, symmetric.

An int8 pool has the shape [layers, blocks, 2, kv_heads, block_size, head_dim + 4]. Flattened, its last two dimensions
hold [block_size, head_dim] elements and behind them [block_size] scales. Scale and elements depend on that key alone,
so whatever moves, shares or recomputes a page changes no bit of it. An element is off by at most half a scale, 1/254 of
the largest magnitude in its row.
"""

from __future__ import annotations

import torch

SCALE_BYTES = 4
_TINY = 1e-30  # rows below it are zero


def head_dim(pool: torch.Tensor) -> int:
    """Of a pool of any dtype."""
    return pool.shape[-1] - SCALE_BYTES if pool.dtype == torch.int8 else pool.shape[-1]


def parts(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of elements int8 [..., block_size, head_dim] and scales float32 [..., block_size] of contiguous heads."""
    size, dim = pages.shape[-2], head_dim(pages)
    flat = pages.flatten(-2)
    return flat[..., : size * dim].unflatten(-1, (size, dim)), flat[..., size * dim :].view(torch.float32)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements int8 [..., D] and scales float32 [...] of rows [..., D].

    The scale of a row with a value that is not finite is NaN."""
    wide = x.to(torch.float32)
    top = wide.abs().amax(-1)
    poison = (wide - wide).sum(-1)
    used = (top > _TINY) & (poison == 0)
    inverse = torch.where(used, 127 / torch.where(used, top, 1.0), 0.0)
    elements = torch.where(used[..., None], wide, 0.0) * inverse[..., None]
    return elements.round().to(torch.int8), torch.where(used, top / 127, 0.0) + poison


def dequantize(pages: torch.Tensor) -> torch.Tensor:
    """float32 [..., block_size, head_dim]."""
    elements, scales = parts(pages)
    return elements.to(torch.float32) * scales[..., None]

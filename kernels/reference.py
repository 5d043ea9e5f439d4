"""The oracle: what the kernels mean, in torch, slow and plain. float64 in gives float64 arithmetic and results.

Shapes in names: t tokens of one row, n keys of one row, k kv heads, g query heads per kv head, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kernels import checks, int8

if TYPE_CHECKING:
    from kernels.ops import Mask, PageList


class Reference:
    """The torch backend of `kernels.ops`."""

    name = "reference"
    takes = checks.Takes((torch.float32, torch.bfloat16, torch.float64))

    def attend(
        self,
        q_THD: torch.Tensor,
        query_start: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        pages: PageList,
        mask: Mask,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.attend`."""
        checks.check_ids(q_THD.shape[0], query_start, pools, pages, mask)
        kind = _compute_dtype(q_THD)
        out = torch.zeros(q_THD.shape, dtype=kind)
        lse = torch.full(q_THD.shape[:2], -torch.inf, dtype=kind)
        starts, entries = query_start.tolist(), pages.start.tolist()
        for row, first in enumerate(mask.first_position.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            k_nkd, v_nkd, position_n = _gather(pools, layer, pages, entries[row], entries[row + 1])
            query_t = torch.arange(first, first + tokens.stop - tokens.start)
            seen_tn = _seen(query_t, position_n, mask)
            used_n = seen_tn.any(0)
            if not used_n.any():
                continue
            out[tokens], lse[tokens] = _softmax(
                q_THD[tokens].to(kind), k_nkd[used_n].to(kind), v_nkd[used_n].to(kind), seen_tn[:, used_n], scale
            )
        return out, lse

    def merge(self, outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.merge`."""
        weights_PTH, lse_TH = _weights(lses_PTH, 0)
        used_PTHD = torch.where((lses_PTH == -torch.inf)[..., None], 0.0, outs_PTHD)
        return (weights_PTH[..., None] * used_PTHD).sum(0), lse_TH

    def write_kv(
        self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, pool: torch.Tensor, layer: int, slots: torch.Tensor
    ) -> None:
        """See `kernels.ops.write_kv`."""
        size = pool.shape[4]
        kept = slots >= 0
        block, offset = slots[kept] // size, slots[kept] % size
        checks.check_range(block, "slots // block_size", 0, pool.shape[1])
        for which, rows in enumerate((k_TKD[kept], v_TKD[kept])):
            if pool.dtype == torch.int8:
                elements, scales = int8.parts(pool[layer, :, which])
                elements[block, :, offset], scales[block, :, offset] = int8.quantize(rows)
            else:
                pool[layer, block, which, :, offset] = rows

    def copy_pages(self, pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `kernels.ops.copy_pages`."""
        checks.check_range(source, "source", 0, pool.shape[1])
        checks.check_range(target, "target", 0, pool.shape[1])
        for a, b in zip(source.tolist(), target.tolist(), strict=True):
            pool[:, b] = pool[:, a]


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _gather(
    pools: Sequence[torch.Tensor], layer: int, pages: PageList, begin: int, end: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V [n, kv_heads, head_dim] and positions [n] of one row's entries, sorted by pool."""
    size = pools[0].shape[4]
    block, position = pages.block[begin:end].long(), pages.position[begin:end].long()
    which = torch.zeros_like(block) if pages.pool is None else pages.pool[begin:end]
    keys, values, positions = [], [], []
    for index, pool in enumerate(pools):
        mine = which == index
        chosen = pool[layer, block[mine]]
        wide = int8.dequantize(chosen) if pool.dtype == torch.int8 else chosen
        kv = wide.permute(1, 0, 3, 2, 4).flatten(1, 2)
        keys.append(kv[0])
        values.append(kv[1])
        positions.append((position[mine, None] + torch.arange(size)).flatten())
    return torch.cat(keys), torch.cat(values), torch.cat(positions)


def _seen(query_t: torch.Tensor, position_n: torch.Tensor, mask: Mask) -> torch.Tensor:
    distance = query_t[:, None] - position_n
    seen = distance >= 0
    if mask.window:
        seen &= (distance < mask.window) | (position_n < mask.sinks)
    return seen


def _softmax(
    q_thd: torch.Tensor, k_nkd: torch.Tensor, v_nkd: torch.Tensor, seen_tn: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one row; every key is seen by at least one query, so all of K and V has been written."""
    q_tkgd = q_thd.unflatten(1, (k_nkd.shape[1], -1))
    scores_ktgn = torch.einsum("tkgd,nkd->ktgn", q_tkgd, k_nkd) * scale
    scores_ktgn.masked_fill_(~seen_tn[None, :, None], -torch.inf)
    weights_ktgn, lse_ktg = _weights(scores_ktgn, -1)
    out_tkgd = torch.einsum("ktgn,nkd->tkgd", weights_ktgn, v_nkd)
    return out_tkgd.flatten(1, 2), lse_ktg.transpose(0, 1).flatten(1)


def _weights(scores: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax along `dim` and the log of its sum; (0, -inf) where all scores are -inf."""
    top = scores.amax(dim, keepdim=True)
    powers = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
    total = powers.sum(dim, keepdim=True)
    return powers / torch.where(total == 0, 1.0, total), (top + total.log()).squeeze(dim)

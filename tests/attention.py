"""Cases of `attend` in shuffled pages, and their comparison with the oracle in float64.

Pools are full of NaN wherever no token was written, so that a value read by mistake shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

import torch

from kernels import ops
from kernels.ops import Mask, PageList
from kernels.reference import Reference

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Shape:
    """rows: per row (query tokens, tokens before them)."""

    rows: tuple[tuple[int, int], ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    num_pools: int = 1
    page_major: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    q: torch.Tensor
    query_start: torch.Tensor
    pools: list[torch.Tensor]
    layer: int
    pages: PageList
    mask: Mask

    def run(self, backend: ops.Backend) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.attend(self.q, self.query_start, self.pools, self.layer, self.pages, self.mask, backend=backend)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        exact = replace(self, q=self.q.double(), pools=[pool.double() for pool in self.pools])
        return exact.run(Reference())


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(rng: random.Random, shape: Shape, window: int = 0, sinks: int = 0) -> Case:
    """Pools of NaN with the tokens of all rows in shuffled pages, entries of a row in any order."""
    size, layers, layer = shape.block_size, 2, rng.randrange(2)
    counts = [-(-(new + old) // size) for new, old in shape.rows]
    num_blocks = sum(counts) + 3
    inner = (2, shape.kv_heads, size, shape.head_dim)
    pools = []
    for _ in range(shape.num_pools):
        if shape.page_major:
            pools.append(torch.full((num_blocks, layers, *inner), torch.nan, dtype=shape.dtype).transpose(0, 1))
        else:
            pools.append(torch.full((layers, num_blocks, *inner), torch.nan, dtype=shape.dtype))
    free = [(pool, block) for pool in range(shape.num_pools) for block in range(num_blocks)]
    rng.shuffle(free)
    query_start, start, entries = [0], [0], []
    for (new, old), count in zip(shape.rows, counts, strict=True):
        mine = [(*free.pop(), page * size) for page in range(count)]
        for pool, block, first in mine:
            written = min(size, new + old - first)
            pools[pool][layer, block, :, :, :written] = torch.randn(2, shape.kv_heads, written, shape.head_dim).to(
                shape.dtype
            )
        rng.shuffle(mine)
        entries += mine
        query_start.append(query_start[-1] + new)
        start.append(len(entries))
    pages = PageList(
        start=ints(start),
        pool=None if shape.num_pools == 1 else ints([pool for pool, _, _ in entries]),
        block=ints([block for _, block, _ in entries]),
        position=ints([first for _, _, first in entries]),
    )
    q = torch.randn(query_start[-1], shape.q_heads, shape.head_dim).to(shape.dtype)
    mask = Mask(ints([old for _, old in shape.rows]), window, sinks)
    return Case(q, ints(query_start), pools, layer, pages, mask)


def check_that_nan_stays(level: str) -> None:
    """Of one part, whatever comes before and behind it: a part without keys as little as one with them."""
    orders = list(permutations((torch.nan, -torch.inf, 2.0, 3.0)))
    lses = torch.tensor(orders).T.reshape(4, len(orders), 1).contiguous()
    outs = torch.where(lses.isnan(), torch.nan, 1.0)[..., None].expand(-1, -1, -1, 3).contiguous()
    out, lse = ops.merge(outs, lses, backend=ops.pick(level))
    assert out.isnan().all() and lse.isnan().all()


def check(case: Case, level: str) -> None:
    out, lse = case.run(ops.pick(level))
    want, want_lse = case.truth()
    assert out.dtype == lse.dtype == torch.float32
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[~empty]).all()
    if want.numel() and not empty.all():
        error = float((out - want).norm() / want.norm())
        assert error < LIMIT[case.q.dtype], f"norm of the error {error:.2e} of the result"
        # Worst token and head: a wrong one would drown among thousands.
        worst = float(((out - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-3)).max())
        assert worst < 10 * LIMIT[case.q.dtype], f"worst row {worst:.2e}"
        assert float((lse - want_lse)[~empty].abs().max()) < 1e-5

"""Pages of int8: attention over them against float64, what quantizing costs, and that a token's bytes are its own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kernels import int8, ops
from kernels.reference import Reference
from tests.attention import Case, Shape, check, make
from tests.cpu.test_attend import DTYPES, LENGTHS, LEVELS, poisoned_memory

__all__ = ["poisoned_memory"]


class Int8Case(Case):
    """`check` compares with float64 attention over what the int8 pages stand for."""

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        pools = [int8.dequantize(pool).double() for pool in self.pools]
        return Case(self.q.double(), self.query_start, pools, self.layer, self.pages, self.mask).run(Reference())


def to_int8(pool: torch.Tensor) -> torch.Tensor:
    """The pool with its strides in order of layers and blocks; unwritten slots keep NaN as their scales."""
    size, dim = pool.shape[4:]
    page_major = pool.stride(0) < pool.stride(1)
    shape = (*(pool.shape[1::-1] if page_major else pool.shape[:2]), *pool.shape[2:4], size, dim + int8.SCALE_BYTES)
    found = torch.full(shape, 77, dtype=torch.int8)
    found = found.transpose(0, 1) if page_major else found
    elements, scales = int8.parts(found)
    elements[:], scales[:] = int8.quantize(pool)
    return found


def quantized(case: Case) -> Int8Case:
    pools = [to_int8(pool) for pool in case.pools]
    return Int8Case(case.q, case.query_start, pools, case.layer, case.pages, case.mask)


SHAPES = {
    "decodes and prefills": Shape(tuple((1, n - 1) for n in LENGTHS) + ((17, 0), (33, 300), (1, 0), (5, 65))),
    "head_dim 128": Shape(((1, 300), (40, 3), (3, 62)), q_heads=8, kv_heads=2, head_dim=128),
    "head_dim 80": Shape(((1, 300), (40, 3)), head_dim=80),
    "head_dim 20": Shape(((1, 99), (40, 3)), head_dim=20),
    "head_dim 256": Shape(((1, 99), (70, 3)), q_heads=2, kv_heads=1, head_dim=256),
    "one token a block": Shape(((1, 40), (20, 3)), block_size=1),
    "256 tokens a block": Shape(((1, 4097), (20, 3)), block_size=256),
    "one query head": Shape(((1, 4097), (1, 3), (30, 1)), q_heads=3, kv_heads=3),
    "many query heads": Shape(((1, 4097), (1, 3), (30, 1)), q_heads=24, kv_heads=2),
    "two pools": Shape(((1, 300), (40, 63)), num_pools=2),
    "page-major": Shape(((1, 300), (40, 63)), num_pools=2, page_major=True),
    "long prompt": Shape(((600, 130), (1, 9000)), head_dim=64),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAttend:
    @pytest.mark.parametrize("name", SHAPES)
    def test_is_attention_over_what_the_pages_stand_for(
        self, rng: random.Random, level: str, dtype: torch.dtype, name: str
    ) -> None:
        check(quantized(make(rng, replace(SHAPES[name], dtype=dtype))), level)

    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (17, 0), (40, 5), (64, 16)])
    def test_windows_and_sinks(
        self, rng: random.Random, level: str, dtype: torch.dtype, window: int, sinks: int
    ) -> None:
        shape = Shape(((1, 300), (1, 16), (70, 100), (9, 0)), dtype=dtype)
        check(quantized(make(rng, shape, window, sinks)), level)


def pool_of(blocks: int = 5, heads: int = 2, size: int = 8, dim: int = 36) -> torch.Tensor:
    return torch.full((2, blocks, 2, heads, size, dim + int8.SCALE_BYTES), 77, dtype=torch.int8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestWrite:
    def test_an_element_is_off_by_at_most_half_a_scale(
        self, rng: random.Random, level: str, dtype: torch.dtype
    ) -> None:
        pool = pool_of(dim=72)
        k, v = ((torch.randn(30, 2, 72) * 10 ** torch.empty(30, 2, 1).uniform_(-6, 6)).to(dtype) for _ in range(2))
        slots = torch.randperm(40)[:30]
        ops.write_kv(k, v, pool, 1, slots, backend=ops.pick(level))
        for which, rows in enumerate((k, v)):
            elements, scales = (
                each[:, :].transpose(1, 2).flatten(0, 1)[slots] for each in int8.parts(pool[1, :, which])
            )
            top = rows.float().abs().amax(-1)
            assert torch.allclose(scales, top / 127, rtol=1e-6, atol=0)
            assert (elements.abs().amax(-1) == 127).all()
            error = (elements.double() * scales[..., None].double() - rows.double()).abs()
            assert (error <= scales[..., None] * (0.5 + 1e-4)).all()
            want, _ = int8.quantize(rows)
            assert int((want.int() - elements.int()).abs().max()) <= 1  # a tie rounded the other way

    def test_a_rows_bytes_are_its_own(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        """Whatever else is written, wherever it goes, whatever was there."""
        backend = ops.pick(level)
        k, v = (torch.randn(9, 2, 36).to(dtype) for _ in range(2))
        together, alone = pool_of(), pool_of()
        ops.write_kv(k, v, together, 0, torch.arange(9), backend=backend)
        for row in range(9):
            ops.write_kv(k[row : row + 1], v[row : row + 1], alone, 0, torch.tensor([39 - row]), backend=backend)
        for part in range(2):
            one, other = (
                int8.parts(pool[0])[part].transpose(0, 1).transpose(2, 3).flatten(1, 2) for pool in (together, alone)
            )
            assert torch.equal(one[:, :9], other[:, 31:].flip(1))
        assert (together[1] == 77).all() and (alone[1] == 77).all()

    def test_zeros_tiny_and_not_finite(self, level: str, dtype: torch.dtype) -> None:
        pool = pool_of(heads=1)
        k = torch.ones(5, 1, 36, dtype=dtype)
        k[0], k[1], k[2, 0, 7], k[3, 0, 35] = 0, 1e-35, torch.nan, -torch.inf
        ops.write_kv(k, k, pool, 0, torch.tensor([0, 1, 2, -1, 3]), backend=ops.pick(level))
        ops.write_kv(k[3:4], k[3:4], pool, 0, torch.tensor([4]), backend=ops.pick(level))
        elements, scales = int8.parts(pool[0, 0])
        for which in range(2):
            assert scales[which, 0, :2].tolist() == [0, 0] and (elements[which, 0, :2] == 0).all()
            assert scales[which, 0, [2, 4]].isnan().all()
            assert (elements[which, 0, 3] == 127).all()
            assert scales[which, 0, 3] == pytest.approx(1 / 127)
            assert (elements[which, 0, 5:] == 77).all()

    def test_copied_pages_keep_elements_and_scales(self, level: str, dtype: torch.dtype) -> None:
        pool = pool_of()
        rows = torch.randn(8, 2, 36).to(dtype)
        ops.write_kv(rows, -rows, pool, 1, torch.arange(16, 24), backend=ops.pick(level))
        before = pool.clone()
        ops.copy_pages(pool, torch.tensor([2], dtype=torch.int32), torch.tensor([4], dtype=torch.int32))
        assert torch.equal(pool[:, 4], before[:, 2]) and torch.equal(pool[:, :4], before[:, :4])


def test_a_pool_whose_scales_would_not_be_aligned_is_refused() -> None:
    pool = torch.zeros((1, 2, 2, 1, 3, 10), dtype=torch.int8)
    with pytest.raises(ValueError, match="block_size 3 and head_dim 6, must have a product that is a multiple of 4"):
        ops.write_kv(torch.zeros(1, 1, 6), torch.zeros(1, 1, 6), pool, 0, torch.tensor([0]))

"""`attend` of every backend and instruction level of this machine against the oracle in float64.

Inputs are fresh in each run; a failure shows the seed, and QUIRE_TEST_SEED repeats it. Pools are full of NaN wherever
no token was written, and new tensors are poisoned too, so that a value read or left by mistake shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.ops import Mask, PageList
from kernels.reference import Reference
from tests.attention import LIMIT, Case, Shape, check, check_that_nan_stays, ints, make

LEVELS = ops.available()
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN; three threads, so that work is split."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 300)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAttend:
    @pytest.mark.parametrize("group", [1, 3, 7, 8])
    def test_decodes_and_prefills_are_rows_of_one_call(
        self, rng: random.Random, level: str, dtype: torch.dtype, group: int
    ) -> None:
        rows = [(1, length - 1) for length in LENGTHS] + [(length, 0) for length in LENGTHS[:-1]]
        rows += [(rng.randrange(1, 40), rng.randrange(200)) for _ in range(4)]
        rng.shuffle(rows)
        check(make(rng, Shape(tuple(rows), 2 * group, 2, 64, dtype=dtype)), level)

    @pytest.mark.parametrize("head_dim", [8, 32, 33, 64, 80, 96, 100, 128, 256])
    def test_head_dims(self, rng: random.Random, level: str, dtype: torch.dtype, head_dim: int) -> None:
        check(make(rng, Shape(((1, 70), (40, 33), (3, 20)), 6, 2, head_dim, dtype=dtype)), level)

    @pytest.mark.parametrize("block_size", [1, 5, 8, 16, 64, 256])
    def test_block_sizes(self, rng: random.Random, level: str, dtype: torch.dtype, block_size: int) -> None:
        shape = Shape(((1, 300), (90, 260), (2, 63), (1, 0)), 4, 2, 64, block_size, dtype=dtype)
        check(make(rng, shape), level)

    @pytest.mark.parametrize("page_major", [False, True], ids=["layer-major", "page-major"])
    def test_pages_over_two_pools_in_both_layouts(
        self, rng: random.Random, level: str, dtype: torch.dtype, page_major: bool
    ) -> None:
        shape = Shape(((1, 520), (50, 100)), 8, 2, 64, num_pools=2, page_major=page_major, dtype=dtype)
        check(make(rng, shape), level)

    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (17, 0), (64, 4), (100, 20), (1000, 0), (33, 1000)])
    def test_windows_and_sinks(
        self, rng: random.Random, level: str, dtype: torch.dtype, window: int, sinks: int
    ) -> None:
        rows = ((1, 299), (70, 200), (5, 190), (30, 0), (1, 0))
        check(make(rng, Shape(rows, 6, 2, 64, dtype=dtype), window, sinks), level)

    @pytest.mark.parametrize("length", [1025, 4097])
    def test_long_rows_are_cut_into_parts(
        self, rng: random.Random, level: str, dtype: torch.dtype, length: int
    ) -> None:
        check(make(rng, Shape(((1, length - 1), (9, length)), 6, 2, 64, dtype=dtype)), level)

    def test_a_long_prompt_in_chunks_of_any_size_is_the_same_attention(
        self, rng: random.Random, level: str, dtype: torch.dtype
    ) -> None:
        case = make(rng, Shape(((600, 0),), 4, 2, 64, dtype=dtype))
        backend = ops.pick(level)
        whole = case.run(backend)
        begin = 0
        while begin < 600:
            end = min(600, begin + rng.choice([1, 2, 30, 111, 256]))
            part = replace(
                case,
                q=case.q[begin:end],
                query_start=ints([0, end - begin]),
                mask=Mask(ints([begin])),
            )
            out, lse = part.run(backend)
            torch.testing.assert_close(out, whole[0][begin:end], rtol=0, atol=3 * LIMIT[dtype])
            torch.testing.assert_close(lse, whole[1][begin:end], rtol=0, atol=1e-5)
            begin = end

    def test_rows_without_keys_or_tokens(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        case = make(rng, Shape(((1, 20), (40, 0), (1, 33)), 4, 2, 64, dtype=dtype))
        start = case.pages.start.tolist()
        none = replace(case.pages, start=ints([0, 0, start[2] - start[1], start[2] - start[1]]))
        none = replace(
            none,
            block=case.pages.block[start[1] : start[2]].contiguous(),
            position=case.pages.position[start[1] : start[2]].contiguous(),
        )
        check(replace(case, pages=none), level)
        nothing = PageList(ints([0, 0, 0, 0]), ints([]), ints([]))
        out, lse = replace(case, pages=nothing).run(ops.pick(level))
        assert (out == 0).all() and (lse == -torch.inf).all()
        empty = Case(case.q[:0], ints([0]), case.pools, 0, PageList(ints([0]), ints([]), ints([])), Mask(ints([])))
        assert [tuple(each.shape) for each in empty.run(ops.pick(level))] == [(0, 4, 64), (0, 4)]

    def test_listed_pages_may_have_gaps_and_lie_ahead(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        """Some pages left out, in one row all; the pages of tokens to come are listed too."""
        case = make(rng, Shape(((1, 500), (30, 300), (20, 100)), 4, 2, 64, dtype=dtype))
        bounds = case.pages.start.tolist()
        kept = [[e for e in range(bounds[row], bounds[row + 1]) if rng.random() < 0.5] for row in range(2)] + [[]]
        flat = [e for row in kept for e in row]
        start = [0]
        for row in kept:
            start.append(start[-1] + len(row))
        pages = PageList(ints(start), case.pages.block[flat].contiguous(), case.pages.position[flat].contiguous())
        check(replace(case, pages=pages, mask=Mask(ints([400, 250, 90]))), level)

    def test_merged_parts_are_the_whole(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        """Each entry goes to one of k page lists; some of them are empty for some rows."""
        case = make(rng, Shape(((1, 700), (33, 300), (1, 5)), 6, 2, 64, num_pools=2, dtype=dtype), 400, 20)
        backend, num_parts = ops.pick(level), 4
        assert case.pages.pool is not None
        bounds = case.pages.start.tolist()
        owner = [rng.randrange(num_parts) for _ in range(bounds[-1])]
        outs, lses = [], []
        for part in range(num_parts):
            rows = [[e for e in range(bounds[r], bounds[r + 1]) if owner[e] == part] for r in range(3)]
            flat = [e for row in rows for e in row]
            start = [0]
            for row in rows:
                start.append(start[-1] + len(row))
            pages = PageList(
                ints(start),
                case.pages.block[flat].contiguous(),
                case.pages.position[flat].contiguous(),
                case.pages.pool[flat].contiguous(),
            )
            out, lse = replace(case, pages=pages).run(backend)
            outs.append(out)
            lses.append(lse)
        out, lse = ops.merge(torch.stack(outs), torch.stack(lses), backend=backend)
        want, want_lse = case.truth()
        assert float((out - want).norm() / want.norm()) < LIMIT[dtype]
        assert float((lse - want_lse).abs().max()) < 1e-5

    def test_queries_may_be_a_slice_of_a_wider_matrix(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        case = make(rng, Shape(((1, 40), (30, 10)), 4, 2, 64, dtype=dtype))
        wide = torch.full((31, 12, 64), torch.nan, dtype=dtype)
        wide[:, 3:7] = case.q
        assert torch.equal(replace(case, q=wide[:, 3:7]).run(ops.pick(level))[0], case.run(ops.pick(level))[0])

    def test_scale_and_large_scores(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        """Scores of several hundred, where a softmax without its maximum overflows."""
        case = make(rng, Shape(((1, 60), (40, 30)), 4, 2, 64, dtype=dtype))
        args = (case.query_start, case.pools, case.layer, case.pages, case.mask)
        out, lse = ops.attend(case.q, *args, scale=20.0, backend=ops.pick(level))
        exact = [pool.double() for pool in case.pools]
        want, want_lse = ops.attend(
            case.q.double(), case.query_start, exact, case.layer, case.pages, case.mask, scale=20.0, backend=Reference()
        )
        assert float(want_lse.abs().max()) > 200
        assert float((out - want).norm() / want.norm()) < max(LIMIT[dtype], 2e-4)
        assert float(((lse - want_lse) / want_lse).abs().max()) < 1e-5

    def test_a_nan_in_a_query_stays_in_its_row(self, rng: random.Random, level: str, dtype: torch.dtype) -> None:
        case = make(rng, Shape(((1, 60), (40, 30), (1, 20)), 4, 2, 64, dtype=dtype))
        clean = case.run(ops.pick(level))
        q = case.q.clone()
        q[0, 1] = torch.nan
        q[20, 2] = torch.nan
        out, lse = replace(case, q=q).run(ops.pick(level))
        sick = torch.zeros(lse.shape, dtype=torch.bool)
        sick[0, 1] = sick[20, 2] = True
        assert out[sick].isnan().all() and lse[sick].isnan().all()
        assert torch.equal(out[~sick], clean[0][~sick]) and torch.equal(lse[~sick], clean[1][~sick])


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_in_one_part_is_not_lost_among_others(level: str) -> None:
    check_that_nan_stays(level)


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_call_gives_the_same_bits_on_any_number_of_threads(rng: random.Random, level: str) -> None:
    case = make(rng, Shape(((1, 2000), (70, 1000), (1, 9)), 8, 4, 64, dtype=torch.bfloat16))
    torch.set_num_threads(1)
    one = case.run(ops.pick(level))
    torch.set_num_threads(5)
    five = case.run(ops.pick(level))
    if level == "reference":
        torch.testing.assert_close(five, one)
    else:
        assert torch.equal(one[0], five[0]) and torch.equal(one[1], five[1])

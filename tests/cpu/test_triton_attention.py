"""The Triton backend against the oracle in float64: in Triton's interpreter, or on the GPU where there is one.

Shapes are tiny: the interpreter takes milliseconds for a turn of a program's loop.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels import ops, tiles, triton_attention
from kernels.ops import Mask, PageList
from kernels.reference import Reference
from kernels.tiles import Shape as KernelShape
from kernels.tiles import deal, split
from kernels.triton_attention import Triton
from launch.llm import LLM
from pagetable.errors import ConfigError
from tests.attention import LIMIT, Case, Shape, check, check_that_nan_stays, ints, make
from tests.models import make_model

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set before Triton is imported"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two pages, so that most rows are split."""
    monkeypatch.setattr(tiles, "MIN_TOKENS", 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAttend:
    @pytest.mark.parametrize("group", [1, 3, 8, 20])
    def test_decodes_and_prefills_are_rows_of_one_call(
        self, rng: random.Random, dtype: torch.dtype, group: int, short_parts: None
    ) -> None:
        rows = [
            (1, 0),
            (1, 16),
            (1, rng.randrange(60, 90)),
            (15, 0),
            (17, 5),
            (rng.randrange(2, 40), rng.randrange(50)),
        ]
        rng.shuffle(rows)
        check(make(rng, Shape(tuple(rows), 2 * group, 2, 16, dtype=dtype)), "triton")

    @pytest.mark.parametrize("head_dim", [8, 33, 64, 96, 128, 256])
    def test_head_dims(self, rng: random.Random, dtype: torch.dtype, head_dim: int) -> None:
        check(make(rng, Shape(((1, 30), (9, 4)), 4, 2, head_dim, dtype=dtype)), "triton")

    @pytest.mark.parametrize("block_size", [1, 3, 16, 48, 128])
    def test_block_sizes(self, rng: random.Random, dtype: torch.dtype, block_size: int, short_parts: None) -> None:
        check(make(rng, Shape(((1, 70), (20, 30)), 2, 1, 16, block_size, dtype=dtype)), "triton")

    @pytest.mark.parametrize(("window", "sinks"), [(1, 0), (9, 0), (9, 3), (40, 20), (1000, 0)])
    def test_windows_and_sinks(
        self, rng: random.Random, dtype: torch.dtype, window: int, sinks: int, short_parts: None
    ) -> None:
        shape = Shape(((1, 70), (20, 30)), 4, 2, 16, dtype=dtype)
        check(make(rng, shape, window, sinks), "triton")

    @pytest.mark.parametrize("page_major", [False, True])
    def test_pages_of_several_pools(self, rng: random.Random, dtype: torch.dtype, page_major: bool) -> None:
        shape = Shape(((1, 100), (30, 50)), 4, 2, 16, num_pools=3, page_major=page_major, dtype=dtype)
        check(make(rng, shape), "triton")

    def test_lists_without_a_key_that_is_seen(self, rng: random.Random, dtype: torch.dtype) -> None:
        case = make(rng, Shape(((1, 40), (1, 40), (20, 10)), 4, 2, 16, dtype=dtype))
        start = case.pages.start.tolist()
        later = case.pages.position.clone()
        later[: start[1]] += 1000  # row 0 has pages, all of them in its future
        check(replace(case, pages=replace(case.pages, position=later)), "triton")
        nothing = PageList(ints([0, 0, 0, 0]), ints([]), ints([]))
        out, lse = replace(case, pages=nothing).run(ops.pick("triton"))
        assert (out == 0).all() and (lse == -torch.inf).all()
        empty = Case(case.q[:0], ints([0]), case.pools, 0, PageList(ints([0]), ints([]), ints([])), Mask(ints([])))
        assert empty.run(ops.pick("triton"))[0].shape == (0, 4, 16)

    def test_in_order_or_not_is_the_same(self, rng: random.Random, dtype: torch.dtype) -> None:
        """Entries in order are cut to what a tile can see, others are masked."""
        case = make(rng, Shape(((90, 60),), 4, 2, 16, dtype=dtype), window=30)
        order = torch.argsort(case.pages.position)
        pages = PageList(case.pages.start, case.pages.block[order], case.pages.position[order])
        sorted_case = replace(case, pages=pages)
        check(sorted_case, "triton")
        out, other = sorted_case.run(ops.pick("triton"))[0], case.run(ops.pick("triton"))[0]
        assert float((out - other).norm() / other.norm()) < LIMIT[dtype]

    def test_parts_merge_to_the_whole(self, rng: random.Random, dtype: torch.dtype) -> None:
        """Pages over three groups, as page-parallel ranks attend them."""
        case = make(rng, Shape(((1, 100), (20, 70)), 4, 2, 16, dtype=dtype))
        start, owner = case.pages.start.tolist(), [rng.randrange(3) for _ in range(len(case.pages.block))]
        outs, lses = [], []
        for group in range(3):
            chosen = [[e for e in range(start[r], start[r + 1]) if owner[e] == group] for r in range(2)]
            flat = [e for row in chosen for e in row]
            starts = ints([0, len(chosen[0]), len(flat)])
            pages = PageList(starts, case.pages.block[flat].contiguous(), case.pages.position[flat].contiguous())
            out, lse = replace(case, pages=pages).run(ops.pick("triton"))
            outs.append(out)
            lses.append(lse)
        out, lse = ops.merge(torch.stack(outs), torch.stack(lses), backend=ops.pick("triton"))
        want, want_lse = case.truth()
        assert float((out - want).norm() / want.norm()) < LIMIT[dtype]
        assert float((lse - want_lse).abs().max()) < 1e-5


def test_merging_only_empty_parts_gives_an_empty_one() -> None:
    outs = torch.full((3, 2, 4, 8), torch.nan)
    lses = torch.full((3, 2, 4), -torch.inf)
    outs[1, 0], lses[1, 0] = 5.0, 0.25
    out, lse = ops.merge(outs, lses, backend=ops.pick("triton"))
    assert (out[0] == 5).all() and (lse[0] == 0.25).all() and (out[1] == 0).all() and (lse[1] == -torch.inf).all()


def test_a_nan_in_one_part_is_not_lost_among_others() -> None:
    check_that_nan_stays("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_major", [False, True])
def test_keys_and_values_are_written_where_slots_say(rng: random.Random, dtype: torch.dtype, page_major: bool) -> None:
    shape = (2, 6, 2, 3, 4, 20)
    pool = torch.full((6, 2, *shape[2:]), torch.nan).transpose(0, 1) if page_major else torch.full(shape, torch.nan)
    pool = pool.to(dtype)
    expected = pool.float()
    wide = torch.randn(5, 9, 20).to(dtype)
    k, v = wide[:, :3], wide[:, 6:]
    slots = torch.tensor([rng.randrange(4), 11, -1, 23, -7])
    ops.write_kv(k, v, pool, 1, slots, backend=ops.pick("triton"))
    ops.write_kv(k.float(), v.float(), expected, 1, slots, backend=Reference())
    assert torch.equal(pool.float().nan_to_num(77), expected.nan_to_num(77))
    with pytest.raises(ValueError, match="slots"):
        ops.write_kv(k, v, pool, 1, torch.tensor([24, 0, 1, 2, 3]), backend=ops.pick("triton"))


@pytest.mark.parametrize("moves", [[(0, 1), (1, 2)], [(0, 1), (2, 0)], [(3, 1), (4, 1), (1, 1)], []])
def test_pages_are_copied_in_order(moves: list[tuple[int, int]]) -> None:
    pool = torch.randn(2, 5, 2, 1, 4, 8)
    expected = pool.clone()
    source, target = ints([a for a, _ in moves]), ints([b for _, b in moves])
    ops.copy_pages(pool, source, target, backend=ops.pick("triton"))
    ops.copy_pages(expected, source, target, backend=Reference())
    assert torch.equal(pool, expected)


def test_a_plan_is_made_once_for_all_layers_and_anew_for_other_lists(rng: random.Random) -> None:
    backend = Triton()
    case = make(rng, Shape(((1, 40), (9, 20)), 4, 2, 16))
    pool = case.pools[0]
    first = backend.plan(4, pool, case.query_start, case.pages, case.mask)
    assert backend.plan(4, pool, case.query_start, case.pages, case.mask) is first
    assert backend.plan(4, pool, case.query_start, case.pages, replace(case.mask, window=7)) is not first
    case.pages.position.add_(0)  # changed in place, as far as anybody can tell
    assert backend.plan(4, pool, case.query_start, case.pages, case.mask) is not first


@pytest.mark.parametrize("processors", [1, 4, 132])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_items_cover_every_entry_once_and_are_about_equal(rng: random.Random, processors: int, kv_heads: int) -> None:
    counts = np.array([rng.choice([0, 1, 7, 500, 8192]) for _ in range(rng.randrange(1, 40))], np.int32)
    begins = np.cumsum(counts).astype(np.int32) - counts
    tile, first, last, parts = split(begins, begins + counts, 16, kv_heads, processors)
    assert np.bincount(tile, minlength=len(counts)).tolist() == parts.tolist()
    for index, count in enumerate(counts):
        own = tile == index
        assert first[own][0] == begins[index] and last[own][-1] == begins[index] + count
        assert (first[own][1:] == last[own][:-1]).all()
    sizes = last - first
    most = max(1, 256 // 16, -(-int(counts.sum()) * kv_heads // (4 * processors)))
    assert sizes.max(initial=0) <= most
    assert all(sizes[tile == index].min() >= min(count, most // 2) for index, count in enumerate(counts))
    if counts.sum() * kv_heads >= 4 * processors * 16:
        assert len(tile) * kv_heads >= processors, "work for every multiprocessor"


def test_a_prefill_tile_reads_no_page_behind_its_last_query() -> None:
    """A causal prompt costs half of the square."""
    lengths, size, pages = 1024, 16, 64
    starts, positions = np.array([0, lengths], np.int32), np.arange(pages, dtype=np.int32) * size
    rows, entries = np.array([0], np.int32), np.array([0, pages], np.int32)
    shape = KernelShape(128, 64, 8, 2)
    tiles, items, _, _ = deal(rows, shape, starts, entries, positions, np.zeros(1, np.int32), 4, 2, size, 0, 0, 1)
    assert len(tiles) == 32 and int((items[:, 2] - items[:, 1]).sum()) == sum(2 * (index + 1) for index in range(32))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"pools": [torch.zeros(1, 4, 2, 2, 16, 20, dtype=torch.int8)]},
            "pools.0.: got torch.int8, must be float32, bf",
        ),
        ({"layer": 3}, "layer: got 3"),
        ({"pages": PageList(ints([0, 1]), ints([9]), ints([0]))}, r"pages.block\[0\]: got 9, must be from 0 to 3"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], text: str) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(1, 4, 16),
        "query_start": ints([0, 1]),
        "pools": [torch.zeros(1, 4, 2, 2, 16, 16)],
        "layer": 0,
        "pages": PageList(ints([0, 1]), ints([2]), ints([0])),
        "mask": Mask(ints([0])),
    }
    with pytest.raises(ValueError, match=text):
        ops.attend(**(good | change), backend=ops.pick("triton"))  # type: ignore[arg-type]


def test_without_a_gpu_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="QUIRE_KERNELS: got 'triton', must have a CUDA device; choose auto"):
        ops.pick("triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pages_of_float8_are_widened_and_scaled(rng: random.Random, dtype: torch.dtype) -> None:
    case = make(rng, Shape(((1, 70), (20, 30)), 4, 2, 16, dtype=dtype))
    narrow = (case.pools[0].nan_to_num(0) / 0.5).to(torch.float8_e4m3fn)
    wide = narrow.double() * 0.5  # what the pages hold
    wide[:, :, 1] *= 0.25 / 0.5
    out, lse = Triton().attend(
        case.q, case.query_start, [narrow], case.layer, case.pages, case.mask, 0.25, k_scale=0.5, v_scale=0.25
    )
    want, want_lse = ops.attend(
        case.q.double(),
        case.query_start,
        [wide],
        case.layer,
        case.pages,
        case.mask,
        scale=0.25,
        backend=Reference(),
    )
    assert float((out - want).norm() / want.norm()) < LIMIT[dtype]
    assert float((lse - want_lse).abs().max()) < 1e-5


def test_kernels_of_another_device_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path)
    backend = Triton()
    backend.takes = replace(backend.takes, device="cuda")
    monkeypatch.setattr(ops, "default_backend", lambda: backend)
    with pytest.raises(ConfigError, match="QUIRE_KERNELS: got 'triton', must be one for cpu devices"):
        LLM(str(tmp_path), max_model_len=32, num_gpu_blocks_override=8, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: got 'cuda', must be a GPU that torch can use here"):
        ops.backend_for(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("QUIRE_KERNELS", "reference")
    with pytest.raises(ConfigError, match="QUIRE_KERNELS: got 'reference', must be one for cuda devices"):
        ops.backend_for(torch.device("cuda"))

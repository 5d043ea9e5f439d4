"""What is said to FlashInfer, and what becomes of its answers. It needs a GPU: a STAND-IN that computes in float64 what
the documentation of its wrappers says takes its place. Where the package is installed, our calls must fit its own.
"""

from __future__ import annotations

import gc
import inspect
import math
import random
import re
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kernels import flashinfer_attention, ops
from kernels.flashinfer_attention import FlashInfer
from kernels.ops import Mask, PageList
from kernels.reference import Reference
from pagetable.errors import ConfigError
from pagetable.ids import PlanNumber
from tests.attention import Case, Shape, check, ints, make
from worker.plan import Plan, by_column
from worker.tables import TableMirror

DIM = 64
Rows = list[tuple[int, int]]  # (new tokens, tokens before them)


class StandIn:
    """Both wrappers of FlashInfer 0.5, as documented: a row's keys are those of its pages, `last_page_len` of the last,
    its queries are those of the last keys; a query sees `window_left` keys behind it; lse is of base 2."""

    calls: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]]
    made: list[StandIn]

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        self._note("__init__", float_workspace_buffer, kv_layout, **options)
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        assert kv_layout == "HND"
        self.made.append(self)

    def _note(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append((type(self).__name__, method, args, kwargs))

    def _planned(
        self,
        qo_indptr: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        shape: tuple[int, int, int, int],
        causal: bool,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert all(x.dtype == torch.int32 for x in (qo_indptr, indptr, indices, last_page_len))
        assert q_data_type == kv_data_type and len(indices) == indptr[-1]
        self._shape, self._causal, self._window_left, self._dtype = shape, causal, window_left, q_data_type
        self._scale = shape[2] ** -0.5 if sm_scale is None else sm_scale
        self._rows = []
        for row, last in enumerate(last_page_len.tolist()):
            pages = indices[indptr[row] : indptr[row + 1]].long()
            assert 1 <= last <= shape[3] and len(pages)
            length = (len(pages) - 1) * shape[3] + last
            self._rows.append((int(qo_indptr[row]), int(qo_indptr[row + 1]), pages, length))

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, k_scale: float | None = None, return_lse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._note("run", q, paged_kv_cache, k_scale=k_scale, return_lse=return_lse)
        heads, kv_heads, dim, size = self._shape
        assert q.shape == (self._rows[-1][1], heads, dim) and q.dtype == paged_kv_cache.dtype == self._dtype
        assert paged_kv_cache.shape[1:] == (2, kv_heads, size, dim) and return_lse
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
        for begin, end, pages, length in self._rows:
            k, v = (x.double().transpose(1, 2).flatten(0, 1)[:length] for x in paged_kv_cache[pages].unbind(1))
            own = q[begin:end].double().reshape(-1, kv_heads, heads // kv_heads, dim)
            scores = torch.einsum("tkgd,nkd->tkgn", own, k) * self._scale * (1.0 if k_scale is None else k_scale)
            query = torch.arange(length - (end - begin), length)[:, None]
            key = torch.arange(length)
            hidden = (key > query) & self._causal
            if self._window_left >= 0:
                hidden |= query - key > self._window_left
            assert query[0] >= 0 and not hidden.all(1).any()
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
            out[begin:end] = torch.einsum("tkgn,nkd->tkgd", scores.softmax(-1), v).flatten(1, 2).to(q.dtype)
            lse[begin:end] = (scores.logsumexp(-1) / math.log(2)).flatten(1)
        return out, lse


class BatchDecodeWithPagedKVCacheWrapper(StandIn):
    """STAND-IN: one query a row, so no causal mask."""

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **more: Any,
    ) -> None:
        shape = num_qo_heads, num_kv_heads, head_dim, page_size
        self._note("plan", indptr, indices, last_page_len, *shape, **more)
        one_each = torch.arange(len(indptr), dtype=torch.int32)
        self._planned(one_each, indptr, indices, last_page_len, shape, False, **more)


class BatchPrefillWithPagedKVCacheWrapper(StandIn):
    """STAND-IN."""

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool = False,
        **more: Any,
    ) -> None:
        shape = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        lists = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._note("plan", *lists, *shape, causal=causal, **more)
        self._planned(*lists, shape, causal, **more)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashInfer]:
    """Our backend over the stand-in, for tensors of the CPU; `ops.pick` gives it, too."""
    module = ModuleType("flashinfer")
    for each in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper):
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE", 64)
    monkeypatch.setattr(StandIn, "calls", [], raising=False)
    monkeypatch.setattr(StandIn, "made", [], raising=False)
    made = FlashInfer()
    made.takes = replace(made.takes, device="cpu")
    monkeypatch.setattr(ops, "pick", lambda choice: made)
    yield made


def sequences(
    rng: random.Random, rows: Rows, window: int = 0, group: int = 2, size: int = 16, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Rows as a worker's tables list their pages: in order, without those that fell out of the window; page-major."""
    case = make(rng, Shape(tuple(rows), 2 * group, 2, DIM, size, page_major=True, dtype=dtype))
    mirror = TableMirror(len(rows), max(-(-(new + old) // size) for new, old in rows), size)
    start = case.pages.start.tolist()
    for row in range(len(rows)):
        own = slice(start[row], start[row + 1])
        mirror.tables[row, case.pages.position[own].numpy() // size] = case.pages.block[own].numpy()
    plan = Plan(PlanNumber(1), table_blocks=by_column(1), copy_sources=by_column(1), copy_targets=by_column(1))
    plan.slots, plan.first_position = array("i", range(len(rows))), array("i", [old for _, old in rows])
    plan.query_start, plan.tokens = array("i", case.query_start.tolist()), array("i", bytes(4 * len(case.q)))
    batch = mirror.batch(plan, [window])
    wide = torch.cat([torch.full_like(case.q, math.nan), case.q], 1)  # queries are part of a wider matrix
    return replace(case, q=wide[:, case.q.shape[1] :], pages=batch.pages[window], mask=batch.masks[window])


def planned(backend: FlashInfer, case: Case) -> Any:
    return backend.plan(case.q.shape[1], case.pools[0], case.query_start, case.pages, case.mask)


DECODES: Rows = [(1, 0), (1, 15), (1, 16), (1, 17), (1, 100)]
CHUNKS: Rows = [(16, 0), (17, 0), (15, 33), (40, 8), (2, 62)]
MIXED: Rows = [(1, 70), (13, 0), (1, 0), (30, 50), (1, 15), (16, 16)]


class TestAttend:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("window", [0, 1, 9, 16, 17, 40, 1000])
    @pytest.mark.parametrize("rows", [DECODES, CHUNKS, MIXED], ids=["decodes", "chunks", "mixed"])
    def test_rows_of_a_worker(
        self, rng: random.Random, backend: FlashInfer, rows: Rows, window: int, dtype: torch.dtype
    ) -> None:
        check(sequences(rng, rows, window, dtype=dtype), "flashinfer")

    @pytest.mark.parametrize("group", [1, 3, 4, 7])
    @pytest.mark.parametrize("size", [1, 3, 16, 64])
    def test_random_rows(self, rng: random.Random, backend: FlashInfer, group: int, size: int) -> None:
        for most in (1, 50):
            rows = [(rng.randint(1, most), rng.choice([0, rng.randrange(120)])) for _ in range(rng.randint(1, 8))]
            check(sequences(rng, rows, rng.choice([0, rng.randint(1, 80)]), group, size), "flashinfer")

    def test_all_scales(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, MIXED, 20)
        plan = planned(backend, case)
        for scale in (0.01, DIM**-0.5, 0.3):
            out, lse = backend.run(plan, case.q, case.pools, case.layer, case.mask, scale)
            want, want_lse = ops.attend(
                case.q.double(),
                case.query_start,
                [case.pools[0].double()],
                case.layer,
                case.pages,
                case.mask,
                scale=scale,
                backend=Reference(),
            )
            assert float((out - want).norm() / want.norm()) < 3e-3
            assert float((lse - want_lse).abs().max()) < 1e-5

    def test_rows_without_tokens_or_without_pages(self, rng: random.Random, backend: FlashInfer) -> None:
        """FlashInfer gets the other rows: here the first and the fourth of six."""
        case = sequences(rng, [(1, 20), (5, 30), (1, 40), (9, 0), (1, 3)])
        a, b, c, d, _, _ = case.pages.start.tolist()
        kept = [*range(a, b), *range(c, d), *range(d, d + 1)]
        counts = [b - a, 0, d - c, 1, 0, 0]
        pages = PageList(ints([0, *np.cumsum(counts)]), case.pages.block[kept], case.pages.position[kept])
        case = replace(
            case,
            q=torch.cat([case.q[:6], case.q[7:]]),
            query_start=ints([0, 1, 6, 6, 15, 15, 16]),
            pages=pages,
            mask=Mask(ints([20, 30, 40, 0, 7, 3])),
        )
        check(case, "flashinfer")
        (plan,) = [args for _, method, args, _ in StandIn.calls if method == "plan"]
        assert plan[0].tolist() == [0, 1, 10] and plan[1].tolist() == [0, 2, 3]
        assert plan[2].tolist() == pages.block[[0, 1, -1]].tolist() and plan[3].tolist() == [5, 9]

    @pytest.mark.parametrize("num_rows", [0, 1, 3])
    def test_nothing_at_all(self, rng: random.Random, backend: FlashInfer, num_rows: int) -> None:
        case = sequences(rng, [(1, 4)] * 3)
        nothing = PageList(ints([0] * (num_rows + 1)), ints([]), ints([]))
        case = replace(case, q=case.q[:num_rows], query_start=ints(list(range(num_rows + 1))), pages=nothing)
        out, lse = replace(case, mask=Mask(ints([4] * num_rows))).run(backend)
        assert out.shape == (num_rows, 4, DIM) and out.dtype == lse.dtype == torch.float32
        assert (out == 0).all() and (lse == -math.inf).all() and not StandIn.calls

    def test_pages_are_read_where_they_lie(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, MIXED)
        case.run(backend)
        (pages,) = [args[1] for _, method, args, _ in StandIn.calls if method == "run"]
        layer = case.pools[0][case.layer]
        assert pages.data_ptr() == layer.data_ptr() and pages.stride() == layer.stride() and not pages.is_contiguous()


class TestPlan:
    @pytest.mark.parametrize(("group", "tensor_cores"), [(1, False), (3, False), (4, True), (7, True)])
    def test_decodes_go_to_the_decode_wrapper(
        self, rng: random.Random, backend: FlashInfer, group: int, tensor_cores: bool
    ) -> None:
        planned(backend, sequences(rng, DECODES, group=group))
        planned(backend, sequences(rng, MIXED, group=group))
        made = [(name, options) for name, method, _, options in StandIn.calls if method == "__init__"]
        decode = (BatchDecodeWithPagedKVCacheWrapper.__name__, {"use_tensor_cores": tensor_cores})
        assert made == [decode, (BatchPrefillWithPagedKVCacheWrapper.__name__, {})]

    def test_the_lists_themselves(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, [(3, 68), (1, 15), (16, 0)], window=16)
        planned(backend, case)
        _, _, args, options = StandIn.calls[-1]
        assert [x.tolist() for x in (args[0], args[1], args[3])] == [[0, 3, 4, 20], [0, 2, 3, 4], [7, 16, 16]]
        assert torch.equal(args[2], case.pages.block) and args[4:] == (4, 2, DIM, 16)
        assert options["causal"] is True and options["window_left"] == 15

    def test_a_plan_is_made_once_for_all_layers_and_anew_for_other_lists(
        self, rng: random.Random, backend: FlashInfer
    ) -> None:
        case = sequences(rng, MIXED)
        assert planned(backend, case) is planned(backend, case)
        other = replace(case, mask=replace(case.mask, window=30))
        assert planned(backend, other) is not planned(backend, case)
        assert [method for _, method, _, _ in StandIn.calls] == ["__init__", "plan"] * 2
        with pytest.raises(AssertionError, match="another window"):
            backend.run(planned(backend, case), case.q, case.pools, case.layer, other.mask, 1.0)

    def test_a_wrapper_is_planned_again_only_when_its_plan_is_gone(
        self, rng: random.Random, backend: FlashInfer
    ) -> None:
        cases = [sequences(rng, [(rng.randint(2, 30), rng.randrange(60))]) for _ in range(9)]
        for _ in range(3):
            plans = [planned(backend, case) for case in cases]  # more than are remembered
            assert len({id(plan.made) for plan in plans}) == 9
            for case, plan in zip(cases, plans, strict=True):
                out, _ = backend.run(plan, case.q, case.pools, case.layer, case.mask, DIM**-0.5)
                want, _ = case.truth()
                assert float((out - want).norm() / want.norm()) < 3e-3
            del plan, plans
            gc.collect()
        assert len(StandIn.made) == 9


def refused(backend: FlashInfer, case: Case, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}.* for FlashInfer; choose QUIRE_KERNELS=triton$"):
        planned(backend, case)
    assert not StandIn.calls


class TestRefusals:
    """Whatever FlashInfer would compute wrongly is named, with the cure."""

    def test_pages_of_several_pools(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, MIXED)
        which = torch.zeros_like(case.pages.block)
        check(replace(case, pages=replace(case.pages, pool=which)), "flashinfer")
        which[3] = 1
        StandIn.calls.clear()
        refused(backend, replace(case, pages=replace(case.pages, pool=which)), "pages.pool: got pages of several pools")

    def test_sinks(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, MIXED)
        check(replace(case, mask=replace(case.mask, sinks=4)), "flashinfer")  # without a window they change nothing
        StandIn.calls.clear()
        refused(backend, replace(case, mask=replace(case.mask, window=9, sinks=4)), "mask.sinks: got 4, must be 0")

    @pytest.mark.parametrize(
        ("position", "row", "text"),
        [
            ([0, 0, 32, 16, 48], 1, "32 behind 0, must be 16 further on"),
            ([0, 0, 16, 32, 64], 1, "64 behind 32, must be 16 further on"),
            ([0, 0, 16, 16, 48], 1, "16 behind 16, must be 16 further on"),
            ([0, 48, 64, 80, 96], 1, "48 first, must be at most 45 (its first query)"),
            ([0, 16, 32, 48, 64], 1, "64 last, must be the page of 52 (its last query)"),
            ([16, 0, 16, 32, 48], 0, "16 first, must be at most 15 (its first query)"),
        ],
    )
    def test_pages_that_are_not_one_run_to_the_last_query(
        self, rng: random.Random, backend: FlashInfer, position: list[int], row: int, text: str
    ) -> None:
        case = sequences(rng, [(1, 15), (8, 45)])
        assert case.pages.position.tolist() == [0, 0, 16, 32, 48]
        case = replace(case, pages=replace(case.pages, position=ints(position)))
        refused(backend, case, f"pages.position of row {row}: got {text}")

    @pytest.mark.parametrize("last", [48, 52])
    def test_keys_that_are_not_listed(self, rng: random.Random, backend: FlashInfer, last: int) -> None:
        case = sequences(rng, [(1, 15), (8, last - 7)])
        short = PageList(ints([0, 1, 4]), case.pages.block[:4], case.pages.position[:4])
        text = f"pages.position of row 1: got 32 last, must be the page of {last} (its last query)"
        refused(backend, replace(case, pages=short), text)

    def test_rows_are_named_as_the_caller_counts_them(self, rng: random.Random, backend: FlashInfer) -> None:
        case = sequences(rng, [(1, 15), (8, 45)])
        pages = PageList(ints([0, 0, 1, 5]), case.pages.block, ints([0, 0, 16, 32, 64]))
        case = replace(case, query_start=ints([0, 0, 1, 9]), pages=pages, mask=Mask(ints([3, 15, 45])))
        refused(backend, case, "pages.position of row 2: got 64 behind 32")

    def test_dtypes_and_head_dims(self, rng: random.Random, backend: FlashInfer) -> None:
        for dim in (32, 96, 80):
            refused(
                backend, make(rng, Shape(((1, 0),), head_dim=dim, dtype=torch.float16)), f"pools: got head_dim {dim}"
            )
        wide = make(rng, Shape(((1, 0),), head_dim=DIM))
        refused(backend, wide, "pools: got torch.float32, must be bfloat16 or float16")
        with pytest.raises(ValueError, match=r"got torch\.float32, must be bfloat16 or float16"):
            wide.run(backend)

    def test_more_than_the_prefill_wrapper_has_room_for(
        self, rng: random.Random, backend: FlashInfer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = sequences(rng, MIXED)
        keys = sum(new + old for new, old in MIXED)
        monkeypatch.setattr(flashinfer_attention, "MAX_KEYS", keys - 1)
        refused(backend, case, f"pages.start: got {keys} keys of all rows, must be at most {keys - 1}")
        monkeypatch.setattr(flashinfer_attention, "MAX_KEYS", keys)
        monkeypatch.setattr(flashinfer_attention, "MAX_ROWS", len(MIXED) - 1)
        refused(backend, case, "query_start: got 6 rows, must be at most 5")
        check(sequences(rng, DECODES + DECODES), "flashinfer")
        monkeypatch.setattr(flashinfer_attention, "MAX_ROWS", len(MIXED))
        check(case, "flashinfer")


def test_partial_results_are_merged_in_float32(rng: random.Random, backend: FlashInfer) -> None:
    outs, lses = torch.randn(2, 3, 4, DIM), torch.randn(2, 3, 4)
    found, wanted = (ops.merge(outs, lses, backend=each) for each in (backend, Reference()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_without_the_package_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(
        ConfigError, match=r"QUIRE_KERNELS: got 'flashinfer'.*install flashinfer-python, or choose triton"
    ):
        ops.pick("flashinfer")


def test_our_calls_fit_the_real_package(rng: random.Random, request: pytest.FixtureRequest) -> None:
    real = pytest.importorskip("flashinfer", exc_type=ImportError, reason="FlashInfer is not installed")
    backend = request.getfixturevalue("backend")
    for rows in (DECODES, MIXED):
        check(sequences(rng, rows, 9), "flashinfer")
    assert len(StandIn.calls) == 6 and backend._flashinfer is not real
    for wrapper, method, args, kwargs in StandIn.calls:
        inspect.signature(getattr(getattr(real, wrapper), method)).bind(None, *args, **kwargs)

"""Plain plans in one native call each, and by the runner's own steps: equal tokens, failures, tables and pages."""

from __future__ import annotations

import mmap
import random
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu
from kernels.peers import PeersBroken
from pagetable.errors import InvariantBroken
from pagetable.frames import BadFrame
from pagetable.ids import PlanNumber
from tests.plan_rig import LAYOUTS, Books, Shard, plan_of, plan_of_a_row, said, three_layers
from worker.codec import encode_plan, plan_number
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.plan import Plan
from worker.runner import NOT_FINITE, Runner
from worker.weights import open_weights

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason="the native kernels are not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_layers(tmp_path_factory.mktemp("model"))


def watch(runner: Runner) -> list[bool]:
    """Whether each plan from now on is carried out natively."""
    plain, seen = runner.plain, list[bool]()
    assert plain is not None
    run = plain.run

    def watched(data: bytes) -> array[int] | None:
        found = run(data)
        seen.append(found is not None)
        return found

    plain.run = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_a_plan_does_is_the_same_either_way(layout: Layout, dtype: torch.dtype, folder: Path) -> None:
    native, plain = Shard(folder, layout, dtype, owns_cores=True), Shard(folder, layout, dtype)
    books, tokens = Books(random.Random(8), layout), set[int]()
    seen, expected = [watch(runner) for runner in native.runners], list[bool]()
    for _ in range(60):
        plan, is_plain = books.plan()
        expected.append(is_plain)
        results = native.run(plan, encoded=True), plain.run(plan, encoded=False)
        assert said(results[0]) == said(results[1]) and not results[0].failed
        tokens.update(results[0].tokens)
    assert native.state() == plain.state()
    assert seen[-1] == expected  # those before the last stage need not care who samples
    assert sum(expected) > 10 and len(tokens) > 30
    assert all(sum(each) >= sum(expected) for each in seen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_row_that_is_not_finite_fails_alone(layout: Layout, folder: Path) -> None:
    shards = [Shard(folder, layout, torch.float32) for _ in range(2)]
    books = Books(random.Random(5), layout)
    for slot in range(3):
        books.lengths[slot], books.pages[slot], books.greedy[slot] = 0, [], True
    results = []
    for turn in range(2):
        plan = plan_of(turn + 1, layout)
        for slot in range(3):
            books._row(plan, slot, 5 if turn == 0 else 1, samples=True)
        if turn == 1:
            group, block = books.pages[1][0]
            for shard in shards:
                for runner in shard.runners[: layout.tensor]:
                    if layout.page == 1 or runner.tables.group == group:
                        runner.cache.pool[:, block] = torch.nan
        results = [shard.run(plan, encoded=encoded) for shard, encoded in zip(shards, (True, False), strict=True)]
        assert said(results[0]) == said(results[1])
    assert results[0].failed == {1: NOT_FINITE}
    assert [token < 0 for token in results[0].tokens] == [False, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_stage_asks_for_ahead_is_what_it_reads_first(threads: int, folder: Path) -> None:
    """Weights of its own, all of one piece of memory; as many as wanted, where they are so many."""
    config = ModelConfig.from_folder(folder)
    for part in Layout(1, 3).parts(config):
        model = NativeModel(
            config, open_weights(folder), torch.float32, cpu.Native(cpu.levels()[0]), threads, part=part
        )
        decoder = model.decoder
        address, count = decoder.first_weights(1 << 30)
        first = decoder.model.carried.gate_up if part.is_carrying else decoder.model.layers[0].qkv
        packed = [each for each in decoder._keep if isinstance(each, mmap.mmap)]
        places = [(torch.frombuffer(each, dtype=torch.uint8).data_ptr(), len(each)) for each in packed]
        assert address == first.packed and count > 0
        assert any(base <= address and address + count <= base + size for base, size in places)
        assert (count < 4 * first.depth * first.columns) == (threads > 1)
        assert decoder.first_weights(100) == (address, 100)


def test_only_a_rank_with_cores_of_its_own_asks_ahead(folder: Path) -> None:
    for owns_cores in (True, False):
        shard = Shard(folder, Layout(1, 3), torch.float32, owns_cores=owns_cores)
        asked = [each.previous.struct.ahead_bytes for each in shard.ends[1:] if each.previous is not None]
        assert [count > 0 for count in asked] == [owns_cores] * 2


def test_hidden_rows_of_another_plan_break_the_epoch(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    plan = plan_of_a_row(5, shard.layout)
    shard.runners[0].run_encoded(encode_plan(plan))
    plan.number = PlanNumber(6)
    with pytest.raises(PeersBroken, match="hidden rows of plan 5 came for plan 6"):
        shard.runners[1].run_encoded(encode_plan(plan))
    assert shard.ends[1].is_aborted and not shard.ends[0].is_aborted


def test_hidden_rows_of_another_size_are_refused(folder: Path) -> None:
    shard = Shard(folder, Layout(1, 2), torch.float32)
    plan = plan_of_a_row(1, shard.layout)
    ring = shard.ends[0].next
    assert ring is not None
    ring.slot()
    ring.publish(1 * 64, 12)
    with pytest.raises(ValueError, match="hidden rows: got 12 bytes for a step of 3 tokens, must be "):
        shard.runners[1].run_encoded(encode_plan(plan))
    ring.struct.capacity = 100
    with pytest.raises(ValueError, match="ring: a slot holds 100 bytes, hidden rows of a step of 3 tokens have "):
        shard.runners[0].run_encoded(encode_plan(plan))


@pytest.mark.parametrize("end", ["tensor", "previous", "next"])
def test_whoever_waits_hears_that_the_epoch_is_over(end: str, folder: Path) -> None:
    shard = Shard(folder, Layout(2, 2), torch.float32)
    plan = plan_of_a_row(1, shard.layout)
    rank = 2 if end == "previous" else 0
    getattr(shard.ends[rank], end).abort()
    with pytest.raises(PeersBroken, match="exchange of 2 ranks" if end == "tensor" else "ring between two ranks"):
        shard.runners[rank].run_encoded(encode_plan(plan))
    assert shard.ends[rank].is_aborted


def outcome(runner: Runner, data: bytes, *, natively: bool) -> Any:
    plain = runner.plain
    if not natively:
        runner.plain = None
    try:
        result = runner.run_encoded(data)
        return None if result is None else said(result)
    except (BadFrame, InvariantBroken, ValueError, IndexError) as error:
        return type(error), str(error)
    finally:
        runner.plain = plain


@pytest.fixture(scope="module")
def twins(folder: Path) -> Iterator[tuple[Shard, Shard]]:
    yield Shard(folder, Layout(), torch.float32), Shard(folder, Layout(), torch.float32)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_are_no_plan_or_no_right_one_get_the_same_answer(
    twins: tuple[Shard, Shard], data: st.DataObject
) -> None:
    books = Books(random.Random(data.draw(st.integers(0, 99))), Layout())
    for slot in range(3):
        books.lengths[slot], books.pages[slot], books.greedy[slot] = 0, [], True
    plan = plan_of(1, Layout())
    for slot in range(data.draw(st.integers(0, 3))):
        books._row(plan, slot, data.draw(st.integers(1, 5)), samples=data.draw(st.booleans()))
    words = bytearray(encode_plan(plan))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(words) // 4 - 1)) * 4
        struct.pack_into("<I", words, at, data.draw(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))))
    changed = bytes(words[: data.draw(st.sampled_from((len(words), len(words) - 1, len(words) // 2)))])
    for shard in twins:
        shard.runners[0].tables.tables.fill(-1)
    found = [
        outcome(twin.runners[0], changed, natively=natively)
        for twin, natively in zip(twins, (True, False), strict=True)
    ]
    assert found[0] == found[1]
    assert twins[0].runners[0].tables.tables.tolist() == twins[1].runners[0].tables.tables.tolist()


def test_a_plan_has_a_number_or_is_none() -> None:
    assert plan_number(encode_plan(Plan(PlanNumber(2**40)))) == 2**40
    with pytest.raises(BadFrame):
        plan_number(bytes(7))

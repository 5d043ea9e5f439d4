"""A rank's tables, of one column and one group: what it writes, lists and copies, against a plain reading of plans."""

from __future__ import annotations

import random
from array import array

import pytest

from pagetable.allocator import BlockAllocator
from pagetable.ids import DeviceId, PlanNumber
from pagetable.page import PagePool
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.plan import Plan, StepResult, by_column
from worker.scheduler import ShardScheduler
from worker.tables import TableMirror

SIZE = 4


@pytest.fixture(params=["auto", "reference"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively where that is built, and by numpy."""
    monkeypatch.setenv("QUIRE_KERNELS", request.param)


def two_groups() -> Plan:
    """Slot 2 decodes at position 9 behind pages of groups 0, 1, 0; slot 0 prefills 3..7 in groups 1, 1."""
    plan = Plan(PlanNumber(1), table_blocks=by_column(2), copy_sources=by_column(2), copy_targets=by_column(2))
    plan.slots, plan.first_position = array("i", (2, 0)), array("i", (9, 3))
    plan.query_start, plan.tokens = array("i", (0, 1, 6)), array("i", (50, 60, 61, 62, 63, 64))
    plan.table_slot, plan.table_index = array("i", (2, 2, 2, 0, 0)), array("i", (0, 1, 2, 0, 1))
    plan.table_group = array("i", (0, 1, 0, 1, 1))
    plan.table_blocks = [array("i", (7, 3, 8, 1, 4)), array("i", (17, 13, 18, 11, 14))]
    plan.copy_from, plan.copy_to = array("i", (1, 0, 1, 1)), array("i", (1, 0, 1, 0))
    plan.copy_sources = [array("i", (1, 2, 3, 9)), array("i", (11, 12, 13, 19))]
    plan.copy_targets = [array("i", (4, 5, 6, 8)), array("i", (14, 15, 16, 18))]
    return plan


def test_a_rank_sees_the_blocks_of_its_column_and_group_only() -> None:
    expected = {
        (0, 0): [[-1, -1, -1], [-1, -1, -1], [7, -1, 8]],
        (0, 1): [[1, 4, -1], [-1, -1, -1], [-1, 3, -1]],
        (1, 0): [[-1, -1, -1], [-1, -1, -1], [17, -1, 18]],
        (1, 1): [[11, 14, -1], [-1, -1, -1], [-1, 13, -1]],
        (1, None): [[11, 14, -1], [-1, -1, -1], [17, 13, 18]],
    }
    for (column, group), tables in expected.items():
        mirror = TableMirror(3, 3, SIZE, column, group)
        mirror.apply(two_groups())
        assert mirror.tables.tolist() == tables


def test_a_page_that_moves_to_another_group_is_here_no_longer() -> None:
    plan = two_groups()
    mirror = TableMirror(3, 3, SIZE, 0, 0)
    mirror.apply(plan)
    plan.table_group = array("i", (1, 1, 0, 1, 0))
    mirror.apply(plan)
    assert mirror.tables.tolist() == [[-1, 4, -1], [-1, -1, -1], [-1, -1, 8]]


def test_tokens_go_to_own_pages_and_only_those_are_listed() -> None:
    found = {}
    for group in (0, 1):
        mirror = TableMirror(3, 3, SIZE, 1, group)
        mirror.apply(two_groups())
        batch = mirror.batch(two_groups(), (0, 5, 2))
        assert batch.positions.tolist() == [9, 3, 4, 5, 6, 7] and batch.query_start.tolist() == [0, 1, 6]
        lists = {w: (p.start.tolist(), p.block.tolist(), p.position.tolist()) for w, p in batch.pages.items()}
        found[group] = batch.slots.tolist(), lists
    assert found[0] == (
        [18 * 4 + 1, -1, -1, -1, -1, -1],
        {0: ([0, 2, 2], [17, 18], [0, 8]), 5: ([0, 1, 1], [18], [8]), 2: ([0, 1, 1], [18], [8])},
    )
    assert found[1] == (
        [-1, 11 * 4 + 3, 14 * 4, 14 * 4 + 1, 14 * 4 + 2, 14 * 4 + 3],
        {
            0: ([0, 1, 3], [13, 11, 14], [4, 0, 4]),
            5: ([0, 1, 3], [13, 11, 14], [4, 0, 4]),
            2: ([0, 0, 2], [11, 14], [0, 4]),
        },
    )


def test_copies_are_those_of_the_column_and_group() -> None:
    expected = {
        (0, 0): ([2], [5]),
        (0, 1): ([1, 3], [4, 6]),
        (1, 1): ([11, 13], [14, 16]),
    }
    for (column, group), copies in expected.items():
        source, target = TableMirror(3, 3, SIZE, column, group).copies(two_groups())
        assert (source.tolist(), target.tolist()) == copies
    alone = two_groups()
    alone.copy_from = alone.copy_to = array("i", (0, 0, 0, 0))
    source, target = TableMirror(3, 3, SIZE, 1).copies(alone)
    assert (source.tolist(), target.tolist()) == ([11, 12, 13, 19], [14, 15, 16, 18])
    empty = Plan(PlanNumber(1))
    source, target = TableMirror(3, 3, SIZE).copies(empty)
    assert len(source) == len(target) == 0
    assert TableMirror(3, 3, SIZE, 0, 0).moves(empty) is None


@pytest.mark.parametrize("group", [0, 1])
def test_every_group_hears_of_pages_that_go_from_one_to_another(group: int) -> None:
    moves = TableMirror(3, 3, SIZE, 1, group).moves(two_groups())
    assert moves is not None
    found = (moves.source, moves.target, moves.from_block, moves.to_block)
    assert [each.tolist() for each in found] == [[1], [0], [19], [18]]
    two_stay = two_groups()
    two_stay.copy_to = two_stay.copy_from
    assert TableMirror(3, 3, SIZE, 1, group).moves(two_stay) is None


def test_digests_are_equal_where_the_tables_are() -> None:
    first, second, other = TableMirror(3, 3, SIZE), TableMirror(3, 3, SIZE), TableMirror(3, 3, SIZE, 1)
    digests = set()
    for mirror in (first, second, other):
        digests.add(mirror.digest())
        mirror.apply(two_groups())
    assert len(digests) == 1 and first.digest() == second.digest() != other.digest()
    assert first.digest() not in digests and len(first.digest()) == 32


@pytest.mark.parametrize(("num_groups", "num_stages"), [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_every_token_and_page_of_a_plan_is_on_exactly_one_group(num_groups: int, num_stages: int) -> None:
    """Random requests: over the groups, slots and pages are those of a rank that has all of them."""
    rng = random.Random(num_groups)
    blocks = 60 // num_groups
    columns = [
        [BlockAllocator(DeviceId(c * num_groups + g), blocks + rng.randrange(5)) for g in range(num_groups)]
        for c in range(num_stages)
    ]
    pool = PagePool(columns)
    config = ShardConfig(
        pool.num_pages, SIZE, num_stages=num_stages, max_model_len=100, max_num_seqs=6, max_num_batched_tokens=40
    )
    scheduler = ShardScheduler(config, pool)
    mirrors = [[TableMirror(6, 25, SIZE, c, g) for g in range(num_groups)] for c in range(num_stages)]
    flight: list[Plan] = []
    copies = 0
    for index in range(120):
        if index % 6 == 0:
            prompt = tuple(rng.choices(range(3), k=rng.randrange(1, 70)))
            params = SamplingParams(seed=0, max_tokens=rng.randrange(1, 20), n=rng.choice([1, 3]))
            scheduler.add(Request(f"r{index}", prompt, params, ()))
        plan = scheduler.schedule()
        if plan is not None:
            flight.append(plan)
            tables = {s.slot: s.table for s in scheduler.running}
            for column, ranks in enumerate(mirrors):
                taken = [rank.copies(plan) for rank in ranks]
                moves = sum(a != b for a, b in zip(plan.copy_from, plan.copy_to, strict=True))
                assert sum(len(source) for source, _ in taken) + moves == len(plan.copy_from)
                copies += len(plan.copy_from)
                for rank in ranks:
                    rank.apply(plan)
                batches = [rank.batch(plan, (0, 9)) for rank in ranks]
                slots = list(zip(*(batch.slots.tolist() for batch in batches), strict=True))
                assert all(sum(slot >= 0 for slot in found) == 1 for found in slots)
                for row, slot in enumerate(plan.slots):
                    table = tables[slot]
                    count = -(-(plan.first_position[row] + plan.query_start[row + 1] - plan.query_start[row]) // SIZE)
                    found = []
                    for group, batch in enumerate(batches):
                        pages = batch.pages[0]
                        start, end = pages.start[row : row + 2].tolist()
                        named = zip(pages.position[start:end].tolist(), pages.block[start:end].tolist(), strict=True)
                        found += [(position // SIZE, (column * num_groups + group, block)) for position, block in named]
                    expected = [(int(device), int(block)) for device, block in table.entries(column)[:count]]
                    own = {i: places for i, places in enumerate(expected) if i not in swapped(scheduler, slot)}
                    assert {i: place for i, place in sorted(found) if i in own} == own and len(found) == count
        if flight and (plan is None or len(flight) == num_stages):
            done = flight.pop(0)
            scheduler.retire(StepResult(done.number, array("i", rng.choices(range(3), k=len(done.sample_row)))))
    assert copies > 0


def swapped(scheduler: ShardScheduler, slot: int) -> set[int]:
    """Pages of equal content that the ranks hear of with the next row."""
    return {index for s in scheduler.running if s.slot == slot for index in s.resend}

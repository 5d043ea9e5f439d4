"""Laws of a pool of several columns and groups: a page lies in one group, the same in every column; copies stay in
their group while it has room; pages move; a group's room is that of its smallest column; pages come to rest in order
across groups."""

from __future__ import annotations

import copy
from array import array
from typing import Any

import pytest

from pagetable.allocator import BlockAllocator, BlockState
from pagetable.balance import even_out
from pagetable.block_table import BlockTable
from pagetable.errors import InvariantBroken, OutOfBlocks, WrongState
from pagetable.ids import DeviceId, LogicalPageId, PlanNumber
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE
from pagetable.sampling import Request, SamplingParams
from worker.config import ShardConfig
from worker.events import Journal, page_load
from worker.plan import StepResult
from worker.scheduler import ShardScheduler

Page = LogicalPageId
PLAN = PlanNumber(1)


def pool_of(*columns: tuple[int, ...], first: int = 10) -> PagePool:
    """Device ids count up from `first` by column, then group."""
    groups = len(columns[0])
    return PagePool(
        [
            [BlockAllocator(DeviceId(first + c * groups + g), blocks) for g, blocks in enumerate(column)]
            for c, column in enumerate(columns)
        ]
    )


def books(pool: PagePool, *tables: BlockTable) -> list[Any]:
    own = {name: value for name, value in vars(pool).items() if name not in ("columns", "tree", "order")}
    allocators = [vars(allocator) for column in pool.columns for allocator in column]
    held = [(t.num_tokens, list(t.pages), t.held[:]) for t in tables]
    return copy.deepcopy([own, vars(pool.tree), list(pool.order), allocators, held])


def table_of(pool: PagePool, num_tokens: int, size: int = 1) -> BlockTable:
    """A table of published pages."""
    table = BlockTable(pool, size)
    table.append(num_tokens, PLAN)
    for page in table:
        pool.publish(page)
    return table


def seal(table: BlockTable, name: str) -> None:
    for index, page in enumerate(table.pages):
        parent = Page(table.pages[index - 1]) if index else NO_PAGE
        assert table.pool.seal(Page(page), f"{name}{index}".encode(), parent) == page


def fill(pool: PagePool, group: int) -> list[Page]:
    """Take all that the group can hold."""
    return [page for _ in range(pool.free_in(group)) for page in pool.allocate(1, (), None, group)]


# Where pages lie


def test_a_group_holds_what_its_smallest_column_can() -> None:
    pool = pool_of((5, 3, 9), (4, 7, 9))
    assert (pool.num_columns, pool.num_groups, pool.num_pages, pool.num_free) == (2, 3, 16, 16)
    assert [pool.free_in(group) for group in range(3)] == [4, 3, 9]


@pytest.mark.parametrize("columns", [[], [[]]])
def test_a_pool_without_a_group_is_refused(columns: list[list[BlockAllocator]]) -> None:
    with pytest.raises((ValueError, IndexError)):
        PagePool(columns)


def test_columns_of_unlike_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[2, 1\] groups"):
        PagePool([[BlockAllocator(DeviceId(0), 4), BlockAllocator(DeviceId(1), 4)], [BlockAllocator(DeviceId(2), 4)]])


def test_a_page_lies_in_one_group_under_a_block_of_each_column() -> None:
    pool = pool_of((16, 16), (24, 24))
    table = table_of(pool, 4)
    assert pool.groups(table.pages) == [0, 1, 0, 1]
    assert table.entries(0) == [(10, 0), (11, 0), (10, 1), (11, 1)]
    other = table_of(pool, 2)  # starts a chunk of its own in each pool
    assert (other.entries(0), other.entries(1)) == ([(10, 8), (11, 8)], [(12, 8), (13, 8)])
    table.append(3, PLAN)
    assert table.entries(0)[4:] == [(10, 2), (11, 2), (10, 3)], "within a group it goes on behind its last block"
    assert table.entries(1)[4:] == [(12, 2), (13, 2), (12, 3)]


def test_pages_given_at_once_are_runs_in_each_group() -> None:
    pool = pool_of((32, 32, 32))
    table = table_of(pool, 20)
    for group in range(3):
        blocks = [block for device, block in table.entries() if device == 10 + group]
        assert blocks == list(range(len(blocks))) and len(blocks) in (6, 7)


def test_what_is_attended_counts_every_user_of_every_page() -> None:
    pool = pool_of((16, 16))
    table = table_of(pool, 3)
    assert pool.attended == [2, 1]
    seal(table, "t")
    fork, other = table.fork(3), BlockTable(pool, 1)
    other.adopt(list(table)[:2])
    assert (pool.attended, table.held, fork.held, other.held) == ([5, 3], [2, 1], [2, 1], [1, 1])
    other.append(3, PLAN)
    assert (pool.attended, other.held) == ([6, 5], [2, 3])
    pool.check([list(t) for t in (table, fork, other)])
    for each in (table, fork, other):
        each.free()
    assert pool.attended == [0, 0] and pool.num_free + len(pool.order) == 32


# Copies


def test_a_copy_lies_in_the_group_of_its_source() -> None:
    pool = pool_of((6, 6), (8, 6))
    table = table_of(pool, 7, size=4)  # groups 0, 1
    children = [table.fork(7) for _ in range(3)]
    for child in children:
        found = child.append(1, PLAN)
        assert found is not None and pool.groups(found) == [1, 1]
    assert [child.held for child in children] == [[1, 1]] * 3
    assert pool.groups(table.pages) == [0, 1] and pool.attended == [4, 4]


def test_a_copy_without_room_in_its_group_goes_to_another() -> None:
    pool = pool_of((6, 6), (8, 6))
    table = table_of(pool, 7, size=4)
    child = table.fork(7)
    taken = fill(pool, 1)
    found = child.append(1, PLAN)
    assert found is not None and pool.groups(found) == [1, 0]
    assert (child.held, table.held, pool.attended) == ([2, 0], [1, 1], [3, 6])
    pool.check([list(table), list(child), *([page] for page in taken)])


def test_a_copy_evicts_a_cached_page_of_its_group() -> None:
    pool = pool_of((6, 6))
    cached, table = table_of(pool, 12, size=4), table_of(pool, 3, size=4)
    seal(cached, "c")
    child = table.fork(3)
    assert [pool.groups(t.pages) for t in (cached, table)] == [[0, 1, 0], [1]]
    fill(pool, 1)
    first = Page(cached.pages[0])
    cached.free()
    found = child.append(1, PLAN)
    assert found is not None and pool.groups(found) == [1, 1]
    assert (pool.num_evictions, list(pool.order)) == (2, [first]), "leaves went before what they hang on"


# Moves


def test_a_moved_page_has_blocks_of_the_other_group_and_leaves_its_own_with_the_plan() -> None:
    pool = pool_of((6, 6), (8, 6))
    table = table_of(pool, 3)
    seal(table, "s")
    page = Page(table.pages[2])
    assert pool.groups(table.pages) == [0, 1, 0] and table.entries(1) == [(12, 0), (13, 0), (12, 1)]
    table.move(2, 1, PlanNumber(7))
    assert table.entries(1) == [(12, 0), (13, 0), (13, 1)], "behind the table's last block there"
    assert (table.held, pool.attended, pool.users(page)) == ([1, 2], [1, 2], 1)
    assert pool.tree.match([b"s0", b"s1", b"s2"]) == list(table), "others find it where it is now"
    assert (pool.free_in(0), pool.num_retiring, pool.num_used) == (4, 1, 4)
    pool.publish(page)
    pool.check([list(table)])
    pool.retire(PlanNumber(7))
    assert (pool.free_in(0), pool.free_in(1), pool.num_retiring) == (5, 4, 0)
    pool.check([list(table)])
    table.free()
    assert len(pool.order) == 3 and pool.flush() == 3 and pool.num_free == 12
    pool.check([])


def test_only_a_page_that_is_there_and_has_one_user_is_moved() -> None:
    pool = pool_of((6, 6))
    table, fresh = table_of(pool, 2), BlockTable(pool, 1)
    fresh.append(1, PLAN)
    child, pinned = table.fork(1), table_of(pool, 1)
    seal(pinned, "p")
    pool.pin(Page(pinned.pages[0]))
    before = books(pool, table, fresh, child, pinned)
    for owner in (table, fresh, pinned):
        page = Page(owner.pages[0])
        assert not pool.may_move(page)
        with pytest.raises(WrongState, match=f"page {page} cannot be moved"):
            owner.move(0, 1 - pool.group(page), PLAN)
    with pytest.raises(WrongState, match="from group 1 to group 1"):
        table.move(1, 1, PLAN)
    taken = fill(pool, 0)
    before = books(pool, table, fresh, child, pinned)
    with pytest.raises(OutOfBlocks, match="group 0"):
        table.move(1, 0, PLAN)
    assert books(pool, table, fresh, child, pinned) == before
    pool.check([list(each) for each in (table, fresh, child, pinned)] + [[page] for page in taken])


def test_a_move_evicts_a_cached_page_of_the_other_group() -> None:
    pool = pool_of((6, 6))
    cached, table = table_of(pool, 1), table_of(pool, 3)
    seal(cached, "c")
    assert pool.groups(table.pages) == [1, 0, 1]
    taken = fill(pool, 0)
    cached.free()
    table.move(0, 0, PLAN)
    assert (table.held, pool.num_evictions) == ([2, 1], 1)
    pool.check([list(table), *([page] for page in taken)])


def test_what_a_plan_attends_is_evened_out_of_the_least_even_tables() -> None:
    pool = pool_of((40, 40, 40))
    tables = [table_of(pool, 9) for _ in range(4)]
    for table in tables[:3]:
        table.move(2, 0, PLAN)
    tables[3].move(1, 0, PLAN)
    for page in (*(table.pages[2] for table in tables[:3]), tables[3].pages[1]):
        pool.publish(Page(page))
    assert [sum(column) for column in zip(*(t.held for t in tables), strict=True)] == [16, 11, 9]
    moves = even_out(tables, PlanNumber(2))
    assert [(move.source, move.target) for move in moves] == [(0, 2), (0, 2), (0, 1)]
    assert len({move.row for move in moves}) == 3 and all(tables[move.row].held == [3, 3, 3] for move in moves)
    assert even_out(tables, PlanNumber(2)) == [] and even_out([], PLAN) == []


# Room and eviction


def test_pages_go_to_the_next_best_group_where_the_best_is_full() -> None:
    pool = pool_of((3, 20), (20, 20))
    table = table_of(pool, 12)
    assert table.held == [3, 9] and pool.num_available == 11
    with pytest.raises(OutOfBlocks, match="12 pages needed, 11 available of 23"):
        table.append(12, PLAN)
    table.append(11, PLAN)
    assert (table.held, pool.num_available) == ([3, 20], 0)


def test_cached_pages_are_evicted_for_the_best_group() -> None:
    pool = pool_of((4, 4))
    cached = table_of(pool, 6)
    seal(cached, "c")
    cached.free()
    assert [pool.free_in(group) for group in (0, 1)] == [1, 1]
    table = table_of(pool, 4)
    assert table.held == [2, 2] and pool.num_evictions == 2 and len(pool.order) == 4


def test_a_cache_is_not_emptied_for_evenness() -> None:
    """The only cached page of the best group is the last that LRU gives up: the page goes to the other group."""
    pool = pool_of((2, 100))
    keep = table_of(pool, 1)
    assert pool.group(Page(keep.pages[0])) == 1  # the one with more room
    left = fill(pool, 0)
    cached = BlockTable(pool, 1)
    cached.append(60, PLAN)
    for page in (*cached, *left):
        pool.publish(page)
    seal(cached, "c")
    cached.free()
    pool.seal(left[0], b"late", NO_PAGE)
    pool.free(left[0])
    assert (len(pool.order), list(pool.order)[-1]) == (61, left[0])
    table = table_of(pool, 10)
    assert (table.held, pool.num_evictions) == ([0, 10], 0)
    assert len(pool.allocate(pool.num_available)) == 90, "all that is available can be had"


def test_a_page_rests_after_those_behind_it_in_other_groups() -> None:
    pool = pool_of((8, 8, 8), (8, 8, 8))
    tables = [table_of(pool, count) for count in (5, 3, 4)]
    for name, table in zip("abc", tables, strict=True):
        seal(table, name)
    orders = [list(table.pages) for table in tables]
    for table in tables:
        table.free(after=PlanNumber(2))
    assert (pool.num_retiring, len(pool.order), pool.attended) == (12, 0, [0, 0, 0])
    pool.retire(PlanNumber(2))
    assert list(pool.order) == [page for order in orders for page in reversed(order)]
    pool.check([])
    assert pool.flush() == 12


def test_check_finds_wrong_counts_by_group() -> None:
    pool = pool_of((8, 8))
    table = table_of(pool, 3)
    pool.attended[1] += 1
    with pytest.raises(InvariantBroken, match="attended by group"):
        pool.check([list(table)])
    pool.attended[1] -= 1
    table.held[0] -= 1
    with pytest.raises(InvariantBroken, match="pages by group"):
        table.check()


def test_check_finds_a_page_whose_columns_differ() -> None:
    pool = pool_of((8, 8), (8, 8))
    table = table_of(pool, 3)
    pool.columns[1][0].share(pool.ref(Page(table.pages[0]), 1))
    with pytest.raises(InvariantBroken, match="2 users in the books, 1 tables"):
        pool.check([list(table)])


# The scheduler over groups


class Shard:
    """A scheduler whose every sampled token is 7."""

    def __init__(self, pool: PagePool, **settings: Any) -> None:
        options: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        options |= {"max_model_len": 4 * pool.num_pages, **settings}
        self.pool = pool
        self.scheduler = ShardScheduler(ShardConfig(num_blocks=pool.num_pages, **options), pool)

    def add(self, name: str, prompt: list[int], max_tokens: int = 8, n: int = 1) -> None:
        self.scheduler.add(Request(name, tuple(prompt), SamplingParams(seed=0, max_tokens=max_tokens, n=n), ()))

    def step(self) -> Any:
        plan = self.scheduler.schedule()
        assert plan is not None
        self.scheduler.retire(StepResult(plan.number, array("i", [7] * len(plan.sample_row))))
        self.scheduler.check()
        return plan


def test_a_plan_says_group_and_blocks_of_every_column() -> None:
    shard = Shard(pool_of((9, 9), (12, 9), (9, 20)))
    shard.add("r", list(range(10)), n=2)
    plan = shard.step()
    assert list(plan.table_group) == [0, 1, 0]
    table = shard.scheduler.running[0].table
    assert [list(blocks) for blocks in plan.table_blocks] == [[b for _, b in table.entries(c)] for c in range(3)]
    plan = shard.step()
    assert list(plan.table_group) == [0, 0, 1, 0]  # the first sample's copy; the second one's table
    assert (list(plan.copy_from), list(plan.copy_to), [len(blocks) for blocks in plan.copy_sources]) == (
        [0],
        [0],
        [1, 1, 1],
    )
    first, second = (s.table for s in shard.scheduler.running)
    for column in range(3):
        ends = {first.entries(column)[2][1], second.entries(column)[2][1]}
        assert {plan.copy_sources[column][0], plan.copy_targets[column][0]} == ends


def test_a_decode_whose_copy_has_no_room_in_its_group_has_it_in_another() -> None:
    pool = pool_of((9, 9))
    shard = Shard(pool, max_num_seqs=4)
    shard.add("r", list(range(10)), n=3)
    shard.step()
    running = shard.scheduler.running
    assert [pool.groups(s.table.pages) for s in running] == [[0, 1, 0]] * 3
    taken = fill(pool, 0)
    plan = shard.scheduler.schedule()
    assert plan is not None and (list(plan.copy_from), list(plan.copy_to)) == ([0, 0], [1, 1])
    assert list(plan.query_start) == [0, 1, 2, 3], "no token is computed again"
    shard.scheduler.retire(StepResult(plan.number, array("i", [7, 7, 7])))
    for page in taken:
        pool.free(page)


def test_nobody_finds_a_page_that_a_failed_plan_was_to_move() -> None:
    shard = Shard(pool_of((60, 60), (60, 70)))
    prompt = list(range(34))
    shard.add("r", prompt, max_tokens=20)
    shard.step()
    table = shard.scheduler.running[0].table
    for index in (1, 3):
        table.move(index, 0, PLAN)
        shard.pool.publish(Page(table.pages[index]))
    assert table.held == [7, 2]
    plan = shard.scheduler.schedule()
    assert plan is not None and (list(plan.copy_from), list(plan.copy_to)) == ([0, 0], [1, 1])
    first = min(plan.table_index)
    assert 0 < first < 8
    (ended,) = shard.scheduler.abandon("planted")
    shard.scheduler.check()
    assert ended.request_id == "r" and shard.pool.num_used == 0
    shard.add("again", prompt)
    assert shard.step().num_tokens == len(prompt) - 4 * first


@pytest.mark.parametrize("sizes", [(1, 9), (5, 5), (3, 3, 4)])
def test_a_request_that_needs_the_whole_pool_gets_it(sizes: tuple[int, ...]) -> None:
    shard = Shard(pool_of(sizes), max_num_seqs=2)
    shard.add("whole", list(range(20)), max_tokens=20)
    shard.add("other", list(range(50, 60)), max_tokens=4)
    while shard.scheduler.has_work:
        shard.step()
    assert shard.pool.num_used == 0 and shard.pool.num_available == 10


def test_events_name_the_device_of_the_first_column_and_the_group() -> None:
    pool = pool_of((9, 9), (12, 9))
    shard = Shard(pool)
    journal = Journal(shard.scheduler, epoch=1)
    journal.begin()
    shard.add("r", list(range(17)))
    plan = shard.scheduler.schedule()
    assert plan is not None
    journal.record(plan)
    events = journal.take(page_load(pool))
    assert events is not None
    entries = list(zip(events.entry_device, events.entry_block, strict=True))
    assert entries == shard.scheduler.running[0].table.entries() and {d for d, _ in entries} == {10, 11}
    load = events.load
    assert (load.free_blocks, load.used_blocks, load.cached_blocks, load.allocations) == (13, 5, 0, 5)


def test_states_agree_over_columns_and_groups() -> None:
    pool = pool_of((4, 4), (6, 4))
    table = BlockTable(pool, 1)
    table.append(3, PLAN)
    for state, call in ((BlockState.RESERVED, None), (BlockState.LIVE, pool.publish)):
        for page in table:
            if call is not None:
                call(page)
            for column in (0, 1):
                allocator = pool.columns[column][pool.group(page)]
                assert allocator.state(pool.block(page, column)) == state

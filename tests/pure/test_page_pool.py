"""The laws of PagePool: a page lives in all columns or in none, cached leaves go least recently used first, pinned
pages stay, and a refused call changes nothing in any column."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pagetable.allocator import BlockAllocator, BlockState
from pagetable.errors import InvariantBroken, OutOfBlocks, PageError, StalePage, WrongState
from pagetable.ids import DeviceId, LogicalPageId, PlanNumber
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE

FREE, RESERVED, LIVE, CACHED, QUARANTINED, BAD = BlockState
Page = LogicalPageId
NEVER = Page(7)  # a page that no test allocates


def two_columns(first: int = 12, second: int = 20) -> PagePool:
    return PagePool([[BlockAllocator(DeviceId(4), first)], [BlockAllocator(DeviceId(9), second)]])


def snapshot(pool: PagePool) -> list[Any]:
    """All that the pool and its parts hold, by value."""
    own = {name: value for name, value in vars(pool).items() if name not in ("columns", "tree", "order")}
    return copy.deepcopy([own, vars(pool.tree), list(pool.order), *(vars(allocator) for (allocator,) in pool.columns)])


def states(pool: PagePool, page: Page) -> list[BlockState]:
    return [column.state(pool.block(page, index)) for index, (column,) in enumerate(pool.columns)]


def refused(pool: PagePool, error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    before = snapshot(pool)
    with pytest.raises(error):
        call()
    assert snapshot(pool) == before, "a refused call changed something"


def chain(pool: PagePool, names: str, shared: tuple[Page, ...] = ()) -> list[Page]:
    """A table of sealed, LIVE pages, `names[i]` the content of page i; the first ones are another table's, shared."""
    pages = list(shared)
    for page in shared:
        pool.share(page)
    for name in names[len(shared) :]:
        (page,) = pool.allocate(1, pages)
        assert pool.seal(page, name.encode(), pages[-1] if pages else NO_PAGE) == page
        pool.publish(page)
        pages.append(page)
    return pages


def give_up(pool: PagePool, table: list[Page], after: int = 0) -> None:
    for page in reversed(table):
        pool.free(page, PlanNumber(after))


def fork(pool: PagePool) -> tuple[Page, Page, Page, Page]:
    """root - A - B and root - A - C, all cached: root = 0, A = 1, B = 2, C = 3."""
    left = chain(pool, "rAB")
    right = chain(pool, "rAC", (left[0], left[1]))
    give_up(pool, left)
    give_up(pool, right)
    assert (left, right) == ([0, 1, 2], [0, 1, 3])
    pool.check([])
    return left[0], left[1], left[2], right[2]


# Columns


def test_a_pool_has_as_many_pages_as_its_smallest_column_has_blocks() -> None:
    assert [two_columns(*sizes).num_pages for sizes in ((12, 20), (20, 12), (1, 5))] == [12, 12, 1]


def test_a_page_is_in_the_same_state_with_the_same_users_in_every_column() -> None:
    pool = two_columns()
    (page,) = pool.allocate()
    seen = [states(pool, page)]
    for call in (pool.publish, pool.share, pool.free):
        call(page)
        seen.append(states(pool, page))
        assert [column.users(pool.ref(page, i)) for i, (column,) in enumerate(pool.columns)] == [pool.users(page)] * 2
    pool.seal(page, b"r", NO_PAGE)
    pool.free(page)
    seen.append(states(pool, page))
    pool.flush()
    seen.append(states(pool, page))
    assert seen == [[RESERVED] * 2, [LIVE] * 2, [LIVE] * 2, [LIVE] * 2, [CACHED] * 2, [FREE] * 2]
    assert [column.num_free for (column,) in pool.columns] == [12, 20]


def test_each_column_places_a_page_by_its_own_runs() -> None:
    pool = two_columns()
    first, second, third = pool.allocate()[0], pool.allocate()[0], pool.allocate()[0]
    assert [pool.place(p, 0) for p in (first, second, third)] == [(4, 0), (4, 8), (4, 9)]
    assert [pool.place(p, 1) for p in (first, second, third)] == [(9, 0), (9, 8), (9, 16)]
    assert pool.place(third) == (4, 9)  # the first column, where none is named
    behind = pool.allocate(2, [first])
    assert behind == [3, 4]
    assert [[pool.block(p, column) for p in behind] for column in (0, 1)] == [[1, 2], [1, 2]]


def test_page_ids_are_given_from_zero_and_the_last_one_freed_is_given_next() -> None:
    pool = two_columns()
    assert pool.allocate(3) == [0, 1, 2]
    pool.free(Page(0))
    pool.free(Page(2))
    assert pool.allocate(3) == [2, 0, 3]


def test_the_gauges_count_pages_used_retiring_and_available() -> None:
    pool = two_columns()
    table = chain(pool, "rAB")
    pool.allocate()
    assert (pool.num_used, pool.num_retiring, pool.num_available) == (4, 0, 8)
    give_up(pool, table, after=1)
    assert (pool.num_used, pool.num_retiring, pool.num_available) == (4, 3, 8)
    pool.retire(PlanNumber(1))
    assert (pool.num_used, pool.num_retiring, pool.num_available) == (1, 0, 11)
    pool.pin(table[1])
    assert (pool.num_used, pool.num_available) == (1, 9)


# Eviction


def test_cached_leaves_go_least_recently_used_first_and_a_page_never_before_those_behind_it() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    assert list(pool.order) == [b, c, a, root]


def test_using_a_prefix_again_makes_it_and_all_before_it_the_last_to_go() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    table = [root, a, b]
    for page in table:
        pool.share(page)
    assert list(pool.order) == [c]
    pool.check([table])
    give_up(pool, table)
    assert list(pool.order) == [c, b, a, root]


def test_allocate_evicts_no_more_than_it_needs_and_in_exactly_that_order() -> None:
    pool = two_columns(6, 9)
    root, a, b, c = fork(pool)
    assert pool.allocate(2) == [4, 5]  # the free ones first
    assert (pool.num_evictions, list(pool.order)) == (0, [b, c, a, root])
    assert pool.allocate() == [b]  # one page: its blocks and its number are given again
    assert (pool.num_evictions, list(pool.order)) == (1, [c, a, root])
    assert pool.tree.match([b"r", b"A", b"B"]) == [root, a]
    assert pool.tree.match([b"r", b"A", b"C"]) == [root, a, c]
    assert pool.allocate(2) == [a, c]
    assert (pool.num_evictions, list(pool.order), pool.tree.match([b"r", b"A"])) == (3, [root], [root])
    pool.check([[Page(4), Page(5), b, a, c]])


def test_the_smallest_column_decides_when_pages_are_evicted() -> None:
    pool = two_columns(20, 4)
    fork(pool)
    assert [column.num_free for (column,) in pool.columns] == [16, 0]
    pool.allocate()
    assert (pool.num_evictions, [column.num_free for (column,) in pool.columns]) == (1, [16, 0])


@pytest.mark.parametrize("used", [0, 3])
def test_out_of_blocks_changes_nothing_in_any_column(used: int) -> None:
    pool = two_columns(6, 9)
    fork(pool)  # two free pages, four that can be evicted
    table = pool.allocate(used)
    refused(pool, OutOfBlocks, lambda: pool.allocate(7 - used))
    refused(pool, OutOfBlocks, lambda: pool.allocate(100))
    assert len(pool.allocate(6 - used)) == 6 - used
    assert (pool.num_available, pool.num_evictions, len(table)) == (0, 4, used)
    refused(pool, OutOfBlocks, pool.allocate)


def test_a_negative_count_is_refused_with_nothing_changed() -> None:
    pool = two_columns()
    refused(pool, (ValueError, PageError), lambda: pool.allocate(-1))


def test_flush_evicts_all_that_is_cached_and_not_pinned() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    used = pool.allocate()
    pool.pin(b)
    assert pool.flush() == 1
    assert sorted(pool.tree) == [root, a, b]
    pool.unpin(b)
    assert (pool.flush(), pool.flush(), len(pool.tree), pool.num_evictions) == (3, 0, 0, 4)
    pool.check([used])
    assert [column.num_free for (column,) in pool.columns] == [11, 19]
    assert c not in pool.tree


# Pins


def test_a_pinned_page_and_all_before_it_are_never_evicted() -> None:
    pool = two_columns(6, 9)
    root, a, b, c = fork(pool)
    pool.pin(b)
    assert (list(pool.order), pool.num_available) == ([c], 3)
    refused(pool, OutOfBlocks, lambda: pool.allocate(4))
    pages = pool.allocate(3)
    assert pages == [3, 4, 5]
    assert pool.tree.match([b"r", b"A", b"B"]) == [root, a, b]
    pool.check([pages])
    pool.unpin(b)
    assert list(pool.order) == [b, a, root]
    pool.check([pages])


def test_an_unpinned_page_goes_to_the_end_of_the_order() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    pool.pin(b)
    pool.unpin(b)
    assert list(pool.order) == [c, b, a, root]


def test_a_page_is_evicted_only_after_the_last_of_its_pins_and_of_those_behind_it() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    for page in (b, c, c, a):
        pool.pin(page)
    seen = []
    for page in (c, a, b, c):
        pool.unpin(page)
        seen.append(list(pool.order))
        pool.check([])
    assert seen == [[], [], [b], [b, c, a, root]]


def test_a_pinned_page_may_be_used_and_given_up_and_stays() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    pool.pin(a)
    for page in (root, a, b):
        pool.share(page)
    give_up(pool, [root, a, b])
    assert list(pool.order) == [c, b]
    pool.unpin(a)
    assert list(pool.order) == [c, b, a, root]


def test_only_sealed_pages_are_pinned_and_only_pinned_pages_unpinned() -> None:
    pool = two_columns()
    root, _, b, _ = fork(pool)
    (fresh,) = pool.allocate()
    for page in (fresh, NEVER, NO_PAGE):
        refused(pool, WrongState, partial(pool.pin, page))
        refused(pool, WrongState, partial(pool.unpin, page))
    refused(pool, WrongState, lambda: pool.unpin(b))
    pool.pin(root)
    refused(pool, WrongState, lambda: pool.unpin(b))


def test_a_page_that_only_those_behind_it_hold_is_not_unpinned() -> None:
    pool = two_columns()
    _, a, b, _ = fork(pool)
    pool.pin(b)
    refused(pool, WrongState, lambda: pool.unpin(a))


# Seal and drop


def test_seal_returns_the_page_that_holds_the_content_already() -> None:
    pool = two_columns()
    first, second = pool.allocate(2)
    assert pool.seal(first, b"r", NO_PAGE) == first
    before = snapshot(pool)
    assert pool.seal(second, b"r", NO_PAGE) == first
    assert pool.seal(first, b"r", NO_PAGE) == first
    assert snapshot(pool) == before
    assert [pool.sealed(first), pool.sealed(second), pool.writable(first), pool.writable(second)] == [
        True,
        False,
        False,
        True,
    ]


def test_a_sealed_page_is_found_before_it_is_published_and_can_be_shared_then() -> None:
    pool = two_columns()
    (page,) = pool.allocate()
    pool.seal(page, b"r", NO_PAGE)
    assert (pool.tree.match([b"r"]), states(pool, page)) == ([page], [RESERVED] * 2)
    pool.share(page)
    assert pool.users(page) == 2


def test_seal_refuses_a_parent_outside_the_tree_and_a_page_with_another_content() -> None:
    pool = two_columns()
    first, second = pool.allocate(2)
    refused(pool, WrongState, lambda: pool.seal(second, b"A", first))
    pool.seal(first, b"r", NO_PAGE)
    refused(pool, WrongState, lambda: pool.seal(first, b"other", NO_PAGE))
    assert pool.seal(second, b"A", first) == second


def test_seal_refuses_a_page_that_nobody_allocated() -> None:
    pool = two_columns()
    refused(pool, PageError, lambda: pool.seal(NEVER, b"r", NO_PAGE))
    assert pool.tree.match([b"r"]) == []


def test_seal_refuses_a_page_that_several_tables_hold() -> None:
    pool = two_columns()
    left = pool.allocate(2)
    for page in left:
        pool.share(page)
    (first,) = chain(pool, "r")
    right = [pool.seal(left[0], b"r", NO_PAGE), left[1]]
    assert right == [first, left[1]]
    pool.share(first)
    pool.free(left[0])
    refused(pool, WrongState, lambda: pool.seal(left[1], b"A", first))


def test_a_dropped_page_stays_with_its_users_and_nobody_finds_it() -> None:
    pool = two_columns()
    table = chain(pool, "rA")
    pool.drop(table[1])
    assert (pool.tree.match([b"r", b"A"]), pool.users(table[1]), pool.writable(table[1])) == ([table[0]], 1, True)
    pool.check([table])
    give_up(pool, table)
    assert (states(pool, table[1]), states(pool, table[0])) == ([FREE] * 2, [CACHED] * 2)


def test_a_dropped_page_without_users_is_free_at_once() -> None:
    pool = two_columns()
    root, a, b, c = fork(pool)
    pool.drop(b)
    assert (states(pool, b), list(pool.order), pool.num_available, pool.num_evictions) == (
        [FREE] * 2,
        [c, a, root],
        12,
        0,
    )
    pool.check([])
    assert pool.allocate() == [b]


def test_a_page_dropped_while_it_waits_for_a_plan_is_free_when_the_plan_retires() -> None:
    pool = two_columns()
    table = chain(pool, "rA")
    give_up(pool, table, after=1)
    pool.drop(table[1])
    assert states(pool, table[1]) == [LIVE] * 2
    pool.retire(PlanNumber(1))
    assert (states(pool, table[1]), list(pool.order)) == ([FREE] * 2, [table[0]])
    pool.check([])


def test_a_page_with_others_behind_it_is_not_dropped() -> None:
    pool = two_columns()
    root, a, _, _ = fork(pool)
    refused(pool, WrongState, lambda: pool.drop(a))
    refused(pool, WrongState, lambda: pool.drop(root))


def test_a_page_outside_the_tree_is_not_dropped() -> None:
    pool = two_columns()
    (page,) = pool.allocate()
    refused(pool, PageError, lambda: pool.drop(page))


@pytest.mark.parametrize("used", [False, True])
def test_a_pinned_page_is_not_dropped(used: bool) -> None:
    pool = two_columns()
    _, a, b, _ = fork(pool)
    pool.pin(b)
    if used:
        for page in (Page(0), a, b):
            pool.share(page)
    refused(pool, WrongState, lambda: pool.drop(b))
    pool.unpin(b)
    pool.drop(b)
    assert not pool.sealed(b)


def test_the_log_tells_of_every_page_that_can_be_found_from_now_on_or_no_longer() -> None:
    pool = two_columns()
    pool.log = []
    _, a, b, _ = fork(pool)
    assert pool.log == [(True, b"r"), (True, b"A"), (True, b"B"), (True, b"C")]
    pool.log.clear()
    pool.seal(pool.allocate()[0], b"C", a)  # found: nothing new
    pool.drop(b)
    pool.flush()
    assert pool.log == [(False, b"B"), (False, b"C"), (False, b"A"), (False, b"r")]


def test_a_refused_drop_is_not_logged() -> None:
    pool = two_columns()
    root, a, _, _ = fork(pool)
    pool.log = []
    refused(pool, WrongState, lambda: pool.drop(a))
    refused(pool, WrongState, lambda: pool.drop(root))


# Users and plans


def test_a_page_given_up_comes_to_rest_with_its_last_plan() -> None:
    pool = two_columns()
    table = chain(pool, "rA")
    (tail,) = pool.allocate(1, table)
    give_up(pool, [*table, tail], after=2)
    pool.retire(PlanNumber(1))
    assert (states(pool, tail), list(pool.order), pool.num_available) == ([RESERVED] * 2, [], 9)
    pool.check([])
    pool.retire(PlanNumber(2))
    assert (states(pool, tail), list(pool.order)) == ([FREE] * 2, [table[1], table[0]])
    pool.check([])


def test_a_retiring_page_shared_again_is_not_evicted() -> None:
    pool = two_columns()
    table = chain(pool, "rA")
    give_up(pool, table, after=2)
    pool.share(table[0])
    pool.retire(PlanNumber(2))
    assert list(pool.order) == [table[1]]
    pool.check([table[:1]])


def test_a_page_rests_after_those_behind_it_also_when_several_plans_retire_at_once() -> None:
    pool = two_columns()
    left = chain(pool, "rA")
    right = [left[0], *pool.allocate()]
    pool.share(left[0])
    give_up(pool, right, after=7)
    give_up(pool, left, after=6)
    pool.retire(PlanNumber(7))
    assert list(pool.order) == [left[1], left[0]]
    pool.check([])
    assert pool.flush() == 2


def test_free_and_share_of_a_page_without_users_are_refused() -> None:
    pool = two_columns()
    (page,) = pool.allocate()
    pool.free(page)
    for call in (pool.free, pool.share, pool.publish):
        refused(pool, StalePage, partial(call, page))
        refused(pool, StalePage, partial(call, NEVER))
    (cached,) = chain(pool, "r")
    pool.free(cached)
    refused(pool, WrongState, lambda: pool.free(cached))
    refused(pool, WrongState, lambda: pool.publish(cached))


def test_no_page_is_none_of_the_pages() -> None:
    pool = two_columns(6, 9)
    table = pool.allocate(6)
    for call in (pool.share, pool.free, pool.publish, pool.users):
        refused(pool, PageError, partial(call, NO_PAGE))
    pool.check([table])


# check()


@pytest.mark.parametrize(
    ("name", "tables", "text"),
    [
        ("a table too few", [[0, 1, 2]], "page 0: 2 users in the books, 1 tables"),
        ("a table too many", [[0, 1, 2], [0, 3], [3]], "page 3: 1 users in the books, 2 tables"),
        ("a table of a cached page", [[0, 1, 2], [0, 3], [4]], "page 4: 0 users in the books, 1 tables"),
        ("a table of a free page", [[0, 1, 2], [0, 3], [5]], "page 5 is not allocated but used"),
        ("a page twice in a table", [[0, 1, 1, 2], [0, 3]], "twice in one table"),
        ("a table of no page", [[0, 1, 2], [0, 3, 99]], "99"),
    ],
)
def test_check_recounts_the_users_of_every_page(name: str, tables: list[list[Page]], text: str) -> None:
    pool = sample()
    pool.check([[Page(0), Page(1), Page(2)], [Page(0), Page(3)]])
    with pytest.raises(InvariantBroken, match=text):
        pool.check(tables)


def sample() -> PagePool:
    """Pages 0 (sealed), 1 (sealed) and 2 in one table, 0 and 3 in another; 4 cached; the rest free."""
    pool = two_columns()
    left = chain(pool, "rA")
    left += pool.allocate(1, left)
    pool.share(left[0])
    right = pool.allocate()
    give_up(pool, chain(pool, "x"))
    assert (left, right, list(pool.order)) == ([0, 1, 2], [3], [4])
    return pool


def move_to_live(pool: PagePool, column: int, page: int) -> None:
    pool.columns[column][0].publish(pool.ref(Page(page), column))


def one_more_user(pool: PagePool) -> None:
    pool.columns[1][0].share(pool.ref(Page(2), 1))


def forget_a_column(pool: PagePool) -> None:
    pool.columns[1][0].free(pool.ref(Page(2), 1))


def cut_the_tree(pool: PagePool) -> None:
    pool.tree.remove(Page(4))


DAMAGE: dict[str, tuple[Callable[[PagePool], object], str]] = {
    "a column's books": (lambda pool: pool.columns[1][0].counts.__setitem__(LIVE, 9), "device 9: counts differ"),
    "the tree": (lambda pool: pool.tree._children.clear(), "prefix tree: child counts"),
    "the order": (lambda pool: pool.order._pages.update({Page(0): None, Page(1): None}), "stands before its child"),
    "a sealed page listed as not allocated": (
        lambda pool: pool._unused.append(Page(4)),
        "page 4 is not allocated but used",
    ),
    "a page with one more user in one column": (one_more_user, "page 2: 2 users in the books, 1 tables"),
    "a page in two states": (lambda pool: move_to_live(pool, 1, 2), "page 2 is in different states"),
    "a block that names no page": (
        lambda pool: pool._owner[0].__setitem__(pool.block(Page(3)), -1),
        "page 3: its block names page -1",
    ),
    "a block that names another page": (
        lambda pool: pool._owner[0].__setitem__(pool.block(Page(3)), 2),
        "its block names page 2",
    ),
    "a cached page that is never evicted": (
        lambda pool: pool.order.victim(),
        "page 4: eviction order and state disagree",
    ),
    "a used page that may be evicted": (
        lambda pool: pool.order.add(Page(1)),
        "page 1: eviction order and state disagree",
    ),
    "a pinned page that may be evicted": (
        lambda pool: pool._pins.__setitem__(4, 1),
        "page 4: eviction order and state disagree",
    ),
    "a page freed in one column": (forget_a_column, "page 2"),
    "a free page that is not listed": (lambda pool: pool._unused.pop(), "page 5"),
    "a page listed twice as not allocated": (lambda pool: pool._unused.append(pool._unused[-1]), "twice"),
    "a cached page that nobody finds": (cut_the_tree, "page 4"),
    "a sealed page that is not kept": (lambda pool: pool.columns[0][0].keep(pool.ref(Page(1)), False), "page 1"),
    "a kept page that is not sealed": (lambda pool: pool.columns[0][0].keep(pool.ref(Page(2)), True), "page 2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_planted_damage(name: str) -> None:
    pool = sample()
    tables = [[Page(0), Page(1), Page(2)], [Page(0), Page(3)]]
    pool.check(tables)
    plant, text = DAMAGE[name]
    plant(pool)
    with pytest.raises(InvariantBroken, match=text):
        pool.check(tables)

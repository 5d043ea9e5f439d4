"""The laws of BlockTable: which pages a sequence has, when the last one is copied, and that no content ever changes.

At the end a state machine plays several tables over one pool of two columns and up to three groups against plain
lists: what is read back through a table is always what its sequence wrote, however pages were shared, copied, sealed,
swapped or evicted.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagetable.allocator import NO_PLAN, BlockAllocator
from pagetable.block_table import BlockTable
from pagetable.errors import InvariantBroken, OutOfBlocks, PageError, StalePage, WrongState
from pagetable.ids import DeviceId, LogicalPageId, PlanNumber
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE, extend_digests, root_digest

Page = LogicalPageId
PLAN = PlanNumber(1)
SIZE = 4

# The same examples in every run; to search further, drop derandomize here and raise max_examples.
LAWS = settings(deadline=None, derandomize=True, max_examples=150)


def pool_of(num_blocks: int) -> PagePool:
    return PagePool([[BlockAllocator(DeviceId(0), num_blocks)], [BlockAllocator(DeviceId(1), num_blocks + 5)]])


def table_of(pool: PagePool, num_tokens: int) -> BlockTable:
    table = BlockTable(pool, SIZE)
    table.append(num_tokens, PLAN)
    return table


def seal(table: BlockTable, pages: int, name: str = "") -> None:
    """Seal the first pages under digests made of `name`."""
    for index in range(pages):
        parent = Page(table.pages[index - 1]) if index else NO_PAGE
        table.pool.seal(Page(table.pages[index]), f"{name}{index}".encode(), parent)


def snapshot(*tables: BlockTable) -> list[Any]:
    pool = tables[0].pool
    own = {name: value for name, value in vars(pool).items() if name not in ("columns", "tree", "order")}
    allocators = [vars(allocator) for column in pool.columns for allocator in column]
    books = [own, vars(pool.tree), list(pool.order), allocators]
    return copy.deepcopy([books, [(table.num_tokens, list(table.pages), table.held[:]) for table in tables]])


def check(*tables: BlockTable) -> None:
    tables[0].pool.check([list(table) for table in tables])
    for table in tables:
        table.check()


def refused(
    error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object], *tables: BlockTable
) -> None:
    before = snapshot(*tables)
    with pytest.raises(error):
        call()
    assert snapshot(*tables) == before, "a refused call changed something"


# Append


@pytest.mark.parametrize(
    ("num_tokens", "pages"), [(0, []), (1, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 1]), (9, [0, 1, 2])]
)
def test_a_table_has_just_as_many_pages_as_its_tokens_need(num_tokens: int, pages: list[int]) -> None:
    table = BlockTable(pool_of(8), SIZE)
    assert table.missing(num_tokens) == len(pages)
    assert table.append(num_tokens, PLAN) is None
    assert (list(table), len(table), table.num_tokens) == (pages, len(pages), num_tokens)
    check(table)


def test_tokens_fill_the_last_page_before_a_new_one_is_taken() -> None:
    table = BlockTable(pool_of(8), SIZE)
    seen = []
    for _ in range(9):
        table.append(1, PLAN)
        seen.append(list(table))
    assert seen == [[0]] * 4 + [[0, 1]] * 4 + [[0, 1, 2]]


def test_two_tables_grow_in_runs_of_their_own() -> None:
    pool = pool_of(24)
    one, other = table_of(pool, 2 * SIZE), table_of(pool, SIZE)
    one.append(SIZE, PLAN)
    other.append(2 * SIZE, PLAN)
    assert one.entries() == [(0, 0), (0, 1), (0, 2)]
    assert other.entries() == [(0, 8), (0, 9), (0, 10)]
    assert other.entries(column=1) == [(1, 8), (1, 9), (1, 10)]
    check(one, other)


def test_append_without_room_changes_nothing() -> None:
    pool = pool_of(3)
    table = table_of(pool, 6)
    child = table.fork(6)
    refused(OutOfBlocks, lambda: table.append(7, PLAN), table, child)  # a copy and one page
    assert table.append(2, PLAN) == (1, 2)  # the copy alone fits
    refused(OutOfBlocks, lambda: table.append(1, PLAN), table, child)
    refused(OutOfBlocks, lambda: child.append(100, PLAN), table, child)
    check(table, child)


@pytest.mark.parametrize("num_tokens", [-1, -4, -9])
def test_a_negative_number_of_tokens_is_refused(num_tokens: int) -> None:
    table = table_of(pool_of(8), 8)
    refused((ValueError, PageError), lambda: table.append(num_tokens, PLAN), table)


# Fork and copy on write


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, []), (1, [0]), (4, [0]), (5, [0, 1]), (6, [0, 1])])
def test_a_fork_shares_the_pages_of_its_tokens_and_takes_none(num_tokens: int, pages: list[int]) -> None:
    table = table_of(pool_of(8), 6)
    child = table.fork(num_tokens)
    assert (list(child), child.num_tokens, child.block_size) == (pages, num_tokens, SIZE)
    assert [table.pool.users(page) for page in table] == [1 + (page in pages) for page in (0, 1)]
    assert table.pool.num_available == 6
    check(table, child)


@pytest.mark.parametrize("num_tokens", [-1, 7])
def test_a_fork_beyond_the_tokens_is_refused(num_tokens: int) -> None:
    table = table_of(pool_of(8), 6)
    refused(WrongState, lambda: table.fork(num_tokens), table)


def test_the_first_to_write_copies_the_partial_last_page_and_only_that() -> None:
    table = table_of(pool_of(8), 10)
    child = table.fork(10)
    assert [child.missing(n) for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert child.append(1, PLAN) == (2, 3)
    assert (list(table), list(child)) == ([0, 1, 2], [0, 1, 3])
    assert [table.pool.users(Page(page)) for page in range(4)] == [2, 2, 1, 1]
    check(table, child)


def test_the_last_sharer_writes_in_place_without_a_copy() -> None:
    table = table_of(pool_of(8), 10)
    children = [table.fork(10), table.fork(10)]
    assert children[0].append(1, PLAN) == (2, 3)
    assert table.append(1, PLAN) == (2, 4)
    assert children[1].missing(2) == 0
    assert children[1].append(2, PLAN) is None
    assert [list(t) for t in (table, *children)] == [[0, 1, 4], [0, 1, 3], [0, 1, 2]]
    check(table, *children)


def test_the_copy_and_the_pages_behind_it_stand_in_order() -> None:
    table = table_of(pool_of(8), 6)
    child = table.fork(5)
    assert child.missing(12) == 4
    assert child.append(12, PLAN) == (1, 2)
    assert list(child) == [0, 2, 3, 4, 5]
    check(table, child)


def test_full_pages_are_never_copied() -> None:
    table = table_of(pool_of(8), 8)
    child = table.fork(8)
    assert child.append(1, PLAN) is None
    assert table.append(1, PLAN) is None
    assert (list(table), list(child)) == ([0, 1, 3], [0, 1, 2])
    check(table, child)


def test_a_sealed_tail_is_copied_even_with_one_user() -> None:
    table = table_of(pool_of(8), 8)
    seal(table, 2)
    table.trim(7)
    assert (table.pool.users(Page(1)), table.missing(1)) == (1, 1)
    assert table.append(1, PlanNumber(3)) == (1, 2)
    assert list(table) == [0, 2]
    assert table.pool.tree.match([b"0", b"1"]) == [0, 1]  # others still find the old content
    assert (table.pool.num_retiring, list(table.pool.order)) == (1, [])
    table.pool.retire(PlanNumber(3))  # the copy's source rests when the plan that copies is over
    assert list(table.pool.order) == [1]
    check(table)


def test_the_source_of_a_copy_is_kept_until_the_plan_that_copies_retires() -> None:
    pool = pool_of(2)
    table = table_of(pool, 3)
    child = table.fork(3)
    assert child.append(1, PlanNumber(5)) == (0, 1)
    table.free()
    assert (pool.num_available, pool.num_retiring) == (0, 1)
    pool.retire(PlanNumber(5))
    assert (pool.num_available, pool.num_retiring) == (1, 0)
    check(child)


def test_a_fork_of_a_fork_copies_its_own() -> None:
    table = table_of(pool_of(8), 6)
    child = table.fork(6)
    grandchild = child.fork(6)
    assert [t.append(1, PLAN) for t in (grandchild, child, table)] == [(1, 2), (1, 3), None]
    check(table, child, grandchild)


# Trim, free, swap


@pytest.mark.parametrize(
    ("num_tokens", "pages"), [(10, [0, 1, 2]), (9, [0, 1, 2]), (8, [0, 1]), (5, [0, 1]), (1, [0]), (0, [])]
)
def test_trim_gives_up_the_pages_behind_the_tokens_that_stay(num_tokens: int, pages: list[int]) -> None:
    table = table_of(pool_of(8), 10)
    table.trim(num_tokens)
    assert (list(table), table.num_tokens, table.pool.num_available) == (pages, num_tokens, 8 - len(pages))
    check(table)


@pytest.mark.parametrize("num_tokens", [-1, 11])
def test_a_trim_beyond_the_tokens_is_refused(num_tokens: int) -> None:
    table = table_of(pool_of(8), 10)
    refused(WrongState, lambda: table.trim(num_tokens), table)


def test_a_table_is_freed_from_its_end_so_that_leaves_go_first() -> None:
    table = table_of(pool_of(8), 10)
    seal(table, 2)
    table.free()
    assert (len(table), table.num_tokens, list(table.pool.order), table.pool.num_used) == (0, 0, [1, 0], 0)
    check(table)
    table.free()  # nothing is left to give up
    assert table.append(1, PLAN) is None


def test_pages_given_up_wait_for_the_plan_that_named_them() -> None:
    pool = pool_of(3)
    table = table_of(pool, 12)
    table.trim(5, PlanNumber(2))
    assert (pool.num_available, pool.num_retiring) == (0, 1)
    table.free(PlanNumber(3))
    pool.retire(PlanNumber(2))
    assert (pool.num_available, pool.num_retiring) == (1, 2)
    pool.retire(PlanNumber(3))
    assert (pool.num_available, pool.num_retiring) == (3, 0)


def test_a_page_of_equal_content_is_swapped_in_and_the_own_one_given_up() -> None:
    pool = pool_of(8)
    table, other = table_of(pool, 6), table_of(pool, 6)
    seal(table, 1)
    found = pool.seal(Page(other.pages[0]), b"0", NO_PAGE)
    assert found == 0
    other.swap(0, found, PlanNumber(4))
    assert (list(table), list(other), pool.users(Page(0))) == ([0, 1], [0, 3], 2)
    assert (pool.num_retiring, pool.num_available) == (1, 4)
    pool.retire(PlanNumber(4))
    assert pool.num_available == 5
    check(table, other)


def test_a_swap_for_a_page_that_is_gone_is_refused() -> None:
    pool = pool_of(8)
    table = table_of(pool, 6)
    gone = pool.allocate()[0]
    pool.free(gone)
    refused(StalePage, lambda: table.swap(0, gone, PLAN), table)


def test_a_swap_beyond_the_table_changes_nothing() -> None:
    pool = pool_of(8)
    table, other = table_of(pool, 4), table_of(pool, 4)
    refused((IndexError, PageError), lambda: table.swap(1, Page(other.pages[0]), PLAN), table, other)


# Adopt


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_matched_pages_are_adopted_at_a_page_boundary(num_tokens: int) -> None:
    pool = pool_of(8)
    first = table_of(pool, 12)
    seal(first, 3)
    second = first.fork(num_tokens)
    matched = pool.tree.match([b"0", b"1", b"2"])[num_tokens // SIZE :]
    second.adopt(matched)
    assert (list(second), second.num_tokens, pool.num_available) == ([0, 1, 2], 12, 5)
    assert second.append(1, PLAN) is None
    assert list(second) == [0, 1, 2, 3]
    check(first, second)


def test_cached_pages_are_adopted_out_of_the_eviction_order() -> None:
    pool = pool_of(8)
    first = table_of(pool, 12)
    seal(first, 3)
    first.free()
    assert list(pool.order) == [2, 1, 0]
    second = BlockTable(pool, SIZE)
    second.adopt(pool.tree.match([b"0", b"1"]))
    assert (list(second), list(pool.order)) == ([0, 1], [2])
    check(first, second)


@pytest.mark.parametrize("num_tokens", [1, 3, 5])
def test_nothing_is_adopted_behind_a_partial_page(num_tokens: int) -> None:
    pool = pool_of(8)
    first, second = table_of(pool, 8), table_of(pool, num_tokens)
    seal(first, 2)
    refused(WrongState, lambda: second.adopt([Page(0)]), first, second)
    refused(WrongState, lambda: second.adopt([]), first, second)


def test_a_refused_adoption_changes_nothing() -> None:
    pool = pool_of(8)
    first, second = table_of(pool, 8), BlockTable(pool, SIZE)
    refused(StalePage, lambda: second.adopt([Page(0), Page(1), Page(7)]), first, second)


# Missing and check


@LAWS
@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 12), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_missing_is_exactly_what_append_allocates(steps: list[tuple[int, bool, int, bool]], block_size: int) -> None:
    pool = pool_of(64)
    table = BlockTable(pool, block_size)
    forks: list[BlockTable] = []
    for count, forked, cut, sealed in steps:
        missing, before = table.missing(count), pool.columns[0][0].num_allocations
        table.append(count, PLAN)
        assert pool.columns[0][0].num_allocations - before == missing
        full = table.num_tokens // block_size
        if sealed and full and pool.writable(Page(table.pages[full - 1])):
            parent = Page(table.pages[full - 2]) if full > 1 else NO_PAGE
            if parent == NO_PAGE or pool.sealed(parent):
                pool.seal(Page(table.pages[full - 1]), b"%d" % len(pool.tree), parent)
        if forked:
            forks.append(table.fork(table.num_tokens))
        table.trim(max(0, table.num_tokens - cut))
        check(table, *forks)


@pytest.mark.parametrize(("num_tokens", "text"), [(4, "2 pages for 4 tokens"), (9, "2 pages for 9 tokens")])
def test_check_finds_a_table_that_is_too_long_or_too_short(num_tokens: int, text: str) -> None:
    table = table_of(pool_of(8), 6)
    table.num_tokens = num_tokens
    with pytest.raises(InvariantBroken, match=text):
        table.check()


# The machine


@dataclass(eq=False)
class Text:
    """A sequence: its table and its tokens; `contents[i]` is equal in two sequences exactly where tokens 0..i are."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    last_plan: PlanNumber = NO_PLAN


# One rule with weights: rules of their own would each be switched off in half of the examples, `append` too.
WEIGHTS = {"append": 9, "seal": 4, "retire": 4, "fork": 3, "trim": 2, "free": 2, "adopt": 2}
STEPS = [call for call, weight in WEIGHTS.items() for _ in range(weight)]
STEPS += ["adopt_inside_a_page", "pin", "unpin", "drop", "flush"]
MOST = 6  # tables at a time


class TableMachine(RuleBasedStateMachine):
    """Each append is a plan of its own, in flight until a `retire`; a block is scribbled over when it is handed out."""

    @initialize(
        sizes=st.sampled_from(
            [((24,), (17,)), ((11,), (16,)), ((6,), (6,)), ((40,), (48,)), ((9, 8), (7, 8)), ((3, 12), (5, 9))]
            + [((12, 12, 12), (16, 14, 12)), ((3, 2, 2), (2, 2, 4))]
        ),
        size=st.sampled_from([4, 1, 2, 3]),
    )
    def begin(self, sizes: tuple[tuple[int, ...], ...], size: int) -> None:
        columns = [
            [BlockAllocator(DeviceId(c * len(groups) + g), blocks) for g, blocks in enumerate(groups)]
            for c, groups in enumerate(sizes)
        ]
        self.pool = PagePool(columns)
        self.size = size
        self.texts = [Text(BlockTable(self.pool, size))]
        self.history: list[list[int]] = []  # tokens of tables that are freed
        self.pins: list[Page] = []
        self.names: dict[tuple[int, int], int] = {}  # (content before, token) -> content
        self.store: dict[tuple[int, int], list[int]] = {}  # (device, block) -> contents
        self.plan = PlanNumber(1)
        self.in_flight: dict[PlanNumber, tuple[list[Page], set[tuple[int, int]]]] = {}  # fresh pages, blocks named

    @rule(
        call=st.sampled_from(STEPS),
        pick=st.integers(0, 99),
        number=st.integers(0, 7),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7),
    )
    def step(self, call: str, pick: int, number: int, tokens: list[int]) -> None:
        text = self.texts[pick % len(self.texts)]
        if call == "append":
            if number == 0 and len(self.texts) < MOST:
                text = Text(BlockTable(self.pool, self.size))
                self.texts.append(text)
            self.append(text, tokens)
            if number % 2:
                self.seal(text)
        elif call in ("fork", "trim"):
            getattr(self, call)(text, max(0, len(text.tokens) - number // 2))
        elif call == "adopt":
            self.adopt((self.history + [t.tokens for t in self.texts])[-1 - pick % 12 :][0], number)
        elif call in ("seal", "free", "adopt_inside_a_page"):
            getattr(self, call)(text)
        elif call in ("pin", "drop") and len(self.pool.tree):
            getattr(self, call)(list(self.pool.tree)[pick % len(self.pool.tree)])
        elif call == "unpin" and self.pins:
            self.pool.unpin(self.pins.pop(pick % len(self.pins)))
        elif call == "retire" and self.in_flight:
            self.retire(1 + number // 3)
        elif call == "flush":
            self.pool.flush()
            assert len(self.pool.order) == 0

    def digests(self, tokens: list[int]) -> list[bytes]:
        digests: list[bytes] = []
        extend_digests(digests, root_digest(b"machine"), array("i", tokens), self.size, len(tokens) // self.size)
        return digests

    def places(self, page: Page) -> list[tuple[int, int]]:
        return [self.pool.place(page, column) for column in (0, 1)]

    def append(self, text: Text, tokens: list[int]) -> None:
        table, missing, old = text.table, text.table.missing(len(tokens)), list(text.table)
        if missing > self.pool.num_available:
            refused(OutOfBlocks, lambda: table.append(len(tokens), self.plan), table)
            return
        allocations = sum(allocator.num_allocations for allocator in self.pool.columns[0])
        copied = table.append(len(tokens), self.plan)
        fresh = [page for page in table if page not in old]
        allocations = sum(allocator.num_allocations for allocator in self.pool.columns[0]) - allocations
        assert len(fresh) == missing == allocations
        named = {place for page in table for place in self.places(page)}
        for place in (place for page in fresh for place in self.places(page)):
            assert not any(place in busy for _, busy in self.in_flight.values()), "a plan in flight names the block"
            self.store[place] = [-self.plan] * self.size
        if copied is not None:
            assert copied == (old[-1], fresh[0]) and len(text.tokens) % self.size
            assert self.pool.group(copied[0]) == self.pool.group(copied[1])
            for source, target in zip(self.places(copied[0]), self.places(copied[1]), strict=True):
                self.store[target] = self.store[source][:]
                named.add(source)
        for token in tokens:
            index, offset = divmod(len(text.tokens), self.size)
            content = self.names.setdefault((text.contents[-1] if text.contents else 0, token), len(self.names) + 1)
            text.tokens.append(token)
            text.contents.append(content)
            for place in self.places(Page(table.pages[index])):
                self.store[place][offset] = content
        self.in_flight[self.plan] = fresh, named
        text.last_plan = self.plan
        self.plan = PlanNumber(self.plan + 1)

    def retire(self, count: int) -> None:
        for plan in list(self.in_flight)[:count]:
            for page in self.in_flight.pop(plan)[0]:
                self.pool.publish(page)
        self.pool.retire(plan)

    def fork(self, text: Text, length: int) -> None:
        if len(self.texts) < MOST:
            child = text.table.fork(length)
            self.texts.append(Text(child, text.tokens[:length], text.contents[:length], text.last_plan))

    def trim(self, text: Text, length: int) -> None:
        text.table.trim(length, text.last_plan)
        del text.tokens[length:], text.contents[length:]

    def free(self, text: Text) -> None:
        if len(self.texts) > 1:
            self.texts.remove(text)
            self.history.append(text.tokens)
            text.table.free(text.last_plan)
            assert len(text.table) == 0

    def seal(self, text: Text) -> None:
        table = text.table
        for index, digest in enumerate(self.digests(text.tokens)):
            page = Page(table.pages[index])
            if not self.pool.sealed(page):
                parent = Page(table.pages[index - 1]) if index else NO_PAGE
                if self.pool.users(page) > 1 and self.pool.tree.find(digest) == NO_PAGE:
                    refused(WrongState, lambda: self.pool.seal(page, digest, parent), table)  # noqa: B023
                    return
                found = self.pool.seal(page, digest, parent)
                if found != page:
                    table.swap(index, found, text.last_plan)
            page = Page(table.pages[index])
            assert self.pool.tree.digest(page) == digest and not self.pool.writable(page)

    def adopt(self, tokens: list[int], number: int) -> None:
        matched = self.pool.tree.match(self.digests(tokens[: len(tokens) - number // 2]))
        if not matched or len(self.texts) == MOST:
            return
        text = Text(BlockTable(self.pool, self.size))
        self.texts.append(text)
        text.table.adopt(matched[: number % 3])
        text.table.adopt(matched[number % 3 :])
        for token in tokens[: len(matched) * self.size]:
            text.tokens.append(token)
            text.contents.append(self.names[text.contents[-1] if text.contents else 0, token])

    def adopt_inside_a_page(self, text: Text) -> None:
        if text.table.num_tokens % self.size:
            refused(WrongState, lambda: text.table.adopt(list(self.pool.tree)[:1]), text.table)

    def pin(self, page: Page) -> None:
        self.pins.append(page)
        self.pool.pin(page)

    def drop(self, page: Page) -> None:
        if self.pool.tree.num_children(page) or page in self.pins:
            refused(WrongState, lambda: self.pool.drop(page), self.texts[0].table)
        else:
            self.pool.drop(page)
            assert not self.pool.sealed(page)

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        self.pool.check([list(text.table) for text in self.texts])
        for text in self.texts:
            text.table.check()
            assert text.table.num_tokens == len(text.tokens)
            for column in (0, 1):
                read = [content for place in text.table.entries(column) for content in self.store[place]]
                assert read[: len(text.contents)] == text.contents

    @invariant()
    def a_sealed_page_holds_what_its_digest_says(self) -> None:
        for text in self.texts:
            for page, digest in zip(text.table, self.digests(text.tokens), strict=False):
                assert not self.pool.sealed(page) or self.pool.tree.digest(page) == digest

    @invariant()
    def pinned_pages_and_all_before_them_stay(self) -> None:
        for pinned in self.pins:
            assert not any(page in self.pool.order for page in self.pool.tree.path(pinned))

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for page in self.pins:
            self.pool.unpin(page)
        for text in self.texts:
            text.table.free(text.last_plan)
        self.pool.retire(self.plan)
        self.pool.check([])
        self.pool.flush()
        self.pool.check([])
        assert (len(self.pool.tree), self.pool.num_used, self.pool.num_available) == (0, 0, self.pool.num_pages)
        for allocator in (allocator for column in self.pool.columns for allocator in column):
            assert allocator.counts == [allocator.num_blocks, 0, 0, 0, 0, 0]
            assert allocator.num_allocations == allocator.num_frees


TableMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=50)
TestTableMachine = TableMachine.TestCase

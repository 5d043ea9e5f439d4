"""Logical pages: the record of one page over all columns, and the pool that owns them.

A logical page stands for the same tokens in every column (pipeline stage). It is allocated, shared, evicted and freed
in all columns or in none. In each column it lies in the same group, one of the KV devices that the column's pages are
spread over:

                group 0     group 1          page -> group, and a block id per column
    column 0   device 0    device 1
    column 1   device 2    device 3          pools may differ: a group holds what its smallest column can

Tables hold logical page ids; where the bytes are stands here, once, so that moving a page changes this record and not
the tables of its users.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

from pagetable.allocator import NO_BLOCK, NO_PLAN, BlockAllocator, BlockState
from pagetable.errors import InvariantBroken, OutOfBlocks, StalePage, WrongState
from pagetable.eviction import LruOrder
from pagetable.ids import BlockId, DeviceId, LogicalPageId, PageRef, PlanNumber, block_of, device_of
from pagetable.placement import spread
from pagetable.prefix_tree import NO_PAGE, PrefixTree

_NO_OWNER = LogicalPageId(-1)
_FREE = BlockState.FREE
# New pages may cost so many evictions per group beyond their number before they go to other groups than the best: a
# cache lies about evenly, so that each group comes up after a few; where it does not, evenness is not worth the cache.
_REACH = 4


class PagePool:
    """The logical pages of one shard, their blocks in each column, the prefix tree over them and its eviction.

    All of a shard's page state is changed here and nowhere else. A call that raises has changed nothing.
    """

    def __init__(self, columns: Sequence[Sequence[BlockAllocator]]) -> None:
        """Args:
        columns: the allocators, by column and group; every column has as many groups.
        """
        self.columns = tuple(map(tuple, columns))
        self.num_groups = len(self.columns[0])
        if not self.num_groups or any(len(column) != self.num_groups for column in self.columns):
            raise ValueError(f"columns: got {list(map(len, self.columns))} groups, must be equal and at least 1")
        self.tree = PrefixTree()
        self.order = LruOrder()
        self.num_evictions = 0
        self.attended = [0] * self.num_groups  # users summed over the pages of each group
        self.log: list[tuple[bool, bytes]] | None = None  # (sealed or forgotten, digest), for whoever reports it
        size: int = sum(min(a.num_blocks for a in group) for group in zip(*self.columns, strict=True))
        self._size = size
        # one more than pages, that NO_PAGE names: always stale
        self._refs = [array("Q", bytes(8 * (size + 1))) for _ in self.columns]
        self._group: array[int] = array("H", bytes(2 * (size + 1)))
        self._given_up = array("Q", bytes(8 * size))  # number of the call to `free` that named the page last
        self._num_given_up = 0
        self._pins = array("I", bytes(4 * size))  # of the page and of all behind it
        self._pinned: dict[LogicalPageId, int] = {}  # of the page alone
        # by group: block of column 0 -> logical page
        self._owner = [array("i", [_NO_OWNER]) * allocator.num_blocks for allocator in self.columns[0]]
        self._unused = [LogicalPageId(i) for i in reversed(range(size))]

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    @property
    def num_pages(self) -> int:
        """What all groups can hold; each holds what its smallest column can."""
        return self._size

    @property
    def num_free(self) -> int:
        """Pages that no table and no prefix holds: free blocks of the smallest columns."""
        if self.num_groups == 1:
            return self.free_in(0)
        return sum(map(self.free_in, range(self.num_groups)))

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give now: free ones and cached ones that may be evicted."""
        return self.num_free + len(self.order)

    @property
    def num_used(self) -> int:
        """Pages that some table holds or that wait for a plan to retire."""
        return sum(a.counts[BlockState.RESERVED] + a.counts[BlockState.LIVE] for a in self.columns[0])

    @property
    def num_retiring(self) -> int:
        """Unused pages that come to rest when the plans in flight retire."""
        return sum(allocator.num_retiring for allocator in self.columns[0])

    def free_in(self, group: int) -> int:
        """Pages that the group could take without evicting any."""
        if len(self.columns) == 1:
            return self.columns[0][group].counts[_FREE]
        return min([column[group].counts[_FREE] for column in self.columns])

    def has_room_in(self, group: int) -> bool:
        """Whether the group could take a page, evicting a few as needed."""
        return self._room(1)[group] > 0

    def group(self, page: LogicalPageId) -> int:
        """Where the page lies, in every column."""
        return self._group[page]

    def groups(self, pages: Iterable[int]) -> list[int]:
        group = self._group
        return [group[page] for page in pages]

    def ref(self, page: LogicalPageId, column: int = 0) -> PageRef:
        return PageRef(self._refs[column][page])

    def block(self, page: LogicalPageId, column: int = 0) -> BlockId:
        return block_of(PageRef(self._refs[column][page]))

    def blocks(self, pages: Iterable[int], column: int = 0) -> list[BlockId]:
        refs = self._refs[column]
        return [block_of(PageRef(refs[page])) for page in pages]

    def place(self, page: LogicalPageId, column: int = 0) -> tuple[DeviceId, BlockId]:
        """(device_id, block_id): where the page is, as people see it."""
        ref = self.ref(page, column)
        return device_of(ref), block_of(ref)

    def users(self, page: LogicalPageId) -> int:
        return self.columns[0][self._group[page]].users(self.ref(page))

    def writable(self, page: LogicalPageId) -> bool:
        return self.columns[0][self._group[page]].writable(PageRef(self._refs[0][page]))

    def allocate(
        self,
        count: int = 1,
        behind: Sequence[int] = (),
        held: Sequence[int] | None = None,
        first_in: int | None = None,
    ) -> list[LogicalPageId]:
        """`count` new pages with one user each, evicting cached pages as needed.

        Args:
            behind: the table that the pages are for; in each group they come behind its last one there where possible.
            held: its pages by group; counted here where None.
            first_in: the group that the first page must be in; the others are spread over all groups.

        Raises OutOfBlocks where fewer are available, or that group has no room.
        """
        if count < 0:
            raise ValueError(f"count: got {count}, must be 0 or more")
        if count > self.num_available:
            raise OutOfBlocks(f"{count} pages needed, {self.num_available} available of {self.num_pages}")
        if self.num_groups == 1:
            while self.free_in(0) < count:
                self._evict()
            pages = [self._unused.pop() for _ in range(count)]
            self._fill(pages, 0, behind)
            return pages
        groups = self._spread(count, behind, held, first_in)
        needs = [groups.count(group) for group in range(self.num_groups)]
        while any(self.free_in(group) < need for group, need in enumerate(needs)):
            self._evict()
        pages = [self._unused.pop() for _ in range(count)]
        for group, need in enumerate(needs):
            if need:
                self._fill([page for page, g in zip(pages, groups, strict=True) if g == group], group, behind)
        return pages

    def publish(self, page: LogicalPageId) -> None:
        """The plan that first writes the page has retired."""
        for allocator, ref in self._blocks(page):
            allocator.publish(ref)

    def share(self, page: LogicalPageId) -> None:
        """One more table holds the page."""
        group = self._group[page]
        for column, refs in zip(self.columns, self._refs, strict=True):
            column[group].share(PageRef(refs[page]))
        self.attended[group] += 1
        self.order.remove(page)

    def free(self, page: LogicalPageId, after: PlanNumber = NO_PLAN) -> None:
        """One table less holds the page; `after` is the last plan that names it for that table."""
        state, group = _FREE, self._group[page]
        for column, refs in zip(self.columns, self._refs, strict=True):
            state = column[group].free(PageRef(refs[page]), after)
        self.attended[group] -= 1
        if self.num_groups > 1:
            self._num_given_up += 1
            self._given_up[page] = self._num_given_up
        self._at_rest(page, state)

    def may_move(self, page: LogicalPageId) -> bool:
        """Whether `move` takes the page: one table holds it, its bytes are there, and no transfer works on it."""
        allocator, ref = next(self._blocks(page))
        return not self._pins[page] and allocator.users(ref) == 1 and allocator.state(block_of(ref)) == BlockState.LIVE

    def move(self, page: LogicalPageId, group: int, after: PlanNumber, behind: Sequence[int] = ()) -> None:
        """Give the page blocks of another group, RESERVED until `publish`; plan `after` copies its bytes to them.

        Args:
            behind: its table; the new blocks come behind its last ones in that group where possible.

        Raises WrongState where `may_move` says no or it lies there, OutOfBlocks where the group has no room.
        """
        old = self._group[page]
        if group == old or not self.may_move(page):
            raise WrongState(f"page {page} cannot be moved from group {old} to group {group}")
        if not self.has_room_in(group):
            raise OutOfBlocks(f"a page needed in group {group}, none available there")
        while not self.free_in(group):
            self._evict()
        self._owner[old][self.block(page)] = _NO_OWNER
        for allocator, ref in self._blocks(page):
            allocator.keep(ref, False)
            allocator.free(ref, after)
        self.attended[old] -= 1
        self._fill([page], group, behind)
        if page in self.tree:
            for allocator, ref in self._blocks(page):
                allocator.keep(ref, True)

    def retire(self, plan: PlanNumber) -> None:
        """Plan `plan` is over on every rank: what waited for it is cached or free now."""
        for allocator in chain.from_iterable(self.columns[1:]):
            allocator.retire(plan)
        rested = []
        for allocator, owner in zip(self.columns[0], self._owner, strict=True):
            for ref in allocator.retire(plan):
                block = block_of(ref)
                if owner[block] != _NO_OWNER:  # else its page has moved on
                    rested.append((LogicalPageId(owner[block]), allocator.state(block)))
        if self.num_groups > 1:  # a page rests behind those that hang on it, which may lie in another group
            rested.sort(key=lambda found: self._given_up[found[0]])
        for page, state in rested:
            self._at_rest(page, state)

    def seal(self, page: LogicalPageId, digest: bytes, parent: LogicalPageId) -> LogicalPageId:
        """The page is full and its tokens are committed: let others find it.

        `parent` is the page before it (NO_PAGE for the first), which must be in the tree. Returns `page`, or the page
        that already holds the same tokens behind the same prefix: the caller then swaps to it and frees its own.
        """
        found = self.tree.find(digest)
        if found != NO_PAGE:
            return found
        if self.users(page) != 1:  # two tables could hold it behind different copies of its prefix
            raise WrongState(f"page {page} is held by {self.users(page)} tables, not 1")
        self.tree.insert(page, digest, parent)
        if self.log is not None:
            self.log.append((True, digest))
        for allocator, ref in self._blocks(page):
            allocator.keep(ref, True)
        return page

    def sealed(self, page: LogicalPageId) -> bool:
        return page in self.tree

    def pin(self, page: LogicalPageId) -> None:
        """Keep the sealed page and all before it in its prefix from eviction until `unpin`."""
        if page not in self.tree:
            raise WrongState(f"page {page} is not in the prefix tree")
        self._pinned[page] = self._pinned.get(page, 0) + 1
        for held in self.tree.path(page):
            self._pins[held] += 1
            self.order.remove(held)
            for allocator, ref in self._blocks(held):
                allocator.pin(ref)

    def unpin(self, page: LogicalPageId) -> None:
        if page not in self._pinned:
            raise WrongState(f"page {page} is not pinned")
        self._pinned[page] -= 1
        if not self._pinned[page]:
            del self._pinned[page]
        for held in self.tree.path(page):  # from the leaf up: a child comes to rest before its parent
            self._pins[held] -= 1
            for allocator, ref in self._blocks(held):
                allocator.unpin(ref)
            self._at_rest(held, self._state(held))

    def flush(self) -> int:
        """Evict every cached page that is not pinned; returns how many."""
        count = len(self.order)
        for _ in range(count):
            self._evict()
        return count

    def drop(self, page: LogicalPageId) -> None:
        """Take a sealed leaf out of the tree (its bytes never came): its users keep it, nobody finds it any more."""
        if page in self._pinned:
            raise WrongState(f"page {page} is pinned")
        self._forget(page)
        if page in self.order:
            self.order.remove(page)
            self._recycle(page)

    def check(self, tables: Iterable[Sequence[LogicalPageId]]) -> None:
        """Recount users from all tables (D3, D5, D6) and check allocators, tree and eviction order."""
        for allocator in chain.from_iterable(self.columns):
            allocator.check()
        self.tree.check(tuple(self.order))
        users: dict[LogicalPageId, int] = {}
        attended = [0] * self.num_groups
        for table in tables:
            if len(set(table)) != len(table):
                raise InvariantBroken("a page stands twice in one table")
            for page in table:
                users[page] = users.get(page, 0) + 1
                attended[self._group[page] if 0 <= page < self._size else 0] += 1
        idle = set(self._unused)
        if len(idle) != len(self._unused):
            raise InvariantBroken("a page is listed twice as not allocated")
        if unknown := users.keys() - set(range(self._size)):
            raise InvariantBroken(f"a table holds pages {sorted(unknown)} of {self._size}")
        for page in map(LogicalPageId, range(self._size)):
            if page in idle:
                if page in users or page in self.tree:
                    raise InvariantBroken(f"page {page} is not allocated but used")
                continue
            states = set()
            for allocator, ref in self._blocks(page):
                try:
                    counted = allocator.users(ref)
                except StalePage as error:
                    raise InvariantBroken(f"page {page} is allocated, but {error}") from error
                if counted != users.get(page, 0):
                    raise InvariantBroken(f"page {page}: {counted} users in the books, {users.get(page, 0)} tables")
                states.add(allocator.state(block_of(ref)))
            if len(states) != 1:
                raise InvariantBroken(f"page {page} is in different states in different columns")
            owner = self._owner[self._group[page]][self.block(page)]
            if owner != page:
                raise InvariantBroken(f"page {page}: its block names page {owner}")
            if self.columns[0][self._group[page]].kept(self.ref(page)) != (page in self.tree):
                raise InvariantBroken(f"page {page}: kept and prefix tree disagree")
            rests = states == {BlockState.CACHED} and not self._pins[page]
            if rests != (page in self.order):
                raise InvariantBroken(f"page {page}: eviction order and state disagree")
        if attended != self.attended:
            raise InvariantBroken(f"pages attended by group: {self.attended} in the books, {attended} by the tables")

    def _blocks(self, page: LogicalPageId) -> Iterator[tuple[BlockAllocator, PageRef]]:
        """The page in each column."""
        group = self._group[page]
        for column, refs in zip(self.columns, self._refs, strict=True):
            yield column[group], PageRef(refs[page])

    def _state(self, page: LogicalPageId) -> BlockState:
        return self.columns[0][self._group[page]].state(self.block(page))

    def _room(self, count: int) -> list[int]:
        """By group, pages that it could take: free ones, and those soon evicted; `count` in all if so many are
        available."""
        room = list(map(self.free_in, range(self.num_groups)))
        if min(room) < count:
            for page in islice(self.order, count + _REACH * self.num_groups):
                room[self._group[page]] += 1
        return room

    def _spread(self, count: int, behind: Sequence[int], held: Sequence[int] | None, first_in: int | None) -> list[int]:
        """The groups of `count` new pages. Raises OutOfBlocks where there is no room in group `first_in`."""
        room = self._room(count)
        if held is None:
            lies = self.groups(behind)
            held = [lies.count(group) for group in range(self.num_groups)]
        if first_in is None:
            return spread(count, held, self.attended, room)
        if not room[first_in]:
            raise OutOfBlocks(f"a page needed in group {first_in}, none available there")
        room[first_in] -= 1
        return [first_in, *spread(count - 1, held, self.attended, room)]

    def _fill(self, pages: list[LogicalPageId], group: int, behind: Sequence[int]) -> None:
        """Give `pages` blocks of the group, which has room for them, behind the table's last page there."""
        near = NO_PAGE
        if behind:  # an even table has one of each group among its last pages
            last = behind[: -2 * self.num_groups - 1 : -1]
            near = next((LogicalPageId(p) for p in last if self._group[p] == group), NO_PAGE)
        for column, refs in zip(self.columns, self._refs, strict=True):
            block = block_of(PageRef(refs[near])) if near != NO_PAGE else NO_BLOCK
            for page, ref in zip(pages, column[group].allocate(len(pages), block), strict=True):
                refs[page] = ref
        refs, owner = self._refs[0], self._owner[group]
        for page in pages:
            self._group[page] = group
            owner[block_of(PageRef(refs[page]))] = page
        self.attended[group] += len(pages)

    def _at_rest(self, page: LogicalPageId, state: BlockState) -> None:
        if state == BlockState.CACHED:
            if not self._pins[page]:
                self.order.add(page)
        elif state == BlockState.FREE:
            self._recycle(page)

    def _evict(self) -> None:
        page = self.order.victim()
        self._forget(page)
        self._recycle(page)
        self.num_evictions += 1

    def _forget(self, page: LogicalPageId) -> None:
        digest = self.tree.remove(page)
        if self.log is not None:
            self.log.append((False, digest))
        for allocator, ref in self._blocks(page):
            allocator.keep(ref, False)

    def _recycle(self, page: LogicalPageId) -> None:
        self._owner[self._group[page]][self.block(page)] = _NO_OWNER
        self._unused.append(page)

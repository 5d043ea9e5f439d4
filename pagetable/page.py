"""Logical pages: the record of one page over all columns, and the pool that owns them.

A logical page stands for the same tokens in every column (pipeline stage). It is allocated, shared, evicted and freed
in all columns or in none. Tables hold logical page ids; where the bytes are stands here, once, so that moving a page
changes this record and not the tables of its users.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from pagetable.allocator import NO_BLOCK, NO_PLAN, BlockAllocator, BlockState
from pagetable.errors import InvariantBroken, OutOfBlocks, StalePage, WrongState
from pagetable.eviction import LruOrder
from pagetable.ids import BlockId, DeviceId, LogicalPageId, PageRef, PlanNumber, block_of, device_of
from pagetable.prefix_tree import NO_PAGE, PrefixTree

_NO_OWNER = LogicalPageId(-1)


class PagePool:
    """The logical pages of one shard, their blocks in each column, the prefix tree over them and its eviction.

    All of a shard's page state is changed here and nowhere else. A call that raises has changed nothing.
    """

    def __init__(self, columns: Sequence[BlockAllocator]) -> None:
        self.columns = tuple(columns)
        self.tree = PrefixTree()
        self.order = LruOrder()
        self.num_evictions = 0
        self.log: list[tuple[bool, bytes]] | None = None  # (sealed or forgotten, digest), for whoever reports it
        size = min(column.num_blocks for column in columns)
        self._refs = [array("Q", bytes(8 * (size + 1))) for _ in columns]  # one more, that NO_PAGE names: always stale
        self._pins = array("I", bytes(4 * size))  # of the page and of all behind it
        self._pinned: dict[LogicalPageId, int] = {}  # of the page alone
        self._owner = array("i", [_NO_OWNER]) * columns[0].num_blocks  # block of column 0 -> logical page
        self._unused = [LogicalPageId(i) for i in reversed(range(size))]
        self._size = size

    @property
    def num_pages(self) -> int:
        """What the smallest column can hold."""
        return self._size

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give now: free ones and cached ones that may be evicted."""
        return min(column.num_free for column in self.columns) + len(self.order)

    @property
    def num_used(self) -> int:
        """Pages that some table holds or that wait for a plan to retire."""
        counts = self.columns[0].counts
        return counts[BlockState.RESERVED] + counts[BlockState.LIVE]

    @property
    def num_retiring(self) -> int:
        """Unused pages that come to rest when the plans in flight retire."""
        return self.columns[0].num_retiring

    def ref(self, page: LogicalPageId, column: int = 0) -> PageRef:
        return PageRef(self._refs[column][page])

    def block(self, page: LogicalPageId, column: int = 0) -> BlockId:
        return block_of(PageRef(self._refs[column][page]))

    def place(self, page: LogicalPageId, column: int = 0) -> tuple[DeviceId, BlockId]:
        """(device_id, block_id): where the page is, as people see it."""
        ref = self.ref(page, column)
        return device_of(ref), block_of(ref)

    def users(self, page: LogicalPageId) -> int:
        return self.columns[0].users(self.ref(page))

    def writable(self, page: LogicalPageId) -> bool:
        return self.columns[0].writable(PageRef(self._refs[0][page]))

    def allocate(self, count: int = 1, near: LogicalPageId = NO_PAGE) -> list[LogicalPageId]:
        """`count` new pages with one user each, evicting cached pages as needed; behind page `near` where possible.

        Raises OutOfBlocks where fewer are available.
        """
        if count > self.num_available:
            raise OutOfBlocks(f"{count} pages needed, {self.num_available} available of {self.num_pages}")
        while any(column.num_free < count for column in self.columns):
            self._evict()
        pages = [self._unused.pop() for _ in range(count)]
        for index, column in enumerate(self.columns):
            refs = self._refs[index]
            behind = block_of(PageRef(refs[near])) if near != NO_PAGE else NO_BLOCK
            for page, ref in zip(pages, column.allocate(count, behind), strict=True):
                refs[page] = ref
        for page in pages:
            self._owner[block_of(PageRef(self._refs[0][page]))] = page
        return pages

    def publish(self, page: LogicalPageId) -> None:
        """The plan that first writes the page has retired."""
        for column, refs in zip(self.columns, self._refs, strict=True):
            column.publish(PageRef(refs[page]))

    def share(self, page: LogicalPageId) -> None:
        """One more table holds the page."""
        for column, refs in zip(self.columns, self._refs, strict=True):
            column.share(PageRef(refs[page]))
        self.order.remove(page)

    def free(self, page: LogicalPageId, after: PlanNumber = NO_PLAN) -> None:
        """One table less holds the page; `after` is the last plan that names it for that table."""
        state = BlockState.FREE
        for column, refs in zip(self.columns, self._refs, strict=True):
            state = column.free(PageRef(refs[page]), after)
        self._at_rest(page, state)

    def retire(self, plan: PlanNumber) -> None:
        """Plan `plan` is over on every rank: what waited for it is cached or free now."""
        for column in self.columns[1:]:
            column.retire(plan)
        for ref in self.columns[0].retire(plan):
            self._at_rest(LogicalPageId(self._owner[block_of(ref)]), self.columns[0].state(block_of(ref)))

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
        for column, refs in zip(self.columns, self._refs, strict=True):
            column.keep(PageRef(refs[page]), True)
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
            for column, refs in zip(self.columns, self._refs, strict=True):
                column.pin(PageRef(refs[held]))

    def unpin(self, page: LogicalPageId) -> None:
        if page not in self._pinned:
            raise WrongState(f"page {page} is not pinned")
        self._pinned[page] -= 1
        if not self._pinned[page]:
            del self._pinned[page]
        for held in self.tree.path(page):  # from the leaf up: a child comes to rest before its parent
            self._pins[held] -= 1
            for column, refs in zip(self.columns, self._refs, strict=True):
                column.unpin(PageRef(refs[held]))
            self._at_rest(held, self.columns[0].state(self.block(held)))

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
        for column in self.columns:
            column.check()
        self.tree.check(tuple(self.order))
        users: dict[LogicalPageId, int] = {}
        for table in tables:
            if len(set(table)) != len(table):
                raise InvariantBroken("a page stands twice in one table")
            for page in table:
                users[page] = users.get(page, 0) + 1
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
            for column, refs in zip(self.columns, self._refs, strict=True):
                ref = PageRef(refs[page])
                try:
                    counted = column.users(ref)
                except StalePage as error:
                    raise InvariantBroken(f"page {page} is allocated, but {error}") from error
                if counted != users.get(page, 0):
                    raise InvariantBroken(f"page {page}: {counted} users in the books, {users.get(page, 0)} tables")
                states.add(column.state(block_of(ref)))
            if len(states) != 1:
                raise InvariantBroken(f"page {page} is in different states in different columns")
            if self._owner[self.block(page)] != page:
                raise InvariantBroken(f"page {page}: its block names page {self._owner[self.block(page)]}")
            if self.columns[0].kept(self.ref(page)) != (page in self.tree):
                raise InvariantBroken(f"page {page}: kept and prefix tree disagree")
            rests = states == {BlockState.CACHED} and not self._pins[page]
            if rests != (page in self.order):
                raise InvariantBroken(f"page {page}: eviction order and state disagree")

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
        for column, refs in zip(self.columns, self._refs, strict=True):
            column.keep(PageRef(refs[page]), False)

    def _recycle(self, page: LogicalPageId) -> None:
        self._owner[self.block(page)] = _NO_OWNER
        self._unused.append(page)

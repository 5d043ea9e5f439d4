"""One sequence's pages in order: `table[i]` holds tokens `i * block_size .. (i + 1) * block_size`.

       sealed, maybe shared          shared or own          room
    |------------------------------|--------------|.................|
    0                              |        num_tokens          capacity
                                   start of the partial last page

Only the partial last page is ever written. Where it is shared (after a fork) the writer copies that one page first,
within its group while that has room, which costs no exchange between ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from pagetable.allocator import NO_PLAN
from pagetable.errors import InvariantBroken, PageError, WrongState
from pagetable.ids import BlockId, DeviceId, LogicalPageId, PlanNumber
from pagetable.page import PagePool


class BlockTable:
    """Logical pages of one sequence. It owns one user's share of each page that it lists.

    Attributes:
        held: how many of its pages lie in each group; kept only where there are several.
    """

    __slots__ = ("block_size", "held", "num_tokens", "pages", "pool")

    def __init__(self, pool: PagePool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.num_tokens = 0
        self.pages: array[int] = array("i")
        self.held = [0] * pool.num_groups

    def __len__(self) -> int:
        return len(self.pages)

    def __iter__(self) -> Iterator[LogicalPageId]:
        return map(LogicalPageId, self.pages)

    def entries(self, column: int = 0) -> list[tuple[DeviceId, BlockId]]:
        """(device_id, block_id) of each page: the view that people and the API see."""
        return [self.pool.place(page, column) for page in self]

    def missing(self, num_tokens: int) -> int:
        """How many pages `append(num_tokens)` would allocate, a copy of the shared last page included."""
        needed = -(-(self.num_tokens + num_tokens) // self.block_size) - len(self.pages)
        return needed + (num_tokens > 0 and self._copies())

    def adopt(self, pages: Iterable[LogicalPageId]) -> None:
        """Share full pages of a matched prefix behind the full pages that the table has."""
        if self.num_tokens % self.block_size:
            raise WrongState("a prefix can only be adopted at a page boundary")
        taken: list[LogicalPageId] = []
        try:
            for page in pages:
                self.pool.share(page)
                taken.append(page)
        except PageError:
            for page in reversed(taken):
                self.pool.free(page)
            raise
        self.pages.extend(taken)
        self._count(taken)
        self.num_tokens += len(taken) * self.block_size

    def append(self, num_tokens: int, after: PlanNumber) -> tuple[LogicalPageId, LogicalPageId] | None:
        """Room for `num_tokens` more tokens, which plan `after` writes.

        Returns (source, target) where the shared last page is to be copied before the plan writes, else None. The
        copy's source is given up with that plan. Raises OutOfBlocks with nothing changed.
        """
        pool, pages = self.pool, self.pages
        if num_tokens < 0:
            raise ValueError(f"num_tokens: got {num_tokens}, must be 0 or more; `trim` gives tokens up")
        needed = -(-(self.num_tokens + num_tokens) // self.block_size) - len(pages)
        copies = num_tokens > 0 and self._copies()
        if needed + copies:
            group = pool.group(LogicalPageId(pages[-1])) if copies else 0
            first_in = group if copies and pool.has_room_in(group) else None
            fresh = pool.allocate(needed + copies, pages, self.held, first_in)
        self.num_tokens += num_tokens
        copy = None
        if copies:
            copy = LogicalPageId(pages[-1]), fresh.pop(0)
            pages[-1] = copy[1]
            self._count(copy[1:])
            self._count(copy[:1], -1)
            pool.free(copy[0], after)
        if needed:
            pages.extend(fresh)
            self._count(fresh)
        return copy

    def fork(self, num_tokens: int) -> BlockTable:
        """A table that shares the pages of the first `num_tokens` tokens."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise WrongState(f"a fork at token {num_tokens} of {self.num_tokens}")
        child = BlockTable(self.pool, self.block_size)
        child.num_tokens = num_tokens
        for page in self.pages[: -(-num_tokens // self.block_size)]:
            self.pool.share(LogicalPageId(page))
            child.pages.append(page)
        child._count(child.pages)
        return child

    def swap(self, index: int, page: LogicalPageId, after: PlanNumber) -> None:
        """Use `page`, which holds the same tokens, in place of the own page at `index`."""
        own = LogicalPageId(self.pages[index])
        self.pool.share(page)
        self.pages[index] = page
        self._count((page,))
        self._count((own,), -1)
        self.pool.free(own, after)

    def move(self, index: int, group: int, after: PlanNumber) -> None:
        """Plan `after` copies the page at `index` to another group; see `PagePool.move`."""
        page = LogicalPageId(self.pages[index])
        self._count((page,), -1)
        try:
            self.pool.move(page, group, after, self.pages)
        finally:
            self._count((page,))

    def trim(self, num_tokens: int, after: PlanNumber = NO_PLAN) -> None:
        """Give up the pages behind the first `num_tokens` tokens, the last page first."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise WrongState(f"a trim to token {num_tokens} of {self.num_tokens}")
        keep = -(-num_tokens // self.block_size)
        self._count(self.pages[keep:], -1)
        while len(self.pages) > keep:
            self.pool.free(LogicalPageId(self.pages.pop()), after)
        self.num_tokens = num_tokens

    def free(self, after: PlanNumber = NO_PLAN) -> None:
        """Give up all pages; `after` is the last plan that names any of them for this table."""
        self.trim(0, after)

    def check(self) -> None:
        """Length and tail as they must be (D7, D10)."""
        if len(self.pages) != -(-self.num_tokens // self.block_size):
            raise InvariantBroken(f"{len(self.pages)} pages for {self.num_tokens} tokens")
        lies = self.pool.groups(self.pages)
        if self.pool.num_groups > 1 and self.held != [lies.count(group) for group in range(self.pool.num_groups)]:
            raise InvariantBroken(f"pages by group: {self.held} in the books, of groups {lies}")

    def _count(self, pages: Iterable[int], change: int = 1) -> None:
        if self.pool.num_groups > 1:
            for group in self.pool.groups(pages):
                self.held[group] += change

    def _copies(self) -> bool:
        return self.num_tokens % self.block_size != 0 and not self.pool.writable(LogicalPageId(self.pages[-1]))

"""In which order cached pages are given up.

Least recently used first, and a page never before the pages behind it in its prefix. The second needs no extra work:
whoever uses a page uses all pages before it too, and tables are freed from their end; so a child always comes to rest
before its parent, and a queue in order of rest is leaves first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from pagetable.ids import LogicalPageId


class LruOrder:
    """Unreferenced, unpinned, cached pages, the next victim first. All calls O(1)."""

    def __init__(self) -> None:
        self._pages: OrderedDict[LogicalPageId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: LogicalPageId) -> bool:
        return page in self._pages

    def __iter__(self) -> Iterator[LogicalPageId]:
        return iter(self._pages)

    def add(self, page: LogicalPageId) -> None:
        """`page` has come to rest now."""
        self._pages[page] = None

    def remove(self, page: LogicalPageId) -> None:
        """`page` is used or pinned again; no effect where it was not listed."""
        self._pages.pop(page, None)

    def victim(self) -> LogicalPageId:
        """Take the page that has rested longest out of the order."""
        return self._pages.popitem(last=False)[0]

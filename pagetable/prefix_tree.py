"""Which page holds which tokens: sealed pages by the SHA-256 chain of everything before them.

    root = H(identity, salt)          identity: whatever else decides K and V (model revision, dtype, adapter)
    link = H(parent link, tokens)     one full page of int32 token ids

Two sequences share a page only where their whole prefix, identity and salt are equal, so one dictionary is the tree.
A page is in the tree from the plan that fills it: every layer writes all K and V before any query attends, so a
follower in the same plan may already read it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from pagetable.errors import InvariantBroken, WrongState
from pagetable.ids import LogicalPageId

NO_PAGE = LogicalPageId(-1)


def root_digest(identity: bytes, salt: str = "") -> bytes:
    """The start of every chain under this identity and salt."""
    return sha256(b"quire root\0" + len(identity).to_bytes(8, "little") + identity + salt.encode()).digest()


def link_digest(parent: bytes, tokens: array[int]) -> bytes:
    """The digest of the page that holds `tokens` (int32, exactly one page) behind the prefix `parent`."""
    return sha256(parent + tokens.tobytes()).digest()


def extend_digests(digests: list[bytes], root: bytes, tokens: array[int], block_size: int, pages: int) -> None:
    """Append to `digests` until it covers the first `pages` full pages of `tokens`; mutates `digests`."""
    parent = digests[-1] if digests else root
    for index in range(len(digests), pages):
        parent = link_digest(parent, tokens[index * block_size : (index + 1) * block_size])
        digests.append(parent)


class PrefixTree:
    """Digest -> page, page -> digest, and how many children of a page are in the tree."""

    def __init__(self) -> None:
        self._page: dict[bytes, LogicalPageId] = {}
        self._entry: dict[LogicalPageId, tuple[bytes, LogicalPageId]] = {}  # page -> (digest, parent page)
        self._children: dict[LogicalPageId, int] = {}

    def __len__(self) -> int:
        return len(self._page)

    def __contains__(self, page: LogicalPageId) -> bool:
        return page in self._entry

    def __iter__(self) -> Iterator[LogicalPageId]:
        return iter(self._entry)

    def find(self, digest: bytes) -> LogicalPageId:
        """The page with this digest, or NO_PAGE."""
        return self._page.get(digest, NO_PAGE)

    def match(self, digests: Iterable[bytes]) -> list[LogicalPageId]:
        """The pages of the longest run of `digests`, from its start, that is in the tree."""
        pages = []
        get = self._page.get
        for digest in digests:
            page = get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, page: LogicalPageId, digest: bytes, parent: LogicalPageId) -> None:
        """`page` holds the tokens of `digest`; `parent` is the page before it, in the tree, or NO_PAGE."""
        if digest in self._page or page in self._entry:
            raise WrongState(f"page {page} or its digest is in the tree already")
        if parent != NO_PAGE:
            if parent not in self._entry:
                raise WrongState(f"page {page} hangs on page {parent}, which is not in the tree")
            self._children[parent] = self._children.get(parent, 0) + 1
        self._page[digest] = page
        self._entry[page] = digest, parent

    def remove(self, page: LogicalPageId) -> bytes:
        """Forget a leaf. Returns its digest."""
        if page not in self._entry or self._children.get(page):
            raise WrongState(f"page {page} is no leaf of the tree")
        digest, parent = self._entry.pop(page)
        del self._page[digest]
        if parent != NO_PAGE:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
        return digest

    def path(self, page: LogicalPageId) -> Iterator[LogicalPageId]:
        """`page` and the pages before it, last first."""
        while page != NO_PAGE:
            yield page
            page = self._entry[page][1]

    def behind(self, page: LogicalPageId) -> list[LogicalPageId]:
        """`page` and all pages whose prefix has it, each before those that hang on it. Raises WrongState where it is
        not in the tree."""
        if page not in self._entry:
            raise WrongState(f"page {page} is not in the prefix tree")
        found = [page]
        if self._children.get(page):
            children: dict[LogicalPageId, list[LogicalPageId]] = {}
            for child, (_, parent) in self._entry.items():
                children.setdefault(parent, []).append(child)
            for each in found:  # it grows meanwhile
                found.extend(children.get(each, ()))
        return found

    def digest(self, page: LogicalPageId) -> bytes:
        return self._entry[page][0]

    def num_children(self, page: LogicalPageId) -> int:
        return self._children.get(page, 0)

    def check(self, order: Sequence[LogicalPageId] = ()) -> None:
        """The two directions agree, parents are present, and no page of `order` stands before its child (D8, D20)."""
        if {d: p for p, (d, _) in self._entry.items()} != self._page:
            raise InvariantBroken("prefix tree: digests and pages are no bijection")
        children: dict[LogicalPageId, int] = {}
        for page, (_, parent) in self._entry.items():
            if parent != NO_PAGE:
                if parent not in self._entry:
                    raise InvariantBroken(f"prefix tree: page {page} has lost its parent {parent}")
                children[parent] = children.get(parent, 0) + 1
        if children != self._children:
            raise InvariantBroken("prefix tree: child counts differ from a recount")
        rank = {page: i for i, page in enumerate(order)}
        for page in order:
            if page not in self._entry:
                raise InvariantBroken(f"eviction order: page {page} is not in the tree")
            parent = self._entry[page][1]
            if rank.get(parent, len(rank)) < rank[page]:
                raise InvariantBroken(f"eviction order: page {parent} stands before its child {page}")

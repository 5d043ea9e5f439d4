"""The laws of the prefix tree: a digest says everything that decides a page's content, a match is the longest run."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagetable.errors import InvariantBroken, PageError, WrongState
from pagetable.ids import LogicalPageId
from pagetable.prefix_tree import NO_PAGE, PrefixTree, extend_digests, link_digest, root_digest

# The same examples in every run; to search further, drop derandomize here and raise max_examples.
LAWS = settings(deadline=None, derandomize=True, max_examples=150)

Page = LogicalPageId
int32 = st.integers(-(2**31), 2**31 - 1)
tokens_of = st.lists(st.integers(0, 2), max_size=14)


def tokens(*values: int) -> array[int]:
    return array("i", values)


def digests_of(values: list[int], block_size: int, root: bytes) -> list[bytes]:
    """All full pages of `values`, by the formula at the head of prefix_tree.py."""
    digests, parent = [], root
    for start in range(0, len(values) - block_size + 1, block_size):
        page = b"".join(token.to_bytes(4, "little", signed=True) for token in values[start : start + block_size])
        parent = sha256(parent + page).digest()
        digests.append(parent)
    return digests


def fork() -> PrefixTree:
    """root 0 - A 1 - B 2 and A 1 - C 3, and another root 4."""
    tree = PrefixTree()
    for page, name, parent in [(0, b"r", -1), (1, b"A", 0), (2, b"B", 1), (3, b"C", 1), (4, b"x", -1)]:
        tree.insert(Page(page), name, Page(parent))
    return tree


def refused(tree: PrefixTree, call: Callable[[], Any], error: type[Exception] = WrongState) -> None:
    before = copy.deepcopy(vars(tree))
    with pytest.raises(error):
        call()
    assert vars(tree) == before, "a refused call changed something"


# Digests


def test_the_digests_are_those_of_the_formula() -> None:
    root = sha256(b"quire root\0\x05\0\0\0\0\0\0\0modelsalt").digest()
    assert root_digest(b"model", "salt") == root
    link = sha256(root + b"\x01\0\0\0\xff\xff\xff\xff\0\0\0\x80").digest()
    assert link_digest(root, tokens(1, -1, -(2**31))) == link


def test_each_part_of_a_digest_alone_changes_it() -> None:
    def digest(
        identity: bytes = b"m", salt: str = "s", first: tuple[int, ...] = (1, 2), second: tuple[int, ...] = (3, 4)
    ) -> bytes:
        return link_digest(link_digest(root_digest(identity, salt), tokens(*first)), tokens(*second))

    digests = {
        digest(),
        digest(identity=b"n"),
        digest(salt="t"),
        digest(salt=""),
        digest(identity=b""),
        digest(first=(1, 0)),  # the parent
        digest(second=(3, 0)),
        digest(first=(2, 1)),  # the order within a page
        digest(first=(3, 4), second=(1, 2)),  # the order of pages
        digest(second=(3, 4, 0)),  # a longer page
        digest(second=(3,)),
    }
    assert len(digests) == 11
    assert digest() == digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((b"a", "bc"), (b"ab", "c")),
        ((b"ab", ""), (b"a", "b")),
        ((b"", "ab"), (b"ab", "")),
        ((b"a\0", "b"), (b"a", "\0b")),
        ((b"", "\0"), (b"\0", "")),
        ((b"\x01\0\0\0\0\0\0\0x", ""), (b"", "\x01\0\0\0\0\0\0\0x")),
        ((b"m", "\u00e9"), (b"m", "e\u0301")),  # the same letter to the eye, two salts all the same
        ((b"m", "\u00e9"), (b"m\xc3\xa9", "")),
    ],
)
def test_identity_and_salt_never_run_into_each_other(one: tuple[bytes, str], other: tuple[bytes, str]) -> None:
    assert root_digest(*one) != root_digest(*other)


@LAWS
@given(st.binary(max_size=6), st.text(max_size=4), st.binary(max_size=6), st.text(max_size=4))
def test_two_roots_are_equal_only_where_identity_and_salt_are(a: bytes, salt_a: str, b: bytes, salt_b: str) -> None:
    assert (root_digest(a, salt_a) == root_digest(b, salt_b)) == ((a, salt_a) == (b, salt_b))


@LAWS
@given(st.lists(int32, max_size=12), st.integers(1, 4), st.data())
def test_digests_grow_in_any_steps_to_the_same_chain(values: list[int], block_size: int, data: st.DataObject) -> None:
    root, chain = root_digest(b"m"), digests_of(values, block_size, root_digest(b"m"))
    digests: list[bytes] = []
    for pages in data.draw(st.lists(st.integers(0, len(chain)), max_size=4)):
        covered = max(len(digests), pages)
        extend_digests(digests, root, tokens(*values), block_size, pages)
        assert digests == chain[:covered]


@LAWS
@given(tokens_of, tokens_of, st.integers(1, 3))
def test_two_sequences_have_equal_digests_exactly_for_their_common_full_pages(
    a: list[int], b: list[int], size: int
) -> None:
    digests: list[list[bytes]] = [[], []]
    for own, values in zip(digests, (a, b), strict=True):
        extend_digests(own, root_digest(b"m"), tokens(*values), size, len(values) // size)
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) // size
    assert digests[0][:common] == digests[1][:common]
    assert set(digests[0][common:]).isdisjoint(digests[1])


# Match


def test_match_returns_the_longest_run_from_the_start() -> None:
    tree = fork()
    assert tree.match([b"r", b"A", b"C", b"D"]) == [0, 1, 3]
    assert tree.match([b"r", b"?", b"A"]) == [0]
    assert tree.match([b"?", b"r", b"A"]) == []
    assert tree.match([]) == []
    assert (tree.find(b"C"), tree.find(b"?")) == (3, NO_PAGE)


@LAWS
@given(st.lists(tokens_of, max_size=5), tokens_of, st.integers(1, 3))
def test_match_is_the_longest_common_prefix_in_full_pages(known: list[list[int]], wanted: list[int], size: int) -> None:
    tree, root = PrefixTree(), root_digest(b"m")
    for values in known:
        parent = NO_PAGE
        for digest in digests_of(values, size, root):
            if tree.find(digest) == NO_PAGE:
                tree.insert(Page(len(tree)), digest, parent)
            parent = tree.find(digest)
    tree.check()
    best = 0
    for values in known:
        common = 0
        while common < min(len(values), len(wanted)) and values[common] == wanted[common]:
            common += 1
        best = max(best, common // size)
    digests = digests_of(wanted, size, root)
    pages = tree.match(digests)
    assert len(pages) == best
    assert [tree.digest(page) for page in pages] == digests[:best]
    assert list(tree.path(pages[-1] if pages else NO_PAGE)) == pages[::-1]


# The tree


def test_path_goes_from_a_page_to_its_root() -> None:
    tree = fork()
    assert [list(tree.path(Page(page))) for page in (3, 1, 0, 4, NO_PAGE)] == [[3, 1, 0], [1, 0], [0], [4], []]


def test_a_page_knows_its_digest_and_how_many_hang_on_it() -> None:
    tree = fork()
    assert [tree.digest(Page(page)) for page in tree] == [b"r", b"A", b"B", b"C", b"x"]
    assert [tree.num_children(Page(page)) for page in range(6)] == [1, 2, 0, 0, 0, 0]
    assert len(tree) == 5 and Page(3) in tree and Page(5) not in tree


def test_leaves_are_removed_one_by_one_until_the_tree_is_empty() -> None:
    tree = fork()
    for page, left in [(2, [0, 1, 3]), (3, [0, 1]), (1, [0]), (0, [])]:
        tree.remove(Page(page))
        tree.check()
        assert list(tree) == [*left, 4]
    assert tree.match([b"r"]) == []
    tree.insert(Page(2), b"r", NO_PAGE)  # number and digest may come again
    assert tree.match([b"r"]) == [2]


def test_insert_refuses_a_known_page_a_known_digest_and_a_parent_outside_the_tree() -> None:
    tree = fork()
    refused(tree, lambda: tree.insert(Page(2), b"new", NO_PAGE))
    refused(tree, lambda: tree.insert(Page(9), b"B", Page(1)))
    refused(tree, lambda: tree.insert(Page(9), b"B", NO_PAGE))
    refused(tree, lambda: tree.insert(Page(9), b"new", Page(8)))
    refused(tree, lambda: tree.insert(Page(9), b"new", Page(9)))


def test_remove_refuses_a_page_with_children() -> None:
    tree = fork()
    refused(tree, lambda: tree.remove(Page(0)))
    refused(tree, lambda: tree.remove(Page(1)))


@pytest.mark.parametrize("page", [9, NO_PAGE])
def test_remove_refuses_a_page_outside_the_tree(page: int) -> None:
    tree = fork()
    refused(tree, lambda: tree.remove(Page(page)), PageError)


# check()


@pytest.mark.parametrize("order", [[], [2, 3, 1, 0], [3, 2, 4, 1, 0], [2], [4, 3], [2, 3]])
def test_check_takes_every_order_with_leaves_first(order: list[Page]) -> None:
    fork().check(order)


@pytest.mark.parametrize(
    ("order", "text"), [([1, 2], "page 1 stands before its child 2"), ([2, 3, 0, 1], "page 0 stands before")]
)
def test_check_finds_a_page_that_would_go_before_its_child(order: list[Page], text: str) -> None:
    with pytest.raises(InvariantBroken, match=text):
        fork().check(order)


DAMAGE: dict[str, tuple[Callable[[PrefixTree], Any], str]] = {
    "a digest that finds another page": (lambda tree: tree._page.update({b"B": Page(3)}), "no bijection"),
    "a digest that finds a page outside": (lambda tree: tree._page.update({b"D": Page(9)}), "no bijection"),
    "a page that is not found": (lambda tree: tree._page.pop(b"B"), "no bijection"),
    "two pages of one digest": (lambda tree: tree._entry.update({Page(9): (b"B", Page(1))}), "no bijection"),
    "a parent outside the tree": (
        lambda tree: tree._entry.update({Page(3): (b"C", Page(9))}),
        "page 3 has lost its parent 9",
    ),
    "a child too many": (lambda tree: tree._children.update({Page(1): 3}), "child counts"),
    "a child too few": (lambda tree: tree._children.update({Page(1): 1}), "child counts"),
    "children of nobody": (lambda tree: tree._children.update({Page(9): 1}), "child counts"),
    "a child of another": (lambda tree: tree._entry.update({Page(3): (b"C", Page(0))}), "child counts"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_planted_damage(name: str) -> None:
    tree = fork()
    tree.check([Page(2), Page(3), Page(1), Page(0)])
    plant, text = DAMAGE[name]
    plant(tree)
    with pytest.raises(InvariantBroken, match=text):
        tree.check()


def test_check_finds_a_page_outside_the_tree_in_the_eviction_order() -> None:
    with pytest.raises(InvariantBroken, match="9"):
        fork().check([Page(9)])

"""The laws of BlockAllocator: exact block ids for runs, one life per generation, frees in plan order, and refusals that
change nothing. At the end a state machine plays every call, good and bad, against a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pagetable.allocator import NO_BLOCK, BlockAllocator, BlockState
from pagetable.errors import InvariantBroken, OutOfBlocks, PageError, StalePage, WrongState
from pagetable.ids import (
    BlockId,
    DeviceId,
    Generation,
    PageRef,
    PlanNumber,
    block_of,
    device_of,
    generation_of,
    page_ref,
)

FREE, RESERVED, LIVE, CACHED, QUARANTINED, BAD = BlockState
DEVICE = DeviceId(7)
Call = Callable[[BlockAllocator, PageRef], object]


def device(num_blocks: int) -> BlockAllocator:
    return BlockAllocator(DEVICE, num_blocks)


def snapshot(allocator: BlockAllocator) -> dict[str, Any]:
    return copy.deepcopy(vars(allocator))


def blocks(refs: Iterable[PageRef]) -> list[int]:
    return [int(block_of(ref)) for ref in refs]


def take(allocator: BlockAllocator, count: int = 1, near: int = NO_BLOCK) -> list[int]:
    return blocks(allocator.allocate(count, BlockId(near)))


def ref_of(allocator: BlockAllocator, block: int) -> PageRef:
    return page_ref(DEVICE, BlockId(block), Generation(allocator._generation[block]))


def give(allocator: BlockAllocator, *ids: int) -> None:
    for block in ids:
        allocator.free(ref_of(allocator, block))


def in_state(state: BlockState) -> tuple[BlockAllocator, PageRef]:
    """A device of 8 blocks whose block 0 is in `state`, with a user where the state allows one."""
    allocator = device(8)
    (ref,) = allocator.allocate()
    if state in (LIVE, CACHED):
        allocator.publish(ref)
    if state is CACHED:
        allocator.keep(ref, True)
        allocator.free(ref)
    if state in (QUARANTINED, BAD):
        allocator.quarantine(ref)
    if state is BAD:
        allocator.condemn(ref)
    assert allocator.state(BlockId(0)) == state
    return allocator, ref


# Runs: which block comes next


def test_the_first_table_takes_consecutive_blocks_from_zero() -> None:
    allocator = device(24)
    assert take(allocator, 3) == [0, 1, 2]
    assert take(allocator, 7, near=2) == [3, 4, 5, 6, 7, 8, 9]
    assert [take(allocator, near=block) for block in (9, 10, 11)] == [[10], [11], [12]]


def test_a_second_table_starts_at_the_next_whole_chunk_and_both_grow_in_runs() -> None:
    allocator = device(24)
    assert take(allocator, 3) == [0, 1, 2]
    assert take(allocator, 2) == [8, 9]
    assert take(allocator, 2, near=2) == [3, 4]
    assert take(allocator, 1, near=9) == [10]
    assert take(allocator, 1) == [16]


def test_a_run_crosses_a_chunk_border_only_into_a_whole_chunk() -> None:
    allocator = device(32)
    take(allocator, 8)
    assert take(allocator, 2) == [8, 9]
    give(allocator, 8)  # the block behind 7 is free, its chunk is another table's
    assert take(allocator, near=7) == [16]
    give(allocator, 9)
    assert take(allocator, near=7) == [8]  # the whole chunk again


def test_partial_chunks_are_used_oldest_first_and_from_their_lowest_block_when_no_whole_is_left() -> None:
    allocator = device(16)
    assert (take(allocator, 2), take(allocator, 2)) == ([0, 1], [8, 9])
    assert take(allocator) == [2]
    assert take(allocator, near=2) == [3]
    assert take(allocator, near=1) == [4]  # 2 is taken
    assert take(allocator, near=9) == [10]
    give(allocator, 1)
    assert take(allocator, 4) == [1, 5, 6, 7]
    assert take(allocator) == [11]  # chunk 0 is full


def test_a_chunk_that_empties_is_whole_again_and_waits_behind_the_others() -> None:
    allocator = device(24)
    give(allocator, *take(allocator, 1))
    assert take(allocator) == [8]
    give(allocator, 8)
    assert [take(allocator)[0] for _ in range(3)] == [16, 0, 8]


@pytest.mark.parametrize(
    ("num_blocks", "first", "second"),
    [
        (1, [0], []),
        (5, [0, 1, 2], [3, 4]),
        (8, [0, 1, 2], [3, 4, 5, 6, 7]),
        (9, [0, 1, 2], [8, 3, 4, 5, 6, 7]),  # the short chunk has been partial for longest
        (11, [0, 1, 2], [8, 9, 10, 3, 4, 5, 6, 7]),
        (19, [0, 1, 2], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 3, 4, 5, 6, 7]),
    ],
)
def test_a_short_last_chunk_is_never_whole_and_never_lost(num_blocks: int, first: list[int], second: list[int]) -> None:
    allocator = device(num_blocks)
    assert take(allocator, len(first)) == first
    assert take(allocator, len(second)) == second
    assert allocator.num_free == 0
    give(allocator, *first, *second)
    allocator.check()
    assert allocator.num_free == num_blocks


def test_near_the_last_block_or_beyond_it_means_anywhere() -> None:
    allocator = device(16)
    assert take(allocator, near=15) == [0]
    assert take(allocator, near=99) == [8]
    assert take(allocator, near=15) == [1]


@pytest.mark.parametrize("num_blocks", [0, -1, 2**24 + 1])
def test_a_device_has_from_one_block_to_what_a_reference_can_name(num_blocks: int) -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        device(num_blocks)


@pytest.mark.parametrize("number", [-1, 2**16])
def test_a_device_number_that_no_reference_can_name_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="device_id"):
        BlockAllocator(DeviceId(number), 8)


# Generations


def test_the_generation_of_a_block_grows_by_one_at_each_allocation() -> None:
    allocator = device(2)
    for generation in (1, 2, 3):
        assert allocator.allocate() == [page_ref(DEVICE, BlockId(0), Generation(generation))]
        give(allocator, 0)
    assert allocator.allocate(2) == [
        page_ref(DEVICE, BlockId(0), Generation(4)),
        page_ref(DEVICE, BlockId(1), Generation(1)),
    ]


def test_the_generation_wraps_to_zero_after_all_its_bits() -> None:
    allocator = device(1)
    allocator._generation[0] = 2**24 - 1
    (ref,) = allocator.allocate()
    assert generation_of(ref) == 0 and block_of(ref) == 0 and device_of(ref) == DEVICE
    assert allocator.free(ref) == FREE


CALLS: dict[str, Call] = {
    "users": lambda a, ref: a.users(ref),
    "writable": lambda a, ref: a.writable(ref),
    "publish": lambda a, ref: a.publish(ref),
    "share": lambda a, ref: a.share(ref),
    "free": lambda a, ref: a.free(ref),
    "free after a plan": lambda a, ref: a.free(ref, PlanNumber(9)),
    "keep": lambda a, ref: a.keep(ref, True),
    "drop": lambda a, ref: a.keep(ref, False),
    "pin": lambda a, ref: a.pin(ref),
    "unpin": lambda a, ref: a.unpin(ref),
    "quarantine": lambda a, ref: a.quarantine(ref),
    "release": lambda a, ref: a.release(ref),
    "condemn": lambda a, ref: a.condemn(ref),
}
STALE = {  # block 0 has begun its second life, block 1 has ended its first, block 2 has had none
    "an earlier life": page_ref(DEVICE, BlockId(0), Generation(1)),
    "a life to come": page_ref(DEVICE, BlockId(0), Generation(3)),
    "a life that is over": page_ref(DEVICE, BlockId(1), Generation(1)),
    "before the first life": page_ref(DEVICE, BlockId(2), Generation(0)),
    "another device": page_ref(DeviceId(8), BlockId(0), Generation(2)),
    "beyond the device": page_ref(DEVICE, BlockId(8), Generation(1)),
}


@pytest.mark.parametrize("kind", STALE)
@pytest.mark.parametrize("call", CALLS)
def test_a_stale_reference_is_refused_by_every_call_with_nothing_changed(call: str, kind: str) -> None:
    allocator = device(8)
    first, second = allocator.allocate(2)
    allocator.free(first)
    allocator.free(second)
    (third,) = allocator.allocate()
    assert (block_of(third), generation_of(third)) == (0, 2)
    before = snapshot(allocator)
    with pytest.raises(StalePage):
        CALLS[call](allocator, STALE[kind])
    assert snapshot(allocator) == before


# States

# call -> what it makes of a block that is RESERVED, LIVE, CACHED, QUARANTINED, BAD; "." refused, "?" not laid down
MOVES = {
    "publish": "L....",
    "share": "RLL..",
    "free": "FF.Q.",
    "keep": "RLC??",
    "drop": "RLF??",
    "pin": "RLCQ?",
    "unpin": ".....",
    "quarantine": "Q....",
    "release": "...F.",
    "condemn": "..BB.",
}


@pytest.mark.parametrize(
    ("call", "state", "then"),
    [
        (call, state, then)
        for call, row in MOVES.items()
        for state, then in zip((RESERVED, LIVE, CACHED, QUARANTINED, BAD), row, strict=True)
        if then != "?"
    ],
)
def test_each_call_moves_a_block_as_the_table_says_or_is_refused_with_nothing_changed(
    call: str, state: BlockState, then: str
) -> None:
    allocator, ref = in_state(state)
    before = snapshot(allocator)
    if then == ".":
        with pytest.raises(WrongState):
            CALLS[call](allocator, ref)
        assert snapshot(allocator) == before
    else:
        CALLS[call](allocator, ref)
        assert allocator.state(BlockId(0)).name.startswith(then)
        expected = [8, 0, 0, 0, 0, 0]
        expected[FREE] -= 1
        expected[next(s for s in BlockState if s.name.startswith(then))] += 1
        assert allocator.counts == expected


def test_the_books_add_up_after_a_block_went_bad() -> None:
    allocator, _ = in_state(BAD)
    allocator.check()
    assert take(allocator, 7) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(OutOfBlocks):
        allocator.allocate()


def test_a_block_is_writable_while_it_has_one_user_and_is_not_kept() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    seen = [allocator.writable(ref)]
    for call in ("share", "free", "keep", "share", "drop", "free"):
        CALLS[call](allocator, ref)
        seen.append(allocator.writable(ref))
    assert seen == [True, False, True, False, False, False, True]


def test_the_last_of_several_users_frees_the_block() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.publish(ref)
    allocator.share(ref)
    allocator.share(ref)
    assert [allocator.free(ref) for _ in range(3)] == [LIVE, LIVE, FREE]
    assert (allocator.num_allocations, allocator.num_frees, allocator.num_free) == (1, 1, 8)


def test_a_second_free_is_refused_with_nothing_changed() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.free(ref, PlanNumber(1))  # still RESERVED, so the reference is not stale yet
    before = snapshot(allocator)
    with pytest.raises(WrongState, match="no user"):
        allocator.free(ref)
    assert snapshot(allocator) == before


@pytest.mark.parametrize("count", [4, 5, 1000])
def test_a_refused_allocation_changes_nothing(count: int) -> None:
    allocator = device(8)
    take(allocator, 5)
    before = snapshot(allocator)
    with pytest.raises(OutOfBlocks, match=f"{count} blocks needed, 3 free"):
        allocator.allocate(count, BlockId(4))
    assert snapshot(allocator) == before
    assert take(allocator, 3, near=4) == [5, 6, 7]


def test_a_negative_count_is_refused_with_nothing_changed() -> None:
    allocator = device(8)
    before = snapshot(allocator)
    with pytest.raises((ValueError, PageError)):
        allocator.allocate(-1)
    assert snapshot(allocator) == before


def test_no_blocks_asked_for_are_none_taken() -> None:
    allocator = device(1)
    before = snapshot(allocator)
    assert allocator.allocate(0) == []
    assert snapshot(allocator) == before


# Free in plan order


@pytest.mark.parametrize("state", [RESERVED, LIVE])
def test_a_block_given_up_keeps_its_state_until_its_plan_retires(state: BlockState) -> None:
    allocator, ref = in_state(state)
    assert allocator.free(ref, PlanNumber(3)) == state
    assert (allocator.users(ref), allocator.num_retiring, allocator.num_free) == (0, 1, 7)
    allocator.check()
    assert allocator.retire(PlanNumber(2)) == []
    assert allocator.state(BlockId(0)) == state
    assert allocator.retire(PlanNumber(3)) == [ref]
    assert (allocator.state(BlockId(0)), allocator.num_retiring, allocator.num_free) == (FREE, 0, 8)


def test_a_plan_that_has_retired_holds_nothing_up() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    assert allocator.retire(PlanNumber(2)) == []
    assert allocator.free(ref, PlanNumber(2)) == FREE


def test_whoever_shares_a_block_in_between_takes_it_up_again() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.publish(ref)
    allocator.free(ref, PlanNumber(3))
    allocator.share(ref)
    assert (allocator.users(ref), allocator.num_retiring) == (1, 0)
    assert allocator.retire(PlanNumber(3)) == []
    assert allocator.state(BlockId(0)) == LIVE
    assert allocator.free(ref) == FREE


@pytest.mark.parametrize(("first", "second"), [(7, 4), (4, 7)])
def test_a_block_of_two_users_waits_for_the_later_of_their_plans(first: int, second: int) -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.share(ref)
    allocator.free(ref, PlanNumber(first))
    allocator.free(ref, PlanNumber(second))
    assert allocator.retire(PlanNumber(6)) == []
    assert allocator.retire(PlanNumber(7)) == [ref]


def test_a_block_shared_in_between_still_waits_for_its_earlier_users_plan() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.free(ref, PlanNumber(5))
    allocator.share(ref)
    assert allocator.free(ref, PlanNumber(3)) == RESERVED
    assert allocator.retire(PlanNumber(4)) == []
    assert allocator.retire(PlanNumber(5)) == [ref]


def test_a_new_life_does_not_wait_for_the_plans_of_the_last_one() -> None:
    allocator = device(1)
    (ref,) = allocator.allocate()
    allocator.free(ref, PlanNumber(5))
    allocator.retire(PlanNumber(5))
    (ref,) = allocator.allocate()
    assert allocator.free(ref) == FREE


def test_kept_blocks_come_to_rest_cached_in_the_order_in_which_they_were_given_up() -> None:
    allocator = device(8)
    refs = allocator.allocate(4)
    for ref in refs[:3]:
        allocator.keep(ref, True)
    given = [refs[2], refs[3], refs[0], refs[1]]
    for ref in given:
        allocator.free(ref, PlanNumber(1))
    assert allocator.retire(PlanNumber(1)) == given
    assert [allocator.state(block_of(ref)) for ref in refs] == [CACHED, CACHED, CACHED, FREE]


def test_blocks_rest_in_plan_order_also_when_several_plans_retire_at_once() -> None:
    allocator = device(8)
    first, second, third = allocator.allocate(3)
    allocator.free(first, PlanNumber(7))
    allocator.free(second, PlanNumber(6))
    allocator.free(third, PlanNumber(7))
    assert allocator.retire(PlanNumber(8)) == [second, first, third]


def test_plans_never_retire_backwards() -> None:
    allocator = device(8)
    allocator.retire(PlanNumber(3))
    before = snapshot(allocator)
    with pytest.raises(WrongState, match="plan 2 retires after plan 3"):
        allocator.retire(PlanNumber(2))
    assert snapshot(allocator) == before
    assert allocator.retire(PlanNumber(3)) == []


# Pins and quarantine


def test_a_pinned_block_is_freed_by_the_last_of_its_pins() -> None:
    allocator = device(8)
    (ref,) = allocator.allocate()
    allocator.publish(ref)
    allocator.pin(ref)
    allocator.pin(ref)
    assert allocator.free(ref) == LIVE
    allocator.check()
    allocator.unpin(ref)
    allocator.check()
    assert (allocator.state(BlockId(0)), allocator.num_retiring) == (LIVE, 0)
    allocator.unpin(ref)
    assert allocator.state(BlockId(0)) == FREE


@pytest.mark.parametrize("kept", [False, True])
def test_a_block_with_a_pin_and_a_plan_waits_for_both(kept: bool) -> None:
    allocator = device(8)
    first, second = allocator.allocate(2)
    for ref in (first, second):
        allocator.keep(ref, kept)
        allocator.pin(ref)
        allocator.free(ref, PlanNumber(1))
    allocator.unpin(first)  # the pin goes first
    assert (allocator.state(BlockId(0)), allocator.num_retiring) == (RESERVED, 2)
    allocator.retire(PlanNumber(1))
    assert allocator.state(BlockId(0)) == (CACHED if kept else FREE)
    assert allocator.state(BlockId(1)) == (CACHED if kept else RESERVED)
    allocator.unpin(second)
    assert allocator.state(BlockId(1)) == (CACHED if kept else FREE)


def test_retire_returns_only_what_came_to_rest() -> None:
    allocator = device(8)
    first, second = allocator.allocate(2)
    allocator.pin(first)
    allocator.free(first, PlanNumber(1))
    allocator.free(second, PlanNumber(1))
    assert allocator.retire(PlanNumber(1)) == [second]


@pytest.mark.parametrize("call", ["drop", "condemn"])
def test_a_pinned_cached_block_is_neither_dropped_nor_condemned(call: str) -> None:
    allocator, ref = in_state(CACHED)
    allocator.pin(ref)
    before = snapshot(allocator)
    with pytest.raises(WrongState):
        CALLS[call](allocator, ref)
    assert snapshot(allocator) == before
    allocator.unpin(ref)
    CALLS[call](allocator, ref)
    assert allocator.state(BlockId(0)) == (FREE if call == "drop" else BAD)


def test_a_released_block_begins_its_next_life_without_users_pins_or_keeper() -> None:
    allocator, ref = in_state(RESERVED)
    for call in ("share", "keep", "pin", "quarantine", "release"):
        CALLS[call](allocator, ref)
    allocator.check()
    assert take(allocator, near=-1) == [0]
    assert allocator.writable(ref_of(allocator, 0))


def test_a_retiring_plan_does_not_end_a_quarantine() -> None:
    allocator, ref = in_state(RESERVED)
    allocator.free(ref, PlanNumber(1))
    allocator.quarantine(ref)
    assert allocator.retire(PlanNumber(1)) == []
    assert allocator.state(BlockId(0)) == QUARANTINED


def test_a_plan_of_an_earlier_life_takes_no_block_from_its_next_user() -> None:
    allocator = device(1)
    (ref,) = allocator.allocate()
    allocator.free(ref, PlanNumber(1))
    allocator.quarantine(ref)
    allocator.release(ref)
    (ref,) = allocator.allocate()
    assert allocator.retire(PlanNumber(1)) == []
    assert (allocator.state(BlockId(0)), allocator.users(ref)) == (RESERVED, 1)


def test_a_released_block_does_not_wait_for_a_plan_of_its_earlier_life() -> None:
    allocator = device(1)
    (ref,) = allocator.allocate()
    allocator.share(ref)
    allocator.free(ref, PlanNumber(1))
    allocator.quarantine(ref)
    allocator.release(ref)
    (ref,) = allocator.allocate()
    assert allocator.free(ref) == FREE


# check()


def set_sum(a: BlockAllocator) -> None:
    a._state[7] = 6
    a.counts[FREE] -= 1


def list_whole(a: BlockAllocator) -> None:
    del a._partial[0]
    a._whole[0] = None


def list_partial(a: BlockAllocator) -> None:
    del a._whole[2]
    a._partial[2] = None


DAMAGE: dict[str, tuple[Callable[[BlockAllocator], object], str]] = {
    "counts": (lambda a: a.counts.__setitem__(LIVE, 3), "counts differ"),
    "unknown state": (set_sum, "do not sum"),
    "used block listed as free": (lambda a: a._room.__setitem__(0, 0xF1), "free lists differ"),
    "lost chunk": (lambda a: a._whole.popitem(), "free lists differ"),
    "used chunk listed as whole": (list_whole, "listed as whole"),
    "whole chunk listed as partial": (list_partial, "listed as partial"),
    "full chunk listed as partial": (lambda a: a._partial.update({1: None}), "listed as partial"),
    "free block with a user": (lambda a: a._users.__setitem__(7, 1), "free block is in use"),
    "free block with a pin": (lambda a: a._pins.__setitem__(7, 1), "free block is in use"),
    "free block with a keeper": (lambda a: a._keep.__setitem__(7, 1), "free block is in use"),
    "cached block with a user": (lambda a: a._users.__setitem__(2, 1), "cached block 2"),
    "cached block without keeper": (lambda a: a._keep.__setitem__(2, 0), "cached block 2"),
    "leak": (lambda a: a._users.__setitem__(1, 0), "block 1 has no user and waits for nothing"),
    "forgotten wait": (lambda a: a._retiring.clear(), "block 3 has no user and waits for nothing"),
    "uncounted free": (lambda a: setattr(a, "num_frees", 1), "allocations less frees"),
    "uncounted allocation": (lambda a: setattr(a, "num_allocations", 0), "allocations less frees"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_planted_damage(name: str) -> None:
    allocator = device(24)
    refs = allocator.allocate(4)  # block 0 RESERVED, 1 LIVE, 2 CACHED, 3 waits for plan 1
    allocator.publish(refs[1])
    allocator.keep(refs[2], True)
    allocator.free(refs[2])
    allocator.free(refs[3], PlanNumber(1))
    assert take(allocator, 8) == [8, 9, 10, 11, 12, 13, 14, 15]  # chunk 0 is partial, 1 full, 2 whole
    allocator.check()
    plant, text = DAMAGE[name]
    plant(allocator)
    with pytest.raises(InvariantBroken, match=text):
        allocator.check()


# The machine


@dataclass
class Block:
    state: BlockState = FREE
    users: int = 0
    pins: int = 0
    kept: bool = False
    busy: int = 0
    generation: int = 0


class Model:
    """The same laws in plain lists. A method raises what the allocator must raise, before it changes anything."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block() for _ in range(num_blocks)]
        self.waiting: list[tuple[int, int]] = []  # (plan, block) in the order in which they were given up
        self.retired = self.num_allocations = self.num_frees = 0
        self.chunks = [range(c, min(c + 8, num_blocks)) for c in range(0, num_blocks, 8)]
        self.lists: dict[str, list[range]] = {"whole": [], "partial": [], "full": []}
        for chunk in self.chunks:
            self.lists[self.kind(chunk)].append(chunk)

    def is_free(self, block: int) -> bool:
        return self.blocks[block].state is FREE

    def kind(self, chunk: range) -> str:
        free = sum(map(self.is_free, chunk))
        return "full" if not free else "whole" if free == 8 else "partial"

    def relist(self, block: int) -> None:
        """A chunk that changes its kind goes behind the others of that kind."""
        chunk = self.chunks[block // 8]
        if chunk not in self.lists[self.kind(chunk)]:
            for chunks in self.lists.values():
                if chunk in chunks:
                    chunks.remove(chunk)
            self.lists[self.kind(chunk)].append(chunk)

    def find(self, near: int) -> int:
        after = near + 1
        if near >= 0 and after < len(self.blocks) and self.is_free(after):
            if after % 8 or self.chunks[after // 8] in self.lists["whole"]:
                return after
        chunk = (self.lists["whole"] or self.lists["partial"])[0]
        return next(block for block in chunk if self.is_free(block))

    def allocate(self, count: int, near: int) -> list[PageRef]:
        if count > sum(b.state is FREE for b in self.blocks):
            raise OutOfBlocks
        refs = []
        for _ in range(count):
            near = self.find(near)
            self.blocks[near] = Block(RESERVED, users=1, generation=self.blocks[near].generation + 1)
            self.relist(near)
            refs.append(page_ref(DEVICE, BlockId(near), Generation(self.blocks[near].generation)))
        self.num_allocations += count
        return refs

    def block(self, ref: PageRef) -> int:
        number = block_of(ref)
        if device_of(ref) != DEVICE or number >= len(self.blocks) or self.is_free(number):
            raise StalePage
        if self.blocks[number].generation != generation_of(ref):
            raise StalePage
        return number

    def expect(self, holds: bool) -> None:
        if not holds:
            raise WrongState

    def publish(self, n: int) -> None:
        self.expect(self.blocks[n].state is RESERVED)
        self.blocks[n].state = LIVE

    def share(self, n: int) -> None:
        self.expect(self.blocks[n].state in (RESERVED, LIVE, CACHED))
        self.waiting = [w for w in self.waiting if w[1] != n]
        self.blocks[n].users += 1
        if self.blocks[n].state is CACHED:
            self.blocks[n].state = LIVE

    def free(self, n: int, after: int) -> BlockState:
        b = self.blocks[n]
        self.expect(b.users > 0)
        b.users -= 1
        b.busy = max(b.busy, after)
        self.let_go(n)
        return self.blocks[n].state

    def let_go(self, n: int) -> None:
        b = self.blocks[n]
        if b.users or b.state not in (RESERVED, LIVE):
            return
        if b.busy > self.retired:
            if (b.busy, n) not in self.waiting:
                self.waiting.append((b.busy, n))
        elif b.kept:
            b.state = CACHED
        elif not b.pins:
            self.release_to_all(n)

    def release_to_all(self, n: int) -> None:
        self.blocks[n] = Block(generation=self.blocks[n].generation)
        self.num_frees += 1
        self.relist(n)

    def retire(self, plan: int) -> list[PageRef]:
        self.expect(plan >= self.retired)
        self.retired = plan
        over = sorted((w for w in self.waiting if w[0] <= plan), key=lambda w: w[0])
        self.waiting = [w for w in self.waiting if w[0] > plan]
        refs = [page_ref(DEVICE, BlockId(n), Generation(self.blocks[n].generation)) for _, n in over]
        for _, n in over:
            self.let_go(n)
        return [ref for ref in refs if self.blocks[block_of(ref)].state in (FREE, CACHED)]

    def keep(self, n: int, kept: bool) -> None:
        b = self.blocks[n]
        self.expect(kept or not b.pins or b.state is not CACHED)
        b.kept = kept
        if not kept and b.state is CACHED:
            self.release_to_all(n)

    def pin(self, n: int) -> None:
        self.blocks[n].pins += 1

    def unpin(self, n: int) -> None:
        self.expect(self.blocks[n].pins > 0)
        self.blocks[n].pins -= 1
        if not self.blocks[n].pins:
            self.let_go(n)

    def quarantine(self, n: int) -> None:
        self.expect(self.blocks[n].state is RESERVED)
        self.waiting = [w for w in self.waiting if w[1] != n]
        self.blocks[n].state = QUARANTINED

    def release(self, n: int) -> None:
        self.expect(self.blocks[n].state is QUARANTINED)
        self.release_to_all(n)

    def condemn(self, n: int) -> None:
        b = self.blocks[n]
        self.expect(b.state is QUARANTINED or (b.state is CACHED and not b.pins))
        self.blocks[n] = Block(BAD, generation=b.generation)


# One rule with weights: rules of their own would each be switched off in half of the examples, `allocate` too.
WEIGHTS = {
    "allocate": 3,
    "grow": 4,
    "free": 6,
    "retire": 2,
    "share": 3,
    "publish": 4,
    "keep": 3,
    "quarantine": 2,
    "release": 4,
}
STEPS = [call for call, weight in WEIGHTS.items() for _ in range(weight)]
STEPS += ["drop", "pin", "unpin", "condemn"]


class AllocatorMachine(RuleBasedStateMachine):
    """Every call on references of all kinds: the model's value or the model's error, and an error changes nothing."""

    @initialize(num_blocks=st.sampled_from([35, 24, 11, 8, 5, 1]))
    def begin(self, num_blocks: int) -> None:
        self.real = device(num_blocks)
        self.model = Model(num_blocks)
        self.old: list[PageRef] = [page_ref(DeviceId(0), BlockId(0), Generation(1))]
        self.new: list[PageRef] = []

    @rule(call=st.sampled_from(STEPS), pick=st.integers(0, 999), number=st.integers(0, 5))
    def step(self, call: str, pick: int, number: int) -> None:
        if call == "allocate":
            self.allocate(number, pick % 40)
        elif call == "grow":
            self.allocate(number, block_of(self.new[pick % len(self.new)]) if self.new else NO_BLOCK)
        elif call == "retire":
            plan = PlanNumber(max(0, self.model.retired + number - 1))
            self.both(call, lambda: self.model.retire(plan), lambda: self.real.retire(plan))
        elif call == "free":
            self.on_block(call, pick, PlanNumber(max(0, self.model.retired + number - 2)))
        elif call in ("keep", "drop"):
            self.on_block("keep", pick, call == "keep")
        else:
            self.on_block(call, pick)

    def both(self, call: str, model: Callable[[], object], real: Callable[[], object]) -> Any:
        before = snapshot(self.real)
        try:
            expected = model()
        except PageError as error:
            with pytest.raises(PageError) as raised:
                real()
            assert type(raised.value) is type(error), call
            assert snapshot(self.real) == before, f"a refused {call} changed something"
            return None
        assert real() == expected, call
        self.old += [ref for ref in self.new if self.model.is_free(block_of(ref))]
        self.new = [ref for ref in self.new if not self.model.is_free(block_of(ref))]
        return expected

    def on_block(self, call: str, pick: int, *arguments: object) -> None:
        refs = self.new if self.new and pick % 10 else self.old
        ref = refs[pick // 10 % len(refs)]
        self.both(
            call,
            lambda: getattr(self.model, call)(self.model.block(ref), *arguments),
            lambda: getattr(self.real, call)(ref, *arguments),
        )

    def allocate(self, count: int, near: int) -> None:
        follower = near + 1
        run = near >= 0 and follower % 8 and follower < self.real.num_blocks and self.model.is_free(follower)
        refs = self.both(
            "allocate", lambda: self.model.allocate(count, near), lambda: self.real.allocate(count, BlockId(near))
        )
        if refs:
            self.new += refs
            assert not run or block_of(refs[0]) == follower, "a run was broken off"

    @invariant()
    def the_books_are_the_models(self) -> None:
        real, model = self.real, self.model
        real.check()
        for n, b in enumerate(model.blocks):
            books = real.state(BlockId(n)), real._users[n], real._pins[n], bool(real._keep[n]), real._generation[n]
            assert books == (b.state, b.users, b.pins, b.kept, b.generation), n
        for ref in self.new:
            b = model.blocks[block_of(ref)]
            assert (real.users(ref), real.writable(ref)) == (b.users, b.users == 1 and not b.kept)
        assert real.counts == [sum(b.state is s for b in model.blocks) for s in BlockState]
        assert real.num_free == real.counts[FREE]
        assert real.num_retiring == len(model.waiting)
        assert real.num_allocations == model.num_allocations


# The same examples in every run; to search further, drop derandomize here and raise max_examples.
AllocatorMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=50)
TestAllocatorMachine = AllocatorMachine.TestCase

"""The simulator finds what it is for: each bug below, planted in the code it tests, is found within a few seeds."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from hashlib import sha256
from itertools import islice

import pytest

import worker.admission
import worker.scheduler
import worker.step
from pagetable.allocator import NO_PLAN, BlockAllocator, BlockState
from pagetable.block_table import BlockTable
from pagetable.eviction import LruOrder
from pagetable.ids import LogicalPageId, PageRef, PlanNumber, block_of
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE
from tests.simulation import Simulation
from worker.admission import Admission
from worker.scheduler import ShardScheduler
from worker.sequence import FinishReason, Sequence
from worker.stages import Stages
from worker.step import Step

Patch = pytest.MonkeyPatch
BUGS: dict[str, Callable[[Patch], None]] = {}


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BUGS[plant.__name__] = plant
    return plant


@bug
def no_decrement_on_cancel(patch: Patch) -> None:
    finish = ShardScheduler._finish

    def leaky(self: ShardScheduler, sequence: Sequence, reason: FinishReason, failure: str = "") -> object:
        if reason is FinishReason.CANCELLED and sequence.table.pages:
            sequence.table.num_tokens -= 1
            sequence.table.pages.pop()
        return finish(sequence=sequence, self=self, reason=reason, failure=failure)

    patch.setattr(ShardScheduler, "_finish", leaky)


@bug
def no_generation_bump(patch: Patch) -> None:
    allocate = BlockAllocator.allocate

    def stuck(self: BlockAllocator, count: int = 1, near: int = -1) -> list[PageRef]:
        refs = allocate(self, count, near)  # type: ignore[arg-type]
        for ref in refs:
            self._generation[ref >> 24 & 0xFFFFFF] = 1
        return [PageRef(ref & ~0xFFFFFF | 1) for ref in refs]

    patch.setattr(BlockAllocator, "allocate", stuck)


@bug
def tail_off_by_one(patch: Patch) -> None:
    append = BlockTable.append

    def short(self: BlockTable, num_tokens: int, after: PlanNumber) -> object:
        self.num_tokens -= self.num_tokens % self.block_size == self.block_size - 1 and len(self.pages) > 1
        return append(self, num_tokens, after)

    patch.setattr(BlockTable, "append", short)


@bug
def freed_before_the_plan_retired(patch: Patch) -> None:
    free = BlockAllocator.free
    patch.setattr(BlockAllocator, "free", lambda self, ref, after=NO_PLAN: free(self, ref))


@bug
def no_copy_on_write(patch: Patch) -> None:
    patch.setattr(BlockTable, "_copies", lambda self: False)


@bug
def copies_in_the_books_only(patch: Patch) -> None:
    send = Step._send

    def forget(self: Step, sequence: Sequence, indices: Iterable[int]) -> None:
        send(self, sequence, [index for index in indices if index >= sequence.num_sent])

    patch.setattr(Step, "_send", forget)


@bug
def evicts_the_most_recent(patch: Patch) -> None:
    patch.setattr(LruOrder, "victim", lambda self: self._pages.popitem(last=True)[0])


@bug
def digest_without_its_parent(patch: Patch) -> None:
    def alone(digests: list[bytes], root: bytes, tokens: array[int], size: int, pages: int) -> None:
        for index in range(len(digests), pages):
            digests.append(sha256(root + tokens[index * size : (index + 1) * size].tobytes()).digest())

    patch.setattr(worker.admission, "extend_digests", alone)
    patch.setattr(worker.step, "extend_digests", alone)


@bug
def salt_forgotten(patch: Patch) -> None:
    patch.setattr(worker.scheduler, "root_digest", lambda identity, salt="": sha256(identity).digest())


@bug
def match_covers_the_last_token(patch: Patch) -> None:
    def greedy(self: Admission, sequence: Sequence) -> list[LogicalPageId]:
        size = self.config.block_size
        first, last = sequence.num_computed // size, len(sequence.tokens) // size
        if not self.config.enable_prefix_caching or sequence.num_computed % size:
            return []
        worker.admission.extend_digests(sequence.digests, sequence.root, sequence.tokens, size, last)
        return self.pool.tree.match(islice(sequence.digests, first, last))

    patch.setattr(Admission, "match", greedy)


@bug
def shared_without_counting(patch: Patch) -> None:
    def uncounted(self: BlockTable, num_tokens: int) -> BlockTable:
        child = BlockTable(self.pool, self.block_size)
        child.num_tokens = num_tokens
        child.pages = self.pages[: -(-num_tokens // self.block_size)]
        child._count(child.pages)
        return child

    patch.setattr(BlockTable, "fork", uncounted)


@bug
def sealed_before_it_is_full(patch: Patch) -> None:
    append = Step.append

    def early(self: Step, sequence: Sequence, count: int) -> None:
        append(self, sequence, count)
        whole = len(sequence.table) * self._config.block_size
        if self._config.enable_prefix_caching and sequence.num_computed < whole <= len(sequence.tokens):
            computed, sequence.num_computed = sequence.num_computed, whole
            self.seal(sequence)
            sequence.num_computed = computed

    patch.setattr(Step, "append", early)


@bug
def victim_is_the_oldest(patch: Patch) -> None:
    preempt = ShardScheduler._preempt
    patch.setattr(ShardScheduler, "_preempt", lambda self, sequence: preempt(self, self.running[0]))


@bug
def swapped_page_not_sent(patch: Patch) -> None:
    seal = Step.seal

    def silent(self: Step, sequence: Sequence) -> None:
        seal(self, sequence)
        sequence.resend.clear()

    patch.setattr(Step, "seal", silent)


@bug
def slot_given_twice(patch: Patch) -> None:
    leave = ShardScheduler._leave

    def twice(self: ShardScheduler, sequence: Sequence) -> None:
        slot = sequence.slot
        leave(self, sequence)
        if len(self._free_slots) < self.config.max_num_seqs:
            self._free_slots.insert(0, slot)

    patch.setattr(ShardScheduler, "_leave", twice)


@bug
def samples_share_one_random_number(patch: Patch) -> None:
    introduce = Step.introduce

    def merged(self: Step, sequence: Sequence) -> None:
        index, sequence.sample_index = sequence.sample_index, 0
        introduce(self, sequence)
        sequence.sample_index = index

    patch.setattr(Step, "introduce", merged)


@bug
def preempted_without_limit(patch: Patch) -> None:
    patch.setattr(Admission, "beyond_preemption", lambda self, sequence, unfinished: True)


@bug
def parent_lost_at_eviction(patch: Patch) -> None:
    seal = PagePool.seal
    patch.setattr(PagePool, "seal", lambda self, page, digest, parent: seal(self, page, digest, NO_PAGE))
    patch.setattr(
        LruOrder,
        "add",
        lambda self, page: (self._pages.update({page: None}), self._pages.move_to_end(page, last=False))[0],
    )


@bug
def copied_within_the_group_only(patch: Patch) -> None:
    copies = Step._copies
    patch.setattr(Step, "_copies", lambda self, source, target, blocks: copies(self, source, source, blocks))


@bug
def moved_and_not_copied(patch: Patch) -> None:
    copies = Step._copies
    patch.setattr(Step, "_copies", lambda self, *args: args[0] != args[1] or copies(self, *args))


@bug
def moved_and_not_sent(patch: Patch) -> None:
    move = worker.step.even_out

    def silent(tables: list[BlockTable], after: PlanNumber) -> list[object]:
        move(tables, after)
        return []

    patch.setattr(worker.step, "even_out", silent)


@bug
def left_before_the_plan_retired(patch: Patch) -> None:
    move = PagePool.move
    patch.setattr(
        PagePool, "move", lambda self, page, group, after, behind=(): move(self, page, group, NO_PLAN, behind)
    )


@bug
def moved_with_other_users(patch: Patch) -> None:
    def may_move(self: PagePool, page: LogicalPageId) -> bool:
        allocator, ref = next(self._blocks(page))
        return allocator.state(block_of(ref)) is BlockState.LIVE

    patch.setattr(PagePool, "may_move", may_move)


@bug
def moved_before_its_bytes_are_there(patch: Patch) -> None:
    patch.setattr(PagePool, "may_move", lambda self, page: self.users(page) == 1)


@bug
def rests_in_the_order_of_groups(patch: Patch) -> None:
    retire = PagePool.retire

    def unordered(self: PagePool, plan: PlanNumber) -> None:
        self._given_up = array("Q", bytes(8 * self.num_pages))
        retire(self, plan)

    patch.setattr(PagePool, "retire", unordered)


@bug
def one_group_for_all_entries(patch: Patch) -> None:
    patch.setattr(PagePool, "groups", lambda self, pages: [0 for _ in pages])


@bug
def one_block_for_all_columns(patch: Patch) -> None:
    blocks = PagePool.blocks
    patch.setattr(PagePool, "blocks", lambda self, pages, column=0: blocks(self, pages))


@bug
def copied_in_the_first_column_only(patch: Patch) -> None:
    copy = Step._copy

    def once(self: Step, source: LogicalPageId, target: LogicalPageId) -> None:
        copy(self, source, target)
        for sources, targets in zip(self.plan.copy_sources[1:], self.plan.copy_targets[1:], strict=True):
            sources[-1] = targets[-1]

    patch.setattr(Step, "_copy", once)


@bug
def at_rest_with_the_plan_before(patch: Patch) -> None:
    retire = PagePool.retire
    patch.setattr(PagePool, "retire", lambda self, plan: retire(self, PlanNumber(plan + 1)))


@bug
def another_entry_of_the_plan_before(patch: Patch) -> None:
    patch.setattr(worker.step, "pending_token", lambda entry: -1)


@bug
def a_token_is_left_open_before_its_turn(patch: Patch) -> None:
    patch.setattr(Stages, "_may_be_open", lambda self, sequence, number: self._is_ahead and sequence.may_step)


@bug
def a_pending_token_is_not_counted(patch: Patch) -> None:
    write = Step.write

    def short(self: Step) -> object:
        plan = write(self)
        plan.sample_position = array("i", (len(sequence.tokens) for sequence, _ in self.samples))
        return plan

    patch.setattr(Step, "write", short)


@bug
def sealed_with_a_token_that_is_not_known(patch: Patch) -> None:
    seal = Step.seal

    def early(self: Step, sequence: Sequence) -> None:
        unknown = max(0, sequence.num_computed - len(sequence.tokens))
        sequence.tokens.extend([0] * unknown)
        seal(self, sequence)
        if unknown:
            del sequence.tokens[-unknown:]

    patch.setattr(Step, "seal", early)


@bug
def a_fork_s_page_is_sealed(patch: Patch) -> None:
    patch.setattr(Step, "_is_shared", lambda self, page: False)


def run(seed: int, steps: int = 100) -> None:
    simulation = Simulation(seed, 1, 2, async_scheduling=True) if seed % 2 else Simulation(seed)
    for _ in range(steps):
        simulation.step()
    simulation.drain()


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name: str, monkeypatch: Patch) -> None:
    BUGS[name](monkeypatch)
    with pytest.raises(Exception) as found:
        for seed in range(120):
            run(seed)
    assert not isinstance(found.value, (TypeError, NameError)), "the bug itself is broken"

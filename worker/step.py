"""The plan in the making: which rows it has, and everything that booking their tokens entails.

`ShardScheduler` decides who advances by how much; `Step` carries that out on tables and pages and writes the arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ListOf

from pagetable.balance import even_out
from pagetable.ids import BlockId, LogicalPageId, PlanNumber, SequenceId
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE, extend_digests
from worker.config import ShardConfig
from worker.plan import Admit, Plan, by_column, pending_token
from worker.sequence import Sequence


class Row:
    """A sequence's share of the plan: tokens start .. start + count."""

    __slots__ = ("count", "sequence", "start")

    def __init__(self, sequence: Sequence, start: int) -> None:
        self.sequence, self.start, self.count = sequence, start, 0


class Step:
    """One plan before it is sent, and what its retirement needs afterwards.

    Attributes:
        budget: prompt tokens that the plan may still take.
        oldest: the oldest unfinished sequence when the plan was begun; nothing holds it up.
        samples: (who samples, from whose row).
        scored: (sequence, how many prompt positions).
        fresh: pages that this plan is the first to write.
        sealed: pages that others find because this plan fills them, in the order in which they were sealed.
        moved: pages that this plan copies to another group.
    """

    def __init__(self, number: PlanNumber, budget: int, oldest: Sequence, config: ShardConfig, pool: PagePool) -> None:
        columns = pool.num_columns
        self.plan = Plan(
            number,
            table_blocks=by_column(columns),
            copy_sources=by_column(columns),
            copy_targets=by_column(columns),
        )
        self.budget = budget
        self.oldest = oldest
        self.rows: dict[SequenceId, Row] = {}
        self.samples: list[tuple[Sequence, Sequence]] = []
        self.scored: list[tuple[Sequence, int]] = []
        self.fresh: list[LogicalPageId] = []
        self.sealed: list[LogicalPageId] = []
        self.moved: list[LogicalPageId] = []
        self._config, self._pool = config, pool

    def names(self, sequence: Sequence) -> bool:
        """Whether the plan reads or writes the sequence's pages."""
        return sequence.last_plan == self.plan.number

    def append(self, sequence: Sequence, count: int) -> None:
        """Book the sequence's next `count` tokens: pages, copies, table changes for the ranks, seals.

        Raises OutOfBlocks with nothing changed where the pool has no room for them.
        """
        row = self.rows.get(sequence.sequence_id)
        table, plan = sequence.table, self.plan
        before = len(table)
        copy = table.append(count, plan.number)
        if row is None:
            row = self.rows[sequence.sequence_id] = Row(sequence, sequence.num_computed)
        row.count += count
        if sequence.num_sent < 0:
            self.introduce(sequence)
        if copy is not None:
            self._copy(*copy)
            if before <= sequence.num_sent:
                self._send(sequence, (before - 1,))
        if sequence.resend:
            self._send(sequence, sequence.resend)
            sequence.resend.clear()
        if len(table) > sequence.num_sent:
            self._send(sequence, range(sequence.num_sent, len(table)))
            sequence.num_sent = len(table)
        self.fresh.extend(map(LogicalPageId, table.pages[before:]))
        sequence.num_computed += count
        sequence.last_plan = plan.number
        if sequence.num_computed // self._config.block_size > sequence.num_sealed:
            self.seal(sequence)

    def sample(self, sequence: Sequence, source: Sequence) -> None:
        """`sequence` samples its next token from the last logits of `source`'s row."""
        sequence.pending += 1
        sequence.last_plan = self.plan.number
        self.samples.append((sequence, source))

    def introduce(self, sequence: Sequence) -> None:
        """Tell the ranks who sits in the sequence's slot now."""
        request = sequence.request
        sequence.num_sent = 0
        self.plan.admits.append(
            Admit(
                slot=sequence.slot,
                sequence_id=sequence.sequence_id,
                sample_index=sequence.sample_index,
                params=request.params,
                prompt_length=sequence.prompt_length,
                tokens=array("i", sequence.tokens),
                eos_token_ids=request.eos_token_ids,
            )
        )

    def even_out(self) -> None:
        """Move pages between groups where one would attend much more of this plan than the others."""
        rows = [row.sequence for row in self.rows.values()]
        for move in even_out([s.table for s in rows], self.plan.number):
            sequence = rows[move.row]
            page = LogicalPageId(sequence.table.pages[move.index])
            self._send(sequence, (move.index,))
            self._copies(move.source, move.target, move.blocks)
            self.fresh.append(page)
            self.moved.append(page)

    def write(self) -> Plan:
        """Rows, samples and scores as arrays; rows of similar length are neighbours."""
        plan = self.plan
        ends: dict[SequenceId, int] = {}
        for row in sorted(self.rows.values(), key=lambda row: len(row.sequence.table.pages)):
            sequence, start, offset = row.sequence, row.start, len(plan.tokens)
            plan.slots.append(sequence.slot)
            plan.first_position.append(start)
            if start == len(sequence.tokens):
                plan.tokens.append(pending_token(sequence.entry))
            elif row.count == 1:
                plan.tokens.append(sequence.tokens[start])
            else:
                plan.tokens.extend(sequence.tokens[start : start + row.count])
            plan.query_start.append(len(plan.tokens))
            ends[sequence.sequence_id] = len(plan.tokens) - 1
            if sequence.num_scored < sequence.prompt_length - 1:
                self._score(row, offset)
        for entry, (sequence, source) in enumerate(self.samples):
            plan.sample_row.append(ends[source.sequence_id])
            plan.sample_slot.append(sequence.slot)
            plan.sample_position.append(len(sequence.tokens) + sequence.pending - 1)
            sequence.entry = entry
        return plan

    def seal(self, sequence: Sequence) -> None:
        """Let others find the pages that this plan fills, as far as their tokens are known; where one of equal content
        is there already, use that."""
        table, size = sequence.table, self._config.block_size
        full = min(sequence.num_computed, len(sequence.tokens)) // size
        if full <= sequence.num_sealed or not self._config.enable_prefix_caching:
            return
        extend_digests(sequence.digests, sequence.root, sequence.tokens, size, full)
        for index in range(sequence.num_sealed, full):
            page = LogicalPageId(table.pages[index])
            if self._is_shared(page):  # forked before its last token was known: when the fork has its copy
                return
            parent = LogicalPageId(table.pages[index - 1]) if index else NO_PAGE
            found = self._pool.seal(page, sequence.digests[index], parent)
            if found == page:
                self.sealed.append(page)
            else:
                table.swap(index, found, self.plan.number)
                sequence.resend.append(index)  # this plan still reads and writes its own page
            sequence.num_sealed = index + 1

    def _is_shared(self, page: LogicalPageId) -> bool:
        return self._pool.users(page) != 1

    def _send(self, sequence: Sequence, indices: ListOf[int]) -> None:
        """Tell the ranks where these pages of the sequence's table are."""
        plan, pool, pages = self.plan, self._pool, sequence.table.pages
        changed = [pages[index] for index in indices]
        plan.table_slot.extend([sequence.slot] * len(changed))
        plan.table_index.extend(indices)
        plan.table_group.extend(pool.groups(changed))
        for column, blocks in enumerate(plan.table_blocks):
            blocks.extend(pool.blocks(changed, column))

    def _copy(self, source: LogicalPageId, target: LogicalPageId) -> None:
        """The ranks copy `source` to `target` before the plan writes."""
        pool = self._pool
        blocks = [(pool.block(source, column), pool.block(target, column)) for column in range(pool.num_columns)]
        self._copies(pool.group(source), pool.group(target), blocks)
        self.fresh.append(target)

    def _copies(self, source: int, target: int, blocks: ListOf[tuple[BlockId, BlockId]]) -> None:
        """A page's block in each column is copied, from one group to another or the same."""
        plan = self.plan
        plan.copy_from.append(source)
        plan.copy_to.append(target)
        for sources, targets, (from_block, to_block) in zip(plan.copy_sources, plan.copy_targets, blocks, strict=True):
            sources.append(from_block)
            targets.append(to_block)

    def _score(self, row: Row, offset: int) -> None:
        sequence = row.sequence
        first = max(row.start, sequence.num_scored)
        last = min(row.start + row.count, sequence.prompt_length - 1)
        for position in range(first, last):
            self.plan.score_row.append(offset + position - row.start)
            self.plan.score_slot.append(sequence.slot)
            self.plan.score_token.append(sequence.tokens[position + 1])
        if last > first:
            sequence.num_scored = last
            self.scored.append((sequence, last - first))

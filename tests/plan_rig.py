"""All ranks of a layout in one process, and plans by hand for them."""

from __future__ import annotations

import mmap
import random
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels import cpu
from kernels.peers import Peers, Ring, SharedPeers
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from tests.models import make_model
from worker.codec import decode_result, encode_plan
from worker.kv_cache import PagedKVCache
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.plan import Admit, Plan, StepResult, by_column
from worker.runner import Runner
from worker.sampler import Sampler
from worker.tables import TableMirror
from worker.weights import open_weights

VOCAB, SLOTS, BLOCKS, SIZE = 331, 6, 64, 4
PLAN_BYTES = 8192
LAYOUTS = [Layout(), Layout(1, 2), Layout(1, 3), Layout(2), Layout(2, 2, 2)]


@dataclass
class Ends:
    """What a runner asks of its group."""

    tensor: Peers | None = None
    slice: Peers | None = None
    previous: Ring | None = None
    next: Ring | None = None
    results: Ring | None = None
    plans: Ring | None = None
    back: None = None
    owns_cores: bool = False
    is_aborted: bool = False

    def abort(self) -> None:
        self.is_aborted = True


class Shard:
    """All ranks of a layout in this process."""

    def __init__(self, folder: Path, layout: Layout, dtype: torch.dtype, *, owns_cores: bool = False) -> None:
        config = ModelConfig.from_folder(folder)
        parts = layout.parts(config)
        weights, tensor = open_weights(folder), layout.tensor
        self.layout, self.runners, self.ends = layout, list[Runner](), list[Ends]()
        rows = 64 * 64 * 4 * 2
        for part in parts:
            model = NativeModel(config, weights, dtype, cpu.Native(cpu.levels()[-1]), 1, part=part)
            cache = PagedKVCache(config, BLOCKS, SIZE, dtype, part)
            group = part.group if layout.page > 1 else None
            tables = TableMirror(SLOTS, BLOCKS, SIZE, column=part.stage, group=group)
            widths = tuple(len(each.vocab) for each in parts[:tensor])
            self.runners.append(Runner(model, cache, tables, Sampler(VOCAB, SLOTS, model.choose), part, widths))
            self.ends.append(Ends(owns_cores=owns_cores))
        for stage in range(layout.pipeline):
            first = stage * tensor
            if tensor > 1:
                size = SharedPeers.num_bytes(tensor, rows)
                memory = mmap.mmap(-1, size)
                for t in range(tensor):
                    self.ends[first + t].tensor = SharedPeers(memory, 0, t, tensor, rows)
                if layout.page > 1:
                    memory = mmap.mmap(-1, size)
                    for t in range(tensor):
                        self.ends[first + t].slice = SharedPeers(memory, 0, t, tensor, rows)
            for t in range(tensor if stage + 1 < layout.pipeline else 0):
                memory = mmap.mmap(-1, Ring.num_bytes(2, rows))
                self.ends[first + t].next = Ring(memory, 0, 2, rows)
                self.ends[first + t + tensor].previous = Ring(memory, 0, 2, rows)
        if layout.pipeline > 1:
            memory = mmap.mmap(-1, Ring.num_bytes(2, rows))
            for rank in (0, layout.num_ranks - tensor):
                self.ends[rank].results = Ring(memory, 0, 2, rows)
        self.to_followers = list[Ring]()
        for ends in self.ends[1:]:
            memory = mmap.mmap(-1, Ring.num_bytes(3, PLAN_BYTES))
            self.to_followers.append(Ring(memory, 0, 3, PLAN_BYTES))
            ends.plans = Ring(memory, 0, 3, PLAN_BYTES)
        for runner, ends in zip(self.runners, self.ends, strict=True):
            runner.reset(ends)  # type: ignore[arg-type]

    def run(self, plan: Plan, *, encoded: bool) -> StepResult:
        """All ranks' parts, natively where that can be or step by step; what the one that answers says."""

        def part(runner: Runner) -> StepResult | None:
            if encoded:
                return runner.run_encoded(encode_plan(plan))
            return runner.carry_out(runner.prepare(plan))

        with ThreadPoolExecutor(len(self.runners)) as threads:
            found = [each for each in threads.map(part, self.runners) if each is not None]
        if not found:
            assert encoded and self.ends[0].results is not None
            tag, data = self.ends[0].results.take()
            assert tag == plan.number
            found.append(decode_result(data))
        assert len(found) == 1
        return found[0]

    def state(self) -> list[Any]:
        """Tables and pages, as bits."""
        return [
            (runner.tables.tables.tolist(), runner.cache.pool.contiguous().view(torch.uint8).tolist())
            for runner in self.runners
        ]


def plan_of(number: int, layout: Layout) -> Plan:
    columns = (by_column(layout.pipeline) for _ in range(3))
    names = ("table_blocks", "copy_sources", "copy_targets")
    return Plan(PlanNumber(number), **dict(zip(names, columns, strict=True)))


@dataclass
class Books:
    """Sequences in slots, and plans that advance them."""

    rng: random.Random
    layout: Layout
    lengths: dict[int, int] = field(default_factory=dict)  # by slot
    pages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # (group, block)
    greedy: dict[int, bool] = field(default_factory=dict)
    free: list[list[int]] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.free = [self.rng.sample(range(BLOCKS), BLOCKS) for _ in range(self.layout.page)]

    def plan(self) -> tuple[Plan, bool]:
        """A plan, and whether it is plain."""
        self.number += 1
        plan = plan_of(self.number, self.layout)
        is_plain = True
        for slot in [slot for slot, length in self.lengths.items() if length > 30]:
            del self.lengths[slot]
            for group, block in self.pages.pop(slot):
                self.free[group].insert(0, block)
        if len(self.lengths) < SLOTS and self.rng.random() < 0.4:
            slot = self.rng.choice([each for each in range(SLOTS) if each not in self.lengths])
            self.lengths[slot], self.pages[slot], self.greedy[slot] = 0, [], self.rng.random() < 0.85
            params = SamplingParams(temperature=0.0 if self.greedy[slot] else 0.8, seed=slot, ignore_eos=True)
            plan.admits.append(Admit(slot, SequenceId(self.number), 0, params, 1, array("i", (3,))))
            is_plain = False
        running = self.rng.sample(sorted(self.lengths), self.rng.randint(1, len(self.lengths))) if self.lengths else []
        for slot in running:
            count = self.rng.choice((1, 1, 1, 2, 7))
            samples = self.rng.random() < 0.8
            self._row(plan, slot, count, samples=samples)
            is_plain &= self.greedy[slot] or not samples
        if plan.tokens and self.rng.random() < 0.1:
            self._copy(plan, self.rng.choice(list(plan.slots)))
            is_plain = False
        return plan, is_plain and bool(plan.tokens)

    def _row(self, plan: Plan, slot: int, count: int, *, samples: bool) -> None:
        first = self.lengths[slot]
        plan.slots.append(slot)
        plan.first_position.append(first)
        plan.tokens.extend(self.rng.randrange(VOCAB) for _ in range(count))
        plan.query_start.append(len(plan.tokens))
        self.lengths[slot] = first + count
        while len(self.pages[slot]) * SIZE < first + count:
            group = self.rng.randrange(self.layout.page)
            self._place(plan, slot, len(self.pages[slot]), group)
        if samples:
            plan.sample_row.append(len(plan.tokens) - 1)
            plan.sample_slot.append(slot)
            plan.sample_position.append(first + count)

    def _place(self, plan: Plan, slot: int, index: int, group: int) -> int:
        block = self.free[group].pop()
        self.pages[slot][index:] = [(group, block), *self.pages[slot][index + 1 :]]
        plan.table_slot.append(slot)
        plan.table_index.append(index)
        plan.table_group.append(group)
        for column in plan.table_blocks:
            column.append(block)
        return block

    def _copy(self, plan: Plan, slot: int) -> None:
        group, source = self.pages[slot][0]
        target = self._place(plan, slot, 0, group)
        plan.copy_from.append(group)
        plan.copy_to.append(group)
        for sources, targets in zip(plan.copy_sources, plan.copy_targets, strict=True):
            sources.append(source)
            targets.append(target)


def plan_of_a_row(number: int, layout: Layout) -> Plan:
    """The first three tokens of a sequence, and a sample of the last."""
    books = Books(random.Random(2), layout)
    books.lengths[0], books.pages[0], books.greedy[0] = 0, [], True
    plan = plan_of(number, layout)
    books._row(plan, 0, 3, samples=True)
    return plan


def three_layers(folder: Path) -> Path:
    """A model for all of `LAYOUTS`."""
    return make_model(
        folder,
        seed=3,
        vocab_size=VOCAB,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=150,
    )


def said(result: StepResult) -> tuple[int, list[int], dict[int, str]]:
    return result.number, result.tokens.tolist(), result.failed

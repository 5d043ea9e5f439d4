"""A model with its cache and tables, and the least scheduler that a test needs; what transformers says beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels import ops
from kernels.cpu import Native
from pagetable.ids import PlanNumber
from tests.models import reference
from worker.gpu_model import GpuModel
from worker.kv_cache import CPU, PagedKVCache
from worker.model import Decoder
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.plan import Plan
from worker.tables import TableMirror
from worker.weights import open_weights

LENGTHS = (1, 2, 15, 16, 17, 40, 63, 130, 300)
CHUNKS = (1, 1, 7, 16, 5, 33, 64, 48, 100)
WHOLE = (300,) * len(LENGTHS)
DECODES = 6


@dataclass
class Rig:
    """A model with its cache and tables, and the least scheduler that a test needs: blocks from a shuffled list."""

    model: Decoder | NativeModel | GpuModel
    cache: PagedKVCache
    tables: TableMirror
    free: list[int]
    number_of_blocks: dict[int, int] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        block_size: int = 16,
        num_blocks: int = 96,
        kind: str = "torch",
        threads: int = 2,
        *,
        deterministic: bool = False,
        pages: torch.dtype | None = None,
        device: torch.device = CPU,
        backend: ops.PlannedBackend | None = None,
    ) -> Rig:
        """
        Args:
            kind: "torch", a level of the native kernels, or "gpu": with `backend` on `device`.
        """
        config, weights = ModelConfig.from_folder(folder), open_weights(folder)
        model: Decoder | NativeModel | GpuModel
        if kind == "torch":
            model = Decoder(config, weights, dtype)
        elif kind == "gpu":
            assert backend is not None
            model = GpuModel(config, weights, dtype, backend, device)
        else:
            model = NativeModel(config, weights, dtype, Native(kind), threads, deterministic=deterministic)
        cache = PagedKVCache(config, num_blocks, block_size, pages or dtype, None, device, backend)
        # whatever lies in a page before it is written must not reach any result
        cache.pool.view(torch.int16).fill_(-1)  # NaN as float32, bfloat16 and as a scale
        free = list(range(num_blocks))
        random.Random(7).shuffle(free)
        return cls(model, cache, TableMirror(16, num_blocks, block_size), free)

    def plan(self, rows: list[tuple[int, int, list[int]]]) -> Plan:
        """A plan of rows (slot, first position, tokens), with the table changes that they need."""
        plan = Plan(PlanNumber(0))
        for slot, first, tokens in rows:
            have = self.number_of_blocks.get(slot, 0)
            need = -(-(first + len(tokens)) // self.cache.block_size)
            for index in range(have, need):
                plan.table_slot.append(slot)
                plan.table_index.append(index)
                plan.table_group.append(0)
                plan.table_blocks[0].append(self.free.pop())
            self.number_of_blocks[slot] = max(have, need)
            plan.slots.append(slot)
            plan.first_position.append(first)
            plan.tokens.extend(tokens)
            plan.query_start.append(len(plan.tokens))
        return plan

    @torch.inference_mode()
    def logits(self, rows: list[tuple[int, int, list[int]]]) -> torch.Tensor:
        plan = self.plan(rows)
        self.tables.apply(plan)
        hidden = self.model.forward(self.tables.batch(plan, self.model.windows), self.cache)
        head = self.model.head(hidden, np.arange(len(hidden)), logits=True)
        assert head.logits is not None
        logits = head.logits.cpu()
        assert head.tokens.tolist() == logits.argmax(-1).tolist()
        assert np.array_equal(head.values, logits.amax(-1).numpy())
        assert np.allclose(head.totals, logits.double().sum(-1).numpy(), rtol=1e-4, atol=1e-3)
        without = self.model.head(hidden, np.arange(len(hidden)), logits=False)
        assert without.logits is None and np.array_equal(without.tokens, head.tokens)
        return logits


def prompts(lengths: Sequence[int] = LENGTHS, vocab: int = 331) -> list[list[int]]:
    """Of these lengths, each with DECODES more tokens that are fed one at a time."""
    draw = random.Random(11)
    return [[draw.randrange(vocab) for _ in range(length + DECODES)] for length in lengths]


def run_all(rig: Rig, sequences: list[list[int]], chunks: Sequence[int]) -> list[torch.Tensor]:
    """Logits at every position, all sequences in one ragged batch a step: prompt chunks beside decodes."""
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while running := [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]:
        rows = []
        for i in running:
            prompt_left = len(sequences[i]) - DECODES - done[i]
            count = min(chunks[i], prompt_left) if prompt_left > 0 else 1
            rows.append((i, done[i], sequences[i][done[i] : done[i] + count]))
        logits = rig.logits(rows)
        assert logits.dtype == torch.float32
        for i, part in zip(running, logits.split([len(tokens) for _, _, tokens in rows]), strict=True):
            parts[i].append(part)
            done[i] += len(part)
    return [torch.cat(part) for part in parts]


@torch.inference_mode()
def run_reference(folder: Path, sequences: list[list[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = reference(folder, dtype)
    return [model(torch.tensor([tokens]), use_cache=False).logits[0].float() for tokens in sequences]


def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    # the mask is given because transformers takes tokens that equal the padding id for padding
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(tokens) :].tolist()

"""Runner: carries out one plan on one rank, in the order that `worker/plan.py` states."""

from __future__ import annotations

from array import array

import numpy as np
import torch

from worker.kv_cache import PagedKVCache
from worker.model import Decoder
from worker.native_model import NativeModel
from worker.plan import Plan, StepResult, TokenLogprobs
from worker.sampler import Sampler
from worker.tables import TableMirror, ints

# Prompt logprobs can ask for the logits of every token of a chunk; so many rows of them exist at a time.
MAX_SCORE_ROWS = 64
NOT_FINITE = "the model's logits are not finite at this position"
NOTHING_LEFT = "no token is left to sample: biases and masks leave none finite"


class Runner:
    """Model, pages, tables and samplers of one rank. All state of the step loop below the scheduler is here."""

    def __init__(
        self, model: Decoder | NativeModel, cache: PagedKVCache, tables: TableMirror, sampler: Sampler
    ) -> None:
        self.model, self.cache, self.tables, self.sampler = model, cache, tables, sampler

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Carry out one step: admits, table changes, copies, forward pass, samples, scores.

        A sample row whose logits are not finite is named in `failed`, with token -1; the other rows are unharmed.
        """
        for admit in plan.admits:
            self.sampler.admit(admit)
        self.tables.apply(plan)
        if plan.copy_source:
            self.cache.copy_pages(torch.from_numpy(ints(plan.copy_source)), torch.from_numpy(ints(plan.copy_target)))
        result = StepResult(plan.number, array("i"))
        if plan.num_tokens:
            batch = self.tables.batch(plan, self.model.windows)
            hidden = self.model.forward(batch, self.cache)
            self._sample(plan, hidden, result)
            result.scores = self._score(plan, hidden)
        return result

    def _sample(self, plan: Plan, hidden: torch.Tensor, result: StepResult) -> None:
        if not plan.sample_row:
            return
        plain = self.sampler.takes_likeliest(plan.sample_slot)
        head = self.model.head(hidden, ints(plan.sample_row).astype(np.int64), logits=not plain)
        # any NaN or infinity makes the row's sum one
        finite = np.isfinite(head.totals)
        result.failed = dict.fromkeys(np.flatnonzero(~finite).tolist(), NOT_FINITE)
        entries = np.flatnonzero(finite).tolist()
        if head.logits is None:
            self.sampler.count(array("i", (plan.sample_slot[entry] for entry in entries)))
            result.tokens = array("i", np.where(finite, head.tokens, -1).astype(np.int32).tobytes())
            return
        result.tokens = array("i", [-1] * len(finite))
        if not entries:
            return
        tokens, logprobs = self.sampler.sample(
            head.logits[entries] if result.failed else head.logits,
            array("i", (plan.sample_slot[entry] for entry in entries)),
            array("i", (plan.sample_position[entry] for entry in entries)),
            (head.tokens[entries], head.values[entries]),
        )
        for entry, token in zip(entries, tokens, strict=True):
            result.tokens[entry] = token
            if token < 0:
                result.failed[entry] = NOTHING_LEFT
        result.logprobs = {entries[index]: found for index, found in logprobs.items()}

    def _score(self, plan: Plan, hidden: torch.Tensor) -> list[TokenLogprobs]:
        rows, scores = ints(plan.score_row).astype(np.int64), list[TokenLogprobs]()
        for start in range(0, len(rows), MAX_SCORE_ROWS):
            part = slice(start, start + MAX_SCORE_ROWS)
            logits = self.model.head(hidden, rows[part], logits=True).logits
            assert logits is not None
            scores += self.sampler.score(logits, plan.score_token[part], plan.score_slot[part])
        return scores

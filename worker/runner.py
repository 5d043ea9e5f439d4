"""Runner: carries out plans on one rank, in the order that `worker/plan.py` states."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kernels.decoder import Border, Head
from kernels.peers import PeersBroken, Ring
from kernels.rank import NativeRank, Progress
from pagetable.ids import PlanNumber
from worker.codec import decode_plan, encode_plan, plan_number
from worker.gpu_model import GpuModel
from worker.group import Group
from worker.heads import gather_head, share_tokens
from worker.kv_cache import PagedKVCache
from worker.layout import Part
from worker.model import Decoder
from worker.native_model import NativeModel
from worker.open_tokens import OpenTokens
from worker.page_moves import move_pages
from worker.plan import Plan, StepResult, TokenLogprobs
from worker.sampler import Sampler
from worker.tables import Batch, Ints, Moves, TableMirror

Model: TypeAlias = Decoder | NativeModel | GpuModel

# Prompt logprobs can ask for the logits of every token of a chunk; so many rows of them exist at a time.
MAX_SCORE_ROWS = 64
_AHEAD_BYTES = 16 << 20  # of weights, at most, that a stage asks for while it waits for the one before
_BORDER_PIECES = 64  # kBorderPieces in csrc/peers.h: in the tag of hidden rows, more than there are
_MOST_VIEWS = 16  # more than the slots of two rings; messages over gloo come as new ones
NOT_FINITE = "the model's logits are not finite at this position"
NOTHING_LEFT = "no token is left to sample: biases and masks leave none finite"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what a rank's tables say to it.

    Attributes:
        copies: (source, target) blocks inside the rank's pool.
        moves: between the groups' pools; None for none.
        batch: None where the plan has no tokens.
    """

    plan: Plan
    copies: tuple[Ints, Ints]
    moves: Moves | None
    batch: Batch | None


class Runner:
    """Model, pages, tables and samplers of one rank. All state of the step loop below the scheduler is here.

    Attributes:
        part: what of the model this rank has; None is all of it.
        group: the other ranks of this epoch; None where there are none.
        plain: what does plain plans in one native call; None where nothing does.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        tables: TableMirror,
        sampler: Sampler,
        part: Part | None = None,
        vocab_widths: tuple[int, ...] = (),
        *,
        fills_tokens: bool = False,
    ) -> None:
        """
        Args:
            vocab_widths: rows of the head on each tensor rank of the stage.
            fills_tokens: plans may leave tokens open that one in flight finds (asynchronous scheduling), so all ranks
                of the last stage must know what it finds.
        """
        self.model, self.cache, self.tables, self.sampler, self.part = model, cache, tables, sampler, part
        self.group: Group | None = None
        self._native = model if isinstance(model, NativeModel) else None
        self._widths, self._fills_tokens = vocab_widths, fills_tokens
        self._open = OpenTokens()
        self._views: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}  # by the message's id
        self.plain = self._make_plain(None)

    @property
    def answers(self) -> bool:
        """Whether this rank's `run` gives the shard's result."""
        return self.part is None or (self.part.is_last and self.part.tensor_rank == 0)

    def reset(self, group: Group | None) -> None:
        """Another epoch: nothing of the last one's tables holds. Samplers follow with the admits."""
        self.tables.tables.fill(-1)
        self.group = group
        self._views.clear()
        self.plain = self._make_plain(group)
        if self.part is not None:
            self._open = OpenTokens(self.part.layout.pipeline, group.back if group is not None else None)

    def prepare(self, plan: Plan) -> Prepared:
        """Change the tables as a plan says, and make the arrays of its step. Plans come in order, from one thread; the
        step before may be running meanwhile."""
        self.tables.apply(plan)
        batch = self.tables.batch(plan, self.model.windows) if plan.num_tokens else None
        return Prepared(plan, self.tables.copies(plan), self.tables.moves(plan), batch)

    def run(self, plan: Plan, data: bytes = b"") -> StepResult | None:
        """`prepare`, then `carry_out`; a plain plan in one native call.

        Args:
            data: the plan as bytes, where the caller has them.
        """
        if self.plain is not None and self._may_be_plain(plan):
            tokens = self.run_plain(data or encode_plan(plan))
            if tokens is not None:
                return self._answer(plan.number, tokens)
        return self.carry_out(self.prepare(plan))

    def run_encoded(self, data: bytes) -> StepResult | None:
        """`run` of a plan as bytes, on a rank that is not the leader: it may have answered itself, and returns None
        then, too. Raises BadFrame where they are none, with nothing done."""
        tokens = self.run_plain(data)
        if tokens is not None:
            return self._answer(plan_number(data), tokens)
        return self.carry_out(self.prepare(decode_plan(data)))

    def run_plain(self, data: bytes) -> array[int] | None:
        """The tokens of a plan that is plain; None, with nothing but its table changes done, where it is not."""
        if self.plain is None:
            return None
        try:
            return self.plain.run(data)
        except PeersBroken:
            self._abort()
            raise

    def follow(self, plans: Ring, progress: Progress) -> StepResult | None:
        """Do plain plans as they come through a ring, each behind the digest of all before it.

        Returns:
            A result that the caller has to send. None where the next message in the ring is the caller's to receive,
            whatever it is.
        """
        if self.plain is None:
            return None
        try:
            tokens = self.plain.follow(plans, progress)
        except PeersBroken:
            self._abort()
            raise
        return None if tokens is None else self._answer(PlanNumber(progress.number), tokens)

    def _abort(self) -> None:
        """It may be this rank that found the stage before at another plan."""
        if self.group is not None:
            self.group.abort()

    def _make_plain(self, group: Group | None) -> NativeRank | None:
        if self._native is None or self.tables.native is None or self._fills_tokens:
            return None
        decoder, part = self._native.decoder, self._native.part
        if group is None:
            if part.layout.num_ranks > 1:  # there is no epoch
                return None
            return NativeRank(decoder, self.tables.native, self.cache.pool, self.sampler.plain)
        previous, behind = group.previous, group.next
        if not (isinstance(previous, Ring | None) and isinstance(behind, Ring | None)):
            return None
        if previous is not None and group.owns_cores:
            previous.read_ahead(*decoder.first_weights(_AHEAD_BYTES))
        return NativeRank(
            decoder,
            self.tables.native,
            self.cache.pool,
            self.sampler.plain,
            self.tables.column,
            part.vocab.start,
            tensor=group.tensor,
            slice=group.slice,
            previous=previous,
            next=behind,
            answers=group.results if self.answers else None,
        )

    def _may_be_plain(self, plan: Plan) -> bool:
        """False where it is not, and to encode it would be in vain."""
        if plan.admits or plan.copy_from or plan.score_row:
            return False
        is_last = self.part is None or self.part.is_last
        return not is_last or self.sampler.are_plain(plan.sample_slot)

    def _answer(self, number: PlanNumber, tokens: array[int]) -> StepResult | None:
        """What is left to say of a plain plan whose tokens these are."""
        if not self.answers or (self.plain is not None and self.plain.has_answered):
            return None
        result = StepResult(number, tokens)
        if -1 in tokens:
            result.failed = {entry: NOT_FINITE for entry, token in enumerate(tokens) if token < 0}
        return result

    def carry_out(self, prepared: Prepared) -> StepResult | None:
        """One step whose table changes are made: admits, copies, forward pass, samples, scores.

        A sample row whose logits are not finite is named in `failed`, with token -1; the other rows are unharmed.
        Returns None where another rank answers. Raises PeersBroken where the epoch is over.
        """
        if self._native is not None:
            return self._carry_out(prepared)
        with torch.inference_mode():
            return self._carry_out(prepared)

    def _carry_out(self, prepared: Prepared) -> StepResult | None:
        plan, batch = prepared.plan, prepared.batch
        is_last = self.part is None or self.part.is_last
        if is_last:
            for admit in plan.admits:
                self.sampler.admit(admit)
        source, target = prepared.copies
        if len(source):
            self.cache.copy_pages(torch.from_numpy(source), torch.from_numpy(target))
        if prepared.moves is not None:
            assert self.group is not None and self.group.slice is not None, "several groups are several ranks"
            move_pages(self.group.slice, self.cache, prepared.moves)
        result = StepResult(plan.number, array("i"))
        if batch is not None:
            if self._fills_tokens and (self.part is None or self.part.is_first):
                self._open.fill(plan.number, batch.tokens.numpy())
            hidden = self._forward(plan, batch)
            if is_last:
                self._sample(plan, hidden, result)
                if self._fills_tokens:
                    self._open.found(plan.number, result.tokens)
                if plan.score_row:
                    result.scores = self._score(plan, hidden)
            if self.group is not None and self.group.previous is not None:
                self.group.previous.release()
        return result if self.answers else None

    def _forward(self, plan: Plan, batch: Batch) -> torch.Tensor:
        """The stage's layers; its hidden rows go to the next stage where there is one."""
        group, model = self.group, self._native
        if group is None or model is None:
            return self.model.forward(batch, self.cache)
        part, behind, previous = model.part, group.next, group.previous
        if isinstance(behind, Ring):
            border = Border(most=len(part.border_out), behind=behind)
        else:
            border = Border(most=part.border_even)
        forward = partial(model.forward, batch, self.cache, tensor=group.tensor, slice=group.slice, border=border)
        if previous is None:
            out = None if behind is None else self._rows(behind.slot(), plan.num_tokens, part.is_cut, is_slot=True)
            hidden = forward(out=out)
        else:
            tag, message = previous.receive()
            number, border.given = divmod(tag, _BORDER_PIECES)
            if number != plan.number:
                group.abort()
                raise PeersBroken(f"hidden rows of plan {number} came for plan {plan.number}")
            hidden = forward(self._rows(message, plan.num_tokens, part.is_carrying))
            if behind is not None:
                self._rows(behind.slot(), plan.num_tokens, part.is_cut, is_slot=True).copy_(hidden)
        if behind is not None:
            behind.publish(plan.number * _BORDER_PIECES + border.made.value, hidden.numel() * 4)
        return hidden

    def _rows(self, message: torch.Tensor, num_tokens: int, is_cut: bool, *, is_slot: bool = False) -> torch.Tensor:
        """What goes between two stages, or the front of the slot for it: float32 [tokens, hidden]; two of them,
        [2, tokens, hidden], where the one ends inside an MLP.

        A ring's few messages are the same objects again and again.
        """
        kept = self._views.get(id(message))
        if kept is not None and kept[0] is message and kept[1] == num_tokens:
            return kept[2]
        shape = (1 + is_cut, num_tokens, self.model.config.hidden_size)
        view = (message[: math.prod(shape) * 4] if is_slot else message).view(torch.float32).view(shape)
        view = view if is_cut else view[0]
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        self._views[id(message)] = (message, num_tokens, view)
        return view

    def _head(self, hidden: torch.Tensor, rows: npt.NDArray[np.int64], *, logits: bool) -> Head:
        found = self.model.head(hidden, rows, logits=logits)
        if self.group is None or self.group.tensor is None:
            return found
        return gather_head(self.group.tensor, found, self._widths)

    def _sample(self, plan: Plan, hidden: torch.Tensor, result: StepResult) -> None:
        if not plan.sample_row:
            return
        plain = self.sampler.takes_likeliest(plan.sample_slot)
        head = self._head(hidden, np.array(plan.sample_row, np.int64), logits=not plain)
        # any NaN or infinity makes the row's sum one
        finite = np.isfinite(head.totals)
        if (head.logits is None or not self.answers) and np.logical_and.reduce(finite):
            self.sampler.count(plan.sample_slot)
            result.tokens = array("i", head.tokens.tobytes())
            self._share(result, head)
            return
        result.failed = dict.fromkeys(np.flatnonzero(~finite).tolist(), NOT_FINITE)
        entries = np.flatnonzero(finite).tolist()
        if head.logits is None or not self.answers:
            self.sampler.count(array("i", (plan.sample_slot[entry] for entry in entries)))
            result.tokens = array("i", np.where(finite, head.tokens, -1).astype(np.int32).tobytes())
            self._share(result, head)
            return
        result.tokens = array("i", [-1] * len(finite))
        if not entries:
            self._share(result, head)
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
        self._share(result, head)

    def _share(self, result: StepResult, head: Head) -> None:
        """The answering rank's tokens on all ranks, where these did not find the same and the next plan may need them.

        A failed entry's token is -1 there, as in the result."""
        if self._fills_tokens and head.logits is not None and self.group is not None and self.group.tensor is not None:
            tokens = np.array(result.tokens, np.int32)
            result.tokens = array("i", share_tokens(self.group.tensor, tokens).tobytes())

    def _score(self, plan: Plan, hidden: torch.Tensor) -> list[TokenLogprobs]:
        rows, scores = np.array(plan.score_row, np.int64), list[TokenLogprobs]()
        for start in range(0, len(rows), MAX_SCORE_ROWS):
            part = slice(start, start + MAX_SCORE_ROWS)
            logits = self._head(hidden, rows[part], logits=True).logits
            assert logits is not None
            if self.answers:
                scores += self.sampler.score(logits, plan.score_token[part], plan.score_slot[part])
        return scores

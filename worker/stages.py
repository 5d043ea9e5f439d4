"""How a shard's work is dealt over the plans that the stages of its pipeline work on at the same time."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from math import isqrt

from pagetable.ids import PlanNumber
from worker.sequence import Sequence, State

# Prompt tokens that cost as much as a plan costs beside them (its weights are read, its result is sent). Only the
# size of pieces hangs on it, by the square root.
_PLAN_COST = 16


class Stages:
    """Micro-batches no smaller than the stages need: with P of them, P plans in flight.

    A plan takes at most its part of the running decodes, rounded up, those first that have been ready for longest:
    while none ends, each is in one of any P plans. Prompts are cut so that the last stages do not wait long for the
    first plan, nor the first ones for the last: n plans of c tokens pass P stages in (n + P - 1) (c + cost) / P, which
    is least for c = sqrt(tokens * cost / (P - 1)).
    """

    def __init__(self, num_stages: int, block_size: int, *, is_ahead: bool = False) -> None:
        """
        Args:
            is_ahead: a sequence that awaits a token may be in the next plan.
        """
        self.num_stages, self.block_size, self._is_ahead = num_stages, block_size, is_ahead
        self._piece = 0

    def decodes(self, running: ListOf[Sequence], oldest: Sequence, number: PlanNumber) -> tuple[list[Sequence], int]:
        """(decodes that may be in the next plan, in the order in which they come; how many of them it takes).

        Args:
            running: all sequences that run, oldest first.
            oldest: comes first where it is ready, and takes nobody's turn.
            number: of the next plan.
        """
        ready = [s for s in running if s.state is State.DECODE and (not s.pending or self._may_be_open(s, number))]
        if self.num_stages == 1:
            return ready, len(ready)
        num_decodes = sum(s.state is State.DECODE for s in running)
        places = min(len(ready), -(-num_decodes // self.num_stages))
        ready.sort(key=lambda s: (s.last_plan, s.order))
        if oldest in ready:
            turn = ready.index(oldest)
            ready.insert(0, ready.pop(turn))  # before anybody takes the last page
            places += turn >= places
        return ready, places

    def _may_be_open(self, sequence: Sequence, number: PlanNumber) -> bool:
        """Whether a sequence that awaits a token may be in the plan with that token left open. The first stage would
        wait for a token that is sampled later than by the plan P before."""
        return self._is_ahead and sequence.last_plan <= number - self.num_stages and sequence.may_step

    def prompt_tokens(self, prefills: ListOf[Sequence], waiting: ListOf[Sequence], most: int) -> int:
        """How many prompt tokens the next plan takes of what `prefills` and `waiting` still have to compute; `most`,
        or less, so that a lone long prompt gives work to all stages. Whole pages, one at least.

        The biggest piece decides how long stages wait, so pieces get no smaller while prompts are in progress.
        """
        left = sum(len(s.tokens) - s.num_computed for s in prefills) + sum(len(s.tokens) for s in waiting)
        if not left:
            self._piece = 0
            return most
        self._piece = max(self._piece, isqrt(left * _PLAN_COST // (self.num_stages - 1)))
        size = self.block_size
        return min(most, max(size, -(-self._piece // size) * size))

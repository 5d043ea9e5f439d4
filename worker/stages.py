"""How a shard's work is dealt over the plans that the stages of its pipeline work on at the same time."""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from math import isqrt

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

    def __init__(self, num_stages: int, block_size: int, most_pending: int = 0) -> None:
        """
        Args:
            most_pending: tokens that a sequence may await and be in the next plan.
        """
        self.num_stages, self.block_size, self._most_pending = num_stages, block_size, most_pending
        self._piece = 0

    def decodes(self, running: ListOf[Sequence], oldest: Sequence) -> tuple[list[Sequence], int]:
        """(decodes that may be in the next plan, in the order in which they come; how many of them it takes).

        Args:
            running: all sequences that run, oldest first.
            oldest: comes first where it is ready, and takes nobody's turn.
        """
        most = self._most_pending
        ready = [s for s in running if s.state is State.DECODE and s.pending <= most]
        if most:
            ready = [s for s in ready if s.may_step]
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

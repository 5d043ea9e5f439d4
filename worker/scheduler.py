"""What a shard does next: continuous batching over pages, decided from counts alone.

    WAIT --admit--> PREFILL --last chunk planned--> DECODE --> DONE
      ^---------------- preempt ----------------------|
    FORK --the parent's last prompt chunk is planned--> DECODE       (no slot left: --> WAIT)

`schedule` makes the next plan and books its effects at once (tokens computed, pages filled and findable); `retire`
takes the plan's result. With P stages P plans may be in flight; a sequence that awaits its token sits out (with
asynchronous scheduling it is in the next plan with a token to be filled in, unless that token must end it), a prompt's
next chunk need not wait for the one before. Promises, in this order:

1. The oldest unfinished sequence advances in every plan, except while it awaits its token or pages that plans in flight
still hold (both come with their retirement, and it has the first pick then); for it, and only by older ones, younger
sequences are preempted. With no plan in flight there is always one to make.
2. Every running decode is in every plan, with P stages by turns in one of P (`Stages`), as long as there are pages;
prompts share what is left of the token budget in equal parts. Short ones begin first, but pass a longer one only for a
time that its own length bounds (`_PATIENCE`).
3. A sequence preempted `max_preemptions` times comes back only when it can no longer be a victim.

Nothing here reads a clock, draws a number or does I/O: the same calls give the same plans.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Mapping
from itertools import islice

from pagetable.block_table import BlockTable
from pagetable.errors import (
    AlreadyExists,
    InvalidRequest,
    InvariantBroken,
    NotFound,
    Overloaded,
    WrongState,
)
from pagetable.ids import PlanNumber, SequenceId
from pagetable.page import PagePool
from pagetable.prefix_tree import root_digest
from pagetable.sampling import Request
from worker.admission import Admission
from worker.config import ShardConfig
from worker.plan import Plan, StepResult
from worker.sequence import NO_SLOT, FinishReason, Sequence, State, TokenOutput
from worker.stages import Stages
from worker.step import Step
from worker.waiting import AGE, TURN, WaitingQueue

_ADMISSION_SCAN = 32  # waiting sequences looked at per step: a big one at the head does not hold up small ones
_PATIENCE = 8  # a prompt is passed by shorter ones that come before so many times its own length have been computed


class ShardScheduler:
    """All sequences of one shard and the plans in flight. Owns its PagePool: nothing else may change it.

    Args:
        config: limits.
        pool: the shard's pages.
        identity: whatever besides tokens decides K and V; pages are shared only under an equal one.
    """

    def __init__(self, config: ShardConfig, pool: PagePool, identity: bytes = b"") -> None:
        self.config = config
        self.pool = pool
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # PREFILL and DECODE, oldest first
        self.num_preemptions = 0
        # (sequence, whether it ended) that gave up their pages, for whoever reports it
        self.departed: list[tuple[SequenceId, bool]] | None = None
        self._admission = Admission(config, pool)
        self._stages = Stages(config.num_stages, config.block_size, is_ahead=config.async_scheduling)
        self._identity = identity
        self._requests: dict[str, dict[int, Sequence]] = {}  # unfinished, by request id and sample index
        self._forks: dict[SequenceId, list[Sequence]] = {}  # FORK sequences by parent
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._in_flight: dict[PlanNumber, Step] = {}
        self._next_plan = PlanNumber(1)
        self._next_sequence = SequenceId(1)
        self._arrivals = 0
        self._prompt_tokens = 0  # planned so far: the clock of turns
        self._short_of_pages = False  # this plan leaves someone waiting for want of pages
        self._was_short = False  # the last one did: shares are capped

    # Requests

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def is_in_flight(self, request_id: str, sample_index: int | None = None) -> bool:
        """Whether a request, or one sample of it, has not ended."""
        samples = self._requests.get(request_id, {})
        return bool(samples) if sample_index is None else sample_index in samples

    def request(self, request_id: str) -> Request:
        """An unfinished request as admitted. Raises NotFound."""
        samples = self._requests.get(request_id)
        if not samples:
            raise NotFound(f"request {request_id!r} is not in flight")
        return next(iter(samples.values())).request

    def sequences(self) -> list[Sequence]:
        """All unfinished sequences, oldest first."""
        return sorted((s for samples in self._requests.values() for s in samples.values()), key=AGE)

    def add(self, request: Request, resumed: Mapping[int, array[int]] | None = None) -> None:
        """Queue a request. Raises AlreadyExists, Overloaded, or InvalidRequest where it can never fit.

        Args:
            resumed: None for a new request. Else only these samples run, each on from the outputs (int32) that it has
                emitted elsewhere; with the request as admitted they go on as if nothing had happened.
        """
        self._refuse(request)
        if resumed is not None:
            self._resume(request, resumed)
            return
        sequences = [self._sequence(request, index) for index in range(request.params.n)]
        self._arrivals += 1
        self._requests[request.request_id] = {s.sample_index: s for s in sequences}
        first, *others = sequences
        self.waiting.add(first)
        for child in others:
            child.state, child.parent = State.FORK, first
        if others:
            self._forks[first.sequence_id] = others

    def fork(self, request_id: str, sample_index: int, request: Request, num_outputs: int | None = None) -> None:
        """Go on with a running sample's tokens under another request, from here on; its pages are shared.

        Args:
            request: the new request; its prompt is the forked one's, n is 1. It may emit as many tokens as its own
                `max_tokens` less those that the sample has emitted.
            num_outputs: how many of the sample's outputs the fork begins with; None is all so far.
        """
        parent = self._find(request_id, sample_index)
        outputs = parent.num_outputs if num_outputs is None else num_outputs
        if not 0 <= outputs <= parent.num_outputs:
            raise InvalidRequest("num_outputs", outputs, f"be from 0 to the {parent.num_outputs} emitted so far")
        if request.params.n != 1 or request.prompt != parent.request.prompt:
            raise InvalidRequest("n", request.params.n, "be 1 in a fork, whose prompt is the forked one's")
        if outputs >= (request.params.max_tokens or 0):
            raise InvalidRequest("max_tokens", request.params.max_tokens, f"be above the {outputs} emitted so far")
        self._refuse(request)
        child = self._sequence(request, 0)
        self._arrivals += 1
        self._requests[request.request_id] = {0: child}
        child.tokens = parent.tokens[: parent.prompt_length + outputs]
        if parent.state is State.DECODE and self._free_slots and child.root == parent.root:
            # the token before the fork is computed again: its logits are the child's to sample from
            self._share_table(child, parent, len(child.tokens) - 1)
        else:
            self.waiting.add(child)

    def finish(
        self, request_id: str, sample_index: int, reason: FinishReason, stop_reason: str | None = None
    ) -> TokenOutput:
        """End one sample from outside (a stop string, a cancel): its pages are free when the plans that name them
        retire."""
        sequence = self._find(request_id, sample_index)
        sequence.stop_reason = stop_reason
        return self._finish(sequence, reason)

    def cancel(self, request_id: str) -> list[TokenOutput]:
        """End all samples of a request; it is in no further plan."""
        if request_id not in self._requests:
            raise NotFound(f"request {request_id!r} is not in flight")
        samples = sorted(self._requests[request_id].values(), key=AGE, reverse=True)  # children before their parent
        return [self._finish(s, FinishReason.CANCELLED) for s in samples]

    # Plans

    def schedule(self) -> Plan | None:
        """The next plan, or None where a plan in flight has to retire first: for all stages are busy, or nothing can
        advance."""
        oldest = self._oldest()
        if oldest is None or len(self._in_flight) >= self.config.max_in_flight:
            return None
        ready, places = self._stages.decodes(self.running, oldest, self._next_plan)
        prefills = [s for s in self.running if s.state is State.PREFILL]
        budget = self.config.max_num_batched_tokens - places
        if self.config.num_stages > 1:
            budget = self._stages.prompt_tokens(prefills, self.waiting.next_in_turn(_ADMISSION_SCAN), budget)
        step = Step(self._next_plan, budget, oldest, self.config, self.pool)
        self._was_short, self._short_of_pages = self._short_of_pages, False
        share = self._admission.share(step.budget, len(prefills) + len(self.waiting))
        if oldest.state is State.WAIT:
            self._admit(oldest, share, step)
        elif oldest.state is State.PREFILL:
            self._plan_chunk(oldest, share, step)
        for sequence in ready:
            if not places:
                break
            if sequence.state is State.DECODE:  # not preempted for one before it
                places -= self._plan_decode(sequence, step)
        self._plan_prompts(prefills, share, step)
        if not step.rows:
            return None
        step.even_out()
        step.write()
        self._in_flight[step.plan.number] = step
        self._next_plan = PlanNumber(self._next_plan + 1)
        return step.plan

    def retire(self, result: StepResult) -> list[TokenOutput]:
        """The oldest plan in flight is over on all ranks: append its tokens, end what ends, give back what waited."""
        if not self._in_flight or result.number != next(iter(self._in_flight)):
            raise WrongState(f"plan {result.number} is not the oldest in flight")
        step = self._in_flight.pop(result.number)
        for page in step.fresh:
            self.pool.publish(page)
        self.pool.retire(result.number)
        outputs = []
        scores = iter(result.scores)
        for sequence, count in step.scored:
            output = TokenOutput(sequence.request.request_id, sequence.sample_index, None)
            output.scores = list(islice(scores, count))
            if sequence.state is not State.DONE:
                outputs.append(output)
        for index, (sequence, _) in enumerate(step.samples):
            sequence.pending -= 1
            if sequence.state is State.DONE:
                continue
            if index in result.failed:
                outputs.append(self._finish(sequence, FinishReason.ERROR, result.failed[index]))
                continue
            token = result.tokens[index]
            sequence.tokens.append(token)
            if sequence.num_computed == len(sequence.tokens):  # a plan in flight computes it already
                self._in_flight[sequence.last_plan].seal(sequence)
            reason = sequence.ended_by(token)
            if reason is None:
                output = TokenOutput(sequence.request.request_id, sequence.sample_index, token)
            else:
                output = self._finish(sequence, reason)
                output.token = token
            output.logprobs = result.logprobs.get(index)
            outputs.append(output)
        return outputs

    def abandon(self, why: str) -> list[TokenOutput]:
        """The plans in flight failed: end the sequences in them, forget the pages they were to fill, go on with the
        rest."""
        steps = list(self._in_flight.values())
        self._in_flight.clear()
        sealed = [page for step in steps for page in step.sealed]
        for page in reversed(sealed):  # what hangs on a page was sealed after it
            self.pool.drop(page)
        moved = [page for step in steps for page in step.moved]
        for page in moved:
            if self.pool.sealed(page):
                for each in reversed(self.pool.tree.behind(page)):
                    self.pool.drop(each)
        hit = {row.sequence.sequence_id: row.sequence for step in steps for row in step.rows.values()}
        hit |= {sequence.sequence_id: sequence for step in steps for sequence, _ in step.samples}
        for sequence in hit.values():
            sequence.pending = 0
        ended = sorted((s for s in hit.values() if s.state is not State.DONE), key=AGE, reverse=True)
        outputs = [self._finish(s, FinishReason.ERROR, why) for s in ended]
        lost = {*sealed, *moved}
        for sequence in list(self.running):
            if not lost.isdisjoint(sequence.table.pages):  # it took over a page that never came
                self._preempt(sequence)
        for page in (page for step in steps for page in step.fresh):
            self.pool.publish(page)
        self.pool.retire(PlanNumber(self._next_plan - 1))
        return outputs

    def check(self) -> None:
        """Recount pages and states from scratch (RELIABILITY D3, D5-D8, D10, D21); InvariantBroken says what
        disagrees."""
        sequences = self.sequences()
        self.pool.check([list(s.table) for s in sequences])
        for sequence in sequences:
            sequence.table.check()
            if sequence.table.num_tokens != sequence.num_computed:
                raise InvariantBroken(f"sequence {sequence.sequence_id}: table and scheduler count different tokens")
            if (sequence.slot != NO_SLOT) != (sequence.state in (State.PREFILL, State.DECODE)):
                raise InvariantBroken(
                    f"sequence {sequence.sequence_id}: {sequence.state.value} with slot {sequence.slot}"
                )
        states = [s for s in sequences if s.state is State.FORK]
        listed = [*self.waiting, *self.running, *(s for children in self._forks.values() for s in children)]
        if sorted(map(id, listed)) != sorted(map(id, sequences)) or len(states) != sum(map(len, self._forks.values())):
            raise InvariantBroken("a sequence is in no list, or in two")
        slots = [s.slot for s in self.running] + self._free_slots
        if sorted(slots) != list(range(self.config.max_num_seqs)):
            raise InvariantBroken("slots are lost or given twice")

    # Admission

    def _refuse(self, request: Request) -> None:
        if request.request_id in self._requests:
            raise AlreadyExists(f"request_id {request.request_id!r} is in flight; choose another or wait for its end")
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(f"the queue is full ({self.config.max_waiting} requests); try again later")
        self._admission.refuse(request)

    def _resume(self, request: Request, resumed: Mapping[int, array[int]]) -> None:
        most = request.params.max_tokens or 0
        for index, outputs in resumed.items():
            if not 0 <= index < request.params.n:
                raise InvalidRequest("samples", index, f"be below n, {request.params.n}")
            if len(outputs) >= most:
                raise InvalidRequest("outputs", len(outputs), f"be fewer than max_tokens, {most}")
        if not resumed:
            raise InvalidRequest("samples", 0, "be at least one")
        sequences = [self._sequence(request, index) for index in sorted(resumed)]
        self._arrivals += 1
        self._requests[request.request_id] = {s.sample_index: s for s in sequences}
        for sequence in sequences:
            outputs = resumed[sequence.sample_index]
            sequence.tokens.extend(outputs)
            if outputs:
                sequence.num_scored = sequence.prompt_length  # its prompt's logprobs were given where it began
            self.waiting.add(sequence)

    def _sequence(self, request: Request, index: int) -> Sequence:
        table = BlockTable(self.pool, self.config.block_size)
        sequence = Sequence(self._next_sequence, request, index, (self._arrivals, index), table)
        sequence.turn = self._prompt_tokens + _PATIENCE * sequence.prompt_length
        sequence.root = root_digest(self._identity, request.cache_salt)
        self._next_sequence = SequenceId(self._next_sequence + 1)
        return sequence

    def _find(self, request_id: str, sample_index: int) -> Sequence:
        sequence = self._requests.get(request_id, {}).get(sample_index)
        if sequence is None:
            raise NotFound(f"sample {sample_index} of request {request_id!r} is not in flight")
        return sequence

    def _oldest(self) -> Sequence | None:
        heads = [head for head in (self.running[0] if self.running else None, self.waiting.oldest) if head is not None]
        return min(heads, key=AGE) if heads else None

    def _plan_prompts(self, prefills: list[Sequence], share: int, step: Step) -> None:
        turn = (
            step.plan.number % len(prefills) if prefills else 0
        )  # where the budget is short, not always the same go short
        for sequence in prefills[turn:] + prefills[:turn]:
            if sequence.state is State.PREFILL and sequence.sequence_id not in step.rows:
                self._plan_chunk(sequence, share, step)
        promised = self._admission.promised(self.running)
        for sequence in self.waiting.next_in_turn(_ADMISSION_SCAN):
            if step.budget <= 0 or not self._free_slots:
                break
            if (
                sequence is not step.oldest
                and not sequence.pending
                and self._may_enter(sequence, share, step, promised)
            ):
                self._admit(sequence, share, step)
                promised = self._admission.promised(self.running)
        if step.budget <= 0:
            return
        partial = [row.sequence for row in step.rows.values() if row.sequence.state is State.PREFILL]
        for sequence in sorted(partial, key=TURN):  # what is left of the budget
            if step.budget > 0 and not self._admission.match(sequence):
                self._plan_chunk(sequence, step.budget, step)

    def _may_enter(self, sequence: Sequence, share: int, step: Step, promised: tuple[int, int]) -> bool:
        admission = self._admission
        found = admission.found(sequence)
        remaining = len(sequence.tokens) - found[0] * self.config.block_size
        if not admission.may_start(remaining, min(share, step.budget), promised[0]):
            return False
        fits = admission.fits(sequence, found, promised[1], len(self.running))
        if fits and sequence.preemptions >= self.config.max_preemptions:
            fits = admission.beyond_preemption(sequence, self.sequences())
        self._short_of_pages |= not fits
        return fits

    def _admit(self, sequence: Sequence, share: int, step: Step) -> None:
        """WAIT -> PREFILL, with a slot, matched pages and a first chunk."""
        if sequence.pending:
            return
        if not self._free_slots:  # only the oldest comes here without a slot
            self._preempt(self.running[-1])
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=AGE)
        sequence.slot = self._free_slots.pop()
        sequence.state = State.PREFILL
        self._plan_chunk(sequence, share, step)

    # Rows

    def _plan_decode(self, sequence: Sequence, step: Step) -> bool:
        """Whether it has a row of the plan now."""
        table = sequence.table
        missing = table.missing(1)
        if missing and not (self._under_cap(sequence, missing, step) and self._make_room(sequence, missing, step)):
            if sequence is step.oldest and not self._in_flight:
                return self._recompute(sequence, step)
            return False  # it keeps its pages and waits
        step.append(sequence, 1)
        step.sample(sequence, sequence)
        return True

    def _recompute(self, sequence: Sequence, step: Step) -> bool:
        """The last page again, from its first token."""
        self._rewind(sequence)
        self._plan_chunk(sequence, self.config.block_size, step)
        return sequence.sequence_id in step.rows

    def _plan_chunk(self, sequence: Sequence, most: int, step: Step) -> None:
        """Plan the next `most` prompt tokens (or what fits); behind its row of this plan where there is one."""
        table, size = sequence.table, self.config.block_size
        if sequence.sequence_id not in step.rows and (matched := self._admission.match(sequence)):
            table.adopt(matched)
            sequence.num_computed = table.num_tokens
            sequence.num_sealed = len(table)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = min(sequence.num_computed, sequence.prompt_length)
        remaining = len(sequence.tokens) - sequence.num_computed
        count = min(remaining, most, step.budget)
        if count <= 0:
            return
        missing = table.missing(count)
        if missing and not self._under_cap(sequence, missing, step):
            return
        if missing and not self._make_room(sequence, missing, step):
            count = min(count, (len(table) + self.pool.num_available) * size - sequence.num_computed)
            if count <= 0:
                return
        if count < remaining and (sequence.num_computed + count) // size * size > sequence.num_computed:
            count -= (sequence.num_computed + count) % size  # chunks end at pages, where others can take over
        step.append(sequence, count)
        step.budget -= count
        self._prompt_tokens += count
        if sequence.num_computed == len(sequence.tokens):
            sequence.state = State.DECODE
            step.sample(sequence, sequence)
            self._spread(sequence, step)

    def _spread(self, parent: Sequence, step: Step) -> None:
        """The prompt's last chunk is planned: its other samples share its pages and sample from the same row."""
        for child in self._forks.pop(parent.sequence_id, ()):
            child.parent = None
            if not self._free_slots:
                child.state = State.WAIT
                self.waiting.add(child)
                continue
            self._share_table(child, parent, parent.num_computed)
            step.introduce(child)
            step.sample(child, parent)

    def _share_table(self, child: Sequence, parent: Sequence, num_tokens: int) -> None:
        """-> DECODE: the child holds the pages of the parent's first `num_tokens` tokens."""
        child.table = parent.table.fork(num_tokens)
        child.num_computed = num_tokens
        child.cached_tokens = min(num_tokens, child.prompt_length)
        child.digests = parent.digests[: num_tokens // self.config.block_size]  # what follows may differ
        child.num_sealed = min(parent.num_sealed, num_tokens // self.config.block_size)
        child.last_plan = parent.last_plan
        child.slot = self._free_slots.pop()
        child.state = State.DECODE
        insort(self.running, child, key=AGE)

    # Room

    def _under_cap(self, sequence: Sequence, missing: int, step: Step) -> bool:
        """The fair share of the pool binds only while others wait for pages, and never on the oldest."""
        if not self._was_short or sequence is step.oldest:
            return True
        return len(sequence.table) + missing <= self.config.max_pool_share * self.pool.num_pages

    def _make_room(self, sequence: Sequence, needed: int, step: Step) -> bool:
        """Preempt younger sequences, youngest first, until `needed` pages are available."""
        while self.pool.num_available < needed:
            youngest = self.running[-1]
            waiting_for_plans = self.pool.num_retiring and self._in_flight
            if waiting_for_plans or youngest.order <= sequence.order or step.names(youngest):
                self._short_of_pages = True
                return False
            self._preempt(youngest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """-> WAIT: give up all pages; full ones stay in the tree while nobody needs their blocks."""
        if self.departed is not None:
            self.departed.append((sequence.sequence_id, False))
        self._leave(sequence)
        sequence.state = State.WAIT
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(sequence)

    def _rewind(self, sequence: Sequence) -> None:
        """-> PREFILL from the last page boundary: there is no room for a copy of the last page, so it is given up and
        its tokens are computed again into the block that this frees, or into another group."""
        size = self.config.block_size
        sequence.table.trim(sequence.num_computed // size * size, sequence.last_plan)
        sequence.num_computed = sequence.table.num_tokens
        sequence.num_sent = min(sequence.num_sent, len(sequence.table))
        sequence.state = State.PREFILL

    def _leave(self, sequence: Sequence) -> None:
        """Give up slot and pages."""
        sequence.table.free(after=sequence.last_plan)
        sequence.num_computed = sequence.num_sealed = 0
        sequence.num_sent = -1
        sequence.resend.clear()
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = NO_SLOT

    def _finish(self, sequence: Sequence, reason: FinishReason, failure: str = "") -> TokenOutput:
        request_id = sequence.request.request_id
        if self.departed is not None:
            self.departed.append((sequence.sequence_id, True))
        output = TokenOutput(request_id, sequence.sample_index, None, finish_reason=reason)
        output.stop_reason, output.failure = sequence.stop_reason, failure
        output.pages = sequence.table.entries()
        output.cached_tokens = max(0, sequence.cached_tokens)
        for child in self._forks.pop(
            sequence.sequence_id, ()
        ):  # its samples outlive it: they compute the prompt themselves
            child.state, child.parent = State.WAIT, None
            self.waiting.add(child)
        if sequence.state is State.WAIT:
            self.waiting.remove(sequence)
        elif sequence.state is State.FORK and sequence.parent is not None:
            siblings = self._forks[sequence.parent.sequence_id]
            siblings.remove(sequence)
            if not siblings:
                del self._forks[sequence.parent.sequence_id]
        else:
            self._leave(sequence)
        sequence.state, sequence.reason, sequence.parent = State.DONE, reason, None
        samples = self._requests[request_id]
        del samples[sequence.sample_index]
        if not samples:
            del self._requests[request_id]
        return output

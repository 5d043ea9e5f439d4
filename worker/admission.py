"""Who may enter: what a request must fit into, and when a waiting sequence fits beside the running ones."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as ListOf
from itertools import islice

from pagetable.errors import InvalidRequest
from pagetable.ids import LogicalPageId
from pagetable.page import PagePool
from pagetable.prefix_tree import NO_PAGE, extend_digests
from pagetable.sampling import Request
from worker.config import ShardConfig
from worker.sequence import Sequence, State


class Admission:
    """Decides from the pool's counts and the tree; changes nothing but a sequence's list of digests."""

    def __init__(self, config: ShardConfig, pool: PagePool) -> None:
        self.config, self.pool = config, pool

    def refuse(self, request: Request) -> None:
        """The engine's own check, whatever front end the request came through. Raises InvalidRequest."""
        params, length = request.params, len(request.prompt)
        if params.max_tokens is None or params.seed is None:
            raise InvalidRequest("max_tokens", params.max_tokens, "be filled in at admission, like seed")
        total = length + params.max_tokens
        if not 0 < length < total <= self.config.max_model_len:
            limit = f"fit with {length} prompt tokens in max_model_len {self.config.max_model_len}"
            raise InvalidRequest("max_tokens", params.max_tokens, limit)
        if self._pages(total) > self.pool.num_pages:
            limit = f"fit with {length} prompt tokens in the pool of {self.pool.num_pages} pages (exceeds_pool)"
            raise InvalidRequest("max_tokens", params.max_tokens, limit, "send less or give the pool more memory")

    def share(self, budget: int, candidates: int) -> int:
        """Tokens that each prompt may take of a plan: equal parts, whole pages. One part is left for short prompts that
        arrive while as many long ones as allowed are in progress."""
        size = self.config.block_size
        parts = max(1, min(candidates, self.config.max_num_partial_prefills + 1))
        return max(size, budget // parts // size * size)

    def match(self, sequence: Sequence) -> list[LogicalPageId]:
        """Pages in the tree that hold the sequence's next tokens; the last token is always computed, for its logits."""
        first, last = self._matchable(sequence)
        return self.pool.tree.match(islice(sequence.digests, first, last)) if first < last else []

    def found(self, sequence: Sequence) -> tuple[int, int]:
        """How many pages `match` would give, and how many of them rest in the cache; without listing them.

        A page's ancestors are in the tree with it, and whoever uses a page uses those before it: both by bisection.
        """
        first, last = self._matchable(sequence)
        if first >= last:
            return 0, 0
        digests, find, order = sequence.digests, self.pool.tree.find, self.pool.order
        end = bisect_left(range(last), True, lo=first, key=lambda i: find(digests[i]) == NO_PAGE)
        rest = bisect_left(range(end), True, lo=first, key=lambda i: find(digests[i]) in order)
        return end - first, end - rest

    def promised(self, running: ListOf[Sequence]) -> tuple[int, int]:
        """Prompts in progress, and the pages that they still need."""
        partial = [s for s in running if s.state is State.PREFILL]
        return len(partial), sum(self._pages(len(s.tokens)) - len(s.table) for s in partial)

    def may_start(self, remaining: int, most: int, in_progress: int) -> bool:
        """Whether a prompt of `remaining` tokens may begin: short ones always, long ones while few are in progress."""
        return remaining <= most or in_progress < self.config.max_num_partial_prefills

    def fits(self, sequence: Sequence, found: tuple[int, int], promised: int, num_running: int) -> bool:
        """Whether its pages fit beside those promised to prompts in progress and one for each running sequence."""
        matched, resting = found
        needed = self._pages(len(sequence.tokens)) - matched
        return needed + promised + num_running <= self.pool.num_available - resting

    def beyond_preemption(self, sequence: Sequence, unfinished: ListOf[Sequence]) -> bool:
        """Whether it and all older sequences fit at their longest: then it never is the youngest when room runs out."""
        older = [s for s in unfinished if s.order <= sequence.order]
        pages = sum(self._pages(s.max_length) for s in older)
        return pages <= self.pool.num_pages and len(older) <= self.config.max_num_seqs

    def _matchable(self, sequence: Sequence) -> tuple[int, int]:
        """The pages [first, last) that could be taken from the tree, with their digests at hand."""
        size = self.config.block_size
        first, last = sequence.num_computed // size, (len(sequence.tokens) - 1) // size
        scoring = sequence.num_scored < sequence.prompt_length - 1  # prompt logprobs need every row
        if not self.config.enable_prefix_caching or sequence.num_computed % size or first >= last or scoring:
            return 0, 0
        extend_digests(sequence.digests, sequence.root, sequence.tokens, size, last)
        return first, last

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

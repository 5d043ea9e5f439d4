"""One sequence: a sample of a request, from its arrival to its last token."""

from __future__ import annotations

from array import array
from enum import Enum, StrEnum

from pagetable.block_table import BlockTable
from pagetable.ids import BlockId, DeviceId, PlanNumber, SequenceId
from pagetable.sampling import Request
from worker.plan import TokenLogprobs

NO_SLOT = -1


class State(Enum):
    """WAIT -> PREFILL -> DECODE -> DONE; a preempted sequence is WAIT again.

    FORK: a sample that shares another sequence's prompt and waits until that prompt's last chunk is planned.
    """

    WAIT = "wait"
    PREFILL = "prefill"
    DECODE = "decode"
    FORK = "fork"
    DONE = "done"


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence or stop token, or a stop string
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Sequence:
    """State of one sample. Only the ShardScheduler changes it.

    Attributes:
        order: (arrival, sample index): age; smaller is older. Never changes, so the oldest is the oldest until it ends.
        turn: among those that wait, the smaller begins first.
        tokens: prompt and outputs, int32.
        num_computed: tokens whose K and V are in pages, or will be by the plans made so far; equals `table.num_tokens`.
            The last of them may be pending, and not in `tokens` yet.
        digests: prefix digests of the full pages of `tokens`, as far as computed.
        num_sealed: pages of the table that went through `seal` (or came from the tree).
        pending: sample entries in flight: 0 or 1, with asynchronous scheduling up to 2.
        entry: of the plan that it samples in last, which sample entry is its own.
        last_plan: the last plan that names the sequence's pages.
        num_sent: pages of the table that the ranks know under `slot`; -1 before the ranks know the sequence.
        resend: indices below `num_sent` whose page was swapped since.
        num_scored: prompt rows whose logprobs were asked for; `prompt_length` where the request wants none.
        cached_tokens: prompt tokens taken from the prefix tree when it was first admitted.
        parent: for FORK, the sequence whose prompt it shares.
    """

    __slots__ = (
        "cached_tokens",
        "digests",
        "entry",
        "last_plan",
        "max_tokens",
        "num_computed",
        "num_scored",
        "num_sealed",
        "num_sent",
        "order",
        "parent",
        "pending",
        "preemptions",
        "prompt_length",
        "reason",
        "request",
        "resend",
        "root",
        "sample_index",
        "sequence_id",
        "slot",
        "state",
        "stop_reason",
        "stop_tokens",
        "table",
        "tokens",
        "turn",
    )

    def __init__(
        self, sequence_id: SequenceId, request: Request, sample_index: int, order: tuple[int, int], table: BlockTable
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.sample_index = sample_index
        self.order = order
        self.turn = 0
        self.table = table
        self.tokens: array[int] = array("i", request.prompt)
        self.prompt_length = len(request.prompt)
        self.state = State.WAIT
        self.slot = NO_SLOT
        self.num_computed = 0
        self.root = b""
        self.digests: list[bytes] = []
        self.num_sealed = 0
        self.num_sent = -1
        self.resend: list[int] = []
        self.num_scored = 0 if request.params.prompt_logprobs is not None and sample_index == 0 else self.prompt_length
        self.pending = 0
        self.entry = 0
        self.last_plan = PlanNumber(0)
        self.preemptions = 0
        self.cached_tokens = -1
        self.parent: Sequence | None = None
        self.reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        assert request.params.max_tokens is not None, "a request is admitted with max_tokens filled in"
        self.max_tokens = request.params.max_tokens
        eos = () if request.params.ignore_eos else request.eos_token_ids
        self.stop_tokens = frozenset((*eos, *request.params.stop_token_ids))

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def may_step(self) -> bool:
        """Whether it is not sure already that the tokens in flight end it."""
        return self.num_outputs + self.pending < self.max_tokens

    @property
    def max_length(self) -> int:
        """Tokens whose K and V it may have to hold: the last token is never computed."""
        return self.prompt_length + self.max_tokens

    def ended_by(self, token: int) -> FinishReason | None:
        """Whether the sequence ends with `token`, just appended."""
        outputs = self.num_outputs
        if token in self.stop_tokens and outputs >= self.request.params.min_tokens:
            if token in self.request.params.stop_token_ids:
                self.stop_reason = token
            return FinishReason.STOP
        return FinishReason.LENGTH if outputs >= self.max_tokens else None


class TokenOutput:
    """What one step says about one sequence: a token, an end, or both; and scores of prompt tokens.

    Attributes:
        token: None where the sequence ends without one, or where only scores came.
        scores: of the prompt's tokens from the second on, in order, as their chunks are computed.
        pages: with the end, (device_id, block_id) of each page of the table.
        cached_tokens: with the end, prompt tokens that were not computed for this request.
        failure: why, where `finish_reason` is ERROR.
    """

    __slots__ = (
        "cached_tokens",
        "failure",
        "finish_reason",
        "logprobs",
        "pages",
        "request_id",
        "sample_index",
        "scores",
        "stop_reason",
        "token",
    )

    def __init__(
        self,
        request_id: str,
        sample_index: int,
        token: int | None,
        logprobs: TokenLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> None:
        self.request_id = request_id
        self.sample_index = sample_index
        self.token = token
        self.logprobs = logprobs
        self.finish_reason = finish_reason
        self.stop_reason: int | str | None = None
        self.scores: list[TokenLogprobs] = []
        self.failure = ""
        self.pages: list[tuple[DeviceId, BlockId]] = []
        self.cached_tokens = 0

    def __repr__(self) -> str:
        end = f", {self.finish_reason.value}" if self.finish_reason else ""
        return f"TokenOutput({self.request_id!r}[{self.sample_index}]: {self.token}{end})"

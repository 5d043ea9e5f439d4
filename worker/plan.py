"""What a step says, as arrays: the only thing that travels from a shard's scheduler to its ranks, and the answer.

A plan carries changes, never state: ranks keep block tables (one row a slot) and sampler state (one entry a slot)
and apply what the plan says. A slot is a row number below `max_num_seqs`; a sequence keeps its slot while it runs.
All ranks of all stages get the same plan. A page lies in one group, the same in every column (stage), under a block id
of each column: a rank takes the blocks of its column and heeds the entries of its group.

Order of execution within a plan: admits, table changes, copies, then the forward pass over all rows
(in every layer, K and V of all rows are written before any row attends), then samples and scores.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams


def ints() -> array[int]:
    return array("i")


def pending_token(entry: int) -> int:
    """What stands in a plan for the token that an earlier one finds for one of its sample entries: with P stages the
    plan P before it."""
    return -1 - entry


def by_column(num_columns: int = 1) -> list[array[int]]:
    """An empty array for each column."""
    return [ints() for _ in range(num_columns)]


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence enters a slot (admitted, resumed after preemption, or forked); whatever the slot held is over.

    Attributes:
        sample_index: which of the request's n samples this is; with seed and position it decides the random number.
        prompt_length: how many of `tokens` are the prompt; the rest are outputs so far.
        tokens: int32 token ids, prompt and outputs.
        eos_token_ids: the model's; no sample before `params.min_tokens` may be one of them.
    """

    slot: int
    sequence_id: SequenceId
    sample_index: int
    params: SamplingParams
    prompt_length: int
    tokens: array[int]
    eos_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Plan:
    """One step of a shard. R rows (sequences), T query tokens, S samples, C table changes, M page copies, K scores.

    Rows are sorted by the length of their table, so that neighbours in the batch cost about the same.
    All arrays are int32 (`array('i')`); what is by column is a list with one array for each.
    """

    number: PlanNumber
    admits: list[Admit] = field(default_factory=list)
    # [R] slot of each row; [R+1] where its tokens start in `tokens`; [R] position of its first token
    slots: array[int] = field(default_factory=ints)
    query_start: array[int] = field(default_factory=lambda: array("i", (0,)))
    first_position: array[int] = field(default_factory=ints)
    # [T] input token ids; below 0 is one that is not sampled yet (`pending_token`)
    tokens: array[int] = field(default_factory=ints)
    # [C] tables[table_slot, table_index] = table_blocks[column] in group table_group, before the copies
    table_slot: array[int] = field(default_factory=ints)
    table_index: array[int] = field(default_factory=ints)
    table_group: array[int] = field(default_factory=ints)
    table_blocks: list[array[int]] = field(default_factory=by_column)
    # [M] whole pages copied before the forward pass: within one group (copy on write), or to another (a page moves);
    # no block is both a source and a target
    copy_from: array[int] = field(default_factory=ints)
    copy_to: array[int] = field(default_factory=ints)
    copy_sources: list[array[int]] = field(default_factory=by_column)
    copy_targets: list[array[int]] = field(default_factory=by_column)
    # [S] sample one token from the logits of query token `sample_row` with the state of `sample_slot`;
    # the token will stand at `sample_position`
    sample_row: array[int] = field(default_factory=ints)
    sample_slot: array[int] = field(default_factory=ints)
    sample_position: array[int] = field(default_factory=ints)
    # [K] prompt logprobs: the log probability of `score_token` by the logits of query token `score_row`
    score_row: array[int] = field(default_factory=ints)
    score_slot: array[int] = field(default_factory=ints)
    score_token: array[int] = field(default_factory=ints)

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities (natural, of the unmodified logits' softmax) at one position.

    Attributes:
        logprob: of the token that stands there.
        rank: 1 for the most likely token.
        top: (token id, logprob), best first; as many as the request asked for.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class StepResult:
    """What the last stage found.

    Attributes:
        tokens: int32 [S], the sampled token of each sample entry; -1 where `failed` names the entry.
        logprobs: by sample entry, only for those whose request asked.
        scores: [K], in the order of the plan's scores.
        failed: sample entry -> why its row could not be sampled (that request fails alone).
    """

    number: PlanNumber
    tokens: array[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    scores: list[TokenLogprobs] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

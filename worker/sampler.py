"""The sampling state of every slot, and the step from logits to one token per sequence.

Order for a row, as vLLM's: before `min_tokens` the stop and end ids are masked; logit bias; repetition penalty (prompt
and output), presence and frequency penalties (output only); then temperature, min-p, top-k, top-p (`draw.py`). Log
probabilities are of the unmodified logits. A token depends on (logits row, tokens so far, parameters, seed, sample
index, position) alone: not on the batch, the slot, or what was drawn before.

Shapes: R rows of the call, V the vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from pagetable.sampling import SamplingParams
from worker.draw import Floats, Ints, Shape, argmax, choose, stream_key, token_logprobs, uniforms
from worker.plan import Admit, TokenLogprobs

# Rows are drawn in chunks of this many logits: larger float64 temporaries leave the cache and are page-faulted anew.
CHUNK = 1 << 20
LOGPROB_CHUNK = 1 << 24  # of these copies in float64 are made, on a GPU too


Choose = Callable[[torch.Tensor, Shape], Ints]


def choose_by_torch(rows: torch.Tensor, shape: Shape) -> Ints:
    """See `draw.choose`."""
    return choose(rows, shape.to(rows.device)).cpu().numpy()


@dataclass(slots=True)
class _Edits:
    """What changes a slot's logits. Sparse: its size goes with the sequence, not with the vocabulary."""

    params: SamplingParams
    before_min_tokens: Ints
    bias_ids: Ints
    bias: npt.NDArray[np.float32]
    # ids seen so far in order of first sight, how often each is in the output, and where it stands in the two
    seen: array[int] = field(default_factory=lambda: array("q"))
    counts: array[int] = field(default_factory=lambda: array("q"))
    where: dict[int, int] = field(default_factory=dict)

    @property
    def penalised(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    def see(self, token: int, output: int) -> None:
        at = self.where.setdefault(token, len(self.seen))
        if at == len(self.seen):
            self.seen.append(token)
            self.counts.append(0)
        self.counts[at] += output

    def apply(self, row: torch.Tensor, num_outputs: int) -> None:
        """Change one row of logits in place."""
        p = self.params
        if num_outputs < p.min_tokens:
            row[torch.from_numpy(self.before_min_tokens)] = -torch.inf
        if len(self.bias_ids):
            row[torch.from_numpy(self.bias_ids)] += torch.from_numpy(self.bias).to(row.device)
        if self.seen and self.penalised:
            ids, counts = (_on(row.device, each) for each in (self.seen, self.counts))
            x = row[ids]
            x = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
            row[ids] = x - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


class Sampler:
    """Parameters, tokens seen and number of outputs by slot.

    Args:
        vocab_size: columns of the logits.
        max_num_seqs: slots are below it.
        choose: a token for each row, as `draw.choose`; the shape lies on the CPU, wherever the rows lie.
        chunk: logits that are drawn from in one call; log probabilities take LOGPROB_CHUNK at most.

    Attributes:
        plain: by slot, 1 where the likeliest token is taken, whatever came before, and nothing else is asked for.
    """

    def __init__(
        self, vocab_size: int, max_num_seqs: int, choose: Choose = choose_by_torch, chunk: int = CHUNK
    ) -> None:
        self._choose, self._chunk = choose, chunk
        self._vocab = vocab_size
        self.plain = bytearray(b"\1" * max_num_seqs)
        self._edits: list[_Edits | None] = [None] * max_num_seqs
        self._edited = np.zeros(max_num_seqs, bool)
        self._wants = np.zeros(max_num_seqs, bool)
        self._num_outputs = np.zeros(max_num_seqs, np.int64)
        self._min_tokens = np.zeros(max_num_seqs, np.int64)
        self._key = np.zeros(max_num_seqs, np.uint64)
        self._temperature = np.zeros(max_num_seqs)
        self._min_p = np.zeros(max_num_seqs)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.zeros(max_num_seqs)

    def admit(self, admit: Admit) -> None:
        """Give the slot to a sequence, with the tokens that it has so far; what the slot held is over."""
        p, slot = admit.params, admit.slot
        if p.seed is None:
            raise ValueError(f"slot {slot}: the seed is not filled in; requests come from admit_request")
        # an end id beyond the logits' columns can't be sampled, so there is nothing to mask
        ends = sorted({x for x in (*admit.eos_token_ids, *p.stop_token_ids) if x < self._vocab})
        edits = _Edits(
            p,
            np.array(ends, np.int64),
            np.fromiter(p.logit_bias.keys(), np.int64),
            np.fromiter(p.logit_bias.values(), np.float32),
        )
        if edits.penalised:
            for at, token in enumerate(admit.tokens):
                edits.see(token, int(at >= admit.prompt_length))
        self._edits[slot] = edits
        self._edited[slot] = edits.penalised or len(edits.bias_ids) > 0
        self._wants[slot] = p.logprobs is not None
        self._num_outputs[slot] = len(admit.tokens) - admit.prompt_length
        self._min_tokens[slot] = p.min_tokens if ends else 0
        self._key[slot] = stream_key(p.seed, admit.sample_index)
        self._temperature[slot], self._min_p[slot], self._top_p[slot] = p.temperature, p.min_p, p.top_p
        self._top_k[slot] = p.top_k if 0 < p.top_k < self._vocab else self._vocab
        self.plain[slot] = not (self._edited[slot] or self._wants[slot] or self._min_tokens[slot] or p.temperature > 0)

    def are_plain(self, slots: array[int]) -> bool:
        return all(map(self.plain.__getitem__, slots))

    def takes_likeliest(self, slots: array[int]) -> bool:
        """Whether every one of these slots takes the token of its largest logit as it is, and no log probability."""
        if self.are_plain(slots):
            return True
        where = np.array(slots, np.int64)
        edited = self._edited[where] | (self._num_outputs[where] < self._min_tokens[where])
        return not (edited | self._wants[where] | (self._temperature[where] > 0)).any()

    def count(self, slots: array[int]) -> None:
        """Each of these slots took its largest logit's token as its next output."""
        if self.are_plain(slots):
            return  # nobody asks how many outputs they have
        self._num_outputs[np.array(slots, np.int64)] += 1

    def sample(
        self,
        logits: torch.Tensor,
        slots: array[int],
        positions: array[int],
        likeliest: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None = None,
    ) -> tuple[array[int], dict[int, TokenLogprobs]]:
        """Choose one token per row and count it as the next output of its slot.

        Args:
            logits: float32 [R, V]; not changed.
            slots: [R], no slot twice.
            positions: [R], where each token will stand.
            likeliest: each row's token of the largest logit and that logit, where they are known.

        Returns:
            int32 [R] tokens, -1 where the row has no finite largest logit (NaN, +inf, or all masked: that sequence
            has failed and nothing was counted); and the log probabilities of the entries whose request asked.
        """
        where = np.array(slots, np.int64)
        tokens, peaks = argmax(logits) if likeliest is None else (likeliest[0].astype(np.int64), likeliest[1].copy())
        broken = ~np.isfinite(peaks)  # by the model; bias and masks must not hide it
        edited = np.flatnonzero(self._edited[where] | (self._num_outputs[where] < self._min_tokens[where]))
        changed = self._changed(logits, edited, where)
        if len(edited):
            tokens[edited], peaks[edited] = argmax(changed)
        failed = broken | ~np.isfinite(peaks)
        random = np.flatnonzero((self._temperature[where] > 0) & ~failed)
        u = uniforms(self._key[where[random]], np.array(positions, np.int64)[random])
        for part in self._chunks(len(random), self._chunk):
            entries = random[part]
            rows = _rows(logits, entries)
            swap = np.flatnonzero(np.isin(entries, edited))
            if len(swap):
                rows = rows.clone()
                rows[torch.from_numpy(swap)] = changed[torch.from_numpy(np.searchsorted(edited, entries[swap]))]
            tokens[entries] = self._choose(rows, self._shape(where[entries], u[part]))
        tokens[failed] = -1
        self._count(where, tokens, failed)
        asked = np.flatnonzero(self._wants[where] & ~failed)
        found: dict[int, TokenLogprobs] = {}
        for part in self._chunks(len(asked), LOGPROB_CHUNK):
            entries = asked[part]
            tops = [self._top(slot) for slot in where[entries].tolist()]
            own = torch.from_numpy(tokens[entries]).to(logits.device)
            found.update(zip(entries.tolist(), token_logprobs(_rows(logits, entries), own, tops), strict=True))
        return array("i", tokens.astype(np.int32).tobytes()), found

    def score(self, logits: torch.Tensor, tokens: array[int], slots: array[int]) -> list[TokenLogprobs]:
        """Log probabilities of given tokens (prompt logprobs): logits float32 [K, V], tokens [K], slots [K]."""
        found: list[TokenLogprobs] = []
        for part in self._chunks(len(tokens), LOGPROB_CHUNK):
            tops = [self._top(slot, prompt=True) for slot in slots[part]]
            found += token_logprobs(logits[part], _on(logits.device, tokens[part]), tops)
        return found

    def _changed(self, logits: torch.Tensor, edited: Ints, where: Ints) -> torch.Tensor:
        """Copies of the rows whose slots edit their logits, edited."""
        changed = logits[torch.from_numpy(edited)]
        for row, slot in zip(changed, where[edited].tolist(), strict=True):
            edits = self._edits[slot]
            assert edits is not None, f"slot {slot} was never admitted"
            edits.apply(row, int(self._num_outputs[slot]))
        return changed

    def _shape(self, slots: Ints, u: Floats) -> Shape:
        columns = (self._temperature[slots], self._min_p[slots], self._top_k[slots], self._top_p[slots], u)
        return Shape(*(torch.from_numpy(each)[:, None] for each in columns))

    def _chunks(self, num_rows: int, most: int) -> list[slice]:
        size = max(1, min(self._chunk, most) // self._vocab)
        return [slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size)]

    def _count(self, where: Ints, tokens: Ints, failed: npt.NDArray[np.bool_]) -> None:
        self._num_outputs[where] += ~failed
        for entry in np.flatnonzero(self._edited[where] & ~failed).tolist():
            edits = self._edits[where[entry]]
            if edits is not None and edits.penalised:
                edits.see(int(tokens[entry]), 1)

    def _top(self, slot: int, *, prompt: bool = False) -> int:
        edits = self._edits[slot]
        assert edits is not None, f"slot {slot} was never admitted"
        return min((edits.params.prompt_logprobs if prompt else edits.params.logprobs) or 0, self._vocab)


def _on(device: torch.device, values: array[int]) -> torch.Tensor:
    """int64 on the device."""
    return torch.from_numpy(np.array(values, np.int64)).to(device)


def _rows(logits: torch.Tensor, entries: Ints) -> torch.Tensor:
    """Rows by ascending number; a view where they are neighbours."""
    if entries[-1] - entries[0] + 1 == len(entries):
        return logits[int(entries[0]) : int(entries[-1]) + 1]
    return logits[torch.from_numpy(entries)]

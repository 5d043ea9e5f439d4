"""From rows of logits to tokens and log probabilities: pure functions of their arguments, on any device.

Random numbers are counter-based: `stream_key(seed, sample_index)` names a splitmix64 stream, and the token that will
stand at `position` takes its output number `position`; 53 of the 64 bits make u in [0, 1). The token is the first in
id order whose cumulative weight is above u times the total, in float64. Equal logits are ranked by token id, lowest
first, so top_k = 1 is greedy. No row's token depends on the other rows of the call.

Shapes: R rows of the call, V the vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from worker.plan import TokenLogprobs

# Top-p looks at so many of the likeliest tokens before it sorts the vocabulary, which is about 15 times dearer.
CANDIDATES = 1024

_GAMMA, _MIX_A, _MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def _mix(word: int) -> int:
    word = (word ^ word >> 30) * _MIX_A & _WORD
    word = (word ^ word >> 27) * _MIX_B & _WORD
    return word ^ word >> 31


def stream_key(seed: int, sample_index: int) -> int:
    """The 64-bit start of the splitmix64 stream of one sample of one request."""
    key = 0
    for part in (seed, sample_index):
        key = _mix((key ^ part) + _GAMMA & _WORD)
    return key


def uniforms(keys: npt.NDArray[np.uint64], positions: Ints) -> Floats:
    """float64 in [0, 1): output number `positions[i]` of the splitmix64 stream that starts at `keys[i]`."""
    word = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    word = (word ^ word >> np.uint64(30)) * np.uint64(_MIX_A)
    word = (word ^ word >> np.uint64(27)) * np.uint64(_MIX_B)
    unit: Floats = ((word ^ word >> np.uint64(31)) >> np.uint64(11)) * 2.0**-53
    return unit


def argmax(rows: torch.Tensor) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Token of each row's largest logit (the lowest id of equals) and that logit; NaN where the row holds one."""
    if rows.device.type == "cpu":  # numpy's is six times as quick as torch's there
        x = rows.numpy()
        at = x.argmax(1)
        return at, x[np.arange(len(x)), at]
    ids = rows.argmax(1)
    return ids.cpu().numpy(), rows.gather(1, ids[:, None]).squeeze(1).cpu().numpy()


def pick(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows by ascending number: `rows` itself where that is all of them, else a copy."""
    return rows if len(at) == len(rows) else rows[at]


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 that order (float32 value, then the lower id) as one number; adding 0 makes -0.0 equal to 0.0."""
    bits = (values + 0.0).view(torch.int32)
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32) - ids


def best(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row with the larger first and of equals the lower id: (values, ids), both [R, k].

    Plain topk takes any of those equal at its edge, so rows with a tie there are done again with ids in the keys.
    """
    every = torch.arange(rows.shape[1], device=rows.device)
    if k >= len(every):
        ids = _keys(rows, every).argsort(dim=1, descending=True)
        return rows.gather(1, ids), ids
    values, ids = rows.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    ids = ids.gather(1, _keys(values, ids).argsort(dim=1, descending=True)[:, :k])
    if len(tied):
        ids[tied] = _keys(rows[tied], every).topk(k, dim=1).indices
    return rows.gather(1, ids), ids


def _draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """[R, 1] the first index whose cumulative weight is above u ([R, 1]) times the total; never one of weight 0."""
    cumulative = weights.cumsum(1)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """How to draw from each of R rows. All [R, 1], on one device; float64, `top_k` int64.

    Attributes:
        temperature: above 0.
        top_k: 1 to V, which keeps all.
        u: in [0, 1).
    """

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    u: torch.Tensor

    def __getitem__(self, at: torch.Tensor) -> Shape:
        return Shape(self.temperature[at], self.min_p[at], self.top_k[at], self.top_p[at], self.u[at])

    def to(self, device: torch.device) -> Shape:
        columns = (self.temperature, self.min_p, self.top_k, self.top_p, self.u)
        return Shape(*(each.to(device) for each in columns))

    def weights(self, values: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        """float64 [R, C] relative to the likeliest token's, which is 1; 0 where min-p cuts. `peak` is [R, 1]."""
        weights = ((values.double() - peak.double()) / self.temperature).exp_()
        return weights.mul_(weights >= self.min_p) if bool((self.min_p > 0).any()) else weights


def _among(
    rows: torch.Tensor, count: int, shape: Shape, total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from each row's `count` likeliest tokens: ([R, 1] tokens, [R] whether no token beyond them is kept).

    `total` [R, 1] is the weight of all that top-k keeps, where those are more than `count`.
    """
    values, ids = best(rows, count)
    weights = shape.weights(values, values[:, :1])
    weights *= torch.arange(count, device=rows.device) < shape.top_k
    cumulative = weights.cumsum(1)
    whole = cumulative[:, -1:] if total is None else total
    before = torch.cat((torch.zeros_like(whole), cumulative[:, :-1]), 1)
    kept = (before < shape.top_p * whole) | (shape.top_p >= 1.0)
    order = ids.argsort(dim=1)
    at = _draw((weights * kept).gather(1, order), shape.u)
    return ids.gather(1, order.gather(1, at)), ~kept[:, -1] | (count == rows.shape[1])


def choose(rows: torch.Tensor, shape: Shape) -> torch.Tensor:
    """int64 [R] tokens by temperature, then min-p, top-k and top-p, each over what the one before has left.

    rows: float32 [R, V], each with a finite largest logit.
    """
    vocab = rows.shape[1]
    tokens = torch.empty((len(rows), 1), dtype=torch.int64, device=rows.device)
    uncut, all_mass = (shape.top_k >= vocab).squeeze(1), (shape.top_p >= 1.0).squeeze(1)
    small = ~uncut & (shape.top_k <= CANDIDATES).squeeze(1)
    left = ~uncut & ~small
    if len(at := (uncut & all_mass).nonzero().flatten()):
        few, how = pick(rows, at), shape[at]
        tokens[at] = _draw(how.weights(few, few.amax(1, keepdim=True)), how.u)
    if len(at := (uncut & ~all_mass).nonzero().flatten()):
        few, how = pick(rows, at), shape[at]
        total = how.weights(few, few.amax(1, keepdim=True)).cumsum(1)[:, -1:]
        tokens[at], settled = _among(few, min(CANDIDATES, vocab), how, total)
        left[at[~settled]] = True
    for where in (small, left):
        if len(at := where.nonzero().flatten()):
            few, how = pick(rows, at), shape[at]
            tokens[at], _ = _among(few, int(how.top_k.max()), how, None)
    return tokens.squeeze(1)


def token_logprobs(rows: torch.Tensor, tokens: torch.Tensor, tops: list[int]) -> list[TokenLogprobs]:
    """Log probability and rank of `tokens[i]` in row i, with the `tops[i]` likeliest; rank 1 is the first of those."""
    peak = rows.amax(1, keepdim=True).double()
    norm = peak + (rows.double() - peak).exp_().sum(1, keepdim=True).log_()
    own = rows.gather(1, tokens[:, None])
    lower = torch.arange(rows.shape[1], device=rows.device) < tokens[:, None]
    ranks = ((rows > own) | ((rows == own) & lower)).sum(1) + 1
    logprobs = (own.double() - norm).squeeze(1)
    top: list[tuple[tuple[int, float], ...]] = [()] * len(tops)
    if wanted := max(tops):
        values, ids = best(rows, wanted)
        lists = zip(ids.tolist(), (values.double() - norm).tolist(), strict=True)
        top = [tuple(zip(i[:n], v[:n], strict=True)) for (i, v), n in zip(lists, tops, strict=True)]
    return [TokenLogprobs(*each) for each in zip(logprobs.tolist(), ranks.tolist(), top, strict=True)]

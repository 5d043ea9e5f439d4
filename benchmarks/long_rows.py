"""What a long context must give: rows of a Llama in float64 over the K and V that its devices hold.

    tokens --embedding--> layer 0 --> layer 1 --> row     K, V: as read back

Shapes in names: N keys, R rows, H query heads, K kv heads, D head_dim, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from worker.model_config import ModelConfig
from worker.ranks import Ranks

_KEYS = 1 << 14  # at a time


@dataclass(frozen=True, slots=True)
class Held:
    """What one device holds of a sequence.

    Attributes:
        at: int64 [N], the positions, ascending.
        kv: by layer, (k, v), each [N, K, D].
    """

    device: int
    at: torch.Tensor
    kv: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def read_back(ranks: Ranks, pages: Sequence[tuple[int, int]], block_size: int, length: int, layers: int) -> list[Held]:
    """All K and V of a sequence's first `length` tokens, by device; each device is one rank's of a single stage.

    Args:
        pages: (device id, block id) in the order of its table.
    """
    found = []
    for device in sorted({device for device, _ in pages}):
        mine = [(index, block) for index, (each, block) in enumerate(pages) if each == device]
        starts = torch.tensor([index for index, _ in mine], dtype=torch.int64) * block_size
        at = (starts[:, None] + torch.arange(block_size)).flatten()
        held = Held(device, at[at < length])
        for layer in range(layers):
            k, v = ranks.gather_kv(device, layer, [block for _, block in mine])
            held.kv.append((k[: len(held.at)], v[: len(held.at)]))
        found.append(held)
    return found


class Exact:
    """A model folder's layers in float64, with the weights as stored."""

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig.from_folder(folder)
        self._weights = {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}
        frequencies = self.config.rope.inverse_frequencies(self.config.head_dim)
        self._frequencies = torch.tensor(frequencies, dtype=torch.float64)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, C] of int64 [R]."""
        return self._weights["model.embed_tokens.weight"][tokens]

    def kv(self, layer: int, hidden_RC: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [R, K, D], of the rows that enter a layer at these positions."""
        x = self._norm(hidden_RC, layer, "input_layernorm")
        k, v = (
            self._linear(x, layer, f"self_attn.{name}_proj").unflatten(1, (-1, self.config.head_dim)) for name in "kv"
        )
        return self._rotate(k, at), v

    def layer(
        self, layer: int, hidden_RC: torch.Tensor, at: torch.Tensor, held: Sequence[Held]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The rows behind a layer, [R, C], and what they would be if one device were left out, for each device."""
        x = self._norm(hidden_RC, layer, "input_layernorm")
        q = self._rotate(self._linear(x, layer, "self_attn.q_proj").unflatten(1, (-1, self.config.head_dim)), at)
        parts = [self._attend(q, at, *each.kv[layer], each.at) for each in held]
        without = [
            self._behind(layer, hidden_RC, merge([part for other, part in enumerate(parts) if other != index])[0])
            for index in range(len(parts))
        ]
        return self._behind(layer, hidden_RC, merge(parts)[0]), without

    def _behind(self, layer: int, hidden_RC: torch.Tensor, attended_RHD: torch.Tensor) -> torch.Tensor:
        hidden = hidden_RC + self._linear(attended_RHD.flatten(1), layer, "self_attn.o_proj")
        x = self._norm(hidden, layer, "post_attention_layernorm")
        gate, up = (self._linear(x, layer, f"mlp.{name}_proj") for name in ("gate", "up"))
        return hidden + self._linear(F.silu(gate) * up, layer, "mlp.down_proj")

    def _attend(
        self, q_RHD: torch.Tensor, at: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, keys_at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [R, H, D], lse [R, H]) over the keys at or before each row's position."""
        rows, heads, dim = q_RHD.shape
        q = q_RHD.view(rows, k_NKD.shape[1], -1, dim) / math.sqrt(dim)
        parts = [(torch.zeros(rows, heads, dim, dtype=torch.float64), torch.full((rows, heads), -torch.inf).double())]
        for start in range(0, len(keys_at), _KEYS):
            some = slice(start, start + _KEYS)
            scores = torch.einsum("rkgd,nkd->rkgn", q, k_NKD[some].double())
            scores.masked_fill_((keys_at[some] > at[:, None])[:, None, None], -torch.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
            out = torch.einsum("rkgn,nkd->rkgd", weights, v_NKD[some].double())
            parts = [merge([*parts, (out.reshape(rows, heads, dim), lse.reshape(rows, heads))])]
        return parts[0]

    def _norm(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self._weights[f"model.layers.{layer}.{name}.weight"]

    def _linear(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        return x @ self._weights[f"model.layers.{layer}.{name}.weight"].T

    def _rotate(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = at.double()[:, None, None] * self._frequencies
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention (out [R, H, D], lse [R, H]) over disjoint keys as one; no key at all gives zeros and -inf."""
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    weights = (lses - total.masked_fill(total.isinf(), 0.0)).exp()
    return (outs * weights[..., None]).sum(0), total


class Gap:
    """How far rows are from the exact ones.

    Attributes:
        worst: of all rows, the norm of the difference over the exact row's.
    """

    def __init__(self) -> None:
        self.worst = self._apart = self._exact = 0.0

    def add(self, found: torch.Tensor, exact: torch.Tensor) -> None:
        """Rows along the first dimension."""
        apart = (found.double() - exact).flatten(1).pow(2).sum(1)
        size = exact.flatten(1).pow(2).sum(1)
        self._apart, self._exact = self._apart + float(apart.sum()), self._exact + float(size.sum())
        self.worst = max(self.worst, float((apart / size).max()) ** 0.5)

    @property
    def whole(self) -> float:
        """The norm of all differences over the norm of all exact rows."""
        return math.sqrt(self._apart / self._exact)


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors, as `Gap.whole`, and how much one device's pages count for.

    Attributes:
        first_k, first_v: of every token's K and V in the first layer.
        inner_k, inner_v: of K and V that the checked rows have in the second layer: what the first one made of them.
        rows: of the residual stream behind the last layer, at the checked rows.
        worst: of any row of all these.
        change: of a checked row if one device's pages were left out in the last layer; the median.
    """

    first_k: float
    first_v: float
    inner_k: float
    inner_v: float
    rows: float
    worst: float
    change: float

    def are_within(self, limit: float) -> bool:
        """Whether each kind is, and every single row within three times as much."""
        kinds = (self.first_k, self.first_v, self.inner_k, self.inner_v, self.rows)
        return max(kinds) <= limit and self.worst <= 3 * limit


def check_rows(exact: Exact, held: Sequence[Held], tokens: torch.Tensor, rows: dict[int, torch.Tensor]) -> Errors:
    """Compare what the devices hold and what they gave with float64, for a model of two layers.

    Args:
        tokens: int64, of the whole sequence.
        rows: position -> float32 [C], what the engine had behind its last layer.
    """
    gaps = first_k, first_v, inner_k, inner_v, last_rows = tuple(Gap() for _ in range(5))
    for each in held:
        k, v = each.kv[0]
        for start in range(0, len(each.at), _KEYS):
            some = slice(start, start + _KEYS)
            at = each.at[some]
            exact_k, exact_v = exact.kv(0, exact.embed(tokens[at]), at)
            first_k.add(k[some], exact_k)
            first_v.add(v[some], exact_v)
    at = torch.tensor(sorted(rows), dtype=torch.int64)
    hidden, _ = exact.layer(0, exact.embed(tokens[at]), at, held)
    exact_k, exact_v = exact.kv(1, hidden, at)
    for each in held:
        mine = torch.isin(at, each.at)
        if mine.any():
            index = torch.searchsorted(each.at, at[mine])
            inner_k.add(each.kv[1][0][index], exact_k[mine])
            inner_v.add(each.kv[1][1][index], exact_v[mine])
    last, without = exact.layer(1, hidden, at, held)
    last_rows.add(torch.stack([rows[position] for position in at.tolist()]), last)
    changes = torch.stack([(each - last).norm(dim=1) / last.norm(dim=1) for each in without])
    return Errors(*(gap.whole for gap in gaps), max(gap.worst for gap in gaps), float(changes.median()))

"""Decoder: the one implementation of the Llama family, over paged keys and values.

Shapes in names: T tokens of the step, H query heads, K kv heads, D head_dim, C hidden size, S rows of logits.
Weights are used where they are mapped; nothing is fused, transposed or packed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels import ops
from kernels.decoder import Head
from worker.kv_cache import PagedKVCache
from worker.model_config import ModelConfig
from worker.tables import Batch
from worker.weights import Progress, TensorReader, Weights


@dataclass(frozen=True, slots=True)
class Linear:
    """[rows, columns] and perhaps [rows]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Over the last dimension, in float32; rounded to the model's dtype before the weight, as transformers does."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights."""

    input_norm: RMSNorm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    mlp_norm: RMSNorm
    gate: Linear
    up: Linear
    down: Linear


class Decoder:
    """A model ready to run: tokens and positions in, hidden rows and logits out. Holds no state of any sequence."""

    def __init__(
        self, config: ModelConfig, weights: Weights, dtype: torch.dtype, progress: Progress | None = None
    ) -> None:
        """Take the weights, mapped where they are stored in `dtype`, else converted one by one.

        Args:
            dtype: float32 or bfloat16.
            progress: called after each tensor with the bytes done and the bytes in all, as stored.

        Errors: ModelError where a tensor is missing, unknown, or of another shape or kind than config.json says.
        """
        self.config, self.dtype = config, dtype
        reader = TensorReader(weights, config.tensor_shapes(), dtype, config.harmless_tensors, progress)
        tensors = {name: reader.take(name) for name in config.tensor_shapes()}
        self._embedding = tensors["model.embed_tokens.weight"]
        self._layers = [_layer(config, tensors, f"model.layers.{layer}.") for layer in range(config.num_layers)]
        self._norm = RMSNorm(tensors["model.norm.weight"], config.rms_norm_eps)
        self._head = tensors.get("lm_head.weight", self._embedding)
        self._frequencies = torch.tensor(config.rope.inverse_frequencies(config.head_dim), dtype=torch.float64)

    @property
    def windows(self) -> tuple[int, ...]:
        """The different sliding windows of the layers; 0 is full attention."""
        return tuple(sorted(set(self.config.windows)))

    def forward(self, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """Run all layers over one ragged batch.

        Args:
            batch: the tokens, where their K and V go and what each row attends.
            cache: mutated: this step's K and V are written, in every layer before any row attends.

        Returns:
            The residual stream behind the last layer, [T, C], for `head`.
        """
        cos, sin = self._angles(batch.positions)
        hidden = F.embedding(batch.tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            # Under tensor parallelism each of the two sums below is preceded by one all-reduce of its right side.
            hidden = hidden + self._attention(index, layer, hidden, cos, sin, batch, cache)
            hidden = hidden + self._mlp(layer, hidden)
        return hidden

    def head(self, hidden: torch.Tensor, rows: npt.NDArray[np.int64], *, logits: bool) -> Head:
        """Last norm and head over some rows of what `forward` returned; all their logits too where asked for."""
        found = F.linear(self._norm(hidden[torch.from_numpy(rows)]), self._head).to(torch.float32)
        tokens = found.numpy().argmax(1)  # torch's takes six times as long
        values = found.numpy()[np.arange(len(tokens)), tokens]
        return Head(tokens.astype(np.int32), values, found.sum(-1).numpy(), found if logits else None)

    def _attention(
        self,
        index: int,
        layer: Layer,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: Batch,
        cache: PagedKVCache,
    ) -> torch.Tensor:
        x = layer.input_norm(hidden)
        shape = (len(x), -1, self.config.head_dim)
        q_THD, k_TKD, v_TKD = layer.q(x).view(shape), layer.k(x).view(shape), layer.v(x).view(shape)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THD, k_TKD = layer.q_norm(q_THD), layer.k_norm(k_TKD)
        cache.write_kv(index, _rotate(k_TKD, cos, sin), v_TKD, batch.slots)
        window = self.config.windows[index]
        out_THD, _ = ops.attend(
            _rotate(q_THD, cos, sin), batch.query_start, cache.pools, index, batch.pages[window], batch.masks[window]
        )
        return layer.o(out_THD.to(self.dtype).flatten(1))

    def _mlp(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        x = layer.mlp_norm(hidden)
        return layer.down(F.silu(layer.gate(x)) * layer.up(x))

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `rotary_angles`; [T, 1, D/2], for all heads."""
        cos, sin = rotary_angles(positions, self._frequencies, self.config.rope.attention_factor)
        return cos[:, None], sin[:, None]


def rotary_angles(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines times `factor`, float32 [T, D/2]. The angles are float64: float32 is 0.05 rad off at a million.

    Args:
        positions: int64 [T].
        frequencies: float64 [D/2].
    """
    angles = positions.to(torch.float64)[:, None] * frequencies
    return (angles.cos() * factor).to(torch.float32), (angles.sin() * factor).to(torch.float32)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of the last dimension. In float32 also for bfloat16: one rounding, not five."""
    a, b = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _layer(config: ModelConfig, tensors: dict[str, torch.Tensor], prefix: str) -> Layer:
    def linear(name: str) -> Linear:
        return Linear(tensors[f"{prefix}{name}.weight"], tensors.get(f"{prefix}{name}.bias"))

    def norm(name: str) -> RMSNorm:
        return RMSNorm(tensors[f"{prefix}{name}.weight"], config.rms_norm_eps)

    return Layer(
        input_norm=norm("input_layernorm"),
        q=linear("self_attn.q_proj"),
        k=linear("self_attn.k_proj"),
        v=linear("self_attn.v_proj"),
        o=linear("self_attn.o_proj"),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        mlp_norm=norm("post_attention_layernorm"),
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )

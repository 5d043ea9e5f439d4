"""NativeModel: a rank's part of a Llama-family model on the native decoder step, its weights packed once at load.

What it computes is `worker/model.py`, which stays as the oracle; it rounds less often. In bfloat16 the residual stream,
the sums of products and everything between two products stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from kernels.cpu import Native
from kernels.decoder import CHOICE, Border, DecoderShape, Head, LayerRows, MlpRows, NativeDecoder, Rows
from kernels.peers import Peers
from worker.draw import Shape
from worker.kv_cache import PagedKVCache
from worker.layout import Layout, Part
from worker.model_config import ModelConfig
from worker.tables import Batch
from worker.weights import Progress, TensorReader, Weights

_DOWN = "mlp.down_proj"


class NativeModel:
    """A model ready to run: tokens and positions in, hidden rows and logits out. Holds no state of any sequence.

    Attributes:
        windows: the different sliding windows of the part's layers; 0 is full attention.
        decoder: its weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        backend: Native,
        threads: int,
        progress: Progress | None = None,
        *,
        part: Part | None = None,
        deterministic: bool = False,
    ) -> None:
        """Pack the weights of a part, layer by layer, in `dtype`; their files are not held in memory afterwards.

        Args:
            dtype: float32 or bfloat16.
            threads: that work on a step, the caller's included.
            progress: called with the bytes done and the bytes in all of this part, as stored.
            part: what this rank has of the model; None is all of it.
            deterministic: a token's logits depend on its sequence alone, bit for bit.

        Errors: ModelError where a tensor is missing, unknown, or of another shape or kind than config.json says.
        """
        self.config, self.dtype, self.part = config, dtype, part or Layout().part(config, 0)
        part = self.part
        self.windows = tuple(sorted({config.windows[layer] for layer in part.layers}))
        slices = part.tensors(config)
        reader = TensorReader(weights, config.tensor_shapes(), dtype, config.harmless_tensors, progress, slices)
        embedding = reader.take("model.embed_tokens.weight") if part.is_first else None
        frequencies = torch.tensor(config.rope.inverse_frequencies(config.head_dim), dtype=torch.float64)
        shape = DecoderShape(
            hidden=config.hidden_size,
            q_heads=len(part.heads),
            kv_heads=len(part.kv_heads),
            head_dim=config.head_dim,
            intermediate=len(part.mlp),
            vocab=config.vocab_size,
            eps=config.rms_norm_eps,
            rotary_factor=config.rope.attention_factor,
            windows=self.windows,
            attended_heads=len(part.attended),
            is_cut=part.is_cut,
        )
        norm = reader.take("model.norm.weight").to(torch.float32) if part.is_last else None
        self.decoder = NativeDecoder(
            shape, dtype, embedding, norm, frequencies, backend, threads, deterministic=deterministic
        )
        if part.is_carrying:
            cut = _LayerReader(config, reader, part.layers.start - 1)
            *border, carried = cut.mlps([*part.border_in, part.carried_mlp])
            self.decoder.set_carried(carried, border)
            weights.release()
        for layer in part.layers:
            units = [part.last_mlp, *part.border_out] if layer == part.layers[-1] else [part.mlp]
            self.decoder.add_layer(_LayerReader(config, reader, layer).rows(units))
            weights.release()
        if part.is_last:
            self.decoder.set_head(Rows.beside((_head(config, part, reader, embedding),), (None,)))
            weights.release()

    def forward(
        self,
        batch: Batch,
        cache: PagedKVCache,
        hidden: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        tensor: Peers | None = None,
        slice: Peers | None = None,
        border: Border | None = None,
    ) -> torch.Tensor:
        """See `Decoder.forward`; the residual stream is float32. `NativeDecoder.forward` says what a part needs."""
        return self.decoder.forward(
            *(batch.tokens, batch.positions, batch.slots, batch.query_start, cache.pool, batch.pages, batch.masks),
            hidden=hidden,
            out=out,
            tensor=tensor,
            slice=slice,
            border=border,
        )

    def head(self, hidden: torch.Tensor, rows: npt.NDArray[np.int64], *, logits: bool) -> Head:
        """See `Decoder.head`; of the part's rows of the vocabulary, `part.vocab`: only `tokens` count in all of it."""
        head = self.decoder.head(hidden, rows, logits=logits)
        first = self.part.vocab.start
        return replace(head, tokens=head.tokens + np.int32(first)) if first else head

    def choose(self, rows: torch.Tensor, shape: Shape) -> npt.NDArray[np.int64]:
        """See `draw.choose`."""
        return self.decoder.choose(rows, choices_of(shape))


def choices_of(shape: Shape) -> npt.NDArray[np.void]:
    """What `kernels.decoder.choose` takes."""
    choices = np.empty(len(shape.u), CHOICE)
    for name in CHOICE.names or ():
        choices[name] = getattr(shape, name).squeeze(1).numpy()
    return choices


def _head(config: ModelConfig, part: Part, reader: TensorReader, embedding: torch.Tensor | None) -> torch.Tensor:
    """The part's rows of the head, which is the embedding again where the two are tied."""
    if not config.tie_word_embeddings:
        return reader.take("lm_head.weight")
    if embedding is None:
        return reader.take("model.embed_tokens.weight")
    return embedding[part.vocab.start : part.vocab.stop]


class _LayerReader:
    """What a rank has of one layer, read once."""

    def __init__(self, config: ModelConfig, reader: TensorReader, layer: int) -> None:
        self._config, self._reader, self._layer = config, reader, layer

    def rows(self, units: Sequence[range]) -> LayerRows:
        """Args: units: of its MLP, and of the border's pieces."""
        config, (mlp, *border) = self._config, self.mlps(units)
        return LayerRows(
            input_norm=self._norm("input_layernorm"),
            q_norm=self._norm("self_attn.q_norm") if config.qk_norm else None,
            k_norm=self._norm("self_attn.k_norm") if config.qk_norm else None,
            qkv=self._beside("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o=self._beside("self_attn.o_proj"),
            mlp=mlp,
            window=config.windows[self._layer],
            border=border,
        )

    def mlps(self, units: Sequence[range]) -> list[MlpRows]:
        """What the rank has of the MLP, in these runs of it; the first of them adds the bias of down."""
        norm, down, bias = self._norm("post_attention_layernorm"), self._weight(_DOWN), self._bias(_DOWN)
        each = [(self._weight(name), self._bias(name)) for name in ("mlp.gate_proj", "mlp.up_proj")]

        def some(rows: range, down_bias: torch.Tensor | None) -> MlpRows:
            of = slice(rows.start - units[0].start, rows.stop - units[0].start)
            (gate, gate_bias), (up, up_bias) = [(w[of], None if b is None else b[of]) for w, b in each]
            return MlpRows(norm, Rows.paired(gate, up, gate_bias, up_bias), Rows.beside((down[:, of],), (down_bias,)))

        return [some(rows, None if at else bias) for at, rows in enumerate(units)]

    def _weight(self, name: str) -> torch.Tensor:
        return self._reader.take(f"model.layers.{self._layer}.{name}.weight")

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._reader.take_if_any(f"model.layers.{self._layer}.{name}.bias")

    def _norm(self, name: str) -> torch.Tensor:
        return self._weight(name).to(torch.float32)

    def _beside(self, *names: str) -> Rows:
        return Rows.beside([self._weight(name) for name in names], [self._bias(name) for name in names])

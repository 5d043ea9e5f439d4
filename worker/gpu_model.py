"""GpuModel: a Llama-family model on one GPU, its small kernels fused in Triton, its products cuBLAS's.

    plan (host) --one transfer--> tokens, positions, slots --another--> pages dealt over the multiprocessors
    each layer:  norm (+ residual) - product - norm, rotate, write K and V - attend - product
                 - norm (+ residual) - product - silu * up - product
    head:        rows - norm - product in float32 - likeliest, sum --> host, the only wait of a step without sampling

What it computes is `worker/model.py`, which stays as the oracle; it rounds less often: norms, rotations and activations
round once, and logits are sums in float32 that are not rounded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels import checks, triton_fused, triton_sampling
from kernels.decoder import Head
from kernels.ops import Mask, PageList, PlannedBackend
from kernels.upload import upload
from worker.draw import Shape
from worker.kv_cache import PagedKVCache
from worker.model import Linear, rotary_angles
from worker.model_config import ModelConfig
from worker.tables import Batch
from worker.weights import Progress, TensorReader, Weights

_LONG = 1 << 13  # tokens whose attention is split over programs
_SOME = 40  # new tokens that are no decode
GPU_CHUNK = 1 << 28  # logits that are drawn from at once


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights, on the device."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int


class GpuModel:
    """A model ready to run: tokens and positions in, hidden rows and logits out. Holds no state of any sequence."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        backend: PlannedBackend,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """Copy the weights to the device, layer by layer; their files are not held in memory afterwards.

        Args:
            dtype: float32 or bfloat16.
            backend: whose attention is planned on the host.
            device: of weights and pages.
            progress: called with the bytes done and the bytes in all, as stored.

        Errors: ModelError where a tensor is missing, unknown, or of another shape or kind than config.json says.
        """
        self.config, self.dtype, self.device = config, dtype, device
        self._backend = backend
        reader = TensorReader(weights, config.tensor_shapes(), dtype, config.harmless_tensors, progress)
        self._embedding = reader.take("model.embed_tokens.weight").to(device)
        self._layers = []
        for layer in range(config.num_layers):
            self._layers.append(self._take(reader, layer))
            weights.release()
        self._norm = reader.take("model.norm.weight").to(device)
        tied = config.tie_word_embeddings
        self._head = self._embedding if tied else reader.take("lm_head.weight").to(device)
        weights.release()
        frequencies = config.rope.inverse_frequencies(config.head_dim)
        self._frequencies = torch.tensor(frequencies, dtype=torch.float64).to(device)

    @property
    def windows(self) -> tuple[int, ...]:
        """The different sliding windows of the layers; 0 is full attention."""
        return tuple(sorted(set(self.config.windows)))

    def forward(self, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """Run all layers over one ragged batch: see `Decoder.forward`."""
        config, pools = self.config, cache.pools
        checks.check_range(batch.slots, "slots", -1, cache.num_blocks * cache.block_size)
        columns = [each.numpy() for each in (batch.tokens, batch.positions, batch.slots)]
        tokens, positions, slots = upload(columns, self.device)
        plans = {}
        for window, pages in batch.pages.items():
            mask = batch.masks[window]
            checks.check_ids(len(tokens), batch.query_start, pools, pages, mask)
            plans[window] = self._backend.plan(config.num_heads, pools[0], batch.query_start, pages, mask)
        cos, sin = rotary_angles(positions, self._frequencies, config.rope.attention_factor)
        hidden = F.embedding(tokens, self._embedding)
        x = triton_fused.rms_norm(hidden, self._layers[0].input_norm, config.rms_norm_eps)
        for index, layer in enumerate(self._layers):
            q_THD, k_TKD, v_TKD = self._heads(layer.qkv(x))
            q_THD = triton_fused.write_kv(
                q_THD,
                k_TKD,
                v_TKD,
                cos,
                sin,
                cache.pool,
                index,
                slots,
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=config.rms_norm_eps,
            )
            mask = batch.masks[layer.window]
            out_THD, _ = self._backend.run(plans[layer.window], q_THD, pools, index, mask, config.head_dim**-0.5)
            y = layer.o(out_THD.to(self.dtype).flatten(1))
            x = triton_fused.rms_norm(y, layer.mlp_norm, config.rms_norm_eps, residual=hidden)
            y = layer.down(triton_fused.silu_mul(layer.gate_up(x)))
            if index + 1 < len(self._layers):
                norm = self._layers[index + 1].input_norm
                x = triton_fused.rms_norm(y, norm, config.rms_norm_eps, residual=hidden)
            else:
                hidden += y
        return hidden

    def head(self, hidden: torch.Tensor, rows: npt.NDArray[np.int64], *, logits: bool) -> Head:
        """See `Decoder.head`."""
        (at,) = upload([rows], self.device)
        x = triton_fused.rms_norm(hidden[at], self._norm, self.config.rms_norm_eps)
        found = self._product(x)
        values, tokens = found.max(1)  # of equal ones the first
        numbers = torch.stack([tokens.to(torch.int32), values.view(torch.int32), found.sum(1).view(torch.int32)])
        best, peaks, totals = numbers.cpu().numpy()
        return Head(best, peaks.view(np.float32), totals.view(np.float32), found if logits else None)

    def choose(self, rows: torch.Tensor, shape: Shape) -> npt.NDArray[np.int64]:
        """See `draw.choose`. The filters that no row asks for cost nothing."""
        if rows.data_ptr() % 16:  # from a row on that is not the first: kernels are made for aligned ones
            rows = rows.clone()
        columns = (shape.temperature, shape.u, shape.top_k, shape.top_p, shape.min_p)
        temperature, u, top_k, top_p, min_p = upload([each.squeeze(1).numpy() for each in columns], self.device)
        tokens = triton_sampling.sample(
            rows,
            temperature,
            top_k if bool((shape.top_k < rows.shape[1]).any()) else None,
            top_p if bool((shape.top_p < 1).any()) else None,
            min_p if bool((shape.min_p > 0).any()) else None,
            u,
        )
        return tokens.cpu().numpy().astype(np.int64)

    def warm_up(self, cache: PagedKVCache) -> None:
        """Run every kernel once in each of its forms, so that none is compiled while requests wait.

        No page is written; what is read of them does not matter.
        """
        for context, lengths in itertools.product((0, _LONG), ((1, 1), (_SOME,))):
            hidden = self.forward(_any_batch(self.windows, cache.block_size, context, lengths), cache)
        logits = self.head(hidden, np.zeros(2, np.int64), logits=True).logits
        assert logits is not None
        logits.zero_()  # pages that hold anything make logits that may be none
        for top_k, top_p, min_p in itertools.product((logits.shape[1], 1), (1.0, 0.5), (0.0, 0.5)):
            values = {"temperature": 1.0, "min_p": min_p, "top_k": top_k, "top_p": top_p, "u": 0.5}
            columns = {name: torch.from_numpy(np.array([[value]] * 2)) for name, value in values.items()}
            self.choose(logits, Shape(**columns))

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, heads, D] of queries, keys and values, as parts of one matrix."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        q, k, v = qkv.unflatten(1, (heads + 2 * kv_heads, self.config.head_dim)).split([heads, kv_heads, kv_heads], 1)
        return q, k, v

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [S, V]: two that differ must not be rounded to the same."""
        if x.dtype == torch.float32:
            return F.linear(x, self._head)
        if x.is_cuda:
            return torch.mm(x, self._head.t(), out_dtype=torch.float32)
        return F.linear(x.to(torch.float32), self._head.to(torch.float32))

    def _take(self, reader: TensorReader, layer: int) -> Layer:
        prefix = f"model.layers.{layer}."

        def norm(name: str) -> torch.Tensor:
            return reader.take(f"{prefix}{name}.weight").to(self.device)

        def beside(*names: str) -> Linear:
            tensors = [reader.take(f"{prefix}{name}.weight") for name in names]
            weight = torch.empty(
                (sum(map(len, tensors)), tensors[0].shape[1]), dtype=tensors[0].dtype, device=self.device
            )
            biases = [reader.take_if_any(f"{prefix}{name}.bias") for name in names]
            bias = None
            if any(each is not None for each in biases):
                bias = torch.zeros(len(weight), dtype=weight.dtype, device=self.device)
            end = 0
            for tensor, part in zip(tensors, biases, strict=True):
                begin, end = end, end + len(tensor)
                weight[begin:end].copy_(tensor)
                if bias is not None and part is not None:
                    bias[begin:end].copy_(part)
            return Linear(weight, bias)

        config = self.config
        return Layer(
            input_norm=norm("input_layernorm"),
            qkv=beside("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
            o=beside("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate_up=beside("mlp.gate_proj", "mlp.up_proj"),
            down=beside("mlp.down_proj"),
            window=config.windows[layer],
        )


def _any_batch(windows: tuple[int, ...], block_size: int, context: int, lengths: tuple[int, ...]) -> Batch:
    """Rows of so many new tokens, each over `context` tokens, all of them in block 0; their K and V go nowhere."""
    total = sum(lengths)
    positions = np.concatenate([np.arange(context, context + length) for length in lengths])
    index = [np.arange(-(-(context + length) // block_size), dtype=np.int32) for length in lengths]
    start = np.cumsum([0, *map(len, index)], dtype=np.int32)
    page_positions = np.concatenate(index) * np.int32(block_size)
    first = torch.full((len(lengths),), context, dtype=torch.int32)
    pages = PageList(
        torch.from_numpy(start), torch.zeros(len(page_positions), dtype=torch.int32), torch.from_numpy(page_positions)
    )
    return Batch(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=torch.from_numpy(positions),
        slots=torch.full((total,), -1, dtype=torch.int64),
        query_start=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        pages=dict.fromkeys(windows, pages),
        masks={window: Mask(first, window) for window in windows},
    )

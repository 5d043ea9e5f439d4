"""How much memory the pool takes, and what fits into it: the arithmetic behind `--dry-run` and the start-up lines."""

from __future__ import annotations

from dataclasses import dataclass, field

from launch.config import EngineConfig, show_size
from launch.gpus import visible_gpus
from launch.machine import available_memory
from pagetable.errors import ConfigError
from pagetable.ids import MAX_BLOCKS
from worker.config import ShardConfig
from worker.layout import Layout
from worker.model_config import ModelConfig

_POOL_SHARE = 0.5  # of what is free beside the weights, where nothing sizes the pool
_GPU_POOL_SHARE = 0.9  # the same of a GPU, which nobody else uses
_GPU_RESERVE = 3 << 29  # of a GPU: a context, the workspaces of libraries, partial results of attention
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_LEAST_LIMIT = 10.0
_SLOW_FLOPS = 2e10  # a second, of a core
_SCALE_BYTES = 4  # of a token and head in int8 pages, as kernels.int8 says


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a configuration means for one model.

    Attributes:
        dtype: of weights and pages, `auto` resolved.
        weight_bytes: in that dtype, of all ranks of a shard.
        block_bytes: one page of all layers, K and V, over all ranks that hold a part of it.
        clamped: whether max_model_len was cut to what the pool holds because nobody asked for more.
        device: "cpu" or "cuda".
    """

    dtype: str
    weight_bytes: int
    block_bytes: int
    num_blocks: int
    max_model_len: int
    clamped: bool
    shard: ShardConfig
    layout: Layout = field(default_factory=Layout)
    device: str = "cpu"

    @classmethod
    def make(cls, config: EngineConfig, model: ModelConfig, free: int | None = None, device: str = "cpu") -> MemoryPlan:
        """Size the pool. ConfigError names the setting, the number and the limit.

        Args:
            free: bytes that this process can take on the device; None asks the machine.
            device: "cpu" or "cuda"; `config.device` is not looked at.
        """
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float32" if model.dtype == "float32" else "bfloat16"
        element = _ELEMENT_BYTES[dtype]
        layout = config.layout
        parts = layout.parts(model)
        row = model.head_dim + _SCALE_BYTES if config.kv_cache_dtype == "int8" else model.head_dim * element
        if config.kv_cache_dtype == "int8" and config.block_size * model.head_dim % _SCALE_BYTES:
            limit = f"stand with a block_size times head_dim ({model.head_dim}) that is a multiple of {_SCALE_BYTES}"
            raise ConfigError("kv_cache_dtype", "int8", limit, "raise block_size")
        if layout.num_ranks == 1:
            weights = element * sum(_product(shape) for shape in model.tensor_shapes().values())
        else:  # what several ranks hold is there several times
            weights = sum(part.weight_bytes(model, element) for part in parts)
        block = sum(part.device_block_bytes(config.block_size, row) for part in parts if part.tensor_rank == 0)
        wanted = config.max_model_len if config.max_model_len is not None else model.max_position_embeddings
        if wanted > model.max_position_embeddings:
            limit = f"be at most the model's max_position_embeddings, {model.max_position_embeddings}"
            raise ConfigError("max_model_len", wanted, limit)
        pages = -(-wanted // config.block_size)
        if free is None:
            free = available_memory() if device == "cpu" else _gpu_memory()
        taken = weights + (_step_bytes(config, model, element) if device != "cpu" else 0)
        num_blocks = _num_blocks(config, block, taken, pages, free, device)
        length, clamped = wanted, False
        if wanted > num_blocks * config.block_size:
            if config.max_model_len is not None:
                limit = f"be at most {num_blocks * config.block_size}, which the pool of {num_blocks} pages holds"
                raise ConfigError("max_model_len", wanted, limit, "lower it or give the pool more memory")
            length, clamped = num_blocks * config.block_size, True
        shard = ShardConfig(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_model_len=length,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_partial_prefills=config.max_num_partial_prefills,
            enable_prefix_caching=config.enable_prefix_caching,
            async_scheduling=config.async_scheduling,
            deterministic=config.deterministic,
            kv_cache_dtype=config.kv_cache_dtype,
            preallocate_kv_cache=config.preallocate_kv_cache,
            num_stages=layout.pipeline,
        )
        if num_blocks < layout.page:
            limit = f"be at least page_parallel_size, {layout.page}: each group holds pages"
            raise ConfigError("num_gpu_blocks_override", num_blocks, limit, "give the pool more memory")
        return cls(dtype, weights, block, num_blocks, length, clamped, shard, layout, device)

    def describe(self) -> list[str]:
        """The lines that people see at start: weights, pages, tokens, requests that fit."""
        size = self.shard.block_size
        kind = "" if self.shard.kv_cache_dtype == "auto" else f" of {self.shard.kv_cache_dtype}"
        tokens, pool = self.num_blocks * size, _about(self.num_blocks * self.block_bytes)
        full = self.num_blocks / -(-self.max_model_len // size)
        lines = [
            f"weights {_about(self.weight_bytes)} as {self.dtype}{self._over_ranks()}{self._on_device()}",
            f"pool {pool}{kind}: {self.num_blocks} pages of {size} tokens = {tokens} tokens; {full:.1f} requests of "
            f"max_model_len {self.max_model_len} fit at once (max_num_seqs {self.shard.max_num_seqs})",
        ]
        if self.clamped:
            lines.append(f"max_model_len is {self.max_model_len} because the pool holds no more; give it more memory")
        return lines

    def _on_device(self) -> str:
        return "" if self.device == "cpu" else " on a GPU"

    def _over_ranks(self) -> str:
        ranks = self.layout
        if ranks.num_ranks == 1:
            return ""
        return f" over {ranks.num_ranks} ranks (tensor {ranks.tensor}, pipeline {ranks.pipeline}, page {ranks.page})"


def step_limit(model: ModelConfig, shard: ShardConfig, threads: int) -> float:
    """Seconds that no step of a shard takes unless it hangs: its largest one, on cores of a twentieth of today's speed.

    Args:
        threads: that work on a step, over all ranks of a stage.
    """
    products = 2 * sum(_product(shape) for shape in model.tensor_shapes().values())
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * shard.max_model_len
    return max(_LEAST_LIMIT, shard.max_num_batched_tokens * (products + attention) / (_SLOW_FLOPS * threads))


def _gpu_memory() -> int | None:
    """Free bytes of the first GPU that this process may use; None where it sees none."""
    return next((gpu.free_bytes for gpu in visible_gpus()), None)


def _step_bytes(config: EngineConfig, model: ModelConfig, element: int) -> int:
    """What a GPU has to hold beside weights and pages: rows of a few activations, logits, and what others reserve."""
    heads = model.num_heads * model.head_dim
    row = element * (4 * model.hidden_size + 3 * model.intermediate_size) + heads * (4 + 4 * element)
    return config.max_num_batched_tokens * row + 4 * config.max_num_seqs * model.vocab_size * 4 + _GPU_RESERVE


def _num_blocks(config: EngineConfig, block: int, taken: int, pages: int, free: int | None, device: str) -> int:
    """
    Args:
        taken: bytes that are no pool's: weights, and on a GPU what a step takes.
    """
    share, beside, cure = (
        _POOL_SHARE,
        f"{_about(taken)} of weights",
        "use a smaller model or a machine with more memory",
    )
    if device != "cpu":
        share, beside = _GPU_POOL_SHARE, f"{_about(taken)} of weights and what a step takes"
        cure = "lower max_num_batched_tokens or max_num_seqs, or use a smaller model"
    if config.num_gpu_blocks_override is None and config.kv_cache_memory_bytes is None:
        room = int(share * max(0, (free if free is not None else 8 << 30) - taken))
        # more than this could only be used by cached prefixes
        count = min(room // block, 4 * config.max_num_seqs * pages, MAX_BLOCKS)
        if count < 1:
            limit = f"leave room for one page of {show_size(block)} beside {beside}"
            raise ConfigError("kv_cache_memory_bytes", None, limit, cure)
        return count
    if config.num_gpu_blocks_override is not None:
        field, value, count = (
            "num_gpu_blocks_override",
            str(config.num_gpu_blocks_override),
            config.num_gpu_blocks_override,
        )
    else:
        size = config.kv_cache_memory_bytes or 0
        field, value, count = "kv_cache_memory_bytes", show_size(size), size // block
    if not 1 <= count <= MAX_BLOCKS:
        raise ConfigError(field, value, f"hold from 1 to {MAX_BLOCKS} pages of {show_size(block)}")
    if free is not None and count * block > free:
        limit = (
            f"fit in the {_about(free)} that are free; {count} pages of {show_size(block)} take {_about(count * block)}"
        )
        raise ConfigError(field, value, limit, "lower it")
    if free is not None and device != "cpu" and taken + count * block > free:
        limit = f"fit in the {_about(free)} that are free on the GPU, beside {beside}"
        raise ConfigError(field, value, limit, f"lower it, or {cure}")
    return count


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for dimension in shape:
        result *= dimension
    return result


def _about(count: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"

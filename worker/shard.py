"""One shard, put together: model, pages, tables, sampler, scheduler, loop."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import torch

from kernels import cpu, ops
from kernels.cpu import Native
from pagetable.allocator import BlockAllocator
from pagetable.errors import ConfigError
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from worker.config import ShardConfig
from worker.kv_cache import PagedKVCache
from worker.loop import Loop
from worker.model import Decoder
from worker.model_config import ModelConfig
from worker.native_model import NativeModel
from worker.runner import Runner
from worker.sampler import Sampler, choose_by_torch
from worker.scheduler import ShardScheduler
from worker.tables import TableMirror
from worker.weights import Progress, Weights, open_weights


def build_loop(
    folder: Path,
    model: ModelConfig,
    config: ShardConfig,
    dtype: str,
    device_id: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> Loop:
    """Load a model and everything around it.

    Args:
        dtype: float32 or bfloat16, of weights, and of pages where the configuration names no other.
        device_id: what the entries of this shard's block tables name.
        threads: that work on a step.
        progress: called with (bytes done, bytes in all) while weights load.
    """
    kind: torch.dtype = getattr(torch, dtype)
    decoder = build_model(model, open_weights(folder), kind, threads, progress, deterministic=config.deterministic)
    cache = PagedKVCache(model, config.num_blocks, config.block_size, page_dtype(config, dtype))
    tables = TableMirror(config.max_num_seqs, -(-config.max_model_len // config.block_size), config.block_size)
    choose = decoder.choose if isinstance(decoder, NativeModel) else choose_by_torch
    runner = Runner(decoder, cache, tables, Sampler(model.vocab_size, config.max_num_seqs, choose))
    pool = PagePool([BlockAllocator(DeviceId(device_id), config.num_blocks)])
    return Loop(ShardScheduler(config, pool, page_identity(model, config, dtype)), runner)


def build_model(
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    threads: int,
    progress: Progress | None = None,
    *,
    deterministic: bool = False,
) -> Decoder | NativeModel:
    """The native decoder where the process's kernels are native, else torch's on the reference kernels.

    Errors: ConfigError where `deterministic` is asked of torch, which cannot promise it.
    """
    backend = ops.default_backend()
    if isinstance(backend, Native):
        torch.set_num_threads(1)  # two teams of threads would fight for the cores
        return NativeModel(config, weights, dtype, backend, threads, progress, deterministic=deterministic)
    if deterministic:
        raise ConfigError("deterministic", True, "stand with the native kernels", f"{cpu.CURE}, or leave it out")
    torch.set_num_threads(threads)
    return Decoder(config, weights, dtype, progress)


def page_dtype(config: ShardConfig, dtype: str) -> torch.dtype:
    """Of keys and values, where weights have `dtype`."""
    kind: torch.dtype = getattr(torch, dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype)
    return kind


def page_identity(model: ModelConfig, config: ShardConfig, dtype: str) -> bytes:
    """What besides tokens decides K and V. Two shards of one model and these dtypes have the same."""
    return sha256(repr((model, dtype, page_dtype(config, dtype))).encode()).digest()

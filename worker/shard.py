"""One shard, put together: model, pages, tables, sampler, scheduler, loop."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch

from pagetable.allocator import BlockAllocator
from pagetable.ids import DeviceId
from pagetable.page import PagePool
from worker.config import ShardConfig
from worker.kv_cache import PagedKVCache
from worker.loop import Loop
from worker.model import Decoder
from worker.model_config import ModelConfig
from worker.runner import Runner
from worker.sampler import Sampler
from worker.scheduler import ShardScheduler
from worker.tables import TableMirror
from worker.weights import open_weights


def build_loop(
    folder: Path,
    model: ModelConfig,
    config: ShardConfig,
    dtype: str,
    device_id: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Loop:
    """Load a model and everything around it.

    Args:
        dtype: float32 or bfloat16, of weights and pages.
        device_id: what the entries of this shard's block tables name.
        progress: called with (bytes done, bytes in all) while weights load.
    """
    kind: torch.dtype = getattr(torch, dtype)
    decoder = Decoder(model, open_weights(folder), kind, progress)
    cache = PagedKVCache(model, config.num_blocks, config.block_size, kind)
    tables = TableMirror(config.max_num_seqs, -(-config.max_model_len // config.block_size), config.block_size)
    runner = Runner(decoder, cache, tables, Sampler(model.vocab_size, config.max_num_seqs))
    pool = PagePool([BlockAllocator(DeviceId(device_id), config.num_blocks)])
    return Loop(ShardScheduler(config, pool, page_identity(model, dtype)), runner)


def page_identity(model: ModelConfig, dtype: str) -> bytes:
    """What besides tokens decides K and V. Two shards of one model and dtype have the same."""
    return sha256(repr((model, dtype)).encode()).digest()

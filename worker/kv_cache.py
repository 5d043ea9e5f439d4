"""PagedKVCache: the memory of one KV device (or a rank's part of it), a pool of blocks. It knows bytes, never who owns
a block.

On GPUs the pool is page-major: a page of all layers is one run of bytes, so a copy to a peer is one operation.
On CPUs the pool is layer-major (a step reads one layer of all its pages before the next), in private anonymous memory
with huge pages asked for: attention reads scattered pages, and 4 KiB pages of memory cost it 6 % of its rate in
bfloat16 and 20 % in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kernels import int8, ops
from kernels.decoder import huge_memory, populate
from pagetable.errors import ConfigError
from worker.layout import Layout, Part
from worker.model_config import ModelConfig

CPU = torch.device("cpu")


class PagedKVCache:
    """Keys and values of a rank's layers and heads in blocks of `block_size` tokens.

    Attributes:
        pool: [layers, blocks, 2 (K, V), kv_heads, block_size, head_dim] of `dtype`; of int8 as in `kernels.int8`.
            Layers and heads are counted from the rank's first. On a GPU blocks come first in memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        part: Part | None = None,
        device: torch.device = CPU,
        backend: ops.Backend | None = None,
        *,
        preallocate: bool = False,
    ) -> None:
        """Reserve the pool; a CPU's memory is taken from the machine as blocks are first written, a GPU's at once.

        Args:
            part: the rank's; None is the whole model.
            device: of the pool.
            backend: what writes and copies; None is the process's default.
            preallocate: take a CPU's memory at once, too. Else a step that first writes to pages takes it, of every
                layer in the same step: 2 ms for each 2 MiB where a virtual machine's host has to find them first.

        Errors: ConfigError where so much memory cannot even be reserved.
        """
        self.num_blocks, self.block_size, self._backend = num_blocks, block_size, backend
        part = part or Layout().part(config, 0)
        row_bytes = self.row_bytes(config, dtype)
        shape = (len(part.layers), num_blocks, 2, len(part.kv_heads), block_size, row_bytes // dtype.itemsize)
        num_bytes = num_blocks * part.block_bytes(block_size, row_bytes)
        try:
            if device.type == "cpu":
                memory = huge_memory(num_bytes)
                if preallocate:
                    populate(memory)
                self.pool = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
            else:
                page_major = (num_blocks, len(part.layers), *shape[2:])
                self.pool = torch.empty(page_major, dtype=dtype, device=device).transpose(0, 1)
        except (OSError, OverflowError, ValueError, torch.OutOfMemoryError):
            limit = f"fit in memory (this pool has {num_bytes} bytes on {device})"
            raise ConfigError("num_gpu_blocks_override", num_blocks, limit, "lower it") from None

    @classmethod
    def bytes_per_block(cls, config: ModelConfig, block_size: int, dtype: torch.dtype, part: Part | None = None) -> int:
        """Bytes of one block over all layers, K and V; of one rank's where `part` says which."""
        return (part or Layout().part(config, 0)).block_bytes(block_size, cls.row_bytes(config, dtype))

    @staticmethod
    def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of one token's K (or V) of one head, its scale included where the pool is int8."""
        return config.head_dim * dtype.itemsize + (int8.SCALE_BYTES if dtype == torch.int8 else 0)

    @property
    def pools(self) -> Sequence[torch.Tensor]:
        """What `kernels.ops.attend` takes: own pool first; mapped pools of other devices come behind it."""
        return (self.pool,)

    def write_kv(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, slots: torch.Tensor) -> None:
        """Write new keys and values.

        Args:
            slots: int64 [T], block * block_size + offset.
        """
        ops.write_kv(k_TKD, v_TKD, self.pool, layer, slots, backend=self._backend)

    def gather_kv(self, layer: int, blocks: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the first `length` tokens of a table's `blocks`: K and V, each [length, kv_heads, head_dim];
        float32 where the pool is int8."""
        pages = self.pool[layer, torch.tensor(blocks, dtype=torch.int64)]
        if pages.dtype == torch.int8:
            pages = int8.dequantize(pages)
        k, v = pages.transpose(2, 3).unbind(1)
        return k.flatten(0, 1)[:length].contiguous(), v.flatten(0, 1)[:length].contiguous()

    def copy_page(self, source: int, target: int) -> None:
        """Copy one whole block, all layers."""
        self.copy_pages(torch.tensor([source], dtype=torch.int32), torch.tensor([target], dtype=torch.int32))

    def copy_pages(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole blocks in order, all layers.

        Args:
            source, target: int32 [M] block ids.
        """
        ops.copy_pages(self.pool, source, target, backend=self._backend)

"""What a page's size, layout, dtype and memory do to decode attention: each variant in turn with one baseline.

    python -m benchmarks.pages [--quick]

Decode attention of 8 sequences of 2,048 tokens over a pool of 16 layers, on one thread. The baseline is what ships:
bfloat16, 16 tokens a block, layer-major, huge pages, scattered blocks. Speed is the baseline's time over the variant's,
so it counts tokens attended, not bytes; `of read` is the variant's bytes against plain reading of as many.
"""

from __future__ import annotations

import argparse
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.attention import alternate
from kernels import cpu, int8, ops
from kernels.decoder import huge_memory
from kernels.ops import Mask, PageList

LAYERS, ROWS, CONTEXT, Q_HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2048, 32, 8, 128
SHARES = 4  # of the pool, attended in turn, or a cache would answer for memory


@dataclass(frozen=True)
class Variant:
    """One way to keep pages."""

    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    page_major: bool = False
    huge: bool = True
    order: str = "scattered"

    def __str__(self) -> str:
        layout = "page-major" if self.page_major else "layer-major"
        memory = "huge" if self.huge else "4 KiB"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype:<9} blocks of {self.block_size:<4} {layout:<12} {memory:<6} {self.order:<10}"


class Side:
    """A pool of one variant, and one call of attention over the next part of it."""

    def __init__(self, variant: Variant, backend: ops.Backend) -> None:
        self.backend = backend
        per_row = CONTEXT // variant.block_size
        blocks = SHARES * ROWS * per_row
        row = HEAD_DIM + (int8.SCALE_BYTES if variant.dtype == torch.int8 else 0)
        inner = (2, KV_HEADS, variant.block_size, row)
        shape = (blocks, LAYERS, *inner) if variant.page_major else (LAYERS, blocks, *inner)
        num_bytes = torch.Size(shape).numel() * variant.dtype.itemsize
        if variant.huge:
            memory = huge_memory(num_bytes)
        else:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        pool = torch.frombuffer(memory, dtype=variant.dtype).view(shape)
        self.pool = pool.transpose(0, 1) if variant.page_major else pool
        one = torch.randn(variant.block_size, KV_HEADS, HEAD_DIM).to(torch.bfloat16)
        first = torch.zeros(1, 1, *inner, dtype=variant.dtype)
        ops.write_kv(one, one, first, 0, torch.arange(len(one)))
        for layer in self.pool:
            layer[:] = first[0]
        ids = torch.randperm(blocks) if variant.order == "scattered" else torch.arange(blocks)
        self.q = torch.randn(ROWS, Q_HEADS, HEAD_DIM).to(torch.bfloat16)
        self.starts = torch.arange(ROWS + 1, dtype=torch.int32)
        self.mask = Mask(torch.full((ROWS,), CONTEXT - 1, dtype=torch.int32))
        entries = torch.arange(ROWS * per_row, dtype=torch.int32)
        self.tables = [
            PageList(self.starts * per_row, part.to(torch.int32).contiguous(), entries % per_row * variant.block_size)
            for part in ids.split(ROWS * per_row)
        ]
        self.num_bytes = ROWS * per_row * torch.Size(inner).numel() * variant.dtype.itemsize
        self.turn = 0

    def run(self) -> object:
        self.turn += 1
        layer = self.turn // SHARES % LAYERS
        pages = self.tables[self.turn % SHARES]
        return ops.attend(self.q, self.starts, [self.pool], layer, pages, self.mask, backend=self.backend)


def reader(num_bytes: int) -> Callable[[], None]:
    """Plain reading of as many bytes, each time others."""
    parts = torch.zeros(SHARES * LAYERS, num_bytes // 2**18 * 2**18, dtype=torch.uint8)
    turn = iter(range(10**9))
    return lambda: cpu.read(parts[next(turn) % len(parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend = ops.pick("auto")
    base = Variant()
    variants = [replace(base, block_size=size) for size in (8, 32, 64, 128)]
    variants += [replace(base, order="runs"), replace(base, page_major=True)]
    variants += [replace(base, page_major=True, order="runs"), replace(base, huge=False)]
    variants += [replace(base, dtype=torch.int8), replace(base, dtype=torch.int8, order="runs")]
    variants += [replace(base, dtype=torch.int8, block_size=64)]
    baseline = Side(base, backend)
    print(f"{backend.name}, 1 thread; speed 1 is: {base}")
    for variant in [base, *variants]:
        side = Side(variant, backend)
        ours, theirs, read = alternate(12 if options.quick else 48, side.run, baseline.run, reader(side.num_bytes))
        print(f"{variant}  speed {theirs / ours:5.2f}   {read / ours:5.2f} of read", flush=True)


if __name__ == "__main__":
    main()

"""Paged attention on one thread, as ratios to ceilings and peers measured in the same run.

    python benchmarks/attention.py [--quick] [--level LEVEL]

Decode: bytes of K and V per second against the rate of plain reading. Prefill: multiply-adds per second against a
large torch matmul of the same dtype, and the time of torch's scaled_dot_product_attention over the same keys, gathered
beforehand (the gather is not charged to torch). Samples of all sides alternate; times are the process's CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels import cpu, ops
from kernels.ops import Mask, PageList

Q_HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def alternate(repeats: int, *calls: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each call, sampled in turn so that a noisy moment hits all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for sample in range(repeats + 1):
        for index, call in enumerate(calls):
            start = time.process_time()
            call()
            if sample:  # the first warms up
                samples[index].append(time.process_time() - start)
    return [statistics.median(each) for each in samples]


def table(rows: int, blocks_per_row: int, block: torch.Tensor) -> PageList:
    """A CSR of full rows over the block ids given."""
    entries = torch.arange(rows * blocks_per_row, dtype=torch.int32)
    return PageList(
        start=torch.arange(rows + 1, dtype=torch.int32) * blocks_per_row,
        block=block[: rows * blocks_per_row].to(torch.int32).contiguous(),
        position=entries % blocks_per_row * BLOCK_SIZE,
    )


def make_pool(dtype: torch.dtype, num_bytes: int) -> torch.Tensor:
    page = (2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    blocks = num_bytes // (2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize)
    pool = torch.empty(1, blocks, *page, dtype=dtype)
    some = torch.randn(min(64, blocks), *page).to(dtype)
    for begin in range(0, blocks, 64):
        pool[0, begin : begin + 64] = some[: blocks - begin]
    return pool


def decode(name: str, pool: torch.Tensor, rows: int, context: int, order: str, backend: ops.Backend, reps: int) -> str:
    blocks = rows * context // BLOCK_SIZE
    ids = torch.randperm(pool.shape[1]) if order == "scattered" else torch.arange(pool.shape[1])
    q = torch.randn(rows, Q_HEADS, HEAD_DIM).to(pool.dtype)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    mask = Mask(torch.full((rows,), context - 1, dtype=torch.int32))
    tables = [
        table(rows, context // BLOCK_SIZE, ids[at : at + blocks]) for at in range(0, pool.shape[1] - blocks + 1, blocks)
    ]
    turn = iter(range(10**9))
    num_bytes = blocks * pool.stride(1) * pool.element_size()
    # Both sides take another part of the pool each time, or a cache of 32 MiB would answer for memory.
    cold = torch.split(pool.view(-1), num_bytes // pool.element_size())[: len(tables)]
    other = iter(range(len(cold) // 2, 10**9))

    def run() -> object:
        return ops.attend(q, starts, [pool], 0, tables[next(turn) % len(tables)], mask, backend=backend)

    ours, probe = alternate(reps, run, lambda: cpu.read(cold[next(other) % len(cold)]))
    rate, ceiling = num_bytes / ours / 1e9, num_bytes / probe / 1e9
    return (
        f"decode  {name}  B={rows:<3} context {context:<6} {order:<10} {rate:6.1f} GB/s   {rate / ceiling:5.2f} of read"
    )


def prefill(name: str, dtype: torch.dtype, new: int, context: int, backend: ops.Backend, reps: int) -> str:
    total = context + new
    blocks = -(-total // BLOCK_SIZE)
    pool = make_pool(dtype, blocks * 2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM * dtype.itemsize)
    ids = torch.randperm(blocks)
    q = torch.randn(new, Q_HEADS, HEAD_DIM).to(dtype)
    starts, mask = torch.tensor([0, new], dtype=torch.int32), Mask(torch.tensor([context], dtype=torch.int32))
    pages = table(1, blocks, ids)
    kv = pool[0, ids].permute(1, 2, 0, 3, 4).reshape(2, 1, KV_HEADS, -1, HEAD_DIM)[:, :, :, :total].contiguous()
    seen = torch.ones(new, total, dtype=torch.bool).tril(context)
    q_peer = q.transpose(0, 1)[None].contiguous()
    left, right = torch.randn(1024, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)

    def peer() -> object:
        if context:
            return scaled_dot_product_attention(q_peer, kv[0], kv[1], attn_mask=seen, enable_gqa=True)
        return scaled_dot_product_attention(q_peer, kv[0], kv[1], is_causal=True, enable_gqa=True)

    ours, theirs, matmul = alternate(
        reps,
        lambda: ops.attend(q, starts, [pool], 0, pages, mask, backend=backend),
        peer,
        lambda: left @ right,
    )
    flops = 4 * Q_HEADS * HEAD_DIM * (new * context + new * (new + 1) / 2)
    rate, ceiling = flops / ours / 1e9, 2 * 1024 * 4096 * 4096 / matmul / 1e9
    what = f"{new} new over {context}"
    return (
        f"prefill {name}  {what:<22} {rate:6.0f} GFLOP/s {rate / ceiling:5.2f} of matmul  {theirs / ours:5.1f} x SDPA"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller pools, fewer samples")
    parser.add_argument("--only", default="", choices=["", "decode", "prefill"])
    parser.add_argument("--level", default="auto", choices=ops.CHOICES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend = ops.pick(options.level)
    print(f"{backend.name}, 1 thread, {Q_HEADS} query heads, {KV_HEADS} kv heads, head_dim {HEAD_DIM}, blocks of 16")
    reps = 5 if options.quick else 15
    for name, dtype in DTYPES.items():
        pool = make_pool(dtype, 2**28 if options.quick else 2**30)
        for rows, context in ((1, 1024), (1, 8192), (8, 1024), (32, 1024)) * (options.only != "prefill"):
            for order in ("scattered", "runs"):
                print(decode(name, pool, rows, context, order, backend, 3 * reps), flush=True)
        for new, context in ((512, 0), (512, 2048), (512, 8192), (64, 8192)) * (options.only != "decode"):
            print(prefill(name, dtype, new, context, backend, reps), flush=True)


if __name__ == "__main__":
    main()

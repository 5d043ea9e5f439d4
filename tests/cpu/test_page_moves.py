"""Pages that go between the pools of a slice's ranks: every byte arrives, whatever fits into an exchange."""

from __future__ import annotations

import random
import threading
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.peers import PeersBroken, SharedPeers
from tests.models import make_model
from tests.rank_lab import make_spec
from worker.kv_cache import PagedKVCache
from worker.layout import Layout
from worker.model_config import ModelConfig
from worker.page_moves import move_pages, unit_bytes
from worker.tables import Moves

BLOCKS, SIZE = 9, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    return ModelConfig.from_folder(make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3, **heads))


def caches(model: ModelConfig, groups: int, dtype: torch.dtype) -> list[PagedKVCache]:
    """Of one slice, every byte drawn."""
    parts = Layout(groups, 1, groups).parts(model)
    found = [PagedKVCache(model, BLOCKS, SIZE, dtype, part) for part in parts]
    for cache in found:
        cache.pool.view(torch.uint8).random_(0, 256)
    return found


def drawn(groups: int, count: int) -> Moves:
    """Sources and targets are different blocks, as in a plan."""
    blocks = [random.sample(range(BLOCKS), BLOCKS) for _ in range(groups)]
    rows = []
    while len(rows) < count:
        source, target = random.sample(range(groups), 2)
        if blocks[source] and blocks[target]:
            rows.append((source, target, blocks[source].pop(), blocks[target].pop()))
    return Moves(*np.array(rows, np.int32).T)


def run(pools: list[PagedKVCache], moves: Moves, capacity: int) -> None:
    size = len(pools)
    memory = mmap(-1, SharedPeers.num_bytes(size, capacity))
    threads = [
        threading.Thread(target=move_pages, args=(SharedPeers(memory, 0, rank, size, capacity), pools[rank], moves))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("units", [1, 2, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("groups", [2, 4])
def test_every_page_is_where_the_plan_says(model: ModelConfig, groups: int, dtype: torch.dtype, units: int) -> None:
    pools = caches(model, groups, dtype)
    before = [cache.pool.view(torch.uint8).clone() for cache in pools]
    moves = drawn(groups, random.randrange(1, 8))
    expected = [each.clone() for each in before]
    for source, target, old, new in zip(moves.source, moves.target, moves.from_block, moves.to_block, strict=True):
        expected[target][:, new] = before[source][:, old]
    run(pools, moves, units * unit_bytes(pools[0]) + random.randrange(8))
    for cache, each in zip(pools, expected, strict=True):
        assert torch.equal(cache.pool.view(torch.uint8), each)


def test_a_broken_group_ends_it(model: ModelConfig) -> None:
    pools = caches(model, 2, torch.float32)
    capacity = unit_bytes(pools[0])
    peers = SharedPeers(mmap(-1, SharedPeers.num_bytes(2, capacity)), 0, 0, 2, capacity)
    peers.abort()
    with pytest.raises(PeersBroken):
        move_pages(peers, pools[0], drawn(2, 1))


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_a_region_holds_a_layer_of_a_block_at_least(tmp_path: Path, block_size: int) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    spec = make_spec(
        make_model(tmp_path, **heads),
        Layout(2, 1, 2),
        block_size=block_size,
        max_num_seqs=1,
        max_model_len=256,
        max_num_batched_tokens=block_size + 1,
    )
    cache = PagedKVCache(spec.model, 1, block_size, torch.float32, spec.layout.part(spec.model, 0))
    assert spec.sizes().slice >= unit_bytes(cache)

"""The memory of a pool: taken as its pages are written, or at once."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from kernels import decoder
from kernels.decoder import huge_memory, populate
from pagetable.errors import ConfigError
from tests.models import make_model
from worker.kv_cache import PagedKVCache
from worker.model_config import ModelConfig

BLOCKS = 256


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return ModelConfig.from_folder(folder)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("preallocate", [False, True])
def test_memory_is_taken_at_once_or_as_pages_are_written(config: ModelConfig, preallocate: bool) -> None:
    size = 4096 * 16 // config.head_dim  # tokens of a block: 64 KiB or more of each head and layer
    before = resident()
    cache = PagedKVCache(config, BLOCKS, size, torch.float32, preallocate=preallocate)
    taken, whole = resident() - before, cache.pool.nbytes
    assert whole > 64 << 20
    assert taken > 0.95 * whole if preallocate else taken < 0.05 * whole
    assert not cache.pool.any()


@pytest.mark.parametrize("length", [1, mmap.PAGESIZE + 1, decoder._POPULATED + 5])
def test_a_system_that_cannot_give_memory_ahead_has_it_written(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Old(mmap.mmap):
        def madvise(self, option: int, start: int = 0, size: int = 0) -> None:
            asked.append((option, start, size))
            raise OSError(errno.EINVAL, "Invalid argument")

    memory = Old(-1, length)
    populate(memory)
    assert sum(size for _, _, size in asked) == length
    assert not any(memory[:: mmap.PAGESIZE])


def test_memory_that_is_not_there_is_refused_by_its_field(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(memory: mmap.mmap) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("worker.kv_cache.populate", full)
    with pytest.raises(ConfigError, match=rf"num_gpu_blocks_override: got {BLOCKS}, must fit in memory"):
        PagedKVCache(config, BLOCKS, 16, torch.float32, preallocate=True)
    assert huge_memory(100)[:] == bytes(100)

"""What `quire serve --address` plans before it knows which host each shard will be on."""

from __future__ import annotations

import pytest

import launch.serve
from cluster.hosted import address_towards
from launch.config import EngineConfig
from launch.serve import make_plan
from launch.serve_flags import ServeConfig
from pagetable.errors import ConfigError

HERE, THERE = ServeConfig(port=0), ServeConfig(port=0, address="10.0.0.1:6379")
PAGE = 40 << 10  # of `story` in bfloat16: K and V of 16 tokens, 4 layers, 5 heads of 32


@pytest.fixture(autouse=True)
def _free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.serve, "available_memory", lambda: 20 << 20)
    monkeypatch.setattr(launch.serve, "available_cores", lambda: 4)


def _num_blocks(config: ServeConfig, **fields: int) -> list[int]:
    plan, _ = make_plan(config, EngineConfig("story", data_parallel_size=2, **fields))  # type: ignore[arg-type]
    return [worker["shard"]["num_blocks"] for worker in plan.workers]


def test_a_pool_of_a_given_size_need_fit_only_once_where_hosts_are_several() -> None:
    with pytest.raises(ConfigError, match=r"data_parallel_size: got 2, must leave each shard .* of the 20M"):
        _num_blocks(HERE, kv_cache_memory_bytes=256 * PAGE)
    assert _num_blocks(THERE, kv_cache_memory_bytes=256 * PAGE) == [256, 256]


def test_a_pool_that_no_host_like_this_one_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_gpu_blocks_override: got '1024', must fit in the 20\.0 MiB"):
        _num_blocks(THERE, num_gpu_blocks_override=1024)


def test_a_pool_without_a_given_size_is_cut_as_if_all_were_on_one_host() -> None:
    assert _num_blocks(THERE) == _num_blocks(HERE) == [94, 94]


def test_an_address_on_this_machine_is_the_one_that_faces_the_other_side() -> None:
    assert address_towards("127.0.0.1:1") == "127.0.0.1"

"""`--device`: what it becomes, and what a GPU can't do; whether there is a GPU is an argument."""

from __future__ import annotations

from typing import Any

import pytest

from launch import devices
from launch.config import EngineConfig
from launch.devices import choose_device
from launch.gpus import Gpu
from launch.memory import MemoryPlan
from launch.serve import make_plan
from launch.serve_flags import ServeConfig
from pagetable.errors import ConfigError
from worker.model_config import ModelConfig

GIB = 1 << 30
NONE = ("have an NVIDIA GPU", "run on the CPU")


def lacking() -> tuple[str, str]:
    return NONE


def lacking_nothing() -> None:
    return None


def gpus(count: int, free: int = 4 * GIB) -> list[Gpu]:
    return [Gpu(index, "a GPU", 8 * GIB, free + index * GIB) for index in range(count)]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the GPUs that this machine is to have."""

    def show(found: list[Gpu]) -> None:
        for module in ("launch.devices", "launch.memory", "launch.serve"):
            monkeypatch.setattr(f"{module}.visible_gpus", lambda: found)
        monkeypatch.setattr(devices, "why_no_gpu", lambda: None if found else NONE)

    return show


def test_auto_is_a_gpu_where_there_is_one_to_use() -> None:
    assert choose_device(EngineConfig("m"), lacking_nothing) == "cuda"
    assert choose_device(EngineConfig("m"), lacking) == "cpu"
    assert choose_device(EngineConfig("m", device="cpu"), lacking_nothing) == "cpu"


def test_cuda_says_what_is_lacking() -> None:
    assert choose_device(EngineConfig("m", device="cuda"), lacking_nothing) == "cuda"
    with pytest.raises(ConfigError, match="device: got 'cuda', must have an NVIDIA GPU; run on the CPU"):
        choose_device(EngineConfig("m", device="cuda"), lacking)


UNABLE: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "deterministic": True,
    "kv_cache_dtype": "int8",
}


@pytest.mark.parametrize("name", UNABLE)
def test_what_a_gpu_can_not_do_is_refused_and_auto_stays_on_the_cpu(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_device(EngineConfig("m", device="cuda", **{name: UNABLE[name]}), lacking_nothing)
    assert refused.value.field == name
    with pytest.warns(RuntimeWarning, match=f"GPU is not used: {name}"):
        assert choose_device(EngineConfig("m", **{name: UNABLE[name]}), lacking_nothing) == "cpu"


def test_a_gpu_that_can_not_be_used_is_told(see: Any) -> None:
    see(gpus(1))
    with pytest.warns(RuntimeWarning, match="GPU is not used: to use it, have an NVIDIA GPU"):
        assert choose_device(EngineConfig("m"), lacking) == "cpu"


def test_a_torch_for_cpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(devices, "visible_gpus", lambda: gpus(1))
    monkeypatch.setattr(torch.version, "cuda", None)
    found = devices.why_no_gpu()
    assert found is not None and found[0].startswith("have a torch that is built for CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = devices.why_no_gpu()
    assert found is not None and found[0].startswith("have a driver that torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    found = devices.why_no_gpu()
    assert found is not None and found[0] == "have Triton installed"
    monkeypatch.setattr(devices, "visible_gpus", list)
    found = devices.why_no_gpu()
    assert found is not None and found[0].startswith("have an NVIDIA GPU")


def test_kernels_of_a_cpu_are_a_choice_of_the_cpu(see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_KERNELS", "reference")
    monkeypatch.setattr(devices, "visible_gpus", lambda: gpus(1))
    with pytest.raises(ConfigError, match="device: got 'cuda', must stand without QUIRE_KERNELS=reference"):
        choose_device(EngineConfig("m", device="cuda"))
    with pytest.warns(RuntimeWarning, match="GPU is not used"):
        assert choose_device(EngineConfig("m")) == "cpu"


def test_a_gpu_that_can_not_be_read_is_no_fault_of_auto() -> None:
    def fail() -> None:
        raise ConfigError("CUDA_VISIBLE_DEVICES", "0", "name a GPU that can be read", "")

    with pytest.warns(RuntimeWarning, match="GPU is not used: CUDA_VISIBLE_DEVICES"):
        assert choose_device(EngineConfig("m"), fail) == "cpu"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        choose_device(EngineConfig("m", device="cuda"), fail)


def test_a_pool_that_leaves_a_step_no_room_is_refused() -> None:
    config = EngineConfig("m", kv_cache_memory_bytes=7 * GIB // 2)
    model = ModelConfig.from_folder(_folder("story"))
    with pytest.raises(ConfigError, match=r"got '3584MiB', must fit in the 4.0 GiB that are free on the GPU"):
        MemoryPlan.make(config, model, 4 * GIB, "cuda")
    assert MemoryPlan.make(config, model, 4 * GIB).num_blocks


def test_a_pool_takes_most_of_what_a_gpu_has_free(see: Any) -> None:
    see(gpus(1, 6 * GIB))
    config, model = EngineConfig("m", max_num_seqs=512), ModelConfig.from_folder(_folder("story"))
    plan = MemoryPlan.make(config, model, device="cuda")
    here = MemoryPlan.make(config, model, 6 * GIB)
    assert plan.device == "cuda" and "on a GPU" in plan.describe()[0]
    assert 0.8 * 4 * GIB < plan.num_blocks * plan.block_bytes < 0.9 * 5 * GIB
    assert here.num_blocks * here.block_bytes < 0.5 * 6 * GIB


def test_each_shard_of_this_machine_has_a_gpu_of_its_own(see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(gpus(2))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launch.serve.available_cores", lambda: 8)
    engine = EngineConfig("story", device="cuda", data_parallel_size=2)
    plan, _ = make_plan(ServeConfig(port=0, ray=False), engine)
    assert [worker["device"] for worker in plan.workers] == ["cuda", "cuda"] and plan.uses_gpus
    assert [plan.keeper_settings(index)["env"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5e,3,1")
    plan, _ = make_plan(ServeConfig(port=0, ray=False), engine)
    assert [plan.keeper_settings(index)["env"]["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["GPU-5e", "3"]
    plan, _ = make_plan(ServeConfig(port=0), engine)
    assert "CUDA_VISIBLE_DEVICES" not in plan.keeper_settings(0)["env"]  # Ray shows each its own
    with pytest.raises(ConfigError, match="data_parallel_size: got 3, must be at most 2: each shard has a GPU"):
        make_plan(ServeConfig(port=0), EngineConfig("story", device="cuda", data_parallel_size=3))


def test_gpus_of_other_machines_need_a_size(see: Any) -> None:
    see([])
    joined = ServeConfig(port=0, address="10.0.0.1:6379")
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes: got None, must be given with --address"):
        make_plan(joined, EngineConfig("story", device="cuda"))
    plan, _ = make_plan(joined, EngineConfig("story", device="cuda", kv_cache_memory_bytes=GIB))
    assert plan.uses_gpus and plan.workers[0]["device"] == "cuda"


def _folder(name: str) -> Any:
    from launch.models.catalog import resolve

    return resolve(name)

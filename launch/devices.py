"""What models run on here: `--device auto|cpu|cuda`."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable

from launch.config import EngineConfig
from launch.gpus import visible_gpus
from pagetable.errors import ConfigError

_ON_CPU = "run on the CPU (--device cpu)"


def why_no_gpu() -> tuple[str, str] | None:
    """What this process lacks to run models on a GPU, as (limit, cure); None where it lacks nothing.

    Raises:
        ConfigError: a GPU can't be read.
    """
    if (kernels := os.environ.get("QUIRE_KERNELS", "auto")) not in ("auto", "triton", "flashinfer"):
        return f"stand without QUIRE_KERNELS={kernels}, whose kernels are a CPU's", f"unset that, or {_ON_CPU}"
    if not visible_gpus():
        return "have an NVIDIA GPU that this process may use, with its driver", _ON_CPU
    import torch

    if torch.version.cuda is None:
        limit = f"have a torch that is built for CUDA, which {torch.__version__} is not"
        return limit, f"install another build of torch, or {_ON_CPU}"
    if not torch.cuda.is_available():
        return f"have a driver that torch {torch.__version__} can use", f"update the driver, or {_ON_CPU}"
    if importlib.util.find_spec("triton") is None:
        return "have Triton installed", f"pip install 'quire[gpu]', or {_ON_CPU}"
    return None


def choose_device(config: EngineConfig, why: Callable[[], tuple[str, str] | None] | None = None) -> str:
    """ "cpu" or "cuda": `auto` is a GPU where there is one that can be used. Warns where there is one that can't.

    Args:
        why: tells what is lacking (tests say); None is `why_no_gpu`.

    Raises:
        ConfigError: "cuda" can't be, or not with the rest of the configuration.
    """
    if config.device == "cpu":
        return "cpu"
    try:
        missing = (why or why_no_gpu)()
        if missing is None:
            check_gpu(config)
            return "cuda"
        limit, cure = missing
        if config.device == "cuda":
            raise ConfigError("device", "cuda", limit, cure)
        if visible_gpus():
            warnings.warn(f"This machine's GPU is not used: to use it, {limit}.", RuntimeWarning, stacklevel=2)
        return "cpu"
    except ConfigError as error:
        if config.device == "cuda":
            raise
        warnings.warn(f"This machine's GPU is not used: {error}", RuntimeWarning, stacklevel=2)
        return "cpu"


def check_gpu(config: EngineConfig) -> None:
    """ConfigError where the configuration asks for what models on a GPU can't do."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(config, name) > 1:
            limit = "be 1 with device cuda: the ranks of a shard run on CPUs only"
            raise ConfigError(name, getattr(config, name), limit, f"use data_parallel_size, or {_ON_CPU}")
    if config.deterministic:
        raise ConfigError("deterministic", True, "be left out with device cuda", _ON_CPU)
    if config.kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype", "int8", "be auto with device cuda", _ON_CPU)

"""The contract of the kernels (DESIGN.md section 5), and the choice of what carries it out.

A pool is a tensor of logical shape [layers, blocks, 2 (K, V), kv_heads, block_size, head_dim], float32 or bfloat16,
whose inner four dimensions are contiguous. The strides of layers and blocks are free, so that layer-major and
page-major pools are the same to a kernel. A pool of int8 has scales in its pages (`int8.py`).

Backends: `reference.py` (torch, the oracle), `cpu.py` (C++), `triton_attention.py` (NVIDIA GPUs) and
`flashinfer_attention.py` (the same with FlashInfer's attention). Arguments are checked here, ids where they are read.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from kernels import checks
from pagetable.errors import ConfigError

CHOICES = ("auto", "reference", "plain", "avx2", "avx512", "triton", "flashinfer")
GPU_CHOICES = ("triton", "flashinfer")


@dataclass(frozen=True, slots=True)
class PageList:
    """The pages that each row attends, as CSR. All int32, on the CPU or on the pools' device.

    Attributes:
        start: [R+1]; row r attends entries start[r] .. start[r+1].
        pool: [N] index into the pools handed to `attend`, or None where all pages lie in pool 0.
        block: [N] block id inside that pool.
        position: [N] position of the page's first token.
    """

    start: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor
    pool: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees: key j is seen by query i when j <= i and (window == 0 or i - j < window or j < sinks).

    Attributes:
        first_position: int32 [R], position of each row's first query token; the others follow it.
    """

    first_position: torch.Tensor
    window: int = 0
    sinks: int = 0


class Backend(Protocol):
    """What a backend does, with arguments that this module has checked. Block ids and slots it checks itself."""

    @property
    def name(self) -> str: ...

    @property
    def takes(self) -> checks.Takes:
        """Dtypes, and the device of tensors."""
        ...

    def attend(
        self,
        q_THD: torch.Tensor,
        query_start: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        pages: PageList,
        mask: Mask,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def merge(self, outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def write_kv(
        self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, pool: torch.Tensor, layer: int, slots: torch.Tensor
    ) -> None: ...

    def copy_pages(self, pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None: ...


@runtime_checkable
class PlannedBackend(Backend, Protocol):
    """A backend whose attention is planned on the host, once for all layers of a step whose pages are the same."""

    def plan(self, q_heads: int, pool: torch.Tensor, query_start: torch.Tensor, pages: PageList, mask: Mask) -> Any:
        """Deal a step's rows; `pool` is the first of those that `run` will get.

        Raises:
            ValueError: rows that this backend does not do.
        """
        ...

    def run(
        self, plan: Any, q_THD: torch.Tensor, pools: Sequence[torch.Tensor], layer: int, mask: Mask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend` as planned: no id is looked at, and the host waits for nothing."""
        ...


def attend(
    q: torch.Tensor,
    query_start: torch.Tensor,
    pools: Sequence[torch.Tensor],
    layer: int,
    pages: PageList,
    mask: Mask,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend paged keys and values: prefill chunks and decodes as rows of one ragged call.

    The key at offset o of an entry has position `position + o`; a row's entries may come in any order, with gaps and
    from several pools. Memory that no query of a row sees is never read into a result, whatever it holds.

    Args:
        q: [T, q_heads, head_dim], dtype of the pools, float32 or bfloat16 where they are int8; head h reads kv head
            h // (q_heads // kv_heads).
        query_start: int32 [R+1]; row r's tokens are query_start[r] .. query_start[r+1]; from 0 to T.
        pools: pools of one dtype, kv_heads, block_size and head_dim.
        layer: which layer of the pools.
        scale: of the scores, above 0; head_dim ** -0.5 where None.
        backend: one from `pick`; the process's default where None.

    Returns:
        out float32 [T, q_heads, head_dim] and lse float32 [T, q_heads], natural log of the summed exponentials.
        A query that sees no key has (0, -inf). The oracle gives float64 for float64.

    Raises:
        ValueError: a dtype, shape, stride or id that may not be.
    """
    backend = backend or default_backend()
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    checks.check_attend(q, query_start, pools, layer, pages, mask, factor, backend.takes)
    return backend.attend(q, query_start, pools, layer, pages, mask, factor)


def merge(
    outs: torch.Tensor, lses: torch.Tensor, *, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys by log-sum-exp.

    Args:
        outs: float32 [P, T, H, D]; the value of a part with lse -inf is ignored.
        lses: float32 [P, T, H].

    Returns:
        out [T, H, D] and lse [T, H]; only empty parts give (0, -inf).
    """
    backend = backend or default_backend()
    checks.check_merge(outs, lses, backend.takes)
    return backend.merge(outs, lses)


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Write new keys and values into their slots of one layer; `pool` is changed in place.

    Args:
        k, v: [T, kv_heads, head_dim], dtype of the pool, float32 or bfloat16 where that is int8.
        slots: int64 [T], block * block_size + offset; a negative slot is skipped. Equal slots in one call are a
            mistake of the caller; which of them stays is not defined.

    Raises:
        ValueError: a slot beyond the pool, or a dtype or shape that may not be; nothing was written.
    """
    backend = backend or default_backend()
    checks.check_write(k, v, pool, layer, slots, backend.takes)
    backend.write_kv(k, v, pool, layer, slots)


def copy_pages(
    pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor, *, backend: Backend | None = None
) -> None:
    """Copy whole pages in all layers, in order: a -> b, b -> c in one call leaves a's bytes in c.

    Args:
        source, target: int32 [M] block ids.

    Raises:
        ValueError: an id beyond the pool, or a dtype or shape that may not be; nothing was copied.
    """
    backend = backend or default_backend()
    checks.check_copy(pool, source, target, backend.takes)
    backend.copy_pages(pool, source, target)


def pick(choice: str) -> Backend:
    """The backend named by `choice`: one of CHOICES; "auto" is the fastest that this machine runs.

    Raises:
        ConfigError: an unknown name, or one that this machine or this installation does not have.
    """
    from kernels import cpu
    from kernels.reference import Reference

    if choice not in CHOICES:
        raise ConfigError("QUIRE_KERNELS", choice, f"be one of {', '.join(CHOICES)}")
    if choice == "reference":
        return Reference()
    if choice in GPU_CHOICES:
        return _of_gpus(choice)
    missing = cpu.why_missing()
    if choice == "auto":
        if missing is None:
            return cpu.Native(cpu.levels()[-1])
        warnings.warn(f"{missing} Attention runs on the slow reference; {cpu.CURE}.", RuntimeWarning, stacklevel=2)
        return Reference()
    if missing is not None:
        raise ConfigError("QUIRE_KERNELS", choice, "have the native kernels built", f"{missing} {cpu.CURE}")
    if choice not in cpu.levels():
        raise ConfigError("QUIRE_KERNELS", choice, f"be a level of this CPU ({', '.join(cpu.levels())}) or auto")
    return cpu.Native(choice)


def _of_gpus(choice: str) -> PlannedBackend:
    try:
        from kernels.triton_attention import Triton

        if choice == "flashinfer":
            from kernels.flashinfer_attention import FlashInfer

            backend: PlannedBackend = FlashInfer()
        else:
            backend = Triton()
    except ImportError as error:
        needed, cure = "Triton", "pip install 'quire[gpu]'"
        if choice == "flashinfer":
            needed, cure = "Triton and FlashInfer", "install flashinfer-python, or choose triton"
        raise ConfigError("QUIRE_KERNELS", choice, f"have {needed} installed ({error})", cure) from None
    if backend.takes.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("QUIRE_KERNELS", choice, "have a CUDA device", "choose auto")
    return backend


@functools.cache
def default_backend() -> Backend:
    """The backend of this process: the environment variable QUIRE_KERNELS, read once, else "auto"."""
    return pick(os.environ.get("QUIRE_KERNELS", "auto"))


def backend_for(device: torch.device) -> Backend:
    """The backend for a model on `device`: the process's, and on a GPU "triton" where QUIRE_KERNELS does not choose.

    Raises:
        ConfigError: no such device is here; QUIRE_KERNELS names one for other devices, or one that is not there.
    """
    if device.type == "cpu":
        backend = default_backend()
    elif device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", str(device), "be a GPU that torch can use here", "run on the CPU (--device cpu)")
    else:
        choice = os.environ.get("QUIRE_KERNELS", "auto")
        backend = pick("triton" if choice == "auto" else choice)
    if backend.takes.device != device.type:
        wanted = ", ".join(GPU_CHOICES) if device.type != "cpu" else "reference, plain, avx2 or avx512"
        raise ConfigError("QUIRE_KERNELS", backend.name, f"be one for {device.type} devices ({wanted})", "unset it")
    return backend


def has_native() -> bool:
    """Whether the native library is built, and not switched off by QUIRE_KERNELS: whatever the device of a model, its
    tables may use it."""
    from kernels import cpu

    return os.environ.get("QUIRE_KERNELS") != "reference" and cpu.why_missing() is None


def available() -> tuple[str, ...]:
    """The choices other than "auto" that `pick` grants here."""
    from kernels import cpu

    return ("reference",) if cpu.why_missing() is not None else ("reference", *cpu.levels())


def backend_name() -> str:
    """The name of the process's backend: "cpu-avx512bf16", "cpu-avx2", "cpu-plain" or "reference"."""
    return default_backend().name

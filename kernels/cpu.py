"""The native CPU backend: C++ in `csrc/`, built by setup.py into `_native.so`, called through ctypes.

torch is imported before the library, so that both share torch's OpenMP runtime and its pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernels import checks, int8

if TYPE_CHECKING:
    from kernels.ops import Mask, PageList

LIBRARY = Path(__file__).with_name("_native.so")
CURE = "install a C++ compiler (g++ or clang++ with OpenMP) and install Quire again"
LEVELS = ("plain", "avx2", "avx512")
NAMES = {"plain": "cpu-plain", "avx2": "cpu-avx2", "avx512": "cpu-avx512bf16"}
MESSAGE_BYTES = 200


class _Pool(ctypes.Structure):
    """`quire::Pool` in csrc/call.h."""

    _fields_ = [("base", ctypes.c_void_p), ("block_stride", ctypes.c_int64), ("num_blocks", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """`quire::Call` in csrc/call.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query_start", "first_position", "pools", "page_start", "page_pool")),
        *((name, ctypes.c_void_p) for name in ("page_block", "page_position", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_rows", "num_pools", "num_entries")),
        *((name, ctypes.c_int64) for name in ("q_heads", "kv_heads", "head_dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("window", "sinks", "is_bf16", "level", "threads")),
        *((name, ctypes.c_int64) for name in ("is_deterministic", "is_int8")),
        ("scale", ctypes.c_double),
    ]


class _Pages(ctypes.Structure):
    """`quire::Pages` in csrc/exports.h."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("layer_stride", "block_stride", "num_layers", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "block_size", "head_dim", "is_bf16", "is_int8")),
        *((name, ctypes.c_int64) for name in ("level", "threads")),
    ]


_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_MESSAGE = (ctypes.c_char_p, _INT)
_PAGES = ctypes.POINTER(_Pages)
# Result and arguments of each function in csrc/exports.h.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "quire_levels": (_INT,),
    "quire_attend": (_INT, ctypes.POINTER(_Call), *_MESSAGE),
    "quire_merge": (None, _ADDRESS, _ADDRESS, _INT, _INT, _INT, _ADDRESS, _ADDRESS, _INT),
    "quire_write_kv": (_INT, _PAGES, _ADDRESS, _INT, _ADDRESS, _INT, _INT, _ADDRESS, _INT, *_MESSAGE),
    "quire_copy_pages": (_INT, _PAGES, _ADDRESS, _ADDRESS, _INT, *_MESSAGE),
    "quire_read": (ctypes.c_uint64, _ADDRESS, _INT),
}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    if not LIBRARY.exists():
        return "The native kernels (kernels/_native.so) are not built."
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"The native kernels (kernels/_native.so) do not load: {error}."
    return library


def why_missing() -> str | None:
    """Why the native kernels cannot be used, as a sentence, or None where they can."""
    library = _library()
    return library if isinstance(library, str) else None


def levels() -> tuple[str, ...]:
    """The instruction levels that are built and that this machine runs, slowest first."""
    library = _library()
    if isinstance(library, str):
        return ()
    bits = library.quire_levels()
    return tuple(level for index, level in enumerate(LEVELS) if bits >> index & 1)


def library(signatures: Mapping[str, tuple[Any, ...]], *, keeps_lock: bool = False) -> ctypes.CDLL:
    """The library with further functions declared: result and arguments by name.

    Args:
        keeps_lock: for calls of microseconds, which keep the interpreter's lock: to give it up for them can cost a wait
            of milliseconds until another thread hands it back.

    Raises: ValueError where there is none.
    """
    found = _library()
    if isinstance(found, str):
        raise ValueError(found)
    if keeps_lock:
        found = ctypes.PyDLL(str(LIBRARY))
    for name, (result, *arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def read(data: torch.Tensor) -> None:
    """Read a contiguous tensor (whole 256 KiB) on one thread and do nothing with it: the ceiling of a benchmark."""
    library = _library()
    if isinstance(library, str):
        raise ValueError(library)
    library.quire_read(data.data_ptr(), data.numel() * data.element_size())


class Native:
    """The C++ backend of `kernels.ops` at one instruction level. Threads: torch.get_num_threads()."""

    takes = checks.Takes()

    def __init__(self, level: str) -> None:
        library = _library()
        if isinstance(library, str):
            raise ValueError(library)
        if level not in levels():
            raise ValueError(f"level: got {level!r}, must be one of {levels()}")
        self.name = NAMES[level]
        self.level = LEVELS.index(level)
        self._library = library

    def attend(
        self,
        q_THD: torch.Tensor,
        query_start: torch.Tensor,
        pools: Sequence[torch.Tensor],
        layer: int,
        pages: PageList,
        mask: Mask,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.attend`."""
        out = torch.empty(q_THD.shape, dtype=torch.float32)
        lse = torch.empty(q_THD.shape[:2], dtype=torch.float32)
        table = (_Pool * len(pools))(*(_pool(each, layer) for each in pools))
        kv_heads, block_size = pools[0].shape[3:5]
        call = _Call(
            q_THD.data_ptr(),
            q_THD.stride(0),
            query_start.data_ptr(),
            mask.first_position.data_ptr(),
            ctypes.addressof(table),
            pages.start.data_ptr(),
            None if pages.pool is None else pages.pool.data_ptr(),
            pages.block.data_ptr(),
            pages.position.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            q_THD.shape[0],
            query_start.shape[0] - 1,
            len(pools),
            pages.block.shape[0],
            q_THD.shape[1],
            kv_heads,
            q_THD.shape[2],
            block_size,
            mask.window,
            mask.sinks,
            int(q_THD.dtype == torch.bfloat16),
            self.level,
            torch.get_num_threads(),
            0,
            int(pools[0].dtype == torch.int8),
            scale,
        )
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        raise_for(self._library.quire_attend(call, message, MESSAGE_BYTES), message)
        return out, lse

    def merge(self, outs_PTHD: torch.Tensor, lses_PTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `kernels.ops.merge`."""
        parts, tokens, heads, dim = outs_PTHD.shape
        out = torch.empty((tokens, heads, dim), dtype=torch.float32)
        lse = torch.empty((tokens, heads), dtype=torch.float32)
        inputs = (outs_PTHD.data_ptr(), lses_PTH.data_ptr(), parts, tokens * heads, dim)
        self._library.quire_merge(*inputs, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
        return out, lse

    def write_kv(
        self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, pool: torch.Tensor, layer: int, slots: torch.Tensor
    ) -> None:
        """See `kernels.ops.write_kv`."""
        size = k_TKD.element_size()
        pages = self._pages(pool, k_TKD.dtype)
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        k, v = (k_TKD.data_ptr(), k_TKD.stride(0) * size), (v_TKD.data_ptr(), v_TKD.stride(0) * size)
        what = (layer, slots.data_ptr(), slots.shape[0])
        raise_for(self._library.quire_write_kv(pages, *k, *v, *what, message, MESSAGE_BYTES), message)

    def copy_pages(self, pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """See `kernels.ops.copy_pages`."""
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        ids = (source.data_ptr(), target.data_ptr(), source.shape[0])
        raise_for(self._library.quire_copy_pages(self._pages(pool, pool.dtype), *ids, message, MESSAGE_BYTES), message)

    def _pages(self, pool: torch.Tensor, rows: torch.dtype) -> _Pages:
        size = pool.element_size()
        strides = (pool.stride(0) * size, pool.stride(1) * size)
        shape = (pool.shape[0], pool.shape[1], pool.shape[3], pool.shape[4], int8.head_dim(pool))
        kinds = (int(rows == torch.bfloat16), int(pool.dtype == torch.int8))
        return _Pages(pool.data_ptr(), *strides, *shape, *kinds, self.level, torch.get_num_threads())


def _pool(pool: torch.Tensor, layer: int) -> _Pool:
    size = pool.element_size()
    return _Pool(pool.data_ptr() + layer * pool.stride(0) * size, pool.stride(1) * size, pool.shape[1])


def raise_for(code: int, message: ctypes.Array[ctypes.c_char]) -> None:
    """The error that a native call's result stands for."""
    if code == 1:
        raise ValueError(message.value.decode())
    if code:
        raise MemoryError("no memory for the kernels' scratch")

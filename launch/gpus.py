"""Which NVIDIA GPUs this process may use, and how much memory each has free: asked of NVML, the driver's own library.

Asking CUDA how much is free would make a context, which takes hundreds of megabytes and can't survive a fork.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pagetable.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"

# nvmlReturn_t
_SUCCESS, _INVALID_ARGUMENT, _NOT_FOUND = 0, 2, 6
# NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE
_TEXT_BYTES = 96
# CUDA reads numbers as strtoul does: blanks before and anything behind are ignored.
_NUMBER = re.compile(r"\s*\+?0*(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance, that CUDA shows to this process.

    Attributes:
        index: as CUDA counts in this process, from 0 over the visible ones.
        name: the product, as nvidia-smi shows it.
        total_bytes: its memory.
        free_bytes: what no process held when it was asked.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int


def visible_gpus(library: str = "libnvidia-ml.so.1", environment: Mapping[str, str] | None = None) -> list[Gpu]:
    """The GPUs that CUDA shows to this process, in its order; none where no driver is installed or loaded.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it: indices, or unique beginnings of UUIDs ("GPU-..."), or one MIG
    instance ("MIG-..."); the first invalid entry ends the list, and a GPU that comes twice empties it (NVIDIA's manual
    is silent on that; torch counts so). Unset shows all. Indices here are those of the PCI bus, but CUDA counts the
    fastest GPU first, so a machine with GPUs of different kinds should set CUDA_DEVICE_ORDER=PCI_BUS_ID. A GPU in MIG
    mode is taken for a whole one unless the variable names an instance.

    Args:
        library: NVML (tests hand in another).
        environment: None takes that of this process.

    Raises:
        ConfigError: a visible GPU can't be read.
    """
    try:
        functions = ctypes.CDLL(library)
    except OSError:
        return []
    nvml = _Nvml(functions, (os.environ if environment is None else environment).get(VARIABLE))
    if functions.nvmlInit_v2() != _SUCCESS:
        return []
    try:
        return [nvml.read(index, *device) for index, device in enumerate(nvml.visible())]
    finally:
        functions.nvmlShutdown()


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


_Handle = ctypes.c_void_p
_TEXT = (_Handle, ctypes.c_char_p, ctypes.c_uint)
_ARGUMENTS = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlDeviceGetCount_v2": (ctypes.POINTER(ctypes.c_uint),),
    "nvmlDeviceGetHandleByIndex_v2": (ctypes.c_uint, ctypes.POINTER(_Handle)),
    "nvmlDeviceGetHandleByUUID": (ctypes.c_char_p, ctypes.POINTER(_Handle)),
    "nvmlDeviceGetName": _TEXT,
    "nvmlDeviceGetUUID": _TEXT,
    "nvmlDeviceGetMemoryInfo": (_Handle, ctypes.POINTER(_Memory)),
}


class _Nvml:
    """NVML between its init and its shutdown. A device is its handle and what an error calls it."""

    def __init__(self, functions: ctypes.CDLL, value: str | None) -> None:
        for name, arguments in _ARGUMENTS.items():
            getattr(functions, name).argtypes = arguments
        self._functions, self._value = functions, value

    def visible(self) -> list[tuple[_Handle, str]]:
        """The devices that CUDA_VISIBLE_DEVICES names, in its order."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", "the machine", ctypes.byref(count))
        if self._value is None:
            return [self._device(number) for number in range(count.value)]
        entries = self._value.split(",")
        if entries[0].startswith("MIG-"):
            return self._instance(entries[0])  # a CUDA process sees one instance, however many are named
        # The first entry decides of what kind all are.
        if entries[0].startswith("GPU-"):
            uuids = [self._text("nvmlDeviceGetUUID", *self._device(number)) for number in range(count.value)]
            numbers = [_unique(entry, uuids) for entry in entries]
        else:
            numbers = [_number(entry, count.value) for entry in entries]
        chosen: list[int] = []
        for number in numbers:
            if number is None:
                break
            if number in chosen:
                return []
            chosen.append(number)
        return [self._device(number) for number in chosen]

    def read(self, index: int, handle: _Handle, called: str) -> Gpu:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", called, handle, ctypes.byref(memory))
        return Gpu(index, self._text("nvmlDeviceGetName", handle, called), memory.total, memory.free)

    def _device(self, number: int) -> tuple[_Handle, str]:
        handle, called = _Handle(), f"GPU {number}"
        self._call("nvmlDeviceGetHandleByIndex_v2", called, number, ctypes.byref(handle))
        return handle, called

    def _instance(self, uuid: str) -> list[tuple[_Handle, str]]:
        handle = _Handle()
        unknown = (_INVALID_ARGUMENT, _NOT_FOUND)
        code = self._call("nvmlDeviceGetHandleByUUID", uuid, os.fsencode(uuid), ctypes.byref(handle), allowed=unknown)
        return [(handle, uuid)] if code == _SUCCESS else []

    def _text(self, function: str, handle: _Handle, called: str) -> str:
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(function, called, handle, text, _TEXT_BYTES)
        return text.value.decode("utf-8", "replace")

    def _call(self, function: str, called: str, *arguments: object, allowed: tuple[int, ...] = ()) -> int:
        """Its return code. ConfigError where it is neither success nor `allowed`."""
        code: int = getattr(self._functions, function)(*arguments)
        if code != _SUCCESS and code not in allowed:
            limit = f"name GPUs that the driver can read ({function} of {called}: error {code})"
            raise ConfigError(VARIABLE, self._value, limit, "name the others, or see what nvidia-smi says of this one")
        return code


def _number(entry: str, count: int) -> int | None:
    """The index below `count` that an entry begins with."""
    digits = _NUMBER.match(entry)
    # compared as texts: an int of 4300 digits can't be made
    return {str(number): number for number in range(count)}.get(digits[1]) if digits else None


def _unique(entry: str, uuids: list[str]) -> int | None:
    """Which one of the UUIDs begins with the entry; None where none or several do."""
    numbers = [number for number, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
    return numbers[0] if len(numbers) == 1 else None

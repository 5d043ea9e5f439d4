"""The visible GPUs and their memory, read through a shared library that answers as NVML would on a machine of three."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.gpus import Gpu, visible_gpus
from pagetable.errors import ConfigError

# FAKE_NVML_FAULT names the function that fails, for the second GPU only where it takes a device; FAKE_NVML_COUNT leaves
# fewer GPUs than three.
NVML = r"""
#include <cstdlib>
#include <cstring>

struct Device { const char *name, *uuid; unsigned long long total, used; };
struct Memory { unsigned long long total, free, used; };

static Device devices[] = {
    {"NVIDIA H200", "GPU-11aa0000-0000-0000-0000-000000000000", 150000000000ull, 1000000000ull},
    {"NVIDIA H200", "GPU-11bb0000-0000-0000-0000-000000000000", 150000000000ull, 0ull},
    {"NVIDIA L4", "GPU-22cc0000-0000-0000-0000-000000000000", 24000000000ull, 23999999999ull},
    {"NVIDIA H200 MIG 1g.18gb", "MIG-33dd0000-0000-0000-0000-000000000000", 18000000000ull, 8000000000ull},
};
static int num_open, num_inits;

static int code(const char *function, const Device *device = nullptr) {
    const char *fault = getenv("FAKE_NVML_FAULT");
    if (fault && !strcmp(fault, function) && (!device || device == devices + 1)) return 15;
    return num_open ? 0 : 1;
}

static int put(const char *from, char *to, unsigned int length) {
    if (strlen(from) >= length) return 7;
    strcpy(to, from);
    return 0;
}

extern "C" {
int fake_num_open() { return num_open; }
int fake_num_inits() { return num_inits; }

int nvmlInit_v2() {
    ++num_open;
    int got = code("nvmlInit_v2");
    if (got) --num_open; else ++num_inits;
    return got;
}
int nvmlShutdown() { return num_open ? --num_open, 0 : 1; }
int nvmlDeviceGetCount_v2(unsigned int *count) {
    const char *fewer = getenv("FAKE_NVML_COUNT");
    *count = fewer ? atoi(fewer) : 3;
    return code("nvmlDeviceGetCount_v2");
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if (index >= 3) return 2;
    *device = devices + index;
    return code("nvmlDeviceGetHandleByIndex_v2", *device);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (Device &each : devices)
        if (!strcmp(each.uuid, uuid)) {
            *device = &each;
            return code("nvmlDeviceGetHandleByUUID");
        }
    return 6;
}
int nvmlDeviceGetName(Device *device, char *name, unsigned int length) {
    int got = code("nvmlDeviceGetName", device);
    return got ? got : put(device->name, name, length);
}
int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int length) {
    int got = code("nvmlDeviceGetUUID", device);
    return got ? got : put(device->uuid, uuid, length);
}
int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    *memory = Memory{device->total, device->total - device->used, device->used};
    return code("nvmlDeviceGetMemoryInfo", device);
}
}
"""
MACHINE = (
    ("NVIDIA H200", 150_000_000_000, 149_000_000_000),
    ("NVIDIA H200", 150_000_000_000, 150_000_000_000),
    ("NVIDIA L4", 24_000_000_000, 1),
)
INSTANCE = "MIG-33dd0000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("nvml")
    source, library = folder / "nvml.cpp", folder / "libnvidia-ml.so.1"
    source.write_text(NVML)
    command = [compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return str(library)


@pytest.fixture
def library(built: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fake NVML, which must be shut down after each test as often as it was opened."""
    for name in ("FAKE_NVML_FAULT", "FAKE_NVML_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield built
    assert ctypes.CDLL(built).fake_num_open() == 0


def seen(library: str, value: str) -> list[Gpu]:
    return visible_gpus(library, {"CUDA_VISIBLE_DEVICES": value})


def gpus(*numbers: int) -> list[Gpu]:
    """The GPUs of the machine with these numbers, counted as CUDA counts them."""
    return [Gpu(index, *MACHINE[number]) for index, number in enumerate(numbers)]


def test_no_library_is_no_gpu(tmp_path: Path) -> None:
    assert visible_gpus(str(tmp_path / "libnvidia-ml.so.1"), {}) == []


def test_a_driver_that_does_not_start_is_no_gpu(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_FAULT", "nvmlInit_v2")
    assert visible_gpus(library, {}) == []


def test_without_the_variable_all_are_visible(library: str) -> None:
    before = ctypes.CDLL(library).fake_num_inits()
    assert visible_gpus(library, {}) == gpus(0, 1, 2)
    assert ctypes.CDLL(library).fake_num_inits() == before + 1


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        ("2,0", (2, 0)),
        ("1", (1,)),
        (" 0, +2", (0, 2)),
        ("1gpu,002", (1, 2)),
        ("GPU-22", (2,)),
        ("GPU-22cc0000-0000-0000-0000-000000000000,GPU-11b,GPU-11a", (2, 1, 0)),
    ],
)
def test_the_variable_chooses_and_orders(library: str, value: str, numbers: tuple[int, ...]) -> None:
    assert seen(library, value) == gpus(*numbers)


@pytest.mark.parametrize("value", ["", "-1", "3", "NoDevFiles", "GPU-11", "GPU-99", "MIG-99", "٢", "GPU-\udc80"])
def test_a_list_whose_first_entry_is_invalid_shows_none(library: str, value: str) -> None:
    assert seen(library, value) == []


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        ("0,2,-1,1", (0, 2)),
        ("0,3,1", (0,)),
        ("2,,1", (2,)),
        ("1,x,0", (1,)),
        (f"1,{'9' * 5000},0", (1,)),
        ("GPU-22,GPU-11,GPU-11a", (2,)),
        ("GPU-22,0", (2,)),
        ("0,GPU-22", (0,)),
        ("2,-1,2", (2,)),
    ],
)
def test_the_first_invalid_entry_ends_the_list(library: str, value: str, numbers: tuple[int, ...]) -> None:
    assert seen(library, value) == gpus(*numbers)


@pytest.mark.parametrize("value", ["GPU-11a,", "GPU-11a,GPU", "0,", "0,1"])
def test_an_entry_that_names_nothing_is_not_the_only_gpu(
    library: str, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FAKE_NVML_COUNT", "1")
    assert seen(library, value) == gpus(0)


@pytest.mark.parametrize("value", ["0,0", "0,1,2,1", "2,02", "GPU-22,GPU-22c", "GPU-11a,GPU-22,GPU-11a"])
def test_a_gpu_that_comes_twice_empties_the_list(library: str, value: str) -> None:
    assert seen(library, value) == []


@pytest.mark.parametrize("value", [INSTANCE, f"{INSTANCE},MIG-99", f"{INSTANCE},0"])
def test_one_instance_of_a_split_gpu_is_visible(library: str, value: str) -> None:
    assert seen(library, value) == [Gpu(0, "NVIDIA H200 MIG 1g.18gb", 18_000_000_000, 10_000_000_000)]


def test_the_variable_is_the_process_own_unless_given(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert visible_gpus(library) == gpus(1, 2)
    assert visible_gpus(library, {}) == gpus(0, 1, 2)


@pytest.mark.parametrize(
    ("function", "value", "of"),
    [
        ("nvmlDeviceGetMemoryInfo", "0,1", "GPU 1"),
        ("nvmlDeviceGetMemoryInfo", "GPU-11b", "GPU 1"),
        ("nvmlDeviceGetName", "1", "GPU 1"),
        ("nvmlDeviceGetUUID", "GPU-22", "GPU 1"),
        ("nvmlDeviceGetHandleByIndex_v2", "1", "GPU 1"),
        ("nvmlDeviceGetCount_v2", "0", "the machine"),
        ("nvmlDeviceGetHandleByUUID", INSTANCE, INSTANCE),
    ],
)
def test_a_gpu_that_can_not_be_read_is_refused(
    library: str, monkeypatch: pytest.MonkeyPatch, function: str, value: str, of: str
) -> None:
    monkeypatch.setenv("FAKE_NVML_FAULT", function)
    with pytest.raises(ConfigError) as refused:
        seen(library, value)
    assert str(refused.value) == (
        f"CUDA_VISIBLE_DEVICES: got '{value}', must name GPUs that the driver can read ({function} of {of}: error 15); "
        "name the others, or see what nvidia-smi says of this one"
    )


def test_a_gpu_that_is_not_chosen_may_be_broken(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_FAULT", "nvmlDeviceGetMemoryInfo")
    assert seen(library, "2,0") == gpus(2, 0)
    with pytest.raises(ConfigError, match=r"^CUDA_VISIBLE_DEVICES: got None, .* of GPU 1: error 15"):
        visible_gpus(library, {})


def test_asking_imports_no_torch() -> None:
    code = "import sys, launch.gpus as g; g.visible_gpus(environment={g.VARIABLE: ''}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr

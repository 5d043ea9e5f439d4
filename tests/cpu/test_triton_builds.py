"""Our Triton kernels, compiled for chips that are not here: they fit, do not spill, and use tensor cores. And what can
be run here of the benchmark that times them on a GPU.

Builds run in processes of their own: this one has TRITON_INTERPRET, which Triton reads when it decorates a kernel.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu.kernels import Bench, Call, Row, Sizes, Timing, decode_goals, line, run, tokens_float64
from kernels.triton_build import CHIPS, MODULES, SHARED_LIMITS, Built, Outcome, as_json, faults, table

# A minute of CPU time for all builds, which a busy machine stretches.
long = pytest.mark.timeout(600)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# One sound kernel, and each of the faults that a build can have.
PLANTED = """
import triton
import triton.language as tl
from kernels.triton_build import Variant

@triton.jit
def product(a_ptr, b_ptr, c_ptr, turns, stride, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    acc = tl.zeros((M, M), tl.float32)
    for turn in range(turns):
        a = tl.load(a_ptr + m[:, None] * stride + turn * K + k[None, :])
        b = tl.load(b_ptr + (turn * K + k)[:, None] * stride + m[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * M + m[None, :], acc)

@triton.jit
def copy(a_ptr, c_ptr, M: tl.constexpr):
    m = tl.arange(0, M)
    tl.store(c_ptr + m, tl.load(a_ptr + m))

@triton.jit
def misspelt(a_ptr, M: tl.constexpr):
    tl.store(a_ptr, tl.nothing_of_that_name(M))

def of_product(name, M, K, num_warps, num_stages, step="i32:16", **more):
    types = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "turns": "i32", "stride": step}
    sizes = {"M": M, "K": K}
    return Variant(name, product, types | dict.fromkeys(sizes, "constexpr"), sizes, num_warps, num_stages, True, **more)

def variants():
    M = {"M": 256}
    signature = {"a_ptr": "*fp32", "c_ptr": "*fp32", "M": "constexpr"}
    return [
        of_product("sound", 64, 32, 4, 2),
        of_product("unaligned", 64, 32, 4, 2, step="i32"),
        of_product("spills", 128, 32, 1, 1),
        of_product("large", 128, 128, 4, 5),
        Variant("scalar", copy, signature, M, 4, 1, True),
        Variant("misspelt", misspelt, {"a_ptr": "*fp32", "M": "constexpr"}, M, 4, 1, False),
        Variant("incomplete", copy, {"a_ptr": "*fp32", "M": "constexpr"}, M, 4, 1, False),
        of_product("newer", 64, 32, 4, 2, least=100),
    ]
"""


def built(folder: Path, *arguments: str, path: Path | None = None) -> tuple[int, list[dict[str, Any]], str]:
    """(exit status, a dict for each build, stderr) of the command, with a cache of its own in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(path), environment["PYTHONPATH"]))
    command = [sys.executable, "-m", "kernels.triton_build", "--json", "--jobs", "2", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    status, found, errors = built(tmp_path_factory.mktemp("triton"))
    assert status in (0, 1), errors
    return found


@needs_triton
@long
@pytest.mark.parametrize("chip", CHIPS)
def test_our_kernels_fit_the_chip(ours: list[dict[str, Any]], chip: int) -> None:
    on_chip = [each for each in ours if each["chip"] == chip]
    assert {each["module"] for each in on_chip} == set(MODULES)
    assert {each["variant"]: each["faults"] for each in on_chip if each["faults"]} == {}
    for each in on_chip:
        assert (each["spilled"], each["local_instructions"]) == (0, 0)
        assert each["shared"] <= SHARED_LIMITS[chip]


@needs_triton
@long
def test_attention_copies_pages_beside_its_arithmetic(ours: list[dict[str, Any]]) -> None:
    # Rows of 16 bit and more come to shared memory without a stop in registers; prefill in float32 has no room for it.
    for each in ours:
        if each["variant"].startswith(("decode", "prefill bf16", "prefill fp16")):
            assert each["async_copies"] > 0, (each["variant"], each["chip"])


@needs_triton
def test_planted_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    status, found, errors = built(tmp_path, "--modules", "planted", "--chips", "80", path=tmp_path)
    assert status == 1, errors
    by_name = {each["variant"]: each for each in found}
    assert list(by_name) == ["sound", "unaligned", "spills", "large", "scalar", "misspelt", "incomplete"]
    sound = by_name["sound"]
    assert (sound["faults"], sound["spilled"], sound["above_99_kib"]) == ([], 0, False)
    assert min(sound["ptx_mma"], sound["sass_mma"], sound["async_copies"], sound["registers"]) > 0
    assert (by_name["unaligned"]["faults"], by_name["unaligned"]["async_copies"]) == ([], 0)
    (fault,) = by_name["spills"]["faults"]
    assert fault.startswith(f"spills: {by_name['spills']['spilled']} bytes a thread")
    large = by_name["large"]
    assert f"shared memory: {large['shared']} bytes, must be at most 166912" in large["faults"]
    assert (large["above_99_kib"], large["shared"] > 166912) == (True, True)
    assert by_name["scalar"]["faults"] == ["no tensor-core instructions"]
    assert "nothing_of_that_name" in by_name["misspelt"]["faults"][0]
    assert by_name["incomplete"]["faults"] == [
        "ValueError: incomplete: arguments c_ptr: must stand in kernel, signature and constants"
    ]


@needs_triton
def test_a_module_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    status, found, errors = built(tmp_path, "--modules", "no_such_kernels")
    assert (status, found, errors) == (2, [], "error: ModuleNotFoundError: No module named 'no_such_kernels'\n")


FITS = Built(128, 0, 0, 100_000, 8, 8, 16, 50_000)


@pytest.mark.parametrize(
    ("change", "chip", "found"),
    [
        ({}, 80, ()),
        ({"spilled": 8}, 90, ("spills: 8 bytes a thread, 0 instructions",)),
        ({"local_instructions": 2}, 90, ("spills: 0 bytes a thread, 2 instructions",)),
        ({"shared": 163 * 1024}, 80, ()),
        ({"shared": 163 * 1024 + 1}, 80, ("shared memory: 166913 bytes, must be at most 166912",)),
        ({"shared": 163 * 1024 + 1}, 90, ()),
        ({"sass_mma": 0}, 100, ("no tensor-core instructions",)),
        ({"ptx_mma": 0}, 100, ("no tensor-core instructions",)),
    ],
)
def test_faults_of_a_build(change: dict[str, int], chip: int, found: tuple[str, ...]) -> None:
    assert faults(dataclasses.replace(FITS, **change), chip, tensor_cores=True) == found


def test_what_need_not_use_tensor_cores_may_lack_them() -> None:
    assert faults(dataclasses.replace(FITS, ptx_mma=0, sass_mma=0), 90, tensor_cores=False) == ()


def test_the_table_tells_faults_and_what_smaller_chips_lack() -> None:
    found = [
        Outcome("m", "one", 80, FITS, ()),
        Outcome("m", "another", 90, dataclasses.replace(FITS, shared=102_000), ("no tensor-core instructions",)),
        Outcome("m", "third", 90, None, ("CompilationError: x",)),
    ]
    lines = table(found).splitlines()
    assert lines[1].split() == ["one", "sm_80", "128", "0", "100000", "8", "8", "16", "50000"]
    assert lines[2].endswith("above 99 KiB: not for sm_86, sm_89  FAULT no tensor-core instructions")
    assert lines[3].split() == ["third", "sm_90", "FAULT", "CompilationError:", "x"]
    assert lines[4] == "3 builds, 2 with faults"
    assert json.loads(as_json(found[2])) == {
        "module": "m",
        "variant": "third",
        "chip": 90,
        "faults": [found[2].faults[0]],
    }


TINY = Sizes(
    decodes=((2, 33),),
    prefills=((5, 16),),
    lengths=(1, 15, 33),
    news=(1, 5, 1),
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    tokens=4,
    columns=64,
    vocab=300,
    sampled=2,
    gemm=16,
    copied=4096,
)


@dataclasses.dataclass
class CountedTimer:
    """Calls once and says that it took 10 us on the device and 5 us on the host."""

    calls: int = 0

    def __call__(self, call: Call) -> Timing:
        call()
        self.calls += 1
        return Timing(10.0, 5.0)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
def test_the_gpu_benchmark_goes_through_at_tiny_size() -> None:
    torch.manual_seed(3)
    timer, texts, entries = CountedTimer(), [], []

    def say(text: str, entry: str) -> None:
        texts.append(text)
        entries.append(entry)

    bench = Bench(torch.device("cpu"), TINY, timer, peers=True, room=1 << 24)
    status = run(bench, say)
    assert [text for text in texts if text.startswith(("WRONG", "left out"))] == []
    assert status == 0
    found = [json.loads(entry) for entry in entries if entry]
    assert all(each["right"] for each in found if "check" in each)
    rows = {each["kernel"] for each in found if "kernel" in each}
    fused = {"rms_norm", "rms_norm residual", "silu_mul", "write_kv", "sample"}
    assert rows == {"decode", "prefill", "merge", "copy_pages"} | fused


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
def test_the_gpu_benchmark_finds_a_wrong_kernel_and_does_not_time_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import triton_fused

    def wrong(gate_up: torch.Tensor) -> torch.Tensor:
        return gate_up.chunk(2, 1)[0] * math.nan

    bench = Bench(torch.device("cpu"), TINY, CountedTimer(), peers=False, room=1 << 24)
    monkeypatch.setattr(triton_fused, "silu_mul", wrong)
    found = {check.kernel for check in bench.check_norms() if not check.is_right}
    assert found == {"norms silu_mul"}
    others = {"attend", "merge", "write_kv", "copy_pages", "sample"}
    assert list(bench.rows(found | others)) == []
    assert "silu: norms is wrong" in bench.left_out


def test_the_gpu_benchmark_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_kernels.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device")


@pytest.mark.parametrize(
    ("mib", "goals"),
    [
        (1, ["<= 15 us", "<= 1.10 x FlashInfer"]),
        (8, ["<= 15 us", "<= 1.10 x FlashInfer"]),
        (16, ["<= 1.10 x FlashInfer"]),
        (32, [">= 0.60", "<= 1.10 x FlashInfer"]),
        (64, [">= 0.60", "<= 1.10 x FlashInfer"]),
        (128, ["<= 1.10 x FlashInfer"]),
        (256, [">= 0.80", "<= 1.10 x FlashInfer"]),
    ],
)
def test_goals_of_decode_by_bytes(mib: int, goals: list[str]) -> None:
    assert [str(goal) for goal in decode_goals(mib << 20)] == goals


def test_a_row_of_the_gpu_benchmark_tells_which_goals_are_met() -> None:
    peers: dict[str, float | str] = {"flashinfer tc": 9.0, "flashinfer": 12.0, "sdpa": 1.0}
    row = Row("decode", "B=1", 10.0, 30.0, 800.0, "copy", 0.79, decode_goals(256 << 20), peers)
    assert [row.met(goal) for goal in row.goals] == [False, False]
    assert line(row).endswith(">= 0.80: MISSED; <= 1.10 x FlashInfer: MISSED")
    row = dataclasses.replace(row, us=9.9, ratio=0.8)
    assert [row.met(goal) for goal in row.goals] == [True, True]
    row = dataclasses.replace(row, peers={"flashinfer": "RuntimeError: no compiler", "sdpa": 1.0})
    assert row.met(row.goals[1]) is None
    assert dataclasses.replace(row, goals=decode_goals(8 << 20)).met(decode_goals(8 << 20)[0]) is True


def test_what_the_gpu_benchmark_counts() -> None:
    sizes = Sizes()
    assert sizes.kv_bytes(1, 2048) == 8 << 20
    assert sizes.kv_bytes(8, 8192) == 256 << 20
    assert round(sizes.flops(512, 8192) / 1e9, 1) == 70.9


def test_sampling_as_the_gpu_benchmark_means_it() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 5)
    ones = torch.ones(5, dtype=torch.float64)
    temperature = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    top_k = torch.tensor([0, 1, 2, 0, 0])
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.3, 1.0], dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3], dtype=torch.float64)
    found = tokens_float64(logits, temperature, top_k, top_p, min_p, 0.999 * ones)
    # the likeliest; of one; of the two likeliest the later; 0.3 of the mass is one token; min-p leaves ids 1, 2 and 3
    assert found.tolist() == [1, 1, 2, 1, 3]

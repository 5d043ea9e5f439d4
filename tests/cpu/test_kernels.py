"""write_kv, copy_pages and merge of every backend; the checks of all arguments; choice and build of backends."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import cpu, ops
from kernels.ops import Mask, PageList
from kernels.reference import Reference
from pagetable.errors import ConfigError

ROOT = Path(__file__).parents[2]
LEVELS = ops.available()
DTYPES = (torch.float32, torch.bfloat16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_pool(dtype: torch.dtype, page_major: bool, blocks: int = 9, size: int = 5) -> torch.Tensor:
    if page_major:
        return torch.randn(blocks, 3, 2, 2, size, 24).to(dtype).transpose(0, 1)
    return torch.randn(3, blocks, 2, 2, size, 24).to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_major", [False, True], ids=["layer-major", "page-major"])
class TestMoves:
    def test_write_kv_changes_the_named_slots_alone(
        self, rng: random.Random, level: str, dtype: torch.dtype, page_major: bool
    ) -> None:
        pool = make_pool(dtype, page_major)
        want = pool.clone()
        slots = rng.sample(range(45), 20) + [-1, -(2**40)]
        rng.shuffle(slots)
        qkv = torch.randn(22, 7, 24).to(dtype)  # k and v as slices of one projection
        k, v = qkv[:, 3:5], qkv[:, 5:7]
        for token, slot in enumerate(slots):
            if slot >= 0:
                want[1, slot // 5, 0, :, slot % 5] = k[token]
                want[1, slot // 5, 1, :, slot % 5] = v[token]
        ops.write_kv(k, v, pool, 1, torch.tensor(slots), backend=ops.pick(level))
        assert torch.equal(pool, want)

    def test_write_kv_out_of_range_writes_nothing(
        self, rng: random.Random, level: str, dtype: torch.dtype, page_major: bool
    ) -> None:
        pool = make_pool(dtype, page_major)
        want = pool.clone()
        k = torch.randn(3, 2, 24).to(dtype)
        with pytest.raises(ValueError, match="slots"):
            ops.write_kv(k, k, pool, 0, torch.tensor([0, 45, 1]), backend=ops.pick(level))
        assert torch.equal(pool, want)

    def test_copy_pages_goes_through_the_list_in_order(
        self, rng: random.Random, level: str, dtype: torch.dtype, page_major: bool
    ) -> None:
        pool = make_pool(dtype, page_major)
        want = pool.clone()
        source = [0, 1, 2, 5, 5] + [rng.randrange(9) for _ in range(6)]  # 0 -> 1 -> 2 -> 3 is a chain
        target = [1, 2, 3, 5, 6] + [rng.randrange(9) for _ in range(6)]
        for a, b in zip(source, target, strict=True):
            want[:, b] = want[:, a].clone()
        ops.copy_pages(pool, ints(*source), ints(*target), backend=ops.pick(level))
        assert torch.equal(pool, want)

    def test_copy_pages_out_of_range_copies_nothing(
        self, rng: random.Random, level: str, dtype: torch.dtype, page_major: bool
    ) -> None:
        pool = make_pool(dtype, page_major)
        want = pool.clone()
        for source, target, name in (((0, 9), (1, 2), "source"), ((0, 1), (1, -1), "target")):
            with pytest.raises(ValueError, match=name):
                ops.copy_pages(pool, ints(*source), ints(*target), backend=ops.pick(level))
        assert torch.equal(pool, want)


@pytest.mark.parametrize("level", LEVELS)
class TestMerge:
    @pytest.mark.parametrize("parts", [1, 2, 5])
    def test_merge_weighs_parts_by_their_sums(self, rng: random.Random, level: str, parts: int) -> None:
        outs, lses = torch.randn(parts, 7, 3, 20), torch.randn(parts, 7, 3) * 30
        weights = torch.softmax(lses.double(), dim=0)
        out, lse = ops.merge(outs, lses, backend=ops.pick(level))
        torch.testing.assert_close(out.double(), (weights[..., None] * outs).sum(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(lse.double(), lses.double().logsumexp(0), rtol=1e-6, atol=1e-6)

    def test_empty_parts_count_nothing_whatever_they_hold(self, rng: random.Random, level: str) -> None:
        outs, lses = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2)
        lses[1] = -torch.inf
        outs[1] = torch.nan
        lses[:, 2] = -torch.inf
        out, lse = ops.merge(outs, lses, backend=ops.pick(level))
        assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
        want, want_lse = ops.merge(outs[::2].clone(), lses[::2].clone(), backend=ops.pick(level))
        assert torch.equal(out, want) and torch.equal(lse, want_lse)

    def test_nan_is_not_lost(self, level: str) -> None:
        lses = torch.tensor([[[1.0]], [[torch.nan]], [[2.0]]])
        out, lse = ops.merge(torch.ones(3, 1, 1, 4), lses, backend=ops.pick(level))
        assert out.isnan().all() and lse.isnan().all()


def good() -> dict[str, object]:
    """Arguments of a call of attend that is right: 2 rows, 3 tokens, 2 pools."""
    pool = torch.zeros(2, 6, 2, 2, 4, 16)
    return {
        "q": torch.zeros(3, 4, 16),
        "query_start": ints(0, 1, 3),
        "pools": [pool, pool[:, :5]],
        "layer": 1,
        "pages": PageList(ints(0, 1, 3), ints(5, 0, 4), ints(0, 0, 4), ints(0, 0, 1)),
        "mask": Mask(ints(3, 5)),
        "scale": 0.25,
    }


def paged(
    start: torch.Tensor, block: torch.Tensor, position: torch.Tensor, pool: torch.Tensor | None
) -> Callable[[], dict[str, object]]:
    return lambda: {"pages": PageList(start, block, position, pool)}


START, BLOCK, POSITION, POOL = ints(0, 1, 3), ints(5, 0, 4), ints(0, 0, 4), ints(0, 0, 1)
POOL_6 = torch.zeros(2, 6, 2, 2, 4, 16)
WRONG: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "q of another dtype": (lambda: {"q": torch.zeros(3, 4, 16, dtype=torch.bfloat16)}, "q"),
    "q of another head_dim": (lambda: {"q": torch.zeros(3, 4, 8)}, "q"),
    "heads that do not divide": (lambda: {"q": torch.zeros(3, 5, 16)}, "q"),
    "no heads": (lambda: {"q": torch.zeros(3, 0, 16)}, "q"),
    "q with strided heads": (lambda: {"q": torch.zeros(3, 8, 16)[:, ::2]}, "q"),
    "float16": (lambda: {"q": torch.zeros(3, 4, 16).half(), "pools": [POOL_6.half()]}, "pools"),
    "no pools": (lambda: {"pools": []}, "pools"),
    "pools unlike in shape": (lambda: {"pools": [POOL_6, torch.zeros(2, 6, 2, 2, 8, 16)]}, r"pools\[1\]"),
    "pool with strided heads": (lambda: {"pools": [torch.zeros(2, 6, 2, 4, 4, 16)[:, :, :, ::2]]}, r"pools\[0\]"),
    "pool of five dimensions": (lambda: {"pools": [torch.zeros(6, 2, 2, 4, 16)]}, r"pools\[0\]"),
    "block size over 256": (lambda: {"pools": [torch.zeros(2, 1, 2, 2, 257, 16)]}, r"pools\[0\]"),
    "layer too high": (lambda: {"layer": 2}, "layer"),
    "layer below 0": (lambda: {"layer": -1}, "layer"),
    "query_start of int64": (lambda: {"query_start": torch.tensor([0, 1, 3])}, "query_start"),
    "query_start beyond q": (lambda: {"query_start": ints(0, 1, 4)}, "query_start"),
    "query_start falling": (lambda: {"query_start": ints(0, 4, 3)}, "query_start"),
    "query_start not from 0": (lambda: {"query_start": ints(1, 2, 3)}, "query_start"),
    "query_start empty": (lambda: {"query_start": ints()}, "query_start"),
    "start of another length": (paged(ints(0, 3), BLOCK, POSITION, POOL), "pages.start"),
    "start falling": (paged(ints(0, 4, 3), BLOCK, POSITION, POOL), "pages.start"),
    "start short of the entries": (paged(ints(0, 1, 2), BLOCK, POSITION, POOL), "pages.start"),
    "block too high": (paged(START, ints(6, 0, 4), POSITION, POOL), r"pages.block\[0\]"),
    "block too high in its pool": (paged(START, ints(5, 0, 5), POSITION, POOL), r"pages.block\[2\]"),
    "block below 0": (paged(START, ints(5, -1, 4), POSITION, POOL), r"pages.block\[1\]"),
    "pool too high": (paged(START, BLOCK, POSITION, ints(0, 2, 1)), "pages.pool"),
    "pool below 0": (paged(START, BLOCK, POSITION, ints(0, 0, -1)), "pages.pool"),
    "position below 0": (paged(START, BLOCK, ints(0, 0, -4), POOL), "pages.position"),
    "position beyond int32": (paged(START, BLOCK, ints(0, 0, 2**31 - 1), POOL), "pages.position"),
    "positions fewer than blocks": (paged(START, BLOCK, ints(0, 0), POOL), "pages.position"),
    "strided blocks": (paged(START, ints(5, 0, 0, 0, 4, 0)[::2], POSITION, POOL), "pages.block"),
    "first position below 0": (lambda: {"mask": Mask(ints(3, -1))}, "mask.first_position"),
    "first position beyond int32": (lambda: {"mask": Mask(ints(3, 2**31 - 2))}, "mask.first_position"),
    "first positions too few": (lambda: {"mask": Mask(ints(3))}, "mask.first_position"),
    "window below 0": (lambda: {"mask": Mask(ints(3, 5), window=-1)}, "mask.window"),
    "sinks below 0": (lambda: {"mask": Mask(ints(3, 5), sinks=-1)}, "mask.sinks"),
    "scale 0": (lambda: {"scale": 0.0}, "scale"),
    "scale NaN": (lambda: {"scale": float("nan")}, "scale"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", WRONG)
def test_attend_refuses(level: str, case: str) -> None:
    change, name = WRONG[case]
    with pytest.raises(ValueError, match=f"^{name}"):
        ops.attend(**(good() | change()), backend=ops.pick(level))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", LEVELS)
def test_attend_takes_the_arguments_that_the_refusals_start_from(level: str) -> None:
    out, lse = ops.attend(**good(), backend=ops.pick(level))  # type: ignore[arg-type]
    assert out.shape == (3, 4, 16)
    # All keys are zero, so each query weighs the keys up to its own position alike.
    torch.testing.assert_close(lse.exp(), torch.tensor([4.0, 6.0, 7.0])[:, None].expand(3, 4))


def test_the_other_calls_check_their_arguments() -> None:
    pool, k = torch.zeros(2, 6, 2, 2, 4, 16), torch.zeros(3, 2, 16)
    slots = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^slots"):
        ops.write_kv(k, k, pool, 0, slots.int())
    with pytest.raises(ValueError, match=r"^slots"):
        ops.write_kv(k, k, pool, 0, slots[:2])
    with pytest.raises(ValueError, match=r"^v"):
        ops.write_kv(k, k[:2], pool, 0, slots)
    with pytest.raises(ValueError, match=r"^k"):
        ops.write_kv(k.bfloat16(), k, pool, 0, slots)
    with pytest.raises(ValueError, match=r"^layer"):
        ops.write_kv(k, k, pool, 2, slots)
    with pytest.raises(ValueError, match=r"^target"):
        ops.copy_pages(pool, ints(0, 1), ints(0))
    with pytest.raises(ValueError, match=r"^lses"):
        ops.merge(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"^outs"):
        ops.merge(torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16), torch.zeros(2, 3, 4))


def test_pick_names_what_it_gives() -> None:
    assert ops.pick("reference").name == Reference.name == "reference"
    assert [ops.pick(level).name for level in LEVELS] == ["reference", *(cpu.NAMES[level] for level in LEVELS[1:])]
    assert ops.pick("auto").name == ops.pick(LEVELS[-1]).name
    with pytest.raises(ConfigError, match=r"QUIRE_KERNELS: got 'fast', must be one of auto, reference"):
        ops.pick("fast")


@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler")
def test_the_native_kernels_are_built_here() -> None:
    """With a compiler on the machine nothing here may pass by testing the reference against itself."""
    assert cpu.why_missing() is None, "run `make build` or `python setup.py build_ext --inplace` first"
    assert "plain" in LEVELS


def copy_sources(to: Path) -> None:
    shutil.copytree(ROOT / "kernels", to / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "pagetable", to / "pagetable", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", to)


def test_without_a_compiler_the_build_passes_with_one_warning(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    (tmp_path / "kernels" / "_native.so").write_text("of older sources")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: Quire's native kernels were not built") == 1
    assert "apt install g++" in done.stderr
    assert not (tmp_path / "kernels" / "_native.so").exists()


PROGRAM = """
import warnings
from kernels import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    names = [ops.backend_name() for _ in range(3)]
print(names, [str(each.message) for each in caught])
try:
    ops.pick("plain")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_without_the_library_one_warning_names_the_cure(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "QUIRE_KERNELS"}
        | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == (
        "['reference', 'reference', 'reference'] ['The native kernels (kernels/_native.so) are not built. "
        f"Attention runs on the slow reference; {cpu.CURE}.']"
    )
    assert second.startswith("ConfigError QUIRE_KERNELS: got 'plain', must have the native kernels built")


def test_the_environment_variable_picks_the_backend_and_is_refused_when_unknown() -> None:
    program = "from kernels import ops; print(ops.backend_name())"
    names = {}
    for choice in ("reference", "slow"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"QUIRE_KERNELS": choice, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        names[choice] = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    assert names["reference"] == "reference"
    assert "ConfigError: QUIRE_KERNELS: got 'slow', must be one of auto, reference" in names["slow"]

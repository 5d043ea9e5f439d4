"""The native step under the address, undefined-behaviour and thread sanitizers, at every level of this machine."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "csrc"
COMMON = ("plan", "attend", "pages", "team", "peers", "step", "tables", "rank")
# as in setup.py, which can't be imported
LEVELS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16"))),
}


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_step_is_clean(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    sanitize = ("-fsanitize=" + sanitizer, "-fno-sanitize-recover=all")
    flags = ("-std=c++17", "-O1", "-g", "-w", "-fopenmp", "-fno-strict-aliasing", "-fno-math-errno", *sanitize)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([compiler, *flags, *arguments], capture_output=True, text=True, timeout=600)

    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if run(str(probe), "-o", str(tmp_path / "probe")).returncode:
        pytest.skip(f"g++ has no {sanitizer} sanitizer here")

    def build(source: Path, *more: str) -> str | None:
        target = tmp_path / f"{source.stem}.o"
        done = run(*more, "-c", str(source), "-o", str(target))
        return None if done.returncode == 0 else done.stderr

    with ThreadPoolExecutor(2) as threads:
        faults = list(threads.map(lambda name: build(SOURCES / f"level_{name}.cpp", *LEVELS[name]), LEVELS))
        built = [name for name, fault in zip(LEVELS, faults, strict=True) if fault is None]
        assert "plain" in built, faults
        defines = [f"-DQUIRE_HAS_{name.upper()}" for name in built]
        sources = [*(SOURCES / f"{name}.cpp" for name in COMMON), ROOT / "tests" / "native" / "step_main.cpp"]
        assert list(threads.map(lambda source: build(source, *defines), sources)) == [None] * len(sources)
    objects = [str(tmp_path / f"{name}.o") for name in (*(f"level_{each}" for each in built), *COMMON, "step_main")]
    linked = run(*objects, "-pthread", "-o", str(tmp_path / "step"))
    assert linked.returncode == 0, linked.stderr
    done = subprocess.run([tmp_path / "step"], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr[-4000:]

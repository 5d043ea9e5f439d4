"""Builds the native CPU kernels (kernels/csrc) into kernels/_native.so; everything else is in pyproject.toml.

Each level of instructions is a file of its own with its own flags, picked at run time. Where no C++ compiler is found
or it fails, the installation passes with one warning, and Quire runs on the slow torch reference.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing", "-fno-math-errno"]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
LEVELS = {"level_plain": [], "level_avx2": ["-mavx2", "-mfma", "-mf16c"], "level_avx512": AVX512}
COMMON = ["plan", "attend", "pages", "probe", "team", "peers", "step", "tables", "rank"]


class BuildNative(build_ext):
    """Compiles with the compiler found, into the name that kernels/cpu.py loads."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # loaded by ctypes: no Python version in the name

    def run(self) -> None:
        if self.inplace:  # a library of older sources would be worse than none
            Path(self.get_ext_filename("kernels._native")).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        try:
            self.compile_native(target)
        except (OSError, RuntimeError) as error:
            print(
                f"WARNING: Quire's native kernels were not built ({error}); attention will run on the slow reference. "
                "Install g++ (Debian and Ubuntu: apt install g++) and install Quire again.",
                file=sys.stderr,
            )

    def compile_native(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise RuntimeError("no C++ compiler: neither $CXX nor c++, g++, clang++")
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def run(*arguments: str) -> str | None:
            done = subprocess.run([*compiler.split(), *arguments], capture_output=True, text=True, check=False)
            return None if done.returncode == 0 else (done.stderr.strip() or "failed").splitlines()[0]

        def compile_one(name: str, *flags: str) -> str | None:
            return run(*FLAGS, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(folder / f"{name}.o"))

        x86 = platform.machine().lower() in ("x86_64", "amd64")
        wanted = [name for name, flags in LEVELS.items() if x86 or not flags]
        with ThreadPoolExecutor() as threads:
            results = threads.map(lambda name: compile_one(name, *LEVELS[name]), wanted)
            faults = dict(zip(wanted, results, strict=True))
        built = [name for name in wanted if faults[name] is None]  # an old compiler may not know the newest level
        defines = [f"-DQUIRE_HAS_{name.removeprefix('level_').upper()}" for name in built]
        faults |= {name: compile_one(name, *defines) for name in COMMON}
        for name in ("level_plain", *COMMON):
            if faults[name] is not None:
                raise RuntimeError(f"{compiler}: {faults[name]}")
        objects = [str(folder / f"{name}.o") for name in (*built, *COMMON)]
        fault = run("-shared", "-fopenmp", "-pthread", *objects, "-o", str(target))
        if fault is not None:
            raise RuntimeError(f"{compiler}: {fault}")


# optional: setuptools then takes it that nothing was built.
native = Extension(
    "kernels._native", sources=[], depends=[str(path) for path in sorted(SOURCES.iterdir())], optional=True
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})

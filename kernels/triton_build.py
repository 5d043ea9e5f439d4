"""Ahead-of-time builds of our Triton kernels, for chips that need not be there.

    python -m kernels.triton_build [--json] [--chips 80,90,100] [--modules MODULE,...] [--only WORD] [--jobs 2]

Each module's `variants()` names the kernels, types and constants that we launch. A build needs no driver: ptxas,
cuobjdump and nvdisasm come with Triton. What is looked at is the machine code itself, so a build out of Triton's cache
is judged like a new one. Exit status 1 where a build fails, spills registers, takes more shared memory than its chip
has, or lacks the tensor-core instructions that it must have.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

MODULES = ("kernels.triton_attention", "kernels.triton_fused", "kernels.triton_sampling")
KIB = 1024
SHARED_LIMITS = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}  # of one block, bytes
CHIPS = tuple(SHARED_LIMITS)
SMALL_SHARED = 99 * KIB  # what sm_86 and sm_89 have: more is told, but no fault

# Instructions that multiply matrices. PTX: mma of a warp, of four warps (sm_90), of a block (sm_100).
_PTX_MMA = re.compile(r"^\s*(?:@!?%p\d+\s+)?(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
# SASS: HMMA, IMMA, QMMA, OMMA, DMMA; HGMMA, QGMMA; UTCHMMA, UTCQMMA and so on; not HFMA2.MMA, which is none.
_SASS_MMA = re.compile(r"(?<![.\w])(?:UTC)?[DHIOQ](?:G|SP)?MMA\b")
# Copies from global to shared memory that go on beside the arithmetic: of 16 bytes each, and by TMA.
_ASYNC_COPY = re.compile(r"\bcp\.async\.(?:cg|bulk)\.(?:shared|tensor)")
_SASS_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


class Variant(NamedTuple):
    """One way in which we launch a kernel.

    Attributes:
        name: unique in its module.
        kernel: a function under `triton.jit`.
        signature: type of each argument: "*bf16", "i32", "fp32", "constexpr". Pointers are taken to be multiples of 16;
            an integer is where ":16" follows its type ("i64:16"), as a launch finds by itself: without it loads are
            narrow and no copy is asynchronous, so a build would not be what a launch compiles.
        constants: values of the arguments of type "constexpr".
        tensor_cores: whether the build must have tensor-core instructions.
        least: the lowest capability that can run it; 89 where it computes with float8.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool
    least: int = 80

    @classmethod
    def plain(
        cls, name: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], num_warps: int
    ) -> Variant:
        """A kernel without products. `arguments`: types of those that are no constants."""
        return cls(name, kernel, arguments | dict.fromkeys(constants, "constexpr"), constants, num_warps, 3, False)


@dataclass(frozen=True, slots=True)
class Built:
    """What a build takes of a chip.

    Attributes:
        registers: of a thread.
        spilled: bytes of local memory of a thread: its stack frame, where spills lie, and its local arrays.
        local_instructions: that read or write local memory.
        shared: bytes of a block.
        ptx_mma, sass_mma: tensor-core instructions in PTX and in machine code.
        async_copies: of 16 bytes and more to shared memory, in PTX; 0 where tiles go through registers.
        cubin: bytes.
    """

    registers: int
    spilled: int
    local_instructions: int
    shared: int
    ptx_mma: int
    sass_mma: int
    async_copies: int
    cubin: int


class Outcome(NamedTuple):
    """A variant on a chip: what was built, or None where it could not be; and what is wrong with it."""

    module: str
    variant: str
    chip: int
    built: Built | None
    faults: tuple[str, ...]


def build(variant: Variant, capability: int) -> Built:
    """Compile `variant` for a chip of compute capability `capability` (80: 8.0), with no chip there.

    Raises:
        ValueError: arguments that are not the kernel's, or Triton in interpreter mode.
        Exception: any of Triton's own, where the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import JITFunction

    kernel = variant.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{variant.name}: got a {type(kernel).__name__}, must be compiled: unset TRITON_INTERPRET")
    names = list(kernel.arg_names)
    wanted = {name for name, kind in variant.signature.items() if kind == "constexpr"}
    if sorted(names) != sorted(variant.signature) or wanted != set(variant.constants):
        odd = sorted((set(names) ^ set(variant.signature)) | (wanted ^ set(variant.constants)))
        raise ValueError(f"{variant.name}: arguments {', '.join(odd)}: must stand in kernel, signature and constants")
    source = ASTSource(
        fn=kernel,
        signature={name: variant.signature[name].removesuffix(":16") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if variant.signature[name].startswith("*") or variant.signature[name].endswith(":16")
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _look(compiled.asm["cubin"], compiled.asm["ptx"], int(compiled.metadata.shared))


def _look(cubin: bytes, ptx: str, shared: int) -> Built:
    """What stands in a build's code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _said(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        sass = _said(knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = {name: int(value) for name, value in _USAGE.findall(usage)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage: got {usage!r}, must tell REG, STACK and LOCAL of one kernel")
    return Built(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        local_instructions=len(_SASS_LOCAL.findall(sass)),
        shared=shared,
        ptx_mma=len(_PTX_MMA.findall(ptx)),
        sass_mma=len(_SASS_MMA.findall(sass)),
        async_copies=len(_ASYNC_COPY.findall(ptx)),
        cubin=len(cubin),
    )


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def faults(built: Built, capability: int, tensor_cores: bool) -> tuple[str, ...]:
    """What is wrong with a build for a chip."""
    found = []
    if built.spilled or built.local_instructions:
        found.append(f"spills: {built.spilled} bytes a thread, {built.local_instructions} instructions")
    if built.shared > SHARED_LIMITS[capability]:
        found.append(f"shared memory: {built.shared} bytes, must be at most {SHARED_LIMITS[capability]}")
    if tensor_cores and not (built.ptx_mma and built.sass_mma):
        found.append("no tensor-core instructions")
    return tuple(found)


def _variants(module: str) -> dict[str, Variant]:
    """The variants of a module by name.

    Raises:
        ImportError: the module, or what it imports, is not there.
    """
    found = importlib.import_module(module).variants()
    named = {variant.name: variant for variant in found}
    if len(named) < len(found):
        raise ValueError(f"{module}: two variants have one name")
    return named


def _outcome(module: str, name: str, capability: int) -> Outcome:
    """One build; runs in a process of its own, since Triton compiles with one thread."""
    variant = _variants(module)[name]
    try:
        built = build(variant, capability)
    except Exception as error:  # Triton's own are many; whichever it is, this variant is at fault and others go on
        return Outcome(module, name, capability, None, (f"{type(error).__name__}: {str(error).strip()[-400:]}",))
    return Outcome(module, name, capability, built, faults(built, capability, variant.tensor_cores))


def outcomes(modules: Sequence[str], chips: Iterable[int], only: str, jobs: int) -> list[Outcome]:
    """Build the variants of `modules` whose name holds `only`, for each chip that can run them.

    Raises:
        ImportError: a module, or what it imports, is not there.
        ValueError: nothing to build.
    """
    chips = list(chips)
    work = [
        (module, variant.name, chip)
        for module in modules
        for variant in _variants(module).values()
        if only in variant.name
        for chip in chips
        if chip >= variant.least
    ]
    if not work:
        raise ValueError(f"nothing to build: no variant of {', '.join(modules)} has {only!r} in its name")
    if jobs == 1:
        return [_outcome(*each) for each in work]
    # not by fork: torch and LLVM have threads
    with ProcessPoolExecutor(min(jobs, len(work)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_outcome, *zip(*work, strict=True)))


def as_json(outcome: Outcome) -> str:
    """One line. Where the build failed it has faults only."""
    named = {"module": outcome.module, "variant": outcome.variant, "chip": outcome.chip}
    numbers: dict[str, Any] = {}
    if outcome.built is not None:
        numbers = {**asdict(outcome.built), "above_99_kib": outcome.built.shared > SMALL_SHARED}
    return json.dumps({**named, **numbers, "faults": list(outcome.faults)})


def table(found: Sequence[Outcome]) -> str:
    """A line for each outcome, and one that counts."""
    width = max(len(each.variant) for each in found)
    lines = [f"{'variant':<{width}}  chip    registers  spilled   shared  mma PTX  mma SASS  copies    cubin"]
    for each in found:
        line = f"{each.variant:<{width}}  sm_{each.chip:<4}"
        if (built := each.built) is not None:
            numbers = (
                f"{built.registers:>10} {built.spilled:>8} {built.shared:>8} {built.ptx_mma:>8} {built.sass_mma:>9}"
            )
            line += f"{numbers} {built.async_copies:>7} {built.cubin:>8}"
            line += "  above 99 KiB: not for sm_86, sm_89" * (built.shared > SMALL_SHARED)
        lines.append(line + "".join(f"  FAULT {fault.splitlines()[-1][:160]}" for fault in each.faults))
    bad = sum(bool(each.faults) for each in found)
    return "\n".join(lines + [f"{len(found)} builds, {bad} with faults"])


def _chips(text: str) -> list[int]:
    chips = [int(word) for word in text.split(",")]
    if unknown := [chip for chip in chips if chip not in SHARED_LIMITS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]}, must be of {', '.join(map(str, CHIPS))}")
    return chips


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each build")
    parser.add_argument("--chips", type=_chips, default=list(CHIPS), help="compute capabilities, with commas")
    parser.add_argument("--modules", default=",".join(MODULES), help="with a function `variants`, with commas")
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    options = parser.parse_args(arguments)
    try:
        found = outcomes(options.modules.split(","), options.chips, options.only, options.jobs)
    except (ImportError, ValueError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(as_json, found)) if options.json else table(found))
    return int(any(each.faults for each in found))


if __name__ == "__main__":
    sys.exit(main())

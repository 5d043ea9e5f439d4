"""The house rules of the design, held by reading the source: who may import whom, and what nobody may call."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import quire

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {"cluster", "kernels", "launch", "pagetable", "quire", "quire_pb", "worker"}
PACKAGES = ("cluster", "kernels", "launch", "pagetable", "worker")

# package -> ours that it may import beside itself
MAY_IMPORT = {
    "pagetable": set(),
    "kernels": set(),
    "worker": {"pagetable", "kernels", "quire_pb"},
    "cluster": {"pagetable", "quire_pb"},
    "launch": OURS,
    "quire.py": OURS,
}
# the one error tree is everybody's
ALL_MAY_IMPORT = {"pagetable.errors"}
# package -> others that it may never import, at no depth
NEVER = {
    "worker": {"ray", "transformers"},
    "cluster": {"torch", "numpy", "triton", "cupy", "transformers"},
    "launch": {"transformers"},
    "kernels": {"ray", "transformers", "safetensors", "tokenizers"},
}
# imported only when a GPU's kernels are wanted, so never at the head of a module
INSIDE_FUNCTIONS = {"triton", "cupy"}
RAY_FILES = {"cluster/head.py"}

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_ATTRIBUTES = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("yaml", "load_all"),
}

PURE_WORKER = {
    "admission",
    "config",
    "layout",
    "model_config",
    "plan",
    "rope",
    "scheduler",
    "sequence",
    "split",
    "stages",
    "step",
    "ways",
}
IMPURE = {"time", "random", "os", "uuid", "threading", "asyncio", "socket", "numpy", "torch"}
IMPURE_CALLS = {"open", "hash"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at the head of the module) of each import, also of `importlib.import_module("literal")`."""
    heads = {id(node) for node in ast.walk(tree) if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            heads -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in heads
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, id(node) in heads
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), node.lineno, id(node) in heads


def is_pure(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == "pagetable" or (folder == "worker" and file.removesuffix(".py") in PURE_WORKER)


def violations(name: str, source: str) -> list[str]:
    """Every rule that a file of ours breaks; `name` is its path from the root, with slashes."""
    tree = ast.parse(source, name)
    package = name.partition("/")[0]
    found = [f"{name}:{line}: {text}" for line, text in _import_faults(name, package, tree)]
    found += [f"{name}:{line}: {text}" for line, text in _call_faults(name, tree)]
    return found


def _import_faults(name: str, package: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for module, line, at_head in imports(tree):
        top = module.partition(".")[0]
        if top == "":
            yield line, f"{module}: relative imports hide which package is meant"
        if top in OURS and top != package and top not in MAY_IMPORT[package] and module not in ALL_MAY_IMPORT:
            yield line, f"{package} may not import {top}"
        if top in NEVER.get(package, ()):
            yield line, f"{package} may never import {top}"
        if package == "pagetable" and top not in sys.stdlib_module_names | {"pagetable", ""}:
            yield line, f"pagetable imports only the standard library, not {top}"
        if top in INSIDE_FUNCTIONS and at_head:
            yield line, f"{top} is imported inside functions only"
        if top == "ray" and package == "cluster" and name not in RAY_FILES:
            yield line, f"ray stands in one file of cluster: {', '.join(RAY_FILES)}"
        if top in UNPICKLERS:
            yield line, f"{top} is never used"
        if is_pure(name) and top in IMPURE:
            yield line, f"a pure file may not import {top}"


def _call_faults(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if (node.module, alias.name) in BANNED_ATTRIBUTES:
                    yield node.lineno, f"{node.module}.{alias.name} is never used"
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in BANNED_ATTRIBUTES:
                yield node.lineno, f"{node.value.id}.{node.attr} is never used"
            if re.fullmatch(r"(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?", node.attr):
                yield node.lineno, f"{node.attr} pickles"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, "allow_pickle is never on"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in BANNED_CALLS:
                yield node.lineno, f"{node.func.id}() is never called"
            if is_pure(name) and node.func.id in IMPURE_CALLS:
                yield node.lineno, f"a pure file may not call {node.func.id}()"


def our_files() -> list[Path]:
    return sorted([path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + [ROOT / "quire.py"])


@pytest.mark.parametrize("path", our_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "rule"),
    [
        ("pagetable/allocator.py", "import numpy", "pagetable imports only the standard library, not numpy"),
        ("pagetable/allocator.py", "def f():\n    import time", "a pure file may not import time"),
        ("pagetable/allocator.py", "from os import path", "a pure file may not import os"),
        ("pagetable/allocator.py", "import asyncio.events", "a pure file may not import asyncio"),
        ("pagetable/prefix_tree.py", "key = hash((1, 2))", "a pure file may not call hash()"),
        ("pagetable/prefix_tree.py", "open('x')", "a pure file may not call open()"),
        ("pagetable/page.py", "from worker.plan import Plan", "pagetable may not import worker"),
        ("kernels/ops.py", "import pagetable.ids", "kernels may not import pagetable"),
        ("kernels/triton_attention.py", "import triton.language as tl", "triton is imported inside functions only"),
        ("worker/scheduler.py", "import torch", "a pure file may not import torch"),
        ("worker/model.py", "def f():\n    import ray", "worker may never import ray"),
        ("worker/model.py", "async def f():\n    from cluster import view", "worker may not import cluster"),
        ("worker/model.py", "import importlib\nimportlib.import_module('launch.llm')", "worker may not import launch"),
        ("worker/weights.py", "import torch\ntorch.load('x')", "torch.load is never used"),
        ("worker/weights.py", "from torch import load", "torch.load is never used"),
        ("worker/weights.py", "import numpy\nnumpy.load('x', allow_pickle=True)", "allow_pickle is never on"),
        (
            "worker/group.py",
            "import torch.distributed as d\nd.broadcast_object_list([])",
            "broadcast_object_list pickles",
        ),
        ("worker/loop.py", "import pickle", "pickle is never used"),
        ("worker/loop.py", "from . import model", ".: relative imports hide which package is meant"),
        ("cluster/scheduler.py", "def f():\n    import torch", "cluster may never import torch"),
        ("cluster/front.py", "import kernels", "cluster may not import kernels"),
        ("cluster/front.py", "import ray", "ray stands in one file of cluster: cluster/head.py"),
        ("cluster/front.py", "import quire", "cluster may not import quire"),
        ("launch/config.py", "import yaml\nyaml.load('x')", "yaml.load is never used"),
        ("launch/config.py", "eval('1')", "eval() is never called"),
    ],
)
def test_the_checker_finds_a_planted_fault(name: str, source: str, rule: str) -> None:
    line = source.count("\n") + 1
    assert f"{name}:{line}: {rule}" in violations(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/triton_attention.py", "def f():\n    import triton"),
        ("worker/model.py", "import torch\nmodel.eval()\nimport pagetable.ids, kernels.ops, quire_pb"),
        ("cluster/head.py", "import ray"),
        ("launch/cli.py", "import re\nre.compile('x')\nimport worker, cluster, kernels, ray"),
        ("worker/loop.py", "import time\nopen('x')"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(name: str, source: str) -> None:
    assert violations(name, source) == []


def test_the_stubs_folder_is_no_package() -> None:
    # Ray's extras bring a distribution whose package is `proto`; ours would shadow it.
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_the_version_is_none_that_transformers_takes_for_the_other_kernels() -> None:
    major, minor = map(int, re.fullmatch(r"(\d+)\.(\d+)\.\d+(?:\w+)?", quire.__version__).groups())  # type: ignore[union-attr]
    assert (major, minor) not in {(0, 17), (0, 18), (0, 19)}


def test_transformers_imports_with_our_packages_on_the_path() -> None:
    ours = ", ".join(PACKAGES)
    code = f"import {ours}, transformers; from transformers import LlamaForCausalLM as L; print(L.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "LlamaForCausalLM\n"), done.stderr


def test_the_users_door_costs_nothing_until_it_is_used() -> None:
    code = "import quire, sys; print(sorted({'torch', 'numpy', 'launch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

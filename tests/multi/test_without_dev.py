"""`make demo` needs nothing of the dev extra.

The demo runs in processes that find no module of a distribution that only the dev extra brings: not a fresh
environment, which takes 1.4 GB, but what decides there, which is that such a module cannot be imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement

from tests.serving import SECONDS

ROOT = Path(__file__).parents[2]
_HIDE = """
import os, sys
from importlib.machinery import PathFinder
hidden = frozenset(os.environ["HIDDEN_MODULES"].split(","))
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Finder if each is PathFinder else each for each in sys.meta_path]
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: list[str]) -> set[str]:
    """The distributions that requirements bring, their own requirements included."""
    found: set[str] = set()
    todo = [(Requirement(text), "") for text in wanted]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonical(requirement.name)
        for more in ("", *requirement.extras):
            key = f"{name}[{more}]" if more else name
            if key in found:
                continue
            found.add(key)
            try:
                todo += [(Requirement(text), more) for text in requires(name) or ()]
            except PackageNotFoundError:
                continue  # of another platform or not installed
    return {name for name in found if "[" not in name}


def hidden_modules() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, dev = closure(project["dependencies"]), closure(project["optional-dependencies"]["dev"])
    return {
        module
        for module, owners in packages_distributions().items()
        if {canonical(owner) for owner in owners} <= dev - base
    }


def test_the_demo_runs_without_the_dev_extra(tmp_path: Path) -> None:
    hidden = hidden_modules()
    assert {"pytest", "hypothesis", "mypy", "transformers"} <= hidden
    assert not hidden & {"torch", "ray", "grpc", "tokenizers", "safetensors", "numpy", "jinja2", "prometheus_client"}
    (tmp_path / "sitecustomize.py").write_text(_HIDE)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "proto")))
    env = {**os.environ, "PYTHONPATH": path, "HIDDEN_MODULES": ",".join(sorted(hidden))}
    probe = subprocess.run([sys.executable, "-c", "import transformers"], env=env, capture_output=True, text=True)
    assert "No module named 'transformers'" in probe.stderr
    done = subprocess.run(
        [sys.executable, "-m", "launch.demo"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "all of it took" in done.stdout

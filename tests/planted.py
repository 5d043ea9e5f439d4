"""A fault laid into every worker process that is started from now on, beside the code that it runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_SITE = """
import sys
if "worker" in sys.orig_argv:
    import importlib.abc, importlib.util, os, signal, time
    from array import array
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "worker.runner":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                carry_out, run_plain = module.Runner.carry_out, module.Runner.run_plain
                def act(self, plan):
                    if {where}:
                        {act}
                def planted(self, prepared):
                    act(self, prepared.plan)
                    return carry_out(self, prepared)
                def planted_plain(self, data):
                    act(self, module.decode_plan(data))
                    return run_plain(self, data)
                module.Runner.carry_out, module.Runner.run_plain = planted, planted_plain
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, act: str) -> None:
    """Run `act` before each plan for which `where` holds; where that plan turns out not to be plain, once more.

    Args:
        folder: for a `sitecustomize.py`, which comes first on the path of processes that are started.
        where, act: an expression and a statement, of `self` (the Runner) and `plan`; array, os, signal, time are there.
    """
    (folder / "sitecustomize.py").write_text(_SITE.replace("{where}", where).replace("{act}", act))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

"""What tests lay into every worker process that is started from now on, beside the code that it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
{acts}
                def planted(self, prepared):
                    act(self, prepared.plan)
                    return carry_out(self, prepared)
                def planted_plain(self, data):
                    act(self, module.decode_plan(data))
                    return run_plain(self, data)
                module.Runner.carry_out, module.Runner.run_plain = planted, planted_plain
                if {on_followers}:
                    module.Runner.follow = lambda self, *_: None  # each plan by itself
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, act: str, *, on_followers: bool = True) -> None:
    """Run `act` before each plan for which `where` holds; where that plan turns out not to be plain, once more.

    Args:
        folder: for a `sitecustomize.py`, which comes first on the path of processes that are started. Planted in the
            same folder again: both acts, in that order.
        where, act: an expression and a statement, of `self` (the Runner) and `plan`; array, os, signal, time are there.
        on_followers: where it may hold on ranks that are not their shard's leader, which take plain plans one by one,
            then, and not as without anything planted.
    """
    if not on_followers:
        where = f"(self.part is None or self.part.rank == 0) and {where}"
    else:
        (folder / "on_followers").touch()
    acts = folder / "acts"
    with acts.open("a") as file:
        file.write(f"{' ' * 20}if {where}:\n{' ' * 24}{act}\n")
    (folder / "sitecustomize.py").write_text(
        _SITE.replace("{acts}", acts.read_text().rstrip("\n")).replace(
            "{on_followers}", str((folder / "on_followers").exists())
        )
    )
    if str(folder) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


class Brake:
    """Slows down every shard that is started from now on, so that what a test does in the middle of streams finds
    them there, however long the machine lets the test wait."""

    SECONDS = 0.01  # a step of a shard takes at least that long: 700 tokens 7 s

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file, self._users = folder / "brake", 0
        plant(
            folder,
            monkeypatch,
            f"os.path.exists({str(self._file)!r})",
            f"time.sleep({self.SECONDS})",
            on_followers=False,
        )

    @contextmanager
    def pressed(self) -> Iterator[None]:
        self._users += 1
        self._file.touch()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._file.unlink()

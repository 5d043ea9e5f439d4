"""Fixtures of the tests that need several processes or several hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.multi.netlab.lab import Lab
from tests.multi.netlab.namespaces import missing
from tests.planted import Brake


@pytest.fixture
def brake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Brake:
    """Of all workers that the test starts."""
    return Brake(tmp_path, monkeypatch)


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """`make_lab(3, "sshd")`: a lab of three pretend hosts on which that program runs; skips where none can be."""
    labs: list[Lab] = []

    def make(count: int, *programs: str) -> Lab:
        if reason := missing(*programs):
            pytest.skip(reason)
        labs.append(Lab(count))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()

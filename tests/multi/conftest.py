"""Fixtures of the tests that need several processes or several hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.multi.netlab.lab import Lab
from tests.multi.netlab.namespaces import missing


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

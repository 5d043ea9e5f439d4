"""`make demo`, as it is."""

from __future__ import annotations

import pytest

from launch import demo


def test_the_demo_streams_forks_shares_and_recalls(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    out = capfd.readouterr().out
    assert "sharing saved 0" not in out and ")* (" in out
    for name in ("one", "two", "twins.0", "twins.1", "split", "other", "chat", "fork"):
        assert f" {name} | " in out
    assert out.count("16384 tokens were in pages already") == 2
    assert "median time to first token" in out and "all of it took" in out

"""Cores that a rank claims: nobody else's while its process lives, and where its threads stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker import cores as cores_module
from worker.cores import Cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cores are claimed on Linux alone")
NAMES = f"\0quire-test-{os.getpid()}-core-{{}}"  # an engine elsewhere on this machine may have claimed the real ones


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(cores_module, "_NAME", NAMES)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of cores 0, 1, 4, 5, 6 and 7, as far as claims go."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6, 7})


def topology(folder: Path, siblings: dict[int, str]) -> Path:
    for cpu, text in siblings.items():
        place = folder / f"cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(text + "\n")
    return folder


@pytest.mark.usefixtures("many")
def test_nobody_gets_a_core_that_another_has(tmp_path: Path) -> None:
    first, second = Cores.claim(2, tmp_path), Cores.claim(3, tmp_path)
    assert (first.cpus, second.cpus) == ({0, 1}, {4, 5, 6})
    assert Cores.claim(2, tmp_path).cpus == set()  # one is left, and stays free
    third = Cores.claim(1, tmp_path)
    assert third.cpus == {7}
    first.release()
    assert first.cpus == set() and Cores.claim(2, tmp_path).cpus == {0, 1}


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        ({0: "0-1", 1: "0-1", 4: "4-5", 5: "4-5", 6: "6,7", 7: "6,7"}, [{0, 4}, {6, 1}, {5, 7}]),
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "6", 7: "7"}, [{0, 1}, {6, 7}, {4, 5}]),
        ({0: "what is this", 1: ""}, [{0, 1}, {4, 5}, {6, 7}]),
    ],
    ids=["neighbours", "halves", "unreadable"],
)
def test_whole_cores_come_before_second_threads_of_cores(
    tmp_path: Path, siblings: dict[int, str], expected: list[set[int]]
) -> None:
    claimed = [Cores.claim(2, topology(tmp_path, siblings)) if not at else Cores.claim(2, tmp_path) for at in range(3)]
    assert [each.cpus for each in claimed] == expected


def test_a_claim_ends_with_its_process_however_that_ends() -> None:
    code = (
        f"from worker import cores; cores._NAME = {NAMES!r}\n"
        "import os; got = cores.Cores.claim(1); print(sorted(got.cpus), flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    own = Cores.claim(1)
    assert line.strip() != str(sorted(own.cpus))
    own.release()
    child.kill()
    child.communicate()
    assert str(sorted(Cores.claim(1).cpus)) == line.strip()


def test_a_thread_stays_while_it_is_held_and_those_that_it_starts_for_good() -> None:
    before = os.sched_getaffinity(0)
    cores = Cores.claim(1)
    seen: list[set[int]] = []
    with cores.hold():
        with cores.hold():
            pass
        assert os.sched_getaffinity(0) == cores.cpus  # the inner block gave nothing back
        go = threading.Event()
        thread = threading.Thread(target=lambda: (go.wait(10), seen.append(os.sched_getaffinity(0))))
        thread.start()
    assert os.sched_getaffinity(0) == before
    go.set()
    thread.join()
    assert seen == [cores.cpus]
    with pytest.raises(RuntimeError, match="inside"), cores.hold():
        raise RuntimeError("inside")
    assert os.sched_getaffinity(0) == before
    cores.stay()
    assert os.sched_getaffinity(0) == cores.cpus


def test_without_a_claim_threads_run_anywhere() -> None:
    before = os.sched_getaffinity(0)
    cores = Cores()
    cores.stay()
    with cores.hold():
        assert os.sched_getaffinity(0) == before


def test_cores_that_were_taken_away_harm_nobody() -> None:
    before = os.sched_getaffinity(0)
    cores = Cores(frozenset({1 << 12}))  # the system knows no such one
    cores.stay()
    with cores.hold():
        assert os.sched_getaffinity(0) == before

"""The same tokens whichever way ranks talk to each other, and the same end when one of them goes: gloo on one host,
plans by torch.distributed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models import make_model
from tests.rank_lab import Hosts, Tape, make_spec, request
from tests.serving import files
from worker.layout import Layout
from worker.loop import EpochOver, Loop
from worker.plan import Plan
from worker.ranks import Ranks
from worker.shard import ShardSpec, make_loop
from worker.ways import Ways

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LAYOUTS = [Layout(2), Layout(2, 1, 2), Layout(1, 2), Layout(2, 2, 2)]
WAYS = [Ways("auto", "torch"), Ways("gloo", "sockets"), Ways("gloo", "torch")]
SOON = 5.0  # seconds for a survivor to leave; a collective alone would wait for ten minutes


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    found = Hosts()
    yield found
    found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return make_model(tmp_path_factory.mktemp("model"), **fields)


def spec_of(folder: Path, layout: Layout, ways: Ways, **settings: Any) -> ShardSpec:
    return replace(make_spec(folder, layout, max_model_len=512, **settings), ways=ways)


def say(loop: Loop, spec: ShardSpec, after: int = -1, what: Callable[[], None] = lambda: None) -> dict[str, list[int]]:
    """What four requests say, one of which is drawn; `what` happens after that many steps."""
    tape = Tape()
    for index in range(4):
        prompt = [2 + (11 * at + 5 * index) % 300 for at in range(7 + 30 * index)]
        asked = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.8 if index == 3 else 0.0, "seed": index}
        loop.add(request(spec, f"r{index}", prompt, **asked))
    step = 0
    while loop.has_work:
        if step == after:
            what()
        tape.take(loop.step())
        step += 1
    return {name: tokens for (name, _), tokens in tape.tokens.items()}


@pytest.fixture(scope="module")
def expected(folder: Path, hosts: Hosts) -> dict[str, list[int]]:
    spec = spec_of(folder, Layout(), Ways())
    with hosts.loop(spec) as (loop, _):
        return say(loop, spec)


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: f"{ways.collectives}-{ways.table_broadcast}")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: f"T{each.tensor}P{each.pipeline}G{each.page}")
def test_every_way_says_the_same_tokens(
    layout: Layout, ways: Ways, folder: Path, hosts: Hosts, expected: dict[str, list[int]]
) -> None:
    spec = spec_of(folder, layout, ways)
    cut = any(part.is_cut for part in layout.parts(spec.model))
    assert cut == (layout.pipeline == 2)  # two stages hand on the sums of an MLP too
    with hosts.loop(spec) as (loop, _):
        assert say(loop, spec) == expected


@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(2, 3)], ids=str)
def test_tokens_that_plans_leave_open_come_over_gloo(
    layout: Layout, folder: Path, hosts: Hosts, expected: dict[str, list[int]]
) -> None:
    spec = spec_of(folder, layout, Ways("gloo", "sockets"), async_scheduling=True)
    num_open = 0

    def count(plan: Plan) -> None:
        nonlocal num_open
        num_open += sum(token < 0 for token in plan.tokens)

    with hosts.loop(spec) as (loop, _):
        loop.on_plan = count
        assert say(loop, spec) == expected
    assert num_open > 80


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: f"{ways.collectives}-{ways.table_broadcast}")
def test_epochs_one_after_another_leave_no_socket(ways: Ways, folder: Path, hosts: Hosts) -> None:
    spec = spec_of(folder, Layout(2, 1, 2), ways)
    with hosts.loop(spec) as (loop, ranks):
        assert ranks is not None
        (process,) = hosts.need(1)
        counts = []
        for epoch in range(2, 8):
            say(loop, spec)
            counts.append((_open(os.getpid()), _open(process.pid)))
            ranks.end("a test wants it")
            ranks.begin(epoch)
            loop = make_loop(spec, ranks)
        assert max(own for own, _ in counts[1:]) <= counts[0][0] + 2, counts
        assert max(theirs for _, theirs in counts[1:]) <= counts[0][1] + 2, counts


def _open(pid: int) -> int:
    return len(files(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: f"{ways.collectives}-{ways.table_broadcast}")
@pytest.mark.parametrize("layout", [Layout(2), Layout(1, 2)], ids=["T2", "P2"])
def test_a_lost_rank_ends_the_epoch_and_another_one_takes_its_place(
    layout: Layout, ways: Ways, number: signal.Signals, folder: Path, hosts: Hosts, expected: dict[str, list[int]]
) -> None:
    spec = spec_of(folder, layout, ways)
    with hosts.loop(spec) as (loop, ranks):
        assert ranks is not None
        say(loop, spec)
        victim = hosts.processes[0]
        with pytest.raises(EpochOver) as over:
            say(loop, spec, 10, lambda: os.kill(victim.pid, number))
        why = "it has not answered for 5 s" if number is signal.SIGSTOP else "the connection has ended"
        assert str(over.value).startswith(f"rank 1 is gone ({why}") or number is signal.SIGKILL, over.value
        hosts.replace(0)
        _begins(ranks)
        loop = make_loop(spec, ranks)
        assert say(loop, spec) == expected


def _begins(ranks: Ranks) -> None:
    began = time.monotonic()
    ranks.begin(2)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: f"{ways.collectives}-{ways.table_broadcast}")
def test_ranks_that_wait_for_a_plan_leave_at_once(ways: Ways, folder: Path, hosts: Hosts) -> None:
    """Nobody asks for anything, and the epoch ends: no process is started anew, and the next one begins soon."""
    spec = spec_of(folder, Layout(2, 2), ways)
    with hosts.loop(spec) as (loop, ranks):
        assert ranks is not None
        before = say(loop, spec)
        time.sleep(1.5)
        threading.Thread(target=ranks.end, args=("a test wants it",)).start()
        began = time.monotonic()
        ranks.begin(2)
        assert time.monotonic() - began < SOON
        assert say(make_loop(spec, ranks), spec) == before

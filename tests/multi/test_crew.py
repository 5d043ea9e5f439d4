"""An engine whose ranks are processes: what users see when one of them dies, stops or cannot load, and what is left."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.llm import LLM
from launch.machine import available_cores
from pagetable.errors import ModelError, QuireError, RequestFailed
from pagetable.sampling import SamplingParams
from tests.models import make_model
from tests.serving import children, files, is_alive
from worker.ranks import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "num_gpu_blocks_override": 128,
    "max_num_seqs": 8,
    "threads": 1,
}
PROMPTS = [[2 + (7 * at + 3 * index) % 300 for at in range(9 + 5 * index)] for index in range(3)]
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


def leftovers() -> dict[str, int]:
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "children": len(children(os.getpid())),
        "pipes": len(files(os.getpid(), "pipe:")),
        "sockets": len(files(os.getpid(), "socket:")),
        "memory": sum("memfd:quire" in line for line in maps) + len(files(os.getpid(), "/memfd:quire")),
        "threads": threading.active_count(),
    }


def comes_to(wanted: dict[str, int]) -> None:
    """Nothing more than `wanted` is left, once the collector has been. Less may be: others were still ending then."""
    deadline = time.monotonic() + 10
    while any(count > wanted[what] for what, count in leftovers().items()):
        assert time.monotonic() < deadline, f"{leftovers()}, not {wanted}"
        gc.collect()
        time.sleep(0.05)


@contextmanager
def engine(model: Path, **layout: int) -> Iterator[LLM]:
    """On the way out: closed, and nothing of it is left."""
    before = leftovers()
    llm = LLM(str(model), **SMALL, **layout)
    pids = llm.pids[1:]
    try:
        yield llm
    finally:
        llm.close()
    assert not any(map(is_alive, pids))
    comes_to(before)


def cores_of(pid: int) -> list[set[int]]:
    """Where each thread of a process may run."""
    return [os.sched_getaffinity(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")]


@pytest.mark.skipif(available_cores() < 2, reason="two ranks have no cores of their own on a machine of one")
@pytest.mark.parametrize("way", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_each_rank_stays_on_cores_of_its_own(model: Path, way: str) -> None:
    before = os.sched_getaffinity(0)
    with engine(model, **{way: 2}) as llm:
        assert isinstance(llm.loop.pipe, Ranks)
        own, group = llm.loop.pipe.cores.cpus, llm.loop.pipe._group
        assert group is not None and (group.tensor is None or group.tensor.struct.reads_ahead)
        (follower,) = {frozenset(each) for each in cores_of(llm.pids[1])}
        assert len(own) == len(follower) == 1 and not own & follower
        seen: list[set[int]] = []
        run = llm.loop.pipe._own_runner.run
        llm.loop.pipe._own_runner.run = lambda *plan: (seen.append(os.sched_getaffinity(0)), run(*plan))[1]
        llm.generate(PROMPTS, SHORT)
        assert seen and all(each == own for each in seen)
        assert os.sched_getaffinity(0) == before  # the user's thread is the user's
    with engine(model, **{way: 2, "pin_threads": False}) as llm:
        assert isinstance(llm.loop.pipe, Ranks)
        group = llm.loop.pipe._group
        assert group is not None and (group.tensor is None or not group.tensor.struct.reads_ahead)
        assert all(each == before for each in cores_of(llm.pids[1]))


def steps_until_failure(llm: LLM, after: int, what: Callable[[], None]) -> QuireError:
    for index, prompt in enumerate(PROMPTS):
        llm.add_request({"prompt_token_ids": prompt, "max_tokens": 400, "ignore_eos": True, "request_id": str(index)})
    with pytest.raises(RequestFailed) as found:
        for step in range(10_000):
            if step == after:
                what()
            llm.step()
    return found.value


LAYOUTS = [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_rank_that_is_killed_is_named_with_how_it_ended(model: Path, layout: dict[str, int]) -> None:
    with engine(model, **layout) as llm:
        error = steps_until_failure(llm, 20, lambda: os.kill(llm.pids[1], signal.SIGKILL))
        assert str(error) == (
            "this engine has lost a rank and cannot go on (rank 1 of this engine ended by signal 9); make a new one"
        )
        with pytest.raises(RequestFailed, match="make a new one"):  # and so it says to whoever asks again
            llm.step()


def test_a_rank_that_is_stopped_is_given_up(model: Path) -> None:
    with engine(model, tensor_parallel_size=2) as llm:
        began = time.monotonic()
        error = steps_until_failure(llm, 20, lambda: os.kill(llm.pids[1], signal.SIGSTOP))
        assert "(rank 1 is gone (it has not answered for 5 s))" in str(error)
        assert time.monotonic() - began < 20


def test_a_rank_that_pauses_for_a_second_changes_nothing(model: Path) -> None:
    with engine(model, tensor_parallel_size=2) as llm:
        whole = [each.outputs[0].token_ids for each in llm.generate(PROMPTS, LONG)]
        timer = threading.Timer(1.0, os.kill, (llm.pids[1], signal.SIGCONT))
        os.kill(llm.pids[1], signal.SIGSTOP)
        timer.start()
        again = [each.outputs[0].token_ids for each in llm.generate(PROMPTS, LONG)]
        timer.join()
        assert again == whole


def test_a_new_engine_stands_beside_one_that_is_lost(model: Path) -> None:
    with engine(model, tensor_parallel_size=2, page_parallel_size=2) as lost:
        expected = [each.outputs[0].token_ids for each in lost.generate(PROMPTS, SHORT)]
        steps_until_failure(lost, 3, lambda: os.kill(lost.pids[1], signal.SIGKILL))
        with engine(model, tensor_parallel_size=2, page_parallel_size=2) as llm:
            assert [each.outputs[0].token_ids for each in llm.generate(PROMPTS, SHORT)] == expected


def test_an_engine_that_is_dropped_leaves_nothing(model: Path) -> None:
    before = leftovers()
    llm = LLM(str(model), **SMALL, pipeline_parallel_size=2)
    llm.generate(PROMPTS[:1], SHORT)
    del llm
    comes_to(before)


def test_an_engine_that_cannot_load_says_why_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-4096])
    before = leftovers()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        LLM(str(tmp_path), **SMALL, tensor_parallel_size=2)
    comes_to(before)

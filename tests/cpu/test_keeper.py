"""A keeper and its worker: registration, epochs, fences, the breaker, and that no worker outlives its keeper."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.keeper import Keeper
from cluster.processes import Child, command, environment, package_homes
from cluster.wire import Link, Peer, listen
from launch.models.tiny_llama import make_tiny_llama
from pagetable.frames import Kind
from quire_pb.worker.v1 import worker_pb2 as pb

SECRET = bytes(range(32))
SECONDS = 60.0  # generous: only order is asserted

# What a keeper sees of a worker, without a model. `argv[1]` says how it behaves.
FAKE = """
import json, os, sys
from quire_pb.worker.v1 import worker_pb2 as pb
settings = json.loads(sys.stdin.readline())
how = sys.argv[1]
if how == "refuses":
    print(json.dumps({"failed": {"code": "FAILED_PRECONDITION", "message": "config.json: not a model"}}), flush=True)
    sys.exit(1)
if how == "crashes":
    os.abort()
print("not json", flush=True)
print(json.dumps({"loading": [1, 2]}), flush=True)
info = pb.ShardInfo(shard_id=settings["shard_id"], epoch=settings["epoch"], pid=os.getpid(), address="127.0.0.1:1")
print(json.dumps({"ready": info.SerializeToString().hex()}), flush=True)
if how == "dies":
    os._exit(3)
sys.stdin.read()
"""


class Scheduler:
    """The scheduler's side: what keepers registered, and a way to fence."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int]] = []  # (epoch, condition), changes only
        self.peer: Peer | None = None
        self.info = pb.ShardInfo()

    async def serve(self, peer: Peer) -> None:
        self.peer = peer
        async for kind, payload in peer.frames():
            assert kind is Kind.REGISTER
            found = pb.Register.FromString(payload)
            self.info = found.info
            if not self.registered or self.registered[-1] != (found.info.epoch, found.condition):
                self.registered.append((found.info.epoch, found.condition))

    def fence(self, epoch: int, shard_id: int = 7) -> None:
        assert self.peer is not None
        self.peer.send(Kind.FENCE, pb.Fence(shard_id=shard_id, epoch=epoch, why="test"))

    async def until(self, count: int) -> None:
        await until(lambda: len(self.registered) >= count)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def keeping(
    how: str, now: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[tuple[Scheduler, list[dict[str, Any]], asyncio.Task[int]]]:
    scheduler = Scheduler()
    address, listener = await listen("127.0.0.1", 0, SECRET, [pb.ROLE_KEEPER], scheduler.serve)
    said: list[dict[str, Any]] = []
    settings = {"scheduler": address, "secret": SECRET.hex(), "worker": {"shard_id": 7}}
    keeper = Keeper(settings, lambda **line: said.append(line), [sys.executable, "-c", FAKE, how], now)
    task = asyncio.create_task(keeper.run())
    try:
        yield scheduler, said, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listener.close()


def test_a_worker_is_registered_and_ends_with_its_keeper() -> None:
    async def run() -> None:
        async with keeping("lives") as (scheduler, said, task):
            await scheduler.until(1)
            pid, epoch = scheduler.info.pid, scheduler.info.epoch
            assert scheduler.registered == [(epoch, pb.CONDITION_READY)]
            assert said == [{"loading": [1, 2]}, {"ready": {"shard_id": 7, "epoch": epoch, "pid": pid}}]
            assert is_alive(pid)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert not is_alive(pid)

    asyncio.run(run())


def test_a_killed_worker_comes_back_in_the_next_epoch_and_is_dead_in_between() -> None:
    async def run() -> None:
        async with keeping("lives") as (scheduler, said, _):
            await scheduler.until(1)
            first = scheduler.info.epoch
            os.kill(scheduler.info.pid, signal.SIGKILL)
            await scheduler.until(3)
            ready, dead = pb.CONDITION_READY, pb.CONDITION_DEAD
            assert scheduler.registered == [(first, ready), (first, dead), (first + 1, ready)]
            pid = scheduler.info.pid
            assert said[2:] == [
                {"died": {"shard_id": 7, "epoch": first, "status": -9}},
                {"restarted": {"shard_id": 7, "epoch": first + 1, "pid": pid}},
            ]

    asyncio.run(run())


def test_a_fence_kills_the_epoch_it_names_even_when_stopped_and_no_other() -> None:
    async def run() -> None:
        async with keeping("lives") as (scheduler, _said, _):
            await scheduler.until(1)
            first, pid = scheduler.info.epoch, scheduler.info.pid
            scheduler.fence(first - 1)
            scheduler.fence(first + 1)
            scheduler.fence(first, shard_id=8)
            os.kill(pid, signal.SIGSTOP)
            scheduler.fence(first)
            await scheduler.until(3)
            assert not is_alive(pid)
            scheduler.fence(first)  # late: that epoch is over
            await asyncio.sleep(0.5)
            assert is_alive(scheduler.info.pid)
            assert [epoch for epoch, _ in scheduler.registered] == [first, first, first + 1]

    asyncio.run(run())


def test_three_deaths_in_a_minute_open_the_breaker() -> None:
    async def run() -> None:
        async with keeping("dies") as (scheduler, said, task):
            await until(lambda: any("down" in line for line in said))
            await until(lambda: bool(scheduler.registered) and scheduler.registered[-1][1] == pb.CONDITION_DEAD)
            assert [line["died"]["status"] for line in said if "died" in line] == [3, 3, 3]
            assert said[-1]["down"] == {
                "shard_id": 7,
                "message": "the worker of shard 7 died 3 times in 60 s and stays down",
            }
            assert not task.done()

    asyncio.run(run())


def test_deaths_that_are_far_apart_leave_the_breaker_closed() -> None:
    clock = iter(range(0, 10_000, 31))

    async def run() -> None:
        async with keeping("dies", lambda: float(next(clock))) as (_scheduler, said, _):
            await until(lambda: sum("died" in line for line in said) >= 5)
            assert not any("down" in line for line in said)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("how", "failed", "deaths"),
    [
        ("refuses", {"code": "FAILED_PRECONDITION", "message": "config.json: not a model"}, 1),
        (
            "crashes",
            {"code": "INTERNAL", "message": "the worker of shard 7 died 3 times in 60 s before it was ready"},
            3,
        ),
    ],
)
def test_a_worker_that_never_came_up_ends_the_keeper(how: str, failed: dict[str, str], deaths: int) -> None:
    async def run() -> None:
        async with keeping(how) as (scheduler, said, task):
            assert await asyncio.wait_for(task, SECONDS) == 1
            assert said[-1] == {"failed": failed}
            assert sum("died" in line for line in said) == deaths
            assert scheduler.registered == []

    asyncio.run(run())


def test_a_scheduler_in_its_next_life_hears_of_the_shard_again() -> None:
    async def run() -> None:
        async with keeping("lives") as (scheduler, said, _):
            await scheduler.until(1)
            assert scheduler.peer is not None
            scheduler.peer.close()
            scheduler.registered.clear()
            await scheduler.until(1)
            assert scheduler.registered == [(scheduler.info.epoch, pb.CONDITION_READY)]
            assert sum("ready" in line for line in said) == 1

    asyncio.run(run())


def test_the_status_of_a_child_that_has_just_died_survives_a_kill_that_comes_too_late() -> None:
    # a fence for a worker that is already dead; asyncio's own send_signal would reap it and report 255
    async def run() -> None:
        code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        for _ in range(20):
            child = await Child.start([sys.executable, "-S", "-c", code], {}, environment())
            assert [line async for line in child.lines()] == []
            child.kill()
            child.terminate()
            assert await child.wait() == -9

    asyncio.run(run())


KEEP = """
import asyncio, sys
from cluster.keeper import main
def say(**line):
    print(line, flush=True)
worker = {worker!r}
asyncio.run(main(dict(scheduler=sys.argv[1], secret="{secret}", worker=worker, env={{"OMP_NUM_THREADS": "1"}}), say))
"""


def test_a_real_worker_serves_its_epoch_and_dies_with_a_killed_keeper(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    worker = {
        "folder": str(tmp_path),
        "shard_id": 7,
        "device_id": 3,
        "dtype": "float32",
        "model": "tiny",
        "threads": 1,
        "shard": {"num_blocks": 64, "max_model_len": 256, "max_num_seqs": 8},
    }

    async def run() -> None:
        scheduler = Scheduler()
        address, listener = await listen("127.0.0.1", 0, SECRET, [pb.ROLE_KEEPER], scheduler.serve)
        code = KEEP.format(worker=worker, secret=SECRET.hex())
        keeper = await Child.start([sys.executable, "-c", code, address], {}, environment())
        await scheduler.until(1)
        info = scheduler.info
        assert (info.shard_id, list(info.device_ids), info.num_blocks, info.model) == (7, [3], 64, "tiny")
        link = await Link.connect(info.address, pb.ROLE_FRONT, "front", SECRET)
        async for kind, payload in link.frames():
            assert kind is Kind.WELCOME
            assert pb.Welcome.FromString(payload).shard == info
            break
        keeper.kill()
        await keeper.wait()
        await until(lambda: not is_alive(info.pid))
        await listener.close()

    asyncio.run(run())


def test_a_folder_of_the_same_name_does_not_replace_ours(tmp_path: Path) -> None:
    for name in package_homes():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(77)")
        (tmp_path / name / "__main__.py").write_text("raise SystemExit(77)")

    async def run() -> None:
        here = os.getcwd()
        os.chdir(tmp_path)
        try:
            child = await Child.start(command("worker"), {"folder": "nowhere"}, environment())
        finally:
            os.chdir(here)
        # ours starts and finds no model; theirs would exit before that with another status
        (line,) = [line async for line in child.lines()]
        assert "'nowhere' is no folder" in line["failed"]["message"]
        assert await child.wait() == 1

    asyncio.run(run())


def test_our_packages_have_homes() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    homes = {name: root / name for name in ("cluster", "kernels", "pagetable", "worker")}
    homes["quire_pb"] = root / "proto" / "quire_pb"
    assert package_homes() == {name: str(home) for name, home in homes.items()}

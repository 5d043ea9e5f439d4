"""A keeper whose worker leads several ranks: an epoch that the worker ended itself costs it nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cluster.keeper import Keeper
from cluster.wire import listen
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.cpu.test_keeper import SECRET, Scheduler, is_alive, until

# A leader without ranks: SIGUSR1 is the loss of one of them, and the next epoch.
FAKE = """
import json, os, signal, sys
from quire_pb.worker.v1 import worker_pb2 as pb
settings = json.loads(sys.stdin.readline())
info = pb.ShardInfo(shard_id=settings["shard_id"], epoch=settings["epoch"], pid=os.getpid(), address="127.0.0.1:1")
def ready():
    print(json.dumps({"ready": info.SerializeToString().hex()}), flush=True)
def over(*_):
    print(json.dumps({"over": "rank 1 is gone"}), flush=True)
    info.epoch += 1
    ready()
signal.signal(signal.SIGUSR1, over)
ready()
while True:
    signal.pause()
"""


@asynccontextmanager
async def keeping() -> AsyncIterator[tuple[Scheduler, list[dict[str, Any]]]]:
    scheduler = Scheduler()
    address, listener = await listen("127.0.0.1", 0, SECRET, [pb.ROLE_KEEPER], scheduler.serve)
    said: list[dict[str, Any]] = []
    worker = {"shard_id": 7, "rank": 0, "leader": ["127.0.0.1", 1]}
    settings = {"scheduler": address, "secret": SECRET.hex(), "worker": worker}
    keeper = Keeper(settings, lambda **line: said.append(line), [sys.executable, "-c", FAKE])
    task = asyncio.create_task(keeper.run())
    try:
        yield scheduler, said
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await listener.close()


def test_a_fence_that_is_quicker_than_the_word_that_an_epoch_is_over_kills_nobody() -> None:
    """The leader parts from the scheduler when it has lost a rank, and that sees it first."""

    async def run() -> None:
        async with keeping() as (scheduler, said):
            await scheduler.until(1)
            first, pid = scheduler.info.epoch, scheduler.info.pid
            scheduler.fence(first)
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGUSR1)
            await until(lambda: any("restarted" in line for line in said))
            await asyncio.sleep(1.0)
            assert is_alive(pid) and (scheduler.info.epoch, scheduler.info.pid) == (first + 1, pid)
            assert [line for line in said if "died" in line] == []
            assert {"over": {"shard_id": 7, "epoch": first, "why": "rank 1 is gone"}} in said

    asyncio.run(run())


def test_a_leader_that_says_nothing_about_its_fence_is_killed() -> None:
    async def run() -> None:
        async with keeping() as (scheduler, said):
            await scheduler.until(1)
            first, pid = scheduler.info.epoch, scheduler.info.pid
            os.kill(pid, signal.SIGSTOP)
            scheduler.fence(first)
            await scheduler.until(3)
            assert not is_alive(pid) and scheduler.info.epoch == first + 1
            assert {"died": {"shard_id": 7, "epoch": first, "status": -9}} in said

    asyncio.run(run())

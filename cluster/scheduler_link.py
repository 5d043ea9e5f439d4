"""A front's connection to the global scheduler: asked where to run and what there is; told of lost shards.

It is dialed again for as long as it takes; what runs does not need it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count
from typing import Any

from google.protobuf.message import DecodeError

from cluster.wire import Link
from pagetable.errors import ServiceError
from pagetable.frames import Kind
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 0.5


class SchedulerLink:
    """Use from one event loop.

    Args:
        address: host:port; a restarted scheduler has the same.
        on_shards: told of every Shards message.
    """

    def __init__(self, address: str, secret: bytes, name: str, on_shards: Callable[[pb.Shards], None]) -> None:
        self._address, self._secret, self._name, self._on_shards = address, secret, name, on_shards
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._since = 0.0
        self._tickets = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        delay = MIN_RETRY_SECONDS
        while True:
            try:
                self._link = await Link.connect(self._address, pb.ROLE_FRONT, self._name, self._secret)
                self._since = asyncio.get_running_loop().time()
                self._up.set()
                async for kind, payload in self._link.frames():
                    delay = MIN_RETRY_SECONDS
                    self._take(kind, payload)
            except OSError:
                pass
            except DecodeError:
                _log.warning("the scheduler sends what is no message of ours")
            finally:
                self._lose()
            await asyncio.sleep(delay)
            delay = min(MAX_RETRY_SECONDS, 2 * delay)

    @property
    def seconds_up(self) -> float:
        """Since when the connection stands; 0 where it does not."""
        return asyncio.get_running_loop().time() - self._since if self._up.is_set() else 0.0

    async def place(self, place: pb.Place, seconds: float) -> pb.Placed:
        """Where should this run? Fills in the ticket. Raises ServiceError UNAVAILABLE where nobody answers in time."""
        placed: pb.Placed = await self._ask(Kind.PLACE, place, seconds)
        return placed

    async def query(self, query: pb.Query, seconds: float) -> bytes:
        """The public response, serialized. Raises ServiceError: what the scheduler refuses, or UNAVAILABLE."""
        answer: pb.Answer = await self._ask(Kind.QUERY, query, seconds)
        if answer.code:
            raise ServiceError(answer.code, answer.message)
        return answer.body

    def report(self, shard_id: int, epoch: int, why: str) -> None:
        """A shard's connection is gone."""
        if self._link is not None:
            self._link.send(Kind.REPORT, pb.Report(shard_id=shard_id, epoch=epoch, why=why))

    async def _ask(self, kind: Kind, message: Any, seconds: float) -> Any:
        """Ask again on a new connection where one ends before the answer."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._up.wait()
                    assert self._link is not None
                    message.ticket = ticket = next(self._tickets)
                    future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
                    self._link.send(kind, message)
                    try:
                        return await future
                    except ConnectionError:
                        continue
                    finally:
                        self._waiting.pop(ticket, None)
        except TimeoutError:
            text = f"the cluster's scheduler did not answer for {seconds:.0f} s; try again in a few seconds"
            raise ServiceError("UNAVAILABLE", text) from None

    def _take(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.SHARDS:
            self._on_shards(pb.Shards.FromString(payload))
        elif kind is Kind.PLACED:
            self._answer(pb.Placed.FromString(payload))
        elif kind is Kind.ANSWER:
            self._answer(pb.Answer.FromString(payload))

    def _answer(self, message: Any) -> None:
        future = self._waiting.pop(message.ticket, None)
        if future is not None and not future.done():  # else who asked has left
            future.set_result(message)

    def _lose(self) -> None:
        self._up.clear()
        if self._link is not None:
            self._link.close()
            self._link = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the scheduler's connection ended"))
        self._waiting.clear()

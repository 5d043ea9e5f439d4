"""For tests of the running service: process trees and sockets from /proc, and a gRPC client of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from quire_pb.inference.v1 import inference_pb2 as public
from quire_pb.inference.v1 import inference_pb2_grpc as services

SECONDS = 120.0  # generous: tests assert order, never times


async def until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


class Processes:
    """Every process that was ever seen below `root`, by (pid, start time)."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.known: set[tuple[int, str]] = set()
        self.look()

    def look(self) -> list[int]:
        """The pids below root now; they are remembered."""
        table = _table()
        below: set[int] = {self.root}
        grown = True
        while grown:
            found = {pid for pid, (parent, _) in table.items() if parent in below} - below
            below |= found
            grown = bool(found)
        below.discard(self.root)
        self.known |= {(pid, table[pid][1]) for pid in below}
        return sorted(below)

    def left(self) -> list[str]:
        """Command lines of those that are still there, wherever they hang now."""
        table = _table()
        return [command_line(pid) for pid, start in sorted(self.known) if table.get(pid, (0, ""))[1] == start]


def _table() -> dict[int, tuple[int, str]]:
    """pid -> (parent, start time), without zombies."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            table[int(folder.name)] = int(fields[1]), fields[19]
    return table


def children(pid: int) -> list[int]:
    return sorted(child for child, (parent, _) in _table().items() if parent == pid)


def is_alive(pid: int) -> bool:
    return pid in _table()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def files(pid: int, kind: str = "") -> set[str]:
    """What the process's descriptors stand for, each with its number; `kind` is how it begins, e.g. `pipe:`."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith(kind):
                found.add(f"{fd} {target}")
    return found


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of each TCP socket that the process listens on."""
    inodes = {target.partition("[")[2][:-1] for target in files(pid, "socket:")}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """As the kernel writes it: 32-bit words in the machine's order."""
    if text.startswith("0" * 16 + "FFFF0000"):  # grpc's sockets are of IPv6, for an address of IPv4
        text = text[24:]
    if len(text) == 8:
        return ".".join(str(byte) for byte in bytes.fromhex(text)[::-1])
    return {"0" * 32: "::", "0" * 24 + "01000000": "::1"}.get(text, text)


class Stream:
    """One Generate call of one sample: its tokens as they come.

    Attributes:
        error, failure, details: what it ended with, its status and text, where it did not end well.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        stub = services.InferenceServiceStub(channel)
        sampling = public.SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True)
        request = public.GenerateRequest(token_ids=public.TokenIds(ids=prompt), sampling=sampling)
        self.tokens: list[int] = []
        self.finished: public.Finished | None = None
        self.error: grpc.aio.AioRpcError | None = None
        self.failure: grpc.StatusCode | None = None
        self.details = ""
        self._call = stub.Generate(request, timeout=SECONDS)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for response in self._call:
                if response.HasField("delta"):
                    self.tokens.extend(response.delta.token_ids)
                elif response.HasField("finished"):
                    self.finished = response.finished
        except grpc.aio.AioRpcError as error:
            self.error, self.failure, self.details = error, error.code(), error.details() or ""

    async def reaches(self, count: int) -> None:
        await until(lambda: len(self.tokens) >= count or self.task.done())
        assert len(self.tokens) >= count, (self.failure, self.details)

"""The global scheduler over real sockets and as a process; shards, keepers and fronts are played by the tests."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import signal
import socket
import struct
import sys
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from cluster import wire
from cluster.scheduler import SchedulerConfig
from cluster.scheduler_server import SchedulerServer
from cluster.wire import Link, Listener, Peer, listen
from pagetable.frames import BadFrame, Kind, encode_frame, prove
from quire_pb.memory.v1 import memory_pb2
from quire_pb.worker.v1 import worker_pb2 as pb

SECRET = bytes(range(32))
PATIENCE = 20.0


class FakeShard:
    """What a shard says on its socket: Welcome, one whole Events, Pong to each Ping until it is told to be silent."""

    def __init__(self, shard_id: int, epoch: int) -> None:
        self.info = pb.ShardInfo(
            shard_id=shard_id,
            epoch=epoch,
            block_size=4,
            num_blocks=64,
            max_model_len=200,
            max_num_seqs=8,
            device_ids=[shard_id],
            identity=b"m",
        )
        self.silent = False
        self.peer: Peer | None = None
        self.number = 0
        self.dialed = 0
        self.listener: Listener

    async def start(self) -> FakeShard:
        self.info.address, self.listener = await listen("127.0.0.1", 0, SECRET, {pb.ROLE_SCHEDULER}, self._serve)
        return self

    async def _serve(self, peer: Peer) -> None:
        self.dialed += 1
        self.peer, self.number = peer, 0
        peer.send(Kind.WELCOME, pb.Welcome(shard=self.info))
        self.tell(
            whole=True,
            started=[pb.Started(sequence=1, request_id="r", owner="o", prompt_tokens=3)],
            entry_sequence=[1],
            entry_index=[0],
            entry_device=[self.info.shard_id],
            entry_block=[self.info.epoch],
        )
        async for kind, payload in peer.frames():
            assert kind is Kind.PING
            if not self.silent:
                peer.send(Kind.PONG, pb.Pong(number=pb.Ping.FromString(payload).number, epoch=self.info.epoch))

    def tell(self, **fields: Any) -> None:
        assert self.peer is not None
        self.number += 1
        load = pb.Load(free_blocks=64)
        self.peer.send(Kind.EVENTS, pb.Events(epoch=self.info.epoch, number=self.number, load=load, **fields))


class Teller:
    """A dialed connection whose frames are waited for by kind."""

    def __init__(self, link: Link) -> None:
        self.link, self._frames = link, link.frames()

    async def get(self, kind: Kind, wanted: Callable[[Any], bool] = lambda message: True) -> Any:
        types: dict[Kind, type[Message]] = {
            Kind.SHARDS: pb.Shards,
            Kind.PLACED: pb.Placed,
            Kind.ANSWER: pb.Answer,
            Kind.FENCE: pb.Fence,
        }
        async with asyncio.timeout(PATIENCE):
            async for found, payload in self._frames:
                if found is kind:
                    message = types[kind].FromString(payload)
                    if wanted(message):
                        return message
        raise AssertionError(f"the connection ended ({self.link.why}) before {kind.name}")

    async def ended(self) -> str:
        async with asyncio.timeout(PATIENCE):
            async for _ in self._frames:
                pass
        return self.link.why

    async def place(self, ticket: int, **fields: Any) -> pb.Placed:
        prompt = array("i", [1, 2, 3]).tobytes()
        self.link.send(Kind.PLACE, pb.Place(ticket=ticket, prompt=prompt, samples=1, max_tokens=4, **fields))
        placed = await self.get(Kind.PLACED, lambda placed: placed.ticket == ticket)
        assert isinstance(placed, pb.Placed)
        return placed

    async def pages(self, owner: str) -> list[tuple[str, int, list[int]]]:
        self.link.send(Kind.QUERY, pb.Query(ticket=1, page_map=True, owner=owner))
        answer = memory_pb2.GetPageMapResponse.FromString((await self.get(Kind.ANSWER)).body)
        return [(s.request_id, s.shard_id, [page.block_id for page in s.pages]) for s in answer.sequences]


class Stage:
    """A scheduler, its config quick, and whatever dials it."""

    def __init__(self) -> None:
        self.server = SchedulerServer(SECRET, SchedulerConfig(lease=1.0, grace=1.0, tick=0.1))
        self.address = ""
        self.keepers: list[asyncio.Task[None]] = []
        self.fences: list[tuple[int, int]] = []
        self.shards: list[FakeShard] = []

    async def dial(self, role: pb.Role, name: str = "x", secret: bytes = SECRET) -> Teller:
        return Teller(await Link.connect(self.address, role, name, secret))

    async def add_shard(self, shard_id: int, epoch: int) -> FakeShard:
        shard = await FakeShard(shard_id, epoch).start()
        self.shards.append(shard)
        self.keepers.append(asyncio.create_task(self._keep(shard)))
        return shard

    async def _keep(self, shard: FakeShard) -> None:
        """A keeper's part: stay connected, register, hear fences."""
        while True:
            try:
                link = await Link.connect(self.address, pb.ROLE_KEEPER, f"keeper-{shard.info.shard_id}", SECRET)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            repeat = asyncio.create_task(self._register(link, shard))
            async for kind, payload in link.frames():
                assert kind is Kind.FENCE
                fence = pb.Fence.FromString(payload)
                self.fences.append((fence.shard_id, fence.epoch))
            repeat.cancel()

    async def _register(self, link: Link, shard: FakeShard) -> None:
        while True:
            link.send(Kind.REGISTER, pb.Register(info=shard.info, condition=pb.CONDITION_READY))
            await asyncio.sleep(0.2)


def staged(body: Callable[[Stage], Awaitable[None]]) -> None:
    """Run a test on a stage, and take the stage down."""

    async def run() -> None:
        stage = Stage()
        stage.address = await stage.server.start("127.0.0.1", 0)
        try:
            async with asyncio.timeout(60):
                await body(stage)
        finally:
            for task in stage.keepers:
                task.cancel()
            await stage.server.close()
            for shard in stage.shards:
                await shard.listener.close()
            await asyncio.gather(*stage.keepers, return_exceptions=True)

    asyncio.run(run())


def ready(*shards: FakeShard) -> Callable[[pb.Shards], bool]:
    wanted = {(shard.info.shard_id, shard.info.epoch, pb.CONDITION_READY) for shard in shards}
    return lambda told: {(s.info.shard_id, s.info.epoch, s.condition) for s in told.shards} == wanted


def test_a_front_hears_of_shards_places_and_asks() -> None:
    async def body(stage: Stage) -> None:
        front = await stage.dial(pb.ROLE_FRONT)
        assert (await front.get(Kind.SHARDS)) == pb.Shards()
        first, second = await stage.add_shard(0, 5), await stage.add_shard(1, 6)
        told = await front.get(Kind.SHARDS, ready(first, second))
        assert [state.info for state in told.shards] == [first.info, second.info]
        placed = [await front.place(ticket) for ticket in (1, 2)]
        assert [(p.shard_id, p.epoch, p.address) for p in placed] == [
            (0, 5, first.info.address),
            (1, 6, second.info.address),
        ]
        assert (await front.place(3, exclude=[0, 1])).code == "UNAVAILABLE"
        assert await front.pages("o") == [("r", 0, [5]), ("r", 1, [6])]
        assert await front.pages("other") == []
        admin = await stage.dial(pb.ROLE_ADMIN)
        assert await admin.pages("") == [("r", 0, [5]), ("r", 1, [6])]

    staged(body)


def test_a_shard_that_hangs_up_is_dead_and_fenced_and_its_next_life_is_taken() -> None:
    async def body(stage: Stage) -> None:
        shard = await stage.add_shard(0, 5)
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(shard))
        assert shard.peer is not None
        shard.peer.close()
        dead = await front.get(Kind.SHARDS)
        assert [(s.info.epoch, s.condition) for s in dead.shards] == [(5, pb.CONDITION_DEAD)]
        assert (await front.place(1)).code == "UNAVAILABLE"
        assert stage.fences[:1] == [(0, 5)]
        shard.info.epoch = 6
        await front.get(Kind.SHARDS, ready(shard))
        assert await front.pages("") == [("r", 0, [6])]

    staged(body)


def test_a_silent_shard_is_given_up_after_lease_and_grace() -> None:
    async def body(stage: Stage) -> None:
        quiet, lively = await stage.add_shard(0, 5), await stage.add_shard(1, 5)
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(quiet, lively))
        quiet.silent = True
        dead = await front.get(Kind.SHARDS)
        assert [s.condition for s in dead.shards] == [pb.CONDITION_DEAD, pb.CONDITION_READY]
        assert {(await front.place(ticket)).shard_id for ticket in range(1, 5)} == {1}
        while not stage.fences:
            await asyncio.sleep(0.02)
        assert set(stage.fences) == {(0, 5)}

    staged(body)


def test_a_new_scheduler_at_the_same_port_knows_all_again_and_nobody_is_fenced() -> None:
    async def body(stage: Stage) -> None:
        shards = [await stage.add_shard(number, 5 + number) for number in range(3)]
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(*shards))
        shards[1].tell(started=[pb.Started(sequence=2, request_id="s", owner="o")])
        before = [("r", 0, [5]), ("r", 1, [6]), ("s", 1, []), ("r", 2, [7])]
        while await front.pages("") != before:
            await asyncio.sleep(0.02)
        await stage.server.close()
        assert await front.ended() == "the peer hung up"
        host, port = stage.address.split(":")
        stage.server = SchedulerServer(SECRET, SchedulerConfig(lease=1.0, grace=1.0, tick=0.1))
        assert await stage.server.start(host, int(port)) == stage.address
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(*shards))
        assert await front.pages("") == [row for row in before if row[0] != "s"]  # these shards always begin with `r`
        assert [shard.dialed for shard in shards] == [2, 2, 2] and stage.fences == []

    staged(body)


def test_a_shard_whose_events_have_a_gap_is_dialed_again() -> None:
    async def body(stage: Stage) -> None:
        shard = await stage.add_shard(0, 5)
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(shard))
        shard.number += 1
        shard.tell()
        await front.get(Kind.SHARDS, lambda told: told.shards[0].condition == pb.CONDITION_UNSPECIFIED)
        await front.get(Kind.SHARDS, ready(shard))
        assert shard.dialed == 2 and stage.fences == [] and stage.server.core.num_deaths == 0

    staged(body)


# Strangers


def hello(nonce: bytes, role: pb.Role = pb.ROLE_FRONT, secret: bytes = SECRET) -> bytes:
    proof = prove(secret, nonce, role, "x")
    return encode_frame(Kind.HELLO, pb.Hello(role=role, name="x", proof=proof).SerializeToString())


BAD: dict[str, Callable[[bytes], bytes]] = {
    "random": lambda nonce: random.Random(1).randbytes(4096),
    "pickle": lambda nonce: pickle.dumps({"os": os.getcwd}),
    "length 2**63": lambda nonce: struct.pack("<Q", 1 << 63),
    "length 2**32-1": lambda nonce: b"\xff\xff\xff\xff",
    "length 0": lambda nonce: b"\0\0\0\0",
    "a hello of a megabyte": lambda nonce: struct.pack("<IB", 1 << 20, Kind.HELLO),
    "http": lambda nonce: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown kind": lambda nonce: struct.pack("<IB", 1, 99),
    "no hello first": lambda nonce: encode_frame(Kind.PLACE, b""),
    "hello of garbage": lambda nonce: encode_frame(Kind.HELLO, b"\xff\xff\xff"),
    "wrong secret": lambda nonce: hello(nonce, secret=b"x" * 32),
    "another nonce": lambda nonce: hello(bytes(16)),
    "a role that is none": lambda nonce: hello(nonce, pb.ROLE_UNSPECIFIED),
    "a role that does not come in": lambda nonce: hello(nonce, pb.ROLE_SCHEDULER),
    "bad frame behind a good hello": lambda nonce: hello(nonce) + struct.pack("<I", 1 << 31),
    "a frame that its role may not send": lambda nonce: hello(nonce) + encode_frame(Kind.REGISTER, b""),
    "a keeper that places": lambda nonce: hello(nonce, pb.ROLE_KEEPER) + encode_frame(Kind.PLACE, b""),
    "a payload of garbage": lambda nonce: hello(nonce) + encode_frame(Kind.PLACE, b"\xff\xff\xff"),
}


async def raw(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    head = await reader.readexactly(5)
    payload = await reader.readexactly(struct.unpack("<I", head[:4])[0] - 1)
    assert head[4] == Kind.CHALLENGE
    return reader, writer, pb.Challenge.FromString(payload).nonce


@pytest.mark.parametrize("name", BAD)
def test_a_stranger_is_cut_off_and_hurts_nobody(name: str) -> None:
    async def body(stage: Stage) -> None:
        shard = await stage.add_shard(0, 5)
        front = await stage.dial(pb.ROLE_FRONT)
        await front.get(Kind.SHARDS, ready(shard))
        reader, writer, nonce = await raw(stage.address)
        writer.write(BAD[name](nonce))
        try:
            async with asyncio.timeout(PATIENCE):
                while await reader.read(65536):
                    pass
        except ConnectionResetError:  # it was closed with bytes of ours unread
            pass
        writer.close()
        assert (await front.place(1)).placed
        assert stage.server.core.num_deaths == 0

    staged(body)


def test_who_says_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HELLO_SECONDS", 0.3)

    async def body(stage: Stage) -> None:
        reader, writer, _ = await raw(stage.address)
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b""
        writer.close()

    staged(body)


def test_nonces_are_never_the_same() -> None:
    async def body(stage: Stage) -> None:
        nonces = set()
        for _ in range(20):
            _, writer, nonce = await raw(stage.address)
            nonces.add(nonce)
            writer.close()
        assert len(nonces) == 20 and {len(nonce) for nonce in nonces} == {16}

    staged(body)


# The wire


async def pair() -> tuple[Link, Peer, Listener]:
    arrived: asyncio.Queue[Peer] = asyncio.Queue()
    over = asyncio.Event()

    async def on_peer(peer: Peer) -> None:
        arrived.put_nowait(peer)
        await over.wait()

    address, listener = await listen("127.0.0.1", 0, SECRET, {pb.ROLE_FRONT}, on_peer)
    link = await Link.connect(address, pb.ROLE_FRONT, "f", SECRET)
    return link, await arrived.get(), listener


async def numbers(link: Link, count: int) -> AsyncIterator[int]:
    frames = link.frames()
    for _ in range(count):
        kind, payload = await anext(frames)
        assert kind is Kind.PING
        yield pb.Ping.FromString(payload).number


def test_frames_come_whole_and_in_order_both_ways() -> None:
    async def run() -> None:
        link, peer, listener = await pair()
        assert (peer.role, peer.name) == (pb.ROLE_FRONT, "f")
        for number in range(5000):
            link.send(Kind.PING, pb.Ping(number=number))
            peer.send(Kind.PING, pb.Ping(number=number + 1))
        assert [n async for n in numbers(peer, 5000)] == list(range(5000))
        assert [n async for n in numbers(link, 5000)] == list(range(1, 5001))
        link.send(Kind.PING, pb.Ping(number=7))
        link.close()
        assert [pb.Ping.FromString(payload).number async for _, payload in peer.frames()] == [7]
        assert (peer.why, link.why, link.is_open) == ("the peer hung up", "closed here", False)
        link.send(Kind.PING, pb.Ping())  # nothing happens
        await listener.close()

    asyncio.run(run())


def test_a_peer_that_does_not_read_is_cut_off_and_a_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_UNREAD_BYTES", 1 << 20)
    monkeypatch.setattr(wire, "MAX_UNSENT_BYTES", 32 << 20)
    big = pb.Answer(body=bytes(1 << 20))

    async def run() -> None:
        link, peer, listener = await pair()
        for _ in range(20):  # more than what waits unread; the socket's buffers and ours take the rest
            peer.send(Kind.ANSWER, big)
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        assert peer.is_open and link._unread <= (1 << 20) + (2 << 20)
        count = 0
        async for _ in link.frames():
            count += 1
            if count == 20:
                break
        for _ in range(200):
            peer.send(Kind.ANSWER, big)
            await asyncio.sleep(0)
        assert not peer.is_open and peer.why == "it does not read"
        await listener.close()

    asyncio.run(run())


@pytest.mark.parametrize("address", ["", "nowhere", "host:", ":1", "127.0.0.1:http", "127.0.0.1:1"])
def test_dialing_where_nobody_is_says_so(address: str) -> None:
    with pytest.raises(OSError):
        asyncio.run(Link.connect(address, pb.ROLE_FRONT, "x", SECRET))


def test_dialing_a_stranger_says_so() -> None:
    async def run(said: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(said)
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            await Link.connect(f"{host}:{port}", pb.ROLE_FRONT, "x", SECRET)
        finally:
            server.close()

    ping = encode_frame(Kind.PING, b"")
    for said in (b"", b"SSH-2.0-x\r\n", ping, encode_frame(Kind.CHALLENGE, b"\xff\xff")):
        with pytest.raises(ConnectionError):
            asyncio.run(run(said))


def test_what_fails_while_serving_one_peer_ends_that_one_only() -> None:
    async def run() -> None:
        async def on_peer(peer: Peer) -> None:
            async for kind, _ in peer.frames():
                if kind is Kind.CANCEL:
                    raise BadFrame("planted") if peer.name == "bad" else RuntimeError("planted")
                peer.send(Kind.PONG, pb.Pong())

        address, listener = await listen("127.0.0.1", 0, SECRET, {pb.ROLE_FRONT}, on_peer)
        good = await Link.connect(address, pb.ROLE_FRONT, "good", SECRET)
        for name in ("bad", "worse"):
            link = await Link.connect(address, pb.ROLE_FRONT, name, SECRET)
            link.send(Kind.CANCEL, pb.Cancel())
            assert [frame async for frame in link.frames()] == []
        good.send(Kind.PING, pb.Ping())
        assert await anext(good.frames()) == (Kind.PONG, b"")
        await listener.close()

    asyncio.run(run())


# The process


async def spawn(*arguments: str, **settings: Any) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cluster", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(settings).encode() + b"\n")
    line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
    return process, json.loads(line or "{}")


@pytest.mark.parametrize("end", ["stdin", "SIGTERM"])
def test_the_process_serves_until_its_parent_wants_no_more(end: str) -> None:
    async def run() -> None:
        process, said = await spawn("scheduler", host="127.0.0.1", port=0, secret=SECRET.hex(), lease=2.0)
        front = Teller(await Link.connect(said["ready"], pb.ROLE_FRONT, "f", SECRET))
        assert (await front.get(Kind.SHARDS)) == pb.Shards()
        process.send_signal(signal.SIGINT)  # is for the parent
        assert (await front.place(1)).code == "UNAVAILABLE"
        assert process.stdin is not None
        if end == "stdin":
            process.stdin.close()
        else:
            process.terminate()
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert (process.returncode, out, err) == (0, b"", b"")

    asyncio.run(run())


def test_a_port_that_is_taken_is_said() -> None:
    async def run(port: int) -> None:
        process, said = await spawn("scheduler", host="127.0.0.1", port=port, secret=SECRET.hex())
        assert said["failed"]["code"] == "UNAVAILABLE" and "the scheduler's socket" in said["failed"]["message"]
        assert await process.wait() == 1

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asyncio.run(run(taken.getsockname()[1]))


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("scheduler", "front")])
def test_a_wrong_command_is_told_what_there_is(arguments: tuple[str, ...]) -> None:
    async def run() -> None:
        process, said = await spawn(*arguments)
        _, err = await process.communicate()
        assert (said, process.returncode, err) == ({}, 2, b"usage: python -m cluster scheduler|keeper|front\n")

    asyncio.run(run())


def test_settings_that_are_none_end_it() -> None:
    async def run() -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cluster", "scheduler"), stdin=asyncio.subprocess.DEVNULL
        )
        return await asyncio.wait_for(process.wait(), PATIENCE)

    assert asyncio.run(run()) == 1

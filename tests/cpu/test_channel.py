"""The socket on which a shard's ranks come in: strangers are closed and counted, nothing else suffers."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagetable.frames import BadFrame, Kind, encode_frame, prove
from quire_pb.worker.v1 import worker_pb2 as pb
from tests.rank_threads import SECRET, Threads, model, threads
from worker.channel import MAX_GREETING_BYTES, Channel
from worker.door import MAX_GREETINGS
from worker.layout import Layout

SECONDS = 20.0


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threads]:
    """Two ranks in an epoch, which goes on whatever comes to their leader's port."""
    with threads(model(tmp_path_factory.mktemp("model")), Layout(2)) as it:
        it.ranks.begin(1)
        yield it


@pytest.fixture(autouse=True)
def unharmed(shard: Threads) -> Iterator[None]:
    shard.step(1)
    yield
    assert shard.step(2) == shard.expected(2)
    assert shard.overs == []


def dial(shard: Threads) -> socket.socket:
    connection = socket.create_connection(shard.address, SECONDS)
    connection.settimeout(SECONDS)
    return connection


def nonce(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
        data += connection.recv(4096)
    assert data[4] == Kind.CHALLENGE
    return bytes(pb.Challenge.FromString(data[5:]).nonce)


def is_closed(connection: socket.socket) -> bool:
    """The other side hangs up."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    connection.close()
    return True


def counted(shard: Threads, before: int) -> bool:
    deadline = time.monotonic() + SECONDS
    while shard.ranks.num_bad_frames <= before and time.monotonic() < deadline:
        time.sleep(0.005)
    return shard.ranks.num_bad_frames == before + 1


def hello(secret: bytes, challenge: bytes, name: str = "1/control", role: int = pb.ROLE_RANK) -> bytes:
    proof = prove(secret, challenge, role, name)
    return encode_frame(Kind.HELLO, pb.Hello(role=role, name=name, proof=proof).SerializeToString())  # type: ignore[arg-type]


BAD = {
    "random bytes": os.urandom(200),
    "a huge length": struct.pack("<IB", 2**32 - 1, Kind.HELLO) + b"x" * 50,
    "a greeting that never ends": struct.pack("<IB", 1 << 20, Kind.HELLO) + b"x" * MAX_GREETING_BYTES,
    "a frame of length 0": struct.pack("<I", 0),
    "an unknown kind": encode_frame(Kind.HELLO, b"x" * 20)[:4] + b"\xff" + b"x" * 20,
    "a Hello that is none": encode_frame(Kind.HELLO, b"\xff" * 40),
    "another kind": encode_frame(Kind.PLAN, b"\0" * 40),
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_is_no_greeting_is_closed_and_counted(shard: Threads, data: bytes) -> None:
    before = shard.ranks.num_bad_frames
    connection = dial(shard)
    nonce(connection)
    connection.sendall(data)
    with contextlib.suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_WR)
    assert is_closed(connection) and counted(shard, before)


WRONG = {
    "another secret": lambda challenge: hello(b"s" * 32, challenge),
    "an old proof": lambda challenge: hello(SECRET, b"\0" * 16),
    "no rank's role": lambda challenge: hello(SECRET, challenge, role=pb.ROLE_ADMIN),
    "a rank that there is not": lambda challenge: hello(SECRET, challenge, "7/control"),
    "the leader's own number": lambda challenge: hello(SECRET, challenge, "0/control"),
    "a name that is none": lambda challenge: hello(SECRET, challenge, "one/control"),
    "an epoch that is none": lambda challenge: hello(SECRET, challenge, "1/soon"),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG.keys())
def test_a_hello_that_is_wrong_is_closed_and_counted(shard: Threads, make: object) -> None:
    before = shard.ranks.num_bad_frames
    connection = dial(shard)
    connection.sendall(make(nonce(connection)))  # type: ignore[operator]
    assert is_closed(connection) and counted(shard, before)


@pytest.mark.parametrize("slowly", [False, True], ids=["nothing", "a byte now and then"])
def test_who_does_not_greet_in_time_is_closed(shard: Threads, slowly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.channel.GREET_SECONDS", 0.4)
    before = shard.ranks.num_bad_frames
    connection = dial(shard)
    whole = hello(SECRET, nonce(connection))
    began = time.monotonic()
    for byte in whole[:40] if slowly else b"":
        try:
            connection.send(bytes((byte,)))
        except OSError:
            break
        time.sleep(0.1)
    assert is_closed(connection) and counted(shard, before)
    assert time.monotonic() - began < 2


def test_more_strangers_than_can_be_heard_at_once_are_turned_away(shard: Threads) -> None:
    before = threading.active_count()
    silent = [dial(shard) for _ in range(MAX_GREETINGS)]
    for connection in silent:
        nonce(connection)
    one_more = dial(shard)
    assert is_closed(one_more)
    assert threading.active_count() <= before + MAX_GREETINGS
    assert shard.step(3) == shard.expected(3)
    for connection in silent:
        connection.close()
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fresh = dial(shard)  # and there is room again
    assert len(nonce(fresh)) == 16
    fresh.close()


def test_ten_thousand_random_messages_change_nothing(shard: Threads) -> None:
    """Whole frames and halves of them, of every kind, from one who can prove the secret and from one who cannot."""
    draw = random.Random(1)
    for _ in range(200):
        connection = dial(shard)
        challenge = nonce(connection)
        if draw.random() < 0.5:
            connection.sendall(hello(SECRET, challenge, "1/7"))  # for plans of an epoch that there is not
        data = b"".join(
            encode_frame(Kind(draw.randrange(1, 29)), draw.randbytes(draw.randrange(40)))[: draw.choice((3, 9, None))]
            for _ in range(50)
        )
        with contextlib.suppress(OSError):
            connection.sendall(data)
        connection.close()
    assert shard.step(3) == shard.expected(3)


@pytest.mark.parametrize(
    "kind", [Kind.RANK_READY, Kind.FORMED, Kind.BROKEN, Kind.PAGES_READ], ids=lambda kind: kind.name
)
def test_a_rank_that_sends_what_is_no_message_is_cut_off(kind: Kind, tmp_path: Path) -> None:
    with threads(model(tmp_path), Layout(2), follow=False) as it:
        channel = Channel.dial(it.address, "1/control", SECRET)
        channel.send(kind, b"\xff" * 30)
        with pytest.raises(OSError):
            while True:
                channel.receive()
        assert it.ranks.num_bad_frames == 1


def test_a_listener_that_is_none_of_ours_is_left() -> None:
    for data in (b"220 smtp ready\r\n" * 4, encode_frame(Kind.PING, b""), b""):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer(server: socket.socket = server, data: bytes = data) -> None:
                connection, _ = server.accept()
                connection.sendall(data)
                connection.close()

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises((BadFrame, OSError)):
                Channel.dial(server.getsockname()[:2], "1/control", SECRET)
            thread.join()

"""Channel: one framed connection between two ranks of a shard, with blocking calls.

    leader                                  rank
      Challenge(nonce)   ---------------->
                         <----------------  Hello(role RANK, name "RANK/PURPOSE", proof)
      frames             <--------------->  frames

The thread that steps reads and writes plans itself: a hop over an event loop would cost more than the frame.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from typing import TypeVar

from google.protobuf.message import DecodeError

from pagetable.frames import NONCE_BYTES, BadFrame, FrameReader, Kind, encode_frame, is_proof, prove
from quire_pb.worker.v1 import worker_pb2 as pb

GREET_SECONDS = 5.0  # for the whole greeting: who sends a byte now and then gets no more than who says nothing
MAX_GREETING_BYTES = 1024  # a stranger makes us hold no more
_CHUNK = 1 << 18
_Message = TypeVar("_Message", pb.Challenge, pb.Hello)
_USER_TIMEOUT_MILLISECONDS = 10_000  # what was sent and not acknowledged for so long ends the connection


class Channel:
    """One connection. One thread may send while another receives; `shut` may be called by any."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = FrameReader()
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MILLISECONDS)

    @classmethod
    def dial(cls, address: tuple[str, int], name: str, secret: bytes) -> Channel:
        """Connect and prove the secret. Raises OSError (or BadFrame) where nobody of ours answers."""
        channel = cls(socket.create_connection(address, GREET_SECONDS))
        try:
            kind, payload = channel._greeting()
            if kind is not Kind.CHALLENGE:
                raise BadFrame("the listener's first frame is no Challenge")
            nonce = _parsed(pb.Challenge, payload).nonce
            proof = prove(secret, nonce, pb.ROLE_RANK, name)
            channel.send(Kind.HELLO, pb.Hello(role=pb.ROLE_RANK, name=name, proof=proof).SerializeToString())
            channel.set_patience(None)
        except BaseException:
            channel.shut()
            raise
        return channel

    @classmethod
    def welcome(cls, connection: socket.socket, secret: bytes) -> tuple[Channel, str]:
        """The listening side of `dial`; the channel and the name that the peer gives. Raises OSError or BadFrame."""
        connection.settimeout(GREET_SECONDS)
        channel = cls(connection)
        try:
            nonce = os.urandom(NONCE_BYTES)
            channel.send(Kind.CHALLENGE, pb.Challenge(nonce=nonce).SerializeToString())
            kind, payload = channel._greeting()
            if kind is not Kind.HELLO:
                raise BadFrame("the first frame must be a rank's Hello")
            hello = _parsed(pb.Hello, payload)
            if hello.role != pb.ROLE_RANK:
                raise BadFrame("the first frame must be a rank's Hello")
            if not is_proof(secret, nonce, hello.role, hello.name, hello.proof):
                raise BadFrame("the proof of the cluster's secret is wrong")
            channel.set_patience(None)
        except BaseException:
            channel.shut()
            raise
        return channel, hello.name

    @property
    def own_host(self) -> str:
        """This end's address, by which the other host reaches it."""
        return str(self._socket.getsockname()[0])

    def set_patience(self, seconds: float | None) -> None:
        """How long `send` and `receive` wait before they raise TimeoutError; None: for ever."""
        self._socket.settimeout(seconds)

    def send(self, kind: Kind, payload: bytes) -> None:
        """Raises OSError where the connection is over."""
        self.send_frame(encode_frame(kind, payload))

    def send_frame(self, frame: bytes) -> None:
        """A frame that goes to several ranks is encoded once."""
        with self._sending:
            self._socket.sendall(frame)

    def receive(self) -> tuple[Kind, bytes]:
        """The next frame. Raises ConnectionError at the end of the connection, OSError, or BadFrame."""
        while not self._frames:
            self._receive(_CHUNK)
        return self._frames.popleft()

    def _greeting(self) -> tuple[Kind, bytes]:
        """The peer's first frame, from somebody who has proven nothing yet."""
        deadline, left = time.monotonic() + GREET_SECONDS, MAX_GREETING_BYTES
        while not self._frames:
            if left == 0:
                raise BadFrame(f"a greeting of more than {MAX_GREETING_BYTES} bytes")
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                raise TimeoutError(f"no greeting in {GREET_SECONDS:.0f} s")
            self._socket.settimeout(seconds)
            left -= self._receive(left)
        return self._frames.popleft()

    def _receive(self, most: int) -> int:
        data = self._socket.recv(most)
        if not data:
            raise ConnectionError("the connection has ended")
        if (frame := self._reader.lone(data)) is not None:
            self._frames.append(frame)
        else:
            self._frames.extend(self._reader.feed(data))
        return len(data)

    def shut(self) -> None:
        """End it for both sides and both directions; whoever waits in `send` or `receive` is told at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _parsed(kind: type[_Message], payload: bytes) -> _Message:
    try:
        return kind.FromString(payload)
    except DecodeError:
        raise BadFrame(f"no {kind.__name__} of ours") from None

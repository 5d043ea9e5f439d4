"""Framed connections between the processes of a cluster: the asyncio side of pagetable/frames.py.

    listening side                          dialing side
      Challenge(nonce)          ----------->
                                <-----------  Hello(role, name, proof)
      frames                    <---------->  frames

Before a valid Hello a peer may send one small frame and nothing else. What is no frame of ours, a wrong proof, silence
of HELLO_SECONDS and a peer that does not read all end the connection, and only that connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import cast

from google.protobuf.message import DecodeError, Message

from pagetable.frames import NONCE_BYTES, BadFrame, FrameReader, Kind, encode_frame, is_proof, prove
from quire_pb.worker.v1 import worker_pb2 as pb

_log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
CLOSE_SECONDS = 5.0
MAX_HELLO_BYTES = 1024
MAX_UNSENT_BYTES = 64 << 20  # a peer that reads so slowly is cut off
MAX_UNREAD_BYTES = 8 << 20  # so much waits here for `frames` before the socket is no longer read


class Link(asyncio.Protocol):
    """One connection. Use it from its event loop only.

    Attributes:
        why: once the connection is over, why, for a log line.
    """

    def __init__(self) -> None:
        self.why = ""
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._unread = 0
        self._paused = self._ended = False
        self._arrived = asyncio.Event()

    @classmethod
    async def connect(cls, address: str, role: pb.Role, name: str, secret: bytes) -> Link:
        """Dial host:port and say Hello. A listener that does not take the proof ends the connection: `frames` ends.

        Raises OSError (TimeoutError is one) where nobody of ours answers.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise OSError(f"address: got {address!r}, must be host:port")
        async with asyncio.timeout(HELLO_SECONDS):
            _, link = await asyncio.get_running_loop().create_connection(cls, host.strip("[]"), int(port))
            try:
                kind, payload = await anext(link.frames())
                if kind is not Kind.CHALLENGE:
                    raise ConnectionError("the listener's first frame is no Challenge")
                nonce = pb.Challenge.FromString(payload).nonce
                link.send(Kind.HELLO, pb.Hello(role=role, name=name, proof=prove(secret, nonce, role, name)))
            except StopAsyncIteration:
                raise ConnectionError(f"the listener hung up before its Challenge ({link.why})") from None
            except DecodeError:
                link.close("no Challenge of ours")
                raise ConnectionError("the listener's Challenge is none of ours") from None
            except BaseException:
                link.close()
                raise
        return link

    @property
    def is_open(self) -> bool:
        return not self._ended and self._transport is not None and not self._transport.is_closing()

    def send(self, kind: Kind, message: Message) -> None:
        """Queue one frame. Does nothing on a connection that is over; ends it where the peer does not read."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(encode_frame(kind, message.SerializeToString()))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.why = self.why or "it does not read"
            transport.abort()

    async def frames(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """Frames in order until the connection is over; those that had arrived whole by then still come."""
        while True:
            while self._frames:
                kind, payload = self._frames.popleft()
                self._unread -= len(payload)
                if self._paused and self._unread <= MAX_UNREAD_BYTES // 2 and not self._ended:
                    assert self._transport is not None
                    self._transport.resume_reading()
                    self._paused = False
                yield kind, payload
            if self._ended:
                return
            self._arrived.clear()
            await self._arrived.wait()

    def close(self, why: str = "closed here") -> None:
        """Send what is queued, for CLOSE_SECONDS at most, and end the connection."""
        self.why = self.why or why
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.close()
            if transport.get_write_buffer_size():
                asyncio.get_running_loop().call_later(CLOSE_SECONDS, transport.abort)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        try:
            for kind, payload in self._reader.feed(data):
                self._take(kind, payload)
        except (BadFrame, DecodeError) as error:
            self.close(str(error) if isinstance(error, BadFrame) else "a payload that is no message of ours")
        self._arrived.set()
        if not self._paused and self._unread > MAX_UNREAD_BYTES and not self._transport.is_closing():
            self._transport.pause_reading()
            self._paused = True

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self.why = self.why or (type(error).__name__ if error is not None else "the peer hung up")
        self._arrived.set()

    def _take(self, kind: Kind, payload: bytes) -> None:
        self._frames.append((kind, payload))
        self._unread += len(payload)


class Peer(Link):
    """A connection that somebody dialed.

    Attributes:
        role, name: as the peer proved them; role is pb.ROLE_UNSPECIFIED before that.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.role: int = pb.ROLE_UNSPECIFIED
        self.name = ""
        self._listener = listener
        self._nonce = os.urandom(NONCE_BYTES)
        self._head = b""
        self._expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.add(self)
        self.send(Kind.CHALLENGE, pb.Challenge(nonce=self._nonce))
        self._expiry = asyncio.get_running_loop().call_later(HELLO_SECONDS, self.close, "no Hello in time")

    def data_received(self, data: bytes) -> None:
        if self.role == pb.ROLE_UNSPECIFIED:  # a stranger makes us hold no more than a Hello
            self._head += data[: 4 - len(self._head)]
            if len(self._head) == 4 and int.from_bytes(self._head, "little") > MAX_HELLO_BYTES:
                self.close("no Hello of ours")
                return
        super().data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._expiry is not None:
            self._expiry.cancel()
        self._listener.lost(self)

    def _take(self, kind: Kind, payload: bytes) -> None:
        if self.role != pb.ROLE_UNSPECIFIED:
            super()._take(kind, payload)
            return
        if kind is not Kind.HELLO:
            raise BadFrame("the first frame must be Hello")
        hello = pb.Hello.FromString(payload)
        self._listener.check(hello, self._nonce)
        self.role, self.name = hello.role, hello.name
        assert self._expiry is not None
        self._expiry.cancel()
        self._listener.greet(self)


class Listener:
    """A listening socket and the peers that came through it. Made by `listen`.

    Attributes:
        num_refused: connections that ended before a valid Hello.
    """

    def __init__(self, secret: bytes, roles: Collection[int], on_peer: Callable[[Peer], Awaitable[None]]) -> None:
        self.num_refused = 0
        self._secret, self._roles, self._on_peer = secret, frozenset(roles), on_peer
        self._peers: dict[Peer, asyncio.Task[None] | None] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Raises OSError where the socket can't be bound."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Peer(self), host, port, reuse_address=True)
        name = self._server.sockets[0].getsockname()
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    async def close(self) -> None:
        """Listen no more, end all connections and wait until their `on_peer` calls are over."""
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.close("the listener closes")
        tasks = [task for task in self._peers.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def add(self, peer: Peer) -> None:
        self._peers[peer] = None

    def check(self, hello: pb.Hello, nonce: bytes) -> None:
        """Raises BadFrame where the Hello is not taken."""
        if not is_proof(self._secret, nonce, hello.role, hello.name, hello.proof):
            raise BadFrame("the proof of the cluster's secret is wrong")
        if hello.role not in self._roles:
            raise BadFrame("no such role here")

    def greet(self, peer: Peer) -> None:
        self._peers[peer] = asyncio.get_running_loop().create_task(self._serve(peer))

    def lost(self, peer: Peer) -> None:
        if peer.role == pb.ROLE_UNSPECIFIED:
            self.num_refused += 1
            _log.warning("a connection without a valid Hello: %s", peer.why)
            del self._peers[peer]

    async def _serve(self, peer: Peer) -> None:
        try:
            await self._on_peer(peer)
        except (BadFrame, DecodeError) as error:
            peer.close(str(error) if isinstance(error, BadFrame) else "a payload that is no message of ours")
            _log.warning("%s: %s", peer.name, peer.why)
        except Exception:
            _log.exception("serving %s failed", peer.name)
        finally:
            peer.close()
            self._peers.pop(peer, None)


async def listen(
    host: str, port: int, secret: bytes, roles: Collection[int], on_peer: Callable[[Peer], Awaitable[None]]
) -> tuple[str, Listener]:
    """Listen on host:port (0 is any free port).

    Args:
        roles: pb.Role values that may come in.
        on_peer: called once for each peer that proved itself; the connection ends when it returns. What it raises ends
            that connection only.

    Returns host:port as bound, and the listener, to be closed. Raises OSError.
    """
    listener = Listener(secret, roles, on_peer)
    return await listener.start(host, port), listener

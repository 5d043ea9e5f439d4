"""The one framing of all sockets between the processes of a cluster.

    length (4 bytes, little-endian) | kind (1 byte) | payload (length - 1 bytes)

A payload is a message of proto/quire/worker/v1/worker.proto; which one, the kind says. A frame of length 0, of more
than `limit` bytes or of an unknown kind ends the connection: nothing behind it can be trusted.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from enum import IntEnum
from hashlib import sha256

from pagetable.errors import QuireError

MAX_FRAME_BYTES = 64 << 20
NONCE_BYTES = 16
_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<IB")


class Kind(IntEnum):
    """Which message a frame holds; the names are those of the messages."""

    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    SUBMIT = 4
    CANCEL = 5
    FINISH = 6
    FORK = 7
    TOKENS = 8
    REFUSED = 9
    EVENTS = 10
    PING = 11
    PONG = 12
    PLACE = 13
    PLACED = 14
    SHARDS = 15
    REPORT = 16
    QUERY = 17
    ANSWER = 18
    REGISTER = 19
    FENCE = 20
    BEGUN = 21
    RANK_READY = 22
    FORM = 23
    FORMED = 24
    BROKEN = 25
    ABORT = 26
    PLAN = 27
    RESULT = 28
    READ_PAGES = 29
    PAGES_READ = 30


_KINDS = {int(kind): kind for kind in Kind}


class BadFrame(QuireError):
    """What came is no frame of ours."""

    code = "INVALID_ARGUMENT"


def encode_frame(kind: Kind, payload: bytes) -> bytes:
    return _HEAD.pack(len(payload) + 1, kind) + payload


class FrameReader:
    """Bytes in, as they come; whole frames out. Holds at most one incomplete frame."""

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def lone(self, data: bytes) -> tuple[Kind, bytes] | None:
        """The frame that `data` is, where it is just one and follows whole ones; None says that it is for `feed`."""
        if self._buffer or len(data) < _HEAD.size:
            return None
        length, kind = _HEAD.unpack_from(data)
        if length != len(data) - _LENGTH.size or length > self._limit or kind not in _KINDS:
            return None
        return _KINDS[kind], data[_HEAD.size :]

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames that `data` completes. Raises BadFrame as soon as a length or a kind can't be ours."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 4:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if not 1 <= length <= self._limit:
                    raise BadFrame(f"a frame of {length} bytes; must be from 1 to {self._limit}")
                if len(buffer) - at >= 5 and buffer[at + 4] not in _KINDS:
                    raise BadFrame(f"a frame of unknown kind {buffer[at + 4]}")
                if len(buffer) - at < 4 + length:
                    break
                kind, payload = _KINDS[buffer[at + 4]], bytes(buffer[at + 5 : at + 4 + length])
                at += 4 + length
                yield kind, payload
        finally:
            del buffer[:at]


def prove(secret: bytes, nonce: bytes, role: int, name: str) -> bytes:
    """What Hello carries: only who knows the cluster's secret can compute it, and for this connection only."""
    return hmac.new(secret, nonce + role.to_bytes(4, "little") + name.encode(), sha256).digest()


def is_proof(secret: bytes, nonce: bytes, role: int, name: str, proof: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(prove(secret, nonce, role, name), proof)

"""A rank's part of plain plans natively (csrc/rank.cpp), from a plan's bytes to its tokens: one, or as they come.

A decode is hardly anything else than plain plans, and what Python does with one takes longer than it seems: a step
leaves its caches cold. What is not plain, or not right, is the caller's, who can do all plans.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import NoReturn

import torch

from kernels import cpu
from kernels.decoder import NativeDecoder
from kernels.peers import Peers, PeersBroken, Ring
from kernels.tables import NativeTables

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_BROKEN, _PAUSE = 3, 6  # kBroken, kPause in csrc/peers.h
_NOT_PLAIN, _ANSWERED = 4, 5  # in csrc/rank.cpp
DIGEST_BYTES = 8  # kDigestBytes in csrc/chain.h
_SIGNATURES = {
    "quire_rank_run": (_INT, _ADDRESS, ctypes.c_char_p, _INT, _ADDRESS, _ADDRESS, ctypes.c_char_p, _INT),
    "quire_rank_follow": (_INT, *(_ADDRESS,) * 3, ctypes.c_char_p, _INT),
}


class _Rank(ctypes.Structure):
    """`quire::Rank` in csrc/exports.h."""

    _fields_ = [
        *((name, _ADDRESS) for name in ("engine", "model", "tables", "tensor", "slice")),
        *((name, _ADDRESS) for name in ("previous", "next", "answers", "pool")),
        *((name, _INT) for name in ("layer_stride", "block_stride", "num_blocks")),
        ("windows", _ADDRESS),
        *((name, _INT) for name in ("num_windows", "column", "is_cut", "is_int8", "is_deterministic", "first_row")),
        ("is_plain", _ADDRESS),
        ("num_slots", _INT),
    ]


class Progress(ctypes.Structure):
    """How far a rank that is not the leader has come with an epoch's plans; `quire::Progress` in csrc/exports.h.

    Attributes:
        number: of the plan at hand, or else the last one.
        began: its step, in nanoseconds of the monotonic clock; 0 where none is under way. From any thread.
        steps: done. From any thread.
        tells: whether results are the caller's to send where native code does not.
    """

    number: int
    began: int
    steps: int
    tells: int
    _fields_ = [
        ("_chain", ctypes.c_uint64),
        *((name, _INT) for name in ("number", "began", "steps", "tells")),
        ("_tokens", _ADDRESS),
        ("_num_tokens", _INT),
    ]

    @property
    def digest(self) -> bytes:
        """Of all plans so far."""
        return int(self._chain).to_bytes(DIGEST_BYTES, "little")

    @digest.setter
    def digest(self, value: bytes) -> None:
        self._chain = int.from_bytes(value, "little")

    def tokens(self) -> array[int]:
        """Of the last plan that was carried out natively."""
        return array("i", ctypes.string_at(self._tokens, 4 * self._num_tokens))


class NativeRank:
    """What a rank does plain plans with, for one epoch. One caller at a time, the one of `decoder`.

    Attributes:
        has_answered: the last plan's tokens have been sent, as a result.
    """

    def __init__(
        self,
        decoder: NativeDecoder,
        tables: NativeTables,
        pool: torch.Tensor,
        plain: bytearray,
        column: int = 0,
        first_row: int = 0,
        *,
        tensor: Peers | None = None,
        slice: Peers | None = None,
        previous: Ring | None = None,
        next: Ring | None = None,
        answers: Ring | None = None,
    ) -> None:
        """
        Args:
            tables: whose changes the plans carry.
            pool, tensor, slice: as for `NativeDecoder.forward`.
            plain: by slot, 1 where the likeliest token is taken; it may change between two plans.
            column: of the pages.
            first_row: of the decoder's head, in the vocabulary.
            previous, next: from the stage before, to the stage behind.
            answers: where results go, on a rank of the last stage that sends them.
        """
        shape, size = decoder.shape, pool.element_size()
        self._library = cpu.library(_SIGNATURES)
        self._peers = [each for each in (tensor, slice) if each is not None]
        windows = array("q", shape.windows)
        is_plain = (ctypes.c_char * len(plain)).from_buffer(plain)
        self._keep = (decoder, tables, pool, windows, is_plain, previous, next, answers)
        self._rank = _Rank(
            *(decoder.engine, ctypes.addressof(decoder.model), tables.address),
            *(0 if each is None or each.size == 1 else ctypes.addressof(each.struct) for each in (tensor, slice)),
            *(0 if each is None else ctypes.addressof(each.struct) for each in (previous, next, answers)),
            *(pool.data_ptr(), pool.stride(0) * size, pool.stride(1) * size, pool.shape[1]),
            *(windows.buffer_info()[0], len(windows), column),
            *(shape.is_cut, pool.dtype == torch.int8, decoder.deterministic, first_row),
            *(ctypes.addressof(is_plain), len(plain)),
        )
        self._at = ctypes.addressof(self._rank)
        self._message = ctypes.create_string_buffer(cpu.MESSAGE_BYTES)
        self._num_tokens = ctypes.c_int64()
        self._tokens = array("i")
        self._where = (0, 0)
        self.has_answered = False

    def run(self, plan: bytes) -> array[int] | None:
        """Carry out a plan.

        Returns:
            int32, the likeliest token of each sample entry, -1 where a logit is not finite: on the last stage, and
            empty before. None where the plan is not plain or not right: nothing but its table changes is done then,
            which may be done again.

        Raises:
            ValueError, MemoryError, PeersBroken: as `NativeDecoder.forward`; PeersBroken also where the stage before
                is at another plan.
        """
        if 4 * len(self._tokens) < len(plan):  # more than entries can be
            self._tokens = array("i", bytes(-(-len(plan) // 4) * 4))
            self._where = (self._tokens.buffer_info()[0], ctypes.addressof(self._num_tokens))
        message = self._message
        code = self._library.quire_rank_run(self._at, plan, len(plan), *self._where, message, cpu.MESSAGE_BYTES)
        self.has_answered = code == _ANSWERED
        if code == _NOT_PLAIN:
            return None
        if code and not self.has_answered:
            self._fail(code)
        return self._tokens[: self._num_tokens.value]

    def follow(self, plans: Ring, progress: Progress) -> array[int] | None:
        """Carry out plans as they come, each behind the digest of all before it.

        Returns:
            As `run`, behind a plan whose result the caller has to send. None where the next message in the ring is no
            plain plan, or not right: nothing but its table changes is done then, and the caller has to receive it.

        Raises: as `run`; `progress` says at which plan.
        """
        arguments = self._at, ctypes.addressof(plans.struct), ctypes.addressof(progress), self._message
        while (code := self._library.quire_rank_follow(*arguments, cpu.MESSAGE_BYTES)) == _PAUSE:
            pass  # signals are heard here
        self.has_answered = False
        if code == _NOT_PLAIN:
            return None
        if code:
            self._fail(code)
        return progress.tokens()

    def _fail(self, code: int) -> NoReturn:
        if code == _BROKEN:
            if self._message.value:
                raise PeersBroken(self._message.value.decode())
            raise next((each.broken() for each in self._peers if each.is_broken), Ring.broken())
        cpu.raise_for(code, self._message)
        raise AssertionError("unreachable: any other code is an error")

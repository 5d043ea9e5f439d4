"""Tokens that a plan leaves open, because the plan that samples them is in flight when it is made (asynchronous
scheduling).

    plan n - P ... last stage samples --> found --- ring, or this process ---> fill ... first stage embeds, plan n

With P stages a plan's open tokens are those that the plan P before it samples: no earlier one is in flight then, and
none of a later one is open, for the first stage has nothing else to do until that plan is through.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt
import torch

from kernels.peers import PeersBroken
from worker.group import Way


class OpenTokens:
    """Of one rank and one epoch.

    Args:
        num_stages: P.
        ring: from the last stage to the first, where these are several. The last stage says what it found of every
            plan; P + 1 messages must fit, so that it never waits.
    """

    def __init__(self, num_stages: int = 1, ring: Way | None = None) -> None:
        self._num_stages, self._ring = num_stages, ring
        self._number = -1  # of the plan whose tokens these are
        self._tokens: npt.NDArray[np.int32] = np.empty(0, np.int32)

    def found(self, number: int, tokens: array[int]) -> None:
        """On the last stage: what plan `number` samples, by entry. Raises PeersBroken."""
        values = np.array(tokens, np.int32)
        if self._ring is None:
            self._number, self._tokens = number, values
            return
        self._ring.slot()[: values.nbytes].copy_(torch.from_numpy(values.view(np.uint8)))
        self._ring.publish(number, values.nbytes)

    def fill(self, number: int, tokens: npt.NDArray[np.int64]) -> None:
        """On the first stage: put what was found in the place of the tokens that plan `number` leaves open; waits until
        it was. A failed entry's token does not matter: its sequence has ended, and its row counts for nothing.

        Raises PeersBroken.
        """
        where = np.flatnonzero(tokens < 0)
        if self._ring is not None:
            if self._number < 0:  # plans count from the epoch's first
                self._number = number - 1
            # What has retired is there, and makes room; what has not may be waited for.
            while self._number < number - self._num_stages - (len(where) == 0):
                self._receive(self._ring)
        if len(where):
            if self._number != number - self._num_stages:
                known = f"those of plan {self._number} are known"
                raise ValueError(f"plan {number} leaves tokens of plan {number - self._num_stages} open; {known}")
            tokens[where] = np.maximum(self._tokens[-1 - tokens[where]], 0)

    def _receive(self, ring: Way) -> None:
        number, message = ring.receive()
        if number <= self._number:
            raise PeersBroken(f"tokens of plan {number} came behind those of plan {self._number}")
        self._number, self._tokens = number, message.view(torch.int32).numpy().copy()
        ring.release()

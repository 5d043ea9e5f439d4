"""The head of a stage whose vocabulary is split over its tensor ranks: each multiplies its rows, all hear of all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kernels.decoder import Head
from kernels.peers import Peers

_FOUND = 3 * 4  # token, logit, sum: bytes of one row


def row_bytes(widest: int, *, logits: bool) -> int:
    """Bytes of one row in a rank's region.

    Args:
        widest: rows of the vocabulary that the rank with the most of them has.
    """
    return _FOUND + (4 * widest if logits else 0)


def gather_head(peers: Peers, found: Head, widths: tuple[int, ...]) -> Head:
    """The whole vocabulary's answer from each rank's; one exchange for as many rows as a region holds.

    Args:
        found: of this rank's part, `tokens` counted over the whole vocabulary.
        widths: rows of the vocabulary on each rank; the parts follow one another.

    Raises:
        PeersBroken: the epoch is over.
    """
    with_logits, rows = found.logits is not None, len(found.tokens)
    each = row_bytes(max(widths), logits=with_logits)
    most = max(1, peers.capacity // each)
    parts = [_exchange(peers, found, slice(at, min(at + most, rows)), widths) for at in range(0, rows, most)]
    if not parts:
        return found
    tokens, values, totals = (np.concatenate([part[i] for part in parts]) for i in range(3))
    logits = torch.cat([part[3] for part in parts]) if with_logits else None
    return Head(tokens, values, totals, logits)


def _exchange(
    peers: Peers, found: Head, rows: slice, widths: tuple[int, ...]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], torch.Tensor]:
    count = rows.stop - rows.start
    with_logits = found.logits is not None
    size = count * row_bytes(max(widths), logits=with_logits)
    own = peers.own(size)
    numbers = own[: count * _FOUND].numpy()
    numbers[: 4 * count] = found.tokens[rows].view(np.uint8)
    numbers[4 * count : 8 * count] = found.values[rows].view(np.uint8)
    numbers[8 * count :] = found.totals[rows].view(np.uint8)
    if found.logits is not None:
        width = found.logits.shape[1]
        part = own[count * _FOUND : count * (_FOUND + 4 * width)].view(torch.float32).view(count, width)
        part.copy_(found.logits[rows])
    regions = peers.exchange(size)
    fields = [region[: count * _FOUND].numpy().reshape(3, 4 * count) for region in regions]
    tokens = np.stack([each[0].view(np.int32) for each in fields])
    values = np.stack([each[1].view(np.float32) for each in fields])
    totals = np.stack([each[2].view(np.float32) for each in fields]).sum(0, dtype=np.float32)
    # of equal logits the lowest id, and that is the lowest rank's; NaN shows in the totals
    best = np.argmax(values, axis=0)[None]
    logits = torch.empty(0)
    if with_logits:
        pieces = [
            region[count * _FOUND : count * (_FOUND + 4 * width)].view(torch.float32).view(count, width)
            for region, width in zip(regions, widths, strict=True)
        ]
        logits = torch.cat(pieces, dim=1)
    return np.take_along_axis(tokens, best, 0)[0], np.take_along_axis(values, best, 0)[0], totals, logits


def share_tokens(peers: Peers, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """What the first rank gives, on all ranks; the others give as many of anything.

    Raises:
        PeersBroken: the epoch is over.
    """
    size = tokens.nbytes
    peers.own(size).numpy()[:] = tokens.view(np.uint8)
    return peers.exchange(size)[0].numpy().view(np.int32).copy()

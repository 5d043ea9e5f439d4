"""The head of a stage whose vocabulary is split over its tensor ranks: each multiplies its rows, all hear of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from kernels.decoder import Head
from kernels.peers import BEST_BYTES, Peers


def row_bytes(widest: int, *, logits: bool) -> int:
    """Bytes of one row in a rank's region.

    Args:
        widest: rows of the vocabulary that the rank with the most of them has.
    """
    return 4 * widest if logits else BEST_BYTES


def gather_head(peers: Peers, found: Head, widths: tuple[int, ...]) -> Head:
    """The whole vocabulary's answer from each rank's; exchanges of as many rows as a region holds.

    Args:
        found: of this rank's part, `tokens` counted over the whole vocabulary. All but its logits become the answer.
        widths: rows of the vocabulary on each rank; the parts follow one another.

    Raises:
        PeersBroken: the epoch is over.
    """
    for rows in _pieces(peers, found, logits=False, widest=max(widths)):
        peers.best(found.tokens[rows], found.values[rows], found.totals[rows])
    if found.logits is None or not len(found.tokens):
        return found
    pieces = _pieces(peers, found, logits=True, widest=max(widths))
    logits = torch.cat([_exchange_logits(peers, found.logits[rows], widths) for rows in pieces])
    return replace(found, logits=logits)


def _pieces(peers: Peers, found: Head, *, logits: bool, widest: int) -> list[slice]:
    """Rows that go over together."""
    rows, most = len(found.tokens), max(1, peers.capacity // row_bytes(widest, logits=logits))
    return [slice(at, min(at + most, rows)) for at in range(0, rows, most)]


def _exchange_logits(peers: Peers, logits: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    count, width = logits.shape
    size = count * row_bytes(max(widths), logits=True)
    peers.own(size)[: 4 * count * width].view(torch.float32).view(count, width).copy_(logits)
    regions = peers.exchange(size)
    pieces = [
        region[: 4 * count * width].view(torch.float32).view(count, width)
        for region, width in zip(regions, widths, strict=True)
    ]
    return torch.cat(pieces, dim=1)


def share_tokens(peers: Peers, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """What the first rank gives, on all ranks; the others give as many of anything.

    Raises:
        PeersBroken: the epoch is over.
    """
    size = tokens.nbytes
    peers.own(size).numpy()[:] = tokens.view(np.uint8)
    return peers.exchange(size)[0].numpy().view(np.int32).copy()

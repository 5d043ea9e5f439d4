"""Pages that go from one group's pool to another's: an exchange of the ranks of a slice, before a step computes.

Each rank gives the blocks that leave its pool and takes those that come to it, layer by layer as they lie in memory, in
as many exchanges as their regions need. All ranks of the slice see all moves, so they agree on how many.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kernels.peers import Peers
from worker.kv_cache import PagedKVCache
from worker.tables import Moves


def unit_bytes(cache: PagedKVCache) -> int:
    """Of one block in one layer; a region of the slice holds one at least (`ShardSpec.sizes`)."""
    return cache.pool[0, 0].numel() * cache.pool.element_size()


def move_pages(peers: Peers, cache: PagedKVCache, moves: Moves) -> None:
    """Carry out moves between the pools of a slice's ranks.

    Args:
        peers: the slice; its ranks are the groups.
        cache: this rank's pages, mutated.

    Raises:
        PeersBroken: the epoch is over; the pages may be there or not.
    """
    layers, unit = cache.pool.shape[0], unit_bytes(cache)
    leaving = [np.flatnonzero(moves.source == group) for group in range(peers.size)]
    counts = [len(each) * layers for each in leaving]
    some = peers.capacity // unit
    for first in range(0, max(counts), some):
        size = min(max(counts) - first, some)
        index = np.arange(first, first + size)  # of (page, layer) among what each rank gives
        given = index[index < counts[peers.rank]]
        page, layer = given // layers, given % layers
        if len(given):
            _pages(peers.own(len(given) * unit), cache).copy_(
                cache.pool[_long(layer), _long(moves.from_block[leaving[peers.rank][page]])]
            )
        for group, region in enumerate(peers.exchange(size * unit)):
            found = index[index < counts[group]]
            move = leaving[group][found // layers]
            here = np.flatnonzero(moves.target[move] == peers.rank)
            if len(here):
                came = _pages(region[: len(found) * unit], cache)[_long(here)]
                cache.pool[_long(found[here] % layers), _long(moves.to_block[move[here]])] = came


def _pages(region: torch.Tensor, cache: PagedKVCache) -> torch.Tensor:
    """[n, 2, kv_heads, block_size, head_dim] of the pool's dtype, where they lie in a region."""
    return region.view(cache.pool.dtype).view(-1, *cache.pool.shape[2:])


def _long(index: npt.NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(index.astype(np.int64))

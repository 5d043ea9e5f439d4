"""Keys and values read back from another rank's pool, for checks and diagnoses: both sides of it.

    leader --ReadPages(layer, blocks)--> rank --PagesRead(k, v)--> leader          over the control connection

The rank's control thread answers, whatever its main thread does; the leader asks while no plan is in flight. Then
every rank has written all that the plans said: each meets the leader's, or sends its rows on, behind its last write.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence

import torch

from pagetable.frames import BadFrame, Kind
from quire_pb.worker.v1 import worker_pb2 as pb
from worker.channel import Channel
from worker.kv_cache import PagedKVCache

ANSWER_BYTES = 8 << 20  # of K and V in one frame, at most, or one block's
ANSWER_SECONDS = 10.0


class PageReads:
    """The leader's side, for one rank. One thread reads; the one that receives from the rank calls `hear` and `end`."""

    def __init__(self, control: Channel) -> None:
        self._control = control
        self._number = 0
        self._answers: queue.SimpleQueue[pb.PagesRead | None] = queue.SimpleQueue()

    def read(self, like: PagedKVCache, layer: int, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of some of the rank's blocks: K and V as `PagedKVCache.gather_kv` gives them.

        Args:
            like: the leader's own pages, which differ from the rank's in number only.
            layer: counted from the rank's first.

        Raises:
            ValueError: the rank has no such layer or block. OSError or BadFrame: it does not answer.
        """
        if layer < 0 or min(blocks, default=0) < 0:
            raise ValueError(f"pages: got layer {layer}, blocks from {min(blocks, default=0)}, must be from 0 on")
        none, _ = like.gather_kv(0, (), 0)
        block_bytes = like.block_size * none.shape[1] * none.shape[2] * none.element_size()  # of K
        most = max(1, ANSWER_BYTES // (2 * block_bytes))
        ks, vs = [none], [none]
        for start in range(0, len(blocks), most):
            some = blocks[start : start + most]
            answer = self._ask(layer, some)
            for data, found in ((answer.k, ks), (answer.v, vs)):
                if len(data) != len(some) * block_bytes:
                    raise BadFrame(f"{len(data)} bytes of {len(some)} pages, must be {len(some) * block_bytes}")
                found.append(torch.frombuffer(bytearray(data), dtype=none.dtype).view(-1, *none.shape[1:]))
        return torch.cat(ks), torch.cat(vs)

    def hear(self, payload: bytes) -> None:
        """A PagesRead. Raises DecodeError where it is none."""
        self._answers.put(pb.PagesRead.FromString(payload))

    def end(self) -> None:
        """The connection is over."""
        self._answers.put(None)

    def _ask(self, layer: int, blocks: Sequence[int]) -> pb.PagesRead:
        self._number += 1
        asked = pb.ReadPages(number=self._number, layer=layer, blocks=blocks)
        self._control.send(Kind.READ_PAGES, asked.SerializeToString())
        while True:
            try:
                answer = self._answers.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"no pages came in {ANSWER_SECONDS:.0f} s") from None
            if answer is None:
                raise ConnectionError("the connection has ended")
            if answer.refused:
                raise ValueError(answer.refused)
            if answer.number == self._number:  # else: of a read that was given up
                return answer


def answer_read(cache: PagedKVCache, payload: bytes) -> pb.PagesRead:
    """The rank's side: what a ReadPages asks for. Raises DecodeError where it is none."""
    asked = pb.ReadPages.FromString(payload)
    if refused := refusal(cache, asked.layer, asked.blocks):
        return pb.PagesRead(number=asked.number, refused=refused)
    found = cache.gather_kv(asked.layer, asked.blocks, len(asked.blocks) * cache.block_size)
    k, v = (each.view(torch.uint8).numpy().tobytes() for each in found)
    return pb.PagesRead(number=asked.number, k=k, v=v)


def refusal(cache: PagedKVCache, layer: int, blocks: Sequence[int]) -> str:
    """Why these can't be read; empty where they can."""
    layers, num_blocks = cache.pool.shape[:2]
    if 0 <= layer < layers and min(blocks, default=0) >= 0 and max(blocks, default=0) < num_blocks:
        return ""
    got = f"layer {layer}, blocks {min(blocks, default=0)} to {max(blocks, default=0)}"
    return f"pages: got {got}, must be from 0 to {layers - 1} and from 0 to {num_blocks - 1}"

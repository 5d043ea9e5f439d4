"""Small arrays to a device: those of a call in one transfer that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 64  # bytes; kernels are made for addresses that are multiples of 16, or else made again


def upload(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as contiguous tensors on `device`, parts of one piece of memory there; on the CPU where they lie.

    From a GPU's host the transfer goes through pinned memory, in the current stream.
    """
    arrays = [np.ascontiguousarray(each) for each in arrays]
    if device.type == "cpu":
        return [torch.from_numpy(each) for each in arrays]
    sizes = [-(-each.nbytes // _ALIGNMENT) * _ALIGNMENT for each in arrays]
    ends = np.cumsum(sizes).tolist()
    host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = host.numpy()
    for each, size, end in zip(arrays, sizes, ends, strict=True):
        room[end - size : end - size + each.nbytes] = each.view(np.uint8).reshape(-1)
    sent = host.to(device, non_blocking=True)
    found = []
    for each, size, end in zip(arrays, sizes, ends, strict=True):
        kind = torch.from_numpy(each).dtype
        found.append(sent[end - size : end - size + each.nbytes].view(kind).view(each.shape))
    return found

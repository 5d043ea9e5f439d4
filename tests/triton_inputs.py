"""Inputs of Triton's kernels, where those run: on the CPU in its interpreter, else on the GPU."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def among_nans(x: torch.Tensor) -> torch.Tensor:
    """`x` with as many NaNs before and behind each row; the last dimension is contiguous."""
    rows = x.flatten(1)
    wide = torch.full((len(rows), 3 * rows.shape[1] + 1), torch.nan, dtype=x.dtype, device=x.device)
    inner = wide[:, rows.shape[1] : 2 * rows.shape[1]]
    inner.copy_(rows)
    return inner.unflatten(1, x.shape[1:])

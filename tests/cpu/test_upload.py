"""Arrays that go to a device in one transfer: what arrives is what was given."""

from __future__ import annotations

import numpy as np
import torch

from kernels.upload import upload
from tests.triton_inputs import DEVICE

ARRAYS = [
    np.arange(7, dtype=np.int64),
    np.empty((0, 4), np.int32),
    np.arange(12, dtype=np.float64).reshape(3, 4).T,  # not contiguous
    np.arange(6, dtype=np.int32).reshape(2, 3)[:, 1],
    np.array([1.5], np.float32),
]


def test_what_arrives_is_what_was_given() -> None:
    for device in {torch.device("cpu"), DEVICE}:
        if device.type == "cuda" and not torch.cuda.is_available():
            continue
        found = upload(ARRAYS, device)
        for given, got in zip(ARRAYS, found, strict=True):
            assert got.device.type == device.type and got.is_contiguous()
            assert got.dtype == torch.from_numpy(given.copy()).dtype
            assert np.array_equal(got.cpu().numpy(), given)


def test_nothing() -> None:
    assert upload([], DEVICE) == []

"""For tests with random tensors."""

from __future__ import annotations

import os
import random

import pytest
import torch


@pytest.fixture
def rng() -> random.Random:
    """Fresh in each run; a failure shows the seed, and QUIRE_TEST_SEED repeats it. torch is seeded with it, too."""
    seed = int(os.environ.get("QUIRE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"QUIRE_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return random.Random(seed)

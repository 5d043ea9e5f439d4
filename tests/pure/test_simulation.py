"""10,000 random steps over a pool too small for the load, every invariant after each; then the pool is empty."""

from __future__ import annotations

import pytest

from tests.simulation import Simulation

SEEDS = range(100)
STEPS = 100


@pytest.mark.parametrize("first", SEEDS[::10])
def test_every_token_is_right_and_no_page_is_lost(first: int) -> None:
    tokens = preemptions = evictions = 0
    for seed in range(first, first + 10):
        simulation = Simulation(seed)
        for _ in range(STEPS):
            simulation.step()
        simulation.drain()
        tokens += simulation.num_tokens
        preemptions += simulation.scheduler.num_preemptions
        evictions += simulation.pool.num_evictions
    assert tokens > 1000 and preemptions > 0 and evictions > 100  # the load is what the test says it is

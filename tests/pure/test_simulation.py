"""Random steps over pools too small for the load, every invariant after each; then the pools are empty."""

from __future__ import annotations

import pytest

from tests.simulation import Simulation

SEEDS = range(100)
STEPS = 100


def finish(simulation: Simulation) -> None:
    for _ in range(STEPS):
        simulation.step()
    simulation.drain()


@pytest.mark.parametrize("first", SEEDS[::10])
def test_every_token_is_right_and_no_page_is_lost(first: int) -> None:
    tokens = preemptions = evictions = 0
    for seed in range(first, first + 10):
        simulation = Simulation(seed)
        finish(simulation)
        tokens += simulation.num_tokens
        preemptions += simulation.scheduler.num_preemptions
        evictions += simulation.pool.num_evictions
    assert tokens > 1000 and preemptions > 0 and evictions > 100  # the load is what the test says it is


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_so_it_is_over_groups_and_stages(groups: int, depth: int) -> None:
    tokens = preemptions = evictions = moves = 0
    for seed in range(8):
        simulation = Simulation(1000 * groups + 100 * depth + seed, depth, groups)
        assert simulation.pool.num_groups == groups and simulation.num_stages in (depth - 1, depth)
        finish(simulation)
        tokens += simulation.num_tokens
        preemptions += simulation.scheduler.num_preemptions
        evictions += simulation.pool.num_evictions
        moves += simulation.device.num_moves
    assert tokens > 400 and preemptions > 0 and evictions > 50
    assert (moves > 0) == (groups > 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_so_it_is_with_plans_made_before_their_tokens_are_known(groups: int, depth: int) -> None:
    tokens = preemptions = filled = 0
    for seed in range(30 if depth == 1 else 12):
        simulation = Simulation(5000 + 1000 * depth + 100 * groups + seed, depth, groups, async_scheduling=True)
        finish(simulation)
        tokens += simulation.num_tokens
        preemptions += simulation.scheduler.num_preemptions
        filled += simulation.device.num_filled
    share = {1: 2, 2: 5, 3: 5}[depth]  # where there are fewer sequences than stages nothing is left open
    assert preemptions > 0 and filled > tokens / share and tokens > (2000 if depth == 1 else 800)

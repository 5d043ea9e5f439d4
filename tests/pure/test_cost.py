"""The cost model by hand: round constants, so that every number can be worked out on paper."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pagetable.cost import Cost, Model, Stage, Ways, Workload
from pagetable.errors import ConfigError
from pagetable.hardware import Hardware
from worker.stages import Stages

# a device that reads 1 GB/s, multiplies 1 GFLOP/s (4 with eight rows), and does all else at no cost
PLAIN = Hardware(
    kind="gpu",
    devices_per_host=4,
    memory_bytes=1e9,
    reserve_bytes=0.0,
    read_bytes_per_s=1e9,
    host_read_bytes_per_s=1e18,
    product_flops=((1, 1e9), (8, 4e9)),
    float32_share=0.5,
    elements_per_s=1e18,
    attention_read_share=1.0,
    attention_decode_flops=1e18,
    attention_prefill_flops=1e18,
    layer_s=0.0,
    barrier_s=0.0,
    step_s=0.0,
    row_s=0.0,
    plan_s=0.0,
    collective="ring",
    exchange_s=0.0,
    exchange_bytes_per_s=1e18,
    network_exchange_s=0.0,
    network_bytes_per_s=1e18,
    activation_bytes=2,
)
MODEL = Model(hidden=1000, head_dim=10, item_bytes=2, kv_row_bytes=20)
LAYER = 1000 * ((10 + 2 * 5) * 10 + 10 * 10 + 3 * 300)  # weights of one layer of STAGE
STAGE = Stage(
    windows=(0, 0), heads=10, attended=10, kv_heads=5, mlp=300, head_rows=500, weight_bytes=2 * (2 * LAYER + 500_000)
)
LOAD = Workload(context=64, batch=1, chunk=32, block_size=16)


def with_(**changes: Any) -> Hardware:
    return dataclasses.replace(PLAIN, **changes)


def cost(hardware: Hardware = PLAIN, ways: Ways | None = None, *stages: Stage, model: Model = MODEL) -> Cost:
    return Cost(hardware, model, ways or Ways(), stages or (STAGE,))


def test_a_products_time_is_linear_between_two_measured_rows_and_its_rate_is_constant_beyond() -> None:
    assert cost().product_s(1, 1e9) == 2.0  # 2 FLOP a weight, as slow as reading 2 bytes a weight
    assert cost().product_s(8, 1e9) == pytest.approx(4.0)
    assert cost().product_s(4, 1e9) == pytest.approx(2.0 + 2.0 * 3 / 7)
    assert cost().product_s(24, 1e9) == pytest.approx(12.0)


def test_a_product_is_never_quicker_than_reading_its_weights() -> None:
    assert cost(with_(read_bytes_per_s=1e8)).product_s(8, 1e9) == 20.0


def test_devices_of_a_host_share_what_it_reads() -> None:
    slow = with_(host_read_bytes_per_s=2e8)
    assert cost(slow).product_s(1, 1e9) == 10.0
    assert cost(slow, Ways(data=2)).product_s(1, 1e9) == 20.0
    assert cost(slow, Ways(data=64)).product_s(1, 1e9) == 40.0  # four to a host, whatever there is


def test_a_product_measured_alone_takes_longer_where_neighbours_read_too() -> None:
    halved = cost(with_(host_read_bytes_per_s=1e9), Ways(data=2))
    assert halved.product_s(1, 1e9) == 4.0  # it was all reading, of 2 s
    assert halved.product_s(8, 1e9) == pytest.approx((4.0**4 - 2.0**4 + 4.0**4) ** 0.25)  # 2 s of reading became 4


def test_float32_reads_twice_the_bytes_and_multiplies_at_its_share() -> None:
    wide = dataclasses.replace(MODEL, item_bytes=4)
    assert cost(model=wide).product_s(1, 1e9) == 4.0
    assert cost(model=wide).product_s(8, 1e9) == pytest.approx(8.0)


def test_a_decode_step_is_its_layers_and_its_head() -> None:
    found = cost().predict(LOAD)
    attention = 2 * (2 * 64 * 5 * 20) / 1e9  # K and V of 64 keys in two layers
    assert found.slowest.products == pytest.approx(2 * 2 * LAYER / 1e9)
    assert found.slowest.head == pytest.approx(2 * 500_000 / 1e9)
    assert found.slowest.attention == pytest.approx(attention)
    assert found.step_s == pytest.approx(2 * (2 * LAYER + 500_000) / 1e9 + attention)
    assert found.decode_tokens_per_s == pytest.approx(1 / found.step_s)


def test_planning_and_launches_add_to_each_step() -> None:
    busy = cost(with_(layer_s=1.0, step_s=10.0, row_s=100.0)).predict(dataclasses.replace(LOAD, batch=3))
    assert busy.slowest.overhead == pytest.approx(2 * 1.0 + 10.0 + 3 * 100.0)
    told = cost(with_(plan_s=1.0), Ways(4, 1, 1, 2)).predict(dataclasses.replace(LOAD, batch=2))
    assert told.slowest.overhead == pytest.approx(3)  # ranks of one shard
    stages = (STAGE,) * 3
    silent, told = (cost(with_(plan_s=each), Ways(2, 3), *stages).predict(LOAD) for each in (0.0, 1.0))
    # a lone sequence passes all stages: five plans from the first, one taken by each other, and a result
    assert told.step_s - silent.step_s == pytest.approx(5 + 1 + 1 + 1)


def test_attention_is_the_slower_of_reading_and_multiplying_and_more_where_they_are_equal() -> None:
    reading = 2 * 64 * 5 * 20 / 1e9
    flops = 4 * 64 * 10 * 10
    equal = cost(with_(attention_decode_flops=flops / reading)).decode(STAGE, 1, LOAD)
    assert equal.attention == pytest.approx(2 * reading * 2**0.25)
    computing = cost(with_(attention_decode_flops=flops / reading / 10)).decode(STAGE, 1, LOAD)
    assert computing.attention == pytest.approx(2 * reading * 10, rel=1e-4)
    half = cost(with_(attention_read_share=0.5)).decode(STAGE, 1, LOAD)
    assert half.attention == pytest.approx(2 * reading * 2)


def test_groups_share_pages_and_the_one_with_most_decides() -> None:
    one_row = 2 * 16 * 5 * 20 / 1e9  # of one page, K and V
    load = dataclasses.replace(LOAD, context=5 * 16)
    stage = dataclasses.replace(STAGE, windows=(0,))
    assert cost(PLAIN, Ways(2, 1, 2), stage).decode(stage, 1, load).attention == pytest.approx(3 * one_row)
    assert cost(PLAIN, Ways(2, 1, 2), stage).decode(stage, 2, load).attention == pytest.approx(5 * one_row)


def test_a_window_bounds_the_keys_that_a_decode_reads() -> None:
    stage = dataclasses.replace(STAGE, windows=(32, 0))
    times = cost(PLAIN, None, stage).decode(stage, 1, LOAD)
    assert times.attention == pytest.approx((32 + 64) * 2 * 5 * 20 / 1e9)


@pytest.mark.parametrize("window", [0, 1, 7, 20, 64])
def test_a_prompts_attention_is_every_pair_of_a_query_and_a_key_that_it_sees(window: int) -> None:
    stage = dataclasses.replace(STAGE, windows=(window,), head_rows=0)
    only_pairs = with_(
        attention_prefill_flops=4 * 10 * 10.0,  # a pair a second, for all heads
        read_bytes_per_s=1e18,
        product_flops=((1, 1e18),),
    )
    pairs = sum(1 for i in range(64) for j in range(i + 1) if not window or i - j < window)
    assert cost(only_pairs, None, stage).prefill(LOAD, 1) == pytest.approx(pairs)
    assert cost(only_pairs, Ways(2, 1, 2), stage).prefill(LOAD, 1) == pytest.approx(pairs / 2)


def test_two_sums_a_layer_and_two_more_with_groups() -> None:
    linked = with_(exchange_s=1.0)
    stage = dataclasses.replace(STAGE, head_rows=0)
    assert cost(linked, Ways(1), stage).decode(stage, 1, LOAD).collectives == 0
    assert cost(linked, Ways(2), stage).decode(stage, 1, LOAD).collectives == pytest.approx(2 * 2)
    assert cost(linked, Ways(4, 1, 2), stage).decode(stage, 1, LOAD).collectives == pytest.approx(2 * 4)


def test_an_exchange_reads_what_all_wrote_and_a_ring_moves_each_byte_twice() -> None:
    rate = with_(exchange_bytes_per_s=1e9)
    num_bytes = 1000 * 2
    ring = cost(rate, Ways(4)).decode(STAGE, 1, LOAD).collectives
    assert ring == pytest.approx(2 * 2 * (2 * 3 / 4) * num_bytes / 1e9)
    exchange = cost(dataclasses.replace(rate, collective="exchange"), Ways(4)).decode(STAGE, 1, LOAD).collectives
    assert exchange == pytest.approx(2 * 2 * 4 * num_bytes / 1e9)


def test_ranks_that_no_host_holds_meet_over_the_network() -> None:
    far = with_(network_exchange_s=1.0)
    assert cost(far, Ways(4)).decode(STAGE, 1, LOAD).collectives == pytest.approx(0, abs=1e-12)
    assert cost(far, Ways(8)).decode(STAGE, 1, LOAD).collectives == pytest.approx(4)


HALVES = (
    dataclasses.replace(STAGE, windows=(0,), head_rows=0),
    dataclasses.replace(STAGE, windows=(0,), head_rows=0),
)
NO_HEAD = dataclasses.replace(STAGE, head_rows=0)


def test_a_pipelines_gain_is_bound_by_the_ratio_of_step_times_at_full_and_half_batch() -> None:
    load = dataclasses.replace(LOAD, batch=16)
    whole = cost(PLAIN, None, NO_HEAD)
    split = cost(PLAIN, Ways(1, 2), *HALVES).predict(load)
    full, half = (whole.decode(NO_HEAD, rows, load).total for rows in (16, 8))
    assert (split.num_micro_batches, split.rows) == (2, 8)
    assert split.step_s == pytest.approx(half)
    assert whole.predict(load).step_s / split.step_s == pytest.approx(full / half)


def test_a_batch_smaller_than_the_pipeline_waits_for_every_stage_and_hand_over() -> None:
    load = dataclasses.replace(LOAD, batch=1)
    alone = cost(PLAIN, None, NO_HEAD).predict(load).step_s
    assert cost(with_(exchange_s=1.0), Ways(1, 2), *HALVES).predict(load).step_s == pytest.approx(alone + 1.0)


CUT = (  # the first stage leaves 200 of the 300 rows of its one MLP to the second
    dataclasses.replace(STAGE, windows=(0,), head_rows=0, left_mlp=200),
    dataclasses.replace(STAGE, windows=(0,), head_rows=0, carried_mlp=200),
)


def test_rows_of_an_mlp_count_where_they_are_computed() -> None:
    found = [cost(PLAIN, Ways(1, 2), *CUT).decode(stage, 1, LOAD).products for stage in CUT]
    assert found == pytest.approx([2 * (LAYER - 3 * 1000 * 200) / 1e9, 2 * (LAYER + 3 * 1000 * 200) / 1e9])


def test_the_second_part_of_an_mlp_has_a_norm_a_sum_and_half_a_layers_launches_of_its_own() -> None:
    busy = with_(exchange_s=1.0, elements_per_s=1.0, layer_s=1.0)
    first, second = (cost(busy, Ways(2, 2), *CUT).decode(stage, 1, LOAD) for stage in CUT)
    assert (first.collectives, second.collectives) == pytest.approx((2, 3))
    assert (first.overhead, second.overhead) == pytest.approx((1, 1.5))
    # norms, sums, q, k and v, what attention found, activations
    assert first.elements == pytest.approx(4 * 1000 + 20 * 10 + 10 * 10 + 100)
    assert second.elements == pytest.approx(6 * 1000 + 20 * 10 + 10 * 10 + 500)


def test_a_stage_that_ends_inside_an_mlp_hands_on_twice_the_rows() -> None:
    slow = with_(exchange_bytes_per_s=1e3)
    row = 1000 * 2 / 1e3
    for stages, arrays in ((HALVES, 1), (CUT, 2)):
        here, free = (cost(each, Ways(1, 2), *stages) for each in (slow, PLAIN))
        assert here.predict(LOAD).step_s - free.predict(LOAD).step_s == pytest.approx(arrays * row)
        load = dataclasses.replace(LOAD, context=16)
        assert here.prefill(load, 1) - free.prefill(load, 1) == pytest.approx(arrays * 16 * row)


def test_a_long_prompt_passes_two_stages_in_its_chunks_and_one_more() -> None:
    free = with_(read_bytes_per_s=1e18, product_flops=((1, 1e9),))
    load = Workload(context=4 * 32, batch=1, chunk=32, block_size=32)
    split = cost(free, Ways(1, 2), *HALVES)
    assert split.chunk(load, 1) == 32
    one = 2 * 32 * LAYER / 1e9  # one chunk on one stage
    assert split.prefill(load, 1) == pytest.approx(5 * one)
    assert split.prefill(load, 3) == pytest.approx((5 + 2 * 4) * one)
    assert cost(free, None, NO_HEAD).prefill(load, 3) == pytest.approx(3 * 4 * 2 * one)


def test_short_prompts_share_steps() -> None:
    load = Workload(context=16, batch=4, chunk=32, block_size=16)
    assert cost().prefill(load, 4) == pytest.approx(2 * cost().prefill(load, 2))
    assert cost().prefill(load, 2) < 2 * cost().prefill(load, 1)


@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize("context", [1, 15, 640, 2048, 100_000])
def test_prompts_are_cut_as_the_scheduler_cuts_them(stages: int, context: int) -> None:
    load = Workload(context=context, batch=8, chunk=1024, block_size=16)
    each = dataclasses.replace(STAGE, windows=(0,))
    waiting: Any = [SimpleNamespace(tokens=range(context), num_computed=0)] * 8
    assert cost(PLAIN, Ways(1, stages), *[each] * stages).chunk(load, 8) == Stages(stages, 16).prompt_tokens(
        waiting, [], 1024
    )


def test_replicas_divide_the_batch_and_add_their_tokens() -> None:
    load = dataclasses.replace(LOAD, batch=8)
    whole, halves = cost().predict(dataclasses.replace(LOAD, batch=4)), cost(PLAIN, Ways(data=2)).predict(load)
    assert halves.step_s == whole.step_s
    assert halves.decode_tokens_per_s == pytest.approx(2 * whole.decode_tokens_per_s)
    assert halves.prefill_tokens_per_s == pytest.approx(2 * whole.prefill_tokens_per_s)


def test_memory_is_weights_pages_of_the_fullest_group_working_space_and_reserve() -> None:
    load = Workload(context=70, batch=3, chunk=32, block_size=16)
    pages = 3 * 5
    page = 2 * 2 * 5 * 16 * 20
    whole = cost(with_(reserve_bytes=7.0)).memory(load)
    assert (whole.weights, whole.pages, whole.reserve) == (STAGE.weight_bytes, pages * page, 7.0)
    assert whole.working == 4 * (32 * (3 * 1000 + 20 * 10 + 2 * 10 * 10 + 300) + 3 * 500)
    assert whole.total == whole.weights + whole.pages + whole.working + whole.reserve
    both = cost(PLAIN, Ways(1, 2), *CUT).memory(load).working  # of either stage: the partial sums beside the stream
    assert both == 4 * 32 * (4 * 1000 + 20 * 10 + 2 * 10 * 10 + 300)
    assert cost(PLAIN, Ways(2, 1, 2)).memory(load).pages == 8 * page
    assert cost(PLAIN, Ways(data=3)).memory(load).pages == 5 * page


def test_memory_is_that_of_the_stage_that_needs_most() -> None:
    large = dataclasses.replace(STAGE, weight_bytes=10**9)
    assert cost(PLAIN, Ways(1, 2), STAGE, large).memory(LOAD).weights == 10**9


def test_stages_and_layout_must_agree() -> None:
    with pytest.raises(ValueError, match="stages: got 1, must be 2"):
        cost(PLAIN, Ways(1, 2))
    with pytest.raises(ValueError, match="page: got 2, must divide 3"):
        cost(PLAIN, Ways(3, 1, 2))


def test_threads_of_a_rank_multiply_rates_up_to_what_the_host_reads() -> None:
    cores = with_(kind="cpu", host_read_bytes_per_s=3e9, barrier_s=1.0)
    pair = cores.of_threads(2)
    assert (pair.devices_per_host, pair.memory_bytes, pair.read_bytes_per_s) == (2, 2e9, 2e9)
    assert (pair.product_flops, pair.attention_decode_flops) == (((1, 2e9), (8, 8e9)), 2e18)
    assert cores.of_threads(4).read_bytes_per_s == 3e9
    assert cost(pair).decode(STAGE, 1, LOAD).overhead == 2 * 9
    assert cost(cores.of_threads(1)).decode(STAGE, 1, LOAD).overhead == 0
    with pytest.raises(ConfigError, match="threads: got 5, must be from 1 to the 4 cores of a host"):
        cores.of_threads(5)
    with pytest.raises(ConfigError, match="must be 1 where the device is a GPU"):
        PLAIN.of_threads(2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "tpu"}, "kind: got 'tpu', must be one of cpu, gpu"),
        ({"collective": "tree"}, "collective: got 'tree', must be one of exchange, ring"),
        ({"read_bytes_per_s": 0.0}, "read_bytes_per_s: got 0.0, must be a finite number above 0"),
        ({"layer_s": -1.0}, "layer_s: got -1.0, must be a finite number from 0"),
        ({"step_s": math.nan}, "step_s: got nan"),
        ({"devices_per_host": 0}, "devices_per_host: got 0"),
        ({"float32_share": 1.5}, "float32_share: got 1.5, must be at most 1"),
        ({"product_flops": ()}, "product_flops"),
        ({"product_flops": ((2, 1e9),)}, "must name rates by numbers of rows that grow from 1"),
        ({"product_flops": ((1, 1e9), (8, 1e9), (4, 1e9))}, "must name rates by numbers of rows that grow from 1"),
        ({"product_flops": ((1, math.inf),)}, "product_flops of 1 rows: got inf"),
    ],
)
def test_a_constant_that_cannot_be_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_(**changes)
    assert text in str(refusal.value)

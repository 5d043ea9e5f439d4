"""A PageRef is three numbers in 64 bits: each comes back, none leaks into another."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagetable.ids import (
    MAX_BLOCKS,
    MAX_DEVICES,
    MAX_GENERATIONS,
    BlockId,
    DeviceId,
    Generation,
    block_of,
    device_of,
    generation_of,
    page_ref,
)

# The same examples in every run; to search further, drop derandomize here and raise max_examples.
LAWS = settings(deadline=None, derandomize=True, max_examples=200)

devices = st.integers(0, MAX_DEVICES - 1)
blocks = st.integers(0, MAX_BLOCKS - 1)
generations = st.integers(0, MAX_GENERATIONS - 1)


@LAWS
@given(devices, blocks, generations)
@example(0, 0, 0)
@example(MAX_DEVICES - 1, 0, 0)
@example(0, MAX_BLOCKS - 1, 0)
@example(0, 0, MAX_GENERATIONS - 1)
@example(MAX_DEVICES - 1, MAX_BLOCKS - 1, MAX_GENERATIONS - 1)
def test_a_reference_gives_back_what_was_packed(device: int, block: int, generation: int) -> None:
    ref = page_ref(DeviceId(device), BlockId(block), Generation(generation))
    assert 0 <= ref < 2**64
    assert (device_of(ref), block_of(ref), generation_of(ref)) == (device, block, generation)


@LAWS
@given(st.integers(0, 2**64 - 1))
def test_every_64_bit_number_is_the_reference_of_its_parts(number: int) -> None:
    device, block, generation = number >> 48, number // 2**24 % 2**24, number % 2**24
    ref = page_ref(DeviceId(device), BlockId(block), Generation(generation))
    assert ref == number
    assert (device_of(ref), block_of(ref), generation_of(ref)) == (device, block, generation)


@pytest.mark.parametrize(
    ("parts", "ref"),
    [
        ((0, 0, 1), 0x0000_000000_000001),
        ((0, 1, 0), 0x0000_000001_000000),
        ((1, 0, 0), 0x0001_000000_000000),
        ((0xABCD, 0x123456, 0xFEDCBA), 0xABCD_123456_FEDCBA),
        ((0xFFFF, 0xFFFFFF, 0xFFFFFF), 2**64 - 1),
    ],
)
def test_the_bits_are_where_the_drawing_says(parts: tuple[int, int, int], ref: int) -> None:
    assert page_ref(DeviceId(parts[0]), BlockId(parts[1]), Generation(parts[2])) == ref


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("beyond", ["below", "above", "far above"])
def test_a_number_that_does_not_fit_its_bits_is_refused(part: int, beyond: str) -> None:
    limit = (2**16, 2**24, 2**24)[part]
    parts = [1, 2, 3]
    parts[part] = {"below": -1, "above": limit, "far above": 2**64}[beyond]
    with pytest.raises(ValueError, match=r"does not fit in 16, 24 and 24 bits"):
        page_ref(DeviceId(parts[0]), BlockId(parts[1]), Generation(parts[2]))
    parts[part] = limit - 1
    assert 0 < page_ref(DeviceId(parts[0]), BlockId(parts[1]), Generation(parts[2])) < 2**64

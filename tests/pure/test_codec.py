"""Plans and results as bytes: what is written is read back equal, and nothing else is read."""

from __future__ import annotations

import contextlib
import math
from array import array
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagetable.frames import BadFrame
from pagetable.ids import PlanNumber, SequenceId
from pagetable.sampling import SamplingParams
from worker.codec import decode_plan, decode_result, encode_plan, encode_result
from worker.plan import Admit, Plan, StepResult, TokenLogprobs

INT32 = st.integers(-(2**31), 2**31 - 1)
INTS = st.lists(INT32, max_size=6).map(lambda values: array("i", values))
FLOATS = st.floats(allow_nan=False)
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 16),
    temperature=FLOATS,
    top_p=FLOATS,
    top_k=INT32,
    min_p=FLOATS,
    repetition_penalty=FLOATS,
    presence_penalty=FLOATS,
    frequency_penalty=FLOATS,
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), FLOATS, max_size=3),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(max_size=5), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=2).map(tuple),
    include_stop_str_in_output=st.booleans(),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 2**31 - 1),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    skip_special_tokens=st.booleans(),
)
ADMITS = st.builds(
    Admit,
    slot=INT32,
    sequence_id=st.integers(0, 2**64 - 1).map(SequenceId),
    sample_index=INT32,
    params=PARAMS,
    prompt_length=INT32,
    tokens=INTS,
    eos_token_ids=st.lists(INT32, max_size=3).map(tuple),
)
COLUMNS = ("table_blocks", "copy_sources", "copy_targets")
ARRAYS = [each.name for each in fields(Plan) if each.name not in ("number", "admits", *COLUMNS)]
PLANS = st.builds(
    Plan,
    number=st.integers(0, 2**64 - 1).map(PlanNumber),
    admits=st.lists(ADMITS, max_size=2),
    **dict.fromkeys(ARRAYS, INTS),
    **{name: st.lists(INTS, min_size=1, max_size=3) for name in COLUMNS},
)
LOGPROBS = st.builds(
    TokenLogprobs,
    logprob=FLOATS,
    rank=st.integers(1, 2**31 - 1),
    top=st.lists(st.tuples(INT32, FLOATS), max_size=3).map(tuple),
)
RESULTS = st.builds(
    StepResult,
    number=st.integers(0, 2**64 - 1).map(PlanNumber),
    tokens=INTS,
    logprobs=st.dictionaries(INT32, LOGPROBS, max_size=3),
    scores=st.lists(LOGPROBS, max_size=3),
    failed=st.dictionaries(INT32, st.text(max_size=9), max_size=2),
)


@given(PLANS)
@settings(max_examples=300, deadline=None)
def test_a_plan_is_read_back_equal(plan: Plan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


@given(RESULTS)
@settings(max_examples=300, deadline=None)
def test_a_result_is_read_back_equal(result: StepResult) -> None:
    assert decode_result(encode_result(result)) == result


def test_every_field_of_the_parameters_goes_over() -> None:
    """Also one that does not differ from its default by much, and those that are added later."""
    values: dict[str, Any] = {"stop": ("a",), "stop_token_ids": (5,), "logit_bias": {3: 0.5}}
    for each in fields(SamplingParams):
        default = getattr(SamplingParams(), each.name)
        value = values.get(each.name, (not default) if isinstance(default, bool) else 7)
        admit = Admit(0, SequenceId(1), 0, SamplingParams(**{each.name: value}), 1, array("i", (1,)))
        plan = Plan(PlanNumber(1), admits=[admit])
        found = getattr(decode_plan(encode_plan(plan)).admits[0].params, each.name)
        assert found == value != default and type(found) is type(value)


@given(PLANS, st.data())
@settings(max_examples=200, deadline=None)
def test_a_plan_that_ends_early_or_late_is_none(plan: Plan, data: st.DataObject) -> None:
    whole = encode_plan(plan)
    with pytest.raises(BadFrame):
        decode_plan(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BadFrame, match="behind the end"):
        decode_plan(whole + data.draw(st.binary(min_size=1, max_size=9)))


@given(RESULTS, st.data())
@settings(max_examples=200, deadline=None)
def test_a_result_that_ends_early_or_late_is_none(result: StepResult, data: st.DataObject) -> None:
    whole = encode_result(result)
    with pytest.raises(BadFrame):
        decode_result(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BadFrame, match="behind the end"):
        decode_result(whole + data.draw(st.binary(min_size=1, max_size=9)))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_a_plan_or_a_bad_frame(data: bytes) -> None:
    for decode in (decode_plan, decode_result):
        with contextlib.suppress(BadFrame):
            decode(data)


@given(PLANS, st.data())
@settings(max_examples=300, deadline=None)
def test_one_changed_byte_gives_a_plan_or_a_bad_frame(plan: Plan, data: st.DataObject) -> None:
    whole = bytearray(encode_plan(plan))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode_plan(bytes(whole))
    except BadFrame:
        return
    assert changed != plan or _has_equal_spellings(plan)


def _has_equal_spellings(plan: Plan) -> bool:
    """JSON has more than one spelling of some values."""
    return bool(plan.admits)


@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 10**6])
def test_a_huge_count_is_refused_without_the_memory(count: int) -> None:
    number, huge, rest = (7).to_bytes(8, "little"), count.to_bytes(4, "little"), b"\0" * 128
    with pytest.raises(BadFrame, match="bytes early"):
        decode_result(number + huge + rest)
    for at in range(len(ARRAYS) + len(COLUMNS)):
        with pytest.raises(BadFrame, match="bytes early"):
            decode_plan(number + b"\0" * 4 * at + huge + rest)


def test_numbers_that_are_not_finite_go_over() -> None:
    scores = [TokenLogprobs(-math.inf, 1, ((3, -math.inf),)), TokenLogprobs(math.nan, 2, ())]
    found = decode_result(encode_result(StepResult(PlanNumber(1), array("i"), scores=scores))).scores
    assert found[0] == scores[0] and math.isnan(found[1].logprob)

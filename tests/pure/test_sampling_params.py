"""The one validator: every range, at both of its ends and just beyond, and what admission fills in."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest

from pagetable.errors import ConfigError, InvalidRequest
from pagetable.sampling import Limits, Request, SamplingParams, admit_request, validate_params

LIMITS = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=48)
NAN, INF = math.nan, math.inf


def admit(prompt: Any = (1, 2, 3), params: SamplingParams | None = None, **more: Any) -> Request:
    arguments: dict[str, Any] = {"seed": 7, **more}
    return admit_request("r1", prompt, params or SamplingParams(), arguments.pop("limits", LIMITS), **arguments)


GOOD: dict[str, list[Any]] = {
    "n": [1, 16],
    "temperature": [0, 0.0, -0.0, 5e-324, 1, 2.5, 100.0],
    "top_p": [5e-324, 0.5, 1, 1.0],
    "top_k": [-1, 0, 1, 99, 100, 2**31 - 1],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [0.01, 1, 10.0],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2.0, 2],
    "logit_bias": [{}, {0: -100, 99: 100.0}, None],
    "seed": [None, 0, 2**63 - 1],
    "stop": [(), "a", ["a", "\x00"], ("\uffff" * 85,), ("x",) * 16, None],
    "stop_token_ids": [(), [0, 99], (5,) * 64, None],
    "min_tokens": [0, 16],
    "max_tokens": [None, 1, 2**31 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
    "include_stop_str_in_output": [True, False],
    "skip_special_tokens": [True, False],
}
NO_WHOLE = [True, 1.0, "1", NAN, [1]]
NO_REAL = [True, "1", NAN, INF, -INF, None, [1.0], 10**400]
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 17, 10**9, None, *NO_WHOLE],
    "temperature": [-5e-324, -1, 100.1, *NO_REAL],
    "top_p": [0, 0.0, -0.1, 1.01, *NO_REAL],
    "top_k": [-2, 2**31, None, *NO_WHOLE],
    "min_p": [-0.01, 1.01, *NO_REAL],
    "repetition_penalty": [0, 0.0, -1, 1e-9, 1e9, *NO_REAL],
    "presence_penalty": [-2.01, 2.01, 1e9, *NO_REAL],
    "frequency_penalty": [-2.01, 2.01, 1e9, *NO_REAL],
    "logit_bias": [
        *({100: 1.0}, {-1: 1.0}, {2**63: 1.0}, {True: 1.0}, {"1": 1.0}, {1.0: 1.0}, [(1, 1.0)], "1"),
        *({1: value} for value in (100.1, -100.1, *NO_REAL)),
        dict.fromkeys(range(1025), 0.0),
    ],
    "seed": [-1, 2**63, 2**64, -(2**63) - 1, *NO_WHOLE],
    "stop": [("",), ("a", ""), ("x",) * 17, ("é" * 129,), ("\ud800",), (1,), 5, {"a": 1}, b"a", [None]],
    "stop_token_ids": [(100,), (-1,), (2**63 - 1,), (True,), (1.0,), ("1",), (5,) * 65, 5, "5", {5}],
    "min_tokens": [-1, 17, 2**63, None, *NO_WHOLE],
    "max_tokens": [0, -1, 2**31, 2**63, *NO_WHOLE],
    "logprobs": [-1, 21, 100, *NO_WHOLE],
    "prompt_logprobs": [-1, 21, 100, *NO_WHOLE],
    "ignore_eos": [None, 0, 1, "true"],
    "include_stop_str_in_output": [None, 0, 1, "true"],
    "skip_special_tokens": [None, 0, 1, "true"],
}


def test_the_tables_cover_every_field() -> None:
    names = set(SamplingParams.__dataclass_fields__)
    assert set(GOOD) == names
    assert set(BAD) == names


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_accepted(name: str, value: Any) -> None:
    validate_params(SamplingParams(**{name: value}), LIMITS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_params(SamplingParams(**{name: value}), LIMITS)
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}: got ")
    assert ", must " in str(caught.value)
    assert len(str(caught.value)) < 250


def test_one_sentence_with_field_value_limit_and_cure() -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate_params(SamplingParams(seed=-5), LIMITS)
    assert str(caught.value) == (
        "seed: got -5, must be a whole number from 0 to 9223372036854775807; leave it out to have one chosen"
    )
    with pytest.raises(InvalidRequest, match="top_p: got 0, must be a number above 0 and at most 1; 1 keeps all"):
        validate_params(SamplingParams(top_p=0), LIMITS)


def test_lists_and_one_stop_string_become_tuples() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("END",), (1, 2))


def test_defaults_and_seed_are_filled_in() -> None:
    request = admit(params=SamplingParams(max_tokens=None), eos_token_ids=[9])
    assert request == Request("r1", (1, 2, 3), SamplingParams(max_tokens=45, seed=7), (9,), "")
    assert admit(params=SamplingParams(seed=0)).params.seed == 0
    assert admit(array("i", [5, 6])).prompt == (5, 6)
    assert admit(cache_salt="team-a:1.b_").cache_salt == "team-a:1.b_"


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ([], "[]"),
        ([1, -1], "-1"),
        ([100], "100"),
        ([1, 2**63 - 1], str(2**63 - 1)),
        ([True], "True"),
        ([1.0], "1.0"),
        (["1"], "'1'"),
        ([None], "None"),
        ("abc", "'abc'"),
        (b"abc", "b'abc'"),
        (None, "None"),
        (7, "7"),
        ({1}, "{1}"),
    ],
)
def test_prompts_are_lists_of_known_tokens(prompt: Any, shown: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(prompt, prompt_field="prompt_token_ids")
    assert caught.value.field == "prompt_token_ids"
    assert str(caught.value).startswith(f"prompt_token_ids: got {shown}, must ")


def test_a_bad_token_is_named_with_its_place() -> None:
    with pytest.raises(InvalidRequest, match=r"prompt: got 100, must hold whole numbers from 0 to 99 only; .* index 2"):
        admit([0, 99, 100, -1])


ROOMY = Limits(vocab_size=100, max_model_len=64, max_pool_tokens=1000)


def test_prompt_and_output_fill_the_context_to_the_last_token() -> None:
    assert admit([1] * 60, SamplingParams(max_tokens=4), limits=ROOMY).params.max_tokens == 4
    assert admit([1] * 63, SamplingParams(max_tokens=None), limits=ROOMY).params.max_tokens == 1
    with pytest.raises(InvalidRequest, match=r"max_tokens: got 5, must be at most 4 \(max_model_len 64 - 60 prompt"):
        admit([1] * 60, SamplingParams(max_tokens=5), limits=ROOMY)
    for length in (64, 65, 100_000):
        with pytest.raises(InvalidRequest, match=f"prompt: got '{length} tokens', must hold at most 63 tokens"):
            admit([1] * length, SamplingParams(max_tokens=None), limits=ROOMY)


def test_prompt_and_output_fill_the_pool_to_the_last_token() -> None:
    assert admit([1] * 40, SamplingParams(max_tokens=8)).params.max_tokens == 8
    assert admit([1] * 40, SamplingParams(max_tokens=None)).params.max_tokens == 8
    with pytest.raises(InvalidRequest, match="exceeds_pool") as caught:
        admit([1] * 40, SamplingParams(max_tokens=9))
    assert caught.value.field == "max_tokens"
    assert "at most 8: the page pool holds 48 tokens" in str(caught.value)
    for max_tokens in (1, None):
        with pytest.raises(InvalidRequest, match="exceeds_pool") as caught:
            admit([1] * 48, SamplingParams(max_tokens=max_tokens))
        assert caught.value.field == "prompt"
    # samples may run one after another: n does not multiply
    assert admit([1] * 40, SamplingParams(max_tokens=8, n=16)).params.n == 16


def test_min_tokens_must_fit_the_room() -> None:
    fits = SamplingParams(max_tokens=None, min_tokens=45)
    assert admit(params=fits).params.max_tokens == 45
    with pytest.raises(InvalidRequest, match=r"min_tokens: got 46, .* to 45; the prompt of 3 tokens"):
        admit(params=SamplingParams(max_tokens=None, min_tokens=46))


@pytest.mark.parametrize("salt", ["", "/", "a b", "x" * 129, "a\x00", "é", "a\n", 5, b"a"])
def test_salts_are_short_and_safe(salt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"cache_salt: .*1 to 128 characters"):
        admit(cache_salt=salt)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\x00", "\ud800", 5, None])
def test_request_ids_are_short_and_printable(name: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"request_id: .*1 to 128 printable"):
        admit_request(name, [1], SamplingParams(), LIMITS, seed=1)


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
@pytest.mark.parametrize("value", [0, -1, True, 1.0, None])
def test_limits_are_positive_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(**{"vocab_size": 10, "max_model_len": 10, "max_pool_tokens": 10, name: value})
    assert caught.value.field == name

"""What a request asks for, and the one validator that every front end and the engine use.

It stands beside the page tables because `cluster` (which may not import `worker`) and `worker` both need it,
and a second definition would drift. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from pagetable.errors import ConfigError, InvalidRequest

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_INT32 = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_REQUEST_ID_CHARS = 128

_SALT = re.compile(r"[A-Za-z0-9_.:-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. vLLM's names and defaults.

    `stop` may be given as one string, lists become tuples. Ranges are checked by `validate_params`, since some
    depend on the model.

    Attributes:
        n: samples of one prompt; they share the prompt's pages.
        temperature: 0 is greedy.
        top_k: 0 or -1 keeps all.
        seed: with the sample index and the position it decides every random number; filled in at admission.
        max_tokens: None is as many as the context has room for.
        stop: strings that end the text; not part of it unless `include_stop_str_in_output`.
        logprobs: how many of the likeliest tokens to return at each position, up to 20; None is none.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, empty in (("stop", ()), ("stop_token_ids", ()), ("logit_bias", {})):
            given: object = getattr(self, name)
            if isinstance(given, str) and name == "stop":
                object.__setattr__(self, name, (given,))
            elif isinstance(given, list):
                object.__setattr__(self, name, tuple(given))
            elif given is None:
                object.__setattr__(self, name, empty)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request is checked against. All visible in `quire generate --print-config` and in errors.

    Attributes:
        vocab_size: token ids are below it.
        max_model_len: prompt and output tokens of one sequence together.
        max_pool_tokens: what one sequence may hold in the whole pool (blocks times block size).
    """

    vocab_size: int
    max_model_len: int
    max_pool_tokens: int
    max_n: int = 16
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_bytes: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 1024
    max_salt_chars: int = 128
    max_prompt_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 1:
                raise ConfigError(each.name, value, "be a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class Request:
    """A request as admitted: defaults and seed filled in. This and the emitted tokens are enough to run it on.

    Attributes:
        prompt: token ids.
        eos_token_ids: they end a sequence unless `params.ignore_eos`.
        cache_salt: pages are shared only between requests of equal salt.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""


def _whole(field: str, value: object, low: int, high: int, cure: str = "") -> int:
    """An int in [low, high]; True is not an int, nor is 1.0."""
    if type(value) is not int or not (low <= value <= high):
        raise InvalidRequest(field, value, f"be a whole number from {low} to {high}", cure)
    return value


def _real(field: str, value: object, low: float, high: float, *, above: bool = False, cure: str = "") -> None:
    """A number in [low, high], or in (low, high] where `above`. NaN fails every comparison, so it is refused here."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and low <= value <= high) or (above and value == low):  # type: ignore[operator]
        bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidRequest(field, value, f"be a number {bounds}", cure)


def _flag(field: str, value: object) -> None:
    if type(value) is not bool:
        raise InvalidRequest(field, value, "be true or false")


def _check_stop(stop: object, limits: Limits) -> None:
    if not isinstance(stop, tuple) or not all(type(each) is str for each in stop):
        raise InvalidRequest("stop", stop, "be a string or a list of strings")
    if len(stop) > limits.max_stop_strings:
        raise InvalidRequest("stop", len(stop), f"hold at most {limits.max_stop_strings} strings")
    for each in stop:
        try:
            size = len(each.encode())
        except UnicodeEncodeError:
            raise InvalidRequest("stop", each, "be text", "take out the lone surrogate") from None
        if not 1 <= size <= limits.max_stop_bytes:
            raise InvalidRequest("stop", each, f"be strings of 1 to {limits.max_stop_bytes} bytes", f"it has {size}")


def _check_ids(params: SamplingParams, limits: Limits) -> None:
    """stop_token_ids and logit_bias: what names tokens."""
    last = limits.vocab_size - 1
    ids, bias = params.stop_token_ids, params.logit_bias
    if not isinstance(ids, tuple):
        raise InvalidRequest("stop_token_ids", ids, "be a list of token ids")
    if len(ids) > limits.max_stop_token_ids:
        raise InvalidRequest("stop_token_ids", len(ids), f"hold at most {limits.max_stop_token_ids} ids")
    for each in ids:
        _whole("stop_token_ids", each, 0, last, "the last is the model's highest token id")
    if not isinstance(bias, Mapping):
        raise InvalidRequest("logit_bias", bias, "map token ids to numbers")
    if len(bias) > limits.max_logit_bias:
        raise InvalidRequest("logit_bias", len(bias), f"hold at most {limits.max_logit_bias} entries")
    for token, value in bias.items():
        _whole("logit_bias", token, 0, last, "the keys are token ids")
        _real("logit_bias", value, -MAX_BIAS, MAX_BIAS)


def validate_params(params: SamplingParams, limits: Limits) -> None:
    """Refuse every value outside its range; the one validator, for all front ends and the engine.

    Range checks are written as `not (low <= x <= high)`, so that NaN is refused.

    Raises:
        InvalidRequest: with the field, the value, the limit and, where it is not plain, the cure.
    """
    p = params
    _whole("n", p.n, 1, limits.max_n, "send more requests of the same prompt; they share its pages")
    _real("temperature", p.temperature, 0.0, MAX_TEMPERATURE, cure="0 is greedy")
    _real("top_p", p.top_p, 0.0, 1.0, above=True, cure="1 keeps all tokens")
    _whole("top_k", p.top_k, -1, MAX_INT32, "0 or -1 keeps all tokens")
    _real("min_p", p.min_p, 0.0, 1.0, cure="0 keeps all tokens")
    _real("repetition_penalty", p.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY, cure="1 is none")
    _real("presence_penalty", p.presence_penalty, -MAX_PENALTY, MAX_PENALTY, cure="0 is none")
    _real("frequency_penalty", p.frequency_penalty, -MAX_PENALTY, MAX_PENALTY, cure="0 is none")
    _check_stop(p.stop, limits)
    _check_ids(p, limits)
    for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
        _flag(name, getattr(p, name))
    if p.seed is not None:
        _whole("seed", p.seed, 0, MAX_SEED, "leave it out to have one chosen")
    if p.max_tokens is not None:
        _whole("max_tokens", p.max_tokens, 1, MAX_INT32, "leave it out for as many as the context has room for")
    _whole("min_tokens", p.min_tokens, 0, MAX_INT32 if p.max_tokens is None else p.max_tokens, "max_tokens bounds it")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        if value is not None:
            _whole(name, value, 0, limits.max_logprobs, "leave it out for none")


def _check_prompt(prompt: Sequence[int], limits: Limits, field: str) -> None:
    """Non-empty, all ints, all below the vocabulary, short enough. 100,000 tokens take about 3 ms."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise InvalidRequest(field, prompt, "be a list of token ids")
    if not len(prompt):
        raise InvalidRequest(field, list(prompt), "hold at least 1 token")
    if len(prompt) >= limits.max_model_len:
        bound = f"hold at most {limits.max_model_len - 1} tokens (max_model_len {limits.max_model_len}, 1 to generate)"
        raise InvalidRequest(field, f"{len(prompt)} tokens", bound, "shorten it")
    if set(map(type, prompt)) != {int} or min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        last = limits.vocab_size - 1
        at, bad = next((i, x) for i, x in enumerate(prompt) if type(x) is not int or not 0 <= x <= last)
        raise InvalidRequest(field, bad, f"hold whole numbers from 0 to {last} only", f"look at index {at}")


def check_request_id(request_id: object) -> str:
    """1 to 128 printable characters, so that an id can stand in any log line."""
    if type(request_id) is str and 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS and request_id.isprintable():
        return request_id
    raise InvalidRequest("request_id", request_id, f"be a string of 1 to {MAX_REQUEST_ID_CHARS} printable characters")


def check_salt(salt: object, limits: Limits) -> str:
    """A salt that was given: 1 to 128 safe characters. It is hashed before use, but also seen in logs."""
    if type(salt) is str and len(salt) <= limits.max_salt_chars and _SALT.fullmatch(salt):
        return salt
    bound = f"be a string of 1 to {limits.max_salt_chars} characters out of A-Z a-z 0-9 _ . : -"
    raise InvalidRequest("cache_salt", salt, bound, "leave it out to share pages with all who send none")


def _fill_max_tokens(length: int, params: SamplingParams, limits: Limits, prompt_field: str) -> int:
    """max_tokens as admitted: what was asked for if prompt and output fit the context and the pool, else an error."""
    pool = limits.max_pool_tokens
    if length >= pool:
        bound = f"fit in the page pool of {pool} tokens with 1 to generate (exceeds_pool)"
        raise InvalidRequest(prompt_field, f"{length} tokens", bound, "shorten it or start with a larger pool")
    room = limits.max_model_len - length
    asked = params.max_tokens
    if asked is None:
        return min(room, pool - length)
    if asked > room:
        bound = f"be at most {room} (max_model_len {limits.max_model_len} - {length} prompt tokens)"
        raise InvalidRequest("max_tokens", asked, bound, "lower it or shorten the prompt")
    if length + asked > pool:
        bound = f"be at most {pool - length}: the page pool holds {pool} tokens (exceeds_pool)"
        raise InvalidRequest("max_tokens", asked, bound, "lower it, shorten the prompt or start with a larger pool")
    return asked


def admit_request(
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    limits: Limits,
    *,
    seed: int,
    eos_token_ids: Sequence[int] = (),
    cache_salt: str | None = None,
    prompt_field: str = "prompt",
) -> Request:
    """The one way to make a `Request`: everything checked, seed and max_tokens filled in.

    The n samples of a request count one by one against the pool: they may run after one another.

    Args:
        prompt: token ids.
        seed: taken where `params.seed` is None; hand in another one for each request.
        cache_salt: None is none; an empty string is refused.
        prompt_field: what the user calls the prompt, for errors.

    Raises:
        InvalidRequest: the text holds `exceeds_pool` where the pool could never hold the sequence.
    """
    check_request_id(request_id)
    validate_params(params, limits)
    salt = "" if cache_salt is None else check_salt(cache_salt, limits)
    _check_prompt(prompt, limits, prompt_field)
    max_tokens = _fill_max_tokens(len(prompt), params, limits, prompt_field)
    _whole(
        "min_tokens", params.min_tokens, 0, max_tokens, f"the prompt of {len(prompt)} tokens leaves room for no more"
    )
    if params.seed is None:
        params = replace(params, seed=_whole("seed", seed, 0, MAX_SEED))
    if params.max_tokens is None:
        params = replace(params, max_tokens=max_tokens)
    return Request(request_id, tuple(prompt), params, tuple(eos_token_ids), salt)


def encode_params(params: SamplingParams) -> bytes:
    """As JSON, for another process of the cluster; `decode_params` reads it back equal."""
    values = {each.name: getattr(params, each.name) for each in fields(params)}
    return json.dumps({**values, "logit_bias": [[k, v] for k, v in params.logit_bias.items()]}).encode()


def decode_params(data: bytes) -> SamplingParams:
    """Raises InvalidRequest where `data` was not made by `encode_params`. Bounds are checked at admission."""
    try:
        values = json.loads(data)
        values["logit_bias"] = {int(token): float(bias) for token, bias in values["logit_bias"]}
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
        return SamplingParams(**values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidRequest("params", data, f"be encoded sampling parameters ({type(error).__name__})") from None

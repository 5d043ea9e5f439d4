"""One JSON object to one admitted request: a line of a batch file now, the body of an RPC later.

What sampling fields may hold is decided in `pagetable.sampling` alone; here is what a raw object may say and how its
prompt becomes token ids. Text is refused by its size in bytes before it is tokenized.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from cluster.chat_template import ChatTemplate, check_messages
from cluster.tokenizer import Tokenizer
from pagetable.errors import InvalidRequest, NotSupported
from pagetable.sampling import Limits, Request, SamplingParams, admit_request, check_request_id, check_salt

PROMPTS = ("prompt", "messages", "prompt_token_ids")
SAMPLING = tuple(each.name for each in fields(SamplingParams))
KNOWN = (*PROMPTS, "request_id", "cache_salt", *SAMPLING)
# Fields of the neighbours' interfaces that a user may expect: refused as not built, never as a typing error.
NOT_BUILT = (
    *("prompt_embeds", "multi_modal_data", "images", "audio", "tools", "tool_choice", "logits_processors"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("lora", "adapter", "use_beam_search"),
)
MAX_DEPTH = 8
_HOLDS = (list, tuple, dict)
# May be null in JSON, which is the same as leaving them out.
_NULLABLE = ("request_id", "cache_salt", "seed", "max_tokens", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True)
class Text:
    """What turns a model's text into tokens: its tokenizer and, where the folder has one, its chat template."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None = None


def parse_request(
    raw: Mapping[str, Any],
    limits: Limits,
    *,
    text: Text | None,
    request_id: str,
    seed: int,
    eos_token_ids: tuple[int, ...] = (),
) -> Request:
    """An admitted request out of a JSON object.

    Args:
        raw: exactly one of `prompt`, `messages`, `prompt_token_ids`; perhaps `request_id`, `cache_salt` and
            `SamplingParams`' fields. An absent `max_tokens` is as many as fit.
        text: None where the model folder has no tokenizer: then only token ids are served.
        request_id, seed: taken where the object has none.

    Raises:
        InvalidRequest, NotSupported: with the field as the object spells it.
    """
    _check_shape(raw)
    given = {key: value for key, value in raw.items() if not (value is None and key in _NULLABLE)}
    if text is None and given.get("stop"):
        raise InvalidRequest(
            "stop", given["stop"], "not be given: the model folder has no tokenizer", "send stop_token_ids"
        )
    params = _read_params(given)
    request_id = check_request_id(given.get("request_id", request_id))
    salt = check_salt(given["cache_salt"], limits) if "cache_salt" in given else None
    present = [name for name in PROMPTS if name in given]
    if len(present) != 1:
        got = " and ".join(present) if present else "none of them"
        raise InvalidRequest(present[0] if present else "prompt", got, f"be exactly one of {', '.join(PROMPTS)}")
    kind = present[0]
    prompt = given[kind] if kind == "prompt_token_ids" else _encode(kind, given[kind], text, limits)
    if kind == "prompt_token_ids" and not isinstance(prompt, list):
        raise InvalidRequest(kind, prompt, "be a list of token ids")
    return admit_request(
        request_id,
        prompt,
        params,
        limits,
        seed=seed,
        eos_token_ids=eos_token_ids,
        cache_salt=salt,
        prompt_field=kind,
    )


def _check_shape(raw: Mapping[str, Any]) -> None:
    if not isinstance(raw, Mapping):
        raise InvalidRequest("request", raw, "be a JSON object", 'like {"prompt": "..."}')
    for key in raw:
        if type(key) is not str:
            raise InvalidRequest("request", key, "have strings as keys")
        if key in KNOWN:
            if _is_deep(raw[key]):
                raise InvalidRequest(key, "deeper lists and objects", f"be nested at most {MAX_DEPTH} deep")
            continue
        if key in NOT_BUILT:
            raise NotSupported(f"{key}: is not built; leave it out")
        # what stands before the colon is the user's own word: cut, and escaped unless it is plain
        name = key if key.isprintable() and 1 <= len(key) <= 60 else repr(key[:40])
        near = difflib.get_close_matches(name[:60], KNOWN, n=1)
        cure = f"did you mean {near[0]}?" if near else "leave it out"
        value = "deep lists and objects" if _is_deep(raw[key]) else raw[key]
        raise InvalidRequest(name, value, "not be given: there is no such field", cure)


def _is_deep(value: object) -> bool:
    """Whether lists and objects stand in each other too deeply: a thousand levels could not even be shown."""
    level = [value]
    for _ in range(MAX_DEPTH):
        held = [each.values() if isinstance(each, Mapping) else each for each in level if isinstance(each, _HOLDS)]
        level = [each for values in held for each in values if isinstance(each, _HOLDS)]
    return bool(level)


def _read_params(given: Mapping[str, Any]) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": None}
    values.update((name, given[name]) for name in SAMPLING if name in given)
    if not isinstance(values.get("stop", ""), (str, list)):
        raise InvalidRequest("stop", values["stop"], "be a string or a list of strings")
    if not isinstance(values.get("stop_token_ids", []), list):
        raise InvalidRequest("stop_token_ids", values["stop_token_ids"], "be a list of token ids")
    if "logit_bias" in values:
        values["logit_bias"] = _read_bias(values["logit_bias"])
    return SamplingParams(**values)


def _read_bias(raw: object) -> dict[int, Any]:
    """JSON keys are strings: plain decimal numbers here."""
    if not isinstance(raw, Mapping):
        raise InvalidRequest("logit_bias", raw, "map token ids to numbers")
    bias: dict[int, Any] = {}
    for key, value in raw.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
        if type(token) is not int or token in bias:
            raise InvalidRequest("logit_bias", key, "map token ids, each once, to numbers", 'write them like "42"')
        bias[token] = value
    return bias


def _encode(kind: str, value: object, text: Text | None, limits: Limits) -> list[int]:
    """Token ids of `prompt` or `messages`."""
    if text is None:
        raise InvalidRequest(kind, value, "not be text: the model folder has no tokenizer", "send prompt_token_ids")
    if kind == "prompt":
        if type(value) is not str:
            raise InvalidRequest(kind, value, "be a string", "send token ids as prompt_token_ids")
        if not value:
            raise InvalidRequest(kind, value, "hold at least 1 character")
        _check_size(kind, value, text.tokenizer, limits)
        return text.tokenizer.encode(value)
    if text.chat is None:
        raise InvalidRequest(kind, value, "not be given: the model folder has no chat template", "send prompt")
    messages = check_messages(value)
    size = sum(len(message["content"]) for message in messages)
    if size > limits.max_prompt_bytes:
        raise InvalidRequest(kind, f"{size} characters", f"have at most {limits.max_prompt_bytes} (max_prompt_bytes)")
    rendered = text.chat.render(messages)
    _check_size(kind, rendered, text.tokenizer, limits)
    return text.tokenizer.encode(rendered, add_special_tokens=False)


def _check_size(field: str, value: str, tokenizer: Tokenizer, limits: Limits) -> None:
    """Refuse what can't fit whatever its tokens are, in time that does not grow with the text beyond the limit."""
    most = limits.max_prompt_bytes
    if tokenizer.max_token_bytes is not None:
        most = min(most, (limits.max_model_len - 1) * tokenizer.max_token_bytes)
    try:
        size = len(value) if len(value) > most else len(value.encode())
    except UnicodeEncodeError as error:
        cure = f"take out the lone surrogate at character {error.start}"
        raise InvalidRequest(field, value[error.start], "be text that UTF-8 can hold", cure) from None
    if size > most:
        bound = f"have at most {most} bytes (max_model_len {limits.max_model_len}, max_prompt_bytes)"
        raise InvalidRequest(field, f"{size} bytes", bound, "shorten it")


def parse_jsonl(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any] | InvalidRequest]]:
    """(line number from 0, object or why it is none) of each line that is not blank.

    Python's NaN and Infinity pass here and are refused by the fields' own checks; a key that stands twice is refused.
    """
    for number, line in enumerate(lines):
        if line.strip():
            yield number, _parse_line(f"line {number + 1}", line)


def _parse_line(field: str, line: str) -> Mapping[str, Any] | InvalidRequest:
    try:
        found = json.loads(line, object_pairs_hook=_once)
    except _Twice as error:
        return InvalidRequest(field, error.args[0], "hold each key once")
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        return InvalidRequest(field, line.strip(), f"be a JSON object ({why})")
    if not isinstance(found, dict):
        return InvalidRequest(field, line.strip(), "be a JSON object", 'like {"prompt": "..."}')
    return found


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise _Twice(name)
            seen.add(name)
    return found

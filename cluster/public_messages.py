"""Between the public contract and our own objects: a request's fields as `parse_request` wants them, and errors that
name fields as the contract spells them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from cluster.requests import SAMPLING
from pagetable.errors import InvalidRequest
from pagetable.sampling import Request, SamplingParams
from quire_pb.inference.v1 import inference_pb2 as public

T = TypeVar("T")
PROMPTS = "text, token_ids, token_ids_le, chat"
_REPEATED = ("stop", "stop_token_ids")
# `parse_request` speaks of a JSON object's fields
_FIELDS = {"prompt": "text", "messages": "chat.messages", "prompt_token_ids": "token_ids"}
_CURES = {"send prompt": "send text", "send prompt_token_ids": "send token_ids"}
_CURES["change them, or send prompt or prompt_token_ids"] = "change them, or send text or token_ids"


def request_fields(request: public.GenerateRequest) -> dict[str, Any]:
    """What the request says, for `parse_request`: a field that was left out is absent. Raises InvalidRequest."""
    raw = _sampling_fields(request.sampling)
    for name in ("request_id", "cache_salt"):
        if request.HasField(name):
            raw[name] = getattr(request, name)
    kind = prompt_kind(request)
    if kind == "text":
        raw["prompt"] = request.text
    elif kind == "chat":
        raw["messages"] = chat_messages(request.chat)
    elif kind == "token_ids":
        raw["prompt_token_ids"] = list(request.token_ids.ids)
    else:
        data = request.token_ids_le
        if len(data) % 4:
            raise InvalidRequest("token_ids_le", f"{len(data)} bytes", "be little-endian int32, four bytes each")
        raw["prompt_token_ids"] = array("i", data).tolist()
    return raw


def prompt_kind(request: public.GenerateRequest) -> str:
    """Which field holds the prompt. Raises InvalidRequest where none does."""
    kind: str | None = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "none of them", f"be exactly one of {PROMPTS}")
    return kind


def fork_fields(request: public.ForkGenerationRequest, parent: Request) -> dict[str, Any]:
    """A fork's fields: the parent's, with what the request sets; a seed of its own, no prompt logprobs again."""
    params = parent.params
    kept = {each.name: getattr(params, each.name) for each in fields(SamplingParams)}
    lists = {name: list(kept[name]) for name in _REPEATED}
    changes = _sampling_fields(request.sampling)
    raw = kept | lists | {"n": 1, "seed": None, "prompt_logprobs": None} | changes
    if raw["n"] != 1:
        raise InvalidRequest("n", raw["n"], "be 1 in a fork", "fork again for another one")
    if raw["prompt_logprobs"] is not None:
        cure = "ask for them in the forked request"
        raise InvalidRequest("prompt_logprobs", raw["prompt_logprobs"], "be left out in a fork", cure)
    if raw["logprobs"] is not None and params.logprobs is None:
        cure = "ask for them in the forked request"
        raise InvalidRequest("logprobs", raw["logprobs"], "be left out in this fork: its parent has none", cure)
    if request.HasField("request_id"):
        raw["request_id"] = request.request_id
    return raw | {"prompt_token_ids": list(parent.prompt)}


def chat_messages(chat: public.Chat) -> list[dict[str, str]]:
    return [{"role": each.role, "content": each.content} for each in chat.messages]


def in_public_names(work: Callable[[], T], tokens_field: str = "token_ids") -> T:
    """Run `work`; what it refuses, it refuses by the contract's field names ("sampling.top_p", "text")."""
    try:
        return work()
    except InvalidRequest as error:
        head, dot, rest = error.field.partition("[")
        if head in SAMPLING:
            name = f"sampling.{error.field}"
        elif head == "prompt_token_ids":
            name = tokens_field + dot + rest
        else:
            name = _FIELDS.get(head, head) + dot + rest
        raise InvalidRequest(name, error.value, error.limit, _CURES.get(error.cure, error.cure)) from None


def _sampling_fields(sampling: Message) -> dict[str, Any]:
    """The fields that are set. A list is set where it holds something."""
    raw: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name in _REPEATED:
            raw[field.name] = list(value)
        elif field.name == "logit_bias":
            raw[field.name] = dict(value)
        else:
            raw[field.name] = value
    return raw

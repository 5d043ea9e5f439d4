"""A model's chat template: messages to prompt text, in Jinja's sandbox, with the names that transformers gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from pagetable.errors import InvalidRequest, ModelError, NotSupported

MAX_TEMPLATE_CHARS = 256 << 10
MAX_MESSAGES = 4096
MAX_PRODUCT = 1 << 20

_KEYS = ("role", "content", "name")
_LATER = ("tool_calls", "tool_call_id", "reasoning_content")

Message = dict[str, str]


class _Raised(Exception):
    """The template called raise_exception; its words are for the user."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model said, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable to Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounded products and powers.

    It guards against a careless template and hostile messages. A hostile template can still burn time and memory in
    other ways (nested loops, wide formats): a model folder is as trusted as its weights.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= MAX_PRODUCT and abs(right) <= 16):
            raise SecurityError("the power is too large")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and len(one) * int(other) > MAX_PRODUCT:
                    raise SecurityError("the product is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> NoReturn:
    raise _Raised(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # not Jinja's own, which escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template.

    Args:
        source: Jinja, of the model folder.
        special_tokens: `bos_token` and the like, by the names that templates use.
        now: what `strftime_now` formats.
        max_chars: a rendered prompt has at most so many.

    Raises:
        ModelError: the source is too long or is no Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime], max_chars: int = 32 << 20
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"chat_template: has {len(source)} characters, must have at most {MAX_TEMPLATE_CHARS}")
        sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        sandbox.filters["tojson"] = _tojson
        sandbox.globals["raise_exception"] = _raise_exception
        sandbox.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = sandbox.from_string(source)
        # Jinja compiles to Python, whose compiler has limits of its own: blocks nested 20, indented 100 deep
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelError(f"chat_template: is no Jinja template ({str(error)[:200]})") from error
        self._special_tokens, self._max_chars = dict(special_tokens), max_chars

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text. `messages` as `check_messages` gives them.

        Raises:
            InvalidRequest: the template refuses the messages, or fails on them.
        """
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                **self._special_tokens,
                messages=[dict(each) for each in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            ):
                size += len(part)
                if size > self._max_chars:
                    break
                parts.append(part)
        except _Raised as error:
            raise _refused(f"be what the model's chat template takes ({str(error)[:200]})") from None
        except (Exception, MemoryError) as error:
            # only the kind: a foreign text may hold addresses
            raise _refused(f"be what the model's chat template takes ({type(error).__name__} in it)") from error
        if size > self._max_chars:
            raise _refused(f"make at most {self._max_chars} characters of prompt")
        return "".join(parts)


def _refused(limit: str) -> InvalidRequest:
    return InvalidRequest("messages", "these messages", limit, "change them, or send prompt or prompt_token_ids")


def check_messages(messages: object) -> list[Message]:
    """Messages with plain text: each {role, content} and perhaps a name; a list of text parts is joined by newlines.

    Raises:
        InvalidRequest: something else, by its place. NotSupported: tool calls and parts that are not text.
    """
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        shown = f"{len(messages)} messages" if isinstance(messages, list) else messages
        raise InvalidRequest("messages", shown, f"be a list of 1 to {MAX_MESSAGES} messages with role and content")
    return [_check_message(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _check_message(field: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(field, message, "be an object with role and content")
    for key in message:
        if key in _LATER and message[key] is not None:
            raise NotSupported(f"{field}.{key}: tools are not built yet; leave it out")
        if key not in _KEYS and key not in _LATER:
            raise InvalidRequest(field, key, f"hold only {', '.join(_KEYS)}", "leave it out")
    checked = {"role": _string(f"{field}.role", message.get("role"), 1), "content": ""}
    if message.get("name") is not None:
        checked["name"] = _string(f"{field}.name", message["name"], 1)
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_part(f"{field}.content[{at}]", part) for at, part in enumerate(content))
    checked["content"] = _string(f"{field}.content", content, 0)
    return checked


def _text_part(field: str, part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        if isinstance(kind, str) and isinstance(part, Mapping):
            raise NotSupported(f"{field}: parts of type {kind[:40]!r} are not built; send parts of type 'text'")
        raise InvalidRequest(field, part, "be a part like {'type': 'text', 'text': '...'}")
    return _string(field, part.get("text"), 0)


def _string(field: str, value: object, least: int) -> str:
    if type(value) is not str or len(value) < least:
        raise InvalidRequest(field, value, "be a non-empty string" if least else "be a string")
    return value

"""Every error that Quire raises on purpose, in one tree.

    QuireError                code (a gRPC status name)
    |-- InvalidRequest        INVALID_ARGUMENT     one request says something that it may not
    |-- AlreadyExists         ALREADY_EXISTS       the request id is in flight
    |-- NotFound              NOT_FOUND            no such request, sequence or model
    |-- Overloaded            RESOURCE_EXHAUSTED   the queue is full; try again later
    |-- NotSupported          UNIMPLEMENTED        known, but not built (or not on this machine)
    |-- ConfigError           FAILED_PRECONDITION  the process refuses to start
    |-- ModelError            FAILED_PRECONDITION  the model folder is refused
    |-- RequestFailed         INTERNAL             one request died alone
    |-- ServiceError          the server's own     what a server answered to a client of ours
    `-- PageError             INTERNAL             a page operation that must not be; nothing was changed
        |-- OutOfBlocks       RESOURCE_EXHAUSTED   no block is free and none can be evicted
        |-- StalePage         INTERNAL             the reference's generation is over
        |-- WrongState        INTERNAL             the block or page is not in the state that the call needs
        `-- InvariantBroken   INTERNAL             a recount disagrees with the books

A user's mistake names the field, the value, the limit and the cure in one sentence. Texts never hold
addresses or stacks, and a path only where the user typed it.
"""

from __future__ import annotations

from typing import ClassVar


class QuireError(Exception):
    """Base of the tree. `code` is the gRPC status name that a front end answers with."""

    code: ClassVar[str] = "INTERNAL"


def shown(value: object, limit: int = 60) -> str:
    """`repr(value)`, cut to `limit` characters, so that a 27 MB prompt never lands in a log."""
    try:
        cut = isinstance(value, (str, bytes, list, tuple)) and len(value) > limit
        text = repr(value[:limit] if cut else value)  # type: ignore[index]
    except (ValueError, RecursionError):  # an int of 4300 digits, or lists a thousand deep
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class FieldError(QuireError):
    """A mistake in one named field.

    Args:
        field: the name as the user spells it.
        value: what was given.
        limit: what is allowed, as the end of "must ...".
        cure: what to do instead; empty where the limit already says it.
    """

    def __init__(self, field: str, value: object, limit: str, cure: str = "") -> None:
        self.field, self.value, self.limit, self.cure = field, value, limit, cure
        text = f"{field}: got {shown(value)}, must {limit}"
        super().__init__(f"{text}; {cure}" if cure else text)


class InvalidRequest(FieldError):
    code = "INVALID_ARGUMENT"


class ConfigError(FieldError):
    code = "FAILED_PRECONDITION"


class AlreadyExists(QuireError):
    code = "ALREADY_EXISTS"


class NotFound(QuireError):
    code = "NOT_FOUND"


class Overloaded(QuireError):
    code = "RESOURCE_EXHAUSTED"


class NotSupported(QuireError):
    code = "UNIMPLEMENTED"


class ModelError(QuireError):
    code = "FAILED_PRECONDITION"


class RequestFailed(QuireError):
    code = "INTERNAL"


class ServiceError(QuireError):
    """A server's answer, on the client's side.

    Attributes:
        code: the gRPC status name.
        field: the request's field at fault, or "".
    """

    def __init__(self, code: str, message: str, field: str = "") -> None:
        self.code, self.field = code, field  # type: ignore[misc]  # its code is the server's
        super().__init__(message)


class PageError(QuireError):
    code = "INTERNAL"


class OutOfBlocks(PageError):
    code = "RESOURCE_EXHAUSTED"


class StalePage(PageError):
    pass


class WrongState(PageError):
    pass


class InvariantBroken(PageError):
    pass

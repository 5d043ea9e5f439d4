"""Our errors as gRPC statuses: the code, one sentence, and beside it what programs read.

    QuireError  ->  code, message
                    google.rpc.ErrorInfo(reason, domain "quire")       always
                    google.rpc.BadRequest(field, description)          where a field is at fault
                    google.rpc.RetryInfo(delay)                        UNAVAILABLE, RESOURCE_EXHAUSTED

Nothing is ever UNKNOWN: what is no QuireError is a bug of ours, INTERNAL, with its details in the log alone.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from pagetable.errors import QuireError, RequestFailed

DOMAIN = "quire"
RETRY_SECONDS = 2
MAX_MESSAGE_CHARS = 1000  # with its details it stays well below 8 KiB, the most that many clients take
_RETRY = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


def to_status(error: QuireError) -> grpc.Status:
    """The status that a call ends with. `error.code` is a gRPC status name; one that is none becomes INTERNAL."""
    code = getattr(grpc.StatusCode, error.code, grpc.StatusCode.INTERNAL)
    if code in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN):
        code = grpc.StatusCode.INTERNAL
    message = str(error)[:MAX_MESSAGE_CHARS]
    field = str(getattr(error, "field", ""))[:100]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=_reason(error), domain=DOMAIN)]
    if field and code is grpc.StatusCode.INVALID_ARGUMENT:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field=field, description=message)]
            )
        )
    if code.name in _RETRY:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.seconds = RETRY_SECONDS
        details.append(retry)
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=message, details=map(_packed, details))
    )
    return status


def unexpected(error: BaseException) -> RequestFailed:
    """What a user hears of a bug: its kind, never its words, which may hold addresses and paths."""
    return RequestFailed(f"the server failed on this request ({type(error).__name__}); its log says more")


def _reason(error: QuireError) -> str:
    """UPPER_SNAKE, as ErrorInfo wants it: INVALID_REQUEST, NOT_FOUND; a relayed error's code."""
    name = type(error).__name__
    if name == "ServiceError":
        return error.code
    return "".join(f"_{char}" if char.isupper() and at else char for at, char in enumerate(name)).upper()


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed

"""What stands between gRPC and our methods: one message in, who calls, and every error as a status.

Requests are read as a stream of raw bytes and parsed here, because grpc's own way leaves the caller without an answer
where no message comes, takes the first of two, and answers UNKNOWN to bytes that are no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.auth import Gate
from cluster.grpc_errors import to_status, unexpected
from pagetable.errors import InvalidRequest, Overloaded, QuireError

_log = logging.getLogger(__name__)

REQUEST_SECONDS = 60.0  # a request must have come in whole
STATUS_SECONDS = 1.0  # a client that does not read may miss its status
_DEPTH = 3  # messages in messages of our requests
_MOST_LOOKED_AT = 10_000  # messages that are searched for the name of an unknown field

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what the call can be told.

    Attributes:
        tenant: "" where there are no API keys.
        context: its `write` sends one message of a stream.
        size: bytes of the request.
    """

    tenant: str
    context: Context
    size: int


class Door:
    """Who may come in, and how many at once. Asked before anything of a request is read.

    Args:
        most: calls of our services that are in progress.
    """

    def __init__(self, gate: Gate, most: int) -> None:
        self._gate, self._most, self._inside = gate, most, 0

    @contextlib.contextmanager
    def enter(self, context: Context) -> Iterator[str]:
        """Around one call; gives its tenant. Raises ServiceError UNAUTHENTICATED, and Overloaded."""
        tenant = self._gate.admit(context.invocation_metadata() or ())
        if self._inside >= self._most:
            raise Overloaded(f"{self._most} calls are in progress (max_calls); try again later")
        self._inside += 1
        try:
            yield tenant
        finally:
            self._inside -= 1


Unary: TypeAlias = Callable[[Any, Caller], Awaitable[Message | bytes]]
Streaming: TypeAlias = Callable[[Any, Caller], Awaitable[None]]


def service_handlers(service: ServiceDescriptor, implementation: object, door: Door) -> grpc.GenericRpcHandler:
    """A service's handlers: `implementation` has a coroutine (request, caller) for each method, by its name.

    Unary methods return the response, as a message or as its bytes; streaming ones write to `caller.context`.
    """
    handlers: dict[str, Any] = {}
    for method in service.methods:
        behavior = getattr(implementation, method.name)
        if method.server_streaming:
            call, make = _streaming(method, behavior, door), grpc.stream_stream_rpc_method_handler
        else:
            call, make = _unary(method, behavior, door), grpc.stream_unary_rpc_method_handler
        handlers[method.name] = make(call, response_serializer=_serialize)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _unary(method: MethodDescriptor, behavior: Unary, door: Door) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(_: Any, context: Context) -> Any:
        try:
            with door.enter(context) as tenant:
                return await behavior(*await _receive(method, context, tenant))
        except Exception as error:
            return await _fail(context, error)

    return call


def _streaming(method: MethodDescriptor, behavior: Streaming, door: Door) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(_: Any, context: Context) -> None:
        try:
            with door.enter(context) as tenant:
                await behavior(*await _receive(method, context, tenant))
        except Exception as error:
            await _fail(context, error)

    return call


async def _receive(method: MethodDescriptor, context: Context, tenant: str) -> tuple[Message, Caller]:
    """The one request of a call and who makes it."""
    name = method.input_type.name
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            data = await context.read()
            more = grpc.aio.EOF if data is grpc.aio.EOF else await context.read()
    except TimeoutError:
        limit = f"be sent within {REQUEST_SECONDS:.0f} s, and the sending side closed"
        raise InvalidRequest("request", "nothing", limit) from None
    if data is grpc.aio.EOF or more is not grpc.aio.EOF:
        got = "no message" if data is grpc.aio.EOF else "several messages"
        raise InvalidRequest("request", got, f"be exactly one {name}")
    try:
        request: Message = GetMessageClass(method.input_type).FromString(data)
    except DecodeError:
        raise InvalidRequest("request", f"{len(data)} bytes", f"be a {name} in protobuf's encoding") from None
    _refuse_unknown(request, data)
    return request, Caller(tenant, context, len(data))


def _refuse_unknown(request: Message, data: bytes) -> None:
    """A field that this server does not know would be ignored in silence: the caller believes that it counts."""
    whole = request.ByteSize()
    request.DiscardUnknownFields()
    if request.ByteSize() == whole:
        return
    name = "request"
    for path, message in islice(_messages(type(request).FromString(data), "", _DEPTH), _MOST_LOOKED_AT):
        fields = UnknownFieldSet(message)
        if len(fields):
            name = f"{path}{fields[0].field_number}"
            break
    raise InvalidRequest(name, "a value", "not be given: there is no such field", "leave it out")


def _messages(message: Message, path: str, depth: int) -> Iterator[tuple[str, Message]]:
    yield path, message
    for field, value in message.ListFields():
        kind = field.message_type
        if kind is not None and depth and not kind.GetOptions().map_entry:
            for each in value if field.is_repeated else (value,):
                yield from _messages(each, f"{path}{field.name}.", depth - 1)


async def _fail(context: Context, error: Exception) -> None:
    """End the call with the error's status. Raises what grpc raises where a call is over."""
    if isinstance(error, grpc.aio.AbortError) or context.done():
        raise error
    if not isinstance(error, QuireError):
        if isinstance(error, grpc.aio.UsageError | grpc.aio.InternalError):  # the client has left
            raise asyncio.CancelledError from error
        _log.error("a call failed", exc_info=error)
        error = unexpected(error)
    try:
        async with asyncio.timeout(STATUS_SECONDS):
            await context.abort_with_status(to_status(error))
    except TimeoutError:  # it waits behind what the client does not read; grpc sends it when the client does
        raise asyncio.CancelledError from error


def _serialize(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()

"""Method tables: paths of a service, mapped to the methods of the object that implements it.

An implementation has one method for each method of the service, in snake case (`GetTask` is `get_task`). It receives
the request and the `CallContext`. It returns a message, its bytes, or None for an empty message; or it raises
`GrpcError`. A method that can't answer at once is a coroutine function, or it returns a coroutine, a future or a
`ResponseAfter`. An immediate answer costs no asyncio task, and neither does a future.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, Protocol

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from headrace.foundation.access import Access
from headrace.foundation.errors import HeadraceError
from headrace.grpc.transport.status import GrpcError, to_grpc_error

_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class CallConnection(Protocol):
    """The connection on which calls come."""

    @property
    def is_connected(self) -> bool:
        """True until it is closed or lost."""
        ...


class CallContext:
    """A call as its handler sees it. `metadata` is by lower-case name; of repeated names it has the last value.

    `is_signed`: this very message was signed with one of the server's secrets. `deadline_us`: when the caller stops
    waiting, on the event loop's clock; None for no deadline. `connection`: on which it came; None outside a server.
    `caller`: the authenticated client, set by a gate that knows clients.
    """

    __slots__ = ("caller", "connection", "deadline_us", "is_signed", "metadata", "path", "peer")

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, str] | None = None,
        *,
        peer: str = "",
        is_signed: bool = False,
        deadline_us: int | None = None,
        connection: CallConnection | None = None,
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = metadata or {}
        self.peer = peer
        self.is_signed = is_signed
        self.deadline_us = deadline_us
        self.connection = connection
        self.caller: Any = None


Response = Message | bytes | None
ResponseCoroutine = Coroutine[Any, Any, Response]


class ResponseAfter(NamedTuple):
    """A response made by `make_response` once the future is done: a value, or a coroutine that returns one."""

    future: asyncio.Future[Any]
    make_response: Callable[[], Response | ResponseCoroutine]


DeferredResponse = ResponseCoroutine | asyncio.Future[Any] | ResponseAfter
Messages = AsyncIterator[Message]
Handler = Callable[[Any, CallContext], Response | DeferredResponse | Messages]


class Method(NamedTuple):
    """One method of a service. `access`: who may call it. `is_stream`: the handler is an async iterator of messages.

    `to_grpc_error` converts Headrace errors to the statuses that callers of this method expect.
    """

    request: type[Message]
    handler: Handler
    access: Access
    is_stream: bool = False
    to_grpc_error: Callable[[HeadraceError], GrpcError] = to_grpc_error


Methods = Mapping[str, Method]


def methods_of(
    service: ServiceDescriptor,
    implementation: object,
    *,
    access: Mapping[str, Access],
    to_grpc_error: Callable[[HeadraceError], GrpcError] = to_grpc_error,
) -> dict[str, Method]:
    """Build the method table of a service. `access`: the declaration of each method, by its name."""
    return {
        f"/{service.full_name}/{method.name}": Method(
            GetMessageClass(method.input_type),
            getattr(implementation, _WORD.sub("_", method.name).lower()),
            access[method.name],
            method.server_streaming,
            to_grpc_error,
        )
        for method in service.methods
    }

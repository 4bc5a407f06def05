"""What a server answers: a mapping of paths to methods, made from a service's descriptor and the object that does it.

A service is a class with one method for each, named as it is but in the words of Python (`GetTask` is `get_task`). It
takes the request and the `Call`, and answers with a message, its bytes, or None for an empty one; or it raises
`GrpcError`. One that can't answer at once is a coroutine function, or returns a coroutine, a future or an `After`:
whoever answers at once costs no task, and whoever waits for nothing but a future costs none either.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from headrace.foundation.errors import HeadraceError
from headrace.grpc.transport.status import GrpcError, of_error

_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Call:
    """One call as its handler sees it. `metadata` is by lower-case name; of several values it has the last.

    `is_signed`: the message was signed with one of the server's secrets; the verdict is made from this very message and
    travels with it. `deadline_us`: when its caller stops waiting, on the loop's clock; None when it waits for ever.
    """

    __slots__ = ("deadline_us", "is_signed", "metadata", "path", "peer")

    def __init__(
        self,
        path: str,
        metadata: Mapping[str, str] | None = None,
        *,
        peer: str = "",
        is_signed: bool = False,
        deadline_us: int | None = None,
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = metadata or {}
        self.peer = peer
        self.is_signed = is_signed
        self.deadline_us = deadline_us


Answer = Message | bytes | None
Awaited = Coroutine[Any, Any, Answer]


class After(NamedTuple):
    """Once the future is done, what `answer` makes then: an answer, or what one is awaited from."""

    future: asyncio.Future[Any]
    answer: Callable[[], Answer | Awaited]


Later = Awaited | asyncio.Future[Any] | After
Messages = AsyncIterator[Message]
Handler = Callable[[Any, Call], Answer | Later | Messages]


class Method(NamedTuple):
    """One path. `is_open`: nobody has to sign; `is_stream`: the handler is an async iterator of messages.

    `of_error`: an error of the engine as callers of this method know it.
    """

    request: type[Message]
    handler: Handler
    is_open: bool = False
    is_stream: bool = False
    of_error: Callable[[HeadraceError], GrpcError] = of_error


Methods = Mapping[str, Method]


def methods_of(
    service: ServiceDescriptor,
    implementation: object,
    *,
    is_open: bool = False,
    of_error: Callable[[HeadraceError], GrpcError] = of_error,
) -> dict[str, Method]:
    """The methods of a service by their paths. `is_open`: callers need no signature."""
    return {
        f"/{service.full_name}/{method.name}": Method(
            GetMessageClass(method.input_type),
            getattr(implementation, _WORD.sub("_", method.name).lower()),
            is_open,
            method.server_streaming,
            of_error,
        )
        for method in service.methods
    }

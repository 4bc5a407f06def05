"""A client of grpcio, which is not Headrace's code, for servers under test."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

import grpc
from headrace.grpc.messages import taskbroker_pb2 as wire
from tests.support.grpc_server import AUTHORITY

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@asynccontextmanager
async def channel(port: int, *, is_tls: bool = False) -> AsyncGenerator[Any, None]:
    """grpcio's own, on the loop."""
    target = f"localhost:{port}" if is_tls else f"127.0.0.1:{port}"
    if is_tls:
        made = grpc.aio.secure_channel(target, credentials(), OPTIONS)
    else:
        made = grpc.aio.insecure_channel(target, OPTIONS)
    async with made:
        yield made


def credentials() -> Any:
    """Belief in our certificate."""
    return grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())


def unary(made: Any, path: str) -> Any:
    """A method of a channel."""
    return made.unary_unary(
        path,
        request_serializer=wire.PushTaskRequest.SerializeToString,
        response_deserializer=wire.PushTaskRequest.FromString,
    )


def asked(text: str = "hello") -> wire.PushTaskRequest:
    """A message with a text."""
    return wire.PushTaskRequest(task=wire.TaskActivation(id=text))

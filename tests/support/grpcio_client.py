"""grpcio clients for servers under test: another implementation of gRPC."""

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
    """An asyncio channel of grpcio."""
    target = f"localhost:{port}" if is_tls else f"127.0.0.1:{port}"
    if is_tls:
        grpc_channel = grpc.aio.secure_channel(target, credentials(), OPTIONS)
    else:
        grpc_channel = grpc.aio.insecure_channel(target, OPTIONS)
    async with grpc_channel:
        yield grpc_channel


def credentials() -> Any:
    """Channel credentials that trust the test certificate."""
    return grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())


def unary(grpc_channel: Any, path: str) -> Any:
    """A unary method of a channel."""
    return grpc_channel.unary_unary(
        path,
        request_serializer=wire.PushTaskRequest.SerializeToString,
        response_deserializer=wire.PushTaskRequest.FromString,
    )


def echo_request(text: str = "hello") -> wire.PushTaskRequest:
    """A request with a text."""
    return wire.PushTaskRequest(task=wire.TaskActivation(id=text))

"""Signatures of calls, verified before a handler is called."""

from __future__ import annotations

from typing import Any

import pytest

import grpc
from headrace.grpc.transport.signing import HEADER, Secrets
from tests.support.grpc_server import ECHO, PUSH, WAIT, Echo, listening
from tests.support.grpcio_client import channel, echo_request, unary

SECRETS = ("super secret", "an older secret")
VECTOR = "cfdf2c4d2efd3a2d28bd10de6471ef352d03f49d2d3bd880ee7051ea39fbe239"
MESSAGE = echo_request().SerializeToString()


def test_the_signature_matches_the_contract_s_test_vector() -> None:
    assert Secrets(SECRETS).sign(PUSH, b"hello") == VECTOR


@pytest.mark.parametrize(
    ("path", "message", "signature", "is_good"),
    [
        (PUSH, b"hello", VECTOR, True),
        (PUSH, b"hello", Secrets(SECRETS[1:]).sign(PUSH, b"hello"), True),
        (PUSH, b"hello", Secrets(("another",)).sign(PUSH, b"hello"), False),
        (ECHO, b"hello", VECTOR, False),
        (PUSH, b"hellp", VECTOR, False),
        (PUSH, b"\0\0\0\0\x05hello", VECTOR, False),
        (PUSH, b"hello", VECTOR.upper(), False),
        (PUSH, b"hello", VECTOR[:-1], False),
        (PUSH, b"hello", VECTOR + "0", False),
        (PUSH, b"hello", "", False),
        (PUSH, b"hello", "é" * 64, False),
        (PUSH, b"hello", "z" * 64, False),
    ],
)
def test_a_signature_is_valid_for_one_path_and_one_message(
    path: str, message: bytes, signature: str, is_good: bool
) -> None:
    assert Secrets(SECRETS).verifies(path, message, signature) is is_good


def test_no_secret_signs_nothing_and_verifies_nothing() -> None:
    assert not Secrets()
    assert Secrets().sign(PUSH, b"hello") == ""
    assert not Secrets().verifies(PUSH, b"hello", VECTOR)


def test_secrets_do_not_appear_in_repr() -> None:
    assert "super" not in f"{Secrets(SECRETS)!r} {Secrets(SECRETS)}"


def signed(message: bytes = MESSAGE, path: str = ECHO, secrets: Any = SECRETS) -> tuple[tuple[str, str], ...]:
    """Metadata with a signature."""
    return ((HEADER, Secrets(secrets).sign(path, message)),)


@pytest.mark.parametrize(
    "metadata",
    [
        signed(),
        signed(secrets=SECRETS[1:]),
    ],
    ids=["the first secret", "an older secret"],
)
async def test_a_signed_call_is_accepted(metadata: Any) -> None:
    echo = Echo()
    async with listening(echo.methods, secrets=SECRETS) as (_, port), channel(port) as client:
        assert (await unary(client, ECHO)(echo_request(), metadata=metadata)).task.id == "hello"
    assert [call.is_signed for call in echo.calls] == [True]


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        ((HEADER, ""),),
        ((HEADER, "garbage"),),
        signed(secrets=("another",)),
        signed(path=PUSH),
        signed(message=b"another"),
        (*signed(), (HEADER, "garbage")),
    ],
    ids=["none", "empty", "garbage", "another secret", "another path", "another message", "a second, wrong one"],
)
async def test_an_unsigned_call_never_reaches_its_handler(metadata: Any) -> None:
    echo = Echo()
    async with listening(echo.methods, secrets=SECRETS) as (_, port), channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await unary(client, ECHO)(echo_request(), metadata=metadata)
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, "Authentication failed")
    assert echo.calls == []


async def test_without_a_secret_all_calls_are_accepted_as_unsigned() -> None:
    echo = Echo()
    async with listening(echo.methods) as (_, port), channel(port) as client:
        await unary(client, ECHO)(echo_request())
        await unary(client, ECHO)(echo_request(), metadata=signed())
    assert [call.is_signed for call in echo.calls] == [False, False]


async def test_an_open_method_needs_no_signature() -> None:
    echo = Echo()
    echo.released.set()
    async with listening(echo.methods, secrets=SECRETS) as (_, port), channel(port) as client:
        assert (await unary(client, WAIT)(echo_request())).task.id == "hello"


async def test_the_signature_covers_the_uncompressed_message() -> None:
    echo = Echo()
    large = echo_request("x" * 10_000)
    async with listening(echo.methods, secrets=SECRETS) as (_, port), channel(port) as client:
        metadata = signed(large.SerializeToString())
        await unary(client, ECHO)(large, metadata=metadata, compression=grpc.Compression.Gzip)
    assert [call.is_signed for call in echo.calls] == [True]

"""Reading request bodies: streamed, bounded, with an idle timeout.

Rule 1: the timeout runs only while the server waits for the client. A stream that the server itself delays is never
cut off.
Rule 2: a compressed body may expand by a factor of `expansion_max`, and is decompressed in bounded pieces.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request

from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import KIB, MIB, Limits
from headrace.http.requests.declared_access import access_of, is_admitted
from headrace.http.requests.error_responses import ClientGone, IdleTimeout, TooLarge, UnsupportedType

T = TypeVar("T")

JSON_BYTES_MAX: Final = 128 * KIB
EXPANSION_FREE_BYTES: Final = MIB
"""Size up to which any compressed body may expand."""

PIECE_BYTES: Final = 256 * KIB
TURN_BYTES: Final = 256 * KIB
"""Bytes of one body, of any content, after which the event loop serves other requests."""
ZSTD_SLICE_BYTES: Final = 256
"""A zstd block has at least 4 bytes and expands to at most 128 KiB, so a slice expands to at most 8 MiB."""

ZSTD_WINDOW_BYTES: Final = 8 * MIB


async def body_pieces(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """Yield the body as it arrives, decompressed.

    Raises `IdleTimeout`, `ClientGone`, `TooLarge`, `UnsupportedType`, `InvalidInput`.
    """
    if not is_admitted(request):
        raise RuntimeError(f"expected {request.url.path} to admit its client before it reads the body")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        turn_bytes = 0
        async for piece in _received(request, limits.http_idle_s):
            yield piece
            turn_bytes += len(piece)
            if turn_bytes >= TURN_BYTES:
                await asyncio.sleep(0)
                turn_bytes = 0
        return
    if encoding not in ("gzip", "x-gzip", "zstd"):
        raise UnsupportedType(
            f"expected a content-encoding of gzip, zstd or identity, got {encoding!r}",
            hint="send the body with gzip, zstd or uncompressed",
        )
    decoder = _ZstdDecoder() if encoding == "zstd" else _GzipDecoder()
    received_bytes = expanded_bytes = 0
    async for piece in _received(request, limits.http_idle_s):
        received_bytes += len(piece)
        for expanded in decoder.feed(piece):
            await asyncio.sleep(0)
            expanded_bytes += len(expanded)
            if expanded_bytes > received_bytes * limits.expansion_max + EXPANSION_FREE_BYTES:
                raise TooLarge(
                    f"the body expands by more than a factor of {limits.expansion_max}",
                    hint="compress it less, or raise expansion_max",
                )
            for start in range(0, len(expanded), PIECE_BYTES):
                yield expanded[start : start + PIECE_BYTES]
                await asyncio.sleep(0)
    if not decoder.is_whole:
        raise InvalidInput(f"the {encoding} body ended before its end marker", hint="send it again")


async def _received(request: Request, idle_s: int) -> AsyncIterator[bytes]:
    receive = request.receive
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await receive()
        except TimeoutError:
            raise IdleTimeout(
                f"received nothing for {idle_s} s", hint="send the missing items again, or raise http_idle_s"
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone("the client disconnected before the end of its body")
        if body := message.get("body"):
            yield body
        if not message.get("more_body"):
            return


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read a body of the size that its route accepts. Raises `TooLarge`, and what `body_pieces` raises."""
    bytes_max = access_of(request).body_bytes_max
    assert bytes_max is not None, "a body without a bound is read by `body_pieces`"
    body = bytearray()
    async for piece in body_pieces(request, limits):
        body += piece
        if len(body) > bytes_max:
            raise TooLarge("Request body too large", hint=f"the limit is {bytes_max} bytes")
    return bytes(body)


async def decode_body(request: Request, limits: Limits, kind: type[T]) -> T:
    """Decode a small JSON body as a struct. Raises `InvalidInput` with the path of the invalid field."""
    data = await read_body(request, limits)
    if not data.strip():
        raise InvalidInput("Request body is empty")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"Invalid request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidInput("Invalid JSON") from None


def parse_int(text: str | None, default: int, name: str, least: int, most: int) -> int:
    """Parse an integer query parameter. Raises `InvalidInput`."""
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not least <= int(text) <= most:
        raise InvalidInput(f"expected {name} as a whole number from {least} to {most}, got {text[:40]!r}")
    return int(text)


class _GzipDecoder:
    """Decompresses gzip, also several members, in bounded pieces."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(31)
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        return not self._is_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            try:
                expanded = self._decompressor.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidInput(f"expected a gzip body, got invalid data: {error}") from None
            self._is_begun = True
            if expanded:
                yield expanded
            data = self._decompressor.unconsumed_tail
            if self._decompressor.eof:
                data = self._decompressor.unused_data
                self._decompressor, self._is_begun = zlib.decompressobj(31), False


class _ZstdDecoder:
    """Decompresses zstd, also several frames, in bounded pieces."""

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._fresh: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
        self._decompressor = self._fresh()
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        return not self._is_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        held: list[bytes] = []
        held_bytes = 0
        for start in range(0, len(data), ZSTD_SLICE_BYTES):
            for expanded in self._decompress_slice(data[start : start + ZSTD_SLICE_BYTES]):
                held.append(expanded)
                held_bytes += len(expanded)
            if held_bytes >= PIECE_BYTES:
                yield b"".join(held)
                held, held_bytes = [], 0
        if held:
            yield b"".join(held)

    def _decompress_slice(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            try:
                expanded: bytes = self._decompressor.decompress(piece)
            except self._error as error:
                raise InvalidInput(f"expected a zstd body, got invalid data: {error}") from None
            self._is_begun = True
            if expanded:
                yield expanded
            piece = b""
            if self._decompressor.eof:
                piece = self._decompressor.unused_data
                self._decompressor, self._is_begun = self._fresh(), False

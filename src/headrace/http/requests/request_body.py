"""Reading a request's body: lazily, within bounds, and no longer than its sender goes on sending.

Rule 1: time runs only while the server waits for the peer. A stream that is held back here, however long, is not cut.
Rule 2: a compressed body may become `expansion_max` times as large and no larger, and never much at once.
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
from headrace.http.requests.error_responses import Gone, Silent, TooLarge, UnsupportedType

T = TypeVar("T")

JSON_BYTES_MAX: Final = 128 * KIB
FREE_BYTES: Final = MIB
"""What a compressed body may become in any case."""

PIECE_BYTES: Final = 256 * KIB
ZSTD_SLICE_BYTES: Final = 256
"""A block of zstd is 4 bytes or more and becomes 128 KiB at most, so a slice becomes 8 MiB at most."""

ZSTD_WINDOW_BYTES: Final = 8 * MIB


async def pieces(request: Request, limits: Limits) -> AsyncIterator[bytes]:
    """A body as it comes, unpacked. Raises `Silent`, `Gone`, `TooLarge`, `UnsupportedType`, `InvalidInput`."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        async for piece in _received(request, limits.http_idle_s):
            yield piece
        return
    if encoding not in ("gzip", "x-gzip", "zstd"):
        raise UnsupportedType(f"nothing here unpacks {encoding!r}", hint="send gzip, zstd, or as it is")
    unpacker = _Zstd() if encoding == "zstd" else _Gzip()
    came_bytes = went_bytes = 0
    async for piece in _received(request, limits.http_idle_s):
        came_bytes += len(piece)
        for unpacked in unpacker.feed(piece):
            went_bytes += len(unpacked)
            if went_bytes > came_bytes * limits.expansion_max + FREE_BYTES:
                raise TooLarge(
                    f"the body becomes more than {limits.expansion_max} times as large as it was sent",
                    hint="send it with less compression, or raise expansion_max",
                )
            yield unpacked
    if not unpacker.is_whole:
        raise InvalidInput(f"the {encoding} body ends in the middle", hint="send it again")


async def _received(request: Request, idle_s: int) -> AsyncIterator[bytes]:
    receive = request.receive
    while True:
        try:
            async with asyncio.timeout(idle_s):
                message = await receive()
        except TimeoutError:
            raise Silent(
                f"nothing came for {idle_s} s", hint="send again what is missing; http_idle_s is the limit"
            ) from None
        if message["type"] == "http.disconnect":
            raise Gone("the peer left before its body ended")
        if body := message.get("body"):
            yield body
        if not message.get("more_body"):
            return


async def whole(request: Request, limits: Limits, *, bytes_max: int = JSON_BYTES_MAX) -> bytes:
    """A small body. Raises `TooLarge` as soon as it is known to be, and what `pieces` raises."""
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told) > bytes_max:
        raise TooLarge("Request body too large", hint=f"at most {bytes_max} bytes")
    found = bytearray()
    async for piece in pieces(request, limits):
        found += piece
        if len(found) > bytes_max:
            raise TooLarge("Request body too large", hint=f"at most {bytes_max} bytes")
    return bytes(found)


async def decoded(request: Request, limits: Limits, kind: type[T], *, bytes_max: int = JSON_BYTES_MAX) -> T:
    """A small JSON body as a struct. Raises `InvalidInput` with the path of what is wrong."""
    data = await whole(request, limits, bytes_max=bytes_max)
    if not data.strip():
        raise InvalidInput("Request body is empty")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"Invalid request: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidInput("Invalid JSON") from None


def number(text: str | None, default: int, name: str, least: int, most: int) -> int:
    """A whole number of a query, within bounds. Raises `InvalidInput` that names it."""
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18 or not least <= int(text) <= most:
        raise InvalidInput(f"{name} is a whole number from {least} to {most}, not {text[:40]!r}")
    return int(text)


class _Gzip:
    """Unpacks gzip, several members too, a bounded piece at a time."""

    def __init__(self) -> None:
        self._unpack = zlib.decompressobj(31)
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        return not self._is_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            try:
                unpacked = self._unpack.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise InvalidInput(f"the body is not gzip: {error}") from None
            self._is_begun = True
            if unpacked:
                yield unpacked
            data = self._unpack.unconsumed_tail
            if self._unpack.eof:
                data = self._unpack.unused_data
                self._unpack, self._is_begun = zlib.decompressobj(31), False


class _Zstd:
    """Unpacks zstd, several frames too, a bounded piece at a time."""

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._fresh: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
        self._unpack = self._fresh()
        self._is_begun = False

    @property
    def is_whole(self) -> bool:
        return not self._is_begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        held: list[bytes] = []
        held_bytes = 0
        for start in range(0, len(data), ZSTD_SLICE_BYTES):
            for unpacked in self._slice(data[start : start + ZSTD_SLICE_BYTES]):
                held.append(unpacked)
                held_bytes += len(unpacked)
            if held_bytes >= PIECE_BYTES:
                yield b"".join(held)
                held, held_bytes = [], 0
        if held:
            yield b"".join(held)

    def _slice(self, piece: bytes) -> Iterator[bytes]:
        while piece:
            try:
                unpacked: bytes = self._unpack.decompress(piece)
            except self._error as error:
                raise InvalidInput(f"the body is not zstd: {error}") from None
            self._is_begun = True
            if unpacked:
                yield unpacked
            piece = b""
            if self._unpack.eof:
                piece = self._unpack.unused_data
                self._unpack, self._is_begun = self._fresh(), False

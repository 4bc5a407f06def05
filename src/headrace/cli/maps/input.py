"""Input of `headrace map`: a plain or compressed file, or a stream, read as pieces of bytes."""

from __future__ import annotations

import asyncio
import gzip
import os
import stat
import sys
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from headrace.core.ndjson import wide_encoding
from headrace.foundation.errors import InvalidInput
from headrace.runtime.indexing.sources.compressed_files import Truncated, Zstandard

PIECE_BYTES: Final = 256 * 1024
STDIN: Final = "-"
_PREFIX_BYTES: Final = 4


class _Source(Protocol):
    """An open file, compressed or not."""

    def read(self, size: int, /) -> bytes:
        """Read at most about `size` bytes; none at the end."""
        ...

    def close(self) -> None:
        """Close it."""


class Input:
    """One INPUT argument.

    `identity` names the input in its batch; a stream has no identity of its own and can't be read again. `size_bytes`
    and `read_bytes` count the file's bytes as stored, compressed or not.
    """

    def __init__(self, name: str) -> None:
        """Raises `InvalidInput` for an input that can't be read, before anything else happens."""
        self.name = name
        self.read_bytes = 0
        self.is_stream = name == STDIN
        self.size_bytes: int | None = None
        self.path = None if self.is_stream else Path(name).expanduser().absolute()
        self._ahead: tuple[list[bytes], AsyncGenerator[bytes, None]] | None = None
        if self.path is not None:
            try:
                status = self.path.stat()
                if stat.S_ISDIR(status.st_mode):
                    raise IsADirectoryError(21, "Is a directory")
                if not stat.S_ISREG(status.st_mode):
                    self.is_stream = True
                else:
                    self.size_bytes = status.st_size
                    self.path.open("rb").close()
            except OSError as error:
                raise InvalidInput(
                    f"{name} can't be read: {error.strerror or error}",
                    hint="INPUT is a file of one JSON value a line, or - for standard input",
                ) from error

    @property
    def identity(self) -> str:
        """Return the absolute path; of a stream only its name."""
        return STDIN if self.is_stream or self.path is None else str(self.path)

    @property
    def shown_name(self) -> str:
        """Return the name for messages."""
        return "standard input" if self.path is None else self.name

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Read all bytes from the beginning; those that were looked at ahead are read once.

        Raises `InvalidInput` where a compressed file is truncated or corrupt, and for UTF-16 and UTF-32.
        """
        read, rest = self._ahead or ([], self._checked_pieces())
        self._ahead = None
        async with aclosing(rest):
            for piece in read:
                yield piece
            async for piece in rest:
                yield piece

    async def look_ahead(self) -> AsyncGenerator[bytes, None]:
        """Read pieces from the beginning, which the next call of `pieces` yields again."""
        read: list[bytes] = []
        rest = self._checked_pieces()
        self._ahead = (read, rest)
        async for piece in rest:
            read.append(piece)
            yield piece

    async def close(self) -> None:
        """Stop reading, if only `look_ahead` was called."""
        if self._ahead is not None:
            await self._ahead[1].aclose()
            self._ahead = None

    async def _checked_pieces(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._pieces()) as pieces:
            prefix: bytes | None = b""
            async for piece in pieces:
                if prefix is not None:
                    prefix += piece[:_PREFIX_BYTES]
                    if encoding := wide_encoding(prefix):
                        raise InvalidInput(
                            f"{self.shown_name}: expected UTF-8, got {encoding}",
                            hint=f"convert it first: iconv -f {encoding} -t UTF-8 FILE > items.ndjson",
                        )
                    if len(prefix) >= _PREFIX_BYTES:
                        prefix = None
                yield piece

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        if self.path is None:
            if sys.stdin is None or sys.stdin.closed:
                return
            descriptor = sys.stdin.fileno()
            async with aclosing(_from_descriptor(descriptor)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        if self.is_stream:
            descriptor = await asyncio.to_thread(os.open, self.path, os.O_RDONLY)
            try:
                async with aclosing(_from_descriptor(descriptor)) as pieces:
                    async for piece in pieces:
                        yield piece
            finally:
                os.close(descriptor)
            return
        with self.path.open("rb") as file, closing(self._unpacked(file)) as source:
            while piece := await asyncio.to_thread(self._read, source, file):
                yield piece

    def _read(self, source: _Source, file: BinaryIO) -> bytes:
        try:
            piece = source.read(PIECE_BYTES)
        except (EOFError, OSError, zlib.error, Truncated, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise InvalidInput(f"reading {self.name} failed: {error.strerror or error}") from error
            raise self._broken(error) from error
        self.read_bytes = file.tell()
        return piece

    def _unpacked(self, file: BinaryIO) -> _Source:
        suffix = self.path.suffix.lower() if self.path is not None else ""
        if suffix == ".gz":
            return gzip.GzipFile(fileobj=file)
        if suffix == ".zst":
            return Zstandard(file)
        return file

    def _broken(self, error: Exception) -> InvalidInput:
        how = "it is truncated" if isinstance(error, EOFError | Truncated) else str(error)
        return InvalidInput(
            f"{self.name} can't be decompressed: {how}",
            hint="the items before that place are stored; repair the file and repeat the command",
        )


def _from_descriptor(descriptor: int) -> AsyncGenerator[bytes, None]:
    mode = os.fstat(descriptor).st_mode
    # The event loop can't wait for files and for devices like /dev/null, which never block; a terminal is a device too.
    never_blocks = stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(descriptor))
    return _from_file(descriptor) if never_blocks else _from_stream(descriptor)


async def _from_file(descriptor: int) -> AsyncGenerator[bytes, None]:
    while piece := await asyncio.to_thread(os.read, descriptor, PIECE_BYTES):
        yield piece


async def _from_stream(descriptor: int) -> AsyncGenerator[bytes, None]:
    """Read a pipe or terminal when the loop finds it readable: a thread that reads could not be stopped."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(descriptor, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(descriptor)
        piece = os.read(descriptor, PIECE_BYTES)
        if not piece:
            return
        yield piece

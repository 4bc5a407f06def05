"""Events from files: one JSON object or CSV row per line, also from .gz and .zst; the position is the line number.

The file may only grow at its end: lines that were read are not read again.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

import msgspec

from headrace.core.ndjson import wide_encoding
from headrace.core.sequencer import Arrived, Position
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import MIB
from headrace.runtime.indexing.sources.compressed_files import Truncated, Zstandard
from headrace.runtime.indexing.sources.source import Arrival

PIECE_BYTES: Final = MIB
LINE_BYTES_MAX: Final = 16 * MIB
OTHER_DELIMITERS: Final = (";", "\t", "|", ",")
"""Delimiters that a header of a single column is searched for."""
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes:
        """Return at most about `size` bytes, none at the end."""
        ...

    def close(self) -> None:
        """Close the reader."""


class _File:
    """A file of lines. Lines count from 1, including blank ones, which are not events."""

    def __init__(self, path: str | Path, time: str | None) -> None:
        self.path = Path(path)
        self._time = time
        self._times = None if time is None else _Times(time)

    async def head(self) -> Position | None:
        """Return None: the number of lines is unknown before they are read."""
        return None

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the events after a line, to the end of the file."""
        if after is not None and not isinstance(after, int):
            raise InvalidInput(f"expected a line number as position, got {after!r}", path=str(self.path))
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise InvalidInput(f"{self.path} can't be read: {error.strerror or error}") from error
        with file, closing(_unpacked(self.path, file)) as reader:
            lines = self._lines(reader)
            while (arrived := await asyncio.to_thread(next, self._arrived(lines, after or 0), None)) is not None:
                yield arrived

    def _arrived(self, lines: Iterator[tuple[int, list[bytes]]], after: int) -> Iterator[Arrived]:
        for first, piece in lines:
            start = max(0, after + 1 - first)
            if start >= len(piece):
                continue
            numbers: Sequence[int] = range(first + start, first + len(piece))
            selected = piece[start:]
            if not all(selected) or any(map(bytes.isspace, selected)):
                numbers = [number for number, line in zip(numbers, selected, strict=True) if line.strip()]
                selected = [line for line in selected if line.strip()]
            arrived = self._events(numbers, selected)
            if arrived.positions:
                yield arrived

    def _events(self, numbers: Sequence[int], lines: list[bytes]) -> Arrived:
        times = (
            None if self._times is None else [self._times.of(line, at) for line, at in zip(lines, numbers, strict=True)]
        )
        return Arrived(numbers, lines, times)

    def _lines(self, reader: _Reader) -> Iterator[tuple[int, list[bytes]]]:
        """Yield `(number of the first line, lines)`, one piece of the file at a time."""
        rest, number = b"", 1
        while True:
            try:
                piece = reader.read(PIECE_BYTES)
            except (EOFError, OSError, zlib.error, Truncated, ValueError) as error:
                reason = "the file is truncated" if isinstance(error, EOFError | Truncated) else str(error)
                raise InvalidInput(f"{self.path} can't be read after line {number}: {reason}", line=number) from error
            if number == 1 and not rest and (encoding := wide_encoding(piece)):
                raise InvalidInput(
                    f"{self.path}: expected UTF-8, got {encoding}",
                    hint=f"convert it first: iconv -f {encoding} -t UTF-8 {self.path} > events.txt",
                )
            if number == 1 and not rest and piece.startswith(_BYTE_ORDER_MARK):
                piece = piece[len(_BYTE_ORDER_MARK) :]
            lines = (rest + piece).split(b"\n")
            rest = lines.pop() if piece else b""
            if not piece and lines and not lines[-1]:
                lines.pop()
            if len(rest) > LINE_BYTES_MAX:
                raise InvalidInput(
                    f"line {number + len(lines)} of {self.path}: expected at most {LINE_BYTES_MAX:,} bytes",
                    hint="check that the file has one event per line",
                )
            if lines:
                yield number, lines
            number += len(lines)
            if not piece:
                return


class Ndjson(_File):
    """A file with one JSON object per line. `time`: the field by which several sources are merged."""


class Csv(_File):
    """A CSV file with a header row. Each row is an event of one kind; its cells are strings, or as its class says.

    A cell can't contain a line break, because the position is the line number.
    """

    def __init__(self, path: str | Path, *, kind: str, event: Any, time: str | None, delimiter: str) -> None:
        super().__init__(path, time)
        self._kind = kind
        self._event = event
        self._delimiter = delimiter
        self._names: list[str] = []

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the rows after a line; the header is read again each time."""
        self._names = []
        async for arrived in super().arrivals(after):
            yield arrived

    def _lines(self, reader: _Reader) -> Iterator[tuple[int, list[bytes]]]:
        for first, lines in super()._lines(reader):
            if first == 1 and lines:
                self._names = self._header(lines[0])
                yield 2, lines[1:]
            else:
                yield first, lines

    def _header(self, line: bytes) -> list[str]:
        """Return the names of the columns. Raises `InvalidInput` if another delimiter separates them."""
        names = self._cells(line, 1)
        for delimiter in OTHER_DELIMITERS:
            if len(names) == 1 and delimiter in names[0]:
                raise InvalidInput(
                    f"line 1 of {self.path}: expected columns separated by {self._delimiter!r}, got {names[0]!r}",
                    hint=f"pass delimiter={delimiter!r} to csv(…)",
                    line=1,
                )
        return names

    def _events(self, numbers: Sequence[int], lines: list[bytes]) -> Arrived:
        events: list[Any] = []
        for number, line in zip(numbers, lines, strict=True):
            cells = self._cells(line, number)
            if len(cells) != len(self._names):
                raise InvalidInput(
                    f"line {number} of {self.path}: expected {len(self._names)} cells, got {len(cells)}",
                    line=number,
                )
            row: dict[str, Any] = dict(zip(self._names, cells, strict=True))
            if self._event is None:
                events.append({"type": self._kind, **row})
                continue
            try:
                events.append(
                    msgspec.convert(
                        {key: value for key, value in row.items() if value != ""}, self._event, strict=False
                    )
                )
            except msgspec.ValidationError as error:
                raise InvalidInput(
                    f"line {number} of {self.path} is not a valid {self._event.__name__}: {error}", line=number
                ) from error
        times = None
        if self._time is not None:
            at = self._names.index(self._time) if self._time in self._names else -1
            cells_of = [self._cells(line, number) for line, number in zip(lines, numbers, strict=True)]
            times = [
                microseconds(cells[at] if at >= 0 else None, self._time, number)
                for cells, number in zip(cells_of, numbers, strict=True)
            ]
        return Arrived(numbers, events, times)

    def _cells(self, line: bytes, number: int) -> list[str]:
        try:
            (cells,) = csv.reader([line.decode().rstrip("\r")], delimiter=self._delimiter, strict=True)
        except (UnicodeDecodeError, csv.Error, ValueError) as error:
            raise InvalidInput(f"line {number} of {self.path} is not valid CSV: {error}", line=number) from error
        return cells


class _Times:
    """Reads the time field of a line."""

    def __init__(self, name: str) -> None:
        self._name = name
        shape = msgspec.defstruct("_Timed", [("at", Any, msgspec.field(name=name, default=None))])
        self._decode: Any = msgspec.json.Decoder(shape).decode

    def of(self, line: bytes, number: int) -> int:
        """Return the time in microseconds since 1970."""
        try:
            value = self._decode(line).at
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the event at line {number} is invalid: {error}", line=number) from error
        return microseconds(value, self._name, number)


def microseconds(value: Any, name: str, position: object) -> int:
    """Return a time as microseconds since 1970: an integer is one already, a string is a date and time with time
    zone.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value.lstrip("-").isdecimal():
            return int(value)
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if isinstance(value, datetime) and value.utcoffset() is not None:
        since = value - datetime(1970, 1, 1, tzinfo=UTC)
        return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    raise InvalidInput(
        f"the event at {position!r} has no valid time in the field {name!r}",
        hint="write microseconds since 1970, or a date and time with time zone",
        position=position,
    )


def _unpacked(path: Path, file: BinaryIO) -> _Reader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".zst":
        return Zstandard(file)
    return file

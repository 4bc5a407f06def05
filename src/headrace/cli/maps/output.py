"""Output of `headrace map`: a line for each run, in index order, whole lines only.

Rule 1: a correct file is never truncated. Existing lines are compared with the results, and kept as far as they agree.
Rule 2: each line has one position in the file and is written there. So two commands that write one file write the same
bytes to the same positions.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from headrace.core import pack, run
from headrace.core.failure import decode
from headrace.foundation.errors import EngineFault, InvalidInput
from headrace.foundation.limits import MIB
from headrace.runtime.engine import Engine
from headrace.store.protocol import RunOutcome

BLOCK_BYTES_MAX: Final = 4 * MIB
_TAIL_BYTES: Final = 64 * 1024
_ENDED: Final = {
    run.CANCELLED: ("Cancelled", "the run was cancelled before it ended"),
    run.EXPIRED: ("Expired", "the run was not started in time"),
}


class OutputFailed(EngineFault):
    """A result could not be written."""

    code = "OUTPUT_FAILED"


class Output(Protocol):
    """Target of result lines."""

    name: str

    async def put(self, lines: bytes) -> None:
        """Write the next whole lines."""

    async def finish(self) -> None:
        """Finish: no line follows."""

    def close(self) -> None:
        """Close it, finished or not."""


def open_output(name: str | None, *, input_path: Path | None) -> Output:
    """Open the target of results. Raises `InvalidInput` before anything runs when it can't be written."""
    if name is None or name == "-":
        return StandardOutput()
    path = Path(name).expanduser()
    if input_path is not None and path.exists() and input_path.exists() and path.samefile(input_path):
        raise InvalidInput(
            f"{name} is the input: writing results there would destroy it", hint="name another file with -o"
        )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        try:
            descriptor = os.open(path, os.O_WRONLY)  # a pipe or a device
        except OSError as error:
            raise InvalidInput(
                f"{name} can't be written: {error.strerror or error}",
                hint="check that its directory exists and that this user may write there",
            ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return FileOutput(name, descriptor)
    return StreamOutput(name, descriptor)


STDOUT: Final = 1
STDERR: Final = 2


class StreamOutput:
    """A pipe, terminal or device: lines are written once, in order."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor

    async def put(self, lines: bytes) -> None:
        """Write the next whole lines."""
        try:
            await asyncio.to_thread(self._write, lines)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _failed(self.name, error) from error

    def _write(self, lines: bytes) -> None:
        view = memoryview(lines)
        while view:
            view = view[os.write(self._descriptor, view) :]

    async def finish(self) -> None:
        """Finish: no line follows."""

    def close(self) -> None:
        """Close what was opened."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class StandardOutput(StreamOutput):
    """Standard output for results alone: what tasks and their child processes print goes to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        super().__init__("standard output", os.dup(STDOUT))
        os.dup2(STDERR, STDOUT)
        self._stdout, sys.stdout = sys.stdout, sys.stderr

    def close(self) -> None:
        """Restore standard output."""
        if self._descriptor >= 0:
            sys.stdout = self._stdout
            os.dup2(self._descriptor, STDOUT)
        super().close()


class FileOutput:
    """A file that may hold results of an earlier command: correct lines are kept, others replaced."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.kept_bytes = 0
        self._descriptor = descriptor
        self._offset = 0
        self._cut_torn_line()
        self._is_comparing = os.fstat(descriptor).st_size > 0

    async def put(self, lines: bytes) -> None:
        """Write the next whole lines."""
        try:
            await asyncio.to_thread(self._put, lines)
        except OSError as error:
            raise _failed(self.name, error) from error

    async def finish(self) -> None:
        """Remove what follows the last line, and sync the file to disk."""
        try:
            if self._is_comparing:
                os.ftruncate(self._descriptor, self._offset)
            await asyncio.to_thread(os.fsync, self._descriptor)
        except OSError as error:
            raise _failed(self.name, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _put(self, lines: bytes) -> None:
        if self._is_comparing:
            existing = _read_at(self._descriptor, len(lines), self._offset)
            if existing == lines:
                self._offset += len(lines)
                self.kept_bytes = self._offset
                return
            self._is_comparing = False
            same_bytes = _same_lines(existing, lines)
            self._offset += same_bytes
            self.kept_bytes = self._offset
            if not lines.startswith(existing):
                os.ftruncate(self._descriptor, self._offset)
            lines = lines[same_bytes:]
        view = memoryview(lines)
        while view:
            written = os.pwrite(self._descriptor, view, self._offset)
            self._offset += written
            view = view[written:]

    def _cut_torn_line(self) -> None:
        """Remove an incomplete last line, as a killed process may leave it."""
        end = os.fstat(self._descriptor).st_size
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            newline = _read_at(self._descriptor, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != os.fstat(self._descriptor).st_size:
            os.ftruncate(self._descriptor, end)


async def lines_of(engine: Engine, outcomes: Sequence[RunOutcome], base_index: int) -> AsyncIterator[bytes]:
    """Return outcomes as whole lines, some megabytes at a time; large results are fetched when they are needed."""
    lines: list[bytes] = []
    count_bytes = 0
    for outcome in outcomes:
        if outcome.state == run.COMPLETED and outcome.kind == pack.JSON:
            line = b'{"index":%d,"ok":true,"output":%b}\n' % (base_index + outcome.index, outcome.result or b"null")
        else:
            line = await _other_line(engine, outcome, base_index + outcome.index)
        lines.append(line)
        count_bytes += len(line)
        if count_bytes >= BLOCK_BYTES_MAX:
            yield b"".join(lines)
            lines, count_bytes = [], 0
    if lines:
        yield b"".join(lines)


async def _other_line(engine: Engine, outcome: RunOutcome, index: int) -> bytes:
    if outcome.state == run.COMPLETED:
        result, kind = outcome.result, outcome.kind
        if kind == pack.REFERENCE:
            result, kind = await engine.fetch(result)
        if kind == pack.TEXT:
            result = msgspec.json.encode(result.decode("utf-8", "replace"))
        elif kind == pack.MSGPACK:
            result = msgspec.json.encode(msgspec.msgpack.decode(result))
        if b"\n" in result:
            result = msgspec.json.format(result, indent=-1)
        return b'{"index":%d,"ok":true,"output":%b}\n' % (index, result or b"null")
    if outcome.state == run.FAILED:
        failure = decode(outcome.result)
        error: dict[str, object] = {"type": failure.type, "message": failure.message, "attempts": failure.attempts}
    else:
        kind_name, message = _ENDED[outcome.state]
        error = {"type": kind_name, "message": message, "attempts": 0}
    return b'{"index":%d,"ok":false,"error":%b}\n' % (index, msgspec.json.encode(error))


def _same_lines(existing: bytes, lines: bytes) -> int:
    """Return the length of the whole lines that both begin with."""
    same_bytes = 0
    for mine, theirs in zip(lines.splitlines(keepends=True), existing.splitlines(keepends=True), strict=False):
        if mine != theirs:
            break
        same_bytes += len(mine)
    return same_bytes


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    pieces: list[bytes] = []
    while size and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _failed(name: str, error: OSError) -> OutputFailed:
    return OutputFailed(
        f"{name} can't be written: {error.strerror or error}",
        hint="all results are in the store: free some space, and repeat the command",
    )

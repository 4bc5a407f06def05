"""Evidence that outlives a process: which runs it had begun when it died.

A file mapped into memory and locked for as long as its process lives. Writing a mark is one byte store, no system
call; the kernel keeps the page when the process is killed and gives up the lock. So whoever finds the file can
tell, at once and without waiting for a timeout, that its owner is dead (the lock is free) and which runs were in
flight (begun, not ended): only those are suspects of having killed it. After a power cut the file may be stale,
which costs nothing: a fence decides what is recorded, marks only decide who is suspected.

The room on disk is taken when the file is made: a mark that finds the disk full would kill its process.

Layout, native byte order: a head (magic, slots, runs a slot), then slots of span id, token, count, one byte a run.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from headrace.foundation.errors import StoreUnavailable
from headrace.runtime.sessions.active_lease import BEGUN

MAGIC: Final = b"HRMARK01"
HEAD: Final = struct.Struct("=8sIIQ")
SLOT: Final = struct.Struct("=QQII")
SLOTS: Final = 16_384
"""Leases of one process at a time."""
SLOTS_MAX: Final = 4_096
ALL_SLOTS: Final = tuple(range(SLOTS_MAX))
"""What is suspected of a span too long to be marked run by run."""

_DEADLINE: Final = struct.Struct("=Q")
_DEADLINE_AT: Final = HEAD.size - _DEADLINE.size

Suspected = dict[tuple[int, int], tuple[int, ...]]


class InflightMarks:
    """The marks of one process. Owned by one thread; `close` removes the file."""

    def __init__(self, path: Path, *, slot_runs: int, slots: int = SLOTS) -> None:
        self.path = path
        self._slot_runs = slot_runs
        self._slot_bytes = SLOT.size + slot_runs
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
            try:
                fcntl.flock(
                    self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # before a byte of it changes: it may be another's
                self._file.truncate(0)
                os.posix_fallocate(self._file.fileno(), 0, HEAD.size + slots * self._slot_bytes)
            except OSError:
                self._file.close()
                raise
            self._map = mmap.mmap(self._file.fileno(), 0)
        except OSError as error:
            raise StoreUnavailable(
                f"the file of live marks can't be made: {error}",
                hint="check that the database's directory is writable and has room",
            ) from error
        HEAD.pack_into(self._map, 0, MAGIC, slots, slot_runs, 0)
        self._view = memoryview(self._map)
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free_count(self) -> int:
        """Spans that can still be marked."""
        return len(self._free)

    def take(self, span_id: int, token: int, count: int) -> tuple[int, memoryview | bytearray]:
        """A slot for one lease, and its marks by place. A span longer than a slot is marked as a whole.

        Whoever claims keeps to `free_count`: a lease without a slot would leave no evidence.
        """
        slot = self._free.pop()
        start = HEAD.size + slot * self._slot_bytes
        fits = count <= self._slot_runs
        body = start + SLOT.size
        if fits:
            self._view[body : body + count] = bytes(count)
        SLOT.pack_into(self._map, start, span_id, token, count if fits else 0, 1)
        return slot, self._view[body : body + count] if fits else bytearray(count)

    def free(self, slot: int) -> None:
        """The lease has ended."""
        SLOT.pack_into(self._map, HEAD.size + slot * self._slot_bytes, 0, 0, 0, 0)
        self._free.append(slot)

    def set_deadline(self, deadline_us: int) -> None:
        """When the run under way must have ended, by the machine's monotonic clock; 0 for never."""
        _DEADLINE.pack_into(self._map, _DEADLINE_AT, deadline_us)

    def close(self, *, keep: bool = False) -> None:
        """Nothing is in flight any more: unlock and remove the file. `keep`: leave it as evidence for others."""
        if not keep:
            self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the map has a handle of its own, and runs may hold the map
        self._view.release()
        with suppress(BufferError):  # a run that outlived its worker still holds its marks; the map goes with it
            self._map.close()
        self._file.close()


def read(path: Path) -> Suspected:
    """The places that were in flight, by (span id, token). An unreadable file suspects nobody."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _suspected(data)
    except (OSError, ValueError, struct.error):  # ValueError: an empty file can't be mapped
        return {}


def _suspected(data: mmap.mmap) -> Suspected:
    magic, slots, slot_runs, _ = HEAD.unpack_from(data)
    if magic != MAGIC:
        return {}
    found: Suspected = {}
    for slot in range(slots):
        start = HEAD.size + slot * (SLOT.size + slot_runs)
        if start + SLOT.size > len(data):
            break
        span_id, token, count, used = SLOT.unpack_from(data, start)
        if not used:
            continue
        body = data[start + SLOT.size : start + SLOT.size + count]
        span_slots = tuple(span_slot for span_slot, mark in enumerate(body) if mark == BEGUN) if count else ALL_SLOTS
        if span_slots:
            found[span_id, token] = (*found.get((span_id, token), ()), *span_slots)
    return found


def read_deadline(path: Path) -> int:
    """What `set_deadline` said last; 0 when nothing is under way."""
    try:
        with path.open("rb") as file:
            return int(HEAD.unpack(file.read(HEAD.size))[3])
    except (OSError, struct.error):
        return 0


def is_dead(path: Path) -> bool | None:
    """Whether the owner of a file of marks has died; None when there is no such file."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            return True
    except FileNotFoundError:
        return None


def dead_sessions(directory: Path) -> list[str]:
    """The sessions that left marks in a directory and whose process has died."""
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    return [path.name for path in paths if "." not in path.name and is_dead(path)]


def remove(paths: list[Path]) -> None:
    """Delete the files of a session that was recovered."""
    for path in paths:
        path.unlink(missing_ok=True)


def of_session(directory: Path, session_id: str) -> list[Path]:
    """The files of one session: its own first, then those of its child processes."""
    own = directory / session_id
    return [own, *sorted(directory.glob(f"{session_id}.*"))]


def merged(paths: list[Path]) -> Suspected:
    """The suspects of a session and its children, as one."""
    found: Suspected = {}
    for path in paths:
        for name, span_slots in read(path).items():
            found[name] = tuple(sorted({*found.get(name, ()), *span_slots}))
    return found


assert os.name == "posix", "Headrace runs on POSIX systems"

"""In-flight marks: a file that outlives its process and says which runs the process had begun.

The file is mapped into memory and locked for as long as its process lives. Setting a mark is one byte store, without a
system call. When the process is killed, the kernel keeps the page and releases the lock. Another process can therefore
tell at once, without a timeout, that the owner has ended (the lock is free) and which runs were in flight (begun, not
ended). Only those runs are suspected of having killed it. After a power cut the file may be stale. That does no harm:
fences decide what is recorded, and marks only decide which runs are suspected.

The disk space is allocated when the file is created, because a mark that finds the disk full would kill its process.

Layout, native byte order: a head (magic, slots, runs per slot, deadline), then slots of span id, token, count, used,
and one byte per run.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final
from weakref import WeakSet

from headrace.foundation.errors import StoreUnavailable
from headrace.runtime.sessions.active_lease import BEGUN

MAGIC: Final = b"HRMARK01"
HEAD: Final = struct.Struct("=8sIIQ")
SLOT: Final = struct.Struct("=QQII")
SLOTS: Final = 16_384
"""Leases that one process can hold at a time."""
SLOTS_MAX: Final = 4_096
ALL_SLOTS: Final = tuple(range(SLOTS_MAX))
"""The suspects of a span that is too long to be marked run by run."""

_DEADLINE: Final = struct.Struct("=Q")
_DEADLINE_AT: Final = HEAD.size - _DEADLINE.size

_MARKS: WeakSet[InflightMarks] = WeakSet()

Suspected = dict[tuple[int, int], tuple[int, ...]]


def _close_in_child() -> None:
    for marks in list(_MARKS):
        with suppress(OSError, ValueError):  # it is closed already
            marks.close_in_child()


os.register_at_fork(after_in_child=_close_in_child)


class InflightMarks:
    """The marks of one process. Owned by one thread; `close` removes the file."""

    def __init__(self, path: Path, *, slot_runs: int, slots: int = SLOTS) -> None:
        self.path = path
        self._slot_runs = slot_runs
        self._slot_bytes = SLOT.size + slot_runs
        try:
            make_private_directory(path.parent)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
            try:
                os.fchmod(self._file.fileno(), 0o600)  # a file of an older version may be readable by others
                fcntl.flock(
                    self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # before any byte changes: the file may belong to another process
                self._file.truncate(0)
                try:
                    os.posix_fallocate(self._file.fileno(), 0, HEAD.size + slots * self._slot_bytes)
                except OSError:
                    path.unlink()
                    raise
            except OSError:
                self._file.close()
                raise
            self._map = mmap.mmap(self._file.fileno(), 0)
            if hasattr(mmap, "MADV_DONTFORK"):
                self._map.madvise(mmap.MADV_DONTFORK)  # a forked child's map would keep the lock
            _MARKS.add(self)
        except OSError as error:
            raise StoreUnavailable(
                f"a file of in-flight marks can't be created in {path.parent}: {error.strerror or error}",
                hint="check that the folder is writable and the disk has free space",
            ) from error
        HEAD.pack_into(self._map, 0, MAGIC, slots, slot_runs, 0)
        self._view = memoryview(self._map)
        self._free = list(range(slots - 1, -1, -1))

    def close_in_child(self) -> None:
        """Close a forked child's handles on the file: its lock must end with the parent, although the child lives.

        The map keeps a file handle of its own; handles are replaced, not closed, since the objects close them later.
        """
        file = os.fstat(self._file.fileno())
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for path in Path("/dev/fd").iterdir():
            with suppress(OSError):  # the directory's own handle
                other = os.fstat(int(path.name))
                if (other.st_dev, other.st_ino) == (file.st_dev, file.st_ino):
                    os.dup2(nothing, int(path.name), inheritable=False)
        os.close(nothing)

    @property
    def free_count(self) -> int:
        """Number of leases that can still be marked."""
        return len(self._free)

    def take(self, span_id: int, token: int, count: int) -> tuple[int, memoryview | bytearray]:
        """Take a slot for one lease; return it and its marks by span slot. A span longer than a slot is marked as a
        whole.

        Callers claim at most `free_count` runs: a lease without a slot would leave no marks.
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
        """Free the slot of a lease that has ended."""
        SLOT.pack_into(self._map, HEAD.size + slot * self._slot_bytes, 0, 0, 0, 0)
        self._free.append(slot)

    def set_deadline(self, deadline_us: int) -> None:
        """Store the time by which the current run must have ended, on the machine's monotonic clock; 0 for none."""
        _DEADLINE.pack_into(self._map, _DEADLINE_AT, deadline_us)

    def close(self, *, keep: bool = False) -> None:
        """Unlock and remove the file. `keep`: leave it for the process that recovers this one."""
        if not keep:
            self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # the map keeps a file handle of its own, and runs may hold the map
        self._view.release()
        with suppress(BufferError):  # a run that outlived its worker still holds its marks; the map is closed with it
            self._map.close()
        self._file.close()


def make_private_directory(directory: Path) -> None:
    """Make a folder that only this user may list: the names of its files contain session ids, which are secrets."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = directory.stat()
    if state.st_mode & 0o077 and state.st_uid == os.geteuid():
        directory.chmod(0o700)


def read(path: Path) -> Suspected:
    """Return the span slots that were in flight, by (span id, token); nothing for an unreadable file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _suspected(data)
    except (OSError, ValueError, struct.error):  # ValueError: an empty file can't be mapped
        return {}


def _suspected(data: mmap.mmap) -> Suspected:
    magic, slots, slot_runs, _ = HEAD.unpack_from(data)
    if magic != MAGIC:
        return {}
    suspects: Suspected = {}
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
            suspects[span_id, token] = (*suspects.get((span_id, token), ()), *span_slots)
    return suspects


def read_deadline(path: Path) -> int:
    """Return the deadline that `set_deadline` stored; 0 if no run has one."""
    try:
        with path.open("rb") as file:
            return int(HEAD.unpack(file.read(HEAD.size))[3])
    except (OSError, struct.error):
        return 0


def owner_has_ended(path: Path) -> bool | None:
    """True if the owner of a file of marks has ended, False if it lives; None if there is no such file.

    A directory, a pipe or a file that can't be read is no file of marks.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            return True
    except (FileNotFoundError, PermissionError):
        return None


def ended_sessions(directory: Path) -> list[str]:
    """Return the sessions that left marks in a folder and whose process has ended."""
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, PermissionError):  # the folder may belong to another user
        return []
    return [path.name for path in paths if "." not in path.name and owner_has_ended(path)]


def remove(paths: list[Path]) -> None:
    """Delete the files of a recovered session. A directory or a file of another user is left."""
    for path in paths:
        with suppress(IsADirectoryError, PermissionError):
            path.unlink(missing_ok=True)


def of_session(directory: Path, session_id: str) -> list[Path]:
    """Return the files of one session: its own first, then those of its child processes."""
    session_file = directory / session_id
    return [session_file, *sorted(directory.glob(f"{session_id}.*"))]


def merged(paths: list[Path]) -> Suspected:
    """Merge the suspects of a session and its children."""
    suspects: Suspected = {}
    for path in paths:
        for name, span_slots in read(path).items():
            suspects[name] = tuple(sorted({*suspects.get(name, ()), *span_slots}))
    return suspects


assert os.name == "posix", "Headrace requires a POSIX system"

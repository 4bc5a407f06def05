"""Identity of the database file that a process has opened.

A file that is deleted or replaced stays readable and writable for the processes that have it open, and all that they
write is lost with its last handle.
"""

from __future__ import annotations

from pathlib import Path

from headrace.foundation.errors import StoreBroken


class OpenedFile:
    """The device and inode of a file at its first opening. Used by several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None

    def opened(self) -> None:
        """Note that the file was opened; later calls change nothing."""
        if self._identity is None:
            self._identity = self._present()

    def forget(self) -> None:
        """Forget the file, since the store is opened again."""
        self._identity = None

    def check(self) -> None:
        """Raise `StoreBroken` if another file, or none, is at the path now."""
        if self._identity is None:
            return
        try:
            present = self._present()
        except OSError:  # its directory can't be read at the moment: SQLite reports what follows
            return
        if present != self._identity:
            problem = "was deleted or moved" if present is None else "was replaced by another file"
            raise StoreBroken(
                f"expected the database file {self._path} that this process has open, but it {problem}",
                hint="put the file back (with its -wal file), or restart the process to begin with what is there now",
            )

    def _present(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

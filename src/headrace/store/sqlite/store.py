"""`SqliteStore`: the verbs of the seam on one file.

WAL and `synchronous=FULL`: a commit that was answered survives a power cut. One thread writes (group commit), a
few read beside it. The standard library's driver was chosen over apsw although apsw lets go of the interpreter
less often: two SQLite libraries on one file in one process lose each other's locks, and users open the file with
the standard one.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from headrace.core.batch import Batch, Ledger, check_created
from headrace.core.block import Chunk
from headrace.core.pack import unpack, unpack_some
from headrace.core.span import Settlement, Span, decode_places, unsettled_places
from headrace.foundation.errors import InvalidInput, StoreBroken, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.store.protocol import (
    Appended,
    Claim,
    Heartbeat,
    Lease,
    NewBatch,
    Outcome,
    Pruned,
    QueueView,
    Release,
    RunView,
    Session,
    Suspects,
    Swept,
    Verification,
)
from headrace.store.sqlite import appending, reading, tending, working
from headrace.store.sqlite.rows import execute, to_batch
from headrace.store.sqlite.writer import Writer, as_fault
from headrace.store.statements import migrations

READERS: Final = 2
BUSY_TIMEOUT_MS: Final = 10_000
OLDEST_SQLITE: Final = (3, 35, 0)
_SYNCHRONOUS: Final = {0: "off", 1: "normal", 2: "full", 3: "extra"}


class SqliteStore:
    """Batches in one SQLite file. `path` is the database file; its directory must exist."""

    def __init__(self, path: Path, limits: Limits, *, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> None:
        self.path = path
        self._limits = limits
        self._busy_timeout_ms = busy_timeout_ms
        self._writer = Writer(self._connect)
        self._local = threading.local()
        self._readers: ThreadPoolExecutor | None = None
        self._reading: list[sqlite3.Connection] = []

    # -- opening and closing

    async def open(self) -> None:
        """Connect and bring the file to the current schema."""
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreBroken(
                f"SQLite {sqlite3.sqlite_version} is too old, {'.'.join(map(str, OLDEST_SQLITE))} is needed",
                hint="use a Python with a newer SQLite",
            )
        self._writer.start()
        self._readers = self._readers or ThreadPoolExecutor(READERS, thread_name_prefix="headrace-sqlite-reader")
        try:
            await self._writer.run(lambda connection: connection.execute("SELECT 1").fetchone())
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what was asked for and close every connection."""
        await asyncio.to_thread(self._writer.close)
        if self._readers is not None:
            readers, self._readers = self._readers, None
            await asyncio.to_thread(readers.shutdown)
            for connection in self._reading:
                connection.close()
            self._reading.clear()

    def _connect(self) -> sqlite3.Connection:
        connection = self._plain()
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _plain(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=self._busy_timeout_ms / 1_000
        )
        connection.execute("PRAGMA cache_size = -32768")
        return connection

    async def _write(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        return await self._writer.run(work)

    async def _read(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        if self._readers is None:
            raise StoreUnavailable("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_now, work)

    def _read_now(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._plain()
                connection.execute("PRAGMA query_only = 1")
                self._reading.append(connection)
            return work(connection)
        except sqlite3.Error as error:
            raise as_fault(error) from error

    async def check(self) -> dict[str, object]:
        """A round trip through the writer, and what durability hangs on."""

        def work(connection: sqlite3.Connection) -> dict[str, object]:
            return {
                "store": "sqlite",
                "path": str(self.path),
                "sqlite_version": sqlite3.sqlite_version,
                "schema_version": _version(connection),
                "journal_mode": connection.execute("PRAGMA journal_mode").fetchone()[0],
                "synchronous": _SYNCHRONOUS[connection.execute("PRAGMA synchronous").fetchone()[0]],
            }

        found: dict[str, object] = await self._write(work)
        return found

    # -- batches

    async def create_batch(self, new: NewBatch, *, now_us: int) -> tuple[Batch, bool]:
        """Open a batch, or answer the one its key names."""
        check_created(expected_count=new.expected_count, runs_max=self._limits.batch_runs_max)
        answer: tuple[Batch, bool] = await self._write(lambda c: appending.create(c, new, now_us))
        return answer

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None
    ) -> Appended:
        """Make runs durable, each index once."""
        runs_max = self._limits.batch_runs_max
        answer: Appended = await self._write(lambda c: appending.append(c, batch_id, chunks, cursor, runs_max, now_us))
        return answer

    async def seal(self, batch_id: str, expected_count: int | None, *, now_us: int) -> Batch:
        """Close the batch; completes it when its runs have all ended."""
        answer: Batch = await self._write(lambda c: appending.seal(c, batch_id, expected_count, now_us))
        return answer

    async def stop_batch(self, batch_id: str, state: str, *, now_us: int) -> Batch:
        """Move to `cancelled` or `abandoned`."""
        answer: Batch = await self._write(lambda c: appending.stop(c, batch_id, state, now_us))
        return answer

    async def cancel_runs(self, batch_id: str, indexes: Sequence[int], *, now_us: int) -> int:
        """Cancel single runs."""
        answer: int = await self._write(lambda c: appending.cancel_runs(c, batch_id, indexes, now_us))
        return answer

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None) -> int:
        """Run again what failed."""
        answer: int = await self._write(lambda c: appending.redrive(c, batch_id, indexes))
        return answer

    # -- sessions

    async def start_session(self, session: Session, *, now_us: int) -> None:
        """Make a process known."""
        await self._write(lambda c: working.start_session(c, session, now_us))

    async def heartbeat(self, session_id: str, *, now_us: int) -> Heartbeat:
        """A sign of life."""
        answer: Heartbeat = await self._write(lambda c: working.heartbeat(c, session_id, now_us))
        return answer

    async def end_session(self, session_id: str, *, now_us: int) -> None:
        """Leave in good order."""
        await self._write(lambda c: working.end_session(c, session_id, now_us))

    async def sessions(self) -> list[Session]:
        """The sessions that have not ended."""
        answer: list[Session] = await self._read(reading.sessions)
        return answer

    async def recover(
        self, session_id: str, suspects: Suspects, *, silent_since_us: int, crashes_max: int, now_us: int
    ) -> int:
        """End a silent session, once, and give its leases back."""
        answer: int = await self._write(
            lambda c: working.recover(c, session_id, suspects, silent_since_us, crashes_max, now_us)
        )
        return answer

    # -- work

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans to a live session; inputs are unpacked here, outside the transaction."""
        if claim.runs_max < 1:
            raise InvalidInput(f"a claim is for one run or more, not for {claim.runs_max}")
        taken: working.Taken = await self._write(lambda c: working.claim(c, claim, now_us))
        return [_lease(span, *taken.blocks[span.block_id]) for span in taken.spans]

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes."""
        answer: list[str] = await self._write(lambda c: working.settle(c, settlements, now_us))
        return answer

    async def release(self, releases: Sequence[Release], *, crashes_max: int, now_us: int) -> list[str]:
        """Give leases back before their runs ended."""
        answer: list[str] = await self._write(lambda c: working.release(c, releases, crashes_max, now_us))
        return answer

    # -- reading

    async def batch(self, batch_id: str) -> tuple[Batch, Ledger]:
        """One batch and its ledger."""
        answer: tuple[Batch, Ledger] = await self._read(
            lambda c: _consistently(c, lambda: reading.with_ledger(c, appending.find(c, batch_id)))
        )
        return answer

    async def find_batch(self, environment: str, key: str) -> Batch | None:
        """The batch that a key names."""
        row = await self._read(lambda c: execute(c, "batch_by_key", environment=environment, key=key).fetchone())
        return None if row is None else to_batch(row)

    async def batches(
        self, environment: str, *, states: Sequence[str] | None = None, before_id: str = "", limit: int = 50
    ) -> list[tuple[Batch, Ledger]]:
        """Batches, newest first."""
        answer: list[tuple[Batch, Ledger]] = await self._read(
            lambda c: _consistently(c, lambda: reading.list_batches(c, environment, states, before_id, limit))
        )
        return answer

    async def missing(self, batch_id: str, ranges_max: int) -> list[tuple[int, int]]:
        """Ranges of announced indexes that are not durable yet."""
        answer: list[tuple[int, int]] = await self._read(lambda c: reading.missing(c, batch_id, ranges_max))
        return answer

    async def outcomes(self, batch_id: str, from_index: int, runs_max: int) -> list[Outcome]:
        """Consecutive final outcomes, in index order."""
        answer: list[Outcome] = await self._read(
            lambda c: _consistently(c, lambda: reading.outcomes(c, batch_id, from_index, runs_max))
        )
        return answer

    async def run(self, batch_id: str, index: int) -> RunView:
        """One run."""
        answer: RunView = await self._read(lambda c: _consistently(c, lambda: reading.run(c, batch_id, index)))
        return answer

    async def runs(
        self,
        environment: str,
        *,
        batch_id: str = "",
        state: str = "",
        task: str = "",
        tag: str = "",
        limit: int = 50,
    ) -> list[RunView]:
        """Runs that match."""
        answer: list[RunView] = await self._read(
            lambda c: _consistently(c, lambda: reading.list_runs(c, environment, batch_id, state, task, tag, limit))
        )
        return answer

    async def queues(self, environment: str) -> list[QueueView]:
        """The queues that were ever used or paused."""
        answer: list[QueueView] = await self._read(lambda c: reading.queues(c, environment))
        return answer

    async def pause_queue(self, environment: str, name: str, *, paused: bool) -> None:
        """Stop or go on handing out a queue's runs."""

        def work(connection: sqlite3.Connection) -> None:
            execute(connection, "know_queue", environment=environment, name=name)
            execute(connection, "pause_queue", environment=environment, name=name, paused=int(paused))

        await self._write(work)

    async def verify(self, batch_id: str) -> Verification:
        """Count a batch from its chunks."""
        answer: Verification = await self._read(lambda c: reading.verify(c, batch_id))
        return answer

    # -- upkeep

    async def sweep(self, *, now_us: int, rows_max: int) -> Swept:
        """Expire, abandon and cancel what is due."""
        crashes_max = self._limits.crashes_max
        answer: Swept = await self._write(lambda c: tending.sweep(c, rows_max, crashes_max, now_us))
        return answer

    async def prune(self, finished_before_us: int, *, batches_max: int, rows_max: int) -> Pruned:
        """Delete batches that finished before then."""
        answer: Pruned = await self._write(lambda c: tending.prune(c, finished_before_us, batches_max, rows_max))
        return answer

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Those of these object keys that no row names."""
        answer: list[str] = await self._read(lambda c: tending.unnamed(c, keys))
        return answer

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """When the next delayed span becomes claimable."""
        answer: int | None = await self._read(lambda c: reading.next_due_us(c, environment, tasks))
        return answer


def _lease(span: Span, first_index: int, gaps: bytes | None, extras: bytes | None, items: bytes) -> Lease:
    """What a worker needs of a claimed span."""
    whole = span.positions is None and span.unsettled_count == len(span.states)
    if whole:
        places: Sequence[int] = range(len(span.states))
        positions: Sequence[int] = places
        payloads, kinds = unpack(items)
    else:
        places = unsettled_places(span)
        own = range(len(span.states)) if span.positions is None else decode_places(span.positions)
        positions = [own[place] for place in places]
        payloads, kinds = unpack_some(items, positions)
    if gaps is None:
        indexes: Sequence[int] = (
            range(first_index, first_index + len(places)) if whole else [first_index + at for at in positions]
        )
    else:
        distances = array("I", gaps)
        indexes = [first_index + distances[at] for at in positions]
    by_place = {}
    if extras is not None:
        by_position = appending.decode_extras(extras)
        by_place = {place: by_position[at] for place, at in zip(places, positions, strict=True) if at in by_position}
    return Lease(
        span_id=span.id,
        token=span.token,
        batch_id=span.batch_id,
        task=span.task,
        queue=span.queue,
        attempt=span.attempt,
        crashes_count=span.crashes_count,
        at_most_once=span.at_most_once,
        due_us=span.due_us,
        expires_us=span.expires_us,
        whole=whole,
        places=places,
        indexes=indexes,
        payloads=payloads,
        kinds=kinds if kinds is not None and any(kinds) else None,
        extras=by_place,
        runs_count=len(span.states),
    )


def _consistently(connection: sqlite3.Connection, work: Callable[[], Any]) -> Any:
    """Run several reads against one snapshot."""
    connection.execute("BEGIN")
    try:
        return work()
    finally:
        connection.execute("COMMIT")


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema to the newest version this code knows; a newer one is not touched."""
    scripts = migrations("headrace.store.sqlite")
    newest = scripts[-1][0]
    if _version(connection) == newest:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _known_version(connection, newest)
        for number, script in scripts[version:]:
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number:d}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _known_version(connection: sqlite3.Connection, newest: int) -> int:
    version = _version(connection)
    if version > newest:
        raise StoreBroken(
            f"the database has schema version {version}, this Headrace knows up to {newest}",
            hint="upgrade Headrace, or name another file with --store",
        )
    return version


def _statements(script: str) -> list[str]:
    found, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            found.append(pending)
            pending = ""
    return found

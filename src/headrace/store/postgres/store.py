"""`PostgresStore`: the operations of a store on a PostgreSQL database.

A script runs in one transaction, READ COMMITTED, and locks the rows it changes in one order (spans by id, then batches
by id), so transactions never deadlock. No state is kept on a connection: table names contain the schema, and ids come
from ranges that the process takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import asyncpg

from headrace.core.block import Chunk
from headrace.core.span import SETTLED, Settlement
from headrace.foundation.errors import (
    HeadraceError,
    InvalidInput,
    InvalidSetting,
    StoreBroken,
    StoreUnavailable,
    StoreUnreachable,
)
from headrace.foundation.limits import Limits
from headrace.store.caller_transaction import CallerTransaction
from headrace.store.postgres import fast_path
from headrace.store.postgres.caller_transaction import PostgresCallerTransaction
from headrace.store.postgres.claim_cursors import ClaimCursors
from headrace.store.postgres.dsn import address
from headrace.store.postgres.errors import (
    ANOTHER_SESSION,
    DRIVER,
    SCHEMA_CHANGED,
    STALE,
    UNDONE,
    changed_nothing,
    missing_rights_error,
    store_error,
)
from headrace.store.postgres.id_ranges import ID_RANGE, IdRange
from headrace.store.postgres.pool import (
    BEGIN_READING,
    BEGIN_WRITING,
    Pool,
    PostgresConnection,
    Prepared,
    compiled,
    connect,
)
from headrace.store.postgres.schema_migration import SchemaMigration
from headrace.store.protocol import Appended, Claim, Lease, Session
from headrace.store.reachability import Reachability
from headrace.store.transactions import append, queries
from headrace.store.transactions import leases as lease_scripts
from headrace.store.transactions.leases import CANDIDATES_MAX, USUAL_RUNS
from headrace.store.transactions.scripted_store import ScriptedStore
from headrace.store.transactions.sql_script import Query, Rows, Script, TransactionConflict

T = TypeVar("T")

CONNECTIONS: Final = 8
TRIES: Final = 10
PROBE_TIMEOUTS_S: Final = (1, 2, 5, 15)
OUT_OF_ORDER: Final = 1_024
"""Batches that are remembered for arriving in another order than their indexes."""
MISSES_MAX: Final = 3
"""Consecutive appends out of order after which a batch is expected to arrive out of order."""


class PostgresStore(ScriptedStore):
    """Batches in one schema of a PostgreSQL database.

    `url` is a DSN with options of Headrace: `?schema=headrace&pooler=auto&read_only=false`. `direct_url` leads to the
    same database without a pooler. It is used for what needs its own session: migrations, and notifications by
    `LISTEN`. Without `migrates`, opening creates and changes nothing: the schema must be that of this code.
    """

    def __init__(self, url: str, limits: Limits, *, direct_url: str | None = None, migrates: bool = True) -> None:
        super().__init__(limits)
        self._migrates = migrates
        self._store_id = ""
        self.address = address(url)
        self.direct_address = None if direct_url is None else address(direct_url)
        self._schema = self.address.schema
        self._sql = compiled(self._schema)
        self._pools: dict[asyncio.AbstractEventLoop, tuple[Pool, AsyncGenerator[None, None]]] = {}
        self._block_ids, self._span_ids = IdRange(), IdRange()
        self._runs_a_span = USUAL_RUNS
        self._claim_cursors = ClaimCursors(everything_each_us=limits.poll_interval_ms * 1_000)
        self._out_of_order = _Misses(OUT_OF_ORDER)
        self._is_open = False
        self._probes_failed_count = 0
        self.reachability = Reachability(self._probe, has_connections=True)
        self.reachability.listen(self._end_silent)

    @property
    def schema(self) -> str:
        """The schema of all tables."""
        return self._schema

    async def open(self) -> None:
        """Connect, and migrate the schema.

        A read-only store and one without `migrates` raise `SchemaOutdated` for an older schema, or none.
        """
        self._is_open = True
        try:
            if self.address.is_read_only or not self._migrates:
                async with (await self._pool()).borrowed() as connection:
                    await self._migration().check(connection)
            else:
                await self._migrate()
            ((self._store_id,),) = await self._tried(lambda connection: self._fetch(connection, "store_id"))
        except (HeadraceError, asyncio.CancelledError):
            await self.close()
            raise
        except BaseException as error:
            translated = await self._translated(error)
            await self.close()
            raise translated from error

    def _migration(self) -> SchemaMigration:
        return SchemaMigration(self._sql, self._schema, database=self.address.database)

    async def _migrate(self) -> None:
        migrating = self._migration()
        if self.direct_address is None:
            async with (await self._pool()).borrowed() as connection:
                await migrating.run(connection)
            return
        connection = await connect(self.direct_address)
        try:
            await migrating.run(connection)
        finally:
            connection.raw.terminate()

    async def close(self) -> None:
        """Close every connection. A second close does nothing."""
        self._is_open = False
        here = asyncio.get_running_loop()
        for loop, (pool, end) in list(self._pools.items()):
            self._pools.pop(loop, None)
            if loop is here:
                await pool.close()
                await end.aclose()
            else:
                with suppress(RuntimeError):  # the loop ended at this moment, and its connections with it
                    loop.call_soon_threadsafe(pool.terminate)

    @property
    def identity(self) -> str:
        """The host, database and schema, without the user."""
        parts = urlsplit(self.address.dsn)
        return f"{parts.hostname}:{parts.port}{parts.path}/{self._schema}"

    async def clock_us(self) -> int:
        """Return the time of the database's machine, which all hosts follow."""
        ((now_us,),) = await self._tried(lambda connection: self._fetch(connection, "clock"))
        return int(now_us)

    async def check(self) -> dict[str, object]:
        """Make a round trip, and return the settings that durability depends on."""

        async def work(connection: PostgresConnection) -> dict[str, object]:
            ((server, fsync, synchronous_commit, is_standby),) = await self._fetch(connection, "durability")
            ((version,),) = await self._fetch(connection, "version")
            return {
                "store": "postgres",
                "schema": self._schema,
                "server_version": server,
                "schema_version": version,
                "fsync": fsync,
                "synchronous_commit": synchronous_commit,
                "standby": is_standby,
                "pooled": connection.is_pooled,
            }

        return await self._tried(work)

    def joined(self, connection: Any) -> CallerTransaction:
        """Return the scripts of this schema on a caller's connection, in the transaction that is open there."""
        return PostgresCallerTransaction(
            connection,
            self._sql,
            self._schema,
            store_id=self._store_id,
            block_ids=self._block_ids,
            span_ids=self._span_ids,
        )

    # -- hot operations, one statement each (R7, a hot operation is one statement); scripts do the unusual cases

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        """Make runs durable: in one statement if they follow all received runs, else by the script.

        The statement does not seal: it would have to check for the end with each append of a large batch.
        """
        runs_max = self._limits.batch_runs_max
        is_expected = self._out_of_order.of(batch_id) < MISSES_MAX
        values = fast_path.in_order(chunks, cursor) if is_expected else None
        if values is not None:
            blocks_count, spans_count = values.pop("blocks_count"), values.pop("spans_count")

            async def work(connection: PostgresConnection) -> Rows:
                block_id = await self._take(connection, self._block_ids, "next_block_ids", blocks_count)
                span_id = await self._take(connection, self._span_ids, "next_span_ids", spans_count)
                ids = {"batch_id": batch_id, "block_id": block_id, "span_id": span_id}
                return await self._fetch(
                    connection, "append_in_order", **values, **ids, runs_max=runs_max, now_us=now_us
                )

            ((runs_count,),) = await self._changed(work)
            if runs_count:
                self._out_of_order.hit(batch_id)
                sealed = await self._write(lambda: append.seal_whole(batch_id, now_us)) if seals else None
                return Appended(accepted_count=runs_count, duplicates_count=0, sealed=sealed)
            self._out_of_order.miss(batch_id)
        return await super().append(batch_id, chunks, now_us=now_us, cursor=cursor, seals=seals)

    async def settle(self, settlements: Sequence[Settlement], *, now_us: int) -> list[str]:
        """Record outcomes: in one statement if all runs ended finally, else by the script."""
        statement = fast_path.lease_ended(settlements[0]) if len(settlements) == 1 else None
        if statement is not None:
            if await self.alone(statement[0], **statement[1], now_us=now_us):
                return [SETTLED]
        elif (values := fast_path.ended(settlements)) is not None:
            ((count,),) = await self.alone("settle_ended", **values, now_us=now_us)
            if count:
                return [SETTLED] * count
        return await super().settle(settlements, now_us=now_us)

    async def claim(self, claim: Claim, *, now_us: int) -> list[Lease]:
        """Lease spans in one statement, or by the script where the statement reports that it can't."""
        if claim.runs_max < 1:
            return await super().claim(claim, now_us=now_us)
        rows_max, due_us = fast_path.rows_wanted(claim.runs_max, self._runs_a_span), now_us
        marks = self._claim_cursors.of(claim, now_us)
        while True:
            values = fast_path.claim_values(
                claim,
                bytes_max=self._limits.claim_bytes_max,
                rows_max=rows_max,
                due_us=due_us,
                now_us=now_us,
                marks=marks,
            )
            answer = fast_path.claim_answer(await self._claim_whole(values))
            if answer.verdict == fast_path.SHORT:
                rows_max = min(rows_max * 4, CANDIDATES_MAX)
            elif answer.verdict == fast_path.BELOW:
                marks = {}
            elif answer.verdict == fast_path.DUE:
                await self._write(lambda: lease_scripts.promote(now_us))
                due_us = fast_path.NEVER
            elif answer.verdict in fast_path.ANSWERED:
                leases = answer.leases
                self._runs_a_span = fast_path.runs_a_span(leases) or self._runs_a_span
                is_enough = answer.is_cut or sum(len(lease.span_slots) for lease in leases) >= claim.runs_max
                self._claim_cursors.claimed(
                    claim, answer.spans, is_enough=is_enough, was_everything=not marks, now_us=now_us
                )
                return leases
            else:
                return await super().claim(claim, now_us=now_us)

    async def _claim_whole(self, values: dict[str, Any]) -> Rows:
        async def work(connection: PostgresConnection) -> Rows:
            span_id = await self._take(connection, self._span_ids, "next_span_ids", 1)
            return await self._fetch(connection, "claim_whole", **values, span_id=span_id)

        return await self._changed(work)

    # -- queries of an idle process: one statement each, which needs no transaction for one snapshot

    async def next_due_us(self, environment: str, tasks: Sequence[str]) -> int | None:
        """Return when the next delayed span becomes claimable."""
        return await self._tried(lambda connection: self._run(connection, queries.next_due_us(environment, tasks)))

    async def sessions(self) -> list[Session]:
        """List the sessions that have not ended."""
        return await self._tried(lambda connection: self._run(connection, queries.sessions()))

    async def duties(self) -> dict[str, int]:
        """Return when each duty can be taken again."""
        return await self._tried(lambda connection: self._run(connection, queries.duties()))

    # -- running scripts

    async def _write(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction."""

        async def work(connection: PostgresConnection) -> T:
            await self._begin(connection, BEGIN_WRITING)
            answer = await self._run(connection, script())
            await self._commit(connection)
            return answer

        return await self._changed(work)

    async def _read(self, script: Callable[[], Script[T]]) -> T:
        """Run a script on one snapshot."""

        async def work(connection: PostgresConnection) -> T:
            await self._begin(connection, BEGIN_READING)
            answer = await self._run(connection, script())
            await self._commit(connection)
            return answer

        return await self._tried(work)

    async def write(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction that is no operation of the store."""
        return await self._write(script)

    async def read(self, script: Callable[[], Script[T]]) -> T:
        """Run a script that changes nothing and is no operation of the store, on one snapshot."""
        return await self._read(script)

    async def within(
        self, work: Callable[[PostgresConnection, Callable[[Script[Any]], Awaitable[Any]]], Awaitable[T]]
    ) -> T:
        """Run `work(connection, run)` in one transaction on a connection of this loop; `run` runs a script."""

        async def whole(connection: PostgresConnection) -> T:
            await self._begin(connection, BEGIN_WRITING)
            answer = await work(connection, lambda script: self._run(connection, script))
            await self._commit(connection)
            return answer

        return await self._changed(whole)

    async def fetched(self, statement: Prepared, values: Mapping[str, Any]) -> Rows:
        """Return the rows of one statement that only reads."""
        return await self._tried(lambda connection: connection.fetch(statement, values))

    async def alone(self, name: str, /, **values: Any) -> Rows:
        """Run one statement that the server commits by itself (R7, a hot operation is one statement)."""
        return await self._changed(lambda connection: self._fetch(connection, name, **values))

    async def _changed(self, work: Callable[[PostgresConnection], Awaitable[T]]) -> T:
        """Do the same as `_tried`, for work that changes something."""
        if self.address.is_read_only:
            raise InvalidSetting(
                "refused a write: the store was opened with read_only=true",
                hint="remove read_only=true from its URL, and name the primary server",
            )
        return await self._tried(work)

    async def _tried(self, work: Callable[[PostgresConnection], Awaitable[T]]) -> T:
        """Run work again of which nothing was done, as after a rollback because of a concurrent transaction; translate
        other errors.
        """
        for tries_left in range(TRIES - 1, -1, -1):
            pool, connection = await self._pool(), None
            try:
                async with pool.borrowed() as connection:
                    answer = await work(connection)
            except (TransactionConflict, *UNDONE, asyncpg.InternalClientError) as error:
                if not tries_left or not changed_nothing(error):
                    raise self._noted(self._store_error(error)) from error
                await asyncio.sleep(0)
            except ANOTHER_SESSION as error:  # nothing was done: the prepared statement does not exist
                if not tries_left or connection is None or connection.is_pooled:
                    raise self._store_error(error) from error
                self._notice_pooler()
            except STALE as error:
                if not tries_left:
                    raise self._store_error(error) from error
                pool.forget()
            except SCHEMA_CHANGED as error:
                raise await self._version_error(pool, error) from error
            except DRIVER as error:
                raise self._noted_failure(await self._translated(error), error, connection) from error
            else:
                self.reachability.succeeded()
                return answer
        raise AssertionError

    async def _probe(self) -> None:
        """Make the cheapest round trip. Each attempt waits longer than the last, and the first again not long: a host
        that has just come back answers the next attempt, not the one that hangs.
        """
        timeout_s = PROBE_TIMEOUTS_S[self._probes_failed_count % len(PROBE_TIMEOUTS_S)]
        self._probes_failed_count += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self.clock_us()
        except TimeoutError:
            raise StoreUnreachable(f"{self.address.database} did not answer within {timeout_s} s") from None
        self._probes_failed_count = 0

    async def _translated(self, error: BaseException) -> HeadraceError:
        """Translate a driver's error; if a right is missing, ask the server which."""
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            with suppress(HeadraceError, *DRIVER):
                async with (await self._pool()).borrowed() as connection:
                    rows = await self._fetch(connection, "missing_rights", schema=self._schema)
                if rows:
                    named = [(role, right, name) for role, right, name in rows]
                    return missing_rights_error(error, self.address.database, self._schema, named)
        return self._store_error(error)

    def _store_error(self, error: BaseException) -> HeadraceError:
        return store_error(error, self.address.database)

    def _noted(self, error: HeadraceError) -> HeadraceError:
        """Return an error of an operation, once it is noted if the database was not reached."""
        if isinstance(error, StoreUnreachable):
            self.reachability.failed(error)
        return error

    def _noted_failure(
        self, translated: HeadraceError, error: BaseException, connection: PostgresConnection | None
    ) -> HeadraceError:
        """Do the same as `_noted`, with regard to the connection on which an operation failed."""
        if connection is None:
            return self._noted(translated)
        if connection.silences_count != self.reachability.silences_count:
            return translated  # it shows nothing about the present connections
        if isinstance(error, TimeoutError):
            self.reachability.fell_silent(translated, since=connection.silences_count)
        return self._noted(translated)

    async def _version_error(self, pool: Pool, error: BaseException) -> HeadraceError:
        """Explain a statement that does not fit the schema: was it migrated while this process ran?"""
        try:
            async with pool.borrowed() as connection:
                await self._migration().check(connection)
        except StoreBroken as newer:
            return newer
        except (HeadraceError, *DRIVER):
            pass
        return self._store_error(error)

    async def _run(self, connection: PostgresConnection, script: Script[T]) -> T:
        try:
            ask = next(script)
            while True:
                ask = script.send(await self._answer(connection, ask))
        except StopIteration as done:
            answer: T = done.value
            return answer

    async def _answer(self, connection: PostgresConnection, ask: Query) -> Rows:
        if ask.name == "take_ids":
            first_block = await self._take(connection, self._block_ids, "next_block_ids", ask.values["blocks_count"])
            first_span = await self._take(connection, self._span_ids, "next_span_ids", ask.values["spans_count"])
            return [(first_block, first_span)]
        return await self._fetch(connection, ask.name, **ask.values)

    # -- sending: every statement passes here by its name

    async def _fetch(self, connection: PostgresConnection, name: str, /, **values: Any) -> Rows:
        return await connection.fetch(self._sql[name], values)

    async def _begin(self, connection: PostgresConnection, how: str) -> None:
        await connection.begin(how)

    async def _commit(self, connection: PostgresConnection) -> None:
        await connection.commit()

    async def _take(self, connection: PostgresConnection, id_range: IdRange, name: str, count: int) -> int:
        """Return the first of `count` consecutive ids; fetch a new range if this one is too short."""
        if count > ID_RANGE:
            raise InvalidInput(f"expected at most {ID_RANGE} new rows of a kind in one transaction, got {count}")
        while (first := id_range.take(count)) is None:
            ((start,),) = await self._fetch(connection, name)
            id_range.start(start)
        return first

    # -- connections

    async def _pool(self) -> Pool:
        """Return the connections of the running loop: a connection belongs to the loop that opened it."""
        if not self._is_open:
            raise StoreUnavailable("the store is closed")
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            pool = Pool(self.address, CONNECTIONS, self.reachability)
            end = self._ended_with(loop, pool)
            self._pools[loop] = pool, end
            await anext(end)
        pool, _ = self._pools[loop]
        return pool

    def _end_silent(self) -> None:
        """Close the connections of all loops from before a silence. Called from the thread that noticed its end."""
        for loop, (pool, _) in list(self._pools.items()):
            with suppress(RuntimeError):  # that loop has ended, and its connections with it
                loop.call_soon_threadsafe(pool.end_silent)

    def _notice_pooler(self) -> None:
        """Treat every connection as one to a pooler from now on."""
        self.address = self.address._replace(pooler="transaction")
        for pool, _ in list(self._pools.values()):
            pool.address = self.address

    async def _ended_with(self, loop: asyncio.AbstractEventLoop, pool: Pool) -> AsyncGenerator[None, None]:
        """Close the pool when its loop ends: closing its generators is the only notice that a loop gives."""
        try:
            yield
        finally:
            if self._pools.get(loop, (None,))[0] is pool:
                del self._pools[loop]
            pool.terminate()


class _Misses:
    """Counts of consecutive misses by name; the most recent names are remembered."""

    def __init__(self, names_max: int) -> None:
        self._names_max = names_max
        self._counts: dict[str, int] = {}

    def of(self, name: str) -> int:
        """Return the misses since the last hit."""
        return self._counts.get(name, 0)

    def hit(self, name: str) -> None:
        """Reset the misses of a name."""
        self._counts.pop(name, None)

    def miss(self, name: str) -> None:
        """Count a miss."""
        self._counts[name] = self._counts.pop(name, 0) + 1
        if len(self._counts) > self._names_max:
            del self._counts[next(iter(self._counts))]

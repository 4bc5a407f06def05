"""Migration of a schema to the version of this code, while processes of an older version may be running."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import asyncpg

from headrace.foundation.errors import StoreBroken
from headrace.store.postgres.pool import BEGIN_WRITING, PostgresConnection, Prepared
from headrace.store.schema_version import check_current, check_known
from headrace.store.statements import migrations

PACKAGE: Final = "headrace.store.postgres"
OLDEST_POSTGRES: Final = (14,)
LOCK: Final = 0x68656164726163
TRIES: Final = 10
AGAIN_S: Final = 0.2
LOCK_TIMEOUT_MS: Final = "3000"
MIGRATION_S: Final = 3_600


class SchemaMigration:
    """Migration of one schema. One process migrates at a time; the others wait, and find the migrations applied."""

    def __init__(self, statements: Mapping[str, Prepared], schema: str, *, database: str) -> None:
        self._statements = statements
        self._place = f"schema {schema} of {database}"
        self._schema = schema
        self._scripts = migrations(PACKAGE)
        self._newest = self._scripts[-1][0]

    async def run(self, connection: PostgresConnection) -> None:
        """Apply the missing migrations, all of them or none.

        A migration waits only a short time for its locks, since all later transactions wait behind it. If it does not
        get them, it releases what it has and tries again.
        """
        if connection.raw.get_server_version() < OLDEST_POSTGRES:
            raise StoreBroken("expected PostgreSQL 14 or newer, got an older server", hint="upgrade the server")
        if await self._version(connection) == self._newest:
            return
        for tries_left in range(TRIES - 1, -1, -1):
            try:
                await self._apply(connection)
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                await connection.undo()
                if not tries_left:
                    raise
                await asyncio.sleep(AGAIN_S)
            except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError) as error:
                await connection.undo()
                raise StoreBroken(
                    f"{self._place} already holds objects that are not Headrace's: {error}",
                    hint="give Headrace a schema of its own: HEADRACE_STORE=postgresql://…?schema=NAME",
                ) from error
            else:
                return

    async def check(self, connection: PostgresConnection) -> None:
        """Raise `SchemaOutdated` or `StoreBroken` unless the schema has the version of this code."""
        check_current(self._place, await self._version(connection), self._newest)

    async def _apply(self, connection: PostgresConnection) -> None:
        await connection.begin(BEGIN_WRITING)
        await self._fetch(connection, "patience_of_migration", lock_timeout="0")
        await connection.fetch(self._statements["migration_lock"], {"lock": LOCK}, timeout_s=MIGRATION_S)
        await self._fetch(connection, "patience_of_migration", lock_timeout=LOCK_TIMEOUT_MS)
        version = await self._version(connection)
        check_known(self._place, version, self._newest)
        for number, script in self._scripts[version:]:
            await connection.raw.execute(script.replace("{schema}", f'"{self._schema}"'), timeout=MIGRATION_S)
            await self._fetch(connection, "set_version", number=number)
        await connection.commit()

    async def _version(self, connection: PostgresConnection) -> int:
        if not await self._fetch(connection, "version_table", schema=self._schema):
            return 0
        ((number,),) = await self._fetch(connection, "version")
        return int(number)

    async def _fetch(self, connection: PostgresConnection, name: str, /, **values: Any) -> list[tuple[Any, ...]]:
        return await connection.fetch(self._statements[name], values)

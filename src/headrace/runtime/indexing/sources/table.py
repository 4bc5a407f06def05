"""Events from a table of PostgreSQL, in the order of a key that only grows.

Rows become visible in the order in which their transactions commit, not in the order of their keys: a row with a
smaller key from a sequence may appear after one with a larger key. Rows are therefore read up to the first one that is
younger than the oldest running transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from headrace.core.sequencer import Arrived, Position
from headrace.foundation.errors import InvalidInput, StoreUnavailable
from headrace.runtime.indexing.sources.source import Arrival

PIECE_ROWS: Final = 5_000
RECHECK_S: Final = 0.05
"""Between two checks of rows that an older transaction may still precede."""


class Table:
    """The rows of a table. `key`: a unique column of integers or strings that grows from row to row. Each row is an
    event of one kind.

    With `follow_s` the table is queried again at that interval when its end is reached; otherwise the source ends
    there.
    """

    def __init__(self, dsn: str, table: str, *, key: str, kind: str, follow_s: float | None) -> None:
        self._dsn = dsn
        self._from = ".".join(_quoted(part) for part in table.split("."))
        self._key = _quoted(key)
        self._name = key
        self._kind = kind
        self._follow_s = follow_s
        self._is_waiting = False

    async def head(self) -> Position | None:
        """Return the largest key."""
        connection = await self._connected()
        try:
            largest: Position | None = await connection.fetchval(f"SELECT max({self._key}) FROM {self._from}")  # noqa: S608 - quoted
        finally:
            await connection.close()
        return largest

    async def arrivals(self, after: Position | None) -> AsyncIterator[Arrival]:
        """Yield the rows after a key, in pieces."""
        connection = await self._connected()
        try:
            while True:
                rows = await self._rows(connection, after)
                if rows:
                    after = rows[-1][self._name]
                    if type(after) not in (int, str):
                        raise InvalidInput(
                            f"the key {self._name!r}: expected integers or strings, got {type(after).__name__}"
                        )
                    yield Arrived([row[self._name] for row in rows], [{**row, "type": self._kind} for row in rows])
                elif self._is_waiting:
                    await asyncio.sleep(RECHECK_S)
                elif self._follow_s is None:
                    return
                else:
                    await asyncio.sleep(self._follow_s)
        finally:
            await connection.close()

    async def _rows(self, connection: Any, after: Position | None) -> list[Any]:
        import asyncpg

        where = "" if after is None else f"WHERE {self._key} > $1"
        is_old = "age(xmin) > age(pg_snapshot_xmin(pg_current_snapshot())::xid) AS headrace_is_old"
        sql = f"SELECT *, {is_old} FROM {self._from} {where} ORDER BY {self._key} LIMIT {PIECE_ROWS:d}"  # noqa: S608 - quoted
        try:
            rows = [dict(row) for row in await connection.fetch(sql, *([] if after is None else [after]))]
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise InvalidInput(f"the table {self._from} can't be read by {self._key}: {error}") from error
        settled = [row.pop("headrace_is_old") for row in rows]
        self._is_waiting = not all(settled)
        return rows[: settled.index(False)] if self._is_waiting else rows

    async def _connected(self) -> Any:
        import asyncpg

        try:
            return await asyncpg.connect(self._dsn)
        except (OSError, asyncpg.PostgresError) as error:
            raise StoreUnavailable(f"the database of the source can't be reached: {error}") from error


def _quoted(name: str) -> str:
    """Quote the name of a table or column for SQL, with quotes inside doubled. Never used for a value."""
    if not name or "\0" in name or len(name) > 63:
        raise InvalidInput(f"{name!r} is not a valid name of a table or column")
    return '"' + name.replace('"', '""') + '"'

"""Scripts in a caller's own transaction, on the caller's connection.

What they write is committed with the caller's rows, and rolled back with them. The driver is recognised by its module;
none is imported here. Supported are asyncpg, psycopg 3, the standard library's sqlite3, aiosqlite, and SQLAlchemy's
connections and sessions over any of them, async or not. A script runs behind a savepoint, so a script that has to be
repeated leaves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from headrace.foundation.errors import InvalidInput, StoreUnavailable
from headrace.store.transactions.sql_script import Query, Rows, Script, TransactionConflict

T = TypeVar("T")
Steps = Generator[Any, Any, T]
"""Steps on a connection: a generator that yields each result of the driver (an awaitable if it is async), and is sent
the outcome.
"""

TRIES: Final = 5
MISSING_TABLE: Final = ("42P01", "3F000")
"""SQLSTATEs of PostgreSQL: undefined_table, invalid_schema_name."""
_SAVEPOINT: Final = "SAVEPOINT headrace"
_ROLL_BACK: Final = "ROLLBACK TO SAVEPOINT headrace"
_RELEASE: Final = "RELEASE SAVEPOINT headrace"
_NUMBER: Final = re.compile(r"\$(\d+)")
_SUPPORTED: Final = "an asyncpg, psycopg 3, sqlite3, aiosqlite or SQLAlchemy connection, or a SQLAlchemy session"


class AnotherStore(InvalidInput):
    """The connection of a caller leads to another store than that of the app."""


class NumberedStatement(Protocol):
    """A statement whose values are written `$1`, `$2`, …"""

    @property
    def sql(self) -> str:
        """The text."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The names of its values, in the order of their numbers."""
        ...


class CallerTransaction:
    """The scripts of a store on a caller's connection.

    `is_sqlite`: the kind of database that the connection must lead to. `store_id`: the identity of the store that it
    must lead to.
    """

    def __init__(
        self, connection: Any, statement: Callable[[str], NumberedStatement], *, is_sqlite: bool, store_id: str
    ) -> None:
        self._connection = connection
        self._statement = statement
        self._is_sqlite = is_sqlite
        self._store_id = store_id
        self._execute: Callable[[str, Sequence[Any]], Any] = self._refuse

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in the open transaction. A connection that is not async is used directly on this loop."""
        steps = self._steps(script)
        try:
            answer = next(steps)
            while True:
                if isawaitable(answer):
                    try:
                        outcome = await answer
                    except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
                        answer = steps.throw(error)
                        continue
                else:
                    outcome = answer
                answer = steps.send(outcome)
        except StopIteration as done:
            result: T = done.value
            return result

    def run_sync(self, script: Callable[[], Script[T]]) -> T:
        """Run a script on a connection that is not async. Raises `InvalidInput` for an async connection."""
        steps = self._steps(script)
        try:
            answer = next(steps)
            while True:
                if isawaitable(answer):
                    if hasattr(answer, "close"):
                        answer.close()
                    raise InvalidInput(
                        "expected a connection that is not async, got an async one",
                        hint="await task.enqueue_in(connection, …)",
                    )
                answer = steps.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result

    def _steps(self, script: Callable[[], Script[T]]) -> Steps[T]:
        self._execute = yield from self._execute_function()
        for _ in range(TRIES):
            yield from self._bare(_SAVEPOINT)
            try:
                yield from self._check_store()
                answer = yield from self._answered(script())
            except TransactionConflict:
                yield from self._bare(_ROLL_BACK)
            except AnotherStore:
                yield from self._bare(_ROLL_BACK)
                raise
            except Exception as error:
                if not _is_missing_table(error):
                    raise
                yield from self._bare(_ROLL_BACK)
                raise InvalidInput(
                    f"the database of this connection has no Headrace tables: {str(error).splitlines()[0]}",
                    hint="give a connection to the database of the app's store, or run `headrace migrate` on this one",
                ) from error
            else:
                yield from self._bare(_RELEASE)
                return answer
        raise StoreUnavailable(
            f"concurrent transactions changed the same rows in each of {TRIES} attempts", hint="repeat the call"
        )

    def _answered(self, script: Script[T]) -> Steps[T]:
        try:
            ask = next(script)
            while True:
                ask = script.send((yield from self._rows(ask)))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def _rows(self, ask: Query) -> Steps[Rows]:
        """Send one statement, and return its rows."""
        numbered = self._statement(ask.name)
        values = [ask.values[name] for name in numbered.names]
        return [tuple(row) for row in (yield self._execute(numbered.sql, values))]

    def _check_store(self) -> Steps[None]:
        """Raise `AnotherStore` if the connection leads to another store than that of the app."""
        ((store_id,),) = yield from self._rows(Query("store_id", {}))
        self._check_id(store_id)

    def _check_id(self, store_id: str) -> None:
        if store_id != self._store_id:
            raise AnotherStore(
                f"expected a connection to the app's own store {self._store_id[:8]}, got one to another store, "
                f"{store_id[:8]}, where the app would never find the run",
                hint="give a connection to the database of the app's store",
            )

    def _bare(self, sql: str) -> Steps[Any]:
        return (yield self._execute(sql, ()))

    # -- drivers

    def _execute_function(self) -> Steps[Callable[[str, Sequence[Any]], Any]]:
        """Return a function that sends statements on this connection, after a check that a transaction is open."""
        connection = self._connection
        root = type(connection).__module__.partition(".")[0]
        names = {base.__name__ for base in type(connection).__mro__}
        if root == "sqlalchemy" or names & {"AsyncSession", "Session"}:
            return (yield from self._sqlalchemy(connection, names))
        if root == "asyncpg":
            self._check(is_sqlite=False, is_open=connection.is_in_transaction())
            return lambda sql, values: connection.fetch(sql, *values)
        if root == "psycopg":
            self._check(is_sqlite=False, is_open=not connection.autocommit or connection.info.transaction_status != 0)
            return lambda sql, values: _psycopg(connection, sql, values)
        if root == "sqlite3" or "sqlite3" in {base.__module__ for base in type(connection).__mro__}:
            self._check(is_sqlite=True, is_open=connection.in_transaction or connection.isolation_level is not None)
            if not connection.in_transaction:  # the driver would begin one only at the first change
                connection.execute("BEGIN")
            return lambda sql, values: connection.execute(*_questioned(sql, values)).fetchall()
        if root == "aiosqlite":
            self._check(is_sqlite=True, is_open=connection.in_transaction or connection.isolation_level is not None)
            if not connection.in_transaction:
                yield connection.execute("BEGIN")
            return lambda sql, values: connection.execute_fetchall(*_questioned(sql, values))
        raise InvalidInput(
            f"expected {_SUPPORTED}, got {type(connection)!r}",
            hint="enqueue_in puts a run into the transaction of that connection",
        )

    def _sqlalchemy(self, target: Any, names: set[str]) -> Steps[Callable[[str, Sequence[Any]], Any]]:
        """Return SQLAlchemy's connection of a session, or the connection itself. SQLAlchemy begins the transaction."""
        connection = (yield target.connection()) if names & {"AsyncSession", "Session"} else target
        if not hasattr(connection, "exec_driver_sql"):
            raise InvalidInput(
                f"expected {_SUPPORTED}, got {type(target)!r}",
                hint="enqueue_in puts a run into the transaction of that connection",
            )
        dialect = connection.dialect
        of_engine = getattr(dialect, "_on_connect_isolation_level", None)
        isolation = _sync(connection).get_execution_options().get("isolation_level", of_engine)
        self._check(is_sqlite=dialect.name == "sqlite", is_open=isolation != "AUTOCOMMIT")
        spell = _SPELLINGS.get(dialect.paramstyle)
        if spell is None:
            raise InvalidInput(
                f"SQLAlchemy's driver {dialect.driver} has the unsupported paramstyle {dialect.paramstyle}"
            )
        if dialect.name == "sqlite":  # pysqlite begins a transaction only at the first change, and not at a savepoint
            yield connection.exec_driver_sql("BEGIN") if not _has_begun(connection) else None

        def execute(sql: str, values: Sequence[Any]) -> Any:
            text, parameters = spell(sql, values)
            result = connection.exec_driver_sql(text, parameters or None)
            return _rows_later(result) if isawaitable(result) else _rows_of(result)

        return execute

    def _check(self, *, is_sqlite: bool, is_open: bool) -> None:
        if is_sqlite != self._is_sqlite:
            actual, expected = ("SQLite", "PostgreSQL") if is_sqlite else ("PostgreSQL", "SQLite")
            raise InvalidInput(
                f"expected a connection to {expected}, where the app's store is, got one to {actual}",
                hint="give a connection to the database of the app's store",
            )
        if not is_open:
            raise InvalidInput(
                "expected a connection with an open transaction, got one without",
                hint="begin a transaction first, or call task.enqueue(…), which commits by itself",
            )

    @staticmethod
    def _refuse(_sql: str, _values: Sequence[Any]) -> Any:
        raise AssertionError


@runtime_checkable
class JoinsTransactions(Protocol):
    """A store whose operations can be part of a caller's transaction."""

    def joined(self, connection: Any) -> CallerTransaction:
        """Return the store's scripts on a caller's connection. Raises `InvalidInput` for a connection to another
        database.
        """
        ...


def _is_missing_table(error: BaseException | None) -> bool:
    """True if a driver's error, or the one that it wraps, means that a table or schema does not exist."""
    while error is not None:
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if code in MISSING_TABLE or str(error).startswith("no such table"):
            return True
        error = getattr(error, "orig", None) or error.__cause__
    return False


def _psycopg(connection: Any, sql: str, values: Sequence[Any]) -> Any:
    """Execute on psycopg, whose cursor has the rows, if there are any."""
    text, parameters = _percent(sql, values)
    result = connection.execute(text, parameters or None)
    if not isawaitable(result):
        return result.fetchall() if result.description else []

    async def rows() -> Any:
        cursor = await result
        return await cursor.fetchall() if cursor.description else []

    return rows()


def _rows_of(result: Any) -> Any:
    return result.fetchall() if result.returns_rows else []


async def _rows_later(result: Awaitable[Any]) -> Any:
    return _rows_of(await result)


def _has_begun(connection: Any) -> bool:
    """True if the SQLite driver under a SQLAlchemy connection has begun a transaction."""
    return bool(_sync(connection).connection.driver_connection.in_transaction)


def _sync(connection: Any) -> Any:
    """Return the connection inside an async connection of SQLAlchemy."""
    return getattr(connection, "sync_connection", connection)


def _dollars(sql: str, values: Sequence[Any]) -> tuple[str, Any]:
    return sql, tuple(values)


def _percent(sql: str, values: Sequence[Any]) -> tuple[str, Mapping[str, Any]]:
    if not values:
        return sql, {}
    text = _NUMBER.sub(r"%(v\1)s", sql.replace("%", "%%"))
    return text, {f"v{number}": value for number, value in enumerate(values, 1)}


def _questioned(sql: str, values: Sequence[Any]) -> tuple[str, Any]:
    order = [int(number) - 1 for number in _NUMBER.findall(sql)]
    return _NUMBER.sub("?", sql), tuple(values[number] for number in order)


_SPELLINGS: Final[Mapping[str, Callable[[str, Sequence[Any]], tuple[str, Any]]]] = {
    "numeric_dollar": _dollars,
    "pyformat": _percent,
    "qmark": _questioned,
}
"""Conversion of statements to the parameter styles of SQLAlchemy's drivers."""

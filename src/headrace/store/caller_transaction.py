"""Scripts on a connection that somebody else owns, inside the transaction that is open there.

What is written commits with the caller's own rows, and is gone with them. A driver is told by its module, none is
imported here: asyncpg, psycopg 3, the standard library's sqlite3, aiosqlite, and SQLAlchemy's connections and sessions
over any of them, async or not. A script runs behind a savepoint, so one that has to be run again leaves nothing.
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
"""A conversation with a connection: yields what it answered (an awaitable, where it is async), is sent the outcome."""

TRIES: Final = 5
MISSING_TABLE: Final = ("42P01", "3F000")
"""SQLSTATEs of PostgreSQL: undefined_table, invalid_schema_name."""
_SAVEPOINT: Final = "SAVEPOINT headrace"
_ROLL_BACK: Final = "ROLLBACK TO SAVEPOINT headrace"
_RELEASE: Final = "RELEASE SAVEPOINT headrace"
_NUMBER: Final = re.compile(r"\$(\d+)")
_KNOWN: Final = "an asyncpg, psycopg 3, sqlite3, aiosqlite or SQLAlchemy connection, or a SQLAlchemy session"


class NumberedStatement(Protocol):
    """A statement whose values are written `$1`, `$2`, …, and their names in that order."""

    @property
    def sql(self) -> str:
        """The text."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The names of its values."""
        ...


class CallerTransaction:
    """A dialect's statements on somebody's connection. `is_sqlite` says which database it must lead to."""

    def __init__(self, connection: Any, statement: Callable[[str], NumberedStatement], *, is_sqlite: bool) -> None:
        self._connection = connection
        self._statement = statement
        self._is_sqlite = is_sqlite
        self._execute: Callable[[str, Sequence[Any]], Any] = self._refuse

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in the open transaction; a connection that is not async is used as it is, on this loop."""
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
            found: T = done.value
            return found

    def run_sync(self, script: Callable[[], Script[T]]) -> T:
        """Run a script on a connection that is not async. Raises `InvalidInput` when it is."""
        steps = self._steps(script)
        try:
            answer = next(steps)
            while True:
                if isawaitable(answer):
                    if hasattr(answer, "close"):
                        answer.close()
                    raise InvalidInput("this connection is async", hint="await task.enqueue_in(connection, …)")
                answer = steps.send(answer)
        except StopIteration as done:
            found: T = done.value
            return found

    def _steps(self, script: Callable[[], Script[T]]) -> Steps[T]:
        self._execute = yield from self._entered()
        for _ in range(TRIES):
            yield from self._bare(_SAVEPOINT)
            try:
                answer = yield from self._answered(script())
            except TransactionConflict:
                yield from self._bare(_ROLL_BACK)
            except Exception as error:
                if not _is_missing_table(error):
                    raise
                yield from self._bare(_ROLL_BACK)
                raise InvalidInput(
                    f"the database of this connection has no Headrace tables: {str(error).splitlines()[0]}",
                    hint="give a connection to the database that HEADRACE_STORE names, or run `headrace migrate` on "
                    "this one",
                ) from error
            else:
                yield from self._bare(_RELEASE)
                yield from self._told()
                return answer
        raise StoreUnavailable("other transactions were faster each time", hint="try again")

    def _answered(self, script: Script[T]) -> Steps[T]:
        try:
            ask = next(script)
            while True:
                ask = script.send((yield from self._rows(ask)))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def _rows(self, ask: Query) -> Steps[Rows]:
        """What the database answers to one statement."""
        numbered = self._statement(ask.name)
        values = [ask.values[name] for name in numbered.names]
        return [tuple(row) for row in (yield self._execute(numbered.sql, values))]

    def _told(self) -> Steps[None]:
        """Let whoever waits for work know with the commit, where a database can do that."""
        yield from ()

    def _bare(self, sql: str) -> Steps[Any]:
        return (yield self._execute(sql, ()))

    # -- drivers

    def _entered(self) -> Steps[Callable[[str, Sequence[Any]], Any]]:
        """How this connection is asked, once it is sure that a transaction is open on it."""
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
            if not connection.in_transaction:  # where the driver would begin one at the first change
                connection.execute("BEGIN")
            return lambda sql, values: connection.execute(*_questioned(sql, values)).fetchall()
        if root == "aiosqlite":
            self._check(is_sqlite=True, is_open=connection.in_transaction or connection.isolation_level is not None)
            if not connection.in_transaction:
                yield connection.execute("BEGIN")
            return lambda sql, values: connection.execute_fetchall(*_questioned(sql, values))
        raise InvalidInput(f"a run can't be put into the transaction of {type(connection)!r}", hint=f"give {_KNOWN}")

    def _sqlalchemy(self, given: Any, names: set[str]) -> Steps[Callable[[str, Sequence[Any]], Any]]:
        """A session's connection, or the connection itself; SQLAlchemy begins its transaction by itself."""
        connection = (yield given.connection()) if names & {"AsyncSession", "Session"} else given
        if not hasattr(connection, "exec_driver_sql"):
            raise InvalidInput(f"a run can't be put into {type(given)!r}", hint=f"give {_KNOWN}")
        dialect = connection.dialect
        of_engine = getattr(dialect, "_on_connect_isolation_level", None)
        isolation = _sync(connection).get_execution_options().get("isolation_level", of_engine)
        self._check(is_sqlite=dialect.name == "sqlite", is_open=isolation != "AUTOCOMMIT")
        spell = _SPELLINGS.get(dialect.paramstyle)
        if spell is None:
            raise InvalidInput(
                f"SQLAlchemy's driver {dialect.driver} writes values as {dialect.paramstyle}, unknown here"
            )
        if dialect.name == "sqlite":  # pysqlite begins a transaction at the first change only, and not at a savepoint
            yield connection.exec_driver_sql("BEGIN") if not _has_begun(connection) else None

        def execute(sql: str, values: Sequence[Any]) -> Any:
            text, parameters = spell(sql, values)
            asked = connection.exec_driver_sql(text, parameters or None)
            return _rows_later(asked) if isawaitable(asked) else _rows_of(asked)

        return execute

    def _check(self, *, is_sqlite: bool, is_open: bool) -> None:
        if is_sqlite != self._is_sqlite:
            there, here = ("SQLite", "PostgreSQL") if is_sqlite else ("PostgreSQL", "SQLite")
            raise InvalidInput(
                f"the connection leads to {there}, the app's store is on {here}",
                hint="give a connection to the database that HEADRACE_STORE names",
            )
        if not is_open:
            raise InvalidInput(
                "no transaction is open on this connection, so there is none to put the run into",
                hint="begin one first, or call task.enqueue(…), which has its own",
            )

    @staticmethod
    def _refuse(_sql: str, _values: Sequence[Any]) -> Any:
        raise AssertionError


@runtime_checkable
class JoinsTransactions(Protocol):
    """A store whose verbs may be part of somebody else's transaction."""

    def joined(self, connection: Any) -> CallerTransaction:
        """Its statements on a connection that somebody else owns. Raises `InvalidInput` for one of another database."""
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
    """psycopg asks by `execute`, whose cursor has the rows, where there are any."""
    text, parameters = _percent(sql, values)
    asked = connection.execute(text, parameters or None)
    if not isawaitable(asked):
        return asked.fetchall() if asked.description else []

    async def rows() -> Any:
        cursor = await asked
        return await cursor.fetchall() if cursor.description else []

    return rows()


def _rows_of(result: Any) -> Any:
    return result.fetchall() if result.returns_rows else []


async def _rows_later(asked: Awaitable[Any]) -> Any:
    return _rows_of(await asked)


def _has_begun(connection: Any) -> bool:
    """Whether the SQLite driver under a SQLAlchemy connection is within a transaction."""
    return bool(_sync(connection).connection.driver_connection.in_transaction)


def _sync(connection: Any) -> Any:
    """What is inside an async connection of SQLAlchemy."""
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
    return _NUMBER.sub("?", sql), tuple(values[place] for place in order)


_SPELLINGS: Final[Mapping[str, Callable[[str, Sequence[Any]], tuple[str, Any]]]] = {
    "numeric_dollar": _dollars,
    "pyformat": _percent,
    "qmark": _questioned,
}
"""How the drivers that SQLAlchemy knows write values."""

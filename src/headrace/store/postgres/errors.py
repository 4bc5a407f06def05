"""Translation of the driver's errors: try again later, or have a person change something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import asyncpg

from headrace.foundation.errors import HeadraceError, InvalidInput, StoreBroken, StoreUnavailable, StoreUnreachable
from headrace.store.transactions.sql_script import TransactionConflict

DRIVER: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""All errors that a connection raises."""
UNDONE: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
"""The server rolled the transaction back because of a concurrent one: it can be repeated at once."""
ANOTHER_SESSION: Final = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
"""Prepared statements are missing, or exist already: a pooler has changed the session behind the connection."""
STALE: Final = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)
"""A prepared statement is older than a change of the schema; it did nothing."""
LOST: Final = (
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
    asyncpg.ConnectionDoesNotExistError,
    ConnectionError,
)
"""The connection ended, or the driver has read its last words and waits for the end.

Not of these: `ConnectionRefusedError`, for which there was no connection.
"""
SCHEMA_CHANGED: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.DatatypeMismatchError,
    asyncpg.NotNullViolationError,
    asyncpg.CheckViolationError,
)
"""Errors of a statement of an older Headrace on a newer schema."""
MIGRATE_HINT: Final = (
    "run `headrace migrate` as the owner of the database; a worker's role then needs USAGE on the schema and its "
    "sequences, and SELECT, INSERT, UPDATE and DELETE on its tables"
)


class _Translation(NamedTuple):
    errors: tuple[type[BaseException], ...]
    error_type: type[HeadraceError]
    problem: str
    hint: str


_TRANSLATIONS: Final = (
    _Translation(
        (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError),
        StoreBroken,
        "refused the login",
        "check the user and the password in the store's URL, and the server's pg_hba.conf",
    ),
    _Translation(
        (asyncpg.InvalidCatalogNameError,),
        StoreBroken,
        "does not exist",
        "create the database, or name another in the store's URL",
    ),
    _Translation((asyncpg.InsufficientPrivilegeError,), StoreBroken, "refused a statement", MIGRATE_HINT),
    _Translation(
        (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError),
        StoreBroken,
        "does not have the tables that this version of Headrace expects",
        "run `headrace migrate`",
    ),
    _Translation(
        (asyncpg.TooManyConnectionsError,),
        StoreUnreachable,
        "has no connection left",
        "raise max_connections of the server, or use a connection pooler",
    ),
    _Translation(
        (asyncpg.DiskFullError,),
        StoreUnavailable,
        "has a full disk",
        "free disk space on the server; nothing that was acknowledged is lost",
    ),
    _Translation(
        (asyncpg.OutOfMemoryError, asyncpg.ConfigurationLimitExceededError),
        StoreUnavailable,
        "ran out of memory or of a configured limit",
        "check the server's memory and limits",
    ),
    _Translation(
        (asyncpg.ReadOnlySQLTransactionError,),
        StoreUnavailable,
        "refused a write: it is read-only",
        "name the primary server, not a replica",
    ),
    _Translation(
        (asyncpg.QueryCanceledError,),
        StoreUnavailable,
        "cancelled a statement",
        "nothing of it is durable; if this happens again, raise statement_timeout for this user",
    ),
    _Translation(
        (asyncpg.LockNotAvailableError,),
        StoreUnavailable,
        "did not get a lock: another transaction holds it",
        "pg_locks shows which transaction holds it",
    ),
    _Translation(
        (asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.CannotConnectNowError),
        StoreUnreachable,
        "is shutting down or starting up",
        "wait until the server is up",
    ),
    _Translation(
        (*UNDONE, TransactionConflict),
        StoreUnavailable,
        "rolled the transaction back several times because of concurrent ones",
        "nothing of it is durable; repeat the call",
    ),
    _Translation(
        (asyncpg.ProtocolViolationError, *ANOTHER_SESSION),
        StoreBroken,
        "does not answer like a PostgreSQL server",
        "behind a pooler add pooler=transaction to the URL, and parameters it refuses to its ignore_startup_parameters",
    ),
)
_NOT_TEXT: Final = (asyncpg.CharacterNotInRepertoireError, asyncpg.UntranslatableCharacterError)
"""A text holds NUL, which PostgreSQL can't store, or is outside the encoding of the database."""
_UNEXPECTED: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.SyntaxOrAccessError)


def changed_nothing(error: Exception) -> bool:
    """True for a transaction that was rolled back, and for a driver that refused to send.

    The driver does so when the backend of an idle connection was terminated and the end of the connection is still on
    its way.
    """
    return not isinstance(error, asyncpg.InternalClientError) or str(error).startswith("cannot switch to state")


RIGHTS_SHOWN: Final = 5
"""Missing rights that one message names."""


def store_error(error: BaseException, database: str) -> HeadraceError:
    """Translate a driver's error, which becomes its cause. `database` names the server, without a password."""
    text = str(error) or type(error).__name__
    translated: HeadraceError
    if isinstance(error, _NOT_TEXT):
        translated = InvalidInput(
            f"expected text that {database} can store, got a NUL character or another one that it refuses: {text}",
            hint="remove the character from the name, key, tag or filter",
        )
        translated.__cause__ = error
        return translated
    for translation in _TRANSLATIONS:
        if isinstance(error, translation.errors):
            translated = translation.error_type(f"{database} {translation.problem}: {text}", hint=translation.hint)
            break
    else:
        if isinstance(error, _UNEXPECTED):
            translated = StoreBroken(
                f"{database} failed with an unexpected error: {type(error).__name__}: {text}",
                hint="please report it, with the log of this process",
            )
        else:
            is_lost = isinstance(error, LOST) and not isinstance(error, ConnectionRefusedError)
            text = "the connection was lost" if is_lost else text
            translated = StoreUnreachable(
                f"{database} did not answer: {text}", hint="check that the server is running and reachable at that host"
            )
    translated.__cause__ = error
    return translated


def missing_rights_error(
    error: BaseException, database: str, schema: str, rows: Sequence[tuple[str, str, str]]
) -> HeadraceError:
    """Name the rights that a role lacks on a schema: `rows` are `(role, right, object)`, at least one."""
    role = rows[0][0]
    rights = ", ".join(f"{right} on {name}" for _, right, name in rows[:RIGHTS_SHOWN])
    more = f" and {len(rows) - RIGHTS_SHOWN} more" if len(rows) > RIGHTS_SHOWN else ""
    quoted_role, quoted = _quoted(role), _quoted(schema)
    translated = StoreBroken(
        f"{database} refused a statement: the role {role!r} lacks {rights}{more} (schema {schema!r})",
        hint=f"GRANT USAGE ON SCHEMA {quoted} TO {quoted_role}; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {quoted} TO {quoted_role}; "
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {quoted} TO {quoted_role};",
    )
    translated.__cause__ = error
    return translated


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'

"""What a driver's error means for the caller: try again later, or call a person."""

from __future__ import annotations

from typing import Final, NamedTuple

import asyncpg

from headrace.foundation.errors import HeadraceError, StoreBroken, StoreUnavailable

DRIVER: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""All that a connection raises."""
UNDONE: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
"""The server undid the transaction to keep it apart from others: it can be done again at once."""
ANOTHER_SESSION: Final = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)
"""Statements that were prepared are not there, or are there already: the session behind the connection is another."""
STALE: Final = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)
"""A prepared statement is older than a change of the schema, and did nothing."""
SCHEMA_CHANGED: Final = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.DatatypeMismatchError,
    asyncpg.NotNullViolationError,
    asyncpg.CheckViolationError,
)
"""What a statement of an older Headrace may come to on a newer schema."""


class _Meaning(NamedTuple):
    errors: tuple[type[BaseException], ...]
    fault: type[HeadraceError]
    said: str
    hint: str


_MEANINGS: Final = (
    _Meaning(
        (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError),
        StoreBroken,
        "the database does not let this user in",
        "check user and password",
    ),
    _Meaning(
        (asyncpg.InvalidCatalogNameError,), StoreBroken, "there is no such database", "create it, or name another"
    ),
    _Meaning(
        (asyncpg.InsufficientPrivilegeError,),
        StoreBroken,
        "the user may not do this",
        "grant it CREATE on the database, or make it owner of the schema",
    ),
    _Meaning(
        (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError),
        StoreBroken,
        "the schema is not Headrace's",
        "run `headrace migrate`",
    ),
    _Meaning(
        (asyncpg.TooManyConnectionsError,),
        StoreUnavailable,
        "the server has no connection left",
        "raise max_connections, or use a pooler",
    ),
    _Meaning(
        (asyncpg.DiskFullError,),
        StoreUnavailable,
        "the server's disk is full",
        "free disk space; nothing acknowledged was lost",
    ),
    _Meaning(
        (asyncpg.OutOfMemoryError, asyncpg.ConfigurationLimitExceededError),
        StoreUnavailable,
        "the server has no room for this",
        "it is tried again; look at the server's memory and limits",
    ),
    _Meaning(
        (asyncpg.ReadOnlySQLTransactionError,),
        StoreUnavailable,
        "the server only answers reads",
        "name the primary, not a replica",
    ),
    _Meaning(
        (asyncpg.QueryCanceledError,),
        StoreUnavailable,
        "the server ended a statement",
        "nothing of it is durable; raise statement_timeout for this user if it says so again",
    ),
    _Meaning(
        (asyncpg.LockNotAvailableError,),
        StoreUnavailable,
        "another transaction holds what this one needs",
        "it is tried again; pg_locks says who holds it",
    ),
    _Meaning(
        (asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.CannotConnectNowError),
        StoreUnavailable,
        "the server is going down or coming up",
        "it is tried again",
    ),
    _Meaning(
        UNDONE, StoreUnavailable, "other transactions came in the way, again and again", "nothing of it is durable"
    ),
    _Meaning(
        (asyncpg.ProtocolViolationError, *ANOTHER_SESSION),
        StoreBroken,
        "what answers at this address is not a whole server",
        "behind a pooler add pooler=transaction to the URL, and parameters it refuses to its ignore_startup_parameters",
    ),
)
_OURS: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.SyntaxOrAccessError)


def as_fault(error: BaseException) -> HeadraceError:
    """The driver's error in the words of the seam, with the error as its cause."""
    text = str(error) or type(error).__name__
    fault: HeadraceError
    for meaning in _MEANINGS:
        if isinstance(error, meaning.errors):
            fault = meaning.fault(f"{meaning.said}: {text}", hint=meaning.hint)
            break
    else:
        if isinstance(error, _OURS):
            fault = StoreBroken(f"the store met an error it does not know: {type(error).__name__}: {text}")
        else:
            fault = StoreUnavailable(
                f"the database did not answer: {text}", hint="it is tried again; is the server up?"
            )
    fault.__cause__ = error
    return fault

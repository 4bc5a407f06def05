"""What a database's URL says: where it is, and how Headrace is to use it."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from headrace.foundation.errors import InvalidSetting

POOLERS: Final = ("auto", "none", "transaction")
_SCHEMA: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
_YES: Final = {"true": True, "false": False}


class DatabaseAddress(NamedTuple):
    """One database. `dsn` is what the driver takes; the rest are Headrace's own words in the query.

    `pooler`: `transaction` when each transaction may meet another server connection, `none` when a connection is one,
    `auto` to find out on connecting. `is_read_only`: answers reads and refuses the rest, as a replica does.
    """

    dsn: str
    schema: str
    pooler: str
    is_read_only: bool

    @property
    def database(self) -> str:
        """Name the database for an error message: host, port and database, never the user or the password."""
        parts = urlsplit(self.dsn)
        query = dict(parse_qsl(parts.query))
        host = parts.hostname or query.get("host") or "localhost"
        if ":" in host:
            host = f"[{host}]"
        return (
            f"PostgreSQL at {host}:{parts.port or query.get('port') or 5432}{parts.path if parts.path != '/' else ''}"
        )


def address(url: str) -> DatabaseAddress:
    """The parts of `postgresql://…?schema=&pooler=&read_only=`. Raises `InvalidSetting`."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # a port that is no number is found out by asking
    except ValueError as error:
        raise InvalidSetting(
            f"this can't be the URL of a database: {error}", hint="postgresql://user:password@host:port/database"
        ) from error
    query = dict(parse_qsl(parts.query))
    schema = query.pop("schema", "headrace")
    if not _SCHEMA.match(schema):
        raise InvalidSetting(
            f"{schema!r} can't name a schema", hint="lower-case letters, digits and underscores, at most 63"
        )
    pooler = query.pop("pooler", "auto")
    if pooler not in POOLERS:
        raise InvalidSetting(f"pooler must be one of {', '.join(POOLERS)}, not {pooler!r}")
    read_only = query.pop("read_only", "false")
    if read_only not in _YES:
        raise InvalidSetting(f"read_only must be true or false, not {read_only!r}")
    return DatabaseAddress(
        dsn=urlunsplit(parts._replace(query=urlencode(query))),
        schema=schema,
        pooler=pooler,
        is_read_only=_YES[read_only],
    )

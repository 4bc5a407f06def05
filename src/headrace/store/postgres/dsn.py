"""The URL of a database: where it is, and how Headrace uses it."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from headrace.foundation.errors import InvalidSetting

POOLERS: Final = ("auto", "none", "transaction")
_SCHEMA: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")
_YES: Final = {"true": True, "false": False}


class DatabaseAddress(NamedTuple):
    """One database. `dsn` is passed to the driver; the other fields are Headrace's own options in the URL.

    `pooler`: `transaction` if each transaction may use another server connection, `none` if a connection is always the
    same, `auto` to find out when connecting. `is_read_only`: only reads are allowed, as on a replica.
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
    """Parse `postgresql://…?schema=&pooler=&read_only=`. Raises `InvalidSetting`."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # the port is parsed when it is read
    except ValueError as error:
        raise InvalidSetting(
            f"expected the URL of a database, got one that can't be parsed: {error}",
            hint="postgresql://user:password@host:port/database",
        ) from error
    query = dict(parse_qsl(parts.query))
    schema = query.pop("schema", "headrace")
    if not _SCHEMA.match(schema):
        raise InvalidSetting(
            f"expected the name of a schema in the URL, got schema={schema!r}",
            hint="write lower-case letters, digits and underscores, at most 63",
        )
    pooler = query.pop("pooler", "auto")
    if pooler not in POOLERS:
        raise InvalidSetting(f"expected pooler={'|'.join(POOLERS)} in the URL, got pooler={pooler!r}")
    read_only = query.pop("read_only", "false")
    if read_only not in _YES:
        raise InvalidSetting(f"expected read_only=true|false in the URL, got read_only={read_only!r}")
    return DatabaseAddress(
        dsn=urlunsplit(parts._replace(query=urlencode(query))),
        schema=schema,
        pooler=pooler,
        is_read_only=_YES[read_only],
    )

"""API keys, signing keys, and token buckets of rate limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from headrace.core import admission
from headrace.core.admission import Bucket, Spent
from headrace.foundation.errors import Conflict, NotFound
from headrace.store.protocol import ApiKey
from headrace.store.transactions.row_mapping import as_json
from headrace.store.transactions.sql_script import Script, fetch, fetch_first, fetch_one


def add_key(key: ApiKey, now_us: int) -> Script[None]:
    """Insert an API key."""
    added = yield from fetch(
        "insert_api_key",
        id=key.id,
        environment=key.environment,
        digest=key.digest,
        scopes=as_json(list(key.scopes)),
        name=key.name,
        created_us=now_us,
    )
    if not added:
        raise Conflict("an API key with this id or digest exists already", key_id=key.id)


def find_key(digest: str) -> Script[ApiKey | None]:
    """Return the API key with a digest."""
    row = yield from fetch_one("api_key_by_digest", digest=digest)
    return None if row is None else _to_key(row)


def has_keys() -> Script[bool]:
    """True if an API key was ever created, in any environment."""
    return (yield from fetch_one("any_api_key")) is not None


def keys(environment: str) -> Script[list[ApiKey]]:
    """List the API keys of an environment."""
    return [_to_key(row) for row in (yield from fetch("api_keys", environment=environment))]


def revoke_key(environment: str, key_id: str, now_us: int) -> Script[bool]:
    """Revoke an API key, once."""
    if (yield from fetch("revoke_api_key", environment=environment, id=key_id, now_us=now_us)):
        return True
    if all(key.id != key_id for key in (yield from keys(environment))):
        raise NotFound(
            f"no API key has the id {key_id!r}",
            hint="`headrace key list` shows the keys of an environment",
            key_id=key_id,
        )
    return False


def find_signing_key(environment: str) -> Script[bytes | None]:
    """Return the signing key, if there is one."""
    row = yield from fetch_one("signing_key", environment=environment)
    return None if row is None else bytes(row[0])


def signing_key(environment: str, offered: bytes) -> Script[bytes]:
    """Return the signing key; the first one that was offered is kept."""
    yield from fetch("offer_signing_key", environment=environment, value=offered)
    (value,) = yield from fetch_first("signing_key", environment=environment)
    return bytes(value)


def spend(environment: str, name: str, bucket: Bucket, cost: int, now_us: int) -> Script[Spent]:
    """Take tokens from a bucket, under its lock."""
    yield from fetch("know_bucket", environment=environment, name=name)
    (full_us,) = yield from fetch_first("lock_bucket", environment=environment, name=name)
    spent = admission.spend(bucket, cost, full_us=int(full_us), now_us=now_us)
    if spent.is_granted:
        yield from fetch("put_bucket", environment=environment, name=name, full_us=spent.full_us)
    return spent


class ApiKeyRow(NamedTuple):
    """A row of the fragment `api_key_columns`. `scopes` is a JSON array."""

    id: str
    environment: str
    digest: str
    scopes: str
    name: str
    created_us: int
    revoked_us: int


def _to_key(columns: Sequence[Any]) -> ApiKey:
    row = ApiKeyRow._make(columns)
    return ApiKey(
        id=row.id,
        environment=row.environment,
        digest=row.digest,
        scopes=msgspec.json.decode(row.scopes, type=tuple[str, ...]),
        name=row.name,
        created_us=row.created_us,
        revoked_us=row.revoked_us,
    )

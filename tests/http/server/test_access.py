"""Requests without a key: every route refuses or answers them without writing anything."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from headrace.http.requests.service import Service
from headrace.http.server.app import endpoints_of
from tests.support.http_server import ServerUnderTest, running_server

OPEN: Final = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"}
"""Routes that answer without a key."""
VALUES: Final = {
    "batch_id": "batch_0000000000000000000000000a",
    "run_id": "run_0000000000000000000000000a_0",
    "session_id": "session_0000000000000000000000000a",
    "task": "task",
    "verb": "create_batch",
    "environment": b"stranger".hex(),
    "path": "a",
    "key": "default/batch_0000000000000000000000000a/" + "0" * 64,
}
CREDENTIALS: Final = {
    "no key": {},
    "an unknown key": {"authorization": "Bearer hr_unknown_unknown_unknown"},
    "a forged token": {"authorization": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzdHJhbmdlciJ9.AAAA"},
}


def changes_of(folder: Path) -> list[tuple[str, int]]:
    """Return the number of rows of each table."""
    with closing(sqlite3.connect(folder / "headrace.db")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        return [(table, db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in tables]


def target_of(path: str) -> str:
    """Fill in the parameters of a route."""
    return re.sub(r"{(\w+)(?::path)?}", lambda match: VALUES[match[1]], path)


async def statuses_of(server: ServerUnderTest, service: Service, headers: dict[str, str]) -> dict[str, int]:
    """Send a request to every route, and return its status."""
    statuses = {}
    for endpoint in endpoints_of(service):
        target = target_of(endpoint.path)
        if endpoint.path.startswith("/api/packets"):
            target += "?until=9999999999&signature=00"
        body = b"{}" if endpoint.method in ("POST", "PUT") else None
        answer = await server.ask(endpoint.method, target, body, headers, auth=False)
        statuses[f"{endpoint.method} {endpoint.path}"] = answer.status
    return statuses


@pytest.mark.parametrize("credential", CREDENTIALS)
async def test_no_route_accepts_or_writes_anything_without_a_valid_key(credential: str, tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        before = changes_of(tmp_path)
        statuses = await statuses_of(server, server.service, CREDENTIALS[credential])
        refused = {route: status for route, status in statuses.items() if route.split()[1] not in OPEN}
        assert set(refused.values()) <= {401, 403}, refused
        assert {status for route, status in statuses.items() if route.split()[1] in OPEN} == {200}
        assert changes_of(tmp_path) == before


async def test_a_signature_for_an_unknown_environment_leaves_nothing(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        before = changes_of(tmp_path)
        for number in range(50):
            name = f"stranger {number}".encode().hex()
            answer = await server.ask("GET", f"/api/packets/{name}/a?until=9999999999&signature=00", auth=False)
            assert answer.status == 403
        assert changes_of(tmp_path) == before
        assert len(server.service.authenticator._signing_keys) == 0

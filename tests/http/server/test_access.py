"""Access declarations of the routes: no key, a foreign key, a narrow key, a body over the bound."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.access import Access
from headrace.foundation.limits import DEFAULT
from headrace.http.requests.auth import KEY_PREFIX, SCOPES, new_key
from headrace.http.requests.request_body import read_body
from headrace.http.requests.service import Service
from headrace.http.server.app import ABOUT, ApiEndpoint, ResponseEnvelope, endpoints_of, make_app
from headrace.http.server.server import serving
from headrace.http.v1.store_rpc import OPERATION_ACCESS
from tests.support.http_server import HttpPeer, ServerUnderTest, running_server

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


def target_of(path: str, values: Mapping[str, str] = VALUES) -> str:
    """Fill in the parameters of a route."""
    return re.sub(r"{(\w+)(?::path)?}", lambda match: values[match[1]], path)


def declarations(service: Service) -> dict[str, Access]:
    """Return the access declaration of every route and method of the application."""
    app: Any = make_app(service)
    assert isinstance(app, ResponseEnvelope)
    starlette: Any = app._app
    paths = {endpoint.path for endpoint in endpoints_of(service)}
    assert {route.path for route in starlette.routes} == paths, "a route is registered without a declaration"
    return {f"{endpoint.method} {endpoint.path}": endpoint.access for endpoint in endpoints_of(service)}


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
        server.service.is_on_loopback = False
        before = changes_of(tmp_path)
        statuses = await statuses_of(server, server.service, CREDENTIALS[credential])
        open_routes = {route for route, access in declarations(server.service).items() if access.is_open}
        refused = {route: status for route, status in statuses.items() if route not in open_routes}
        assert set(refused.values()) <= {401, 403}, refused
        assert {statuses[route] for route in open_routes} == {200}
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


async def key_with(server: ServerUnderTest, *scopes: str, environment: str = "default") -> dict[str, str]:
    """Create a key, and return the header that carries it."""
    secret, stored = new_key(environment, scopes, "", server.engine.clock.now_us())
    await server.engine.administration.add_key(stored, now_us=1)
    return {"authorization": f"Bearer {secret}"}


def targets_of(service: Service) -> list[tuple[str, str, Access]]:
    """Return method, target and access of every route, and of every operation of the store's route."""
    targets = []
    for endpoint in endpoints_of(service):
        if "{verb}" in endpoint.path:
            targets += [("POST", f"/v1/store/{name}", access) for name, access in OPERATION_ACCESS.items()]
        else:
            targets.append((endpoint.method, target_of(endpoint.path), endpoint.access))
    return targets


async def test_every_route_refuses_a_key_without_its_scopes(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        server.service.is_on_loopback = False
        for method, target, access in targets_of(server.service):
            assert set(access.scopes) <= set(SCOPES), target
            if not access.scopes:
                continue
            narrow = await key_with(server, *(scope for scope in SCOPES if scope not in ("*", *access.scopes)))
            before = changes_of(tmp_path)
            answer = await server.ask(method, target, b"{}", narrow, auth=False)
            assert (answer.status, target) == (403, target), answer
            assert changes_of(tmp_path) == before, target


async def test_every_route_with_a_foreign_key_sees_nothing_of_this_environment(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        server.service.is_on_loopback = False
        marker = "a-payload-of-the-default-environment"
        batch_id = await server.filled(1, payload=marker)
        foreign = await key_with(server, "*", environment="elsewhere")
        names = VALUES | {"batch_id": batch_id, "run_id": f"run_{batch_id.removeprefix('batch_')}_0"}
        for endpoint in endpoints_of(server.service):
            if endpoint.access.is_open or endpoint.path.endswith("/events"):
                continue
            target = target_of(endpoint.path, names)
            answer = await server.ask(endpoint.method, target, b"{}", foreign, auth=False)
            assert marker not in answer.body.decode(), target
            assert batch_id not in answer.body.decode() or answer.status in (403, 404, 415, 422), answer
            if endpoint.access.is_of_server:
                assert answer.status == 403, target
        assert (await server.ask("GET", f"/v1/batches/{batch_id}")).json["waiting"] == 1


async def test_every_route_refuses_a_body_over_its_bound_before_it_is_sent(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        server.service.is_on_loopback = False
        key = await key_with(server, "*")
        for method, target, access in targets_of(server.service):
            if access.body_bytes_max is None or access.credential == "signed_url":
                continue
            length = {"content-length": str(access.body_bytes_max + 1)}
            if access.scopes:
                peer = server.peer()
                await peer.head(method, target, length)
                assert (await peer.answer(method)).status == 401, target
            peer = server.peer()
            await peer.head(method, target, {**key, **length})
            assert (await peer.answer(method)).status == 413, target


async def test_a_handler_that_admits_no_client_gets_no_body_and_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def careless(request: Request) -> Response:
        if request.query_params.get("reads"):
            await read_body(request, DEFAULT)
        return Response("a secret")

    endpoint = ApiEndpoint("POST", "/careless", careless, ABOUT)
    monkeypatch.setattr("headrace.http.server.app.endpoints_of", lambda _service: [endpoint])
    async with running_server(tmp_path) as server:
        for target in ("/careless", "/careless?reads=1"):
            answer = await server.ask("POST", target, b"{}")
            assert answer.status >= 500
            assert b"secret" not in answer.body


def test_an_endpoint_without_a_declaration_can_not_be_made() -> None:
    with pytest.raises(TypeError, match="access"):
        ApiEndpoint("GET", "/x", None)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"credential": "key"},
        {"credential": "none", "scopes": ("work",)},
        {"credential": "none", "body_bytes_max": 2},
        {"credential": "key", "scopes": ("work",), "unauthenticated_bytes_max": 9},
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Access(**{"body_bytes_max": 1, **fields})


# -- /metrics


async def test_metrics_are_open_on_a_loopback_address_only(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        assert (await server.ask("GET", "/metrics", auth=False)).status == 200
        for header in ("x-forwarded-for", "forwarded", "x-real-ip"):
            assert (await server.ask("GET", "/metrics", None, {header: "192.0.2.1"}, auth=False)).status == 401
        narrow, right = await key_with(server, "work"), await key_with(server, "metrics:read")
        foreign = await key_with(server, "*", environment="elsewhere")
        server.service.is_on_loopback = False
        wrong = {"authorization": f"Bearer {KEY_PREFIX}x"}
        statuses = [
            (await server.ask("GET", "/metrics", None, headers, auth=False)).status
            for headers in ({}, wrong, narrow, foreign, right)
        ]
        assert statuses == [401, 401, 403, 403, 200]


async def test_a_server_knows_from_its_socket_that_it_listens_on_all_addresses(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        before = server.service.is_on_loopback
        async with serving(server.service, "0.0.0.0", 0) as public:
            assert (before, server.service.is_on_loopback) == (True, False)
            peer = HttpPeer("127.0.0.1", public.address[1])
            assert (await peer.ask("GET", "/metrics", auth=False)).status == 401
            assert (await peer.ask("GET", "/healthz", auth=False)).status == 200
            await peer.close()


async def test_behind_a_proxy_with_tls_an_upload_goes_to_an_https_url(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        for headers, scheme in (({}, "http"), ({"x-forwarded-proto": "https"}, "https")):
            answer = await server.ask("PUT", "/api/v2/packets/a.json", None, headers)
            assert answer.json["presignedUrl"].startswith(f"{scheme}://test/")

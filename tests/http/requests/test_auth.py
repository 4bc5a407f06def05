"""Authentication, scopes, environments and rate limits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from headrace.foundation.errors import InvalidInput
from headrace.http.requests import auth
from headrace.http.requests.auth import new_key
from tests.support.http_server import KEY, LIMITS, NDJSON, ServerUnderTest, line, running_server

BATCH = {"runCount": 1}


def bearer(credential: str) -> dict[str, str]:
    return {"authorization": f"Bearer {credential}"}


async def key_for(server: ServerUnderTest, *scopes: str, environment: str = "default") -> dict[str, str]:
    secret, stored = new_key(environment, scopes, "", server.engine.clock.now_us())
    await server.engine.administration.add_key(stored, now_us=1)
    return bearer(secret)


async def ask(server: ServerUnderTest, method: str, path: str, headers: dict[str, str], body: Any = None) -> Any:
    return await server.ask(method, path, body, headers, auth=False)


async def test_missing_and_invalid_credentials_are_answered_in_trigger_dev_s_formats(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        missing = await ask(server, "POST", "/api/v3/batches", {}, BATCH)
        assert (missing.status, missing.headers["content-type"]) == (401, "application/problem+json")
        assert set(missing.json) == {"title", "status", "type", "detail", "error"}
        for header in ("Bearer nonsense", "Basic abc", "Bearer", "Bearer " + "x" * 10_000, "Bearer a.b.c"):
            bad = await ask(server, "POST", "/api/v3/batches", {"authorization": header}, BATCH)
            assert (bad.status, bad.json["error"]) == (401, "Invalid API Key"), header
        problem = await ask(server, "GET", "/v1/batches", bearer("nonsense"))
        assert (problem.status, problem.json["code"]) == (401, "UNAUTHORIZED")
        assert KEY not in problem.body.decode()


async def test_a_key_allows_exactly_its_scopes(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        batch_id = await server.filled(1)
        requests: dict[str, tuple[str, str, Any]] = {
            "batches:write": ("POST", "/v1/batches", {}),
            "batches:read": ("GET", f"/v1/batches/{batch_id}", None),
            "runs:read": ("GET", "/api/v1/runs", None),
            "runs:write": ("POST", f"/api/v2/runs/run_{batch_id.removeprefix('batch_')}_0/cancel", None),
            "work": ("POST", "/v1/sessions", {}),
        }
        for key_scope in requests:
            headers = await key_for(server, key_scope)
            for scope, (method, path, body) in requests.items():
                answer = await ask(server, method, path, headers, body)
                assert (answer.status < 300) is (scope == key_scope), (key_scope, scope, answer)
                if scope != key_scope:
                    assert answer.status == 403
        forbidden = await ask(server, "POST", "/api/v3/batches", await key_for(server, "runs:read"), BATCH)
        assert forbidden.json == {
            "error": "Unauthorized",
            "code": "unauthorized",
            "param": "access_token",
            "type": "authorization",
        }


@pytest.mark.parametrize("scopes", [(), ("everything",), ("batches:write", "")])
def test_an_unknown_scope_is_refused(scopes: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput):
        new_key("default", scopes, "", 1)


async def test_only_a_key_s_digest_is_stored_and_a_revoked_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "KEY_CACHE_S", 0)
    async with running_server(tmp_path, "sqlite") as server:
        secret, stored = new_key("default", ("*",), "ci", server.engine.clock.now_us())
        await server.engine.administration.add_key(stored, now_us=1)
        assert secret.startswith("tr_")
        assert (await ask(server, "GET", "/v1/batches", bearer(secret))).status == 200
        await server.engine.administration.revoke_key("default", stored.id, now_us=2)
        assert (await ask(server, "GET", "/v1/batches", bearer(secret))).status == 401
        files = b"".join(path.read_bytes() for path in tmp_path.glob("headrace.db*"))
        assert secret.encode() not in files
        assert stored.digest.encode() in files


async def test_batches_and_runs_of_another_environment_are_not_found(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.filled(1)
        headers = await key_for(server, "*", environment="elsewhere")
        run_id = f"run_{batch_id.removeprefix('batch_')}_0"
        for method, path in (
            ("GET", f"/api/v2/batches/{batch_id}"),
            ("GET", f"/api/v1/batches/{batch_id}/results"),
            ("GET", f"/api/v3/runs/{run_id}"),
            ("POST", f"/api/v2/runs/{run_id}/cancel"),
            ("POST", f"/api/v1/runs/{run_id}/replay"),
            ("GET", f"/v1/batches/{batch_id}"),
            ("GET", f"/v1/batches/{batch_id}/missing"),
            ("GET", f"/v1/batches/{batch_id}/results"),
            ("GET", f"/v1/batches/{batch_id}/events"),
            ("POST", f"/v1/batches/{batch_id}/seal"),
            ("POST", f"/v1/batches/{batch_id}/cancel"),
            ("POST", f"/v1/batches/{batch_id}/redrive"),
            ("GET", f"/v1/runs/{run_id}"),
        ):
            assert (await ask(server, method, path, headers)).status == 404, path
        streamed = await ask(server, "POST", f"/api/v3/batches/{batch_id}/items", {**headers, **NDJSON}, [line(0)])
        assert (streamed.status, streamed.json["error"]) == (422, f"Batch {batch_id} not found")
        assert (await ask(server, "GET", "/api/v1/runs", headers)).json["data"] == []
        assert (await ask(server, "GET", "/v1/batches", headers)).json["batches"] == []


async def test_a_batch_s_token_reads_that_batch_and_no_other(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        created = await server.ask("POST", "/api/v3/batches", BATCH)
        batch_id, other = created.json["id"], await server.create(1)
        token = bearer(created.headers["x-trigger-jwt"])
        assert (await ask(server, "GET", f"/api/v2/batches/{batch_id}", token)).status == 200
        assert (await ask(server, "GET", f"/api/v1/runs?filter[batch]={batch_id}", token)).status == 200
        assert (await ask(server, "GET", f"/api/v2/batches/{other}", token)).status == 403
        assert (await ask(server, "GET", "/api/v1/runs", token)).status == 403
        path = f"/api/v3/batches/{batch_id}/items"
        assert (await ask(server, "POST", path, {**token, **NDJSON}, [line(0)])).status == 403
        browser = await server.ask("POST", "/api/v3/batches", BATCH, {"x-trigger-client": "browser"})
        token = bearer(browser.headers["x-trigger-jwt"])
        path = f"/api/v3/batches/{browser.json['id']}/items"
        assert (await ask(server, "POST", path, {**token, **NDJSON}, [line(0)])).json["sealed"]


@pytest.mark.parametrize("tasks", [["a"], ["a", "b"]])
async def test_a_batch_s_token_sends_only_the_tasks_that_the_batch_was_created_for(
    tasks: list[str], tmp_path: Path
) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        body = {"runCount": 2, "taskIdentifiers": tasks, "idempotencyKey": "k"}
        for _ in range(2):  # the second one finds the batch
            created = await server.ask("POST", "/api/v3/batches", body, {"x-trigger-client": "browser"})
        token, path = bearer(created.headers["x-trigger-jwt"]), f"/api/v3/batches/{created.json['id']}/items"
        for items in (
            [line(0, task="c")],
            [line(0, task=tasks[0]), line(1, task="c")],
            [line(0, task=tasks[0]), line(1, task="c", tags="x")],
        ):
            refused = await ask(server, "POST", path, {**token, **NDJSON}, items)
            assert refused.status == 403, refused
        ledger = (await server.engine.store.batch(created.json["id"]))[1]
        sent = await ask(server, "POST", path, {**token, **NDJSON}, [line(0, task=tasks[0]), line(1, task=tasks[-1])])
        assert sent.json["sealed"], (sent, ledger)


async def test_forged_expired_and_foreign_tokens_are_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        created = await server.ask("POST", "/api/v3/batches", BATCH)
        batch_id, good = created.json["id"], created.headers["x-trigger-jwt"]
        claims = jwt.decode(good, options={"verify_signature": False})
        key = await server.service.authenticator.signing_key("default")
        now_s = int(time.time())
        bad = [
            jwt.encode(claims, "another key that is long enough for it", algorithm="HS256"),
            jwt.encode({**claims, "exp": now_s - 1}, key, algorithm="HS256"),
            jwt.encode({**claims, "sub": "elsewhere"}, key, algorithm="HS256"),
            jwt.encode({**claims, "aud": "https://else"}, key, algorithm="HS256"),
            jwt.encode({name: claims[name] for name in claims if name != "exp"}, key, algorithm="HS256"),
            jwt.encode({**claims, "pub": False}, key, algorithm="HS256"),
            jwt.encode(claims, "", algorithm="none"),
            jwt.encode({**claims, "exp": 10**30}, key + b"x", algorithm="HS256"),
            good[:-2] + ("AA" if good[-2:] != "AA" else "BB"),
            good.rpartition(".")[0] + ".",
        ]
        for token in bad:
            assert (await ask(server, "GET", f"/api/v2/batches/{batch_id}", bearer(token))).status == 401, token
        assert (await ask(server, "GET", f"/api/v2/batches/{batch_id}", bearer(good))).status == 200


async def test_an_open_server_accepts_any_client(tmp_path: Path) -> None:
    async with running_server(tmp_path, is_open=True) as server:
        assert (await ask(server, "POST", "/v1/batches", {}, {})).status == 201
        assert (await ask(server, "POST", "/v1/batches", bearer("whatever"), {})).status == 201


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example", "content-type": "text/plain"}, 403),
        ({"origin": "https://evil.example", "content-type": "application/json"}, 403),
        ({"origin": "http://127.0.0.1:1", "content-type": "application/json"}, 403),
        ({"origin": "null", "content-type": "application/json"}, 403),
        ({"origin": "https://test", "content-type": "application/json"}, 403),
        ({"origin": "http://test", "content-type": "text/plain;charset=UTF-8"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({}, 415),
        ({"origin": "http://test", "content-type": "application/json"}, 201),
        ({"content-type": "application/json"}, 201),
        ({"content-type": "application/json; charset=utf-8"}, 201),
    ],
)
async def test_an_open_server_refuses_what_a_page_of_another_site_can_send(
    headers: dict[str, str], status: int, tmp_path: Path
) -> None:
    async with running_server(tmp_path, is_open=True) as server:
        for path, body in (("/v1/batches", b"{}"), ("/v1/tasks/task/runs", b'{"payload":{}}')):
            answer = await ask(server, "POST", path, headers, body)
            assert (answer.status, path) == (status, path), answer
        if status == 403:
            for method, path in (("POST", "/v1/batches"), ("GET", "/v1/batches")):
                assert (await ask(server, method, path, headers)).status == 403
        stored = await server.engine.store.batches("default")
        assert bool(stored) is (status == 201)
        keyed = await server.ask("POST", "/v1/batches", b"{}", {**headers, "content-type": "application/json"})
        assert keyed.status == 201, "a key is proof enough"


async def test_requests_are_limited_by_environment_with_rate_limit_headers(tmp_path: Path) -> None:
    limits = LIMITS.replaced(requests_per_minute_max=1, requests_burst_max=3)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        answers = [await server.ask("GET", "/api/v1/runs") for _ in range(4)]
        assert [answer.status for answer in answers] == [200, 200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
        refused = answers[3]
        assert refused.headers["x-ratelimit-limit"] == "3"
        assert int(refused.headers["x-ratelimit-reset"]) > 1_600_000_000_000, (
            "milliseconds, as trigger.dev's clients read it"
        )
        assert int(refused.headers["retry-after"]) >= 1
        assert set(refused.json) >= {"title", "status", "type", "detail", "reset", "limit", "remaining", "error"}
        other = await key_for(server, "*", environment="elsewhere")
        assert (await ask(server, "GET", "/api/v1/runs", other)).status == 200
        worker = await key_for(server, "work")
        for _ in range(5):
            assert (await ask(server, "POST", "/v1/sessions", worker, {})).status == 201, (
                "workers are exempt from rate limits"
            )
        assert (await ask(server, "GET", "/healthz", {})).status == 200


async def test_announced_runs_are_limited_and_a_repeated_create_costs_nothing(tmp_path: Path) -> None:
    limits = LIMITS.replaced(batch_runs_per_minute_max=60, batch_runs_burst_max=10)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        for _ in range(3):
            assert (await server.ask("POST", "/api/v3/batches", {"runCount": 8, "idempotencyKey": "k"})).status in (
                200,
                202,
            )
        refused = await server.ask("POST", "/api/v3/batches", {"runCount": 8})
        assert refused.status == 429
        assert "Batch rate limit exceeded" in refused.json["error"]
        assert (await server.ask("POST", "/api/v3/batches", {"runCount": 2})).status == 202


async def test_the_first_streams_of_a_batch_are_exempt_from_the_request_limit(tmp_path: Path) -> None:
    limits = LIMITS.replaced(requests_per_minute_max=1, requests_burst_max=1, stream_grants_max=3)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        batch_id = await server.create(9)
        statuses = [(await server.stream(batch_id, [line(index)])).status for index in range(4)]
        assert statuses == [200, 200, 200, 429]
        unknown = await server.stream("batch_00000000000000000000000000", [line(0)])
        assert unknown.status == 429, "a batch that does not exist has no exemption"

"""The OpenAPI document describes what the endpoints decode and return: its schemas are those of their structs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.foundation.ids import run_id
from headrace.http.requests.auth import new_key
from headrace.http.requests.error_responses import Problem
from headrace.http.server.app import endpoints_of
from headrace.http.v1 import batches as v1_batches
from headrace.http.v1 import worker_sessions
from headrace.store.rpc import ServerInfo
from headrace.views import BatchView, RunView
from tests.support.http_server import KEY, NDJSON, ServerUnderTest, line, running_server


async def test_every_documented_struct_is_a_schema_of_the_document(tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        document = (await server.ask("GET", "/openapi.json", auth=False)).json
        schemas = document["components"]["schemas"]
        for endpoint in endpoints_of(server.service):
            for struct in (endpoint.body, endpoint.response):
                if struct is not None:
                    assert set(schemas[struct.__name__]["properties"]) == set(struct.__struct_encode_fields__)
    assert schemas["TriggerBatchBody"]["required"] == ["runCount"]
    assert "Problem" in schemas
    references = {part.partition('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= schemas.keys()


async def test_the_document_names_the_scopes_and_bounds_that_the_routes_declare(tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        paths = (await server.ask("GET", "/openapi.json", auth=False)).json["paths"]
        for endpoint in endpoints_of(server.service):
            if not endpoint.tag:
                continue
            operation, access = paths[endpoint.path.replace(":path}", "}")][endpoint.method.lower()], endpoint.access
            scopes = [scope for alternative in operation["security"] for scope in alternative.get("key", ())]
            assert scopes == list(access.scopes)
            assert ({} in operation["security"]) is (access.credential == "key_off_loopback")
            assert operation.get("x-body-bytes-max") == access.body_bytes_max


async def returned(server: ServerUnderTest, method: str, path: str, kind: Any, body: Any = None) -> Any:
    """The response of an endpoint, decoded as the struct that documents it. It must have no other fields."""
    answer = await server.ask(method, path, body)
    assert answer.status < 300, answer
    value: Any = msgspec.convert(answer.json, kind)
    assert msgspec.to_builtins(value).keys() == answer.json.keys()
    return value


async def test_responses_are_the_structs_that_document_them(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch = await returned(server, "POST", "/v1/batches", BatchView, {"task": "task"})
        path = f"/v1/batches/{batch.id}"
        answer = await server.ask("POST", f"{path}/items", line(0) + line(2), NDJSON)
        assert msgspec.convert(answer.json, v1_batches.ItemsResponse).accepted == 2
        assert (await returned(server, "GET", f"{path}/missing", v1_batches.MissingResponse)).ranges == [(1, 1)]
        await server.ask("POST", f"{path}/items", line(1), NDJSON)
        assert (await returned(server, "POST", f"{path}/seal", BatchView, {"run_count": 3})).state == "sealed"
        assert (await returned(server, "GET", "/v1/batches", v1_batches.BatchListResponse)).batches[0].id == batch.id
        session = await returned(server, "POST", "/v1/sessions", worker_sessions.SessionResponse, {})
        claim = {"session": session.id, "claim_no": 0, "tasks": ["task"], "runs_max": 2}
        lease = (await returned(server, "POST", "/v1/claims", worker_sessions.ClaimResponse, claim)).leases[0]
        beat = await returned(server, "POST", f"/v1/sessions/{session.id}/heartbeat", worker_sessions.HeartbeatResponse)
        assert beat.leases == [worker_sessions.SessionLease(lease.lease, 0)]
        settlement = {
            "lease": lease.lease,
            "outcomes": [
                {"place": lease.runs[0].place, "state": "completed"},
                {"place": lease.runs[1].place, "state": "failed", "error": {"type": "ValueError"}},
            ],
        }
        body = {"settlements": [settlement]}
        assert (await returned(server, "POST", "/v1/settlements", worker_sessions.WordsResponse, body)).words == [
            "settled"
        ]
        assert (await returned(server, "POST", f"{path}/redrive", v1_batches.RedriveResponse)).redriven == 1
        enqueued = await returned(server, "POST", "/v1/tasks/task/runs", worker_sessions.RunIdResponse, {"payload": 7})
        assert (await returned(server, "GET", f"/v1/runs/{enqueued.id}", RunView)).input == 7
        assert (await returned(server, "GET", "/v1/about", ServerInfo)).environment == server.engine.environment


async def test_a_run_is_returned_with_input_output_and_times(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.create(1)
        await server.stream(batch_id, [line(0)])
        await server.work()
        run = await returned(server, "GET", f"/v1/runs/{run_id(batch_id, 0)}", RunView)
        assert (run.state, run.is_finished, run.batch_id, run.index) == ("completed", True, batch_id, 0)
        assert run.created_at is not None
        assert run.ended_at is not None


@pytest.mark.parametrize("name", ["run_nothing", f"batch_{'0' * 26}", run_id(f"batch_{'0' * 26}", 3)])
async def test_an_unknown_run_is_not_found_with_a_problem(tmp_path: Path, name: str) -> None:
    async with running_server(tmp_path, "memory") as server:
        answer = await server.ask("GET", f"/v1/runs/{name}")
        problem = msgspec.convert(answer.json, Problem)
        assert (answer.status, problem.code, problem.title) == (404, "NOT_FOUND", problem.title)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_a_run_of_another_environment_is_not_found(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.create(1)
        await server.stream(batch_id, [line(0)])
        now_us = server.engine.clock.now_us()
        other, stored = new_key("elsewhere", ("*",), "", now_us)
        await server.engine.administration.add_key(stored, now_us=now_us)
        headers = {"authorization": f"Bearer {other}"}
        path = f"/v1/runs/{run_id(batch_id, 0)}"
        assert (await server.ask("GET", path, None, headers, auth=False)).status == 404
        assert (await server.ask("GET", path, None, {"authorization": f"Bearer {KEY}"}, auth=False)).status == 200

"""The JSON API for workers in any language, and the batch endpoints of `/v1`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from headrace.remote.connection import ServerConnection
from headrace.remote.store import RemoteStore
from headrace.runtime.maintenance.upkeep import Upkeep
from headrace.store.protocol import Claim
from tests.support.http_server import KEY, LIMITS, NDJSON, ServerUnderTest, line, running_server


@pytest.fixture(params=("sqlite", "postgres"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def session_of(server: ServerUnderTest) -> str:
    return str((await server.ask("POST", "/v1/sessions", {"host": "far", "pid": 7})).json["id"])


async def claimed(server: ServerUnderTest, session: str, number: int = 1, **more: Any) -> list[Any]:
    body = {"session": session, "claim_no": number, "tasks": ["task"], "runs_max": 100, **more}
    answer = await server.ask("POST", "/v1/claims", body)
    assert answer.status == 200, answer
    return list(answer.json["leases"])


async def test_a_json_worker_claims_heartbeats_and_settles(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(4)
        session = await session_of(server)
        (lease,) = await claimed(server, session)
        assert (lease["task"], lease["attempt"], [run["payload"] for run in lease["runs"]]) == (
            "task",
            1,
            [{"i": index} for index in range(4)],
        )
        assert await claimed(server, session) == [lease], "a claim repeated after a lost answer"
        beat = (await server.ask("POST", f"/v1/sessions/{session}/heartbeat")).json
        assert beat["leases"] == [{"lease": lease["lease"], "claim_no": 1}]
        outcomes = [
            {"place": 0, "state": "completed", "output": {"ok": 1}},
            {"place": 1, "state": "failed", "error": {"type": "Boom", "message": "it broke"}},
            {"place": 2, "state": "failed", "error": {"type": "Later"}, "retry_at": "1h"},
        ]
        part = {"settlements": [{"lease": lease["lease"], "outcomes": outcomes}]}
        assert (await server.ask("POST", "/v1/settlements", part)).json == {"words": ["settled"]}
        assert (await server.ask("POST", "/v1/settlements", part)).json == {"words": ["recorded"]}
        assert (await server.ask("POST", "/v1/releases", {"leases": [lease["lease"]]})).json == {"words": ["settled"]}
        late = {
            "settlements": [{"lease": lease["lease"], "part_no": 1, "outcomes": [{"place": 3, "state": "completed"}]}]
        }
        assert (await server.ask("POST", "/v1/settlements", late)).json == {"words": ["lost"]}
        batch = (await server.ask("GET", f"/v1/batches/{batch_id}")).json
        assert (batch["completed"], batch["failed"], batch["waiting"]) == (1, 1, 2)
        assert (await server.ask("DELETE", f"/v1/sessions/{session}")).status == 204
        assert (await server.ask("POST", f"/v1/sessions/{session}/heartbeat")).json["code"] == "SESSION_ENDED"


async def test_a_worker_that_names_its_tasks_is_known_by_them(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(1)
        path = f"/v1/batches/{batch_id}"
        assert (await server.ask("GET", path)).json["stalled"][0]["reason"] == "no_worker"
        body: dict[str, Any] = {"tasks": ["other"], "queues": ["default"]}
        session = (await server.ask("POST", "/v1/sessions", body)).json["id"]
        assert (await server.ask("GET", path)).json["stalled"][0]["reason"] == "unknown_task"
        assert (await server.ask("DELETE", f"/v1/sessions/{session}")).status == 204


async def test_a_worker_that_names_no_tasks_is_known_by_its_claims(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(1)

        async def reasons() -> list[str]:
            answer = await server.ask("GET", f"/v1/batches/{batch_id}")
            return [lane["reason"] for lane in answer.json["stalled"]]

        session = await session_of(server)
        assert await reasons() == ["unknown_task"], "it has claimed nothing yet"
        assert await claimed(server, session, 1, tasks=["other"], queues=["slow"]) == []
        assert await reasons() == ["unknown_task"]
        assert await claimed(server, session, 2, queues=["slow"]) == []
        assert await reasons() == ["other_queues"]
        (lease,) = await claimed(server, session, 3)
        await server.ask("POST", "/v1/releases", {"leases": [lease["lease"]]})
        assert await reasons() == []


async def test_claims_of_the_same_tasks_state_them_once(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        session = await session_of(server)
        await claimed(server, session, 1)
        stated: list[str] = []

        async def heartbeat(*_: Any, **__: Any) -> None:
            stated.append("again")

        server.engine.store.heartbeat = heartbeat  # type: ignore[assignment, method-assign]  # it must not be called
        for number in range(2, 5):
            await claimed(server, session, number)
        assert stated == []


async def test_a_waiting_heartbeat_returns_as_soon_as_a_leased_run_is_cancelled(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(2)
        session = await session_of(server)
        (lease,) = await claimed(server, session)
        path = f"/v1/sessions/{session}/heartbeat"
        assert (await server.ask("POST", f"{path}?wait_s=31")).status == 400
        waiting = asyncio.create_task(server.ask("POST", f"{path}?wait_s=30"))
        while not (await server.engine.maintenance.sessions())[-1].heartbeat_us:
            await asyncio.sleep(0)
        run = lease["runs"][1]["id"]
        assert (await server.ask("POST", f"/api/v2/runs/{run}/cancel")).status == 200
        assert (await waiting).json["cancelled"] == [run]
        assert (await server.ask("POST", f"{path}?wait_s=30")).json["cancelled"] == [run], "known already: at once"
        assert (await server.ask("POST", f"/v1/batches/{batch_id}/cancel")).status == 200
        assert (await server.ask("POST", f"{path}?wait_s=30")).json["stopped"] == [batch_id]


async def test_a_waiting_claim_sends_keep_alives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.http.requests.long_poll.KEEPALIVE_S", 0.03)
    async with running_server(tmp_path, "sqlite") as server:
        session = await session_of(server)
        body = {"session": session, "claim_no": 1, "tasks": ["task"], "wait_s": 0.3}
        answer = await server.ask("POST", "/v1/claims", body)
        assert (answer.body[:2], answer.json) == (b"  ", {"leases": []})
        remote = RemoteStore(ServerConnection(server.server.url, KEY, attempts=1), LIMITS, wait_s=1)
        await remote.open()
        claim = Claim(session_id=session, claim_no=2, environment="", tasks=["task"], queues=None, runs_max=1)
        assert await remote.claim(claim, now_us=0) == []


async def test_a_forged_lease_token_is_lost(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        await server.filled(1)
        (lease,) = await claimed(server, await session_of(server))
        forged = lease["lease"][:-1] + ("0" if lease["lease"][-1] != "0" else "1")
        for name in (forged, "lease_1_1", "lease_1_1_zz", "nonsense", f"lease_{10**30}_1_00"):
            body = {"settlements": [{"lease": name, "outcomes": [{"place": 0, "state": "completed"}]}]}
            assert (await server.ask("POST", "/v1/settlements", body)).json == {"words": ["lost"]}, name
        twice = {"place": 0, "state": "completed"}
        body = {"settlements": [{"lease": lease["lease"], "outcomes": [twice, twice]}]}
        assert (await server.ask("POST", "/v1/settlements", body)).status == 400
        body = {"settlements": [{"lease": lease["lease"], "outcomes": [{"place": 9, "state": "completed"}]}]}
        assert (await server.ask("POST", "/v1/settlements", body)).status in (400, 409)


@pytest.mark.parametrize(
    "change",
    [
        {"session": "session_nonsense"},
        {"session": "session_" + "0" * 26},
        {"claim_no": -1},
        {"runs_max": 0},
        {"runs_max": 10**9},
        {"tasks": []},
        {"tasks": ["a\0b"]},
        {"wait_s": 31},
        {"more": 1},
    ],
)
async def test_an_invalid_claim_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        await server.filled(1)
        body = {"session": await session_of(server), "claim_no": 1, "tasks": ["task"], "runs_max": 1} | change
        answer = await server.ask("POST", "/v1/claims", body)
        assert answer.status in (400, 409), answer
        assert answer.json["code"] in ("INVALID", "SESSION_ENDED")
        assert await server.work() == 1, "nothing was leased"


async def test_a_single_run_is_enqueued_shown_replayed_and_cancelled(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer = await server.ask("POST", "/v1/tasks/task/runs", {"payload": {"a": 1}, "options": {"tags": ["t"]}})
        assert answer.status == 201
        run_id = answer.json["id"]
        assert (await server.ask("GET", f"/api/v1/runs/{run_id}/result")).status == 404
        assert await server.work() == 1
        run = (await server.ask("GET", f"/api/v3/runs/{run_id}")).json
        assert (run["status"], run["payload"], run["tags"], run["attemptCount"]) == ("COMPLETED", {"a": 1}, ["t"], 1)
        assert (await server.ask("GET", f"/api/v1/runs/{run_id}/result")).json["output"] == "0"
        again = (await server.ask("POST", f"/api/v1/runs/{run_id}/replay")).json["id"]
        assert again != run_id
        replayed = (await server.ask("GET", f"/api/v3/runs/{again}")).json
        assert (replayed["status"], replayed["payload"], replayed["tags"]) == ("QUEUED", {"a": 1}, ["t"])
        assert (await server.ask("POST", f"/api/v2/runs/{again}/cancel")).json == {"id": again}
        assert (await server.ask("GET", f"/api/v3/runs/{again}")).json["status"] == "CANCELED"
        for path in (f"/api/v3/runs/{run_id[:-1]}99", "/api/v3/runs/nonsense"):
            assert (await server.ask("GET", path)).json["error"] == "Run not found"


async def test_runs_are_listed_filtered_and_paged(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        first = await server.filled(5)
        await server.work()
        second = await server.create(6)
        await server.stream(
            second, [line(n, tags=["even" if n % 2 == 0 else "odd"], queue={"name": f"q{n % 3}"}) for n in range(6)]
        )

        async def listed(query: str) -> list[str]:
            ids: list[str] = []
            cursor = ""
            while True:
                page = (await server.ask("GET", f"/api/v1/runs?page[size]=2&{query}{cursor}")).json
                ids += [run["id"].removeprefix("run_") for run in page["data"]]
                if "next" not in page["pagination"]:
                    return ids
                cursor = f"&page[after]={page['pagination']['next']}"

        first_id, second_id = first.removeprefix("batch_"), second.removeprefix("batch_")
        assert await listed("") == [f"{second_id}_{n}" for n in range(6)] + [f"{first_id}_{n}" for n in range(5)]
        assert await listed(f"filter[batch]={first}") == [f"{first_id}_{n}" for n in range(5)]
        assert await listed("filter[status]=COMPLETED") == [f"{first_id}_{n}" for n in range(5)]
        assert await listed("filter[status]=QUEUED,COMPLETED") == await listed("")
        await server.stream(await server.create(2), [line(0, "x", idempotencyKey="f"), b" " * 10 + line(1)])
        third = await server.filled(1)
        await server.engine.store.cancel_runs(third, [0], now_us=server.engine.clock.now_us())
        assert await listed("filter[status]=CANCELED") == [f"{third.removeprefix('batch_')}_0"]
        await server.engine.store.stop_batch(second, "cancelled", now_us=server.engine.clock.now_us())
        await server.work("f")
        assert len(await listed("filter[status]=FAILED")) == 2
        assert await listed("filter[status]=TIMED_OUT,CRASHED") == []
        assert await listed("filter[tag]=odd") == [f"{second_id}_{n}" for n in (1, 3, 5)]
        assert await listed("filter[queue]=q1,task/q2") == [f"{second_id}_{n}" for n in (1, 2, 4, 5)]
        assert await listed("filter[taskIdentifier]=nobody") == []
        now_ms = server.engine.clock.now_us() // 1_000
        assert await listed(f"filter[createdAt][from]={now_ms + 60_000}") == []
        assert len(await listed(f"filter[createdAt][to]={now_ms + 60_000}")) == 14
        assert len(await listed("filter[createdAt][period]=1h")) == 14


async def test_an_open_ended_batch_is_streamed_sealed_and_read_in_pieces(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        created = await server.ask("POST", "/v1/batches", {"key": "nightly", "task": "task", "metadata": {"a": 1}})
        assert created.status == 201
        batch_id = created.json["id"]
        assert (await server.ask("POST", "/v1/batches", {"key": "nightly"})).json["id"] == batch_id
        path = f"/v1/batches/{batch_id}"
        result = (await server.ask("POST", f"{path}/items", [line(n) for n in (0, 1, 5, 9)], NDJSON)).json
        assert (result["accepted"], result["received"], result["state"]) == (4, 4, "open")
        missing = (await server.ask("GET", f"{path}/missing?ranges=1")).json
        assert (missing["ranges"], missing["more"]) == ([[2, 4]], True)
        again = (
            await server.ask("POST", f"{path}/items", [line(n, {"i": n + (n == 5)}) for n in range(10)], NDJSON)
        ).json
        assert (again["accepted"], again["duplicates"], again["conflicts"]) == (6, 4, [5])
        assert (await server.ask("POST", f"{path}/seal", {"run_count": 10})).json["state"] == "sealed"
        await server.work()
        whole = (await server.ask("GET", f"{path}/results")).body.splitlines()
        assert [json.loads(line)["index"] for line in whole] == list(range(10))
        assert (await server.ask("GET", f"{path}/results?from=4&limit=3")).body.splitlines() == whole[4:7]
        batches = (await server.ask("GET", "/v1/batches?state=completed")).json["batches"]
        assert [(batch["id"], batch["completed"]) for batch in batches] == [(batch_id, 10)]


async def test_failed_runs_are_redriven_and_a_cancelled_batch_ends(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.filled(3)
        path = f"/v1/batches/{batch_id}"
        await server.work("f")
        results = (await server.ask("GET", f"/api/v1/batches/{batch_id}/results")).json["items"]
        assert [(item["ok"], item["error"]["name"]) for item in results] == [(False, "Boom")] * 3
        assert (await server.ask("POST", f"{path}/redrive", {"indexes": [1]})).json["redriven"] == 1
        assert (await server.ask("POST", f"{path}/redrive")).json["redriven"] == 2
        cancelled = (await server.ask("POST", f"{path}/cancel")).json
        assert (cancelled["state"], cancelled["cancelled"], cancelled["is_finished"]) == ("cancelled", 3, True)
        assert (await server.ask("POST", f"{path}/redrive")).status == 409


async def test_a_repeated_create_returns_the_same_batch_and_is_cached_only_when_sealed(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        body = {"runCount": 2, "idempotencyKey": "nightly"}
        first = await server.ask("POST", "/api/v3/batches", body)
        assert (first.status, first.json["isCached"], first.json["idempotencyKey"]) == (202, False, "nightly")
        again = await server.ask("POST", "/api/v3/batches", body)
        assert (again.status, again.json["isCached"], again.json["id"]) == (200, False, first.json["id"])
        other = await server.ask("POST", "/api/v3/batches", {**body, "runCount": 3})
        assert (other.status, "already been created" in other.json["error"]) == (422, True)
        await server.stream(first.json["id"], [line(0), line(1)])
        cached = await server.ask("POST", "/api/v3/batches", body)
        assert (cached.status, cached.json["isCached"]) == (200, True)
        retry = {"x-trigger-request-idempotency-key": "3f0c"}
        ids = {(await server.ask("POST", "/api/v3/batches", {"runCount": 1}, retry)).json["id"] for _ in range(3)}
        assert len(ids) == 1, "repeated creates are one batch"


async def test_the_openapi_document_lists_all_endpoints_and_the_docs_page_is_self_contained(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        document = (await server.ask("GET", "/openapi.json", auth=False)).json
        assert document["openapi"] == "3.1.0"
        assert {"/api/v3/batches/{batch_id}/items", "/v1/claims", "/healthz"} <= document["paths"].keys()
        page = (await server.ask("GET", "/docs", auth=False)).body.decode()
        assert "/v1/settlements" in page
        assert "<script" not in page
        assert "src=" not in page
        metrics = (await server.ask("GET", "/metrics", auth=False)).body.decode()
        assert 'route="/openapi.json"' in metrics
        await Upkeep(server.engine).round()
        metrics = (await server.ask("GET", "/metrics", auth=False)).body.decode()
        for duty in ("recover_here", "recover_silent", "sweep", "prune", "remove_orphans"):
            assert f'headrace_upkeep_duties_total{{duty="{duty}",outcome="done"}}' in metrics
        answer = await server.ask("GET", "/healthz", None, {"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        other = await server.ask("GET", "/healthz", None, {"x-request-id": "no good\t"})
        assert other.headers["x-request-id"].startswith("req_")

"""The two phases over real sockets, on every store: create, stream, seal, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.http_server import line, running_server

STORES = ("sqlite", "postgres")


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_batch_is_created_streamed_run_and_read(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        created = await server.ask("POST", "/api/v3/batches", {"runCount": 3, "taskIdentifiers": ["task"]})
        assert created.status == 202, created
        batch_id = created.json["id"]
        assert created.json == {"id": batch_id, "runCount": 3, "isCached": False}
        assert created.headers["x-trigger-jwt"].count(".") == 2
        streamed = await server.stream(batch_id, [line(index) for index in range(3)])
        assert streamed.json == {
            "id": batch_id,
            "itemsAccepted": 3,
            "itemsDeduplicated": 0,
            "sealed": True,
            "runCount": 3,
        }
        batch = (await server.ask("GET", f"/api/v2/batches/{batch_id}")).json
        assert (batch["status"], len(batch["runs"])) == ("PROCESSING", 3)
        assert await server.work() == 3
        batch = (await server.ask("GET", f"/api/v2/batches/{batch_id}")).json
        assert batch["status"] == "COMPLETED"
        run = (await server.ask("GET", f"/api/v3/runs/{batch['runs'][2]}")).json
        assert (run["status"], run["payload"], run["output"]) == ("COMPLETED", {"i": 2}, 2)
        results = (await server.ask("GET", f"/api/v1/batches/{batch_id}/results")).json
        assert [item["output"] for item in results["items"]] == ["0", "1", "2"]
        lines = (await server.ask("GET", f"/v1/batches/{batch_id}/results?from=1")).body.splitlines()
        assert len(lines) == 2

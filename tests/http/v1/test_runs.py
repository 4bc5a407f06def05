"""`/v1/runs`: the same views of runs as the library and the command line show."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from headrace.remote.client import Client
from headrace.views import BatchView, RunView, batch_view, run_view
from tests.support.http_server import KEY, running_server


@pytest.fixture(params=("memory", "sqlite"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_run_over_http_has_the_shape_of_the_library_s_view(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(2, tags=["red"])
        await server.work("f")
        run_id = f"run_{batch_id.removeprefix('batch_')}_1"
        answer = await server.ask("GET", f"/v1/runs/{run_id}")
        store = server.engine.store
        assert msgspec.json.decode(answer.body, type=RunView) == await run_view(
            server.engine, await store.run(batch_id, 1)
        )
        assert (answer.json["state"], answer.json["input"], answer.json["tags"]) == ("failed", {"i": 1}, ["red"])
        batch = await server.ask("GET", f"/v1/batches/{batch_id}")
        assert msgspec.json.decode(batch.body, type=BatchView) == batch_view(*await store.batch(batch_id))
        assert (await Client(server.server.url, KEY).run(run_id))["id"] == run_id

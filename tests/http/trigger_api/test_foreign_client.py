"""A client written from the wire contract alone triggers a batch and reads its runs."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.worker import Worker
from tests.support.http_server import KEY, running_server

SCRIPT = Path(__file__).parents[2] / "support" / "foreign_client.py"


async def echo(value: Any) -> Any:
    return len(value) if isinstance(value, str) and len(value) > 1_000 else str(value)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_client_written_from_the_contract_triggers_and_reads_a_batch(tmp_path: Path, kind: str) -> None:
    registry = Registry()
    registry.add(TaskSpec("echo", echo))
    async with running_server(tmp_path, kind, registry=registry) as server:
        worker = Worker(server.engine, registry, concurrency=4)
        await worker.start()
        host, port = server.server.address
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", str(SCRIPT), host, str(port), KEY, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        await worker.stop()
        assert process.returncode == 0
    results = json.loads(out)
    status, headers, body = results["created"]
    batch_id = body["id"]
    assert (status, body) == (202, {"id": batch_id, "runCount": 6, "isCached": False})
    assert {"x-trigger-jwt", "x-trigger-jwt-claims"} <= headers.keys()
    assert results["partial"] == {
        "id": batch_id,
        "itemsAccepted": 2,
        "itemsDeduplicated": 0,
        "sealed": False,
        "runCount": 6,
        "enqueuedCount": 2,
        "expectedCount": 6,
    }
    assert results["whole"] == {
        "id": batch_id,
        "itemsAccepted": 4,
        "itemsDeduplicated": 2,
        "sealed": True,
        "runCount": 6,
    }
    batch = results["batch"]
    assert set(batch) >= {"id", "status", "createdAt", "updatedAt", "runCount", "runs", "processing"}
    assert batch["processing"]["errors"] == []
    assert results["outputs"] == [
        "{'i': 0}",
        "plain – ünïcode 日本",
        "None",
        "",
        "{'when': datetime.datetime(2026, 1, 1, 0, 0, tzinfo=datetime.timezone.utc), 'big': 12345678901234567890}",
        200 * 1024,
    ]
    assert results["payloads"][4] == {"when": "2026-01-01T00:00:00.000Z", "big": "12345678901234567890"}
    assert results["refused"] == [400, 422]
    assert (results["replayed"]["sealed"], results["replayed"]["itemsAccepted"]) == (True, 0)

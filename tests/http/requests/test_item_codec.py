"""Every option of an item is handled as the table states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.core.retry import Retry
from headrace.http.requests.item_codec import OPTIONS, ItemOptions
from headrace.runtime.tasks.context import DETACHED, Context
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.worker import Worker
from tests.support.http_server import LIMITS, ServerUnderTest, line, running_server

ANY: dict[str, Any] = {
    "idempotencyKey": "a-key",
    "idempotencyKeyTTL": "2h",
    "delay": "1h",
    "ttl": "10m",
    "priority": 7,
    "queue": {"name": "special"},
    "tags": ["one", "two"],
    "metadata": {"who": "ada", "n": [1, 2]},
    "metadataType": "application/json",
    "maxAttempts": 4,
    "maxDuration": 30,
    "payloadType": "application/json",
    "payloadSize": 17,
    "machine": "small-2x",
    "region": "eu-1",
    "test": True,
    "lockToVersion": "2026.1",
    "externalDeploymentId": "deploy-1",
    "idempotencyKeyOptions": {"key": "a", "scope": "global"},
    "concurrencyKey": "tenant",
    "debounce": {"key": "d", "delay": "5s", "mode": "leading"},
    "parentAttempt": "attempt_1",
    "gates": [{"queue": "q"}],
    "concurrency": {"limit": 1},
}


async def one_run(server: ServerUnderTest, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The stored record of a run with these options, and its form in the API."""
    batch_id = await server.create(1)
    answer = await server.stream(batch_id, [line(0, **options)])
    assert answer.status == 200, answer
    view = await server.engine.store.run(batch_id, 0)
    fields = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_0")).json
    return view, fields


def test_the_table_names_every_option_once() -> None:
    assert set(ANY) == set(OPTIONS) == set(ItemOptions.__struct_encode_fields__)
    assert {fate.disposition for fate in OPTIONS.values()} == {"honoured", "kept", "refused"}


@pytest.mark.parametrize("name", OPTIONS)
async def test_an_option_is_honoured_stored_or_refused_as_the_table_states(tmp_path: Path, name: str) -> None:
    async with running_server(tmp_path) as server:
        if OPTIONS[name].disposition == "refused":
            batch_id = await server.create(1)
            answer = await server.stream(batch_id, [line(0, **{name: ANY[name]})])
            assert answer.status == 422
            assert name in answer.json["error"]
            assert await server.engine.store.missing(batch_id, 9) == [(0, 1)]
            return
        view, fields = await one_run(server, **{name: ANY[name]})
        if OPTIONS[name].disposition == "kept":
            assert json.loads(view.kept)[name] == ANY[name]
        checks: dict[str, Callable[[], bool]] = {
            "idempotencyKey": lambda: fields["idempotencyKey"] == "a-key",
            "idempotencyKeyTTL": lambda: view.kept == b"",
            "delay": lambda: fields["status"] == "DELAYED" and "delayedUntil" in fields,
            "ttl": lambda: 0 < view.expires_us - server.engine.clock.now_us() <= 600_000_000,
            "priority": lambda: view.priority == 7,
            "queue": lambda: view.queue == "special",
            "tags": lambda: fields["tags"] == ["one", "two"],
            "metadata": lambda: fields["metadata"] == ANY["metadata"],
            "region": lambda: fields["region"] == "eu-1",
            "test": lambda: fields["isTest"] is True,
            "machine": lambda: fields["machine"] == "small-2x",
            "lockToVersion": lambda: fields["version"] == "2026.1",
            "concurrencyKey": lambda: fields["concurrencyKey"] == "tenant",
            "debounce": lambda: fields["debounce"] == ANY["debounce"],
        }
        assert name not in checks or checks[name](), (view, fields)


async def test_max_attempts_and_max_duration_override_the_task_s_settings(tmp_path: Path) -> None:
    tries: list[int] = []
    hangs = asyncio.Event()

    async def failing(value: int, context: Context = DETACHED) -> None:
        tries.append(context.attempt)
        raise ValueError(value)

    async def hanging() -> None:
        await hangs.wait()

    registry = Registry()
    registry.add(TaskSpec("failing", failing, retry=Retry(attempts=1, delay_s=0, jitter=0)))
    registry.add(TaskSpec("hanging", hanging))
    async with running_server(tmp_path, "sqlite", registry=registry) as server:
        batch_id = await server.create(2)
        lines = [line(0, 1, task="failing", maxAttempts=3), line(1, None, task="hanging", maxDuration=0.05)]
        assert (await server.stream(batch_id, lines)).json["sealed"]
        worker = Worker(server.engine, registry, concurrency=4)
        await worker.start()
        results = (await server.ask("GET", f"/v1/batches/{batch_id}/results")).body
        await worker.stop()
        assert tries == [1, 2, 3]
        assert b'"state":"failed"' in results
        run = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_1")).json
        assert run["status"] == "TIMED_OUT"


async def test_a_task_s_queue_and_priority_apply_unless_the_item_has_its_own(tmp_path: Path) -> None:
    registry = Registry()
    registry.add(TaskSpec("task", lambda: None, queue="own", priority=3))
    async with running_server(tmp_path, registry=registry) as server:
        view, _ = await one_run(server)
        assert (view.queue, view.priority) == ("own", 3)
        view, _ = await one_run(server, queue={"name": "said"}, priority=-1)
        assert (view.queue, view.priority) == ("said", -1)


@pytest.mark.parametrize(
    ("options", "error_text"),
    [
        ({"delay": "soon"}, "delay"),
        ({"delay": "9999w9999w9999w9999w"}, "delay"),
        ({"ttl": "-1"}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"idempotencyKeyTTL": "1 week"}, "idempotencyKeyTTL"),
        ({"idempotencyKey": "x" * 2_049}, "idempotencyKey"),
        ({"idempotencyKey": ""}, "idempotencyKey"),
        ({"priority": 2e6}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"queue": "plain"}, "queue"),
        ({"queue": {"name": ""}}, "queue"),
        ({"tags": ["t"] + [str(n) for n in range(10)]}, "10 tags"),
        ({"tags": "x" * 129}, "tag"),
        ({"metadata": "x" * (LIMITS.metadata_bytes_max + 1)}, "metadata"),
        ({"maxAttempts": 0}, "maxAttempts"),
        ({"maxAttempts": 1.5}, "maxAttempts"),
        ({"maxDuration": 0}, "maxDuration"),
        ({"machine": "huge"}, "machine"),
        ({"payloadType": "application/x-unknown"}, "application/x-unknown"),
        ({"payloadType": "application/store"}, "application/store"),
        ({"concurrencyKey": {"a": 1}}, "concurrencyKey"),
        ({"unheardOf": 1}, "unheardOf"),
    ],
)
async def test_an_invalid_option_is_refused_by_name(tmp_path: Path, options: dict[str, Any], error_text: str) -> None:
    async with running_server(tmp_path) as server:
        batch_id = await server.create(1)
        answer = await server.stream(batch_id, [line(0, **options)])
        assert answer.status == 422, answer
        assert error_text in answer.json["error"]
        assert await server.engine.store.missing(batch_id, 9) == [(0, 1)]


@pytest.mark.parametrize(
    ("payload", "content_type", "fields"),
    [
        ('{"json":{"i":0}}', "application/super+json", {"i": 0}),
        ({"json": [1]}, "application/super+json", [1]),
        ("plain words", "text/plain", "plain words"),
        ("", "text/plain", ""),
        ('{"a":1}', "application/json", {"a": 1}),
        ('{"a":1}', None, {"a": 1}),
        ("no json", None, "no json"),
        ([1, "é"], None, [1, "é"]),
        (None, None, None),
        (0, "application/json; charset=utf-8", 0),
    ],
)
async def test_a_payload_is_stored_according_to_its_type(
    tmp_path: Path, payload: Any, content_type: str | None, fields: Any
) -> None:
    async with running_server(tmp_path) as server:
        options = {} if content_type is None else {"payloadType": content_type}
        _, run = await one_run(server, payload=payload, **options)
        assert run["payload"] == fields


async def test_a_long_idempotency_key_is_stored_as_its_digest_and_returned_unchanged(tmp_path: Path) -> None:
    key = "k" * 2_048
    async with running_server(tmp_path, "postgres") as server:
        view, fields = await one_run(server, idempotencyKey=key)
        assert view.idempotency_key.startswith("sha256:")
        assert fields["idempotencyKey"] == key
        batch_id = await server.create(1)
        await server.stream(batch_id, [line(0, idempotencyKey=key)])
        linked = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_0")).json
        assert linked["id"] == fields["id"], "the run that the key names"


async def test_a_linked_run_s_result_is_that_of_the_run_it_links_to(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        first = await server.create(1)
        await server.stream(first, [line(0, idempotencyKey="k", delay="1h")])
        second = await server.create(3)
        await server.stream(second, [line(0), line(1, idempotencyKey="k"), line(2)])
        await server.work()
        partial = (await server.ask("GET", f"/v1/batches/{second}/results?wait=0")).body.splitlines()
        assert len(partial) == 1, "the second waits for the run it links to"
        await server.engine.store.cancel_runs(first, [0], now_us=server.engine.clock.now_us())
        lines = (await server.ask("GET", f"/v1/batches/{second}/results?wait=0")).body.splitlines()
        assert [b'"state":"cancelled"' in line for line in lines] == [False, True, False]


def test_the_docs_list_the_options_as_in_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "http.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {fate.disposition} | {fate.meaning} |" for name, fate in OPTIONS.items()]
    assert "\n".join(rows) in page

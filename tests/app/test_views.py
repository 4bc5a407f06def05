"""Views of runs and batches: plain data for JSON, FastAPI and people; handles and lists that return them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest

import headrace
from headrace import BatchView, Headrace, InvalidInput, NotFound, Retry, RunView, WaitTimeout
from headrace.foundation.ids import run_id
from headrace.views import decoded, moment_of
from tests.support.engines import app_on, on_each_store, opened


def with_tasks(app: Headrace) -> Any:
    @app.task(retry=Retry(attempts=2, delay_s=0, jitter=0))
    async def picky(n: int) -> dict[str, int]:
        if n < 0:
            raise ValueError(f"{n} is negative")
        return {"n": n}

    return picky


@on_each_store
async def test_a_run_s_view_has_its_times_input_output_and_attempts(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        picky = with_tasks(app)
        earliest = moment_of(engine.clock.now_us())
        good = await picky.options(tags=["red"], headers={"h": "1"}, idempotency_key="k").enqueue(1)
        bad = await picky.enqueue(-1)
        before = await good.view()
        assert (before.state, before.is_finished, before.input, before.output) == ("waiting", False, 1, None)
        assert (before.started_at, before.ended_at, before.duration_s) == (None, None, None)
        created = before.created_at
        assert created is not None
        assert earliest <= created <= moment_of(engine.clock.now_us())
        async with app.worker():
            assert await good.result() == {"n": 1}
            with pytest.raises(headrace.RunFailed):
                await bad.result()
        view = await good.view()
        assert (view.state, view.is_finished, view.output, view.error) == ("completed", True, {"n": 1}, None)
        assert (view.tags, view.headers, view.idempotency_key) == (["red"], {"h": "1"}, "k")
        assert view.created_at == created
        assert view.ended_at is not None
        assert view.started_at is not None
        assert created <= view.started_at <= view.ended_at
        assert view.duration_s == (view.ended_at - view.started_at).total_seconds()
        assert view.ended_at.tzinfo is UTC
        failed = await bad.view()
        assert failed.error is not None
        assert (failed.error.type, failed.error.message, failed.error.attempts) == ("ValueError", "-1 is negative", 2)
        assert [attempt.state for attempt in failed.attempts] == ["retried", "failed"]
        assert failed.created_at is not None
        assert earliest <= failed.created_at <= view.ended_at


@on_each_store
async def test_views_are_json_and_read_back_as_they_were(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        picky = with_tasks(app)
        batch = await picky.map([1, -1], metadata={"who": "ada"})
        async with app.worker():
            view = await batch.wait(timeout_s=30)
        run = await (await app.get_run(f"run_{batch.id.removeprefix('batch_')}_1")).view()
        for shown, kind_of in ((view, BatchView), (run, RunView)):
            text = msgspec.json.encode(shown)
            assert msgspec.json.decode(text, type=kind_of) == shown
            assert json.loads(text) == {name: json.loads(msgspec.json.encode(value)) for name, value in shown}
            assert not {"kind", "kept", "payload", "result", "due_us"} & set(dict(shown))
        assert (view.completed, view.failed, view.metadata, view.ledger.expected) == (1, 1, {"who": "ada"}, 2)
        assert view.duration_s is not None


@on_each_store
async def test_pydantic_and_so_fastapi_serialise_and_document_a_view(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        run = await with_tasks(app).enqueue(1)
        view = await run.view()
        adapter = pydantic.TypeAdapter(list[RunView])
        assert json.loads(adapter.dump_json([view]))[0] == json.loads(msgspec.json.encode(view))
        assert adapter.validate_python([msgspec.to_builtins(view)]) == [view]
        (schema,) = (adapter.json_schema()["items"],)
        assert schema["properties"]["attempts"]["items"]["properties"]["state"] == {"type": "string"}


@on_each_store
async def test_runs_and_batches_are_listed_with_the_filters_of_the_command_line(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        picky = with_tasks(app)
        old = await picky.options(tags=["red"]).map([1, 2])
        created_ms = moment_of(engine.clock.now_us())
        while moment_of(engine.clock.now_us()) - created_ms < timedelta(milliseconds=2):  # ids are in order of ms
            await asyncio.sleep(0)
        new = await picky.map([3])
        assert [view.id for view in await app.batches()] == [new.id, old.id]
        assert [view.id for view in await app.batches(limit=1)] == [new.id]
        assert await app.batches(state="completed") == []
        assert [view.batch_id for view in await app.runs()] == [new.id, old.id, old.id]
        assert [view.index for view in await app.runs(tag="red", state="waiting", task="picky")] == [0, 1]
        assert len(await app.runs(batch=new.id)) == 1
        with pytest.raises(InvalidInput, match="expected a state of a batch, got 'gone'"):
            await app.batches(state="gone")
        with pytest.raises(InvalidInput, match="expected a state of a batch, got 'failed'") as raised:
            await app.batches(state="failed")
        assert "`headrace run list --state failed` lists runs" in raised.value.hint
        with pytest.raises(InvalidInput, match="asleep"):
            await app.runs(state="asleep")
        with pytest.raises(InvalidInput, match="expected a state of a run, got 'faild'") as raised:
            await app.runs(state="faild")
        assert "did you mean failed?" in raised.value.hint
        assert "moved" not in raised.value.hint
        for index in (1, 7):
            missing = run_id(f"batch_{'0' * 26}" if index == 7 else new.id, index)
            with pytest.raises(NotFound, match=f"no run has the id '{missing}'") as unknown:
                await app.get_run(missing)
            assert "`headrace run list`" in unknown.value.hint
        with pytest.raises(NotFound):
            await app.get_batch(f"batch_{'0' * 26}")


@on_each_store
async def test_a_listed_run_that_is_running_names_its_worker(kind: str, tmp_path: Path) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:

        @app.task
        async def held(n: int) -> int:
            begun.set()
            await may_end.wait()
            return n

        async with app.worker():
            run = await held.enqueue(1)
            await begun.wait()
            (listed,) = await app.runs(state="leased")
            assert listed.worker == f"{socket.gethostname()}:{os.getpid()}"
            assert listed.worker == (await run.view()).worker
            may_end.set()
            assert await run.result(timeout_s=30) == 1


@on_each_store
async def test_a_listed_failed_run_has_its_error_and_times(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        picky = with_tasks(app)
        async with app.worker():
            batch = await picky.map([1, -1])
            await batch.wait(timeout_s=30)
        (listed,) = await app.runs(state="failed")
        view = await (await app.get_run(listed.id)).view()
        assert listed == msgspec.structs.replace(view, input=None)
        assert listed.error is not None
        assert listed.error.message == "-1 is negative"
        assert None not in (listed.created_at, listed.ended_at)


def test_each_async_method_has_a_blocking_form(tmp_path: Path) -> None:
    app = Headrace("script", store=f"sqlite:///{tmp_path / 'headrace.db'}")
    picky = with_tasks(app)
    run = picky.enqueue_sync(1)
    batch = picky.options(priority=1).map_sync([2, 3], batch_key="k")
    assert picky.map_sync([2, 3], batch_key="k").id == batch.id
    assert app.get_run_sync(run.id).view_sync().input == 1
    assert app.batches_sync(limit=1)[0].id == batch.id
    assert len(app.runs_sync(batch=batch.id)) == 2
    with pytest.raises(WaitTimeout) as raised:
        run.result_sync(timeout_s=0)
    assert isinstance(raised.value, TimeoutError)
    with app.within_sync(app.worker()):
        assert run.result_sync(timeout_s=30) == {"n": 1}
        assert [outcome.output for outcome in app.get_batch_sync(batch.id).results_sync()] == [{"n": 2}, {"n": 3}]
        assert batch.wait_sync(timeout_s=30).completed == 2
    assert not run.redrive_sync()
    assert batch.redrive_sync() == 0
    assert batch.cancel_sync().state == "completed"
    assert run.result_sync.__name__ == "result_sync"
    app.close_sync()


async def test_a_blocking_call_inside_an_event_loop_is_refused(tmp_path: Path) -> None:
    app = Headrace("script", store=f"sqlite:///{tmp_path / 'headrace.db'}")
    picky = with_tasks(app)
    with pytest.raises(InvalidInput, match="enqueue_sync\\(\\) can't be called inside a running event loop") as raised:
        picky.enqueue_sync(1)
    assert raised.value.hint.startswith("write: await enqueue(…); ")
    with pytest.raises(InvalidInput, match="enqueue_in_sync") as raised:
        picky.enqueue_in_sync(object(), 1)
    assert "await task.enqueue_in(connection, …)" in raised.value.hint
    async with app:
        run = await picky.enqueue(1)
        with pytest.raises(InvalidInput, match="result_sync"):
            run.result_sync()


def test_what_users_catch_and_annotate_is_exported() -> None:
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    assert {"NotFound", "InvalidInput", "Conflict", "StoreUnavailable", "RunFailed"} <= set(headrace.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = headrace.nothing


def test_stored_values_of_every_kind_become_json_values() -> None:
    assert decoded(b"", 0) is None
    assert decoded(b'{"a":1}', 0) == {"a": 1}
    assert decoded(b"plain \xff", 2) == "plain \ufffd" or decoded(b"plain \xff", 1) == "plain \ufffd"
    assert decoded(b"not json", 0) == "not json"
    assert decoded(msgspec.msgpack.encode({"args": [1]}), 4) == {"args": [1]}
    assert moment_of(0) == datetime(1970, 1, 1, tzinfo=UTC)

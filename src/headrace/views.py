"""Views of runs and batches: plain data, ready for JSON.

A view is what `run.view()`, `app.runs(…)`, `headrace run show --json` and `GET /v1/runs/{id}` return, in one shape.
Times are aware datetimes in UTC, inputs and outputs are decoded. A view is a `msgspec.Struct`: `msgspec.json.encode`
writes it, and a FastAPI route may return it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core import pack, run
from headrace.core.batch import BatchRecord, Ledger
from headrace.core.failure import decode
from headrace.foundation.errors import NotFound
from headrace.foundation.ids import parse_run_id, run_id
from headrace.runtime.engine import Engine
from headrace.store.protocol import RunRecord, Session

LINKS_MAX: Final = 16
"""Runs that one result may lead through: an item whose idempotency key names a run has that run's result."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class View(msgspec.Struct, kw_only=True, frozen=True):
    """Base of every view. `dict(view)` has its fields; FastAPI and pydantic can serialise it."""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of each field, as a pydantic model does."""
        for name in self.__struct_fields__:
            yield name, getattr(self, name)

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> Any:
        """Return the schema by which pydantic validates and serialises a view."""
        from pydantic_core import core_schema  # only pydantic calls this

        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else msgspec.convert(value, cls),
            serialization=core_schema.plain_serializer_function_ser_schema(msgspec.to_builtins),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, _handler: Any) -> dict[str, Any]:
        """Return the JSON schema that pydantic and FastAPI document a view with."""
        (_,), components = msgspec.json.schema_components([cls], ref_template="#/components/schemas/{name}")
        schema: dict[str, Any] = _inlined(components[cls.__name__], components)
        return schema


class RunError(View, kw_only=True, frozen=True):
    """Reason why an attempt failed.

    `type` is the exception's class or a code of Headrace, `trace` the frames of the task's own code. `attempts`
    counts the attempts so far, `crashes` the crashed workers that ran it.
    """

    type: str
    message: str
    attempts: int = 0
    crashes: int = 0
    trace: str = ""


class AttemptView(View, kw_only=True, frozen=True):
    """One attempt of a run that has ended. `state` is `retried` when another attempt followed.

    `number` counts from 1, and again from 1 after a redrive.
    """

    number: int
    state: str
    ended_at: datetime
    error: RunError | None = None


class RunView(View, kw_only=True, frozen=True):
    """One run.

    `state` is waiting, delayed, leased, started, completed, failed, cancelled or expired; `attempt` counts from 1 and
    `crashes` the workers that crashed while they ran it.

    `created_at`: when the run was stored. `due_at`: the earliest start of a delayed run. `started_at`: when a worker
    took the run for its last attempt. `ended_at`: when its last outcome was stored. `duration_s`: from start to end.
    `worker`: `host:pid` of the worker that has the run now. Each is None where it has no value.

    `activation`: the task name that the worker of an activation knows.

    `input` and `output` are filled by `run.view()`, and left out of listings.
    """

    id: str
    batch_id: str
    index: int
    environment: str
    task: str
    activation: str | None
    queue: str
    priority: int
    state: str
    is_finished: bool
    attempt: int
    crashes: int
    created_at: datetime | None
    due_at: datetime | None
    expires_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    duration_s: float | None
    worker: str | None
    tags: list[str]
    headers: dict[str, str]
    idempotency_key: str | None
    input: Any
    output: Any
    error: RunError | None
    attempts: list[AttemptView]


class StalledView(View, kw_only=True, frozen=True):
    """A queue and task with waiting runs that no live worker takes.

    `reason`: `paused`, `no_worker`, `unknown_task` (no live worker has the task) or `other_queues` (those that have it
    claim from other queues). `hint`: what to do.
    """

    queue: str
    task: str
    reason: str
    hint: str


class BatchView(View, kw_only=True, frozen=True):
    """One batch and the counts of its runs: `expected = missing + waiting + leased + completed + failed + …`.

    `state` is open, sealed, completed, cancelled or abandoned. `is_finished`: no run of it will change any more; then
    `outcome` is completed, partly_failed, failed, cancelled or abandoned, where runs without a result count as
    failed.
    `expected`: announced runs, or those received so far while it is not announced. `appended_at`: when the last item
    was stored. `duration_s`: from creation to the last outcome. `stalled`: queues and tasks of waiting runs that no
    live worker takes; filled by `batch.view()`, and left out of listings.
    """

    id: str
    key: str | None
    task: str
    environment: str
    state: str
    outcome: str | None
    is_finished: bool
    expected: int
    received: int
    missing: int
    waiting: int
    leased: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    created_at: datetime
    appended_at: datetime | None
    sealed_at: datetime | None
    finished_at: datetime | None
    duration_s: float | None
    metadata: dict[str, Any]
    stalled: list[StalledView] = []

    @property
    def ledger(self) -> Ledger:
        """The counts alone."""
        return Ledger(*(getattr(self, name) for name in Ledger._fields))


async def full_batch_view(engine: Engine, batch: BatchRecord, ledger: Ledger) -> BatchView:
    """Return the view of a batch; where it waits and nothing of it runs, with the lanes that no live worker takes."""
    view = batch_view(batch, ledger)
    if not ledger.waiting or ledger.leased:
        return view
    lanes = await engine.store.stalled_lanes(batch.environment, batch_id=batch.id, now_us=engine.clock.now_us())
    stalled = [StalledView(queue=lane.queue, task=lane.task, reason=lane.reason, hint=lane.hint) for lane in lanes]
    return msgspec.structs.replace(view, stalled=stalled)


def batch_view(batch: BatchRecord, ledger: Ledger) -> BatchView:
    """Return the view of a batch."""
    return BatchView(
        id=batch.id,
        key=batch.key,
        task=batch.task,
        environment=batch.environment,
        state=batch.state,
        outcome=_outcome(batch, ledger) if batch.is_finished else None,
        is_finished=batch.is_finished,
        received=batch.received_count,
        **ledger._asdict(),
        created_at=moment_of(batch.created_us),
        appended_at=moment(batch.appended_us),
        sealed_at=moment(batch.sealed_us),
        finished_at=moment(batch.finished_us),
        duration_s=_seconds(batch.created_us, batch.finished_us),
        metadata=batch.metadata,
    )


def _outcome(batch: BatchRecord, ledger: Ledger) -> str:
    if batch.is_stopped:
        return batch.state
    if not ledger.failed + ledger.cancelled + ledger.expired:
        return "completed"
    return "partly_failed" if ledger.completed else "failed"


async def run_view(engine: Engine, record: RunRecord) -> RunView:
    """Return the view of a run as the store has it, with its input and output."""
    payload = await content(engine, record.payload, record.kind)
    source = await linked(engine, record)
    result = None
    if source.state == run.NAMES[run.COMPLETED]:
        result = await content(engine, source.result, source.result_kind)
    sessions = await engine.maintenance.sessions() if record.session_id and engine.is_maintained_here else ()
    view = listed_view(record, sessions)
    return msgspec.structs.replace(
        view,
        input=decoded(*payload),
        output=None if result is None else decoded(*result),
    )


def listed_view(record: RunRecord, sessions: Sequence[Session] = ()) -> RunView:
    """Return the view of a run without input and output. `sessions` names the workers that are alive."""
    is_finished = run.BY_NAME.get(record.state, run.WAITING) in run.FINAL
    ended_us = int(str(record.attempts[-1]["settled_us"])) if record.attempts and is_finished else 0
    names = {session.id: f"{session.host}:{session.pid}" for session in sessions}
    failure = decode(record.result) if record.state == "failed" and record.result else None
    return RunView(
        id=run_id(record.batch_id, record.index),
        batch_id=record.batch_id,
        index=record.index,
        environment=record.environment,
        task=record.task,
        activation=record.name or None,
        queue=record.queue,
        priority=record.priority,
        state=record.state,
        is_finished=is_finished,
        attempt=record.attempt,
        crashes=max(record.crashes_count, 0 if failure is None else failure.crashes),  # with the one it failed of
        created_at=moment(record.created_us),
        due_at=moment(record.due_us),
        expires_at=moment(record.expires_us),
        started_at=moment(record.started_us),
        ended_at=moment(ended_us),
        duration_s=_seconds(record.started_us, ended_us),
        worker=names.get(record.session_id),
        tags=record.tags,
        headers=record.headers,
        idempotency_key=record.idempotency_key or None,
        input=None,
        output=None,
        error=None if failure is None else RunError(**msgspec.structs.asdict(failure)),
        attempts=_attempts(record.attempts),
    )


async def listed_views(engine: Engine, records: Sequence[RunRecord]) -> list[RunView]:
    """Return the views of listed runs, those that are running with their workers."""
    has_leases = any(record.session_id for record in records)
    sessions = await engine.maintenance.sessions() if has_leases and engine.is_maintained_here else ()
    return [listed_view(record, sessions) for record in records]


class Content(NamedTuple):
    """Stored bytes and their kind, as in `headrace.core.pack`."""

    data: bytes
    kind: int


async def linked(engine: Engine, record: RunRecord) -> RunRecord:
    """Return the run whose result this run has: itself, or the run that its item's idempotency key names.

    Raises `NotFound` when that run was pruned.
    """
    for _ in range(LINKS_MAX):
        if record.state != run.NAMES[run.COMPLETED] or record.result_kind != pack.LINK:
            return record
        record = await engine.store.run(*parse_run_id(record.result.decode()))
    raise NotFound(f"expected a result within {LINKS_MAX} links", run=run_id(record.batch_id, record.index))


async def content(engine: Engine, data: bytes, kind: int) -> Content:
    """Return stored bytes, fetched from the object store when they are there."""
    return Content(*await engine.fetch(data)) if kind == pack.REFERENCE else Content(data, kind)


def decoded(data: bytes, kind: int) -> Any:
    """Return a stored value as JSON values: text as a string, protobuf in base 64, unreadable JSON as text."""
    if kind == pack.TEXT:
        return data.decode("utf-8", "replace")
    if kind == pack.ACTIVATION:
        return base64.b64encode(data).decode()
    if not data:
        return None
    try:
        value = msgspec.msgpack.decode(data) if kind == pack.MSGPACK else msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode("utf-8", "backslashreplace")
    return value.get("json") if kind == pack.SUPER_JSON and isinstance(value, dict) else value


def moment_of(at_us: int) -> datetime:
    """Return a time in microseconds since 1970 as an aware datetime in UTC."""
    return _EPOCH + timedelta(microseconds=at_us)


def moment(at_us: int) -> datetime | None:
    """Return a time as an aware datetime, or None for 0."""
    return moment_of(at_us) if at_us else None


def _seconds(start_us: int, end_us: int) -> float | None:
    return round((end_us - start_us) / 1_000_000, 6) if start_us and end_us else None


def _attempts(attempts: Sequence[dict[str, object]]) -> list[AttemptView]:
    views: list[AttemptView] = []
    for attempt in attempts:
        is_next = bool(views) and views[-1].state == "retried"  # an attempt that ended for good precedes a redrive
        views.append(_attempt(attempt, views[-1].number + 1 if is_next else 1))
    return views


def _attempt(attempt: dict[str, object], number: int) -> AttemptView:
    error = None
    if "type" in attempt:
        error = RunError(
            type=str(attempt["type"]), message=str(attempt["message"]), trace=str(attempt.get("trace", ""))
        )
    ended_at = moment_of(int(str(attempt["settled_us"])))
    return AttemptView(number=number, state=str(attempt["ended"]), ended_at=ended_at, error=error)


def _inlined(schema: Any, components: dict[str, Any]) -> Any:
    """Replace references in a JSON schema by what they refer to."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(components[schema["$ref"].rpartition("/")[2]], components)
        return {name: _inlined(value, components) for name, value in schema.items()}
    return [_inlined(value, components) for value in schema] if isinstance(schema, list) else schema

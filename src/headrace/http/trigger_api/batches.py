"""Batches in trigger.dev's API: created by one request, filled by others, readable while they run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import run
from headrace.core.batch import COMPLETED, OPEN, SEALED, BatchRecord
from headrace.core.failure import decode
from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.ids import new_batch_id, run_id
from headrace.http.requests.batch_items import TASKS_OF_BATCH, check_accepts_items, ingest_items, seal_if_complete
from headrace.http.requests.error_responses import Unprocessable, UnsupportedType, json_response
from headrace.http.requests.request_body import decode_body
from headrace.http.requests.result_resolver import ResultResolver
from headrace.http.requests.serializers import trigger_batch, trigger_error
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.producing.indexed_feed import FeedCounts
from headrace.runtime.tasks.bounds import check_text
from headrace.store.protocol import NewBatch, RunOutcome

RUNS_SHOWN_MAX: Final = 10_000
"""Most run ids that a batch object lists in `runs`. A batch may hold a thousand times as many; list them by pages."""

PAGE_RUNS: Final = 1_000
ITEMS_BYTES: Final = 256 * 1024
"""Size from which results are sent; those in the object store are fetched one by one."""
MISSING_RANGES: Final = 10

_Text = Annotated[str, Meta(min_length=1, max_length=2_048)]


class TriggerBatchBody(msgspec.Struct, rename="camel"):
    """Body of `POST /api/v3/batches`: the number of runs to follow, in the items of later requests."""

    run_count: Annotated[int, Meta(gt=0)]
    task_identifiers: Annotated[list[_Text], Meta(min_length=1, max_length=10_000)] | None = None
    parent_run_id: _Text | None = None
    resume_parent_on_completion: bool | None = None
    idempotency_key: _Text | None = None
    idempotency_key_options: Any = None


class TriggerBatches:
    """Endpoints of `/api/v?/batches`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """`POST /api/v3/batches`: create a batch. The same idempotency key returns the same batch."""
        service = self._service
        context = await service.authorize(request)
        params = await decode_body(request, service.limits, TriggerBatchBody)
        runs_max = service.limits.batch_runs_max
        if params.run_count > runs_max:
            raise InvalidInput(f"Batch runCount of {params.run_count} exceeds maximum allowed of {runs_max}.")
        for task in params.task_identifiers or ():
            check_text("taskIdentifiers", task)
        if params.resume_parent_on_completion or params.parent_run_id:
            raise Unprocessable(
                "Runs that wait for a batch are not supported yet.", hint="trigger the batch without waiting for it"
            )
        key = _key_of(request, params)
        existing = None if key is None else await context.engine.store.find_batch(context.environment, key)
        if existing is None:
            await service.spend_runs(request, context.environment, params.run_count)
        is_browser = request.headers.get("x-trigger-client") == "browser"
        batch, is_new = await self._create(context, params, key, has_write_token=is_browser)
        is_cached = not is_new and batch.state in (SEALED, COMPLETED)
        if not is_new and not is_cached:
            if batch.is_stopped:
                raise Unprocessable(f"Batch {batch.id} with this idempotency key is {batch.state}.")
            if batch.expected_count != params.run_count:
                raise Unprocessable(
                    f"Cannot create batch as it has already been created with the same idempotency key, for "
                    f"{batch.expected_count} runs, not {params.run_count}."
                )
        if is_new:
            service.metrics.batches.inc()
        body: dict[str, Any] = {"id": batch.id, "runCount": batch.expected_count, "isCached": is_cached}
        if params.idempotency_key is not None:
            body["idempotencyKey"] = params.idempotency_key
        scopes = [f"read:batch:{batch.id}"]
        if is_browser:
            scopes.append(f"write:batch:{batch.id}")
        token, claims = await service.authenticator.issue_token(context.environment, scopes)
        headers = {"x-trigger-jwt": token, "x-trigger-jwt-claims": claims}
        return json_response(body, 202 if is_new else 200, headers)

    async def _create(
        self, context: RequestContext, params: TriggerBatchBody, key: str | None, *, has_write_token: bool
    ) -> tuple[BatchRecord, bool]:
        now_us = context.engine.clock.now_us()
        tasks = sorted(set(params.task_identifiers or ()))
        metadata: dict[str, object] = {}
        if params.idempotency_key is not None:
            metadata["idempotencyKey"] = params.idempotency_key
        if has_write_token and len(tasks) > 1:
            metadata[TASKS_OF_BATCH] = tasks
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=context.environment,
            key=key,
            task=tasks[0] if len(tasks) == 1 else "",
            expected_count=params.run_count,
            metadata=metadata,
            seal_timeout_ms=self._service.limits.seal_timeout_ms,
        )
        return await context.engine.store.create_batch(new, now_us=now_us)

    async def stream(self, request: Request) -> Response:
        """`POST /api/v3/batches/{id}/items`: send items as NDJSON, in any order, in one request or several."""
        batch_id = request.path_params["batch_id"]
        service = self._service
        context = await service.authorize(request, batch_id=batch_id)
        content_type = request.headers.get("content-type", "")
        if "application/x-ndjson" not in content_type and "application/ndjson" not in content_type:
            raise UnsupportedType("Content-Type must be application/x-ndjson or application/ndjson")
        if request.headers.get("content-length") == "0" or not _has_body(request):
            raise InvalidInput("Request body is required")
        try:
            batch, _ = await context.get_batch(batch_id)
        except NotFound:
            await service.spend_request(request, context.principal)
            raise Unprocessable(f"Batch {batch_id} not found") from None
        if not await service.is_exempt_from_limit(context.environment, batch):
            await service.spend_request(request, context.principal)
        if batch.state in (SEALED, COMPLETED):
            return _streamed(batch, FeedCounts())
        _check_open(batch)
        check_accepts_items(batch)
        async with service.stream(context.environment):
            taken = await ingest_items(service, context, request, batch, ignores_unknown=True)
        return _streamed(await seal_if_complete(context, batch, taken), taken)

    async def retrieve(self, request: Request) -> Response:
        """`GET /api/v1/batches/{id}` and `/api/v2/…`: return the batch and the ids of its runs."""
        batch_id = request.path_params["batch_id"]
        context = await self._service.authorize(request, batch_id=batch_id)
        batch = await _get_batch(context, batch_id)
        fields = trigger_batch(batch)
        is_filled = batch.state != OPEN and batch.received_count <= RUNS_SHOWN_MAX
        fields["runs"] = [run_id(batch.id, index) for index in range(batch.received_count)] if is_filled else []
        if request.url.path.startswith("/api/v2"):
            fields["processing"] = {"errors": []}
            if batch.sealed_us:
                fields["processingCompletedAt"] = trigger_batch(batch)["updatedAt"]
                fields["processing"]["completedAt"] = fields["processingCompletedAt"]
        else:
            fields |= {"successfulRunCount": batch.received_count, "failedRunCount": 0}
        return json_response(fields)

    async def results(self, request: Request) -> Response:
        """`GET /api/v1/batches/{id}/results`: return the results of finished runs, in index order."""
        batch_id = request.path_params["batch_id"]
        context = await self._service.authorize(request, batch_id=batch_id)
        batch = await _get_batch(context, batch_id, "Batch not found")
        return StreamingResponse(self._results(context, batch), media_type="application/json")

    async def _results(self, context: RequestContext, batch: BatchRecord) -> AsyncIterator[bytes]:
        outputs = ResultResolver(context)
        yield b'{"id":"%s","items":[' % batch.id.encode()
        between = b""
        bound = batch.received_count if batch.expected_count is None else batch.expected_count
        start = 0
        while start < bound:
            outcomes = await context.engine.store.outcomes(batch.id, start, PAGE_RUNS, passing=True)
            tasks = await _tasks_of(context, batch, outcomes)
            start = outcomes[-1].index + 1 if outcomes else start + PAGE_RUNS  # large results make a page short
            items: list[bytes] = []
            held_bytes = 0
            for outcome in outcomes:
                fields: dict[str, Any] = {
                    "id": run_id(batch.id, outcome.index),
                    "taskIdentifier": tasks.get(outcome.index, batch.task),
                }
                resolved = await outputs.resolve(outcome)
                if resolved is None or resolved.state == run.EXPIRED:
                    continue
                if resolved.state == run.COMPLETED:
                    text, kind = await outputs.output_text(resolved)
                    fields |= {"ok": True, "output": text, "outputType": kind}
                else:
                    failure = decode(resolved.result) if resolved.result else None
                    fields |= {"ok": False, "error": trigger_error(failure, run.NAMES[resolved.state])}
                items.append(msgspec.json.encode(fields))
                held_bytes += len(items[-1])
                if held_bytes >= ITEMS_BYTES:
                    yield between + b",".join(items)
                    between, items, held_bytes = b",", [], 0
            if items:
                yield between + b",".join(items)
                between = b","
        yield b"]}"


async def _tasks_of(context: RequestContext, batch: BatchRecord, outcomes: Sequence[RunOutcome]) -> dict[int, str]:
    """Return the tasks of some runs by index. A listing may need several pages, as runs with large errors do."""
    tasks: dict[int, str] = {}
    if not outcomes:
        return tasks
    first, last = outcomes[0].index, outcomes[-1].index
    after = (batch.id, first - 1)
    while after[1] < last:
        views = await context.engine.store.runs(
            context.environment, batch_id=batch.id, after=after, limit=min(PAGE_RUNS, last - after[1])
        )
        if not views:
            break
        tasks |= {view.index: view.task for view in views}
        after = (batch.id, views[-1].index)
    return tasks


def _streamed(batch: BatchRecord, taken: FeedCounts) -> Response:
    is_sealed = batch.state in (SEALED, COMPLETED)
    body: dict[str, Any] = {
        "id": batch.id,
        "itemsAccepted": taken.accepted_count,
        "itemsDeduplicated": taken.duplicates_count,
        "sealed": is_sealed,
        "runCount": batch.expected_count,
    }
    if not is_sealed:
        body |= {"enqueuedCount": batch.received_count, "expectedCount": batch.expected_count}
    if taken.conflicts:
        body["conflicts"] = taken.conflicts[:100]
    return json_response(body)


def _check_open(batch: BatchRecord) -> None:
    if batch.is_stopped:
        raise Unprocessable(f"Batch {batch.id} is not in PENDING status (current: ABORTED)", batch_id=batch.id)


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def _key_of(request: Request, params: TriggerBatchBody) -> str | None:
    """Return the key that makes the request repeatable: the client's, or one for this request and its retries."""
    if params.idempotency_key is not None:
        if "\0" in params.idempotency_key:
            raise InvalidInput("idempotencyKey: expected a key without NUL characters")
        return params.idempotency_key
    request_key = request.headers.get("x-trigger-request-idempotency-key")
    return f"request:{request_key[:200]}" if request_key else None


async def _get_batch(context: RequestContext, batch_id: str, message: str = "Not found") -> BatchRecord:
    try:
        return (await context.get_batch(batch_id))[0]
    except NotFound:
        raise NotFound(message, batch_id=batch_id) from None

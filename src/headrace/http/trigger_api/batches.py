"""Batches as the field's clients know them: created in one request, streamed in another, read while they run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import run
from headrace.core.batch import COMPLETED, OPEN, SEALED, Batch
from headrace.core.failure import decode
from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.ids import new_batch_id, run_id
from headrace.http.requests.batch_items import check_accepts_items, ingest_items, seal_if_complete
from headrace.http.requests.error_responses import Unprocessable, UnsupportedType, json_response
from headrace.http.requests.request_body import decode_body
from headrace.http.requests.result_resolver import ResultResolver
from headrace.http.requests.serializers import trigger_batch, trigger_error
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.producing.indexed_feed import FeedCounts
from headrace.store.protocol import NewBatch

RUNS_SHOWN_MAX: Final = 10_000
"""Ids in a batch's `runs`: a batch may hold a thousand times as many, which are listed by pages."""

PAGE_RUNS: Final = 1_000
MISSING_RANGES: Final = 10

_Text = Annotated[str, Meta(min_length=1, max_length=2_048)]


class CreateBatch(msgspec.Struct, rename="camel"):
    """The first phase: how many runs are to come."""

    run_count: Annotated[int, Meta(gt=0)]
    task_identifiers: Annotated[list[_Text], Meta(min_length=1, max_length=10_000)] | None = None
    parent_run_id: _Text | None = None
    resume_parent_on_completion: bool | None = None
    idempotency_key: _Text | None = None
    idempotency_key_options: Any = None


class Batches:
    """The endpoints of `/api/v?/batches`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """`POST /api/v3/batches`: a batch to stream into; the same key answers the same one."""
        service = self._service
        call = await service.authorize(request, "batches:write")
        wish = await decode_body(request, service.limits, CreateBatch)
        most = service.limits.batch_runs_max
        if wish.run_count > most:
            raise InvalidInput(f"Batch runCount of {wish.run_count} exceeds maximum allowed of {most}.")
        if wish.resume_parent_on_completion or wish.parent_run_id:
            raise Unprocessable("Runs that wait for a batch are not supported yet.", hint="trigger without waiting")
        key = _key_of(request, wish)
        known = None if key is None else await call.engine.store.find_batch(call.environment, key)
        if known is None:
            await service.spend_runs(request, call.environment, wish.run_count)
        batch, is_new = await self._create(call, wish, key)
        is_cached = not is_new and batch.state in (SEALED, COMPLETED)
        if not is_new and not is_cached:
            if batch.is_stopped:
                raise Unprocessable(f"Batch {batch.id}, which has this idempotency key, is {batch.state}.")
            if batch.expected_count != wish.run_count:
                raise Unprocessable(
                    f"Cannot create batch as it has already been created with the same idempotency key, for "
                    f"{batch.expected_count} runs and not for {wish.run_count}."
                )
        if is_new:
            service.metrics.batches.inc()
        body: dict[str, Any] = {"id": batch.id, "runCount": batch.expected_count, "isCached": is_cached}
        if wish.idempotency_key is not None:
            body["idempotencyKey"] = wish.idempotency_key
        scopes = [f"read:batch:{batch.id}"]
        if request.headers.get("x-trigger-client") == "browser":
            scopes.append(f"write:batch:{batch.id}")
        token, claims = await service.authenticator.issue_token(call.environment, scopes)
        headers = {"x-trigger-jwt": token, "x-trigger-jwt-claims": claims}
        return json_response(body, 202 if is_new else 200, headers)

    async def _create(self, call: RequestContext, wish: CreateBatch, key: str | None) -> tuple[Batch, bool]:
        now_us = call.engine.clock.now_us()
        tasks = sorted(set(wish.task_identifiers or ()))
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=call.environment,
            key=key,
            task=tasks[0] if len(tasks) == 1 else "",
            expected_count=wish.run_count,
            metadata={} if wish.idempotency_key is None else {"idempotencyKey": wish.idempotency_key},
            seal_timeout_ms=self._service.limits.seal_timeout_ms,
        )
        return await call.engine.store.create_batch(new, now_us=now_us)

    async def stream(self, request: Request) -> Response:
        """`POST /api/v3/batches/{id}/items`: the second phase, items as NDJSON, in any order, as often as needed."""
        batch_id = request.path_params["batch_id"]
        service = self._service
        call = await service.authorize(request, "batches:write", batch_id=batch_id, is_free=True)
        content_type = request.headers.get("content-type", "")
        if "application/x-ndjson" not in content_type and "application/ndjson" not in content_type:
            raise UnsupportedType("Content-Type must be application/x-ndjson or application/ndjson")
        if request.headers.get("content-length") == "0" or not _has_body(request):
            raise InvalidInput("Request body is required")
        try:
            batch, _ = await call.get_batch(batch_id)
        except NotFound:
            await service.spend_request(request, call.principal)
            raise Unprocessable(f"Batch {batch_id} not found") from None
        if not await service.is_exempt_from_limit(call.environment, batch):
            await service.spend_request(request, call.principal)
        if batch.state in (SEALED, COMPLETED):
            return _streamed(batch, FeedCounts())
        _check_open(batch)
        check_accepts_items(batch)
        async with service.stream():
            taken = await ingest_items(service, call, request, batch)
        return _streamed(await seal_if_complete(call, batch, taken), taken)

    async def retrieve(self, request: Request) -> Response:
        """`GET /api/v1/batches/{id}` and `/api/v2/…`."""
        batch_id = request.path_params["batch_id"]
        call = await self._service.authorize(request, "batches:read", batch_id=batch_id)
        batch = await _found(call, batch_id)
        shown = trigger_batch(batch)
        is_filled = batch.state != OPEN and batch.received_count <= RUNS_SHOWN_MAX
        shown["runs"] = [run_id(batch.id, index) for index in range(batch.received_count)] if is_filled else []
        if request.url.path.startswith("/api/v2"):
            shown["processing"] = {"errors": []}
            if batch.sealed_us:
                shown["processingCompletedAt"] = trigger_batch(batch)["updatedAt"]
                shown["processing"]["completedAt"] = shown["processingCompletedAt"]
        else:
            shown |= {"successfulRunCount": batch.received_count, "failedRunCount": 0}
        return json_response(shown)

    async def results(self, request: Request) -> Response:
        """`GET /api/v1/batches/{id}/results`: what has finished, in order."""
        batch_id = request.path_params["batch_id"]
        call = await self._service.authorize(request, "batches:read", batch_id=batch_id)
        batch = await _found(call, batch_id, "Batch not found")
        return StreamingResponse(self._results(call, batch), media_type="application/json")

    async def _results(self, call: RequestContext, batch: Batch) -> AsyncIterator[bytes]:
        outputs = ResultResolver(call)
        yield b'{"id":"%s","items":[' % batch.id.encode()
        between = b""
        bound = batch.received_count if batch.expected_count is None else batch.expected_count
        after: tuple[str, int] | None = None
        for start in range(0, bound, PAGE_RUNS):
            outcomes = await call.engine.store.outcomes(batch.id, start, PAGE_RUNS, passing=True)
            views = await call.engine.store.runs(call.environment, batch_id=batch.id, after=after, limit=PAGE_RUNS)
            tasks = {view.index: view.task for view in views}
            after = (batch.id, start + PAGE_RUNS - 1)
            items = []
            for one in outcomes:
                shown = {"id": run_id(batch.id, one.index), "taskIdentifier": tasks.get(one.index, batch.task)}
                own = await outputs.resolve(one)
                if own is None or own.state == run.EXPIRED:
                    continue
                if own.state == run.COMPLETED:
                    text, kind = await outputs.output_text(own)
                    items.append(shown | {"ok": True, "output": text, "outputType": kind})
                else:
                    failure = decode(own.result) if own.result else None
                    items.append(shown | {"ok": False, "error": trigger_error(failure, run.NAMES[own.state])})
            if items:
                yield between + b",".join(map(msgspec.json.encode, items))
                between = b","
        yield b"]}"


def _streamed(batch: Batch, taken: FeedCounts) -> Response:
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


def _check_open(batch: Batch) -> None:
    if batch.is_stopped:
        raise Unprocessable(f"Batch {batch.id} is not in PENDING status (current: ABORTED)", batch_id=batch.id)


def _has_body(request: Request) -> bool:
    return "content-length" in request.headers or "transfer-encoding" in request.headers


def _key_of(request: Request, wish: CreateBatch) -> str | None:
    """The key that makes a create repeatable: the caller's, or that of the one request and its retries."""
    if wish.idempotency_key is not None:
        if "\0" in wish.idempotency_key:
            raise InvalidInput("an idempotency key holds no NUL character")
        return wish.idempotency_key
    own = request.headers.get("x-trigger-request-idempotency-key")
    return f"request:{own[:200]}" if own else None


async def _found(call: RequestContext, batch_id: str, said: str = "Not found") -> Batch:
    try:
        return (await call.get_batch(batch_id))[0]
    except NotFound:
        raise NotFound(said, batch_id=batch_id) from None

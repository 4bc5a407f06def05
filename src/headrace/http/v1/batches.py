"""Batches in `/v1`: ingestion, missing ranges, results as they arrive, progress events, cancel and redrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import pack, run
from headrace.core.batch import CANCELLED
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import INDEX_MAX, check_batch_id, new_batch_id
from headrace.http.requests.batch_items import check_accepts_items, ingest_items, seal_if_complete
from headrace.http.requests.error_responses import UnsupportedType, json_response
from headrace.http.requests.request_body import decode_body, parse_int
from headrace.http.requests.result_resolver import ResultResolver
from headrace.http.requests.serializers import result_line
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.bounds import check_name
from headrace.store.projections import check_batch_state
from headrace.store.protocol import NewBatch, RunOutcome
from headrace.views import BatchView, batch_view, full_batch_view

PAGE_RUNS: Final = 4_096
LINES_BYTES: Final = 256 * 1024
"""Size from which lines of results are sent; results in the object store are fetched one by one."""
RANGES_MAX: Final = 1_000
REDRIVEN_MAX: Final = 1_000
KEEPALIVE_S: Final = 10.0
"""Seconds between keep-alive lines on a stream without new data."""

NDJSON: Final = "application/x-ndjson"


class BatchBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /v1/batches`. Without `run_count` the batch stays open until it is sealed."""

    run_count: Annotated[int, Meta(ge=0)] | None = None
    key: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    task: Annotated[str, Meta(max_length=200)] = ""
    metadata: dict[str, Any] = {}
    seal_timeout_ms: Annotated[int, Meta(ge=1_000, le=365 * 86_400_000)] | None = None


class SealBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `…/seal`: the final number of runs of an open-ended batch."""

    run_count: Annotated[int, Meta(ge=0, le=INDEX_MAX)] | None = None


class RedriveBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `…/redrive`: the runs to execute again; by default all that failed."""

    indexes: Annotated[list[Annotated[int, Meta(ge=0, le=INDEX_MAX)]], Meta(max_length=REDRIVEN_MAX)] | None = None


class BatchListResponse(msgspec.Struct):
    """One page of batches. `next`: the value of `before` for the next page, None on the last one."""

    batches: list[BatchView]
    next: str | None


class ItemsResponse(msgspec.Struct):
    """Result of a stream of items. `conflicts`: indexes already stored with different content, at most 100."""

    id: str
    accepted: int
    duplicates: int
    conflicts: list[int]
    received: int
    state: str


class MissingResponse(msgspec.Struct):
    """Index ranges that are not stored yet, each as first and last index. `more`: there are further ranges."""

    id: str
    received: int
    expected: int | None
    ranges: list[tuple[int, int]]
    more: bool


class RedriveResponse(msgspec.Struct):
    """Number of runs that are executed again."""

    id: str
    redriven: int


class V1Batches:
    """Endpoints of `/v1/batches`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """`POST /v1/batches`: create a batch, with or without a known number of runs."""
        service = self._service
        context = await service.authorize(request)
        params = await decode_body(request, service.limits, BatchBody)
        if params.key is not None:
            check_name("key", params.key)
        if params.task:
            check_name("task", params.task)
        if len(msgspec.json.encode(params.metadata)) > service.limits.metadata_bytes_max:
            raise InvalidInput(f"expected metadata of at most {service.limits.metadata_bytes_max} bytes")
        existing = (
            None if params.key is None else await context.engine.store.find_batch(context.environment, params.key)
        )
        if existing is None and params.run_count:
            await service.spend_runs(request, context.environment, params.run_count)
        now_us = context.engine.clock.now_us()
        timeout_ms = service.limits.seal_timeout_ms if params.seal_timeout_ms is None else params.seal_timeout_ms
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=context.environment,
            key=params.key,
            task=params.task,
            expected_count=params.run_count,
            metadata=params.metadata,
            seal_timeout_ms=timeout_ms,
        )
        batch, is_new = await context.engine.store.create_batch(new, now_us=now_us)
        if is_new:
            service.metrics.batches.inc()
        return await self._batch_response(context, batch.id, 201 if is_new else 200)

    async def index(self, request: Request) -> Response:
        """`GET /v1/batches`: list batches by pages, newest first."""
        context = await self._service.authorize(request)
        query = request.query_params
        limit = parse_int(query.get("limit"), 50, "limit", 1, 200)
        before = check_batch_id(query["before"]) if query.get("before") else ""
        states = [state for state in query.get("state", "").split(",") if state] or None
        for state in states or ():
            check_batch_state(state)
        rows = await context.engine.store.batches(context.environment, states=states, before_id=before, limit=limit)
        batches = [batch_view(batch, ledger) for batch, ledger in rows]
        has_more = len(batches) == limit
        if batches and not has_more:  # a page may have fewer entries, if they are large
            before = batches[-1].id
            has_more = bool(
                await context.engine.store.batches(context.environment, states=states, before_id=before, limit=1)
            )
        return json_response(BatchListResponse(batches, batches[-1].id if has_more else None))

    async def retrieve(self, request: Request) -> Response:
        """`GET /v1/batches/{id}`: return a batch and the number of its runs in each state."""
        context = await self._call(request)
        return await self._batch_response(context, request.path_params["batch_id"])

    async def stream(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/items`: send items as NDJSON. A batch without `run_count` stays open."""
        context = await self._call(request)
        if "ndjson" not in request.headers.get("content-type", ""):
            raise UnsupportedType(
                "expected items as application/x-ndjson", hint="set Content-Type: application/x-ndjson"
            )
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        check_accepts_items(batch)
        if not await self._service.is_exempt_from_limit(context.environment, batch):
            await self._service.spend_request(request, context.principal)
        async with self._service.stream(context.environment):
            taken = await ingest_items(self._service, context, request, batch)
        after = await seal_if_complete(context, batch, taken)
        response = ItemsResponse(
            id=batch.id,
            accepted=taken.accepted_count,
            duplicates=taken.duplicates_count,
            conflicts=taken.conflicts[:100],
            received=after.received_count,
            state=after.state,
        )
        return json_response(response)

    async def missing(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/missing`: return the index ranges not yet stored, each as `[first, last]`."""
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        ranges_max = parse_int(request.query_params.get("ranges"), RANGES_MAX, "ranges", 1, RANGES_MAX)
        ranges = await context.engine.store.missing(batch.id, ranges_max + 1)
        response = MissingResponse(
            id=batch.id,
            received=batch.received_count,
            expected=batch.expected_count,
            ranges=[(start, end - 1) for start, end in ranges[:ranges_max]],
            more=len(ranges) > ranges_max,
        )
        return json_response(response)

    async def seal(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/seal`: seal a batch, so that it accepts no more items. 409 while items are missing."""
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        params = await _optional_body(request, self._service, SealBody)
        await context.engine.store.seal(batch.id, params.run_count, now_us=context.engine.clock.now_us())
        context.engine.recorded.notify()
        return await self._batch_response(context, batch.id)

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/cancel`: cancel waiting runs and notify the workers of running ones."""
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        await context.engine.stop_batch(batch.id, CANCELLED)
        return await self._batch_response(context, batch.id)

    async def redrive(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/redrive`: run failed runs, or those at given indexes, again from attempt 1."""
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        params = await _optional_body(request, self._service, RedriveBody)
        count = await context.engine.store.redrive(batch.id, params.indexes)
        context.engine.wakeup.notify()
        return json_response(RedriveResponse(batch.id, count))

    async def results(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/results?from=`: stream one line for each run, in index order, as soon as it has ended.

        The stream ends with the batch, or after `limit` lines; with `wait=0` it ends at the first run that has not
        ended. Blank lines keep the connection alive.
        """
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        query = request.query_params
        first = parse_int(query.get("from"), 0, "from", 0, INDEX_MAX)
        limit = parse_int(query.get("limit"), INDEX_MAX, "limit", 1, INDEX_MAX)
        waits = parse_int(query.get("wait"), 1, "wait", 0, 1) == 1
        return StreamingResponse(self._lines(context, batch.id, first, limit, waits=waits), media_type=NDJSON)

    async def _lines(
        self, context: RequestContext, batch_id: str, first: int, left: int, *, waits: bool
    ) -> AsyncIterator[bytes]:
        store, outputs = context.engine.store, ResultResolver(context)
        watch = OutcomeWatch(context.engine, self._service)
        while left:
            watch.mark()
            # read before the outcomes: if the batch is finished then, the outcomes are complete
            batch, _ = await store.batch(batch_id)
            page = await store.outcomes(batch_id, first, min(PAGE_RUNS, left))
            lines: list[bytes] = []
            held_bytes = lines_count = 0
            for outcome in page:
                line: bytes | None
                if not outcome.kind or outcome.state != run.COMPLETED:
                    line = result_line(batch_id, outcome)
                else:
                    line = await _resolved_line(outputs, batch_id, outcome)
                    if line is None:
                        break
                lines.append(line)
                lines_count += 1
                held_bytes += len(line)
                first = outcome.index + 1
                if held_bytes >= LINES_BYTES:  # a slow reader holds no more than this and the page
                    yield b"".join(lines)
                    lines, held_bytes = [], 0
            left -= lines_count
            if lines:
                yield b"".join(lines)
            if lines_count:
                continue
            if not waits or (batch.is_finished and not page):
                return
            if await watch.wait_for_change():
                yield b"\n"
            elif self._service.is_draining:
                return

    async def events(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/events`: stream the progress as server-sent events, until the batch has ended."""
        context = await self._call(request)
        batch, _ = await context.get_batch(request.path_params["batch_id"])
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(context, batch.id), media_type="text/event-stream", headers=headers)

    async def _events(self, context: RequestContext, batch_id: str) -> AsyncIterator[bytes]:
        watch = OutcomeWatch(context.engine, self._service)
        sent = b""
        while True:
            watch.mark()
            batch, ledger = await context.engine.store.batch(batch_id)
            state = msgspec.json.encode(batch_view(batch, ledger))
            if state != sent:
                sent = state
                yield b"event: %s\ndata: %s\n\n" % (b"end" if batch.is_finished else b"progress", state)
            if batch.is_finished:
                return
            if await watch.wait_for_change():
                yield b": beat\n\n"
            elif self._service.is_draining:
                yield b"retry: 1000\n\n"
                return

    async def _call(self, request: Request) -> RequestContext:
        return await self._service.authorize(request, batch_id=request.path_params["batch_id"])

    async def _batch_response(self, context: RequestContext, batch_id: str, status: int = 200) -> Response:
        view = await full_batch_view(context.engine, *await context.get_batch(batch_id))
        return json_response(view, status)


class OutcomeWatch:
    """Waits for new outcomes, and reports when a keep-alive is due."""

    def __init__(self, engine: Engine, service: Service) -> None:
        self._engine = engine
        self._service = service
        self._rings_count = 0
        self._idle_s = 0.0

    def mark(self) -> None:
        """Remember the notifications received so far. Called before the store is queried."""
        self._rings_count = self._engine.recorded.notified_count

    async def wait_for_change(self) -> bool:
        """Wait for a notification, a poll interval or the end of the server. Returns True if a keep-alive is due."""
        wait_s = min(self._engine.limits.poll_interval_ms / 1_000, KEEPALIVE_S)
        recorded = self._engine.recorded
        waiting = [
            asyncio.ensure_future(recorded.wait(self._engine.clock, wait_s, since=self._rings_count)),
            asyncio.ensure_future(self._service.draining.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if self._service.is_draining:
            return False
        self._idle_s += wait_s
        if self._idle_s < KEEPALIVE_S:
            return False
        self._idle_s = 0.0
        return True


async def _resolved_line(outputs: ResultResolver, batch_id: str, outcome: RunOutcome) -> bytes | None:
    """Encode the line of an outcome that is stored elsewhere or is no JSON; None while the run it links to has not
    ended.
    """
    resolved = await outputs.resolve(outcome)
    if resolved is None:
        return None
    if resolved.state != run.COMPLETED:
        return result_line(batch_id, resolved)
    data, kind = await outputs.output_bytes(resolved)
    if kind == pack.TEXT:
        data = msgspec.json.encode(data.decode("utf-8", "replace"))
    return result_line(batch_id, resolved, data)


async def _optional_body(request: Request, service: Service, kind: Any) -> Any:
    """Decode an optional body."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return kind()
    return await decode_body(request, service.limits, kind)

"""Batches of our own API: what is missing, results while they come, progress, and a person's interventions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from headrace.core import pack, run
from headrace.core.batch import CANCELLED, STATES
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import INDEX_MAX, check_batch_id, new_batch_id
from headrace.http.requests.batch_items import check_accepts_items, ingest_items, seal_if_complete
from headrace.http.requests.error_responses import UnsupportedType, json_response
from headrace.http.requests.request_body import decode_body, parse_int
from headrace.http.requests.result_resolver import ResultResolver
from headrace.http.requests.serializers import result_line, v1_batch
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.bounds import check_name
from headrace.store.protocol import NewBatch, Outcome

PAGE_RUNS: Final = 4_096
RANGES_MAX: Final = 1_000
REDRIVEN_MAX: Final = 1_000
BEAT_S: Final = 10.0
"""Between two signs of life on a stream that has no news."""

NDJSON: Final = "application/x-ndjson"


class Create(msgspec.Struct, forbid_unknown_fields=True):
    """A batch of our own API; without a `run_count` it is sealed by whoever knows it in the end."""

    run_count: Annotated[int, Meta(ge=0)] | None = None
    key: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    task: Annotated[str, Meta(max_length=200)] = ""
    metadata: dict[str, Any] = {}
    seal_timeout_ms: Annotated[int, Meta(ge=1_000, le=365 * 86_400_000)] | None = None


class Seal(msgspec.Struct, forbid_unknown_fields=True):
    """The final count of an open-ended batch."""

    run_count: Annotated[int, Meta(ge=0, le=INDEX_MAX)] | None = None


class Redrive(msgspec.Struct, forbid_unknown_fields=True):
    """Which runs to send round again; all that failed without any."""

    indexes: Annotated[list[Annotated[int, Meta(ge=0, le=INDEX_MAX)]], Meta(max_length=REDRIVEN_MAX)] | None = None


class Ledgers:
    """The endpoints of `/v1/batches`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """`POST /v1/batches`: a batch to stream into, of a count that is announced or not yet known."""
        service = self._service
        call = await service.authorize(request, "batches:write")
        wish = await decode_body(request, service.limits, Create)
        if wish.key is not None:
            check_name("key", wish.key)
        if wish.task:
            check_name("task", wish.task)
        if len(msgspec.json.encode(wish.metadata)) > service.limits.metadata_bytes_max:
            raise InvalidInput(f"metadata has at most {service.limits.metadata_bytes_max} bytes")
        known = None if wish.key is None else await call.engine.store.find_batch(call.environment, wish.key)
        if known is None and wish.run_count:
            await service.spend_runs(request, call.environment, wish.run_count)
        now_us = call.engine.clock.now_us()
        timeout_ms = service.limits.seal_timeout_ms if wish.seal_timeout_ms is None else wish.seal_timeout_ms
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=call.environment,
            key=wish.key,
            task=wish.task,
            expected_count=wish.run_count,
            metadata=wish.metadata,
            seal_timeout_ms=timeout_ms,
        )
        batch, is_new = await call.engine.store.create_batch(new, now_us=now_us)
        if is_new:
            service.metrics.batches.inc()
        return await self._told(call, batch.id, 201 if is_new else 200)

    async def index(self, request: Request) -> Response:
        """`GET /v1/batches`: newest first, by pages."""
        call = await self._service.authorize(request, "batches:read")
        query = request.query_params
        limit = parse_int(query.get("limit"), 50, "limit", 1, 200)
        before = check_batch_id(query["before"]) if query.get("before") else ""
        states = [state for state in query.get("state", "").split(",") if state] or None
        if states and (unknown := set(states) - set(STATES)):
            raise InvalidInput(f"{', '.join(sorted(unknown))} is not a state of a batch", hint=", ".join(STATES))
        found = await call.engine.store.batches(call.environment, states=states, before_id=before, limit=limit)
        shown = [v1_batch(batch, ledger) for batch, ledger in found]
        return json_response({"batches": shown, "next": shown[-1]["id"] if len(shown) == limit else None})

    async def retrieve(self, request: Request) -> Response:
        """`GET /v1/batches/{id}`: where its runs are."""
        call = await self._call(request, "batches:read")
        return await self._told(call, request.path_params["batch_id"])

    async def stream(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/items`: items as NDJSON; a batch without an announced count stays open."""
        call = await self._call(request, "batches:write", is_free=True)
        if "ndjson" not in request.headers.get("content-type", ""):
            raise UnsupportedType("items are application/x-ndjson", hint="set Content-Type")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        check_accepts_items(batch)
        if not await self._service.is_exempt_from_limit(call.environment, batch):
            await self._service.spend_request(request, call.principal)
        async with self._service.stream():
            taken = await ingest_items(self._service, call, request, batch)
        after = await seal_if_complete(call, batch, taken)
        body = {
            "id": batch.id,
            "accepted": taken.accepted_count,
            "duplicates": taken.duplicates_count,
            "conflicts": taken.conflicts[:100],
            "received": after.received_count,
            "state": after.state,
        }
        return json_response(body)

    async def missing(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/missing`: index ranges that are not durable yet, `[first, last]` each."""
        call = await self._call(request, "batches:read")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        ranges_max = parse_int(request.query_params.get("ranges"), RANGES_MAX, "ranges", 1, RANGES_MAX)
        found = await call.engine.store.missing(batch.id, ranges_max + 1)
        body = {
            "id": batch.id,
            "received": batch.received_count,
            "expected": batch.expected_count,
            "ranges": [[start, end - 1] for start, end in found[:ranges_max]],
            "more": len(found) > ranges_max,
        }
        return json_response(body)

    async def seal(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/seal`: no more items come; 409 while any is missing."""
        call = await self._call(request, "batches:write")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        wish = await _optional(request, self._service, Seal)
        await call.engine.store.seal(batch.id, wish.run_count, now_us=call.engine.clock.now_us())
        call.engine.recorded.notify()
        return await self._told(call, batch.id)

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/cancel`: what waits is cancelled, what is under way is told."""
        call = await self._call(request, "batches:write")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        await call.engine.store.stop_batch(batch.id, CANCELLED, now_us=call.engine.clock.now_us())
        call.engine.recorded.notify()
        return await self._told(call, batch.id)

    async def redrive(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/redrive`: what failed, or the runs at some indexes, from their first attempt."""
        call = await self._call(request, "batches:write")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        wish = await _optional(request, self._service, Redrive)
        count = await call.engine.store.redrive(batch.id, wish.indexes)
        call.engine.wakeup.notify()
        return json_response({"id": batch.id, "redriven": count})

    async def results(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/results?from=`: a line a run, in index order, each as soon as it has ended.

        Ends with the batch, or after `limit` lines; `wait=0` ends at the first run that has not ended. Blank lines are
        signs of life.
        """
        call = await self._call(request, "batches:read")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        query = request.query_params
        first = parse_int(query.get("from"), 0, "from", 0, INDEX_MAX)
        limit = parse_int(query.get("limit"), INDEX_MAX, "limit", 1, INDEX_MAX)
        waits = parse_int(query.get("wait"), 1, "wait", 0, 1) == 1
        return StreamingResponse(self._lines(call, batch.id, first, limit, waits=waits), media_type=NDJSON)

    async def _lines(
        self, call: RequestContext, batch_id: str, first: int, left: int, *, waits: bool
    ) -> AsyncIterator[bytes]:
        store, outputs = call.engine.store, ResultResolver(call)
        news = News(call.engine, self._service)
        while left:
            news.look()
            batch, _ = await store.batch(batch_id)  # before the outcomes: a finished one has them all
            page = await store.outcomes(batch_id, first, min(PAGE_RUNS, left))
            lines: list[bytes] = []
            for one in page:
                if not one.kind or one.state != run.COMPLETED:
                    lines.append(result_line(batch_id, one))
                    continue
                line = await _followed(outputs, batch_id, one)
                if line is None:
                    break
                lines.append(line)
            if lines:
                first = page[len(lines) - 1].index + 1
                left -= len(lines)
                yield b"".join(lines)
            elif not waits or (batch.is_finished and not page):
                return
            elif await news.turn():
                yield b"\n"
            elif self._service.is_draining:
                return

    async def events(self, request: Request) -> Response:
        """`GET /v1/batches/{id}/events`: progress as server-sent events, until the batch has ended."""
        call = await self._call(request, "batches:read")
        batch, _ = await call.get_batch(request.path_params["batch_id"])
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(call, batch.id), media_type="text/event-stream", headers=headers)

    async def _events(self, call: RequestContext, batch_id: str) -> AsyncIterator[bytes]:
        news = News(call.engine, self._service)
        told = b""
        while True:
            news.look()
            batch, ledger = await call.engine.store.batch(batch_id)
            shown = msgspec.json.encode(v1_batch(batch, ledger))
            if shown != told:
                told = shown
                yield b"event: %s\ndata: %s\n\n" % (b"end" if batch.is_finished else b"progress", shown)
            if batch.is_finished:
                return
            if await news.turn():
                yield b": beat\n\n"
            elif self._service.is_draining:
                yield b"retry: 1000\n\n"
                return

    async def _call(self, request: Request, scope: str, *, is_free: bool = False) -> RequestContext:
        batch_id = request.path_params["batch_id"]
        return await self._service.authorize(request, scope, batch_id=batch_id, is_free=is_free)

    async def _told(self, call: RequestContext, batch_id: str, status: int = 200) -> Response:
        return json_response(v1_batch(*await call.get_batch(batch_id)), status)


class News:
    """Waits for news of outcomes, and says when a peer should see that it is still there."""

    def __init__(self, engine: Engine, service: Service) -> None:
        self._engine = engine
        self._service = service
        self._rings_count = 0
        self._silent_s = 0.0

    def look(self) -> None:
        """Before the store is asked."""
        self._rings_count = self._engine.recorded.notified_count

    async def turn(self) -> bool:
        """Wait a poll interval, or for a ring, or the server's end; True when a sign of life is due."""
        wait_s = min(self._engine.limits.poll_interval_ms / 1_000, BEAT_S)
        recorded = self._engine.recorded
        waiting = [
            asyncio.ensure_future(recorded.wait(self._engine.clock, wait_s, since=self._rings_count)),
            asyncio.ensure_future(self._service.draining.wait()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        if self._service.is_draining:
            return False
        self._silent_s += wait_s
        if self._silent_s < BEAT_S:
            return False
        self._silent_s = 0.0
        return True


async def _followed(outputs: ResultResolver, batch_id: str, one: Outcome) -> bytes | None:
    """The line of an outcome that is elsewhere, or no JSON; None while the run it links to has not ended."""
    own = await outputs.resolve(one)
    if own is None:
        return None
    if own.state != run.COMPLETED:
        return result_line(batch_id, own)
    data, kind = await outputs.output_bytes(own)
    if kind == pack.TEXT:
        data = msgspec.json.encode(data.decode("utf-8", "replace"))
    return result_line(batch_id, own, data)


async def _optional(request: Request, service: Service, kind: Any) -> Any:
    """A body that may be left out."""
    if request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return kind()
    return await decode_body(request, service.limits, kind)

"""Single runs in trigger.dev's API: read, listed, cancelled, replayed."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from headrace.core import pack, run
from headrace.core.batch import BatchRecord
from headrace.core.block import Extra
from headrace.core.failure import decode
from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.ids import check_batch_id, parse_run_id, run_id
from headrace.http.requests.error_responses import json_response
from headrace.http.requests.item_codec import parse_duration_s
from headrace.http.requests.request_body import parse_int
from headrace.http.requests.result_resolver import ResultResolver
from headrace.http.requests.serializers import STATES_OF_STATUS, json_value, run_status, trigger_error, trigger_run
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.tasks.bounds import check_text
from headrace.store.protocol import RunOutcome, RunRecord

PAGE_MAX: Final = 100
PAGE: Final = 25
SCANNED_PAGES_MAX: Final = 50
"""Pages scanned for filters without an index before a listing ends early; the client continues with the cursor."""

FAILURES: Final = {status for status, states in STATES_OF_STATUS.items() if "failed" in states}
_UNSUPPORTED: Final = ("version", "bulkAction", "schedule", "machine", "region")


class TriggerRuns:
    """Endpoints of `/api/v?/runs`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def retrieve(self, request: Request) -> Response:
        """`GET /api/v3/runs/{id}`: return a run with its payload and output."""
        context, record, batch = await self._get_run(request)
        fields = trigger_run(record, batch)
        if record.payload or record.kind == pack.TEXT:
            data, kind = await self._content(context, record.payload, record.kind)
            fields["payload"] = json_value(data, kind)
        if record.state == "completed":
            data, kind = await self._content(context, record.result, record.result_kind)
            fields["output"] = json_value(data, kind)
        return json_response(fields)

    async def result(self, request: Request) -> Response:
        """`GET /api/v1/runs/{id}/result`: return the result of a finished run."""
        context, record, _ = await self._get_run(request)
        state = run.BY_NAME.get(record.state, run.WAITING)
        if state not in run.FINAL:
            raise NotFound("Run either doesn't exist or is not finished")
        fields: dict[str, Any] = {"id": run_id(record.batch_id, record.index), "taskIdentifier": record.task}
        if state == run.COMPLETED:
            outcome = RunOutcome(index=record.index, state=state, result=record.result, kind=record.result_kind)
            text, kind = await ResultResolver(context).output_text(outcome)
            return json_response(fields | {"ok": True, "output": text, "outputType": kind})
        failure = decode(record.result) if record.result else None
        return json_response(fields | {"ok": False, "error": trigger_error(failure, record.state)})

    async def cancel(self, request: Request) -> Response:
        """`POST /api/v2/runs/{id}/cancel`: cancel a run."""
        context, record, _ = await self._get_run(request)
        await context.engine.cancel_runs(record.batch_id, [record.index])
        return json_response({"id": run_id(record.batch_id, record.index)})

    async def replay(self, request: Request) -> Response:
        """`POST /api/v1/runs/{id}/replay`: start a new run of the same task with the same payload."""
        context, record, _ = await self._get_run(request)
        if record.state == "failed" and record.attempt == 1 and not record.attempts[1:]:
            failure = decode(record.result)
            if failure.type in ("PAYLOAD_TOO_LARGE", "InvalidJSON", "InvalidUTF8") and not failure.attempts:
                raise InvalidInput("can't replay: the run never had a readable payload", hint="send the item again")
        payload, kind = await self._content(context, record.payload, record.kind)
        key = self._service.default_key(record.task)._replace(queue=record.queue, priority=record.priority)
        extra = Extra(tags=tuple(record.tags), headers=record.headers, kept=record.kept)
        batch_id, index = await self._service.producer(context).put(key, payload, kind, extra)
        return json_response({"id": run_id(batch_id, index)})

    async def index(self, request: Request) -> Response:
        """`GET /api/v1/runs`: list runs by pages, newest batch first."""
        context = await self._service.authorize(request, batch_id=request.query_params.get("filter[batch]", ""))
        run_filter = _RunFilter(request)
        records, has_more = await self._page(context, run_filter)
        batches: dict[str, BatchRecord] = {}
        data = []
        for record in records:
            if record.batch_id not in batches:
                batches[record.batch_id] = (await context.engine.store.batch(record.batch_id))[0]
            env = {"id": context.environment, "name": context.environment}
            data.append(trigger_run(record, batches[record.batch_id]) | {"env": env})
        pagination: dict[str, str] = {}
        if has_more and records:
            pagination["next"] = run_id(records[-1].batch_id, records[-1].index)
        if run_filter.after is not None and records:
            pagination["previous"] = run_id(records[0].batch_id, records[0].index)
        return json_response({"data": data, "pagination": pagination})

    async def _page(self, context: RequestContext, run_filter: _RunFilter) -> tuple[list[RunRecord], bool]:
        """Return one page, and True if there are more. Queries once for each combination of filters and merges the
        results.
        """
        records: list[RunRecord] = []
        for state in run_filter.states or ("",):
            for task in run_filter.tasks or ("",):
                for tag in run_filter.tags or ("",):
                    records += await self._matching(context, run_filter, state, task, tag)
        unique = {(record.batch_id, record.index): record for record in records}
        ordered = sorted(unique.values(), key=lambda record: record.index)
        ordered.sort(key=lambda record: record.batch_id, reverse=True)
        return ordered[: run_filter.size], len(ordered) > run_filter.size

    async def _matching(
        self, context: RequestContext, run_filter: _RunFilter, state: str, task: str, tag: str
    ) -> list[RunRecord]:
        records: list[RunRecord] = []
        after = run_filter.after
        for _ in range(SCANNED_PAGES_MAX):
            page = await context.engine.store.runs(
                context.environment,
                batch_id=run_filter.batch_id,
                state=state,
                task=task,
                tag=tag,
                after=after,
                limit=run_filter.size + 1,
            )
            for record in page:
                if record.batch_id < run_filter.oldest_id:
                    return records
                if (not run_filter.queues or record.queue in run_filter.queues) and await self._matches_failure(
                    context, run_filter, record
                ):
                    records.append(record)
            if not page or len(records) > run_filter.size:  # a page may have fewer entries, if they are large
                return records
            after = (page[-1].batch_id, page[-1].index)
        return records

    async def _matches_failure(self, context: RequestContext, run_filter: _RunFilter, record: RunRecord) -> bool:
        """True unless the run failed in a way that the status filter excludes. That depends on its result."""
        if record.state != "failed" or run_filter.failures in (set(), FAILURES):
            return True
        record = await context.engine.store.run(record.batch_id, record.index)
        return run_status(record.state, decode(record.result) if record.result else None) in run_filter.failures

    async def _get_run(self, request: Request) -> tuple[RequestContext, RunRecord, BatchRecord]:
        """Return the run of the path, or the run it links to, and its batch. Raises `NotFound`."""
        name = request.path_params["run_id"]
        try:
            batch_id, index = parse_run_id(name)
        except InvalidInput:
            await self._service.authorize(request)
            raise NotFound("Run not found") from None
        context = await self._service.authorize(request, batch_id=batch_id)
        try:
            record = await context.engine.store.run(batch_id, index)
        except NotFound:
            raise NotFound("Run not found") from None
        if record.environment != context.environment:
            raise NotFound("Run not found")
        if record.state == "completed" and record.result_kind == pack.LINK:
            target = await ResultResolver(context).linked_run(record.result)
            if target is None:
                raise NotFound("Run not found")
            record = target
        batch, _ = await context.engine.store.batch(record.batch_id)
        return context, record, batch

    async def _content(self, context: RequestContext, data: bytes, kind: int) -> tuple[bytes, int]:
        return await context.engine.fetch(data) if kind == pack.REFERENCE else (data, kind)


class _RunFilter:
    """Filters of a run listing. Raises `InvalidInput`, which names the invalid parameter."""

    def __init__(self, request: Request) -> None:
        query = request.query_params
        for name in _UNSUPPORTED:
            if query.get(f"filter[{name}]"):
                raise InvalidInput(f"filter[{name}] is not supported", hint="remove the filter")
        self.size = parse_int(query.get("page[size]"), PAGE, "page[size]", 1, PAGE_MAX)
        self.after: tuple[str, int] | None = None
        if query.get("page[before]"):
            raise InvalidInput("page[before] is not supported", hint="keep the cursors of the previous pages")
        if query.get("page[after]"):
            self.after = parse_run_id(query["page[after]"])
        self.batch_id = query.get("filter[batch]", "")
        if self.batch_id:
            check_batch_id(self.batch_id)
        self.tasks = _names(request, "filter[taskIdentifier]")
        self.tags = _names(request, "filter[tag]")
        self.queues = {name.removeprefix("task/") for name in _names(request, "filter[queue]")}
        self.states: list[str] = []
        self.failures: set[str] = set()
        for status in _values(query.get("filter[status]")):
            if status not in STATES_OF_STATUS:
                raise InvalidInput(
                    f"unknown status {status!r} in filter[status]",
                    hint=f"expected one of {', '.join(STATES_OF_STATUS)}",
                )
            self.states += [state for state in STATES_OF_STATUS[status] if state not in self.states]
            if status in FAILURES:
                self.failures.add(status)
        self.oldest_id = ""
        now_us = _now_us(request)
        since_us = parse_int(query.get("filter[createdAt][from]"), 0, "filter[createdAt][from]", 0, 10**15) * 1_000
        if period := query.get("filter[createdAt][period]"):
            since_us = max(since_us, now_us - parse_duration_s("filter[createdAt][period]", period) * 1_000_000)
        if since_us:
            self.oldest_id = _id_at(since_us)
        until_ms = parse_int(query.get("filter[createdAt][to]"), 0, "filter[createdAt][to]", 0, 10**15)
        if until_ms:
            bound = (_id_at((until_ms + 1) * 1_000), -1)
            self.after = bound if self.after is None else min(self.after, bound, key=lambda cursor: cursor[0])


def _names(request: Request, parameter: str) -> list[str]:
    return _values(check_text(parameter, request.query_params.get(parameter, "")))


def _now_us(request: Request) -> int:
    return int(request.app.state.service.engine.clock.now_us())


def _id_at(us: int) -> str:
    """Return the smallest batch id of a given time. Batch ids begin with their creation time."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    number = ((us // 1_000) & (2**48 - 1)) << 80
    return "batch_" + "".join(alphabet[(number >> shift) & 31] for shift in range(125, -5, -5))


def _values(text: str | None) -> list[str]:
    values = [value.strip() for value in (text or "").split(",") if value.strip()]
    if len(values) > 20:
        raise InvalidInput(f"expected at most 20 values in a filter, got {len(values)}")
    return values

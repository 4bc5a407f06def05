"""Single runs as the field's clients know them: looked at, listed, cancelled, started again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from headrace.core import pack, run
from headrace.core.batch import Batch
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
from headrace.store.protocol import Outcome, RunRecord

PAGE_MAX: Final = 100
PAGE: Final = 25
SCANNED_PAGES_MAX: Final = 50
"""Pages of a listing that are looked through for what no index knows, before the caller goes on by cursor."""

FAILURES: Final = {status for status, states in STATES_OF_STATUS.items() if "failed" in states}
_UNSUPPORTED: Final = ("version", "bulkAction", "schedule", "machine", "region")


class Runs:
    """The endpoints of `/api/v?/runs`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def retrieve(self, request: Request) -> Response:
        """`GET /api/v3/runs/{id}`."""
        call, view, batch = await self._found(request, "runs:read")
        shown = trigger_run(view, batch)
        if view.payload or view.kind == pack.TEXT:
            data, kind = await self._content(call, view.payload, view.kind)
            shown["payload"] = json_value(data, kind)
        if view.state == "completed":
            data, kind = await self._content(call, view.result, view.result_kind)
            shown["output"] = json_value(data, kind)
        return json_response(shown)

    async def result(self, request: Request) -> Response:
        """`GET /api/v1/runs/{id}/result`: how it ended, once it has."""
        call, view, _ = await self._found(request, "runs:read")
        state = run.BY_NAME.get(view.state, run.WAITING)
        if state not in run.FINAL:
            raise NotFound("Run either doesn't exist or is not finished")
        shown: dict[str, Any] = {"id": run_id(view.batch_id, view.index), "taskIdentifier": view.task}
        if state == run.COMPLETED:
            one = Outcome(index=view.index, state=state, result=view.result, kind=view.result_kind)
            text, kind = await ResultResolver(call).output_text(one)
            return json_response(shown | {"ok": True, "output": text, "outputType": kind})
        failure = decode(view.result) if view.result else None
        return json_response(shown | {"ok": False, "error": trigger_error(failure, view.state)})

    async def cancel(self, request: Request) -> Response:
        """`POST /api/v2/runs/{id}/cancel`."""
        call, view, _ = await self._found(request, "runs:write")
        engine = call.engine
        await engine.store.cancel_runs(view.batch_id, [view.index], now_us=engine.clock.now_us())
        engine.recorded.notify()
        return json_response({"id": run_id(view.batch_id, view.index)})

    async def replay(self, request: Request) -> Response:
        """`POST /api/v1/runs/{id}/replay`: a new run of the same task with the same payload."""
        call, view, _ = await self._found(request, "runs:write")
        if view.state == "failed" and view.payload == b"{}" and view.attempt == 1 and not view.attempts[1:]:
            failure = decode(view.result)
            if failure.type in ("PAYLOAD_TOO_LARGE", "InvalidJSON", "InvalidUTF8"):
                raise InvalidInput("the run never had a readable payload", hint="send the item again")
        payload, kind = await self._content(call, view.payload, view.kind)
        key = self._service.default_key(view.task)._replace(queue=view.queue, priority=view.priority)
        extra = Extra(tags=tuple(view.tags), headers=view.headers, kept=view.kept)
        batch_id, index = await self._service.producer(call).put(key, payload, kind, extra)
        return json_response({"id": run_id(batch_id, index)})

    async def index(self, request: Request) -> Response:
        """`GET /api/v1/runs`: by pages, newest batch first."""
        call = await self._service.authorize(
            request, "runs:read", batch_id=request.query_params.get("filter[batch]", "")
        )
        wish = _Wish(request)
        views, has_more = await self._page(call, wish)
        batches: dict[str, Batch] = {}
        data = []
        for view in views:
            if view.batch_id not in batches:
                batches[view.batch_id] = (await call.engine.store.batch(view.batch_id))[0]
            if view.state == "failed":  # a list has no results; why a run failed is part of its status
                view = await call.engine.store.run(view.batch_id, view.index)
            env = {"id": call.environment, "name": call.environment}
            data.append(trigger_run(view, batches[view.batch_id]) | {"env": env})
        pagination: dict[str, str] = {}
        if has_more and views:
            pagination["next"] = run_id(views[-1].batch_id, views[-1].index)
        if wish.after is not None and views:
            pagination["previous"] = run_id(views[0].batch_id, views[0].index)
        return json_response({"data": data, "pagination": pagination})

    async def _page(self, call: RequestContext, wish: _Wish) -> tuple[list[RunRecord], bool]:
        """One page and whether there are more: each wanted state is asked for, and the answers are merged."""
        found: list[RunRecord] = []
        for state in wish.states or ("",):
            for task in wish.tasks or ("",):
                for tag in wish.tags or ("",):
                    found += await self._matching(call, wish, state, task, tag)
        unique = {(view.batch_id, view.index): view for view in found}
        ordered = sorted(unique.values(), key=lambda view: view.index)
        ordered.sort(key=lambda view: view.batch_id, reverse=True)
        return ordered[: wish.size], len(ordered) > wish.size

    async def _matching(self, call: RequestContext, wish: _Wish, state: str, task: str, tag: str) -> list[RunRecord]:
        found: list[RunRecord] = []
        after = wish.after
        for _ in range(SCANNED_PAGES_MAX):
            page = await call.engine.store.runs(
                call.environment,
                batch_id=wish.batch_id,
                state=state,
                task=task,
                tag=tag,
                after=after,
                limit=wish.size + 1,
            )
            for view in page:
                if view.batch_id < wish.oldest_id:
                    return found
                if (not wish.queues or view.queue in wish.queues) and await self._is_failed_so(call, wish, view):
                    found.append(view)
            if len(page) <= wish.size or len(found) > wish.size:
                return found
            after = (page[-1].batch_id, page[-1].index)
        return found

    async def _is_failed_so(self, call: RequestContext, wish: _Wish, view: RunRecord) -> bool:
        """Whether a failed run failed in a way that was asked for; its result says which."""
        if view.state != "failed" or wish.failures in (set(), FAILURES):
            return True
        whole = await call.engine.store.run(view.batch_id, view.index)
        return run_status(view.state, decode(whole.result) if whole.result else None) in wish.failures

    async def _found(self, request: Request, scope: str) -> tuple[RequestContext, RunRecord, Batch]:
        """The run of the path, or the one that it links to, and its batch. Raises `NotFound`."""
        name = request.path_params["run_id"]
        try:
            batch_id, index = parse_run_id(name)
        except InvalidInput:
            await self._service.authorize(request, scope)
            raise NotFound("Run not found") from None
        call = await self._service.authorize(request, scope, batch_id=batch_id)
        try:
            view = await call.engine.store.run(batch_id, index)
        except NotFound:
            raise NotFound("Run not found") from None
        if view.environment != call.environment:
            raise NotFound("Run not found")
        if view.state == "completed" and view.result_kind == pack.LINK:
            target = await ResultResolver(call).linked_run(view.result)
            if target is None:
                raise NotFound("Run not found")
            view = target
        batch, _ = await call.engine.store.batch(view.batch_id)
        return call, view, batch

    async def _content(self, call: RequestContext, data: bytes, kind: int) -> tuple[bytes, int]:
        return await call.engine.fetch(data) if kind == pack.REFERENCE else (data, kind)


class _Wish:
    """What a list of runs is asked for. Raises `InvalidInput` by name for what can't be."""

    def __init__(self, request: Request) -> None:
        query = request.query_params
        for name in _UNSUPPORTED:
            if query.get(f"filter[{name}]"):
                raise InvalidInput(f"filter[{name}] is not supported", hint="leave it out")
        self.size = parse_int(query.get("page[size]"), PAGE, "page[size]", 1, PAGE_MAX)
        self.after: tuple[str, int] | None = None
        if query.get("page[before]"):
            raise InvalidInput("page[before] is not supported", hint="keep the cursors of the pages before")
        if query.get("page[after]"):
            self.after = parse_run_id(query["page[after]"])
        self.batch_id = query.get("filter[batch]", "")
        if self.batch_id:
            check_batch_id(self.batch_id)
        self.tasks = _words(query.get("filter[taskIdentifier]"))
        self.tags = _words(query.get("filter[tag]"))
        self.queues = {name.removeprefix("task/") for name in _words(query.get("filter[queue]"))}
        self.states: list[str] = []
        self.failures: set[str] = set()
        for status in _words(query.get("filter[status]")):
            if status not in STATES_OF_STATUS:
                raise InvalidInput(f"{status!r} is not a status", hint=f"one of {', '.join(STATES_OF_STATUS)}")
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
            self.after = bound if self.after is None else min(self.after, bound, key=lambda one: one[0])


def _now_us(request: Request) -> int:
    return int(request.app.state.service.engine.clock.now_us())


def _id_at(us: int) -> str:
    """The first batch id that could be of a moment."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    number = ((us // 1_000) & (2**48 - 1)) << 80
    return "batch_" + "".join(alphabet[(number >> shift) & 31] for shift in range(125, -5, -5))


def _words(text: str | None) -> Sequence[str]:
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if len(words) > 20:
        raise InvalidInput("a filter takes at most 20 values")
    return words

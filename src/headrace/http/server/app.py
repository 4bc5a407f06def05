"""The ASGI app: every path, who answers it, and what all answers have in common."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Final, NamedTuple

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.foundation.errors import HeadraceError
from headrace.http.requests.error_responses import error_response
from headrace.http.requests.service import RATE_HEADERS, Service
from headrace.http.server.health import Health
from headrace.http.trigger_api.batches import Batches
from headrace.http.trigger_api.runs import Runs
from headrace.http.trigger_api.uploads import Uploads
from headrace.http.v1.activations import Activations
from headrace.http.v1.batches import Ledgers
from headrace.http.v1.store_rpc import RemoteStores
from headrace.http.v1.worker_sessions import Work

LOG: Any = structlog.get_logger("headrace.http")
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
Endpoint = Callable[[Request], Awaitable[Response]]


class Path(NamedTuple):
    """One endpoint. `tag` groups it in the docs; "" keeps it out of them."""

    method: str
    path: str
    endpoint: Endpoint
    tag: str = ""


def paths_of(service: Service) -> list[Path]:
    """Every endpoint there is; routes, docs and tests are made from this list."""
    batches, runs, uploads = Batches(service), Runs(service), Uploads(service)
    work, stores = Work(service), RemoteStores(service)
    activations = Activations(service)
    ledgers, health = Ledgers(service), Health(service, lambda: paths_of(service))
    return [
        Path("POST", "/api/v3/batches", batches.create, "compatible"),
        Path("POST", "/api/v3/batches/{batch_id}/items", batches.stream, "compatible"),
        Path("GET", "/api/v1/batches/{batch_id}", batches.retrieve, "compatible"),
        Path("GET", "/api/v2/batches/{batch_id}", batches.retrieve, "compatible"),
        Path("GET", "/api/v1/batches/{batch_id}/results", batches.results, "compatible"),
        Path("GET", "/api/v3/runs/{run_id}", runs.retrieve, "compatible"),
        Path("GET", "/api/v1/runs", runs.index, "compatible"),
        Path("GET", "/api/v1/runs/{run_id}/result", runs.result, "compatible"),
        Path("POST", "/api/v2/runs/{run_id}/cancel", runs.cancel, "compatible"),
        Path("POST", "/api/v1/runs/{run_id}/replay", runs.replay, "compatible"),
        Path("PUT", "/api/v2/packets/{path:path}", uploads.presign_upload, "compatible"),
        Path("PUT", "/api/v1/packets/{path:path}", uploads.presign_upload, "compatible"),
        Path("GET", "/api/v1/packets/{path:path}", uploads.presign_download, "compatible"),
        Path("PUT", "/api/packets/{environment}/{path:path}", uploads.upload),
        Path("GET", "/api/packets/{environment}/{path:path}", uploads.download),
        Path("POST", "/v1/batches", ledgers.create, "batches"),
        Path("GET", "/v1/batches", ledgers.index, "batches"),
        Path("GET", "/v1/batches/{batch_id}", ledgers.retrieve, "batches"),
        Path("POST", "/v1/batches/{batch_id}/items", ledgers.stream, "batches"),
        Path("GET", "/v1/batches/{batch_id}/missing", ledgers.missing, "batches"),
        Path("GET", "/v1/batches/{batch_id}/results", ledgers.results, "batches"),
        Path("GET", "/v1/batches/{batch_id}/events", ledgers.events, "batches"),
        Path("POST", "/v1/batches/{batch_id}/seal", ledgers.seal, "batches"),
        Path("POST", "/v1/batches/{batch_id}/cancel", ledgers.cancel, "batches"),
        Path("POST", "/v1/batches/{batch_id}/redrive", ledgers.redrive, "batches"),
        Path("POST", "/v1/tasks/{task}/runs", work.enqueue, "runs"),
        Path("POST", "/v1/activations", activations.stream, "runs"),
        Path("POST", "/v1/sessions", work.start, "work"),
        Path("POST", "/v1/sessions/{session_id}/heartbeat", work.beat, "work"),
        Path("DELETE", "/v1/sessions/{session_id}", work.end, "work"),
        Path("POST", "/v1/claims", work.claim, "work"),
        Path("POST", "/v1/settlements", work.settle, "work"),
        Path("POST", "/v1/releases", work.release, "work"),
        Path("GET", "/v1/about", stores.about, "server"),
        Path("POST", "/v1/store/{verb}", stores.ask),
        Path("PUT", "/v1/objects/{key:path}", stores.put_object),
        Path("GET", "/v1/objects/{key:path}", stores.get_object),
        Path("GET", "/healthz", health.alive, "server"),
        Path("GET", "/readyz", health.ready, "server"),
        Path("GET", "/metrics", health.metrics, "server"),
        Path("GET", "/openapi.json", health.openapi, "server"),
        Path("GET", "/docs", health.docs, "server"),
    ]


def make_app(service: Service) -> ASGIApp:
    """The app of one server."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    async def failed(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    by_path: dict[str, dict[str, Endpoint]] = {}
    for one in paths_of(service):
        by_path.setdefault(one.path, {})[one.method] = one.endpoint
    app = Starlette(
        routes=[Route(path, _by_method(methods), methods=list(methods)) for path, methods in by_path.items()],
        lifespan=lifespan,
        exception_handlers={HeadraceError: failed, HTTPException: failed},
    )
    app.state.service = service
    return Frame(app, service)


def _by_method(methods: dict[str, Endpoint]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return endpoint


class Frame:
    """What every answer has: an id, the rate headers, a count."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["headrace.request_id"] = _request_id(scope)
        began = perf_counter()
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message.get("headers", ()))
                headers[b"x-request-id"] = request_id.encode()
                headers |= {name.encode(): value.encode() for name, value in scope.get(RATE_HEADERS, {}).items()}
                message = {**message, "headers": list(headers.items())}
                self._count(scope, status, perf_counter() - began)
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except Exception as error:
            if status:  # it can't be taken back: the connection is closed in the middle, so that its peer knows
                LOG.warning("an answer broke off", request=request_id, path=scope["path"], error=str(error))
                raise
            await error_response(Request(scope), error)(scope, receive, framed)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        name = route.path if isinstance(route, Route) else "none"
        self._service.metrics.requests.labels(name, scope["method"] if name != "none" else "any", status).inc()
        self._service.metrics.seconds.labels(name).observe(seconds)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.match(value):
            return str(value.decode())
    return f"req_{secrets.token_hex(12)}"

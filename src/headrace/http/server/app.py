"""The ASGI app: all endpoints, and what all responses have in common."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Final, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.foundation.access import Access, open_to_all
from headrace.foundation.errors import HeadraceError
from headrace.foundation.limits import KIB
from headrace.foundation.logs import get_logger
from headrace.http.requests.declared_access import admit, declare, is_admitted
from headrace.http.requests.error_responses import error_response, loggable_path
from headrace.http.requests.item_codec import ItemLine, LenientItemLine
from headrace.http.requests.request_body import JSON_BYTES_MAX
from headrace.http.requests.service import RATE_HEADERS, Service
from headrace.http.server.health import ServerEndpoints
from headrace.http.trigger_api.batches import TriggerBatchBody, TriggerBatches
from headrace.http.trigger_api.runs import TriggerRuns
from headrace.http.trigger_api.uploads import Uploads
from headrace.http.v1.activations import CONTENT_TYPES as ACTIVATION_TYPES
from headrace.http.v1.activations import ActivationEndpoint
from headrace.http.v1.batches import (
    NDJSON,
    BatchBody,
    BatchListResponse,
    ItemsResponse,
    MissingResponse,
    RedriveBody,
    RedriveResponse,
    SealBody,
    V1Batches,
)
from headrace.http.v1.runs import V1Runs
from headrace.http.v1.store_rpc import ACCESS as STORE_RPC
from headrace.http.v1.store_rpc import StoreRpc
from headrace.http.v1.worker_sessions import (
    ClaimBody,
    ClaimResponse,
    HeartbeatResponse,
    ReleasesBody,
    RunBody,
    RunIdResponse,
    SessionBody,
    SessionResponse,
    SettlementsBody,
    WordsResponse,
    WorkerSessions,
)
from headrace.store.rpc import BYTES_MAX as SETTLEMENT_BYTES_MAX
from headrace.store.rpc import ServerInfo
from headrace.views import BatchView, RunView

LOG: Any = get_logger("headrace.http")
NO_BODY_BYTES_MAX: Final = 64 * KIB
"""Announced bytes of a body above which an endpoint that reads none refuses a request."""
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
EndpointFunction = Callable[[Request], Awaitable[Response]]


class ApiEndpoint(NamedTuple):
    """One endpoint. `access`: who may call it, and the bytes that it reads. `tag` groups it in the API documents; ""
    hides it there.

    `body` and `response`: the structs of its JSON body and response, where they are documented. `line`: that of each
    line of an NDJSON body. `content_type`: the type of its body.
    """

    method: str
    path: str
    function: EndpointFunction
    access: Access
    tag: str = ""
    body: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None
    content_type: str = "application/json"
    is_body_optional: bool = False
    line: type[msgspec.Struct] | None = None


def keyed(*scopes: str, body_bytes_max: int | None = NO_BODY_BYTES_MAX, is_metered: bool = True) -> Access:
    """Declare an endpoint that needs a key with any of these scopes."""
    return Access(credential="key", scopes=scopes, body_bytes_max=body_bytes_max, is_metered=is_metered)


READ_BATCHES: Final = keyed("batches:read")
CHANGE_BATCHES: Final = keyed("batches:write")
WRITE_BATCHES: Final = keyed("batches:write", body_bytes_max=JSON_BYTES_MAX)
STREAM_ITEMS: Final = keyed("batches:write", body_bytes_max=None, is_metered=False)
"""Streams are metered by their batch: `Service.is_exempt_from_limit`."""
PRESIGN_UPLOAD: Final = keyed("batches:write", is_metered=False)
PRESIGN_DOWNLOAD: Final = keyed("batches:read", is_metered=False)
READ_RUNS: Final = keyed("runs:read")
CHANGE_RUNS: Final = keyed("runs:write")
WORK: Final = keyed("work", is_metered=False)
WORK_WITH_BODY: Final = keyed("work", body_bytes_max=JSON_BYTES_MAX, is_metered=False)
OPEN: Final = open_to_all(NO_BODY_BYTES_MAX)
METRICS: Final = Access(
    credential="key_off_loopback", scopes=("metrics:read",), body_bytes_max=NO_BODY_BYTES_MAX, is_of_server=True
)
ABOUT: Final = keyed("work", "batches:write", "batches:read", "runs:read")


def endpoints_of(service: Service) -> list[ApiEndpoint]:
    """List all endpoints. Routes, API documents and tests are made from this list."""
    server = ServerEndpoints(service, lambda: endpoints_of(service))
    return [
        *_trigger_endpoints(service),
        *_v1_endpoints(service),
        *_worker_endpoints(service),
        ApiEndpoint("GET", "/v1/about", StoreRpc(service).about, ABOUT, "server", response=ServerInfo),
        ApiEndpoint("GET", "/healthz", server.alive, OPEN, "server"),
        ApiEndpoint("GET", "/readyz", server.ready, OPEN, "server"),
        ApiEndpoint("GET", "/metrics", server.metrics, METRICS, "server"),
        ApiEndpoint("GET", "/openapi.json", server.openapi, OPEN, "server"),
        ApiEndpoint("GET", "/docs", server.docs, OPEN, "server"),
    ]


def _trigger_endpoints(service: Service) -> list[ApiEndpoint]:
    batches, runs, uploads = TriggerBatches(service), TriggerRuns(service), Uploads(service)
    packet_bytes_max = service.limits.packet_bytes_max
    return [
        ApiEndpoint("POST", "/api/v3/batches", batches.create, WRITE_BATCHES, "compatible", body=TriggerBatchBody),
        ApiEndpoint(
            "POST",
            "/api/v3/batches/{batch_id}/items",
            batches.stream,
            STREAM_ITEMS,
            "compatible",
            content_type=NDJSON,
            line=LenientItemLine,
        ),
        ApiEndpoint("GET", "/api/v1/batches/{batch_id}", batches.retrieve, READ_BATCHES, "compatible"),
        ApiEndpoint("GET", "/api/v2/batches/{batch_id}", batches.retrieve, READ_BATCHES, "compatible"),
        ApiEndpoint("GET", "/api/v1/batches/{batch_id}/results", batches.results, READ_BATCHES, "compatible"),
        ApiEndpoint("GET", "/api/v3/runs/{run_id}", runs.retrieve, READ_RUNS, "compatible"),
        ApiEndpoint("GET", "/api/v1/runs", runs.index, READ_RUNS, "compatible"),
        ApiEndpoint("GET", "/api/v1/runs/{run_id}/result", runs.result, READ_RUNS, "compatible"),
        ApiEndpoint("POST", "/api/v2/runs/{run_id}/cancel", runs.cancel, CHANGE_RUNS, "compatible"),
        ApiEndpoint("POST", "/api/v1/runs/{run_id}/replay", runs.replay, CHANGE_RUNS, "compatible"),
        ApiEndpoint("PUT", "/api/v2/packets/{path:path}", uploads.presign_upload, PRESIGN_UPLOAD, "compatible"),
        ApiEndpoint("PUT", "/api/v1/packets/{path:path}", uploads.presign_upload, PRESIGN_UPLOAD, "compatible"),
        ApiEndpoint("GET", "/api/v1/packets/{path:path}", uploads.presign_download, PRESIGN_DOWNLOAD, "compatible"),
        ApiEndpoint(
            "PUT",
            "/api/packets/{environment}/{path:path}",
            uploads.upload,
            Access(credential="signed_url", body_bytes_max=packet_bytes_max),
        ),
        ApiEndpoint(
            "GET",
            "/api/packets/{environment}/{path:path}",
            uploads.download,
            Access(credential="signed_url", body_bytes_max=NO_BODY_BYTES_MAX),
        ),
    ]


def _v1_endpoints(service: Service) -> list[ApiEndpoint]:
    batches, runs, activations = V1Batches(service), V1Runs(service), ActivationEndpoint(service)
    work = WorkerSessions(service)
    return [
        ApiEndpoint(
            "POST", "/v1/batches", batches.create, WRITE_BATCHES, "batches", body=BatchBody, response=BatchView
        ),
        ApiEndpoint("GET", "/v1/batches", batches.index, READ_BATCHES, "batches", response=BatchListResponse),
        ApiEndpoint("GET", "/v1/batches/{batch_id}", batches.retrieve, READ_BATCHES, "batches", response=BatchView),
        ApiEndpoint(
            "POST",
            "/v1/batches/{batch_id}/items",
            batches.stream,
            STREAM_ITEMS,
            "batches",
            response=ItemsResponse,
            content_type=NDJSON,
            line=ItemLine,
        ),
        ApiEndpoint(
            "GET", "/v1/batches/{batch_id}/missing", batches.missing, READ_BATCHES, "batches", response=MissingResponse
        ),
        ApiEndpoint("GET", "/v1/batches/{batch_id}/results", batches.results, READ_BATCHES, "batches"),
        ApiEndpoint("GET", "/v1/batches/{batch_id}/events", batches.events, READ_BATCHES, "batches"),
        ApiEndpoint(
            "POST",
            "/v1/batches/{batch_id}/seal",
            batches.seal,
            WRITE_BATCHES,
            "batches",
            body=SealBody,
            response=BatchView,
            is_body_optional=True,
        ),
        ApiEndpoint(
            "POST", "/v1/batches/{batch_id}/cancel", batches.cancel, CHANGE_BATCHES, "batches", response=BatchView
        ),
        ApiEndpoint(
            "POST",
            "/v1/batches/{batch_id}/redrive",
            batches.redrive,
            WRITE_BATCHES,
            "batches",
            body=RedriveBody,
            response=RedriveResponse,
            is_body_optional=True,
        ),
        ApiEndpoint(
            "POST",
            "/v1/tasks/{task}/runs",
            work.enqueue,
            keyed("runs:write", body_bytes_max=service.limits.item_bytes_max),
            "runs",
            body=RunBody,
            response=RunIdResponse,
        ),
        ApiEndpoint("GET", "/v1/runs/{run_id}", runs.retrieve, READ_RUNS, "runs", response=RunView),
        ApiEndpoint(
            "POST",
            "/v1/activations",
            activations.stream,
            keyed("runs:write", body_bytes_max=None),
            "runs",
            content_type=ACTIVATION_TYPES[0],
        ),
    ]


def _worker_endpoints(service: Service) -> list[ApiEndpoint]:
    work, stores = WorkerSessions(service), StoreRpc(service)
    object_bytes_max = service.limits.item_bytes_max + service.limits.packet_bytes_max
    return [
        ApiEndpoint(
            "POST", "/v1/sessions", work.start, WORK_WITH_BODY, "work", body=SessionBody, response=SessionResponse
        ),
        ApiEndpoint(
            "POST", "/v1/sessions/{session_id}/heartbeat", work.heartbeat, WORK, "work", response=HeartbeatResponse
        ),
        ApiEndpoint("DELETE", "/v1/sessions/{session_id}", work.end, WORK, "work"),
        ApiEndpoint("POST", "/v1/claims", work.claim, WORK_WITH_BODY, "work", body=ClaimBody, response=ClaimResponse),
        ApiEndpoint(
            "POST",
            "/v1/settlements",
            work.settle,
            keyed("work", body_bytes_max=SETTLEMENT_BYTES_MAX, is_metered=False),
            "work",
            body=SettlementsBody,
            response=WordsResponse,
        ),
        ApiEndpoint(
            "POST", "/v1/releases", work.release, WORK_WITH_BODY, "work", body=ReleasesBody, response=WordsResponse
        ),
        ApiEndpoint("POST", "/v1/store/{verb}", stores.perform, STORE_RPC),
        ApiEndpoint(
            "PUT",
            "/v1/objects/{key:path}",
            stores.put_object,
            keyed("work", "batches:write", body_bytes_max=object_bytes_max, is_metered=False),
        ),
        ApiEndpoint(
            "GET", "/v1/objects/{key:path}", stores.get_object, keyed("work", "batches:read", is_metered=False)
        ),
    ]


def make_app(service: Service) -> ASGIApp:
    """Build the app of one server."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    by_path: dict[str, dict[str, ApiEndpoint]] = {}
    for endpoint in endpoints_of(service):
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    app = Starlette(
        routes=[Route(path, _by_method(methods), methods=list(methods)) for path, methods in by_path.items()],
        lifespan=lifespan,
        exception_handlers={HeadraceError: on_error, HTTPException: on_error},
    )
    app.state.service = service
    return ResponseEnvelope(app, service)


def _by_method(methods: dict[str, ApiEndpoint]) -> EndpointFunction:
    async def respond(request: Request) -> Response:
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        declare(request, endpoint.access)
        if endpoint.access.is_open:
            admit(request)
        response = await endpoint.function(request)
        if not is_admitted(request):
            raise RuntimeError(f"expected {endpoint.path} to admit its client by its access declaration")
        return response

    return respond


class ResponseEnvelope:
    """Adds to each response a request id and rate-limit headers, and counts it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope["headrace.request_id"] = _request_id(scope)
        started = perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message.get("headers", ()))
                headers[b"x-request-id"] = request_id.encode()
                headers |= {name.encode(): value.encode() for name, value in scope.get(RATE_HEADERS, {}).items()}
                message = {**message, "headers": list(headers.items())}
                self._count(scope, status, perf_counter() - started)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status:  # the status line is out: close the connection early, so that the client notices
                path = loggable_path(scope["path"])
                LOG.warning("http.response_aborted", request=request_id, path=path, error=str(error))
                raise
            await error_response(Request(scope), error)(scope, receive, send_with_headers)

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

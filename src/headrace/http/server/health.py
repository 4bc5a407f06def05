"""Endpoints about the server itself: liveness, readiness, metrics and API documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from headrace.http.requests.error_responses import json_response
from headrace.http.requests.service import Service
from headrace.http.server.openapi import document, page


class ServerEndpoints:
    """Endpoints about the server. Only `/metrics` returns what belongs to an environment: the names of its queues."""

    def __init__(self, service: Service, paths: Callable[[], Sequence[Any]]) -> None:
        self._service = service
        self._paths = paths

    async def alive(self, _request: Request) -> Response:
        """`GET /healthz`: return 200 while the process runs."""
        return json_response({"status": "alive"})

    async def ready(self, _request: Request) -> Response:
        """`GET /readyz`: return 503 while the store is unavailable or the server is stopping, else 200."""
        reason = await self._service.why_not_ready()
        if reason == "stopping":
            return json_response({"status": "stopping"}, 503, {"retry-after": "5"})
        if reason:
            return json_response({"status": "store unavailable", "code": reason}, 503, {"retry-after": "5"})
        return json_response({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`: return the metrics in Prometheus' text format. Off loopback addresses it needs a key."""
        await self._service.authorize_off_loopback(request)
        await self._service.refresh_queue_metrics()
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _request: Request) -> Response:
        """`GET /openapi.json`: return this API's OpenAPI 3.1 document."""
        return json_response(document(self._paths()))

    async def docs(self, _request: Request) -> Response:
        """`GET /docs`: return this API's documentation as a web page."""
        return HTMLResponse(page(self._paths()))

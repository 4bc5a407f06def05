"""Whether the server lives and can work, what it counts, and what it answers to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from headrace.http.requests.error_responses import json_response
from headrace.http.requests.service import Service
from headrace.http.server.openapi import document, page


class Health:
    """The endpoints that need no key: nothing of what they tell belongs to a tenant."""

    def __init__(self, service: Service, paths: Callable[[], Sequence[Any]]) -> None:
        self._service = service
        self._paths = paths

    async def alive(self, _request: Request) -> Response:
        """`GET /healthz`: the process answers."""
        return json_response({"status": "alive"})

    async def ready(self, _request: Request) -> Response:
        """`GET /readyz`: 503 while the store is away, or the server stops."""
        why = await self._service.why_not_ready()
        if why == "stopping":
            return json_response({"status": "stopping"}, 503, {"retry-after": "5"})
        if why:
            return json_response({"status": "the store is away", "code": why}, 503, {"retry-after": "5"})
        return json_response({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        """`GET /metrics`: for Prometheus."""
        await self._service.refresh_queue_metrics()
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _request: Request) -> Response:
        """`GET /openapi.json`: this API, as OpenAPI 3.1."""
        return json_response(document(self._paths()))

    async def docs(self, _request: Request) -> Response:
        """`GET /docs`: this API, to be read."""
        return HTMLResponse(page(self._paths()))

"""Single runs in `/v1`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.ids import parse_run_id
from headrace.http.requests.error_responses import json_response
from headrace.http.requests.service import Service
from headrace.views import run_view


class V1Runs:
    """Endpoint of `/v1/runs`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def retrieve(self, request: Request) -> Response:
        """`GET /v1/runs/{id}`: return a run with its input, output and attempts."""
        name = request.path_params["run_id"]
        try:
            batch_id, index = parse_run_id(name)
        except InvalidInput:
            await self._service.authorize(request)
            raise NotFound(f"run {name[:60]!r} not found") from None
        context = await self._service.authorize(request, batch_id=batch_id)
        record = await context.engine.store.run(batch_id, index)
        if record.environment != context.environment:
            raise NotFound(f"run {name[:60]!r} not found")
        return json_response(await run_view(context.engine, record))

"""`POST /v1/activations`: intake of activations for workers that use the task broker's gRPC protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import InvalidSetting
from headrace.http.requests.error_responses import UnsupportedType, json_response
from headrace.http.requests.request_body import body_pieces
from headrace.http.requests.service import RequestContext, Service

if TYPE_CHECKING:
    from headrace.grpc.taskbroker.activation_intake import ActivationIntake

CONTENT_TYPES: Final = ("application/x-protobuf", "application/protobuf", "application/octet-stream")


class ActivationEndpoint:
    """Endpoint of `/v1/activations`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._intakes: dict[str, ActivationIntake] = {}

    async def stream(self, request: Request) -> Response:
        """`POST /v1/activations`: store `TaskActivation` messages, each after its length as a varint, each id once."""
        service = self._service
        context = await service.authorize(request)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in CONTENT_TYPES:
            raise UnsupportedType(
                f"expected activations as {CONTENT_TYPES[0]}, got {content_type or 'no content type'}",
                hint=f"set Content-Type: {CONTENT_TYPES[0]}",
            )
        intake = self._intake(context)
        async with service.stream(context.environment):
            result = await intake.take(body_pieces(request, service.limits))
        for label, count in (
            ("accepted", result.accepted),
            ("duplicate", result.duplicates),
            ("dropped", result.dropped),
            ("refused", result.refused_count),
        ):
            service.metrics.items.labels(label).inc(count)
        return json_response(result)

    def _intake(self, context: RequestContext) -> ActivationIntake:
        intake = self._intakes.get(context.environment)
        if intake is None:
            try:
                from headrace.grpc.taskbroker.activation_intake import ActivationIntake
            except ModuleNotFoundError as error:
                raise InvalidSetting(
                    f"activations require {error.name}, which is not installed", hint="pip install 'headrace[grpc]'"
                ) from None
            intake = self._intakes[context.environment] = ActivationIntake(
                context.engine, self._service.producer(context)
            )
        return intake

"""`POST /v1/activations`: activations for workers that speak the task broker's gRPC."""

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


class Activations:
    """The endpoint of `/v1/activations`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._intakes: dict[str, ActivationIntake] = {}

    async def stream(self, request: Request) -> Response:
        """`POST /v1/activations`: `TaskActivation` messages, each after its length as a varint; each once by its id."""
        service = self._service
        call = await service.authorize(request, "runs:write")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in CONTENT_TYPES:
            raise UnsupportedType(f"activations are {CONTENT_TYPES[0]}", hint="set Content-Type")
        intake = self._intake(call)
        async with service.stream():
            taken = await intake.take(body_pieces(request, service.limits))
        for what, count in (
            ("accepted", taken.accepted),
            ("duplicate", taken.duplicates),
            ("dropped", taken.dropped),
            ("refused", taken.refused_count),
        ):
            service.metrics.items.labels(what).inc(count)
        return json_response(taken)

    def _intake(self, call: RequestContext) -> ActivationIntake:
        intake = self._intakes.get(call.environment)
        if intake is None:
            try:
                from headrace.grpc.taskbroker.activation_intake import ActivationIntake
            except ModuleNotFoundError as error:
                raise InvalidSetting(f"activations need {error.name}", hint="pip install 'headrace[grpc]'") from None
            intake = self._intakes[call.environment] = ActivationIntake(call.engine, self._service.producer(call))
        return intake

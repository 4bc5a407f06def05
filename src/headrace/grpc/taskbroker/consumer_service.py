"""`ConsumerService`: workers in any language fetch activations and report their outcomes.

A report is answered after its commit, which many reports share; with `ack="received"` it is answered at once. In both
cases the answer may carry the worker's next activation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final, Literal

from headrace.foundation.access import SMALL_BYTES_MAX, Access
from headrace.foundation.errors import EngineFault, HeadraceError
from headrace.foundation.limits import MIB
from headrace.foundation.logs import get_logger
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.activation_codec import as_first_field, delivery_message
from headrace.grpc.transport import status
from headrace.grpc.transport.service_methods import CallContext, DeferredResponse, Method, ResponseAfter, methods_of
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import DeliveredRun, QueueFilter
from headrace.runtime.dispatch.prefetcher import FILTERS_MAX
from headrace.runtime.dispatch.report_outcome import ActivationReport

LOG = get_logger("headrace.grpc")
DeliveryMode = Literal["pull", "push", "both"]
Ack = Literal["committed", "received"]

SERVICE: Final = wire.DESCRIPTOR.services_by_name["ConsumerService"]
STATES: Final = {
    wire.TASK_ACTIVATION_STATUS_FAILURE: "failed",
    wire.TASK_ACTIVATION_STATUS_RETRY: "retry",
    wire.TASK_ACTIVATION_STATUS_COMPLETE: "completed",
}
_KEYED: Final = Access(
    credential="key_once_one_exists",
    scopes=("work",),
    body_bytes_max=SMALL_BYTES_MAX,
    unauthenticated_bytes_max=SMALL_BYTES_MAX,
    is_of_server=True,
)
ACCESS: Final = {
    "GetTask": _KEYED,
    "SetTaskStatus": _KEYED,
    "SetBatchActivationStatus": replace(_KEYED, body_bytes_max=4 * MIB, unauthenticated_bytes_max=MIB),
}
"""Access to each method."""
_PREFIX: Final = "TASK_ACTIVATION_STATUS_"


class ConsumerService:
    """Implementation of `sentry_protos.taskbroker.v1.ConsumerService`."""

    def __init__(self, dispatcher: Dispatcher, *, delivery: DeliveryMode = "pull", ack: Ack = "committed") -> None:
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._is_awaited = ack == "committed"

    @property
    def methods(self) -> dict[str, Method]:
        """Method table of the service."""
        return methods_of(SERVICE, self, access=ACCESS, to_grpc_error=to_grpc_error)

    def get_task(self, request: wire.GetTaskRequest, call: CallContext) -> bytes | Coroutine[Any, Any, bytes]:
        """Return the next activation that matches the filters, as an encoded `GetTaskResponse`."""
        if self._delivery == "push":
            raise GrpcError(Code.PERMISSION_DENIED, "Cannot call while broker is in PUSH mode")
        queue_filter = _queue_filter_of(request)
        task = self._take_buffered(queue_filter, call)
        return self._get_when_available(queue_filter, call) if task is None else task

    async def _get_when_available(self, queue_filter: QueueFilter, call: CallContext) -> bytes:
        task = await self._fetch(queue_filter, call)
        if task is None:
            raise GrpcError(Code.NOT_FOUND, "No pending activations")
        return task

    def set_task_status(self, request: wire.SetTaskStatusRequest, call: CallContext) -> bytes | DeferredResponse | None:
        """Record the outcome of one attempt, and return the next activation if the worker requests one."""
        written = self._dispatcher.report_nowait(
            [_report_of(request)], is_awaited=self._is_awaited, reporter=call.connection
        )
        if self._delivery == "push" or not request.HasField("fetch_next_task"):
            return written
        get_next = partial(self._get_next, _queue_filter_of(request.fetch_next_task), call)
        return get_next() if written is None else ResponseAfter(written, get_next)

    def _get_next(self, queue_filter: QueueFilter, call: CallContext) -> bytes | Coroutine[Any, Any, bytes]:
        task = self._take_buffered(queue_filter, call)
        return self._get_next_when_available(queue_filter, call) if task is None else task

    async def _get_next_when_available(self, queue_filter: QueueFilter, call: CallContext) -> bytes:
        try:
            return await self._fetch(queue_filter, call) or b""
        except HeadraceError as error:  # an error would make the worker report the same outcome again
            LOG.warning("fetch.next_failed", error=error.message)
            return b""

    def set_batch_activation_status(
        self, request: wire.SetBatchActivationStatusRequest, call: CallContext
    ) -> asyncio.Future[None] | None:
        """Record the outcomes of several attempts. If one of them is invalid, none is recorded."""
        reports = [_report_of(update) for update in request.updates]
        return self._dispatcher.report_nowait(reports, is_awaited=self._is_awaited, reporter=call.connection)

    def _take_buffered(self, queue_filter: QueueFilter, call: CallContext) -> bytes | None:
        delivered = self._dispatcher.fetch_nowait(queue_filter, call.connection)
        return None if delivered is None else self._encode_response(delivered)

    async def _fetch(self, queue_filter: QueueFilter, call: CallContext) -> bytes | None:
        """Fetch and encode an activation; None if none is waiting."""
        while (delivered := await self._dispatcher.fetch(queue_filter, call.connection)) is not None:
            if (task := self._encode_response(delivered)) is not None:
                return task
        return None

    def _encode_response(self, delivered: DeliveredRun) -> bytes | None:
        message = delivery_message(self._dispatcher, delivered)
        delivered.payload = b""  # the worker has it; free the memory
        return None if message is None else as_first_field(message)


def _queue_filter_of(request: wire.GetTaskRequest | wire.FetchNextTask) -> QueueFilter:
    application, namespace = request.application, request.namespace
    return queue_filter_of(
        application if application or request.HasField("application") else None,
        namespace if namespace or request.HasField("namespace") else None,
    )


@lru_cache(FILTERS_MAX)
def queue_filter_of(application: str | None, namespace: str | None) -> QueueFilter:
    """Return the claim request of a filter. Cached: workers use the same few filters again and again."""
    return QueueFilter(application, None if namespace is None else (namespace,))


def _report_of(request: wire.SetTaskStatusRequest) -> ActivationReport:
    """Convert a status update. Raises `GrpcError` for a status that ends no attempt."""
    state = STATES.get(request.status)
    if state is None:
        raise GrpcError(
            Code.INVALID_ARGUMENT,
            f"Invalid status, expects 3 (Failure), 4 (Retry), or 5 (Complete), but got: {_status_name(request.status)}",
        )
    return ActivationReport(
        request.id,
        state,
        request.max_attempts if request.HasField("max_attempts") else None,
        request.delay_on_retry if request.HasField("delay_on_retry") else None,
    )


def _status_name(status: int) -> str:
    descriptor = wire.TaskActivationStatus.DESCRIPTOR.values_by_number.get(status)
    return str(status) if descriptor is None else descriptor.name.removeprefix(_PREFIX).capitalize()


def to_grpc_error(error: HeadraceError) -> GrpcError:
    """Convert errors of the engine to INTERNAL, as clients of the task broker expect; they retry it all the same."""
    grpc_error = status.to_grpc_error(error)
    return GrpcError(Code.INTERNAL, grpc_error.message) if isinstance(error, EngineFault) else grpc_error

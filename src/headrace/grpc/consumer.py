"""`ConsumerService`: workers in any language fetch activations and report on them.

A report is answered after the commit that holds it, many reports sharing one; with `ack="received"` at once. A worker
gets its next activation with the answer, in either case.
"""

from __future__ import annotations

from typing import Final, Literal

import structlog

from headrace.core.delimited import headed
from headrace.foundation.errors import EngineFault, HeadraceError
from headrace.grpc.activations import told
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.methods import Call
from headrace.grpc.status import Code, GrpcError, of_error
from headrace.runtime.dispatcher import Dispatcher
from headrace.runtime.handouts import Wish
from headrace.runtime.reports import Report

LOG = structlog.get_logger("headrace.grpc")
DeliveryMode = Literal["pull", "push", "both"]
Ack = Literal["committed", "received"]

STATES: Final = {
    wire.TASK_ACTIVATION_STATUS_FAILURE: "failed",
    wire.TASK_ACTIVATION_STATUS_RETRY: "retry",
    wire.TASK_ACTIVATION_STATUS_COMPLETE: "completed",
}
_PREFIX: Final = "TASK_ACTIVATION_STATUS_"
_TASK: Final = b"\x0a"
"""How the first field of a message begins, which both answers have the activation in; its length follows."""


class ConsumerService:
    """The methods of `sentry_protos.taskbroker.v1.ConsumerService`."""

    def __init__(self, dispatcher: Dispatcher, *, delivery: DeliveryMode = "pull", ack: Ack = "committed") -> None:
        self._dispatcher = dispatcher
        self._delivery = delivery
        self._is_awaited = ack == "committed"

    async def get_task(self, request: wire.GetTaskRequest, call: Call) -> bytes:
        """The next activation that the filters cover: the bytes of a `GetTaskResponse`."""
        del call
        if self._delivery == "push":
            raise GrpcError(Code.PERMISSION_DENIED, "Cannot call while broker is in PUSH mode")
        try:
            task = await self._fetched(_wish(request))
        except HeadraceError as error:
            raise _internal(error) from error
        if task is None:
            raise GrpcError(Code.NOT_FOUND, "No pending activations")
        return _TASK + headed(task)

    async def set_task_status(self, request: wire.SetTaskStatusRequest, call: Call) -> bytes:
        """How one attempt ended: the bytes of a `SetTaskStatusResponse`, with the next activation where it is wanted."""
        del call
        report = _report(request)
        await self._report([report])
        if self._delivery == "push" or not request.HasField("fetch_next_task"):
            return b""
        try:
            task = await self._fetched(_wish(request.fetch_next_task))
        except HeadraceError as error:  # an error would make the worker report once more
            LOG.warning("a worker got no next activation with its answer", error=error.message)
            task = None
        return b"" if task is None else _TASK + headed(task)

    async def set_batch_activation_status(
        self, request: wire.SetBatchActivationStatusRequest, call: Call
    ) -> wire.SetBatchActivationStatusResponse:
        """How many attempts ended; nothing is recorded when one of them says what can't be."""
        del call
        await self._report([_report(update) for update in request.updates])
        return wire.SetBatchActivationStatusResponse()

    async def _report(self, reports: list[Report]) -> None:
        try:
            await self._dispatcher.report(reports, is_awaited=self._is_awaited)
        except HeadraceError as error:
            raise _internal(error) from error

    async def _fetched(self, wish: Wish) -> bytes | None:
        while (handout := await self._dispatcher.fetch(wish)) is not None:
            message = told(self._dispatcher, handout)
            if message is not None:
                handout.payload = b""  # its worker has it
                return message
        return None


def _wish(request: wire.GetTaskRequest | wire.FetchNextTask) -> Wish:
    return Wish(
        request.application if request.HasField("application") else None,
        (request.namespace,) if request.HasField("namespace") else None,
    )


def _report(request: wire.SetTaskStatusRequest) -> Report:
    """Raises `GrpcError` for a status that concludes nothing."""
    state = STATES.get(request.status)
    if state is None:
        raise GrpcError(
            Code.INVALID_ARGUMENT,
            f"Invalid status, expects 3 (Failure), 4 (Retry), or 5 (Complete), but got: {_name(request.status)}",
        )
    return Report(
        request.id,
        state,
        request.max_attempts if request.HasField("max_attempts") else None,
        request.delay_on_retry if request.HasField("delay_on_retry") else None,
    )


def _name(status: int) -> str:
    known = wire.TaskActivationStatus.DESCRIPTOR.values_by_number.get(status)
    return str(status) if known is None else known.name.removeprefix(_PREFIX).capitalize()


def _internal(error: HeadraceError) -> GrpcError:
    """What the machine room could not do is INTERNAL, as workers know it; they ask again all the same."""
    found = of_error(error)
    return GrpcError(Code.INTERNAL, found.message) if isinstance(error, EngineFault) else found

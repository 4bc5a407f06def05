"""`ConsumerService`: workers in any language fetch activations and report on them.

A report is answered after the commit that holds it, many reports sharing one; with `ack="received"` at once. A worker
gets its next activation with the answer, in either case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import lru_cache, partial
from typing import Any, Final, Literal

import structlog

from headrace.core.delimited import headed
from headrace.foundation.errors import EngineFault, HeadraceError
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.activation_codec import told
from headrace.grpc.transport import status
from headrace.grpc.transport.service_methods import CallContext, DeferredResponse, Method, ResponseAfter, methods_of
from headrace.grpc.transport.status import Code, GrpcError
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import Handout, Wish
from headrace.runtime.dispatch.prefetcher import WISHES_MAX
from headrace.runtime.dispatch.report_outcome import Report

LOG = structlog.get_logger("headrace.grpc")
DeliveryMode = Literal["pull", "push", "both"]
Ack = Literal["committed", "received"]

SERVICE: Final = wire.DESCRIPTOR.services_by_name["ConsumerService"]
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

    @property
    def methods(self) -> dict[str, Method]:
        """What it answers, by path."""
        return methods_of(SERVICE, self, to_grpc_error=to_grpc_error)

    def get_task(self, request: wire.GetTaskRequest, call: CallContext) -> bytes | Coroutine[Any, Any, bytes]:
        """The next activation that the filters cover: the bytes of a `GetTaskResponse`."""
        del call
        if self._delivery == "push":
            raise GrpcError(Code.PERMISSION_DENIED, "Cannot call while broker is in PUSH mode")
        wish = _wish(request)
        task = self._at_once(wish)
        return self._awaited(wish) if task is None else task

    async def _awaited(self, wish: Wish) -> bytes:
        task = await self._fetched(wish)
        if task is None:
            raise GrpcError(Code.NOT_FOUND, "No pending activations")
        return task

    def set_task_status(self, request: wire.SetTaskStatusRequest, call: CallContext) -> bytes | DeferredResponse | None:
        """How one attempt ended; answers with the next activation where it is wanted."""
        del call
        written = self._dispatcher.report_nowait([_report(request)], is_awaited=self._is_awaited)
        if self._delivery == "push" or not request.HasField("fetch_next_task"):
            return written
        following = partial(self._next, _wish(request.fetch_next_task))
        return following() if written is None else ResponseAfter(written, following)

    def _next(self, wish: Wish) -> bytes | Coroutine[Any, Any, bytes]:
        task = self._at_once(wish)
        return self._next_awaited(wish) if task is None else task

    async def _next_awaited(self, wish: Wish) -> bytes:
        try:
            return await self._fetched(wish) or b""
        except HeadraceError as error:  # an error would make the worker report once more
            LOG.warning("a worker got no next activation with its answer", error=error.message)
            return b""

    def set_batch_activation_status(
        self, request: wire.SetBatchActivationStatusRequest, call: CallContext
    ) -> asyncio.Future[None] | None:
        """How many attempts ended; nothing is recorded when one of them says what can't be."""
        del call
        reports = [_report(update) for update in request.updates]
        return self._dispatcher.report_nowait(reports, is_awaited=self._is_awaited)

    def _at_once(self, wish: Wish) -> bytes | None:
        handout = self._dispatcher.fetch_nowait(wish)
        return None if handout is None else self._answer(handout)

    async def _fetched(self, wish: Wish) -> bytes | None:
        """The answer for a wish; None when nothing waits."""
        while (handout := await self._dispatcher.fetch(wish)) is not None:
            if (task := self._answer(handout)) is not None:
                return task
        return None

    def _answer(self, handout: Handout) -> bytes | None:
        message = told(self._dispatcher, handout)
        handout.payload = b""  # its worker has it
        return None if message is None else _TASK + headed(message)


def _wish(request: wire.GetTaskRequest | wire.FetchNextTask) -> Wish:
    application, namespace = request.application, request.namespace
    return wish_of(
        application if application or request.HasField("application") else None,
        namespace if namespace or request.HasField("namespace") else None,
    )


@lru_cache(WISHES_MAX)
def wish_of(application: str | None, namespace: str | None) -> Wish:
    """Workers wish for the same again and again."""
    return Wish(application, None if namespace is None else (namespace,))


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


def to_grpc_error(error: HeadraceError) -> GrpcError:
    """What the machine room could not do is INTERNAL, as workers know it; they ask again all the same."""
    found = status.to_grpc_error(error)
    return GrpcError(Code.INTERNAL, found.message) if isinstance(error, EngineFault) else found

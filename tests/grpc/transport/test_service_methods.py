"""Method tables from service descriptors, and the conversion of errors to status codes."""

from __future__ import annotations

from collections.abc import Coroutine

import pytest

from headrace.foundation.errors import (
    Conflict,
    HeadraceError,
    InvalidInput,
    NotFound,
    SessionEnded,
    StoreBroken,
    StoreUnavailable,
)
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker.consumer_service import ACCESS
from headrace.grpc.transport.service_methods import CallContext, methods_of
from headrace.grpc.transport.status import MESSAGE_CHARS_MAX, Code, GrpcError, to_grpc_error

CONSUMER = wire.DESCRIPTOR.services_by_name["ConsumerService"]


class Consumer:
    """A service that returns parts of its requests."""

    async def get_task(self, request: wire.GetTaskRequest, call: CallContext) -> wire.GetTaskResponse:
        return wire.GetTaskResponse(task=wire.TaskActivation(id=request.namespace, taskname=call.path))

    async def set_task_status(
        self, request: wire.SetTaskStatusRequest, call: CallContext
    ) -> wire.SetTaskStatusResponse:
        raise GrpcError(Code.INVALID_ARGUMENT, request.id)

    async def set_batch_activation_status(
        self, request: wire.SetBatchActivationStatusRequest, call: CallContext
    ) -> wire.SetBatchActivationStatusResponse:
        return wire.SetBatchActivationStatusResponse()


async def test_a_service_has_the_paths_of_its_descriptor() -> None:
    methods = methods_of(CONSUMER, Consumer(), access=ACCESS)
    path = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
    assert set(methods) == {path, path.replace("GetTask", "SetTaskStatus")} | {
        path.replace("GetTask", "SetBatchActivationStatus")
    }
    method = methods[path]
    assert method.access is ACCESS["GetTask"]
    assert not method.is_stream
    answer = method.handler(method.request(namespace="n"), CallContext(path))
    assert isinstance(answer, Coroutine)
    response = await answer
    assert response == wire.GetTaskResponse(task=wire.TaskActivation(id="n", taskname=path))


def test_a_service_without_one_of_its_methods_is_refused() -> None:
    with pytest.raises(AttributeError, match="get_task"):
        methods_of(CONSUMER, object(), access=ACCESS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), Code.INVALID_ARGUMENT),
        (NotFound("x"), Code.NOT_FOUND),
        (Conflict("x"), Code.FAILED_PRECONDITION),
        (StoreUnavailable("x"), Code.UNAVAILABLE),
        (StoreBroken("x"), Code.INTERNAL),
        (SessionEnded("x"), Code.ABORTED),
    ],
)
def test_an_engine_error_has_the_matching_grpc_code(error: HeadraceError, code: Code) -> None:
    assert to_grpc_error(error).code == code


def test_an_error_message_includes_the_hint_and_is_bounded() -> None:
    assert to_grpc_error(InvalidInput("no such queue", hint="make one")).message == "no such queue; make one"
    assert len(GrpcError(Code.INTERNAL, "x" * (MESSAGE_CHARS_MAX + 1)).message) == MESSAGE_CHARS_MAX

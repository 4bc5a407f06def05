"""A task broker worker written from the contract alone: `contract_worker.py TARGET SECRET LOG [PORT]`.

It pulls tasks or, with a port, receives pushed tasks there. It logs each task before it reports it, signs every call,
and refuses unsigned calls. Its messages are built here from the field numbers of the contract. It keeps retrying while
the server is unavailable, as Sentry's client does.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import queue
import sys
import threading
from concurrent import futures
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import grpc

PACKAGE = "sentry_protos.taskbroker.v1"
FIELD = descriptor_pb2.FieldDescriptorProto
COMPLETE = 5
RETRIED_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)


def messages() -> dict[str, Any]:
    """Return the message classes of the contract that the worker uses, by name."""
    file = descriptor_pb2.FileDescriptorProto(name="contract.proto", package=PACKAGE, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any]) -> None:
        descriptor = file.message_type.add(name=name)
        for field, number, kind in fields:
            field_descriptor = descriptor.field.add(name=field, number=number, label=FIELD.LABEL_OPTIONAL)
            if isinstance(kind, str):
                field_descriptor.type, field_descriptor.type_name = FIELD.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field_descriptor.type = kind

    text, count = FIELD.TYPE_STRING, FIELD.TYPE_UINT64
    message("TaskActivation", ("id", 1, text), ("taskname", 3, text), ("processing_deadline_duration", 8, count),
            ("parameters_bytes", 13, FIELD.TYPE_BYTES))  # fmt: skip
    message("GetTaskRequest", ("namespace", 1, text), ("application", 2, text))
    message("GetTaskResponse", ("task", 1, "TaskActivation"))
    message("FetchNextTask", ("namespace", 1, text), ("application", 2, text))
    message(
        "SetTaskStatusRequest",
        ("id", 1, text),
        ("status", 2, FIELD.TYPE_INT32),
        ("fetch_next_task", 3, "FetchNextTask"),
    )
    message("SetTaskStatusResponse", ("task", 1, "TaskActivation"))
    message("SetBatchActivationStatusRequest", ("updates", 1, "SetTaskStatusRequest"))
    file.message_type[-1].field[0].label = FIELD.LABEL_REPEATED
    message("SetBatchActivationStatusResponse")
    message("PushTaskRequest", ("task", 1, "TaskActivation"), ("callback_url", 2, text))
    message("PushTaskResponse")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [descriptor.name for descriptor in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


class Client:
    """Client of the consumer service that signs each call."""

    def __init__(self, target: str, secret: str) -> None:
        self._secret = secret.encode()
        self._channel = grpc.insecure_channel(target)
        self.messages = messages()

    def call(self, method: str, request: Any) -> Any:
        """Send a call, with retries until the server responds. Return None if the server has no task."""
        path = f"/{PACKAGE}.ConsumerService/{method}"
        data = request.SerializeToString()
        signature = hmac.new(self._secret, path.encode() + b":" + data, hashlib.sha256).hexdigest()
        unary_call = self._channel.unary_unary(
            path, request_serializer=lambda _: data, response_deserializer=self.messages[f"{method}Response"].FromString
        )
        while True:
            try:
                return unary_call(request, metadata=(("sentry-signature", signature),), timeout=20)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return None
                if error.code() not in (*RETRIED_CODES, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                wait(0.1)


wait = threading.Event().wait


class WorkerService(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio ships no types
    """The worker service: accepts signed pushes while its queue has space."""

    def __init__(self, secret: str, messages: dict[str, Any]) -> None:
        self._secret, self._messages = secret.encode(), messages
        self.tasks: queue.Queue[Any] = queue.Queue(maxsize=32)

    def service(self, details: Any) -> Any:
        """Handle every method as a push."""
        return grpc.unary_unary_rpc_method_handler(lambda data, context: self._push(details.method, data, context))

    def _push(self, path: str, data: bytes, context: Any) -> bytes:
        expected = hmac.new(self._secret, path.encode() + b":" + data, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(dict(context.invocation_metadata()).get("sentry-signature", ""), expected):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication failed")
        try:
            self.tasks.put_nowait(self._messages["PushTaskRequest"].FromString(data).task)
        except queue.Full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "worker busy")
        return bytes(self._messages["PushTaskResponse"]().SerializeToString())


def serve_pushes(client: Client, secret: str, file: int, port: int) -> None:
    """Execute pushed tasks, and report several at a time."""
    messages = client.messages
    service = WorkerService(secret, messages)
    server = grpc.server(futures.ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    while True:
        tasks = [service.tasks.get()]
        while len(tasks) < 16 and not service.tasks.empty():
            tasks.append(service.tasks.get())
        for task in tasks:
            os.write(file, task.parameters_bytes + b"\n")
        updates = [messages["SetTaskStatusRequest"](id=task.id, status=COMPLETE) for task in tasks]
        client.call("SetBatchActivationStatus", messages["SetBatchActivationStatusRequest"](updates=updates))


def pull(client: Client, file: int) -> None:
    """Fetch a task, execute it, and report it; the response has the next task."""
    messages = client.messages
    task = None
    while True:
        if task is None:
            response = client.call("GetTask", messages["GetTaskRequest"](application="app"))
            if response is None:
                wait(0.05)
                continue
            task = response.task
        os.write(file, task.parameters_bytes + b"\n")
        report = messages["SetTaskStatusRequest"](id=task.id, status=COMPLETE)
        report.fetch_next_task.application = "app"
        response = client.call("SetTaskStatus", report)
        task = response.task if response is not None and response.HasField("task") else None


def main(target: str, secret: str, log: str, port: str = "") -> None:
    client = Client(target, secret)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if port:
        serve_pushes(client, secret, file, int(port))
    pull(client, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A worker of the task broker that knows its contract and nothing else: `contract_worker.py TARGET SECRET LOG [PORT]`.

It pulls or, with a port, is pushed to there; it writes down what it did before it reports, signs every call, and takes
none that is not signed. Its messages are written here from the contract's own field numbers. It goes on over a server
that is away, as the field's client does.
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
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)


def messages() -> dict[str, Any]:
    """The messages that a worker which pulls needs, by name."""
    file = descriptor_pb2.FileDescriptorProto(name="contract.proto", package=PACKAGE, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, Any]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind in fields:
            own = made.field.add(name=field, number=number, label=FIELD.LABEL_OPTIONAL)
            if isinstance(kind, str):
                own.type, own.type_name = FIELD.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                own.type = kind

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
    names = [one.name for one in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


class Client:
    """The consumer service, each call signed."""

    def __init__(self, target: str, secret: str) -> None:
        self._secret = secret.encode()
        self._channel = grpc.insecure_channel(target)
        self.messages = messages()

    def call(self, method: str, request: Any) -> Any:
        """One call, again until the server is there; None when it has nothing."""
        path = f"/{PACKAGE}.ConsumerService/{method}"
        data = request.SerializeToString()
        signature = hmac.new(self._secret, path.encode() + b":" + data, hashlib.sha256).hexdigest()
        asked = self._channel.unary_unary(
            path, request_serializer=lambda _: data, response_deserializer=self.messages[f"{method}Response"].FromString
        )
        while True:
            try:
                return asked(request, metadata=(("sentry-signature", signature),), timeout=20)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return None
                if error.code() not in (*AWAY, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                rest(0.1)


rest = threading.Event().wait


class Pushed(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio ships no types
    """The worker service: what is signed and finds room is taken, and done later."""

    def __init__(self, secret: str, made: dict[str, Any]) -> None:
        self._secret, self._made = secret.encode(), made
        self.tasks: queue.Queue[Any] = queue.Queue(maxsize=32)

    def service(self, details: Any) -> Any:
        """One method there is."""
        return grpc.unary_unary_rpc_method_handler(lambda data, context: self._push(details.method, data, context))

    def _push(self, path: str, data: bytes, context: Any) -> bytes:
        wanted = hmac.new(self._secret, path.encode() + b":" + data, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(dict(context.invocation_metadata()).get("sentry-signature", ""), wanted):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication failed")
        try:
            self.tasks.put_nowait(self._made["PushTaskRequest"].FromString(data).task)
        except queue.Full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "worker busy")
        return bytes(self._made["PushTaskResponse"]().SerializeToString())


def be_pushed_to(client: Client, secret: str, file: int, port: int) -> None:
    """Do what is pushed, and report on some at a time."""
    made = client.messages
    pushed = Pushed(secret, made)
    server = grpc.server(futures.ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((pushed,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    while True:
        tasks = [pushed.tasks.get()]
        while len(tasks) < 16 and not pushed.tasks.empty():
            tasks.append(pushed.tasks.get())
        for task in tasks:
            os.write(file, task.parameters_bytes + b"\n")
        told = [made["SetTaskStatusRequest"](id=task.id, status=COMPLETE) for task in tasks]
        client.call("SetBatchActivationStatus", made["SetBatchActivationStatusRequest"](updates=told))


def pull(client: Client, file: int) -> None:
    """Fetch, do, report and be answered with the next."""
    made = client.messages
    task = None
    while True:
        if task is None:
            answer = client.call("GetTask", made["GetTaskRequest"](application="app"))
            if answer is None:
                rest(0.05)
                continue
            task = answer.task
        os.write(file, task.parameters_bytes + b"\n")
        told = made["SetTaskStatusRequest"](id=task.id, status=COMPLETE)
        told.fetch_next_task.application = "app"
        answer = client.call("SetTaskStatus", told)
        task = answer.task if answer is not None and answer.HasField("task") else None


def main(target: str, secret: str, log: str, port: str = "") -> None:
    client = Client(target, secret)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if port:
        be_pushed_to(client, secret, file, int(port))
    pull(client, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

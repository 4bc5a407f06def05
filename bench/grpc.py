"""The task broker over gRPC on loopback, beside bare calls of the same size.

`python -m bench.grpc [echo pull push many] [--store URL] [--tasks N]`: each scenario has a server in another process,
and a load generator that is only a socket and frames. Each figure has a baseline from the same run. For `echo` it is a
server that finds frames and sends a fixed response (`headrace.benchmarks.baselines.echo`), for `pull` two bare calls of
the same sizes on the same transport, for `push` the same pushes and reports without a store.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import psutil

from bench.grpc_wire import HEAD, field, frame, headers
from headrace.foundation.access import open_to_all
from headrace.foundation.limits import MIB

OPEN: Final = open_to_all(64 * MIB)

ROUNDS: Final = 3
PAIRS: Final = 5
IN_FLIGHT: Final = 64
SECRET: Final = "a secret of many bytes"
GET: Final = "/sentry_protos.taskbroker.v1.ConsumerService/GetTask"
SET: Final = "/sentry_protos.taskbroker.v1.ConsumerService/SetTaskStatus"
SET_MANY: Final = "/sentry_protos.taskbroker.v1.ConsumerService/SetBatchActivationStatus"
REPORTED_AT_ONCE: Final = 32
DONE: Final = b"grpc-status\x010"
Next = Callable[[bytes], "tuple[bytes, bytes] | None"]


class Load:
    """Load generator over one connection, as cheap as Python allows: chains of calls, each made from the response
    before it.
    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        window = struct.pack(">I", 2**31 - 1 - 65_535)
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, 2**30)) + frame(8, 0, 0, window)
        )
        self._next_id = 1
        self._left = b""
        self.errors_count = 0

    def run(self, chains: Sequence[Next]) -> int:
        """Run chains, and return the number of calls. A chain takes the message of a response (b"" at first and for an
        error) and returns the next call.
        """
        calls_count = 0
        waiting: dict[int, Next] = {}
        messages: dict[int, bytes] = {}
        out: list[bytes] = []

        def go(chain: Next, message: bytes) -> None:
            call = chain(message)
            if call is not None:
                stream_id, self._next_id = self._next_id, self._next_id + 2
                waiting[stream_id] = chain
                body = b"\0" + struct.pack(">I", len(call[1])) + call[1]
                out.append(frame(1, 4, stream_id, call[0]) + frame(0, 1, stream_id, body))

        for chain in chains:
            go(chain, b"")
        while waiting:
            if out:
                self._socket.sendall(b"".join(out))
                out.clear()
            data = self._left + self._socket.recv(1 << 18)
            offset, end = 0, len(data)
            while end - offset >= 9:
                high, low, kind, flags, stream_id = HEAD.unpack_from(data, offset)
                stop = offset + 9 + (high << 8 | low)
                if stop > end:
                    break
                if kind == 0:
                    messages[stream_id] = data[offset + 14 : stop]
                elif kind == 4 and not flags & 1:
                    out.append(frame(4, 1, 0, b""))
                elif kind in (3, 7):
                    raise SystemExit(f"the server closed the connection: {data[offset:stop]!r}")
                if flags & 1 and kind in (0, 1):
                    calls_count += 1
                    self.errors_count += stream_id not in messages and DONE not in data[offset + 9 : stop]
                    go(waiting.pop(stream_id), messages.pop(stream_id, b""))
                offset = stop
            self._left = data[offset:]
        return calls_count


def repeated(path: str, message: bytes, count: int) -> list[Next]:
    """Return chains that make `count` equal calls in all."""
    block, left = headers(path), [count]

    def chain(_message: bytes) -> tuple[bytes, bytes] | None:
        left[0] -= 1
        return (block, message) if left[0] >= 0 else None

    return [chain] * IN_FLIGHT


# -- servers


class Figure(NamedTuple):
    """Rate per second, and processor time of the server for each, in microseconds."""

    rate: float
    cpu_us: float


class Peer(NamedTuple):
    """A server: its output (the port), and its process id."""

    output: str
    pid: int

    @property
    def port(self) -> int:
        """Port of the server."""
        return int(self.output)

    def cpu_s(self) -> float:
        """Return the processor time of the server so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def process(*arguments: str, pattern: str, **environ: str) -> Iterator[Peer]:
    """Run a Python program, and yield the group of the first output line that matches `pattern`."""
    child = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environ},
    )
    try:
        assert child.stdout is not None
        while (match := re.search(pattern, line := child.stdout.readline())) is None:
            assert line, f"{arguments} ended before it printed {pattern}"
        yield Peer(match[1], child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        assert child.stdout is not None
        for line in child.stdout:
            if os.environ.get("SHOW"):
                sys.stderr.write(line)
        child.wait()


@contextmanager
def serve_store(store: str, *flags: str, **environ: str) -> Iterator[Peer]:
    """Run `headrace serve` on an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        url = store or f"sqlite:///{folder}/bench.db"
        environ = {
            "HEADRACE_STORE": url,
            "HEADRACE_OBJECTS": f"{folder}/objects",
            "HEADRACE_OBJECTS_SHARED": "true",
            **environ,
        }
        command = ("-m", "headrace", "serve", "--port", "0", "--no-auth", *flags)
        with process(*command, pattern=r"serving .* on http://127\.0\.0\.1:(\d+)", **environ) as peer:
            yield peer


def fill(port: int, count: int, label: str) -> None:
    """Append `count` activations of about 200 bytes."""
    arguments = field(13, b"\x82\xa4args\x91\xd9\x60" + b"x" * 96 + b"\xa6kwargs\x80")
    fixed = field(2, b"bench") + field(3, b"bench.task") + arguments + field(12, b"app") + b"\x40\x0a"
    with socket.create_connection(("127.0.0.1", port)) as peer:
        loops = ("POST /v1/activations HTTP/1.1", "host: localhost", "connection: close", "transfer-encoding: chunked")
        head = "\r\n".join((*loops, "content-type: application/x-protobuf", "", ""))
        peer.sendall(head.encode())
        for start in range(0, count, 1_000):
            messages = (
                field(1, b"%s-%d" % (label.encode(), n)) + fixed for n in range(start, min(start + 1_000, count))
            )
            data = b"".join(field(1, message)[1:] for message in messages)
            peer.sendall(b"%x\r\n" % len(data) + data + b"\r\n")
        peer.sendall(b"0\r\n\r\n")
        answer = b""
        while piece := peer.recv(65_536):
            answer += piece
    assert f'"accepted":{count}'.encode() in answer, answer


def best(measure: Callable[[], Figure]) -> Figure:
    """Return the best of some measurements: disturbances by other users of the machine only make a figure worse."""
    figures = [measure() for _ in range(ROUNDS)]
    return Figure(max(figure.rate for figure in figures), min(figure.cpu_us for figure in figures))


def in_turns(measured: Callable[[], Figure], base: Callable[[], Figure]) -> tuple[Figure, Figure]:
    """Measure both alternately, so that a slow phase of the machine affects both; return the pair with the median
    ratio.
    """
    pairs = [(measured(), base()) for _ in range(PAIRS)]
    return sorted(pairs, key=lambda pair: pair[0].rate / pair[1].rate)[PAIRS // 2]


def timed(count: int, work: Callable[[], object], server: Peer) -> Figure:
    """Time `count` operations of a server."""
    cpu_s, began = server.cpu_s(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return Figure(count / seconds, (server.cpu_s() - cpu_s) / count * 1e6)


# -- scenarios


def echo(_options: argparse.Namespace) -> None:
    """Measure bare calls: the cost of the transport."""
    message = field(2, b"x" * 197)
    results = {}
    headrace = ("-m", "bench.grpc", "serve-echo", "200")
    baseline = ("-m", "headrace.benchmarks.baselines.echo", "200")
    for name, command in (
        ("headrace", headrace),
        ("baseline", baseline),
        ("grpcio", ("-m", "bench.grpc", "serve-grpcio")),
    ):
        with process(*command, pattern=r"^(\d+)$") as server:
            results[name] = best(partial(_echoes, server, message))
    show(
        "echo, 200 bytes both ways",
        results["headrace"],
        "calls/s",
        results["baseline"],
        "fixed answers, nothing decoded",
    )
    show("the same", results["headrace"], "calls/s", results["grpcio"], "grpcio's server on a loop")


def _echoes(server: Peer, message: bytes) -> Figure:
    load = Load(server.port)
    figure = timed(20_000, lambda: load.run(repeated("/e/Echo", message, 20_000)), server)
    assert not load.errors_count
    return figure


def pull(options: argparse.Namespace) -> None:
    """Measure a GetTask and a SetTaskStatus for each no-op task."""
    get, put = headers(GET), headers(SET)
    request = field(2, b"app")
    done: list[bytes] = []

    def chain(message: bytes, is_fetching: list[bool]) -> tuple[bytes, bytes] | None:
        is_fetching[0] = not is_fetching[0]
        if is_fetching[0]:
            return get, request
        if not message:
            return None
        name = id_of(message)
        done.append(name)
        return put, field(1, name) + b"\x10\x05"

    def drain(server: Peer) -> Figure:
        fill(server.port, options.tasks, f"pull{time.time_ns()}")
        done.clear()
        state = [[False] for _ in range(IN_FLIGHT)]
        chains = [lambda message, flag=flag: chain(message, flag) for flag in state]
        figure = timed(options.tasks, lambda: Load(server.port).run(chains), server)
        assert len(set(done)) == options.tasks, (len(done), len(set(done)))
        return figure

    echoes = process("-m", "bench.grpc", "serve-echo", "230", pattern=r"^(\d+)$")
    with serve_store(options.store) as server, echoes as plain:
        send_bare = partial(bare_calls, plain.port, options.tasks)
        measured, bare = in_turns(lambda: drain(server), lambda: timed(options.tasks, send_bare, plain))
    show("pull and report, a call each", measured, "tasks/s", bare, "the same two calls, bare")


def bare_calls(port: int, tasks: int) -> None:
    """Send as many calls of the same sizes to handlers that do nothing."""
    Load(port).run(
        repeated("/e/Fixed", field(2, b"app"), tasks) + repeated("/e/Empty", field(1, b"x" * 30) + b"\x10\x05", tasks)
    )


def id_of(message: bytes) -> bytes:
    """Return the id of the activation in a `GetTaskResponse`: the first field of its first field."""
    offset = 1
    while message[offset] & 128:
        offset += 1
    size = message[offset + 2]
    return message[offset + 3 : offset + 3 + size]


def push(options: argparse.Namespace) -> None:
    """Measure pushes to a worker that does nothing and reports in batches."""
    results = {}
    for name, store in (("headrace", options.store), ("transport alone", "none")):
        command = [sys.executable, "-m", "bench.grpc", "serve-worker", str(options.tasks), store or "sqlite"]
        results[name] = best(partial(_pushed, command))
    measured, bare = results["headrace"], results["transport alone"]
    show("push, reports in batches", measured, "tasks/s", bare, "without a store")
    print(f"    transport: {bare.cpu_us / measured.cpu_us:.0%} of the server's processor time")


def _pushed(command: Sequence[str]) -> Figure:
    return Figure(*map(float, subprocess.check_output(command).split()))


def many(options: argparse.Namespace) -> None:
    """Measure ClaimMany and SettleMany of no-op runs."""
    with serve_store(options.store, HEADRACE_GRPC_SECRETS=SECRET) as server:
        results = best(lambda: asyncio.run(_many(server, 10 * options.tasks)))
    show("ClaimMany and SettleMany", results, "runs/s", Figure(60_000, 0), "the goal")


async def _many(server: Peer, count: int) -> Figure:
    from headrace.foundation.targets import PushTarget
    from headrace.grpc.messages import broker_pb2 as wire
    from headrace.grpc.transport.bounds import Bounds
    from headrace.grpc.transport.budget import Budget
    from headrace.grpc.transport.client import Channel
    from headrace.grpc.transport.signing import Secrets

    port = server.port
    await asyncio.to_thread(_batch, port, count)
    target = PushTarget("bench", "127.0.0.1", port, is_tls=False)
    channel = Channel(target, Bounds(1 << 26, 100), Budget(1 << 28), secrets=Secrets((SECRET,)))

    async def call(method: str, request: Any, response_class: Any) -> Any:
        body = await channel.call(f"/headrace.v1.Broker/{method}", request.SerializeToString(), timeout_s=60)
        return response_class.FromString(body)

    session = (await call("StartSession", wire.StartSessionRequest(host="bench"), wire.StartSessionResponse)).session
    numbers = iter(range(1, 1 << 30))
    settled_count = 0

    async def work() -> None:
        nonlocal settled_count
        while True:
            claim = wire.ClaimManyRequest(session=session, claim_no=next(numbers), tasks=["task"], runs_max=2_048)
            leases = (await call("ClaimMany", claim, wire.ClaimManyResponse)).leases
            if not leases:
                return
            settlements = [wire.Settlement(lease=claimed.lease, places=claimed.places) for claimed in leases]
            words = (
                await call("SettleMany", wire.SettleManyRequest(settlements=settlements), wire.SettleManyResponse)
            ).words
            assert not any(words)
            settled_count += sum(len(claimed.places) for claimed in leases)

    cpu_s, began = server.cpu_s(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(3)))
    seconds = time.perf_counter() - began
    channel.close()
    assert settled_count == count, settled_count
    return Figure(count / seconds, (server.cpu_s() - cpu_s) / count * 1e6)


def _batch(port: int, count: int) -> None:
    """Create a batch of `count` runs of a task."""
    import json

    with socket.create_connection(("127.0.0.1", port)) as peer:
        file = peer.makefile("rb")

        def request(path: str, body: bytes, kind: str) -> Any:
            lines = (
                f"POST {path} HTTP/1.1",
                "host: localhost",
                f"content-type: {kind}",
                f"content-length: {len(body)}",
            )
            head = "\r\n".join((*lines, "", ""))
            peer.sendall(head.encode() + body)
            size = 0
            while (line := file.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            return json.loads(file.read(size))

        batch = request("/api/v3/batches", json.dumps({"runCount": count}).encode(), "application/json")["id"]
        items = (b'{"index":%d,"task":"task","payload":{"text":"%s"}}\n' % (n, b"x" * 60) for n in range(count))
        answer = request(f"/api/v3/batches/{batch}/items", b"".join(items), "application/x-ndjson")
        assert answer["sealed"], answer


def show(what: str, figure: Figure, unit: str, base: Figure, baseline: str) -> None:
    """Print a line of the table: both rates, and the processor time of each server."""
    print(f"{what:30} {figure.rate:>9,.0f} {unit:8} {figure.cpu_us:6.1f} us   {baseline}: {base.rate:,.0f}", end="")
    print(f", {base.cpu_us:.1f} us" if base.cpu_us else "", end="")
    by_cpu = f", by processor time {base.cpu_us / figure.cpu_us:.2f}" if base.cpu_us else ""
    print(f"; ratio {figure.rate / base.rate:.2f}{by_cpu}", flush=True)


# -- programs of the other processes


async def serve_echo(size: int) -> None:
    """Serve bare calls on Headrace's transport: an echo, a fixed response of a given size, and an empty response."""
    from headrace.foundation.limits import Limits
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.transport.server import GrpcServer, ServerProtocol
    from headrace.grpc.transport.service_methods import Method

    fixed, empty = wire.PushTaskRequest(callback_url="x" * (size - 3)), wire.PushTaskRequest()

    async def same(message: Any, _call: Any) -> Any:
        return message

    async def answer(_message: Any, _call: Any) -> Any:
        return fixed

    async def nothing(_message: Any, _call: Any) -> Any:
        return empty

    request_class = wire.PushTaskRequest
    methods = {
        "/e/Echo": Method(request_class, same, OPEN),
        "/e/Fixed": Method(request_class, answer, OPEN),
        "/e/Empty": Method(wire.SetTaskStatusRequest, nothing, OPEN),
    }
    server = GrpcServer(methods, limits=Limits())
    listener = await asyncio.get_running_loop().create_server(lambda: ServerProtocol(server), "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


async def serve_grpcio() -> None:
    """Serve the same echo on grpcio's server."""
    import grpc.aio

    import grpc

    async def same(message: bytes, _context: Any) -> bytes:
        return message

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(same)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("e", {"Echo": method}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


async def serve_worker(tasks: int, store: str) -> None:
    """Run a worker that reports `REPORTED_AT_ONCE` tasks at a time, and the server that pushes to it; print the
    rate.
    """
    from headrace.foundation.limits import Limits
    from headrace.foundation.targets import PushTarget
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.transport.bounds import Bounds
    from headrace.grpc.transport.budget import Budget
    from headrace.grpc.transport.client import Channel
    from headrace.grpc.transport.server import GrpcServer, ServerProtocol
    from headrace.grpc.transport.service_methods import methods_of

    done: set[str] = set()
    over = asyncio.Event()
    began = [0.0]
    waiting: list[wire.SetTaskStatusRequest] = []
    reports: set[asyncio.Task[bytes]] = set()
    channel: Channel

    class Worker:
        async def push_task(self, request: wire.PushTaskRequest, _call: Any) -> wire.PushTaskResponse:
            began[0] = began[0] or time.perf_counter()
            waiting.append(wire.SetTaskStatusRequest(id=request.task.id, status=wire.TASK_ACTIVATION_STATUS_COMPLETE))
            done.add(request.task.id)
            if len(waiting) >= REPORTED_AT_ONCE or len(done) == tasks:
                reports.add(asyncio.create_task(report()))
            return wire.PushTaskResponse()

    at_once = asyncio.Semaphore(8)

    async def report() -> bytes:
        updates, waiting[:] = waiting[:], []
        body = wire.SetBatchActivationStatusRequest(updates=updates).SerializeToString()
        async with at_once:
            response = await channel.call(SET_MANY, body, timeout_s=60)
        if len(done) == tasks and not waiting:
            over.set()
        return response

    service = wire.DESCRIPTOR.services_by_name["WorkerService"]
    worker = GrpcServer(methods_of(service, Worker(), access={"PushTask": OPEN}), limits=Limits())
    listener = await asyncio.get_running_loop().create_server(lambda: ServerProtocol(worker), "127.0.0.1", 0)
    worker_port = listener.sockets[0].getsockname()[1]
    environ = {"HEADRACE_PUSH": f"app=http://127.0.0.1:{worker_port}", "HEADRACE_DELIVERY": "push"}
    with (
        process("-m", "bench.grpc", "serve-pusher", str(tasks), str(worker_port), pattern=r"^(\d+)$")
        if store == "none"
        else serve_store("" if store == "sqlite" else store, **environ)
    ) as server:
        target = PushTarget("app", "127.0.0.1", server.port, is_tls=False)
        channel = Channel(target, Bounds(1 << 26, 100), Budget(1 << 28))
        cpu_s = server.cpu_s()
        if store != "none":
            await asyncio.to_thread(fill, server.port, tasks, f"push{time.time_ns()}")
        await over.wait()
        await asyncio.gather(*reports)
        seconds = time.perf_counter() - began[0]
        print(f"{tasks / seconds:.1f} {(server.cpu_s() - cpu_s) / tasks * 1e6:.2f}", flush=True)
        channel.close()


async def serve_pusher(tasks: int, worker_port: int) -> None:
    """Run the pusher over activations in memory, with reports that are not stored."""
    from headrace.foundation.limits import Limits
    from headrace.foundation.targets import PushTarget
    from headrace.grpc.messages import taskbroker_pb2 as wire
    from headrace.grpc.taskbroker.delivery_protocol import PushDelivery
    from headrace.grpc.taskbroker.pusher import Pusher
    from headrace.grpc.transport.server import GrpcServer, ServerProtocol
    from headrace.grpc.transport.service_methods import Method
    from headrace.runtime.clock import SystemClock
    from headrace.runtime.wakeup import Wakeup

    class MemoryDeliveries:
        def __init__(self) -> None:
            body = wire.TaskActivation(id="", application="app", taskname="bench.task", parameters_bytes=b"x" * 120)
            fields = body.SerializeToString()
            names = (f"push-{number}" for number in range(tasks))
            self.left = [PushDelivery(name, "app", field(1, name.encode()) + fields) for name in names]

        async def take(self, application: str, count_max: int, *, lease_ms: int) -> list[PushDelivery]:  # noqa: ARG002
            deliveries, self.left = self.left[:count_max], self.left[count_max:]
            return deliveries

        async def mark(self, _names: Sequence[str]) -> None:
            return None

        async def release(self, _names: Sequence[str]) -> None:
            raise AssertionError("expected the worker to refuse no push")

        async def parked(self, _applications: Sequence[str]) -> dict[str, int]:
            return {}

    async def acknowledge(_message: Any, _call: Any) -> Any:
        return wire.SetBatchActivationStatusResponse()

    server = GrpcServer({SET_MANY: Method(wire.SetBatchActivationStatusRequest, acknowledge, OPEN)}, limits=Limits())
    listener = await asyncio.get_running_loop().create_server(lambda: ServerProtocol(server), "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    target = PushTarget("app", "127.0.0.1", worker_port, is_tls=False)
    pusher = Pusher(MemoryDeliveries(), [target], limits=Limits(), clock=SystemClock(), wakeup=Wakeup())
    await pusher.start()
    await listener.serve_forever()


SCENARIOS: Final = {"echo": echo, "pull": pull, "push": push, "many": many}


def main() -> None:
    """Run the scenarios given as arguments, in order."""
    words = sys.argv[1:]
    if words and words[0].startswith("serve-"):
        import uvloop

        from headrace.foundation import interpreter

        interpreter.tune()
        programs: dict[str, Callable[..., Any]] = {
            "serve-echo": serve_echo,
            "serve-grpcio": serve_grpcio,
            "serve-worker": serve_worker,
            "serve-pusher": serve_pusher,
        }
        uvloop.run(programs[words[0]](*(int(word) if word.isdigit() else word for word in words[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=[*SCENARIOS])
    parser.add_argument("--store", default="", help="URL of an empty database (default: a SQLite file)")
    parser.add_argument("--tasks", type=int, default=20_000)
    options = parser.parse_args()
    for name in options.scenarios:
        SCENARIOS[name](options)


if __name__ == "__main__":
    main()

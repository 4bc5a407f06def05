"""HTTP endpoints over real sockets: a server that sends the responses of a test, with and without TLS."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import trustme

from headrace.app import Headrace
from headrace.core.endpoint import EndpointRefused
from headrace.core.failure import Failure
from headrace.core.retry import Retry
from headrace.foundation.errors import InvalidSetting
from headrace.handles import Run, RunFailed
from headrace.runtime.tasks.http_endpoint import ANSWER_BYTES_MAX, HEADERS_MAX, Endpoint
from tests.support.engines import app_on, opened

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
LOOPBACK = ["127.0.0.0/8", "::1/128"]
QUICK = Retry(attempts=4, delay_s=0.0)


class Request(NamedTuple):
    """A request that the server received."""

    path: str
    headers: dict[str, str]
    body: bytes


class Response(NamedTuple):
    """A response that the server sends."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


class Server:
    """A server that sends the given responses in order, then repeats the last; `None` closes the connection without a
    response.
    """

    def __init__(self, responses: list[Response | None]) -> None:
        self.requests: list[Request] = []
        self.port = 0
        self._responses = responses
        self._lock = threading.Lock()

    def respond(self, request: Request) -> Response | None:
        with self._lock:
            self.requests.append(request)
            return self._responses[min(len(self.requests), len(self._responses)) - 1]


@contextmanager
def serving(*responses: Response | None, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(list(responses))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            response = server.respond(Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if response is None:
                self.close_connection = True
                return
            self.send_response(response.status)
            for name, value in {"content-length": str(len(response.body)), **response.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, *args: Any) -> None:
            pass

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    http = QuietServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    server.port = http.server_address[1]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@asynccontextmanager
async def working(tmp_path: Path) -> AsyncIterator[Headrace]:
    async with opened("sqlite", tmp_path) as engine, app_on(engine) as app:
        yield app
        for endpoint in app._endpoints:
            await endpoint.close()


async def failure_of(run: Run[Any]) -> Failure:
    with pytest.raises(RunFailed) as raised:
        await run.result()
    assert raised.value.failure is not None
    return raised.value.failure


JSON = {"content-type": "application/json; charset=utf-8"}


async def test_a_request_is_signed_and_its_response_is_the_result(tmp_path: Path) -> None:
    with serving(Response(200, b'{"done": 1}', JSON)) as server:
        async with working(tmp_path) as app:
            url = f"http://127.0.0.1:{server.port}/hooks/resize?v=2"
            resize = app.endpoint("resize", url, secret=SECRET, allow=LOOPBACK, headers={"authorization": "Bearer t"})
            async with app.worker():
                run = await resize.options(headers={"traceparent": "00-1-2-01", "private": "x"}).enqueue({"w": 1.5})
                assert await run.result() == {"done": 1}
    (request,) = server.requests
    assert (request.path, request.body) == ("/hooks/resize?v=2", b'{"w":1.5}')
    headers = request.headers
    assert headers["host"] == f"127.0.0.1:{server.port}"
    assert headers["content-type"] == "application/json"
    assert headers["idempotency-key"] == headers["webhook-id"] == run.id
    assert (headers["headrace-task"], headers["headrace-attempt"]) == ("resize", "1")
    assert (headers["traceparent"], headers["authorization"]) == ("00-1-2-01", "Bearer t")
    assert "private" not in headers, "expected only the trace header to be forwarded"
    signed = f"{run.id}.{headers['webhook-timestamp']}.".encode() + request.body
    digest = hmac.new(b"k" * 32, signed, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


async def test_a_temporary_failure_is_retried_under_the_same_key(tmp_path: Path) -> None:
    late = Response(429, b"", {"retry-after": "0"})
    with serving(Response(503), None, late, Response(200, b"fine", {"content-type": "text/plain"})) as server:
        async with working(tmp_path) as app:
            url = f"http://127.0.0.1:{server.port}"
            task = app.endpoint("task", url, secret=SECRET, allow=LOOPBACK, retry=QUICK)
            async with app.worker():
                run = await task.enqueue([1])
                assert await run.result() == "fine"
    assert [request.headers["headrace-attempt"] for request in server.requests] == ["1", "2", "3", "4"]
    assert {request.headers["idempotency-key"] for request in server.requests} == {run.id}


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (Response(404), "responded 404"),
        (Response(302, b"", {"location": "http://169.254.169.254/"}), "redirects are not followed"),
        (Response(200, b"{", JSON), "invalid JSON"),
        (Response(200, b"x" * (ANSWER_BYTES_MAX + 1)), "got more"),
    ],
)
async def test_a_permanent_failure_is_requested_once(tmp_path: Path, response: Response, words: str) -> None:
    with serving(response) as server:
        async with working(tmp_path) as app:
            url = f"http://127.0.0.1:{server.port}"
            task = app.endpoint("task", url, secret=SECRET, allow=LOOPBACK, retry=QUICK)
            async with app.worker():
                failure = await failure_of(await task.enqueue(1))
    assert (failure.type, len(server.requests)) == ("EndpointRefused", 1)
    assert words in failure.message


async def test_the_last_attempt_reports_the_response_of_the_endpoint(tmp_path: Path) -> None:
    with serving(Response(503, b"", {"retry-after": "3600"})) as server:
        async with working(tmp_path) as app:
            url = f"http://127.0.0.1:{server.port}"
            task = app.endpoint("task", url, secret=SECRET, allow=LOOPBACK, retry=Retry(attempts=1))
            async with app.worker():
                failure = await failure_of(await task.enqueue(1))
    assert "responded 503 and asked for a retry in 3600 s" in failure.message


async def test_a_missing_response_is_a_timeout(tmp_path: Path) -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with silent, working(tmp_path) as app:
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        twice = Retry(attempts=2, delay_s=0)
        task = app.endpoint("task", url, secret=SECRET, allow=LOOPBACK, timeout_s=0.05, retry=twice)
        async with app.worker():
            failure = await failure_of(await task.enqueue(1))
    assert (failure.type, failure.attempts) == ("TimeoutError", 2)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254", "2130706433"]
)
async def test_a_private_address_is_refused_unless_it_is_allowed(host: str) -> None:
    with serving(Response()) as server:
        for scheme in ("http", "https"):
            endpoint = Endpoint(f"{scheme}://{host}:{server.port}/", SECRET, allow=["10.0.0.0/8"])
            with pytest.raises(EndpointRefused, match="which may not be reached"):
                await endpoint.deliver(1)
            await endpoint.close()
    assert server.requests == []


async def test_a_host_name_is_resolved_and_checked_for_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse a name that resolves to an allowed address first and to a private address later."""
    with serving(Response(200, b"", {"connection": "close"})) as server:
        endpoint = Endpoint(f"http://rebound.example:{server.port}/", SECRET, allow=["127.0.0.1/32"])
        loop = asyncio.get_running_loop()
        addresses = iter(["127.0.0.1", "127.0.0.2"])

        async def resolved(host: str, port: int, **options: Any) -> list[Any]:
            return [(2, 1, 6, "", (next(addresses), port))]

        monkeypatch.setattr(loop, "getaddrinfo", resolved)
        assert await endpoint.deliver(1) is None
        with pytest.raises(EndpointRefused, match=r"127\.0\.0\.2"):
            await endpoint.deliver(1)
        await endpoint.close()
    assert len(server.requests) == 1
    assert server.requests[0].headers["host"] == f"rebound.example:{server.port}"


async def test_a_certificate_is_checked_for_the_requested_name(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with serving(Response(200, b'"safe"', JSON), tls=tls) as server:
        for host, trusted, result in (
            ("localhost", str(tmp_path / "ca.pem"), "safe"),
            ("127.0.0.1", str(tmp_path / "ca.pem"), None),
            ("localhost", None, None),
        ):
            endpoint = Endpoint(f"https://{host}:{server.port}/", SECRET, allow=LOOPBACK, ca_file=trusted)
            delivered = endpoint.deliver(1)
            if result is not None:
                assert await delivered == result
            else:
                with pytest.raises(Exception, match="certificate verify failed"):
                    await delivered
            await endpoint.close()
    assert len(server.requests) == 1


async def test_a_call_outside_a_run_has_a_unique_key() -> None:
    with serving(Response()) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}/", SECRET, allow=LOOPBACK)
        await endpoint.deliver(1)
        await endpoint.deliver(1)
        await endpoint.close()
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 2


def test_an_invalid_endpoint_is_refused_when_it_is_created(tmp_path: Path) -> None:
    app = Headrace()
    too_many_headers = {f"x{number}": "" for number in range(HEADERS_MAX + 1)}
    makers: list[Callable[[], object]] = [
        lambda: app.endpoint("a", "https://example.com", secret="too short"),
        lambda: app.endpoint("a", "gopher://example.com", secret=SECRET),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, headers={"Host": "else"}),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, headers={"x": "a\r\nb: c"}),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, headers={"x y": "a"}),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, headers=too_many_headers),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, allow=["10.0.0.1/8"]),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, ca_file=str(tmp_path / "none.pem")),
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, retry=3),  # type: ignore[arg-type]
        lambda: app.endpoint("a", "https://example.com", secret=SECRET, timeout_s=0),
    ]
    for make in makers:
        with pytest.raises(InvalidSetting) as raised:
            make()
        assert SECRET not in str(raised.value)
    assert app.registry.names == []
    app.endpoint("a", "https://example.com", secret=SECRET)
    with pytest.raises(InvalidSetting, match="two tasks have the name 'a'"):
        app.endpoint("a", "https://example.com", secret=SECRET)

"""Random requests: those of the OpenAPI document, and malformed streams. Nothing is answered with 500."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.support.http_server import AUTH, LIMITS, HttpPeer, line, running_server

EXAMPLES = 40
STREAMS = 150


@schemathesis.serializer("application/x-ndjson", "application/x-protobuf")
def send_unchanged(_context: Any, value: Any) -> bytes:
    """Send lines and messages unchanged."""
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Run a server in a thread of its own, for clients that are not async."""
    address: list[tuple[str, int]] = []
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with running_server(Path(folder), "sqlite", limits=LIMITS) as server:
                await server.filled(3)
                await server.work()
                address.append(server.server.address)
                ready.set()
                await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(30)
    try:
        yield address[0]
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with served() as address:
        yield address


@pytest.fixture(scope="module")
def document(address: tuple[str, int]) -> Any:
    host, port = address
    return schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")


def check_response(response: Response, path: str) -> None:
    """Assert that a response is no 500, and that an error is machine-readable."""
    assert response.status_code != 500, (path, response.text)
    if response.status_code >= 400:
        error = json.loads(response.text)
        assert error.get("error") or error.get("detail"), (path, error)


def test_no_documented_request_is_answered_with_500(document: Any) -> None:
    operations_seen = set()
    for result in document.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def ask(case: Any) -> None:
            if case.path.endswith(("/events", "/results")) and case.method == "GET":
                case.query = {**(case.query or {}), "wait": 0}
            response = case.call(headers=AUTH, timeout=10)
            check_response(response, case.formatted_path)
            case.validate_response(response, checks=(response_schema_conformance,))

        ask()
        operations_seen.add((operation.method.upper(), operation.path))
    assert len(operations_seen) > 30


def test_random_sequences_of_batch_operations_keep_states_consistent(document: Any) -> None:
    """Random sequences of creating, streaming, sealing, cancelling and redriving batches."""
    operations = {
        (result.ok().method.upper(), result.ok().path): result.ok() for result in document.get_all_operations()
    }
    steps = [
        ("POST", "/v1/batches/{batch_id}/items"),
        ("POST", "/v1/batches/{batch_id}/seal"),
        ("POST", "/v1/batches/{batch_id}/cancel"),
        ("POST", "/v1/batches/{batch_id}/redrive"),
        ("GET", "/v1/batches/{batch_id}/missing"),
        ("GET", "/api/v2/batches/{batch_id}"),
        ("GET", "/api/v1/batches/{batch_id}/results"),
    ]
    order = {"open": 0, "sealed": 1, "completed": 2, "cancelled": 2, "abandoned": 2}

    @given(data=st.data())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def run_scenario(data: st.DataObject) -> None:
        created = operations["POST", "/v1/batches"].Case(body={"run_count": data.draw(st.integers(0, 3))})
        batch = json.loads(created.call(headers=AUTH, timeout=10).text)
        stage = 0
        for step in data.draw(st.lists(st.sampled_from(steps), max_size=6)):
            more: dict[str, Any] = {}
            if step[1].endswith("/items"):
                indexes = data.draw(st.lists(st.integers(-1, 4), max_size=5))
                more = {"body": b"".join(map(line, indexes)).decode(), "media_type": "application/x-ndjson"}
            case = operations[step].Case(path_parameters={"batch_id": batch["id"]}, **more)
            response = case.call(headers=AUTH, timeout=10)
            check_response(response, step[1])
            read = operations["GET", "/v1/batches/{batch_id}"].Case(path_parameters={"batch_id": batch["id"]})
            batch = json.loads(read.call(headers=AUTH, timeout=10).text)
            assert order[batch["state"]] >= stage, "a batch never returns to an earlier state"
            stage = order[batch["state"]]
            parts = ("missing", "waiting", "leased", "completed", "failed", "cancelled", "expired")
            if batch["state"] != "cancelled":
                assert batch["received"] + batch["missing"] == sum(batch[name] for name in parts)

    run_scenario()


good_line = st.integers(0, 30).map(line)
broken_line = st.one_of(
    st.binary(max_size=60),
    st.integers(-5, 10**20).map(lambda n: b'{"index":%d,"task":"task"}' % n),
    st.recursive(st.none() | st.booleans() | st.text(max_size=8) | st.floats(), st.lists, max_leaves=5).map(
        lambda value: json.dumps({"index": 1, "task": "task", "payload": value, "options": value}).encode()
    ),
    st.sampled_from([b"{", b"}", b'"', b"\\", b"\r", b"\x00", b"\xff", b"[" * 2_000, b" " * 5_000, b"1e999"]),
)
pieces = st.lists(st.one_of(good_line, good_line, broken_line, st.just(b"\n")), max_size=12)


@given(parts=pieces, cuts=st.lists(st.integers(1, 80), max_size=20))
@settings(max_examples=STREAMS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_a_random_stream_is_accepted_or_refused_and_its_counts_balance(
    address: tuple[str, int], parts: list[bytes], cuts: list[int]
) -> None:
    body = b"\n".join(parts)

    async def send() -> None:
        peer = HttpPeer(*address)
        created = await peer.ask("POST", "/api/v3/batches", b'{"runCount":31}')
        batch_id = created.json["id"]
        await peer.head(
            "POST",
            f"/api/v3/batches/{batch_id}/items",
            {**AUTH, "content-type": "application/x-ndjson", "transfer-encoding": "chunked"},
        )
        start = 0
        for cut in (*cuts, len(body)):
            if piece := body[start : start + cut]:
                await peer.chunk(piece)
            start += cut
        await peer.end()
        answer = await peer.answer()
        assert answer.status in (200, 400, 422), answer
        batch = (await peer.ask("GET", f"/v1/batches/{batch_id}")).json
        assert batch["received"] + batch["missing"] == 31
        if answer.status == 200:
            assert answer.json["itemsAccepted"] == batch["received"]
        await peer.close()

    asyncio.run(send())

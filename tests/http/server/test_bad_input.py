"""Invalid input over real sockets: a clear error, nothing changed, and never a 500."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard

from headrace.core.batch import Ledger
from headrace.foundation.errors import InvalidInput
from headrace.http.server.http1_protocol import HEAD_BYTES_MAX
from tests.support.hostile import HOSTILE, ITEM_BYTES_MAX
from tests.support.http_server import AUTH, LIMITS, NDJSON, HttpAnswer, HttpPeer, ServerUnderTest, line, running_server

CREATE = "/api/v3/batches"
SMALL = LIMITS.replaced(item_bytes_max=4_096, http_idle_s=2, expansion_max=20)


async def untouched(server: ServerUnderTest, batch_id: str, count: int) -> bool:
    return await server.engine.store.missing(batch_id, 9) == [(0, count)]


@pytest.mark.parametrize("name", HOSTILE)
async def test_malformed_lines_are_judged_as_by_every_other_reader(tmp_path: Path, name: str) -> None:
    sent, expected = HOSTILE[name]
    async with running_server(tmp_path, limits=LIMITS.replaced(item_bytes_max=ITEM_BYTES_MAX)) as server:
        batch_id = await server.create(100)
        answer = await server.stream(
            batch_id, [sent[: len(sent) // 2] or b" ", sent[len(sent) // 2 :] + b"\n" + line(99)]
        )
        runs = await server.engine.store.runs("default", batch_id=batch_id, limit=9)
        if expected == "unreadable":
            assert (answer.status, runs) == (400, []), answer
            assert answer.json["error"].startswith(("Invalid JSON at line 1:", "Invalid UTF-8 at line 1:"))
        elif expected == "blank":
            assert (answer.status, [view.index for view in runs]) == (200, [99])
        elif expected == "oversized":
            assert answer.status in (200, 422), answer
            assert [view.state for view in runs] == (["failed", "waiting"] if answer.status == 200 else [])
        else:
            assert answer.status in (200, 422), answer


@pytest.mark.parametrize(
    ("item", "status", "error_text"),
    [
        ({"index": -1, "task": "task"}, 422, "index"),
        ({"index": 3, "task": "task"}, 422, "Item index 3 exceeds batch runCount 3"),
        ({"index": 10**17, "task": "task"}, 422, "exceeds batch runCount"),
        ({"index": 10**30, "task": "task"}, 422, "index"),
        ({"index": 1e400, "task": "task"}, 400, "Invalid JSON"),
        ({"index": "0", "task": "task"}, 422, "index"),
        ({"index": 0.5, "task": "task"}, 422, "index"),
        ({"index": None, "task": "task"}, 422, "index"),
        ({"index": True, "task": "task"}, 422, "index"),
        ({"task": "task"}, 422, "index"),
        ({"index": 0}, 422, "it has no task, and neither has its batch"),
        ({"index": 0, "task": ""}, 422, "task"),
        ({"index": 0, "task": 7}, 422, "task"),
        ({"index": 0, "task": "t" * 201}, 422, "task"),
        ({"index": 0, "task": "a\0b"}, 422, "task"),
        ({"index": 0, "task": "task", "options": []}, 422, "options"),
        ({"index": 0, "task": "task", "option": {"delay": "1h"}}, 422, "unknown field 'option'"),
        ({"index": 0, "task": "task", "opts": None}, 422, "unknown field 'opts'"),
        ({"idx": 0, "task": "task"}, 422, "unknown field 'idx'"),
        ({"index": 0, "task": "task", "options": {"dealy": "1h"}}, 422, "unknown option 'dealy' in options"),
        ([0, "task"], 422, "object"),
        ("task", 422, "object"),
        (7, 422, "object"),
    ],
)
async def test_an_invalid_item_is_refused_and_changes_nothing(
    tmp_path: Path, item: Any, status: int, error_text: str
) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.create(3)
        answer = await server.stream(batch_id, [json.dumps(item).encode() + b"\n"])
        assert answer.status == status, answer
        assert error_text in answer.json["error"], answer
        assert await untouched(server, batch_id, 3)


@pytest.mark.parametrize("size", [7, 100, 100_000])
@pytest.mark.parametrize("last", [b"\n", b""], ids=["with a newline", "without a newline"])
@pytest.mark.parametrize(
    ("before", "number", "stored"),
    [
        ([], 1, 0),
        ([line(0)], 2, 1),
        ([line(0), b"\n", b"  \r\n", line(1)], 5, 2),
        ([line(0), line(1, "x" * 5_000), b"\n"], 4, 2),
    ],
    ids=["first", "second", "after blank lines", "after an oversized item"],
)
async def test_an_invalid_item_is_reported_with_its_line_number(
    tmp_path: Path, before: list[bytes], number: int, stored: int, last: bytes, size: int
) -> None:
    body = b"".join(before) + b'{"index":"2","task":"task"}' + last
    async with running_server(tmp_path, limits=SMALL) as server:
        batch_id = await server.create(3)
        answer = await server.stream(batch_id, [body[start : start + size] for start in range(0, len(body), size)])
        assert answer.status == 422, answer
        assert answer.json["error"].startswith(f"Line {number}: Invalid item: "), answer
        assert "$.index" in answer.json["error"]
        assert await server.engine.store.missing(batch_id, 9) == [(stored, 3)]


@pytest.mark.parametrize(
    ("item", "error_text", "hint"),
    [
        ({"index": 1, "task": "task", "payLoad": 1}, "Line 2: Invalid item: unknown field 'payLoad'", "payload?"),
        ({"index": 1, "task": "task", "zzz": 1}, "Line 2: Invalid item: unknown field 'zzz'", "fields of an item:"),
        ({"index": 1, "options": {"idempotencykey": "k"}}, "Line 2: Invalid item: unknown option", "idempotencyKey?"),
        ({"index": 1, "options": {"zzz": 1}}, "Line 2: Invalid item: unknown option 'zzz' in options", "options:"),
    ],
)
async def test_v1_refuses_each_unknown_field_and_option_with_a_suggestion(
    tmp_path: Path, item: Any, error_text: str, hint: str
) -> None:
    async with running_server(tmp_path) as server:
        batch = (await server.ask("POST", "/v1/batches", {"task": "task", "run_count": 2})).json["id"]
        body = line(0) + json.dumps(item).encode() + b"\n"
        answer = await server.ask("POST", f"/v1/batches/{batch}/items", body, NDJSON)
        assert answer.status == 422
        assert answer.json["detail"].startswith(error_text), answer
        assert hint in answer.json["hint"]


async def test_items_without_a_task_have_that_of_their_batch(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=SMALL) as server:
        batch = (await server.ask("POST", "/v1/batches", {"task": "other", "run_count": 4})).json["id"]
        lines = [b'{"index":0}\n{"index":1,"payload":1}\n', line(2), b'{"index":3,"payload":"%b"}\n' % (b"x" * 5_000)]
        answer = await server.ask("POST", f"/v1/batches/{batch}/items", b"".join(lines), NDJSON)
        assert answer.status == 200, answer
        runs = await server.engine.store.runs("default", batch_id=batch)
        assert [run.task for run in runs] == ["other", "other", "task", "other"]
        bare = (await server.ask("POST", "/v1/batches", {"run_count": 1})).json["id"]
        answer = await server.ask("POST", f"/v1/batches/{bare}/items", b'{"index":0}\n', NDJSON)
        assert answer.status == 422
        assert answer.json["detail"].startswith("Line 1: Invalid item: it has no task, and neither has its batch")


async def test_unknown_fields_of_an_item_are_ignored(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        batch_id = await server.create(1)
        assert (await server.stream(batch_id, [b'{"index":0,"task":"task","more":{"a":[1]}}\n'])).json["sealed"]


@pytest.mark.parametrize(
    ("body", "status", "error_text"),
    [
        (b"", 400, "empty"),
        (b"   ", 400, "empty"),
        (b"{", 400, "Invalid JSON"),
        (b"\xff", 400, "Invalid JSON"),
        (b"[" * 5_000, 400, "Invalid"),
        (b"{}", 400, "runCount"),
        (b'{"runCount":0}', 400, "runCount"),
        (b'{"runCount":-3}', 400, "runCount"),
        (b'{"runCount":1.5}', 400, "runCount"),
        (b'{"runCount":"3"}', 400, "runCount"),
        (b'{"runCount":10000001}', 400, "exceeds maximum allowed of 10000000"),
        (b'{"runCount":1,"taskIdentifiers":[]}', 400, "taskIdentifiers"),
        (b'{"runCount":1,"idempotencyKey":""}', 400, "idempotencyKey"),
        (b'{"runCount":1,"idempotencyKey":"a\\u0000b"}', 400, "NUL"),
        (b'{"runCount":1,"resumeParentOnCompletion":true}', 422, "not supported"),
        (b" " * (128 * 1024 + 1), 413, "Request body too large"),
    ],
)
async def test_an_invalid_create_is_refused(tmp_path: Path, body: bytes, status: int, error_text: str) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        answer = await server.ask("POST", CREATE, body)
        assert (answer.status, error_text in answer.json["error"]) == (status, True), answer
        chunked = await server.ask("POST", CREATE, [body])
        assert chunked.status == status
        assert await server.engine.store.batches("default") == []


async def test_wrong_content_types_methods_and_paths_are_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        batch_id = await server.create(1)
        items = f"{CREATE}/{batch_id}/items"
        for content_type in ("application/json", "", "text/plain"):
            answer = await server.ask("POST", items, b"{}", {"content-type": content_type})
            assert answer.status == 415
            assert answer.json["error"] == "Content-Type must be application/x-ndjson or application/ndjson"
        assert (await server.ask("POST", items, b"", NDJSON)).json["error"] == "Request body is required"
        response = await server.ask("GET", items)
        assert (response.status, response.json["error"]) == (405, "Method not allowed. Use POST to stream batch items.")
        assert "POST" in response.headers["allow"]
        assert (await server.ask("GET", "/api/v9/nothing")).json == {"error": "Not found"}
        problem = await server.ask("GET", "/v1/nothing")
        assert (problem.status, problem.headers["content-type"]) == (404, "application/problem+json")
        missing = await server.ask("GET", "/api/v2/batches/batch_00000000000000000000000000")
        assert (missing.status, missing.json["error"], missing.headers["x-should-retry"]) == (404, "Not found", "true")
        assert await untouched(server, batch_id, 1)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
async def test_a_compressed_body_is_decompressed_up_to_the_expansion_limit(tmp_path: Path, encoding: str) -> None:
    def pack(data: bytes) -> bytes:
        return gzip.compress(data) if encoding == "gzip" else zstandard.ZstdCompressor(level=19).compress(data)

    async with running_server(tmp_path, "sqlite", limits=SMALL) as server:
        batch_id = await server.create(200)
        lines = b"".join(line(index) for index in range(200))
        packed = pack(lines[: len(lines) // 2]) + pack(lines[len(lines) // 2 :])
        answer = await server.stream(batch_id, [packed[:50], packed[50:]], **{"content-encoding": encoding})
        assert (answer.status, answer.json["sealed"]) == (200, True), "two members or frames are one body"
        bomb = pack(b" " * 40_000_000)
        batch_id = await server.create(1)
        answer = await server.stream(batch_id, [bomb], **{"content-encoding": encoding})
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert "a factor of 20" in answer.json["error"]
        torn = await server.stream(batch_id, [pack(line(0))[:-5]], **{"content-encoding": encoding})
        assert torn.status == 400
        wrong = await server.stream(batch_id, [line(0)], **{"content-encoding": encoding})
        assert (wrong.status, encoding in wrong.json["error"]) == (400, True)


async def test_an_unknown_content_encoding_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        answer = await server.stream(
            await server.create(1), [zlib.compress(line(0))], **{"content-encoding": "deflate"}
        )
        assert (answer.status, "deflate" in answer.json["error"]) == (415, True)


async def raw(server: ServerUnderTest, data: bytes) -> HttpAnswer:
    peer: HttpPeer = await server.peer().connect()
    await peer.send(data)
    return await peer.answer()


async def test_invalid_or_oversized_request_heads_are_refused_early(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        many = b"".join(b"h%d: %s\r\n" % (number, b"v" * 1_000) for number in range(100))
        for head, status in (
            (b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"v" * 100_000 + b"\r\n\r\n", 431),
            (b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + many + b"\r\n", 431),
            (b"GET /" + b"p" * (HEAD_BYTES_MAX + 1) + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
            (b"GARBAGE\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
            (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -3\r\n\r\n", 400),
        ):
            answer = await raw(server, head)
            assert answer.status == status, (head[:60], answer)
            assert answer.json["status"] == status
        assert (await raw(server, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 200


@pytest.mark.parametrize(
    ("head", "detail"),
    [
        (b"GET /healthz\r\n\r\n", ""),
        (b"GET /healthz HTTP/0.9\r\nhost: x\r\n\r\n", ""),
        (b"GET /healthz HTTP/1.2\r\nhost: x\r\n\r\n", ""),
        (b"GET /healthz HTTP/1.1\r\n\r\n", "exactly one Host"),
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nHost: x\r\n\r\n", "exactly one Host"),
        (b"GET /healthz HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n", "exactly one Host"),
    ],
)
async def test_another_version_and_another_number_of_hosts_are_refused(
    tmp_path: Path, head: bytes, detail: str
) -> None:
    """RFC 9112, sections 2.3 and 3.2."""
    async with running_server(tmp_path) as server:
        peer: HttpPeer = await server.peer().connect()
        await peer.send(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await peer.answer()).status == 200
        await peer.send(head)
        answer = await peer.answer()
        assert (answer.status, detail in answer.json["detail"]) == (400, True)
        assert (await raw(server, b"GET /healthz HTTP/1.0\r\n\r\n")).status == 200


async def test_a_body_cut_in_mid_line_keeps_complete_items_and_the_rest_can_be_sent(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.create(4)
        peer = await server.peer().connect()
        await peer.head("POST", f"{CREATE}/{batch_id}/items", {**AUTH, **NDJSON, "transfer-encoding": "chunked"})
        for index in range(2):
            await peer.chunk(line(index))
        await peer.chunk(line(2)[:9])
        while await server.engine.store.missing(batch_id, 9) != [(2, 4)]:
            await server.engine.clock.sleep(0)
        await peer.close()
        missing = (await server.ask("GET", f"/v1/batches/{batch_id}/missing")).json
        assert (missing["received"], missing["ranges"]) == (2, [[2, 3]])
        answer = (await server.stream(batch_id, [line(2), line(3)])).json
        assert (answer["itemsAccepted"], answer["itemsDeduplicated"], answer["sealed"]) == (2, 0, True)


async def test_a_wrong_content_length_is_an_error_and_keeps_complete_items(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=SMALL) as server:
        batch_id = await server.create(2)
        body = line(0)
        peer = await server.peer().connect()
        headers = {**AUTH, **NDJSON, "content-length": str(len(body) + 500)}
        await peer.head("POST", f"{CREATE}/{batch_id}/items", headers)
        await peer.send(body)
        answer = await peer.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close"), "longer than the body that was sent"
        assert await server.engine.store.missing(batch_id, 9) == [(1, 2)]
        peer = await server.peer().connect()
        await peer.head("POST", f"{CREATE}/{batch_id}/items", {**headers, "content-length": str(len(body))})
        await peer.send(line(1) + b"GET /evil HTTP/1.1\r\n")
        assert (await peer.answer()).json["sealed"], "bytes beyond the length are another request"


async def test_two_concurrent_streams_of_one_batch_add_each_run_once(tmp_path: Path) -> None:
    import asyncio

    async with running_server(tmp_path, "postgres") as server:
        batch_id = await server.create(600)
        lines = [line(index) for index in range(600)]
        answers = await asyncio.gather(
            server.stream(batch_id, lines),
            server.stream(batch_id, lines[::-1]),
            server.stream(batch_id, lines[300:] + lines[:300]),
        )
        assert [answer.status for answer in answers] == [200] * 3
        assert any(answer.json["sealed"] for answer in answers)
        assert await server.work() == 600
        assert (await server.engine.store.verify(batch_id)).differences == []


async def test_a_seal_during_a_stream_is_refused_while_items_are_missing(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = (await server.ask("POST", "/v1/batches", {})).json["id"]
        path = f"/v1/batches/{batch_id}"
        assert (await server.ask("POST", f"{path}/items", [line(0), line(2)], NDJSON)).json["received"] == 2
        refused = await server.ask("POST", f"{path}/seal", {"run_count": 3})
        assert (refused.status, refused.json["code"]) == (409, "CONFLICT")
        assert "1..1" in refused.json["detail"]
        await server.ask("POST", f"{path}/items", [line(1)], NDJSON)
        assert (await server.ask("POST", f"{path}/seal", {"run_count": 3})).json["state"] == "sealed"
        assert (await server.ask("POST", f"{path}/seal")).json["state"] == "sealed"
        late = await server.ask("POST", f"{path}/items", [line(3)], NDJSON)
        assert (late.status, late.json["code"]) == (422, "UNPROCESSABLE")


@pytest.mark.parametrize(
    "path",
    ["", "/", "..", "a/../b", "../secret", "a//b", "./a", "a/.", "a\\b", "%2e%2e/x", "a%2f..%2fb", "é", "~x/y", "a:b"],
)
async def test_path_traversal_in_packet_names_is_refused(tmp_path: Path, path: str) -> None:
    from urllib.parse import quote

    async with running_server(tmp_path) as server:
        for version in ("v1", "v2"):
            answer = await server.ask("PUT", f"/api/{version}/packets/{quote(path, safe='')}")
            assert answer.status in (400, 404), answer
        assert not (tmp_path / "objects" / "packets").exists()


async def test_a_signed_packet_url_is_valid_only_for_what_was_signed(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(packet_bytes_max=2_048)) as server:
        presigned = (await server.ask("PUT", "/api/v2/packets/trigger%2Fa%2Fpayload.json")).json
        assert presigned["storagePath"] == "trigger/a/payload.json"
        target = presigned["presignedUrl"].removeprefix(server.server.url)
        wrong = [
            target.replace("trigger/a", "trigger/b"),
            target.replace(b"default".hex(), b"elsewhere".hex()),
            target[:-1] + ("0" if target[-1] != "0" else "1"),
            target.replace("until=", "until=9"),
            target.partition("?")[0],
        ]
        for other in wrong:
            assert (await server.ask("PUT", other, b"1", auth=False)).status in (400, 403), other
        assert (await server.ask("GET", target, auth=False)).status == 403, "it was signed for another method"
        assert (await server.ask("PUT", target, b"x" * 2_049, auth=False)).status == 413
        kind = {"content-type": "application/super+json"}
        assert (await server.ask("PUT", target, b'{"json":{"a":1}}', kind, auth=False)).status == 200
        batch_id = await server.create(3)
        items = [
            line(0, "trigger/a/payload.json", payloadType="application/store"),
            line(1, "trigger/gone.json", payloadType="application/store"),
            line(2, "../../etc/passwd", payloadType="application/store"),
        ]
        assert (await server.stream(batch_id, items)).json["sealed"], "an item with a missing packet fails alone"
        runs = [
            (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_{index}")).json
            for index in range(3)
        ]
        assert runs[0]["payload"] == {"a": 1}
        assert [run["status"] for run in runs[1:]] == ["SYSTEM_FAILURE", "FAILED"]
        read = (await server.ask("GET", "/api/v1/packets/trigger%2Fa%2Fpayload.json")).json["presignedUrl"]
        download = await server.ask("GET", read.removeprefix(server.server.url), auth=False)
        assert (download.body, download.headers["content-type"]) == (b'{"json":{"a":1}}', "application/super+json")


@pytest.mark.parametrize(
    "query",
    [
        "page[size]=0",
        "page[size]=101",
        "page[size]=many",
        "page[after]=nonsense",
        "page[before]=run_x",
        "filter[status]=ODD",
        "filter[batch]=nonsense",
        "filter[createdAt][from]=-1",
        "filter[createdAt][period]=ever",
        "filter[machine]=micro",
        "filter[tag]=" + ",".join("abcdefghijklmnopqrstuvwxyz"),
    ],
)
async def test_invalid_filters_of_a_run_list_are_refused_by_name(tmp_path: Path, query: str) -> None:
    async with running_server(tmp_path) as server:
        answer = await server.ask("GET", f"/api/v1/runs?{query}")
        assert answer.status in (400, 422), answer
        assert answer.json["error"]


NUL = "a\0b"
NUL_REQUESTS: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/batches", {"key": NUL}, "key"),
    ("POST", "/v1/batches", {"task": NUL}, "task"),
    ("POST", CREATE, {"runCount": 1, "taskIdentifiers": [NUL]}, "taskIdentifiers"),
    ("POST", CREATE, {"runCount": 1, "taskIdentifiers": ["b", NUL]}, "taskIdentifiers"),
    ("POST", CREATE, {"runCount": 1, "idempotencyKey": NUL}, "idempotencyKey"),
    ("POST", "/v1/tasks/a%00b/runs", {"payload": 1}, "task"),
    ("POST", "/v1/tasks/task/runs", {"options": {"idempotencyKey": NUL}}, "idempotency key"),
    ("POST", "/v1/sessions", {"host": NUL}, "host"),
    ("POST", "/v1/sessions", {"tasks": [NUL]}, "tasks"),
    ("POST", "/v1/sessions", {"queues": [NUL]}, "queues"),
    ("GET", "/api/v1/runs?filter[taskIdentifier]=a%00b", None, "filter[taskIdentifier]"),
    ("GET", "/api/v1/runs?filter[tag]=a%00b", None, "filter[tag]"),
    ("GET", "/api/v1/runs?filter[queue]=a%00b", None, "filter[queue]"),
]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_nul_character_in_a_name_is_refused_with_the_field(kind: str, tmp_path: Path) -> None:
    async with running_server(tmp_path, kind) as server:
        for method, path, body, field in NUL_REQUESTS:
            answer = await server.ask(method, path, body)
            text = answer.json.get("detail") or answer.json["error"]
            assert (answer.status, field in text) == (400, True), (path, body, answer)
        stored = await server.engine.store.batches("default")
        assert [
            batch.key for batch, ledger in stored if batch.kind == "batch" or ledger != Ledger(0, 0, 0, 0, 0, 0, 0, 0)
        ] == []
        payload = await server.ask("POST", "/v1/tasks/task/runs", {"payload": NUL, "options": {"metadata": {NUL: NUL}}})
        assert payload.status == 201, "payloads and metadata are bytes: they may hold any character"


async def test_a_nul_character_that_reaches_postgresql_is_the_caller_s_fault(tmp_path: Path) -> None:
    async with running_server(tmp_path, "postgres") as server:
        with pytest.raises(InvalidInput, match="NUL"):
            await server.engine.store.find_batch("default", NUL)
        with pytest.raises(InvalidInput, match="NUL"):
            await server.engine.store.runs("default", task=NUL, limit=1)
        assert await server.engine.store.find_batch("default", "a") is None

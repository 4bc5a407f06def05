"""The behaviours that trigger.dev's own tests of streaming assert, over real HTTP, on SQLite and on PostgreSQL.

`tests/support/trigger_behaviours.py` lists all of them. Each line names a test in this module, or a promise that makes
the state unreachable and the test that proves it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from headrace.core.batch import CANCELLED
from headrace.store.object_store import open_payloads
from headrace.store.payloads import PayloadStore
from headrace.store.protocol import Store
from tests.support.http_server import LIMITS, ServerUnderTest, StoreHook, line, running_server
from tests.support.store_rig import chunks_of

SMALL = LIMITS.replaced(item_bytes_max=1_024)
Row = tuple[int, str, str, Any]


@pytest.fixture(params=("sqlite", "postgres"))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def run_status(server: ServerUnderTest, batch_id: str) -> str:
    return str((await server.ask("GET", f"/api/v2/batches/{batch_id}")).json["status"])


async def runs_of(server: ServerUnderTest, batch_id: str) -> list[Row]:
    """`(index, task, status, payload)` of the stored runs."""
    rows = []
    for view in await server.engine.store.runs("default", batch_id=batch_id, limit=1_000):
        fields = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_{view.index}")).json
        rows.append((view.index, fields["taskIdentifier"], fields["status"], fields.get("payload")))
    return rows


async def taken(server: ServerUnderTest, count: int, chunks: Iterable[bytes]) -> tuple[dict[str, Any], list[Row]]:
    """Stream chunks of bytes. Returns the response and the stored runs."""
    batch_id = await server.create(count)
    answer = await server.stream(batch_id, chunks)
    assert answer.status == 200, answer
    return answer.json, await runs_of(server, batch_id)


def queued(*rows: tuple[int, Any]) -> list[Row]:
    return [(index, "task", "QUEUED", payload) for index, payload in rows]


class Waves(PayloadStore):
    """An object store that blocks until `size` writes are waiting, or as many as are left."""

    def __init__(self, inner: PayloadStore, size: int, total: int) -> None:
        super().__init__(inner.objects, url=inner.url, concurrency=1_000)
        self._size, self._left = size, total
        self._waiting: list[asyncio.Event] = []
        self.most = self.waves = self.now = 0

    async def put(self, key: str, data: bytes) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        gate = asyncio.Event()
        self._waiting.append(gate)
        if len(self._waiting) == min(self._size, self._left):
            self.waves += 1
            self._left -= len(self._waiting)
            for event in self._waiting:
                event.set()
            self._waiting = []
        await gate.wait()
        await super().put(key, data)
        self.now -= 1


# -- the stream service


async def test_should_seal_batch_successfully_when_no_race_condition(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(3)
        await server.engine.store.append(batch_id, chunks_of(range(3)), now_us=server.engine.clock.now_us())
        answer = await server.stream(batch_id, [b"\n"])
        assert (answer.json["sealed"], answer.json["itemsAccepted"]) == (True, 0)
        batch, _ = await server.engine.store.batch(batch_id)
        assert (batch.state, batch.sealed_us > 0) == ("sealed", True)
        assert await run_status(server, batch_id) == "PROCESSING"


async def test_should_return_sealed_when_batch_is_already_sealed_and_processing(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(3)
        answer = await server.stream(batch_id, [line(index) for index in range(3)])
        assert answer.json == {
            "id": batch_id,
            "itemsAccepted": 0,
            "itemsDeduplicated": 0,
            "sealed": True,
            "runCount": 3,
        }


async def test_should_return_sealed_when_batch_is_completed_before_phase_2_retry_arrives(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(1)
        await server.work()
        answer = await server.stream(batch_id, [line(0)])
        assert (answer.status, answer.json["sealed"], answer.json["itemsAccepted"]) == (200, True, 0)
        assert answer.json["itemsDeduplicated"] == 0


async def test_should_throw_when_batch_is_in_aborted_status(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(1)
        await server.engine.store.stop_batch(batch_id, CANCELLED, now_us=server.engine.clock.now_us())
        answer = await server.stream(batch_id, [line(0)])
        assert answer.status == 422
        assert "is not in PENDING status (current: ABORTED)" in answer.json["error"]


async def test_should_throw_when_batch_is_sealed_but_aborted(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(1)
        await server.engine.store.stop_batch(batch_id, CANCELLED, now_us=server.engine.clock.now_us())
        assert (await server.stream(batch_id, [line(0)])).status == 422


async def test_a_batch_with_items_that_can_not_run_completes_and_answers_sealed_to_a_retry(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await server.create(2)
        items = [line(0), line(1, "x" * 2_000)]
        assert (await server.stream(batch_id, items)).json["sealed"]
        await server.work()
        assert await run_status(server, batch_id) == "COMPLETED"
        again = (await server.stream(batch_id, items)).json
        assert (again["sealed"], again["itemsAccepted"], again["itemsDeduplicated"]) == (True, 0, 0)


async def test_a_batch_whose_items_all_failed_before_the_seal_is_completed_by_the_seal(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await server.create(2)
        await server.stream(batch_id, [line(0, "x" * 2_000)])
        assert await run_status(server, batch_id) == "PENDING"
        assert (await server.stream(batch_id, [line(1, "x" * 2_000)])).json["sealed"]
        assert await run_status(server, batch_id) == "COMPLETED"


async def test_should_return_sealed_when_concurrent_request_already_sealed_the_batch_during_seal_attempt(
    tmp_path: Path, kind: str
) -> None:
    async def other(store: Store, batch_id: str) -> None:
        await store.seal(batch_id, None, now_us=1)

    async with running_server(tmp_path, kind, wrap=lambda store: StoreHook(store, "seal", other)) as server:
        batch_id = await server.create(2)
        assert (await server.stream(batch_id, [line(0), line(1)])).json["sealed"]
        assert await run_status(server, batch_id) == "PROCESSING"


async def test_a_batch_whose_runs_all_ended_before_the_seal_attempt_is_completed_by_it(
    tmp_path: Path, kind: str
) -> None:
    homes: list[ServerUnderTest] = []

    async def worker(_store: Store, _batch_id: str) -> None:
        await homes[0].work()

    async with running_server(tmp_path, kind, wrap=lambda store: StoreHook(store, "seal", worker)) as server:
        homes.append(server)
        batch_id = await server.create(2)
        assert (await server.stream(batch_id, [line(0), line(1)])).json["sealed"]
        assert await run_status(server, batch_id) == "COMPLETED"


async def test_should_throw_error_when_race_condition_leaves_batch_in_unexpected_state(
    tmp_path: Path, kind: str
) -> None:
    async def cancel(store: Store, batch_id: str) -> None:
        await store.stop_batch(batch_id, CANCELLED, now_us=1)

    async with running_server(tmp_path, kind, wrap=lambda store: StoreHook(store, "seal", cancel)) as server:
        answer = await server.stream(await server.create(1), [line(0)])
        assert answer.status == 422
        assert "unexpected state" in answer.json["error"]


async def test_should_return_not_sealed_when_item_count_does_not_match(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(3)
        answer = (await server.stream(batch_id, [line(0), line(1)])).json
        assert (answer["sealed"], answer["enqueuedCount"], answer["expectedCount"]) == (False, 2, 3)
        assert await run_status(server, batch_id) == "PENDING"


async def test_a_sealed_batch_is_never_pending_again(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(3)
        statuses = [await run_status(server, batch_id)]
        for _ in range(2):
            await server.work()
            await server.stream(batch_id, [line(0)])
            statuses.append(await run_status(server, batch_id))
        assert statuses == ["PROCESSING", "COMPLETED", "COMPLETED"]


async def test_should_throw_when_the_batch_is_aborted_while_its_items_come(tmp_path: Path, kind: str) -> None:
    async def cancel(store: Store, batch_id: str) -> None:
        await store.stop_batch(batch_id, CANCELLED, now_us=1)

    async with running_server(tmp_path, kind, wrap=lambda store: StoreHook(store, "append", cancel)) as server:
        answer = await server.stream(await server.create(2), [line(0)])
        assert answer.status == 422


async def test_a_retry_after_all_runs_ended_unsealed_seals_the_batch(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(2)
        await server.engine.store.append(batch_id, chunks_of(range(2)), now_us=server.engine.clock.now_us())
        await server.work()
        assert await run_status(server, batch_id) == "PENDING"
        assert (await server.stream(batch_id, [b"\n"])).json["sealed"]
        assert await run_status(server, batch_id) == "COMPLETED"


async def test_received_items_are_counted_however_fast_they_run(tmp_path: Path, kind: str) -> None:
    homes: list[ServerUnderTest] = []

    async def worker(_store: Store, _batch_id: str) -> None:
        await homes[0].work()

    async with running_server(tmp_path, kind, wrap=lambda store: StoreHook(store, "seal", worker)) as server:
        homes.append(server)
        batch_id = await server.create(3)
        answer = (await server.stream(batch_id, [line(0), line(1)])).json
        assert (answer["sealed"], answer["enqueuedCount"]) == (False, 2), "runs that have ended still count"
        assert (await server.stream(batch_id, [line(2)])).json["sealed"]


async def test_ingests_a_large_batch_with_bounded_concurrency_and_seals_it(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(100)
        answer = (await server.stream(batch_id, [line(index) for index in range(100)])).json
        assert (answer["itemsAccepted"], answer["itemsDeduplicated"], answer["sealed"]) == (100, 0, True)
        batch, _ = await server.engine.store.batch(batch_id)
        assert (batch.received_count, await run_status(server, batch_id)) == (100, "PROCESSING")


@pytest.mark.parametrize("concurrency", [1, 3, 10])
async def test_bounds_in_flight_item_processing_to_the_configured_concurrency(
    tmp_path: Path, kind: str, concurrency: int
) -> None:
    limits = LIMITS.replaced(inline_bytes_max=64, ingest_concurrency=concurrency)
    payloads = Waves(open_payloads("memory://"), concurrency, 30)
    async with running_server(tmp_path, kind, limits=limits, payloads=payloads) as server:
        batch_id = await server.create(30)
        answer = (await server.stream(batch_id, [line(index, "x" * 100 + str(index)) for index in range(30)])).json
        assert (answer["itemsAccepted"], answer["sealed"]) == (30, True)
        assert payloads.most == concurrency
        assert payloads.waves == 30 // concurrency, "a batch takes as many round trips as its items make waves"


async def test_deduplicates_already_enqueued_items_during_concurrent_ingest(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(20)
        lines = [line(index) for index in range(20)]
        await server.stream(batch_id, lines[:10])
        answer = (await server.stream(batch_id, lines)).json
        assert (answer["itemsAccepted"], answer["itemsDeduplicated"], answer["sealed"]) == (10, 10, True)


async def test_rejects_an_oversized_item_whose_index_exceeds_run_count(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await server.create(2)
        answer = await server.stream(batch_id, [line(0), line(5, "x" * 2_000)])
        assert answer.status == 422
        assert "Item index 5 exceeds batch runCount 2" in answer.json["error"]
        assert [row[0] for row in await runs_of(server, batch_id)] in ([], [0]), "no stray run"


# -- the parser


async def test_should_parse_basic_ndjson_correctly(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        _, rows = await taken(server, 3, [line(0, 1) + line(1, "two") + line(2, {"three": [3]})])
        assert rows == queued((0, 1), (1, "two"), (2, {"three": [3]}))


async def test_should_handle_ndjson_without_trailing_newline(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer, rows = await taken(server, 2, [line(0, 1) + line(1, 2).rstrip(b"\n")])
        assert answer["sealed"]
        assert rows == queued((0, 1), (1, 2))


async def test_should_handle_escaped_newlines_in_json_string_values(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        _, rows = await taken(server, 1, [line(0, {"text": "a\nb\\n"})])
        assert rows == queued((0, {"text": "a\nb\\n"}))


async def test_should_skip_empty_lines(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer, rows = await taken(server, 3, [b"\n" + line(0, 0) + b"\n \r\n" + line(1, 1) + line(2, 2) + b"\n\n"])
        assert answer["itemsAccepted"] == 3
        assert rows == queued((0, 0), (1, 1), (2, 2))


async def test_should_handle_chunks_split_mid_line(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        whole = line(0, {"a": "bc"})
        _, rows = await taken(server, 1, [whole[:7], whole[7:20], whole[20:]])
        assert rows == queued((0, {"a": "bc"}))


@pytest.mark.parametrize("text", ["😀", "日本語のテキスト"])
async def test_should_handle_multibyte_characters_split_across_chunks(tmp_path: Path, kind: str, text: str) -> None:
    async with running_server(tmp_path, kind) as server:
        whole = line(0, {"text": text})
        _, rows = await taken(server, 1, [whole[start : start + 2] for start in range(0, len(whole), 2)])
        assert rows == queued((0, {"text": text}))


async def test_should_emit_a_marker_for_lines_exceeding_the_limit(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        batch_id = await server.create(4)
        await server.stream(batch_id, [line(3, "x" * 2_000, task="my-task")])
        (row,) = await runs_of(server, batch_id)
        assert row[:3] == (3, "my-task", "SYSTEM_FAILURE")
        run = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_3")).json
        assert run["error"]["name"] == "PAYLOAD_TOO_LARGE"
        assert "1,024" in run["error"]["message"]


async def test_should_emit_a_marker_for_unbounded_accumulation_without_newlines(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        endless = b'{"index":7,"task":"big-task","payload":"' + b"x" * 5_000
        _, rows = await taken(server, 8, [endless[start : start + 100] for start in range(0, len(endless), 100)])
        assert [row[:3] for row in rows] == [(7, "big-task", "SYSTEM_FAILURE")]


async def test_should_skip_remaining_bytes_of_oversized_line_arriving_in_subsequent_chunks(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        big = line(1, "x" * 4_000)
        answer, rows = await taken(server, 3, [line(0, 0), big[:1_500], big[1_500:3_000], big[3_000:], line(2, 2)])
        assert answer["sealed"]
        assert [row[:3] for row in rows] == [
            (0, "task", "QUEUED"),
            (1, "task", "SYSTEM_FAILURE"),
            (2, "task", "QUEUED"),
        ]


async def test_stamps_an_oversized_marker_s_index_by_emit_position_when_it_can_t_be_extracted(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        big = json.dumps({"task": "known", "payload": "x" * 2_000, "index": 9}).encode() + b"\n"
        answer, rows = await taken(server, 2, [line(0, 0), big])
        assert answer["sealed"]
        assert [row[:3] for row in rows] == [(0, "task", "QUEUED"), (1, "known", "SYSTEM_FAILURE")]


async def test_should_check_byte_size_before_decoding(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        _, rows = await taken(server, 2, [line(0, "日" * 300), line(1, "日" * 400)])
        assert [row[2] for row in rows] == ["QUEUED", "SYSTEM_FAILURE"]


async def test_should_handle_final_line_in_flush_without_trailing_newline(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        _, rows = await taken(server, 2, [line(0, 0), line(1, 1)[:-1]])
        assert rows == queued((0, 0), (1, 1))


async def test_should_reject_invalid_json(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(3)
        answer = await server.stream(batch_id, [line(0), b'{"index":1,"task"\n', line(2)])
        assert (answer.status, answer.json["error"][:23]) == (400, "Invalid JSON at line 2:")
        assert [row[0] for row in await runs_of(server, batch_id)] == [0], "earlier items are stored"


async def test_should_reject_invalid_utf_8_sequences(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer = await server.stream(await server.create(1), [b'{"index":0,"task":"task","payload":"\xff\xfe"}\n'])
        assert (answer.status, answer.json["error"][:24]) == (400, "Invalid UTF-8 at line 1:")


async def test_should_handle_many_small_chunks_efficiently(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        _, rows = await taken(server, 1, [bytes([byte]) for byte in line(0, {"a": "b" * 50})])
        assert rows == queued((0, {"a": "b" * 50}))


async def test_should_handle_multiple_lines_per_chunk(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer, rows = await taken(server, 5, [b"".join(line(index, index) for index in range(5))])
        assert answer["sealed"]
        assert rows == queued(*((index, index) for index in range(5)))


async def test_should_handle_empty_stream(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer, rows = await taken(server, 1, [])
        assert (answer["sealed"], answer["itemsAccepted"], rows) == (False, 0, [])


async def test_should_pass_normal_items_and_emit_markers_for_oversized_items_in_the_same_stream(
    tmp_path: Path, kind: str
) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        _, rows = await taken(server, 3, [line(0, 0) + line(1, "x" * 2_000) + line(2, 2)])
        assert [row[2] for row in rows] == ["QUEUED", "SYSTEM_FAILURE", "QUEUED"]


async def test_should_handle_stream_with_only_whitespace(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        answer, rows = await taken(server, 1, [b"  \n", b"\t\r\n \n"])
        assert (answer["sealed"], answer["itemsAccepted"], rows) == (False, 0, [])


# -- fields of a cut line


async def test_should_extract_index_and_task_from_json_bytes(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        _, rows = await taken(server, 43, [line(42, "x" * 2_000, task="my-task")])
        assert [row[:2] for row in rows] == [(42, "my-task")]


async def test_should_return_defaults_for_malformed_bytes(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        _, rows = await taken(server, 2, [b"not json at all " * 200 + b"\n"])
        assert [row[:2] for row in rows] == [(0, "unknown")]


async def test_should_handle_keys_in_any_order(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        big = b'{"task":"other-task","index":99,"payload":"' + b"x" * 2_000 + b'"}\n'
        _, rows = await taken(server, 100, [big])
        assert [row[:2] for row in rows] == [(99, "other-task")]


async def test_should_not_match_nested_keys(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        nested = b'{"payload":{"index":1,"task":"inner","x":[{"index":2}]},"index":5,"task":"outer","z":"'
        _, rows = await taken(server, 6, [nested + b"x" * 2_000 + b'"}\n'])
        assert [row[:2] for row in rows] == [(5, "outer")]


# -- the two phases


async def test_items_streamed_one_by_one_get_processed(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(3)
        for index in range(3):
            assert (await server.stream(batch_id, [line(index)])).json["sealed"] is (index == 2)
        assert await server.work() == 3
        batch, ledger = await server.engine.store.batch(batch_id)
        assert (batch.state, ledger.completed, ledger.failed) == ("completed", 3, 0)


async def test_items_with_same_index_are_deduplicated(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(2)
        answers = [(await server.stream(batch_id, [line(index)])).json for index in (0, 0, 1, 1)]
        assert [answer["itemsAccepted"] for answer in answers] == [1, 0, 1, 0]
        assert await server.work() == 2


async def test_error_if_batch_not_initialized(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        for batch_id in ("batch_00000000000000000000000000", "nonsense"):
            answer = await server.stream(batch_id, [line(0)])
            assert (answer.status, answer.json["error"]) == (422, f"Batch {batch_id} not found")


async def swept(server: ServerUnderTest) -> list[str]:
    """Run upkeep after every deadline has passed."""
    later_us = server.engine.clock.now_us() + (LIMITS.seal_timeout_ms + 1) * 1_000
    return (await server.engine.maintenance.sweep(now_us=later_us, rows_max=100)).abandoned


async def test_aborts_an_unsealed_batch_past_its_deadline(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(2)
        await server.stream(batch_id, [line(0)])
        assert await swept(server) == [batch_id]
        assert await run_status(server, batch_id) == "ABORTED"
        assert (await server.stream(batch_id, [line(1)])).status == 422
        assert [row[2] for row in await runs_of(server, batch_id)] == ["CANCELED"]


async def test_leaves_a_batch_alone_when_the_stream_sealed_it_first(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.filled(1)
        assert await swept(server) == []
        assert await run_status(server, batch_id) == "PROCESSING"


async def test_is_idempotent_when_it_runs_twice(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        batch_id = await server.create(1)
        assert await swept(server) == [batch_id]
        first, _ = await server.engine.store.batch(batch_id)
        assert await swept(server) == []
        assert (await server.engine.store.batch(batch_id))[0] == first

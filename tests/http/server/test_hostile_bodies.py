"""Bodies that cost more than they bring: other requests are answered in between, and memory stays bounded."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from pathlib import Path

import msgspec
import pytest

from headrace.foundation.limits import MIB
from headrace.store.rpc import CONTENT_TYPE, OPERATIONS
from tests.support.http_server import NDJSON, running_server

MESSAGES = {"content-type": CONTENT_TYPE}


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_body_of_blank_lines_is_refused_and_others_are_served_meanwhile(encoding: str, tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        batch_id = await server.create(5)
        plain = b"\r\n" * (8 * MIB)
        body = gzip.compress(plain, 1) if encoding == "gzip" else plain
        headers = NDJSON | ({} if encoding == "identity" else {"content-encoding": encoding})
        attack = asyncio.create_task(server.ask("POST", f"/api/v3/batches/{batch_id}/items", body, headers))
        answer = await server.ask("GET", "/healthz")
        assert answer.status == 200
        refused = await attack
        assert (refused.status, "blank lines" in str(refused.json)) == (400, True)


async def test_a_large_body_gives_the_loop_back_by_its_bytes(tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        batch_id = await server.create(5)
        body = b" " * (2 * MIB) + b"\n" + b'{"index":0,"task":"t","payload":1}\n'
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        answer = await server.ask("POST", f"/api/v3/batches/{batch_id}/items", body, NDJSON)
        counting.cancel()
        assert answer.status == 200
        assert turns >= len(body) // (256 * 1024)


async def test_a_message_that_decodes_to_much_more_than_its_size_is_refused_before_it_is_decoded(
    tmp_path: Path,
) -> None:
    bomb = msgspec.msgpack.encode({"new": {"id": "batch_x", "metadata": {"a": [[] for _ in range(2_000_000)]}}})
    async with running_server(tmp_path, "memory") as server:
        tracemalloc.start()
        try:
            plain = await server.ask("POST", "/v1/store/create_batch", bomb, MESSAGES)
            packed = await server.ask(
                "POST",
                "/v1/store/create_batch",
                zlib.compress(bomb, wbits=31),
                MESSAGES | {"content-encoding": "gzip"},
            )
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (plain.status, packed.status) == (413, 415)
        assert peak_bytes < 16 * MIB


def test_every_operation_has_a_bound_and_only_those_with_payloads_a_large_one() -> None:
    large = {name for name, operation in OPERATIONS.items() if operation.bytes_max > MIB}
    assert large == {"append", "settle", "release", "tick"}

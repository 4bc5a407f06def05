"""`item_bytes_max` holds at every call that stores a run: one byte more is refused, and nothing is stored."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace import Headrace, InvalidInput
from headrace.core.block import Coalescer, Extra
from headrace.core.pack import JSON, REFERENCE
from headrace.core.span import Key
from headrace.foundation.limits import DEFAULT
from headrace.http.requests.service import RequestContext
from headrace.http.v1.chunk_validation import check_chunk
from headrace.store.payloads import Reference, payload_key

LIMIT = 2_000


def made(folder: Path, **settings: Any) -> tuple[Headrace, Any]:
    app = Headrace("sizes", store=f"sqlite:///{folder}/headrace.db", item_bytes_max=LIMIT, **settings)

    @app.task
    def length(text: str) -> int:
        return len(text)

    return app, length


def text_of(payload_bytes: int) -> str:
    return "x" * (payload_bytes - 2)  # JSON adds two quotes


@pytest.mark.parametrize("inline_bytes_max", [1_024, 100_000])
@pytest.mark.parametrize("call", ["enqueue", "options", "enqueue_in", "enqueue_sync"])
async def test_one_byte_past_the_limit_is_refused_and_nothing_is_stored(
    call: str, inline_bytes_max: int, tmp_path: Path
) -> None:
    app, length = made(tmp_path, inline_bytes_max=inline_bytes_max)
    async with app:
        await app.batches()
        connection = sqlite3.connect(tmp_path / "headrace.db")
        calls: dict[str, Any] = {
            "enqueue": length.enqueue,
            "options": length.options(priority=1).enqueue,
            "enqueue_in": lambda text: length.enqueue_in(connection, text),
            "enqueue_sync": lambda text: asyncio.to_thread(length.enqueue_sync, text),
        }
        with pytest.raises(
            InvalidInput, match="expected at most 2,000 bytes \\(item_bytes_max\\), got 2,001"
        ) as raised:
            await calls[call](text_of(LIMIT + 1))
        assert "length" in raised.value.message
        connection.rollback()
        assert await app.runs() == []
        assert [stored async for stored in (await app.open()).payloads.list()] == []
        await calls[call](text_of(LIMIT))
        connection.commit()
        connection.close()
        assert len(await app.runs()) == 1


@pytest.mark.parametrize("inline_bytes_max", [1_024, 100_000])
async def test_an_item_of_a_map_past_the_limit_is_a_failed_run_at_its_index(
    inline_bytes_max: int, tmp_path: Path
) -> None:
    app, length = made(tmp_path, inline_bytes_max=inline_bytes_max)
    async with app, app.worker():
        batch = await length.map([text_of(LIMIT), text_of(LIMIT + 1), "x"])
        outcomes = [outcome async for outcome in batch.results(timeout_s=30)]
    assert [outcome.output for outcome in outcomes] == [LIMIT - 2, None, 1]
    failure = outcomes[1].failure
    assert failure is not None
    assert (failure.type, "item_bytes_max" in failure.message) == ("PAYLOAD_TOO_LARGE", True)


async def test_a_chunk_of_a_remote_producer_with_a_payload_past_the_limit_is_refused(tmp_path: Path) -> None:
    batch_id = f"batch_{'0' * 26}"
    limits = DEFAULT.replaced(item_bytes_max=LIMIT)
    app, _ = made(tmp_path)
    async with app:
        context = RequestContext(SimpleNamespace(environment="default"), await app.open(), None)  # type: ignore[arg-type]  # unused

        def check(payload: bytes, kind: int, extra: Extra | None) -> None:
            coalescer = Coalescer(runs_max=1, bytes_max=100_000)
            coalescer.add(0, payload, Key("length"), kind=kind, extra=extra)
            (chunk,) = coalescer.flush()
            check_chunk(context, limits, batch_id, chunk)

        key = payload_key("default", batch_id, "0" * 64)
        check(b"x" * LIMIT, JSON, None)
        check(Reference(key, LIMIT, "application/json").encode(), REFERENCE, None)
        with pytest.raises(InvalidInput, match="2000 bytes"):
            check(b"x" * (LIMIT + 1), JSON, None)
        with pytest.raises(InvalidInput, match="item_bytes_max"):
            check(Reference(key, LIMIT + 1, "application/json").encode(), REFERENCE, None)

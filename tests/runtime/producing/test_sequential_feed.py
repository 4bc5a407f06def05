"""Feeding: what is durable, where the input stood, and that the two never part."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from headrace.core import run
from headrace.core.batch import COMPLETED, SEALED, BatchRecord
from headrace.core.block import Chunk
from headrace.core.failure import decode
from headrace.core.pack import REFERENCE
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, InvalidInput, StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.foundation.limits import Limits
from headrace.runtime.clock import SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.producing.batch_appender import BEGINNING, WAITING_CHUNKS_MAX, InputPosition
from headrace.runtime.producing.sequential_feed import SealedElsewhere, SequentialFeed
from headrace.runtime.wakeup import Wakeup
from headrace.store.payloads import PayloadStore, Reference, open_payloads
from headrace.store.protocol import Appended, NewBatch
from headrace.store.sqlite import SqliteStore
from tests.support.hostile import HOSTILE, ITEM_BYTES_MAX

LIMITS = Limits(chunk_runs_max=8, item_bytes_max=ITEM_BYTES_MAX, inline_bytes_max=4_096, chunk_bytes_max=64 * 1024)


class Bench:
    """A store in a file with objects in memory, and feeds into it."""

    def __init__(self, path: Path, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.store = WatchedStore(path / "feed.db", limits)
        self.payloads: PayloadStore = open_payloads("memory://")
        self.clock = SystemClock()
        self.engine = Engine(
            store=self.store,
            payloads=self.payloads,
            clock=self.clock,
            limits=limits,
            environment="default",
            live_directory=None,
            beats_beside=False,
            wakeup=Wakeup(),
        )

    async def __aenter__(self) -> Self:
        await self.store.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()

    async def batch(self, key: str = "one") -> BatchRecord:
        new = NewBatch(id=new_batch_id(self.clock.now_us()), key=key)
        return (await self.store.create_batch(new, now_us=self.clock.now_us()))[0]

    def feed(self, pieces: AsyncIterator[bytes] | Iterator[bytes], start: InputPosition = BEGINNING) -> SequentialFeed:
        return SequentialFeed(pieces, engine=self.engine, key=Key("task"), start=start)

    async def paced(self, data: bytes, size: int) -> AsyncIterator[bytes]:
        """Pieces that come only when what came before was appended, so that every position is kept."""
        fed_bytes = 0
        for piece in pieces_of(data, size):
            yield piece
            fed_bytes += len(piece)
            whole = data[: data.rfind(b"\n", 0, fed_bytes) + 1].count(b"n")
            while self.store.accepted_count < whole and self.store.failures_count < 7:
                await asyncio.sleep(0)

    async def fed(self, data: bytes, *, key: str = "one", size: int = 100, base_index: int = 0) -> bool:
        """Feed `data` as a process that starts now would: from the batch's own cursor."""
        batch = await self.batch(key)
        feed = self.feed(pieces_of(data, size), InputPosition.decode(batch.cursor))
        try:
            return await feed.fill(batch, base_index=base_index)
        finally:
            await feed.close()

    async def inputs(self, key: str = "one") -> list[bytes]:
        """The payload of every run, with references followed."""
        batch = await self.batch(key)
        found = []
        for index in range(batch.received_count):
            view = await self.store.run(batch.id, index)
            payload = view.payload
            if view.kind == REFERENCE:
                payload = await self.payloads.get(Reference.decode(payload).key)
            found.append(payload)
        return found


class WatchedStore(SqliteStore):
    """Keeps what was appended, and can break off: before an append, or after it and before its answer."""

    def __init__(self, path: Path, limits: Limits) -> None:
        super().__init__(path, limits)
        self.cursors: list[bytes] = []
        self.chunks_counts: list[int] = []
        self.accepted_count = 0
        self.failures_count = 0
        self.running = 0
        self.running_most = 0
        self.fails: Callable[[int], Exception | None] = lambda _: None
        self.fails_after = False
        self.gate: asyncio.Event | None = None

    async def append(
        self, batch_id: str, chunks: Sequence[Chunk], *, now_us: int, cursor: bytes | None = None, seals: bool = False
    ) -> Appended:
        self.running += 1
        self.running_most = max(self.running_most, self.running)
        self.chunks_counts.append(len(chunks))
        try:
            error = self.fails(len(self.chunks_counts))
            self.failures_count += error is not None
            if error is not None and not self.fails_after:
                raise error
            if self.gate is not None:
                await self.gate.wait()
            appended = await super().append(batch_id, chunks, now_us=now_us, cursor=cursor, seals=seals)
            self.accepted_count += appended.accepted_count
            if cursor is not None:
                self.cursors.append(cursor)
            if error is not None:
                raise error
            return appended
        finally:
            self.running -= 1


def pieces_of(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(b'{"n":%d}\n' % number for number in range(start, start + count))


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_every_line_becomes_the_run_of_its_place(tmp_path: Path, size: int) -> None:
    async with Bench(tmp_path) as bench:
        assert await bench.fed(lines(100), size=size)
        assert await bench.inputs() == lines(100).splitlines()
        batch = await bench.batch()
        assert (batch.state, batch.expected_count) == (SEALED, 100)


@pytest.mark.parametrize("size", [1, 11, 1 << 20])
@pytest.mark.parametrize("last", [b"\n", b""])
async def test_a_hostile_line_fails_alone_and_at_its_own_index(tmp_path: Path, size: int, last: bytes) -> None:
    chosen = HOSTILE if size > 1 else {name: case for name, case in HOSTILE.items() if len(case.line) < 2_000}
    for number, case in enumerate(chosen.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with Bench(folder) as bench:
            data = case.line + b"\n" + b'{"after":1}' + last
            assert await bench.fed(data, size=size if size > 1 or len(data) < 5_000 else 4_096)
            batch, _ = await bench.store.batch((await bench.batch()).id)
            if case.expected == "blank":
                assert batch.received_count == 1
                continue
            assert batch.received_count == 2
            outcomes = await bench.store.outcomes(batch.id, 0, 10)
            if case.expected == "ok":
                assert outcomes == []
                assert len((await bench.inputs())[0]) <= len(case.line)
                continue
            assert [outcome.state for outcome in outcomes] == [run.FAILED]
            failure = decode(outcomes[0].result)
            assert failure.attempts == 0
            assert "ine 1" in failure.message
            kinds = {"PAYLOAD_TOO_LARGE"} if case.expected == "oversized" else {"InvalidJSON", "InvalidUTF8"}
            assert failure.type in kinds
            assert batch.counts.failed == 1


async def test_an_index_inside_an_oversized_item_says_nothing_about_its_place(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        large = b'{"index":7,"p":"' + b"x" * ITEM_BYTES_MAX + b'"}\n'
        assert await bench.fed(b"1\n" + large + b"2\n", size=1_000)
        batch = await bench.batch()
        assert (batch.received_count, batch.expected_count, batch.counts.failed) == (3, 3, 1)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n\n\t"])
async def test_an_input_without_items_is_a_batch_of_none_that_is_complete(tmp_path: Path, data: bytes) -> None:
    async with Bench(tmp_path) as bench:
        assert await bench.fed(data)
        batch = await bench.batch()
        assert (batch.state, batch.expected_count) == (COMPLETED, 0)
        assert await bench.fed(data)


async def test_a_batch_of_which_every_line_is_bad_is_complete_when_it_is_sealed(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        assert await bench.fed(b"nope\n" * 50)
        batch = await bench.batch()
        assert (batch.state, batch.counts.failed) == (COMPLETED, 50)


@pytest.mark.parametrize("tail", [b"\n", b"", b"\n\n \n"])
async def test_a_feed_goes_on_from_every_position_it_ever_kept(tmp_path: Path, tail: bytes) -> None:
    data = b"\xef\xbb\xbf\n" + lines(60) + b"\r\n" + lines(60, 60).rstrip() + tail
    async with Bench(tmp_path) as bench:
        batch = await bench.batch()
        assert await bench.feed(bench.paced(data, 37)).fill(batch)
        cursors = [b"", *bench.store.cursors]
        assert len(cursors) > 20
        expected = await bench.inputs()
        assert len(expected) == 120
        for number, cursor in enumerate(cursors):
            start = InputPosition.decode(cursor)
            rest = await bench.batch(f"rest {number}")
            assert await bench.feed(pieces_of(data, 41), start).fill(rest, base_index=start.items_count)
            assert await bench.inputs(f"rest {number}") == expected[start.items_count :]


@pytest.mark.parametrize("seed", range(20))
async def test_a_feed_killed_anywhere_goes_on_and_nothing_is_twice(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    data = lines(500)
    async with Bench(tmp_path) as bench:
        for _ in range(dice.randint(1, 5)):
            stop_at = dice.randrange(1, len(data))

            async def until(stop_at: int = stop_at, size: int = dice.randint(1, 700)) -> AsyncIterator[bytes]:
                for piece in pieces_of(data[:stop_at], size):
                    yield piece
                    await asyncio.sleep(0)
                raise Killed

            batch = await bench.batch()
            with pytest.raises(Killed):
                await bench.feed(until(), InputPosition.decode(batch.cursor)).fill(batch)
        assert await bench.fed(data, size=dice.randint(1, 700))
        assert await bench.inputs() == data.splitlines()
        assert bench.store.accepted_count <= 500, "an append that was in flight at the end counts nowhere"


@pytest.mark.parametrize("fails_after", [False, True])
async def test_an_append_whose_answer_was_lost_is_repeated_and_adds_nothing(tmp_path: Path, fails_after: bool) -> None:
    async with Bench(tmp_path) as bench:
        bench.store.fails = lambda number: StoreUnavailable("gone for a moment") if number % 2 else None
        bench.store.fails_after = fails_after
        assert await bench.fed(lines(200), size=300)
        assert await bench.inputs() == lines(200).splitlines()
        assert bench.store.accepted_count == 200


async def test_a_store_that_stays_away_is_an_error_and_what_was_kept_is_gone_on_from(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        waits: list[float] = []

        async def no_wait(seconds: float) -> None:
            waits.append(seconds)

        bench.clock.sleep = no_wait  # type: ignore[method-assign]  # the clock's own wait is what is watched
        bench.store.fails = lambda number: StoreUnavailable("the disk is full") if number > 3 else None
        batch = await bench.batch()
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            await bench.feed(bench.paced(lines(200), 30)).fill(batch)
        assert len(waits) > 3
        bench.store.fails = lambda _: None
        assert await bench.fed(lines(200))
        assert await bench.inputs() == lines(200).splitlines()


@pytest.mark.parametrize("at", [3, 500, 880])
async def test_an_input_that_changed_is_refused_with_the_hint_to_start_afresh(tmp_path: Path, at: int) -> None:
    data = lines(100)
    async with Bench(tmp_path) as bench:
        await bench.fed(data)
        other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(InvalidInput, match="the input changed") as raised:
            await bench.fed(other)
        assert "--fresh" in raised.value.hint
        with pytest.raises(InvalidInput, match="fewer than"):
            await bench.fed(data[:-20])
        assert await bench.fed(data)


async def test_a_line_that_changed_past_the_fingerprint_is_known_by_its_content(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        batch = await bench.batch()
        await bench.feed(pieces_of(lines(100), 100)).fill(batch)
        with pytest.raises(InvalidInput, match="another line"):
            await bench.feed(pieces_of(lines(99) + b'{"n":"x"}\n', 100)).fill(await bench.batch())


@pytest.mark.parametrize("first_end", [b"\n", b"", b" \r", b"\n\n"])
async def test_an_input_that_grew_is_left_for_a_batch_that_goes_on(tmp_path: Path, first_end: bytes) -> None:
    first = lines(30).rstrip() + first_end
    more = (b"" if first_end.endswith(b"\n") else b"\n") + lines(25, 30)
    async with Bench(tmp_path) as bench:
        assert await bench.fed(first)
        batch = await bench.batch()
        feed = bench.feed(pieces_of(first + more, 50), InputPosition.decode(batch.cursor))
        assert not await feed.fill(batch)
        rest = await bench.batch("one#2")
        assert await feed.fill(rest, base_index=30)
        assert await bench.inputs("one#2") == lines(25, 30).splitlines()
        assert await bench.inputs("one") == lines(30).splitlines()
        again = await bench.batch("one#2")
        assert await bench.feed(pieces_of(first + more, 51), InputPosition.decode(again.cursor)).fill(
            again, base_index=30
        )
        assert (await bench.batch("one#2")).expected_count == 25


async def test_a_full_batch_is_left_at_its_last_item_even_from_an_earlier_position(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        assert await bench.fed(lines(30))
        batch = await bench.batch()
        feed = bench.feed(pieces_of(lines(55), 64))
        assert not await feed.fill(batch)
        assert feed.position.items_count == 30
        assert feed.position.bytes_count == len(lines(30))
        assert await feed.fill(await bench.batch("one#2"), base_index=30)
        assert await bench.inputs("one#2") == lines(25, 30).splitlines()


@pytest.mark.parametrize("size", [1, 64, 100_000])
async def test_an_input_of_more_items_than_a_batch_holds_fills_several(tmp_path: Path, size: int) -> None:
    async with Bench(tmp_path, LIMITS.replaced(batch_runs_max=10)) as bench:
        data = lines(30) + b"\n\n" + lines(5, 30)
        feed = bench.feed(pieces_of(data, size))
        counts = []
        is_over = False
        while not is_over:
            base_index = feed.position.items_count
            is_over = await feed.fill(await bench.batch(f"part {base_index}"), base_index=base_index)
            counts.append((await bench.batch(f"part {base_index}")).expected_count)
        assert counts == [10, 10, 10, 5]
        assert await bench.inputs("part 20") == lines(10, 20).splitlines()
        assert await bench.inputs("part 30") == lines(5, 30).splitlines()


async def test_a_last_line_that_went_on_is_a_change(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        assert await bench.fed(b"1\n2")
        with pytest.raises(InvalidInput, match="has been continued"):
            await bench.fed(b"1\n23\n")
        assert await bench.fed(b"1\n2  ")


async def test_line_numbers_count_on_after_a_resume(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        first, more = b"\n1\n\n2", b"\n\nbad\n"
        assert await bench.fed(first)
        batch = await bench.batch()
        feed = bench.feed(pieces_of(first + more, 3), InputPosition.decode(batch.cursor))
        assert not await feed.fill(batch)
        rest = await bench.batch("rest")
        assert await feed.fill(rest, base_index=2)
        (outcome,) = await bench.store.outcomes(rest.id, 0, 5)
        assert "line 6" in decode(outcome.result).message


async def test_two_feeds_of_one_input_at_once_add_nothing_twice(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        results = await asyncio.gather(*(bench.fed(lines(400), size=size) for size in (90, 130, 1_000)))
        assert results == [True, True, True]
        assert await bench.inputs() == lines(400).splitlines()
        assert bench.store.accepted_count == 400


async def test_a_feed_that_meets_a_seal_before_its_end_says_so(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        early = await bench.batch()
        assert await bench.fed(lines(30))
        with pytest.raises(SealedElsewhere):
            await bench.feed(pieces_of(lines(60), 100)).fill(early)


async def test_a_cancelled_batch_takes_no_more(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        batch = await bench.batch()
        await bench.store.stop_batch(batch.id, "cancelled", now_us=bench.clock.now_us())
        with pytest.raises(Conflict, match="cancelled"):
            await bench.feed(pieces_of(lines(60), 100)).fill(batch)


async def test_large_items_go_to_the_object_store_and_keep_their_places(tmp_path: Path) -> None:
    data = b"".join(b'{"n":%d,"p":"%s"}\n' % (n, b"x" * (5_000 if n % 3 == 0 else 10)) for n in range(60))
    async with Bench(tmp_path) as bench:
        assert await bench.fed(data, size=20_000)
        assert await bench.inputs() == data.splitlines()
        stored = [found async for found in bench.payloads.list()]
        assert len(stored) == 20
        assert len(await bench.store.unnamed([found.key for found in stored])) == 0


async def test_what_waits_is_bounded_while_an_append_does_not_end(tmp_path: Path) -> None:
    read_bytes = 0

    def counted() -> Iterator[bytes]:
        nonlocal read_bytes
        for piece in pieces_of(lines(200_000), 1_000):
            read_bytes += len(piece)
            yield piece

    async with Bench(tmp_path) as bench:
        bench.store.gate = asyncio.Event()
        batch = await bench.batch()
        task = asyncio.create_task(bench.feed(counted()).fill(batch))
        before = -1
        while read_bytes != before or not bench.store.running:
            before = read_bytes
            for _ in range(100):
                await asyncio.sleep(0)
        assert read_bytes < 30_000 + 2 * WAITING_CHUNKS_MAX * LIMITS.chunk_runs_max * 12
        task.cancel()
        await asyncio.wait((task,))
        assert bench.store.running_most == 1


async def test_chunks_are_full_when_the_source_is_fast(tmp_path: Path) -> None:
    async with Bench(tmp_path, Limits()) as bench:
        assert await bench.fed(lines(20_000), size=1 << 16)
        assert sum(bench.store.chunks_counts) == -(-20_000 // 256)


async def test_a_lone_item_is_durable_before_the_next_one_comes(tmp_path: Path) -> None:
    async with Bench(tmp_path) as bench:
        batch = await bench.batch()
        is_durable: list[bool] = []

        async def slow() -> AsyncIterator[bytes]:
            for number in range(3):
                yield b"%d\n" % number
                while bench.store.accepted_count <= number:
                    await asyncio.sleep(0)
                is_durable.append(True)

        assert await bench.feed(slow()).fill(batch)
        assert is_durable == [True] * 3

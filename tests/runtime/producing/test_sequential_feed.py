"""Sequential feed: stored items and the stored position in the input always agree."""

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
from headrace.store.object_store import open_payloads
from headrace.store.payloads import PayloadStore, Reference
from headrace.store.protocol import Appended, NewBatch
from headrace.store.sqlite import SqliteStore
from tests.support.hostile import HOSTILE, ITEM_BYTES_MAX

LIMITS = Limits(chunk_runs_max=8, item_bytes_max=ITEM_BYTES_MAX, inline_bytes_max=4_096, chunk_bytes_max=64 * 1024)


class FeedRig:
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

    async def batch(self, key: str = "main") -> BatchRecord:
        new = NewBatch(id=new_batch_id(self.clock.now_us()), key=key)
        return (await self.store.create_batch(new, now_us=self.clock.now_us()))[0]

    def feed(self, pieces: AsyncIterator[bytes] | Iterator[bytes], start: InputPosition = BEGINNING) -> SequentialFeed:
        return SequentialFeed(pieces, engine=self.engine, key=Key("task"), start=start)

    async def paced(self, data: bytes, size: int) -> AsyncIterator[bytes]:
        """Yield pieces that wait until earlier items were appended, so that every position is stored."""
        fed_bytes = 0
        for piece in pieces_of(data, size):
            yield piece
            fed_bytes += len(piece)
            complete_count = data[: data.rfind(b"\n", 0, fed_bytes) + 1].count(b"n")
            while self.store.accepted_count < complete_count and self.store.failures_count < 7:
                await asyncio.sleep(0)

    async def fed(self, data: bytes, *, key: str = "main", size: int = 100, base_index: int = 0) -> bool:
        """Feed `data` as a process that starts now would: from the stored cursor of the batch."""
        batch = await self.batch(key)
        feed = self.feed(pieces_of(data, size), InputPosition.decode(batch.cursor))
        try:
            return await feed.fill(batch, base_index=base_index)
        finally:
            await feed.close()

    async def inputs(self, key: str = "main") -> list[bytes]:
        """Return the payload of each run, with references resolved."""
        batch = await self.batch(key)
        payloads = []
        for index in range(batch.received_count):
            view = await self.store.run(batch.id, index)
            payload = view.payload
            if view.kind == REFERENCE:
                payload = await self.payloads.get(Reference.decode(payload).key)
            payloads.append(payload)
        return payloads


class WatchedStore(SqliteStore):
    """A store that records appends and can fail before an append, or after it and before its acknowledgement."""

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
    """Stands for the end of the process."""


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
async def test_each_line_becomes_the_run_of_its_index(tmp_path: Path, size: int) -> None:
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(lines(100), size=size)
        assert await rig.inputs() == lines(100).splitlines()
        batch = await rig.batch()
        assert (batch.state, batch.expected_count) == (SEALED, 100)


@pytest.mark.parametrize("size", [1, 11, 1 << 20])
@pytest.mark.parametrize("last", [b"\n", b""])
async def test_a_hostile_line_fails_alone_and_at_its_own_index(tmp_path: Path, size: int, last: bytes) -> None:
    chosen = HOSTILE if size > 1 else {name: case for name, case in HOSTILE.items() if len(case.line) < 2_000}
    for number, case in enumerate(chosen.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with FeedRig(folder) as rig:
            data = case.line + b"\n" + b'{"after":1}' + last
            assert await rig.fed(data, size=size if size > 1 or len(data) < 5_000 else 4_096)
            batch, _ = await rig.store.batch((await rig.batch()).id)
            if case.expected == "blank":
                assert batch.received_count == 1
                continue
            assert batch.received_count == 2
            outcomes = await rig.store.outcomes(batch.id, 0, 10)
            if case.expected == "ok":
                assert outcomes == []
                assert len((await rig.inputs())[0]) <= len(case.line)
                continue
            assert [outcome.state for outcome in outcomes] == [run.FAILED]
            failure = decode(outcomes[0].result)
            assert failure.attempts == 0
            assert "ine 1" in failure.message
            kinds = {"PAYLOAD_TOO_LARGE"} if case.expected == "oversized" else {"InvalidJSON", "InvalidUTF8"}
            assert failure.type in kinds
            assert batch.counts.failed == 1


async def test_an_index_inside_an_oversized_item_is_ignored(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        large = b'{"index":7,"p":"' + b"x" * ITEM_BYTES_MAX + b'"}\n'
        assert await rig.fed(b"1\n" + large + b"2\n", size=1_000)
        batch = await rig.batch()
        assert (batch.received_count, batch.expected_count, batch.counts.failed) == (3, 3, 1)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n\n\t"])
async def test_an_input_without_items_is_a_completed_empty_batch(tmp_path: Path, data: bytes) -> None:
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(data)
        batch = await rig.batch()
        assert (batch.state, batch.expected_count) == (COMPLETED, 0)
        assert await rig.fed(data)


async def test_a_batch_of_invalid_lines_is_completed_when_it_is_sealed(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(b"nope\n" * 50)
        batch = await rig.batch()
        assert (batch.state, batch.counts.failed) == (COMPLETED, 50)


@pytest.mark.parametrize("tail", [b"\n", b"", b"\n\n \n"])
async def test_a_feed_resumes_from_each_stored_position(tmp_path: Path, tail: bytes) -> None:
    data = b"\xef\xbb\xbf\n" + lines(60) + b"\r\n" + lines(60, 60).rstrip() + tail
    async with FeedRig(tmp_path) as rig:
        batch = await rig.batch()
        assert await rig.feed(rig.paced(data, 37)).fill(batch)
        cursors = [b"", *rig.store.cursors]
        assert len(cursors) > 20
        expected = await rig.inputs()
        assert len(expected) == 120
        for number, cursor in enumerate(cursors):
            start = InputPosition.decode(cursor)
            rest = await rig.batch(f"rest {number}")
            assert await rig.feed(pieces_of(data, 41), start).fill(rest, base_index=start.items_count)
            assert await rig.inputs(f"rest {number}") == expected[start.items_count :]


@pytest.mark.parametrize("seed", range(20))
async def test_a_feed_killed_at_any_point_resumes_without_duplicates(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    data = lines(500)
    async with FeedRig(tmp_path) as rig:
        for _ in range(dice.randint(1, 5)):
            stop_at = dice.randrange(1, len(data))

            async def pieces_until_killed(
                stop_at: int = stop_at, size: int = dice.randint(1, 700)
            ) -> AsyncIterator[bytes]:
                for piece in pieces_of(data[:stop_at], size):
                    yield piece
                    await asyncio.sleep(0)
                raise Killed

            batch = await rig.batch()
            with pytest.raises(Killed):
                await rig.feed(pieces_until_killed(), InputPosition.decode(batch.cursor)).fill(batch)
        assert await rig.fed(data, size=dice.randint(1, 700))
        assert await rig.inputs() == data.splitlines()
        assert rig.store.accepted_count <= 500, "expected an append in flight at the end not to be counted"


@pytest.mark.parametrize("fails_after", [False, True])
async def test_an_append_whose_acknowledgement_was_lost_is_repeated_without_duplicates(
    tmp_path: Path, fails_after: bool
) -> None:
    async with FeedRig(tmp_path) as rig:
        rig.store.fails = lambda number: StoreUnavailable("unavailable for a moment") if number % 2 else None
        rig.store.fails_after = fails_after
        assert await rig.fed(lines(200), size=300)
        assert await rig.inputs() == lines(200).splitlines()
        assert rig.store.accepted_count == 200


async def test_an_unavailable_store_raises_an_error_and_the_feed_resumes_later(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        waits: list[float] = []

        async def no_wait(seconds: float) -> None:
            waits.append(seconds)

        rig.clock.sleep = no_wait  # type: ignore[method-assign]  # the clock's own wait is what is watched
        rig.store.fails = lambda number: StoreUnavailable("the disk is full") if number > 3 else None
        batch = await rig.batch()
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            await rig.feed(rig.paced(lines(200), 30)).fill(batch)
        assert len(waits) > 3
        rig.store.fails = lambda _: None
        assert await rig.fed(lines(200))
        assert await rig.inputs() == lines(200).splitlines()


@pytest.mark.parametrize("at", [3, 500, 880])
async def test_a_changed_input_is_refused_with_the_hint_to_start_over(tmp_path: Path, at: int) -> None:
    data = lines(100)
    async with FeedRig(tmp_path) as rig:
        await rig.fed(data)
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(InvalidInput, match="the input changed") as raised:
            await rig.fed(changed)
        assert "--fresh" in raised.value.hint
        with pytest.raises(InvalidInput, match="fewer than"):
            await rig.fed(data[:-20])
        assert await rig.fed(data)


async def test_a_line_changed_past_the_fingerprint_is_detected_by_its_content(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        batch = await rig.batch()
        await rig.feed(pieces_of(lines(100), 100)).fill(batch)
        with pytest.raises(InvalidInput, match="another line"):
            await rig.feed(pieces_of(lines(99) + b'{"n":"x"}\n', 100)).fill(await rig.batch())


@pytest.mark.parametrize("first_end", [b"\n", b"", b" \r", b"\n\n"])
async def test_lines_added_to_an_input_go_into_a_continuing_batch(tmp_path: Path, first_end: bytes) -> None:
    first = lines(30).rstrip() + first_end
    added = (b"" if first_end.endswith(b"\n") else b"\n") + lines(25, 30)
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(first)
        batch = await rig.batch()
        feed = rig.feed(pieces_of(first + added, 50), InputPosition.decode(batch.cursor))
        assert not await feed.fill(batch)
        rest = await rig.batch("main#2")
        assert await feed.fill(rest, base_index=30)
        assert await rig.inputs("main#2") == lines(25, 30).splitlines()
        assert await rig.inputs("main") == lines(30).splitlines()
        again = await rig.batch("main#2")
        assert await rig.feed(pieces_of(first + added, 51), InputPosition.decode(again.cursor)).fill(
            again, base_index=30
        )
        assert (await rig.batch("main#2")).expected_count == 25


async def test_a_feed_leaves_a_full_batch_at_its_last_item_even_from_an_earlier_position(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(lines(30))
        batch = await rig.batch()
        feed = rig.feed(pieces_of(lines(55), 64))
        assert not await feed.fill(batch)
        assert feed.position.items_count == 30
        assert feed.position.bytes_count == len(lines(30))
        assert await feed.fill(await rig.batch("main#2"), base_index=30)
        assert await rig.inputs("main#2") == lines(25, 30).splitlines()


@pytest.mark.parametrize("size", [1, 64, 100_000])
async def test_an_input_of_more_items_than_a_batch_holds_fills_several(tmp_path: Path, size: int) -> None:
    async with FeedRig(tmp_path, LIMITS.replaced(batch_runs_max=10)) as rig:
        data = lines(30) + b"\n\n" + lines(5, 30)
        feed = rig.feed(pieces_of(data, size))
        counts = []
        is_over = False
        while not is_over:
            base_index = feed.position.items_count
            is_over = await feed.fill(await rig.batch(f"part {base_index}"), base_index=base_index)
            counts.append((await rig.batch(f"part {base_index}")).expected_count)
        assert counts == [10, 10, 10, 5]
        assert await rig.inputs("part 20") == lines(10, 20).splitlines()
        assert await rig.inputs("part 30") == lines(5, 30).splitlines()


async def test_a_continued_last_line_is_a_change(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(b"1\n2")
        with pytest.raises(InvalidInput, match="has been continued"):
            await rig.fed(b"1\n23\n")
        assert await rig.fed(b"1\n2  ")


async def test_line_numbers_continue_after_a_resume(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        first, added = b"\n1\n\n2", b"\n\nbad\n"
        assert await rig.fed(first)
        batch = await rig.batch()
        feed = rig.feed(pieces_of(first + added, 3), InputPosition.decode(batch.cursor))
        assert not await feed.fill(batch)
        rest = await rig.batch("rest")
        assert await feed.fill(rest, base_index=2)
        (outcome,) = await rig.store.outcomes(rest.id, 0, 5)
        assert "line 6" in decode(outcome.result).message


async def test_concurrent_feeds_of_an_input_add_each_item_once(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        results = await asyncio.gather(*(rig.fed(lines(400), size=size) for size in (90, 130, 1_000)))
        assert results == [True, True, True]
        assert await rig.inputs() == lines(400).splitlines()
        assert rig.store.accepted_count == 400


async def test_a_feed_that_meets_an_earlier_seal_raises(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        early = await rig.batch()
        assert await rig.fed(lines(30))
        with pytest.raises(SealedElsewhere):
            await rig.feed(pieces_of(lines(60), 100)).fill(early)


async def test_a_cancelled_batch_refuses_items(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        batch = await rig.batch()
        await rig.store.stop_batch(batch.id, "cancelled", now_us=rig.clock.now_us())
        with pytest.raises(Conflict, match="cancelled"):
            await rig.feed(pieces_of(lines(60), 100)).fill(batch)


async def test_large_items_go_to_the_object_store_and_keep_their_index(tmp_path: Path) -> None:
    data = b"".join(b'{"n":%d,"p":"%s"}\n' % (n, b"x" * (5_000 if n % 3 == 0 else 10)) for n in range(60))
    async with FeedRig(tmp_path) as rig:
        assert await rig.fed(data, size=20_000)
        assert await rig.inputs() == data.splitlines()
        stored = [stored_object async for stored_object in rig.payloads.list()]
        assert len(stored) == 20
        assert len(await rig.store.unnamed([stored_object.key for stored_object in stored])) == 0


async def test_waiting_chunks_are_bounded_while_an_append_hangs(tmp_path: Path) -> None:
    read_bytes = 0

    def counted() -> Iterator[bytes]:
        nonlocal read_bytes
        for piece in pieces_of(lines(200_000), 1_000):
            read_bytes += len(piece)
            yield piece

    async with FeedRig(tmp_path) as rig:
        rig.store.gate = asyncio.Event()
        batch = await rig.batch()
        task = asyncio.create_task(rig.feed(counted()).fill(batch))
        before = -1
        while read_bytes != before or not rig.store.running:
            before = read_bytes
            for _ in range(100):
                await asyncio.sleep(0)
        assert read_bytes < 30_000 + 2 * WAITING_CHUNKS_MAX * LIMITS.chunk_runs_max * 12
        task.cancel()
        await asyncio.wait((task,))
        assert rig.store.running_most == 1


async def test_chunks_are_full_when_the_source_is_fast(tmp_path: Path) -> None:
    async with FeedRig(tmp_path, Limits()) as rig:
        assert await rig.fed(lines(20_000), size=1 << 16)
        assert sum(rig.store.chunks_counts) == -(-20_000 // 256)


async def test_a_lone_item_is_durable_before_the_next_item_arrives(tmp_path: Path) -> None:
    async with FeedRig(tmp_path) as rig:
        batch = await rig.batch()
        is_durable: list[bool] = []

        async def slow() -> AsyncIterator[bytes]:
            for number in range(3):
                yield b"%d\n" % number
                while rig.store.accepted_count <= number:
                    await asyncio.sleep(0)
                is_durable.append(True)

        assert await rig.feed(slow()).fill(batch)
        assert is_durable == [True] * 3

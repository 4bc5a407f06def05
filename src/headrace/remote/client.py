"""A client of a server, for programs that have no tasks of their own: send items, read results.

Rule 1: items are read from their source as they are sent, in portions; a portion is kept until it was acknowledged.
When an answer is lost or bad, the server is asked what is missing of it, and just that is sent again.
Rule 2: a batch whose items are all durable is never an error, however the last answer came, or did not.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from secrets import token_hex
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from urllib.parse import quote

import msgspec

from headrace.core.index_set import IndexSet
from headrace.foundation.errors import HeadraceError, InvalidInput, StoreUnavailable
from headrace.foundation.limits import KIB, MIB
from headrace.remote.connection import ATTEMPTS, Answer, Connection, backoff_s
from headrace.runtime.background_loop import BackgroundLoop
from headrace.runtime.clock import Clock
from headrace.runtime.concurrent_map import map_concurrently
from headrace.store.rpc import fault_of

T = TypeVar("T")

OFFLOAD_BYTES: Final = 128 * KIB
UPLOADS: Final = 10
PORTION_BYTES: Final = 4 * MIB
PORTION_ITEMS: Final = 20_000
RANGES: Final = 1_000
_encode: Final = msgspec.json.Encoder().encode
_NDJSON: Final = {"content-type": "application/x-ndjson"}
_JSON: Final = {"content-type": "application/json"}


class Progress(NamedTuple):
    """How far a batch was sent. `accepted`: items that are durable now, those of earlier tries too."""

    batch_id: str
    sent_items: int
    sent_bytes: int
    accepted: int


class Sent(msgspec.Struct, frozen=True):
    """A batch that is durable whole, and sealed."""

    id: str
    count: int


class Line(msgspec.Struct, frozen=True):
    """One line of results. `output` when it is ok, else `error`."""

    index: int
    id: str
    state: str
    ok: bool
    output: Any
    error: dict[str, Any] | None


class Client:
    """One server, one key. `attempts`: how often a request is made in all while that may help.

    Use it as an async context manager or as it is; `sync` is the same for code that is not async.
    """

    def __init__(
        self, url: str, key: str | None = None, *, attempts: int = ATTEMPTS, clock: Clock | None = None
    ) -> None:
        self.connection = Connection(url, key, clock=clock, attempts=attempts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def sync(self) -> SyncClient:
        """The same client for code that is not async; close it when it is done."""
        return SyncClient(self)

    # -- sending

    async def send(
        self,
        task: str,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        batch_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Sent:
        """Store one run of `task` for each item; the batch is durable and sealed when this returns.

        Items are streamed, the whole input is never in memory. `options` are those of an item in the HTTP API (`queue`,
        `priority`, `delay`, …), for all of them. With a `batch_key` the call can be repeated from the beginning of the
        same items: it finds the batch of that key and adds what is missing. Raises the server's error when a retry
        can't help.
        """
        named = batch_key or f"send:{token_hex(16)}"  # a create whose answer was lost is found again
        body = _encode({"key": named, "task": task, "metadata": dict(metadata or {})})
        created = await self.connection.ask("POST", "/v1/batches", body, _JSON)
        batch = created.json
        sending = _Sending(self.connection, batch["id"], on_progress)
        if batch["state"] in ("sealed", "completed"):
            return Sent(batch["id"], batch["expected"])
        if batch["received"]:
            await sending.learn()
        own = {name: value for name, value in (options or {}).items() if value is not None}
        async with aclosing(self._lines(task, items, own)) as lines:
            async for index, line in lines:
                await sending.take(index, line)
        await sending.flush()
        return await self._sealed(batch["id"], sending.next_index)

    async def _sealed(self, batch_id: str, count: int) -> Sent:
        try:
            await self.connection.ask("POST", f"/v1/batches/{batch_id}/seal", _encode({"run_count": count}), _JSON)
        except HeadraceError:
            batch = await self.batch(batch_id)  # rule 2: it may be sealed all the same
            if batch["state"] not in ("sealed", "completed") or batch["expected"] != count:
                raise
        return Sent(batch_id, count)

    async def _lines(
        self, task: str, items: Iterable[Any] | AsyncIterable[Any], options: dict[str, Any]
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Items as lines, in order; large ones are uploaded first, some at a time."""

        def step(numbered: tuple[int, Any]) -> tuple[int, bytes] | Coroutine[Any, Any, tuple[int, bytes]]:
            index, item = numbered
            try:
                payload = _encode(item)
            except (TypeError, ValueError, UnicodeEncodeError, RecursionError) as error:
                raise InvalidInput(f"item {index} can't be written as JSON: {error}") from None
            if len(payload) >= OFFLOAD_BYTES:
                return self._uploaded(task, index, payload, options)
            return index, _line(index, task, payload, options)

        async with aclosing(map_concurrently(_numbered(items), step, concurrency=UPLOADS)) as steps:
            async for line in steps:
                yield line

    async def _uploaded(self, task: str, index: int, payload: bytes, options: dict[str, Any]) -> tuple[int, bytes]:
        path = f"headrace/{token_hex(12)}/payload.json"
        place = (await self.connection.ask("PUT", f"/api/v2/packets/{quote(path, safe='')}", b"")).json
        await self.connection.ask("PUT", place["presignedUrl"], payload, _JSON)
        own = {**options, "payloadType": "application/store"}
        return index, _line(index, task, _encode(place["storagePath"]), own)

    async def enqueue(self, task: str, payload: Any = None, **options: Any) -> str:
        """One run; answers its id, or that of the run which its `idempotencyKey` names."""
        own = {name: value for name, value in options.items() if value is not None}
        body = _encode({"payload": payload, "options": own or None})
        answer = await self.connection.ask("POST", f"/v1/tasks/{quote(task, safe='')}/runs", body, _JSON)
        return str(answer.json["id"])

    # -- reading

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """Where its runs are."""
        found: dict[str, Any] = (await self.connection.ask("GET", f"/v1/batches/{quote(batch_id, safe='')}")).json
        return found

    async def run(self, run_id: str) -> dict[str, Any]:
        """One run."""
        found: dict[str, Any] = (await self.connection.ask("GET", f"/api/v3/runs/{quote(run_id, safe='')}")).json
        return found

    async def results(self, batch_id: str, *, from_index: int = 0) -> AsyncIterator[Line]:
        """Results in index order while the batch runs; goes on where it was when the connection breaks."""
        next_index, tries = from_index, 0
        while True:
            try:
                async for line in self._lines_of(batch_id, next_index):
                    next_index, tries = line.index + 1, 0
                    yield line
                if await self._is_read(batch_id, next_index):
                    return
            except StoreUnavailable:
                tries += 1
                if tries >= self.connection.attempts:
                    raise
                await self.connection.clock.sleep(backoff_s(tries))

    async def _is_read(self, batch_id: str, next_index: int) -> bool:
        """Whether the batch has ended and all of it was read: a server that stops ends a stream too."""
        batch = await self.batch(batch_id)
        return bool(batch["is_finished"]) and next_index >= batch["received"]

    async def _lines_of(self, batch_id: str, from_index: int) -> AsyncIterator[Line]:
        path = f"/v1/batches/{quote(batch_id, safe='')}/results?from={from_index}"
        async with self.connection.opened("GET", path) as (answer, pieces):
            if not answer.is_good:
                body = b"".join([piece async for piece in pieces])
                raise fault_of(answer.status, body)
            rest = b""
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line:
                        told = msgspec.json.decode(line)
                        yield Line(
                            told["index"], told["id"], told["state"], told["ok"], told.get("output"), told.get("error")
                        )

    async def missing(self, batch_id: str) -> list[tuple[int, int]]:
        """Ranges of indexes that are not durable yet, first and last of each."""
        answer = await self.connection.ask("GET", f"/v1/batches/{quote(batch_id, safe='')}/missing")
        return [(first, last) for first, last in answer.json["ranges"]]

    # -- interventions

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        """Start nothing more of a batch."""
        found: dict[str, Any] = (await self._do(batch_id, "cancel")).json
        return found

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None = None) -> int:
        """Run again what failed, or the runs at some indexes."""
        body = _encode({"indexes": None if indexes is None else list(indexes)})
        return int((await self._do(batch_id, "redrive", body)).json["redriven"])

    async def _do(self, batch_id: str, what: str, body: bytes = b"{}") -> Answer:
        return await self.connection.ask("POST", f"/v1/batches/{quote(batch_id, safe='')}/{what}", body, _JSON)


class _Sending:
    """Portions of one batch on their way."""

    def __init__(self, connection: Connection, batch_id: str, on_progress: Callable[[Progress], None] | None) -> None:
        self._connection = connection
        self._path = f"/v1/batches/{batch_id}"
        self._batch_id = batch_id
        self._on_progress = on_progress
        self._portion: list[tuple[int, bytes]] = []
        self._held_bytes = 0
        self._durable = IndexSet()
        self._accepted = self._sent_items = self._sent_bytes = 0
        self.next_index = 0

    async def learn(self) -> None:
        """What an earlier send made durable."""
        answer = await self._connection.ask("GET", f"{self._path}/missing?ranges={RANGES}")
        told = answer.json
        holes = sum(last - first + 1 for first, last in told["ranges"])
        self._accepted = told["received"]
        if not told["more"]:  # else it is sent again: what is durable adds nothing
            self._durable = IndexSet.from_ranges(_without(told["received"] + holes, told["ranges"]))

    async def take(self, index: int, line: bytes) -> None:
        """One line; sends a portion when there is one."""
        self.next_index = index + 1
        if index in self._durable:
            return
        self._portion.append((index, line))
        self._held_bytes += len(line)
        if self._held_bytes >= PORTION_BYTES or len(self._portion) >= PORTION_ITEMS:
            await self.flush()

    async def flush(self) -> None:
        """Make what is held durable. Raises what the server said when trying again does not help."""
        portion, self._portion, self._held_bytes = self._portion, [], 0
        tries = 0
        while portion:
            tries += 1
            wait_s: float | None = None
            fault: HeadraceError | None = None
            try:
                answer = await self._connection.once(
                    "POST", f"{self._path}/items", b"".join(line for _, line in portion), _NDJSON, timeout_s=None
                )
                if answer.is_good:
                    self._note(portion, answer.json["received"])
                    return
                fault = fault_of(answer.status, answer.body)
                if not answer.is_retryable:
                    raise fault
                wait_s = answer.wait_s(self._connection.clock.now_us())
            except StoreUnavailable as error:
                fault = error
            if tries >= self._connection.attempts:
                portion = await self._left(portion)
                if not portion:
                    return
                raise fault
            await self._connection.clock.sleep(backoff_s(tries) if wait_s is None else wait_s)
            portion = await self._left(portion)

    async def _left(self, portion: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """What of a portion is not durable yet; all of it while the server can't say."""
        try:
            answer = await self._connection.ask("GET", f"{self._path}/missing?ranges={RANGES}", attempts=1)
        except HeadraceError:
            return portion
        told = answer.json
        if told["more"]:
            return portion
        missing = IndexSet.from_ranges((first, last + 1) for first, last in told["ranges"])
        end = told["received"] + sum(last - first + 1 for first, last in told["ranges"])
        left = [(index, line) for index, line in portion if index >= end or index in missing]
        if not left:
            self._note(portion, told["received"])
        return left

    def _note(self, portion: list[tuple[int, bytes]], received: int) -> None:
        self._sent_items += len(portion)
        self._sent_bytes += sum(len(line) for _, line in portion)
        self._accepted = received
        if self._on_progress is not None:
            self._on_progress(Progress(self._batch_id, self._sent_items, self._sent_bytes, self._accepted))


class SyncClient:
    """`Client` for code that is not async: one loop in one background thread serves every call."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._background = BackgroundLoop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._background.stop()

    def send(self, task: str, items: Iterable[Any], **more: Any) -> Sent:
        """As `Client.send`."""
        return self._background.run(self._client.send(task, items, **more))

    def enqueue(self, task: str, payload: Any = None, **options: Any) -> str:
        """As `Client.enqueue`."""
        return self._background.run(self._client.enqueue(task, payload, **options))

    def results(self, batch_id: str, *, from_index: int = 0) -> Iterator[Line]:
        """As `Client.results`."""
        lines = self._client.results(batch_id, from_index=from_index)
        while True:
            try:
                line = self._background.run(anext(lines))
            except StopAsyncIteration:
                return
            yield line

    def batch(self, batch_id: str) -> dict[str, Any]:
        """As `Client.batch`."""
        return self._background.run(self._client.batch(batch_id))

    def run(self, run_id: str) -> dict[str, Any]:
        """As `Client.run`."""
        return self._background.run(self._client.run(run_id))

    def missing(self, batch_id: str) -> list[tuple[int, int]]:
        """As `Client.missing`."""
        return self._background.run(self._client.missing(batch_id))

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """As `Client.cancel`."""
        return self._background.run(self._client.cancel(batch_id))

    def redrive(self, batch_id: str, indexes: Sequence[int] | None = None) -> int:
        """As `Client.redrive`."""
        return self._background.run(self._client.redrive(batch_id, indexes))


def _line(index: int, task: str, payload: bytes, options: Mapping[str, Any]) -> bytes:
    if not options:
        return b'{"index":%d,"task":%s,"payload":%s}\n' % (index, _encode(task), payload)
    return b'{"index":%d,"task":%s,"payload":%s,"options":%s}\n' % (index, _encode(task), payload, _encode(options))


async def _numbered(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[tuple[int, Any]]:
    index = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield index, item
            index += 1
        return
    for item in items:
        yield index, item
        index += 1


def _without(end: int, holes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The ranges from 0 to `end` that are in no hole."""
    start = 0
    for first, last in holes:
        if first > start:
            yield start, first
        start = last + 1
    if end > start:
        yield start, end

"""Client for programs without tasks of their own: sends items to a server and reads results.

Rule 1: items are read from their source while they are sent, in portions. A portion is kept until the server has
acknowledged it. After a lost or failed response the server is asked which items are missing, and only those are sent
again.
Rule 2: a batch whose items are all stored is never reported as an error, even if the last response was lost.
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
from headrace.core.serving import STALLED_AFTER_S
from headrace.foundation.errors import HeadraceError, InvalidInput, StoreUnavailable
from headrace.foundation.limits import KIB, MIB
from headrace.foundation.logs import get_logger
from headrace.remote.connection import ATTEMPTS, ServerConnection, ServerResponse, backoff_s
from headrace.runtime.background_loop import BackgroundLoop
from headrace.runtime.clock import Clock
from headrace.runtime.concurrent_map import map_concurrently

T = TypeVar("T")

LOG: Any = get_logger("headrace.client")
OFFLOAD_BYTES: Final = 128 * KIB
UPLOADS: Final = 10
PORTION_BYTES: Final = 4 * MIB
PORTION_ITEMS: Final = 20_000
RANGES: Final = 1_000
_encode: Final = msgspec.json.Encoder().encode
_NDJSON: Final = {"content-type": "application/x-ndjson"}
_JSON: Final = {"content-type": "application/json"}


class SendProgress(NamedTuple):
    """Progress of sending a batch. `accepted`: items stored so far, including those of earlier attempts."""

    batch_id: str
    sent_items: int
    sent_bytes: int
    accepted: int


class SentBatch(msgspec.Struct, frozen=True):
    """A batch whose items are all stored, and which is sealed."""

    id: str
    count: int


class ResultLine(msgspec.Struct, frozen=True):
    """Result of one run: `output` if `ok`, else `error`."""

    index: int
    id: str
    state: str
    ok: bool
    output: Any
    error: dict[str, Any] | None


class Client:
    """Client of one server with one API key. `attempts`: how often a failing request is sent in all.

    May be used with or without `async with`. `sync` is the same client for code that is not async.
    """

    def __init__(
        self, url: str, key: str | None = None, *, attempts: int = ATTEMPTS, clock: Clock | None = None
    ) -> None:
        self.connection = ServerConnection(url, key, clock=clock, attempts=attempts)
        self._stalled: set[tuple[str, str, str, str]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def sync(self) -> SyncClient:
        """The same client for code that is not async. Close it after use."""
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
        on_progress: Callable[[SendProgress], None] | None = None,
    ) -> SentBatch:
        """Store one run of `task` for each item; the batch is durable and sealed when this returns.

        Items are streamed, the whole input is never in memory. `options` are those of an item in the HTTP API (`queue`,
        `priority`, `delay`, …), for all of them. With a `batch_key` the call can be repeated from the beginning of the
        same items: it finds the batch of that key and adds what is missing. Raises the server's error when a retry
        can't help.
        """
        # a key of its own, so that a create whose response was lost can be repeated
        key = batch_key or f"send:{token_hex(16)}"
        body = _encode({"key": key, "task": task, "metadata": dict(metadata or {})})
        created = await self.connection.ask("POST", "/v1/batches", body, _JSON)
        batch = created.json
        sender = _BatchSender(self.connection, batch["id"], on_progress)
        if batch["state"] in ("sealed", "completed"):
            return SentBatch(batch["id"], batch["expected"])
        if batch["received"]:
            await sender.load_stored()
        item_options = {name: value for name, value in (options or {}).items() if value is not None}
        async with aclosing(self._lines(task, items, item_options)) as lines:
            async for index, line in lines:
                await sender.add(index, line)
        await sender.flush()
        return await self._seal(batch["id"], sender.next_index)

    async def _seal(self, batch_id: str, count: int) -> SentBatch:
        try:
            await self.connection.ask("POST", f"/v1/batches/{batch_id}/seal", _encode({"run_count": count}), _JSON)
        except HeadraceError:
            batch = await self.batch(batch_id)  # rule 2: it may be sealed although the response was lost
            if batch["state"] not in ("sealed", "completed") or batch["expected"] != count:
                raise
        return SentBatch(batch_id, count)

    async def _lines(
        self, task: str, items: Iterable[Any] | AsyncIterable[Any], options: dict[str, Any]
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Encode items as lines, in order. Large payloads are uploaded first, several at a time."""

        def step(numbered: tuple[int, Any]) -> tuple[int, bytes] | Coroutine[Any, Any, tuple[int, bytes]]:
            index, item = numbered
            try:
                payload = _encode(item)
            except (TypeError, ValueError, UnicodeEncodeError, RecursionError) as error:
                raise InvalidInput(f"item {index} can't be encoded as JSON: {error}") from None
            if len(payload) >= OFFLOAD_BYTES:
                return self._upload(task, index, payload, options)
            return index, _line(index, task, payload, options)

        async with aclosing(map_concurrently(_numbered(items), step, concurrency=UPLOADS)) as steps:
            async for line in steps:
                yield line

    async def _upload(self, task: str, index: int, payload: bytes, options: dict[str, Any]) -> tuple[int, bytes]:
        path = f"headrace/{token_hex(12)}/payload.json"
        upload = (await self.connection.ask("PUT", f"/api/v2/packets/{quote(path, safe='')}", b"")).json
        await self.connection.ask("PUT", upload["presignedUrl"], payload, _JSON)
        item_options = {**options, "payloadType": "application/store"}
        return index, _line(index, task, _encode(upload["storagePath"]), item_options)

    async def enqueue(self, task: str, payload: Any = None, **options: Any) -> str:
        """Enqueue one run and return its id; with `idempotencyKey` possibly the id of an earlier run."""
        item_options = {name: value for name, value in options.items() if value is not None}
        body = _encode({"payload": payload, "options": item_options or None})
        response = await self.connection.ask("POST", f"/v1/tasks/{quote(task, safe='')}/runs", body, _JSON)
        return str(response.json["id"])

    # -- reading

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch and the number of its runs in each state."""
        fields: dict[str, Any] = (await self.connection.ask("GET", f"/v1/batches/{quote(batch_id, safe='')}")).json
        return fields

    async def run(self, run_id: str) -> dict[str, Any]:
        """Return a run."""
        fields: dict[str, Any] = (await self.connection.ask("GET", f"/api/v3/runs/{quote(run_id, safe='')}")).json
        return fields

    async def results(self, batch_id: str, *, from_index: int = 0) -> AsyncIterator[ResultLine]:
        """Yield results in index order while the batch runs. Resumes where it was after a lost connection."""
        next_index, tries = from_index, 0
        while True:
            try:
                async for line in self._lines_of(batch_id, next_index):
                    next_index, tries = line.index + 1, 0
                    yield line
                if await self._is_complete(batch_id, next_index):
                    return
            except StoreUnavailable:
                tries += 1
                if tries >= self.connection.attempts:
                    raise
                await self.connection.clock.sleep(backoff_s(tries))

    async def _is_complete(self, batch_id: str, next_index: int) -> bool:
        """True if the batch has ended and everything was read. A stopping server also ends the stream."""
        batch = await self.batch(batch_id)
        return bool(batch["is_finished"]) and next_index >= batch["received"]

    async def _lines_of(self, batch_id: str, from_index: int) -> AsyncIterator[ResultLine]:
        path = f"/v1/batches/{quote(batch_id, safe='')}/results?from={from_index}"
        async with self.connection.stream("GET", path) as (response, pieces):
            if not response.is_success:
                body = b"".join([piece async for piece in pieces])
                raise response._replace(body=body).error()
            rest = b""
            last_us = self.connection.clock.now_us()
            async for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                now_us = self.connection.clock.now_us()
                if any(lines):
                    last_us = now_us
                elif now_us - last_us >= STALLED_AFTER_S * 1_000_000:  # blank lines keep the connection alive
                    last_us = now_us
                    await self._report_stalled(batch_id)
                for line in lines:
                    if line:
                        status = msgspec.json.decode(line)
                        yield ResultLine(
                            status["index"],
                            status["id"],
                            status["state"],
                            status["ok"],
                            status.get("output"),
                            status.get("error"),
                        )

    async def _report_stalled(self, batch_id: str) -> None:
        """Log the queues and tasks of a batch that no live worker takes, once each."""
        for lane in (await self.batch(batch_id)).get("stalled", ()):
            name = (batch_id, lane["queue"], lane["task"], lane["reason"])
            if name not in self._stalled:
                self._stalled.add(name)
                LOG.warning("wait.stalled", batch=batch_id, waited_s=STALLED_AFTER_S, **lane)

    async def missing(self, batch_id: str) -> list[tuple[int, int]]:
        """Return the index ranges that are not stored yet, as first and last index."""
        response = await self.connection.ask("GET", f"/v1/batches/{quote(batch_id, safe='')}/missing")
        return [(first, last) for first, last in response.json["ranges"]]

    # -- operations on a batch

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        """Cancel a batch: no further runs start."""
        fields: dict[str, Any] = (await self._post(batch_id, "cancel")).json
        return fields

    async def redrive(self, batch_id: str, indexes: Sequence[int] | None = None) -> int:
        """Run failed runs again, or the runs at given indexes. Returns their number."""
        body = _encode({"indexes": None if indexes is None else list(indexes)})
        return int((await self._post(batch_id, "redrive", body)).json["redriven"])

    async def _post(self, batch_id: str, action: str, body: bytes = b"{}") -> ServerResponse:
        return await self.connection.ask("POST", f"/v1/batches/{quote(batch_id, safe='')}/{action}", body, _JSON)


class _BatchSender:
    """Sends the items of one batch in portions."""

    def __init__(
        self, connection: ServerConnection, batch_id: str, on_progress: Callable[[SendProgress], None] | None
    ) -> None:
        self._connection = connection
        self._path = f"/v1/batches/{batch_id}"
        self._batch_id = batch_id
        self._on_progress = on_progress
        self._portion: list[tuple[int, bytes]] = []
        self._held_bytes = 0
        self._stored = IndexSet()
        self._accepted = self._sent_items = self._sent_bytes = 0
        self.next_index = 0

    async def load_stored(self) -> None:
        """Learn which items an earlier call has stored."""
        response = await self._connection.ask("GET", f"{self._path}/missing?ranges={RANGES}")
        status = response.json
        gaps = sum(last - first + 1 for first, last in status["ranges"])
        self._accepted = status["received"]
        if not status["more"]:  # otherwise all are sent again, and stored items are recognised by the server
            self._stored = IndexSet.from_ranges(_ranges_without(status["received"] + gaps, status["ranges"]))

    async def add(self, index: int, line: bytes) -> None:
        """Add a line, and send a portion when it is full."""
        self.next_index = index + 1
        if index in self._stored:
            return
        self._portion.append((index, line))
        self._held_bytes += len(line)
        if self._held_bytes >= PORTION_BYTES or len(self._portion) >= PORTION_ITEMS:
            await self.flush()

    async def flush(self) -> None:
        """Send the lines held until they are stored. Raises the server's error when a retry can't help."""
        portion, self._portion, self._held_bytes = self._portion, [], 0
        tries = 0
        while portion:
            tries += 1
            wait_s: float | None = None
            failure: HeadraceError | None = None
            try:
                response = await self._connection.send_once(
                    "POST", f"{self._path}/items", b"".join(line for _, line in portion), _NDJSON, timeout_s=None
                )
                if response.is_success:
                    self._count_stored(portion, response.json["received"])
                    return
                failure = response.error()
                if not response.is_retryable:
                    raise failure
                wait_s = response.wait_s(self._connection.clock.now_us())
            except StoreUnavailable as error:
                failure = error
            if tries >= self._connection.attempts:
                portion = await self._not_stored(portion)
                if not portion:
                    return
                raise failure
            await self._connection.clock.sleep(backoff_s(tries) if wait_s is None else wait_s)
            portion = await self._not_stored(portion)

    async def _not_stored(self, portion: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Return the lines of a portion that are not stored yet; all if the server does not answer."""
        try:
            response = await self._connection.ask("GET", f"{self._path}/missing?ranges={RANGES}", attempts=1)
        except HeadraceError:
            return portion
        status = response.json
        if status["more"]:
            return portion
        missing = IndexSet.from_ranges((first, last + 1) for first, last in status["ranges"])
        end = status["received"] + sum(last - first + 1 for first, last in status["ranges"])
        missing_lines = [(index, line) for index, line in portion if index >= end or index in missing]
        if not missing_lines:
            self._count_stored(portion, status["received"])
        return missing_lines

    def _count_stored(self, portion: list[tuple[int, bytes]], received: int) -> None:
        self._sent_items += len(portion)
        self._sent_bytes += sum(len(line) for _, line in portion)
        self._accepted = received
        if self._on_progress is not None:
            self._on_progress(SendProgress(self._batch_id, self._sent_items, self._sent_bytes, self._accepted))


class SyncClient:
    """Client for code that is not async. One background thread with an event loop performs all calls."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._background = BackgroundLoop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread."""
        self._background.stop()

    def send(self, task: str, items: Iterable[Any], **more: Any) -> SentBatch:
        """Like `Client.send`."""
        return self._background.run(self._client.send(task, items, **more))

    def enqueue(self, task: str, payload: Any = None, **options: Any) -> str:
        """Like `Client.enqueue`."""
        return self._background.run(self._client.enqueue(task, payload, **options))

    def results(self, batch_id: str, *, from_index: int = 0) -> Iterator[ResultLine]:
        """Like `Client.results`."""
        lines = self._client.results(batch_id, from_index=from_index)
        while True:
            try:
                line = self._background.run(anext(lines))
            except StopAsyncIteration:
                return
            yield line

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Like `Client.batch`."""
        return self._background.run(self._client.batch(batch_id))

    def run(self, run_id: str) -> dict[str, Any]:
        """Like `Client.run`."""
        return self._background.run(self._client.run(run_id))

    def missing(self, batch_id: str) -> list[tuple[int, int]]:
        """Like `Client.missing`."""
        return self._background.run(self._client.missing(batch_id))

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Like `Client.cancel`."""
        return self._background.run(self._client.cancel(batch_id))

    def redrive(self, batch_id: str, indexes: Sequence[int] | None = None) -> int:
        """Like `Client.redrive`."""
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


def _ranges_without(end: int, gaps: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield the ranges from 0 to `end` that are not in `gaps`."""
    start = 0
    for first, last in gaps:
        if first > start:
            yield start, first
        start = last + 1
    if end > start:
        yield start, end

"""The producer of a process: it makes calls durable as runs. Single enqueues share commits, maps stream.

The single enqueues of a process belong to one open-ended batch (kind `stream`) of its session. Recovering the session
seals that batch at what was received. Enqueues that arrive while a commit is in flight share the next one (natural
batching).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from operator import attrgetter
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.batch import CANCELLED, COMPLETED, SEALED, SINGLE, STREAM
from headrace.core.block import Chunk, Coalescer, Extra
from headrace.core.failure import Failure
from headrace.core.ndjson import RAW_BYTES
from headrace.core.pack import JSON, REFERENCE, TEXT
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, HeadraceError, InvalidInput, SessionEnded, StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from headrace.runtime.producing.batch_appender import BatchAppender, append_chunks
from headrace.runtime.producing.caller_items import CallerItems, items_count, take_group
from headrace.runtime.sessions.session import StoreSession
from headrace.runtime.tasks.bounds import check_name
from headrace.runtime.tasks.call_options import Options, extra_of, key_of, with_trace
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.store.protocol import NewBatch

_RUN_INDEX: Final = attrgetter("run_index")
STREAMS_TRIED: Final = 5
STREAM_RUNS_MAX: Final = 1_000_000
"""After this many single enqueues a producer starts a new stream, so that old streams complete and can be pruned."""


class _Enqueue(NamedTuple):
    run_index: int
    payload: bytes
    kind: int
    key: Key
    extra: Extra | None
    answer: asyncio.Future[tuple[str, int, bool]]


class Producer:
    """Appends runs for one process. Owned by one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._session: StoreSession | None = None
        self._stream_id = ""
        self._next_index = 0
        self._starting = asyncio.Lock()
        self._flusher: Flusher[_Enqueue] | None = None

    async def enqueue(self, spec: TaskSpec, payload: bytes, options: Options) -> tuple[str, int]:
        """Make one run durable; return `(batch_id, index)`, of an existing run if its idempotency key names one."""
        batch_id, index, _ = await self.enqueue_new(spec, payload, options)
        return batch_id, index

    async def enqueue_new(self, spec: TaskSpec, payload: bytes, options: Options) -> tuple[str, int, bool]:
        """Like `enqueue`, and return also whether the run is new."""
        self._check_size(spec, payload)
        now_us = self.engine.clock.now_us()
        extra = extra_of(with_trace(options), self.engine.limits, now_us)
        return await self.put_new(key_of(spec, options, now_us), payload, JSON, extra)

    async def put(self, key: Key, payload: bytes, kind: int, extra: Extra | None) -> tuple[str, int]:
        """Make a run durable whose key and extras are known; return `(batch_id, index)`. A large payload is offloaded
        first.
        """
        batch_id, index, _ = await self.put_new(key, payload, kind, extra)
        return batch_id, index

    async def put_new(self, key: Key, payload: bytes, kind: int, extra: Extra | None) -> tuple[str, int, bool]:
        """Like `put`, and return also whether the run is new."""
        for _ in range(STREAMS_TRIED):
            async with self._starting:
                flusher = await self._ensure_stream()
                stream_id, index = self._stream_id, self._next_index
                self._next_index += 1
            settled, stored_kind, stored_extra = await self._settled_payload(stream_id, payload, kind, extra)
            answer: asyncio.Future[tuple[str, int, bool]] = asyncio.get_running_loop().create_future()
            try:
                await flusher.put(_Enqueue(index, settled, stored_kind, key, stored_extra, answer))
                return await answer
            except (FlusherClosed, Conflict):  # the stream ended before it contained this run: use the next stream
                await self._leave_stream(stream_id)
        raise StoreUnavailable(
            "enqueue failed: every stream ended before it contained the run",
            hint="check whether batches of kind stream are being cancelled",
        )

    async def put_all(self, runs: Sequence[tuple[Key, bytes, int, Extra | None]]) -> list[bool]:
        """Make many runs durable, in their order; return for each whether it is new."""
        return [is_new for _, _, is_new in await asyncio.gather(*(self.put_new(*run) for run in runs))]

    async def _leave_stream(self, stream_id: str) -> None:
        """Leave a stream that was ended by another process, and the session too if it was taken for lapsed."""
        async with self._starting:
            if self._stream_id != stream_id or self._session is None:
                return
            self._stream_id = ""
            try:
                await self.engine.store.heartbeat(self._session.session_id, now_us=self.engine.clock.now_us())
            except SessionEnded:
                self._session_lost()

    async def _ensure_stream(self) -> Flusher[_Enqueue]:
        is_ours = self._stream_id and self._session is not None and self._session.session_id
        if self._flusher is not None and is_ours and self._next_index < STREAM_RUNS_MAX:
            return self._flusher
        await self._end_stream()
        self._stream_id, self._next_index = await self._create_owned(kind=STREAM), 0
        self._flusher = Flusher(
            partial(self._append_enqueues, self._stream_id),
            name="enqueues",
            clock=self.engine.clock,
            on_refused=_refuse,
            size=self.engine.limits.flush_size,
            outage=self.engine.outage,
        )
        return self._flusher

    async def _append_enqueues(self, stream_id: str, enqueues: Sequence[_Enqueue]) -> None:
        """Append single runs in one transaction, and answer each of them after its commit."""
        limits = self.engine.limits
        coalescer = Coalescer(runs_max=limits.chunk_runs_max, bytes_max=limits.chunk_bytes_max)
        for enqueue in sorted(enqueues, key=_RUN_INDEX):
            coalescer.add(enqueue.run_index, enqueue.payload, enqueue.key, kind=enqueue.kind, extra=enqueue.extra)
        appended = await append_chunks(self.engine, stream_id, coalescer.flush())
        for enqueue in enqueues:
            if not enqueue.answer.done():
                existing = appended.existing.get(enqueue.run_index)
                enqueue.answer.set_result((*existing, False) if existing else (stream_id, enqueue.run_index, True))

    async def _create_owned(self, **more: Any) -> str:
        """Create a batch that is sealed when this process's session ends; return its id."""
        if self._session is None:
            session = StoreSession(self.engine, kind="producer")
            session.on_ended = self._session_lost
            await session.start()
            self._session = session
        clock = self.engine.clock
        while True:
            if not self._session.session_id:
                await self._session.restart()
            new = NewBatch(
                id=new_batch_id(clock.now_us()),
                environment=self.engine.environment,
                session_id=self._session.session_id,
                **more,
            )
            try:
                await self.engine.store.create_batch(new, now_us=clock.now_us())
            except SessionEnded:
                self._session_lost()
            else:
                return new.id

    def _session_lost(self) -> None:
        """Start a new stream at the next enqueue: another process ended this session and sealed its stream."""
        self._stream_id = ""
        if self._session is not None:
            self._session.session_id = ""

    async def _end_stream(self, *, deadline_s: float | None = None) -> None:
        flusher, self._flusher = self._flusher, None
        stream_id, self._stream_id = self._stream_id, ""
        if flusher is not None:
            try:
                await flusher.close(deadline_s=deadline_s)
            except UpdatesUnflushed as error:
                for enqueue in flusher.unflushed:
                    _refuse(enqueue, StoreUnavailable("the app was closed before the store accepted this run"))
                raise error from None
        if stream_id:
            with suppress(Conflict):  # it was cancelled before
                await self.engine.store.seal(stream_id, None, now_us=self.engine.clock.now_us())

    async def build_single(self, spec: TaskSpec, payload: bytes, options: Options) -> tuple[NewBatch, Chunk]:
        """Build one run as a batch of its own, for the caller's transaction. A large payload is written as an object
        first.

        If the transaction never commits, the object is removed as an orphan.
        """
        self._check_size(spec, payload)
        batch_id = new_batch_id(self.engine.clock.now_us())
        now_us = self.engine.clock.now_us()
        key, extra = key_of(spec, options, now_us), extra_of(with_trace(options), self.engine.limits, now_us)
        settled, kind, extra = await self._settled_payload(batch_id, payload, JSON, extra)
        coalescer = Coalescer(runs_max=1, bytes_max=self.engine.limits.chunk_bytes_max)
        coalescer.add(0, settled, key, kind=kind, extra=extra)
        (chunk,) = coalescer.flush()
        new = NewBatch(id=batch_id, environment=self.engine.environment, kind=SINGLE, task=spec.name, expected_count=1)
        return new, chunk

    async def map(
        self,
        spec: TaskSpec,
        items: Iterable[Any] | AsyncIterable[Any] | CallerItems,
        options: Options,
        *,
        key: str | None,
        metadata: dict[str, object],
    ) -> str:
        """Stream items into a batch and seal it; return the batch's id."""
        if key is not None:
            check_name("key", key)
        if options.idempotency_key:
            raise InvalidInput("an idempotency key names one run, not a batch", hint="pass batch_key=… to map instead")
        clock, limits = self.engine.clock, self.engine.limits
        now_us = clock.now_us()
        span_key, shared = key_of(spec, options, now_us), extra_of(options, limits, now_us)
        batch_id, sealed_count = await self._create_mapped(spec.name, key, metadata)
        appender = BatchAppender(self.engine, batch_id, waits_max=None)
        codec = spec.codec
        plain_bytes_max = min(limits.inline_bytes_max - 1, limits.item_bytes_max)

        def step(group: list[Any]) -> _Encoded | Awaitable[_Encoded]:
            payloads = codec.encode_values(group)
            if payloads is None or shared is not None or max(map(len, payloads)) > plain_bytes_max:
                return self._encode_each(spec, batch_id, group, shared)
            return _Encoded(payloads, None)

        index = 0
        try:
            async with aclosing(
                map_concurrently(_grouped(items), step, concurrency=limits.ingest_concurrency)
            ) as steps:
                async for encoded in steps:
                    if sealed_count is not None:
                        _check_count(key, sealed_count, index + len(encoded.payloads), items)
                    _add_encoded(appender, index, encoded, span_key)
                    index += len(encoded.payloads)
                    await appender.push(index, None)
            await appender.finish()
        except BaseException:
            with suppress(HeadraceError):  # the first error is raised; the items read before it become durable too
                await appender.finish()
            if key is None:  # without a key no caller can resume it
                await self.engine.stop_batch(batch_id, CANCELLED)
            raise
        finally:
            await appender.stop()
        if sealed_count is not None and index < sealed_count:
            raise _other_count(key, sealed_count, f"{index:,}")
        await self.engine.store.seal(batch_id, index, now_us=clock.now_us())
        self.engine.recorded.notify({batch_id: ()})
        return batch_id

    async def _create_mapped(self, task: str, key: str | None, metadata: dict[str, object]) -> tuple[str, int | None]:
        """Create the batch of a map: one that its key finds again, or one that ends with this session.

        Return its id, and the count of its runs if an earlier call has sealed it. Raises `Conflict` if the key names a
        batch of another task.
        """
        if key is None:
            async with self._starting:
                return await self._create_owned(task=task, metadata=metadata), None
        now_us = self.engine.clock.now_us()
        new = NewBatch(
            id=new_batch_id(now_us), environment=self.engine.environment, key=key, task=task, metadata=metadata
        )
        batch, _ = await self.engine.store.create_batch(new, now_us=now_us)
        if batch.task and batch.task != task:
            raise Conflict(
                f"batch_key {key!r} names a batch of the task {batch.task!r}, got the task {task!r}",
                hint="give the map of each task a batch_key of its own",
                batch_id=batch.id,
            )
        return batch.id, batch.expected_count if batch.state in (SEALED, COMPLETED) else None

    async def _encode_each(self, spec: TaskSpec, batch_id: str, group: list[Any], shared: Extra | None) -> _Encoded:
        """Encode the items of a group one by one: some don't fit, are large, or have options."""
        payloads: list[bytes] = []
        extras: list[tuple[int, Extra | None]] = []
        for item in group:
            payload, kind, extra = b"", JSON, shared
            try:
                payload = spec.codec.encode_value(item)
                self._check_size(spec, payload)
            except InvalidInput as error:
                is_large = len(payload) > self.engine.limits.item_bytes_max
                failure = Failure(type="PAYLOAD_TOO_LARGE" if is_large else "InvalidPayload", message=error.message)
                payload, kind = _raw_text(item), TEXT
                extra = Extra(failure=failure.encode())
            else:
                payload, kind, extra = await self._settled_payload(batch_id, payload, JSON, shared)
            payloads.append(payload)
            extras.append((kind, extra))
        return _Encoded(payloads, extras)

    async def close(self) -> None:
        """Write the pending runs, seal the stream and end the session. Raises `UpdatesUnflushed` if the store does not
        accept them.
        """
        grace_s = self.engine.limits.shutdown_grace_s
        async with self._starting:
            session, self._session = self._session, None
            if session is not None:
                try:
                    await self._end_stream(deadline_s=grace_s)
                finally:
                    await session.stop(deadline_s=grace_s)

    def abandon(self) -> None:
        """Leave the stream to recovery: this producer's event loop has ended."""
        if self._session is not None:
            self._session.abandon()

    # -- one run

    def _check_size(self, spec: TaskSpec, payload: bytes) -> None:
        """Raise `InvalidInput` for a payload over `item_bytes_max`."""
        if len(payload) > self.engine.limits.item_bytes_max:
            raise InvalidInput(
                f"the arguments of task {spec.name} are too large: "
                f"expected at most {self.engine.limits.item_bytes_max:,} bytes (item_bytes_max), got {len(payload):,}",
                hint="raise item_bytes_max for every process, or store the data elsewhere and pass its address",
            )

    async def _settled_payload(
        self, batch_id: str, payload: bytes, kind: int, extra: Extra | None
    ) -> tuple[bytes, int, Extra | None]:
        """Return the payload as its row holds it: inline, or a reference once the object is durable."""
        if len(payload) < self.engine.limits.inline_bytes_max:
            return payload, kind, extra
        reference, object_key = await self.engine.offloaded(batch_id, payload, kind)
        named = msgspec.structs.replace(extra or Extra(), object_key=object_key, object_bytes=len(payload))
        return reference, REFERENCE, named


def _refuse(enqueue: _Enqueue, error: HeadraceError) -> None:
    if not enqueue.answer.done():
        enqueue.answer.set_exception(error)


def _check_count(key: str | None, sealed_count: int, count: int, items: object) -> None:
    """Raise `Conflict` if a repeated map has more items than its sealed batch."""
    if count > sealed_count:
        total_count = items_count(items)
        raise _other_count(key, sealed_count, "more" if total_count is None else f"{total_count:,}")


def _other_count(key: str | None, sealed_count: int, count: str) -> Conflict:
    return Conflict(
        f"batch_key {key!r} names a batch of {sealed_count:,} items, got {count}",
        hint="repeat the call with the same items, or use another batch_key",
    )


class _Encoded(NamedTuple):
    """A group of items as payloads; `extras` has `(kind, extra)` for each, or is None for plain JSON."""

    payloads: list[bytes]
    extras: list[tuple[int, Extra | None]] | None


def _grouped(items: Iterable[Any] | AsyncIterable[Any] | CallerItems) -> AsyncIterator[list[Any]]:
    if isinstance(items, CallerItems):
        return items.groups()
    return _groups_of_async(items) if isinstance(items, AsyncIterable) else _groups_of(items)


async def _groups_of_async(items: AsyncIterable[Any]) -> AsyncIterator[list[Any]]:
    async for item in items:
        yield [item]


async def _groups_of(items: Iterable[Any]) -> AsyncIterator[list[Any]]:
    iterator = iter(items)
    while group := take_group(iterator):
        yield group
        await asyncio.sleep(0)


def _add_encoded(appender: BatchAppender, first_index: int, encoded: _Encoded, key: Key) -> None:
    if encoded.extras is None:
        appender.coalescer.extend(first_index, encoded.payloads, key)
        return
    indexed = enumerate(zip(encoded.payloads, encoded.extras, strict=True), first_index)
    for index, (payload, (kind, extra)) in indexed:
        appender.coalescer.add(index, payload, key, kind=kind, extra=extra)


def _raw_text(item: Any) -> bytes:
    """Return the beginning of an item that is not valid, to be shown with the failed run: as JSON where it can be."""
    try:
        text = msgspec.json.encode(item)
    except Exception:  # noqa: BLE001 - a value's own code may raise anything
        try:
            text = repr(item).encode("utf-8", "backslashreplace")
        except Exception:  # noqa: BLE001 - as above
            text = type(item).__name__.encode()
    return text[:RAW_BYTES]

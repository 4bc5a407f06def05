"""How calls become durable runs: single enqueues share commits, maps stream.

Single enqueues of a process belong to one open-ended batch (kind `stream`) of its session; recovering the session
seals it at what was received. What is enqueued while a commit is in flight shares the next (natural batching).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from operator import attrgetter
from time import perf_counter
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.batch import CANCELLED, SINGLE, STREAM
from headrace.core.block import Chunk, Coalescer, Extra
from headrace.core.failure import Failure
from headrace.core.pack import JSON, REFERENCE
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, HeadraceError, InvalidInput, SessionEnded, StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.engine import Engine
from headrace.runtime.flusher import Flusher, FlusherClosed, UpdatesUnflushed
from headrace.runtime.producing.batch_appender import BatchAppender, append_chunks
from headrace.runtime.sessions.session import StoreSession
from headrace.runtime.tasks.bounds import check_name
from headrace.runtime.tasks.call_options import Options, extra_of, key_of, with_trace
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.store.protocol import NewBatch

_RUN_INDEX: Final = attrgetter("run_index")
GROUP_ITEMS: Final = 256
GROUP_S: Final = 0.001
STREAMS_TRIED: Final = 5
STREAM_RUNS_MAX: Final = 1_000_000
"""After this many single enqueues a producer goes on in a new stream, so that old ones end and can be pruned."""


class _Enqueue(NamedTuple):
    run_index: int
    payload: bytes
    kind: int
    key: Key
    extra: Extra | None
    answer: asyncio.Future[tuple[str, int, bool]]


class Producer:
    """Appends for one process. Owned by one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._broker: StoreSession | None = None
        self._stream_id = ""
        self._next_index = 0
        self._starting = asyncio.Lock()
        self._flusher: Flusher[_Enqueue] | None = None

    async def enqueue(self, spec: TaskSpec, payload: bytes, options: Options) -> tuple[str, int]:
        """Make one run durable; answers `(batch_id, index)`, of an older run when its idempotency key names one."""
        now_us = self.engine.clock.now_us()
        extra = extra_of(with_trace(options), self.engine.limits, now_us)
        return await self.put(key_of(spec, options, now_us), payload, JSON, extra)

    async def put(self, key: Key, payload: bytes, kind: int, extra: Extra | None) -> tuple[str, int]:
        """The same for a run that is ready to be stored, but for its payload's size."""
        batch_id, index, _ = await self.put_new(key, payload, kind, extra)
        return batch_id, index

    async def put_new(self, key: Key, payload: bytes, kind: int, extra: Extra | None) -> tuple[str, int, bool]:
        """The same, and whether the run is a new one."""
        for _ in range(STREAMS_TRIED):
            async with self._starting:
                flusher = await self._ensure_stream()
                stream_id, index = self._stream_id, self._next_index
                self._next_index += 1
            settled, kind_there, extra_there = await self._settled_payload(stream_id, payload, kind, extra)
            answer: asyncio.Future[tuple[str, int, bool]] = asyncio.get_running_loop().create_future()
            try:
                await flusher.put(_Enqueue(index, settled, kind_there, key, extra_there, answer))
                return await answer
            except (FlusherClosed, Conflict):  # the stream ended before this run was in it: into the next
                await self._leave_stream(stream_id)
        raise StoreUnavailable("streams end faster than they begin", hint="are batches being cancelled?")

    async def put_all(self, runs: Sequence[tuple[Key, bytes, int, Extra | None]]) -> list[bool]:
        """Many runs at once, in their order; answers of each whether it is new."""
        return [is_new for _, _, is_new in await asyncio.gather(*(self.put_new(*run) for run in runs))]

    async def _leave_stream(self, stream_id: str) -> None:
        """Somebody ended the stream: this process's session with it, when it was taken for dead."""
        async with self._starting:
            if self._stream_id != stream_id or self._broker is None:
                return
            self._stream_id = ""
            try:
                await self.engine.store.heartbeat(self._broker.session_id, now_us=self.engine.clock.now_us())
            except SessionEnded:
                self._session_lost()

    async def _ensure_stream(self) -> Flusher[_Enqueue]:
        is_ours = self._stream_id and self._broker is not None and self._broker.session_id
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
        """A batch that ends with this process's session, whatever happens to the process; answers its id."""
        if self._broker is None:
            broker = StoreSession(self.engine, kind="producer")
            broker.on_ended = self._session_lost
            await broker.start()
            self._broker = broker
        clock = self.engine.clock
        while True:
            if not self._broker.session_id:
                await self._broker.restart()
            new = NewBatch(
                id=new_batch_id(clock.now_us()),
                environment=self.engine.environment,
                session_id=self._broker.session_id,
                **more,
            )
            try:
                await self.engine.store.create_batch(new, now_us=clock.now_us())
            except SessionEnded:
                self._session_lost()
            else:
                return new.id

    def _session_lost(self) -> None:
        """Others took this process for dead and sealed its stream; the next enqueue begins a new one."""
        self._stream_id = ""
        if self._broker is not None:
            self._broker.session_id = ""

    async def _end_stream(self, *, deadline_s: float | None = None) -> None:
        flusher, self._flusher = self._flusher, None
        stream_id, self._stream_id = self._stream_id, ""
        if flusher is not None:
            try:
                await flusher.close(deadline_s=deadline_s)
            except UpdatesUnflushed as error:
                for enqueue in flusher.unflushed:
                    _refuse(enqueue, StoreUnavailable("the app closed before the store took this run"))
                raise error from None
        if stream_id:
            with suppress(Conflict):  # it was cancelled meanwhile
                await self.engine.store.seal(stream_id, None, now_us=self.engine.clock.now_us())

    async def alone(self, spec: TaskSpec, payload: bytes, options: Options) -> tuple[NewBatch, Chunk]:
        """One run as a batch of its own, for somebody else's transaction; a large payload is put into an object first.

        An object whose transaction never commits is removed as an orphan.
        """
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
        items: Iterable[Any] | AsyncIterable[Any],
        options: Options,
        *,
        key: str | None,
        metadata: dict[str, object],
    ) -> str:
        """Stream items into a batch and seal it; answers the batch's id."""
        if key is not None:
            check_name("key", key)
        if options.idempotency_key:
            raise InvalidInput(
                "an idempotency key names one run, not a batch", hint="write map(…, batch_key=…) instead"
            )
        clock, limits = self.engine.clock, self.engine.limits
        now_us = clock.now_us()
        span_key, shared = key_of(spec, options, now_us), extra_of(options, limits, now_us)
        batch_id = await self._create_mapped(spec.name, key, metadata)
        appender = BatchAppender(self.engine, batch_id, waits_max=None)
        codec = spec.codec

        def step(group: list[Any]) -> _Encoded | Awaitable[_Encoded]:
            payloads = codec.encode_values(group)
            if payloads is None or shared is not None or max(map(len, payloads)) >= limits.inline_bytes_max:
                return self._encode_each(spec, batch_id, group, shared)
            return _Encoded(payloads, None)

        index = 0
        try:
            async with aclosing(
                map_concurrently(_grouped(items), step, concurrency=limits.ingest_concurrency)
            ) as steps:
                async for encoded in steps:
                    _add_encoded(appender, index, encoded, span_key)
                    index += len(encoded.payloads)
                    await appender.push(index, None)
            await appender.finish()
        except BaseException:
            with suppress(HeadraceError):  # the first error is raised; what was read becomes durable all the same
                await appender.finish()
            if key is None:  # nobody could ever go on with it
                await self.engine.store.stop_batch(batch_id, CANCELLED, now_us=clock.now_us())
            raise
        finally:
            await appender.stop()
        await self.engine.store.seal(batch_id, index, now_us=clock.now_us())
        self.engine.recorded.notify()
        return batch_id

    async def _create_mapped(self, task: str, key: str | None, metadata: dict[str, object]) -> str:
        """The batch of a map: one that its key finds again, or one that nobody else could go on with."""
        if key is None:
            async with self._starting:
                return await self._create_owned(task=task, metadata=metadata)
        now_us = self.engine.clock.now_us()
        new = NewBatch(
            id=new_batch_id(now_us), environment=self.engine.environment, key=key, task=task, metadata=metadata
        )
        batch, _ = await self.engine.store.create_batch(new, now_us=now_us)
        return batch.id

    async def _encode_each(self, spec: TaskSpec, batch_id: str, group: list[Any], shared: Extra | None) -> _Encoded:
        """The items of a group one by one: some don't fit, are large, or carry options."""
        payloads: list[bytes] = []
        extras: list[tuple[int, Extra | None]] = []
        for item in group:
            payload, failure = _encoded(spec, item)
            kind, extra = JSON, shared
            if failure is not None:
                extra = Extra(failure=failure)
            else:
                payload, kind, extra = await self._settled_payload(batch_id, payload, JSON, shared)
            payloads.append(payload)
            extras.append((kind, extra))
        return _Encoded(payloads, extras)

    async def close(self) -> None:
        """Write what waits, seal the stream, and leave. Raises `UpdatesUnflushed` when the store takes nothing."""
        grace_s = self.engine.limits.shutdown_grace_s
        async with self._starting:
            broker, self._broker = self._broker, None
            if broker is not None:
                try:
                    await self._end_stream(deadline_s=grace_s)
                finally:
                    await broker.stop(deadline_s=grace_s)

    def abandon(self) -> None:
        """The event loop of this producer is gone: let others seal its stream."""
        if self._broker is not None:
            self._broker.abandon()

    # -- one run

    async def _settled_payload(
        self, batch_id: str, payload: bytes, kind: int, extra: Extra | None
    ) -> tuple[bytes, int, Extra | None]:
        """The payload as its row holds it: itself, or a reference once the object is durable."""
        if len(payload) < self.engine.limits.inline_bytes_max:
            return payload, kind, extra
        reference, object_key = await self.engine.offloaded(batch_id, payload, kind)
        named = msgspec.structs.replace(extra or Extra(), object_key=object_key, object_bytes=len(payload))
        return reference, REFERENCE, named


def _refuse(enqueue: _Enqueue, error: HeadraceError) -> None:
    if not enqueue.answer.done():
        enqueue.answer.set_exception(error)


class _Encoded(NamedTuple):
    """A group of items as payloads; `extras` has `(kind, extra)` for each, or is None for plain JSON."""

    payloads: list[bytes]
    extras: list[tuple[int, Extra | None]] | None


def _grouped(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[list[Any]]:
    return _groups_of_async(items) if isinstance(items, AsyncIterable) else _groups_of(items)


async def _groups_of_async(items: AsyncIterable[Any]) -> AsyncIterator[list[Any]]:
    async for item in items:
        yield [item]


async def _groups_of(items: Iterable[Any]) -> AsyncIterator[list[Any]]:
    """Items in groups: as many as come within a millisecond, so that a slow source is not waited for."""
    iterator = iter(items)
    while True:
        until = perf_counter() + GROUP_S
        group: list[Any] = []
        for item in iterator:
            group.append(item)
            if len(group) >= GROUP_ITEMS or perf_counter() > until:
                break
        if not group:
            return
        yield group
        await asyncio.sleep(0)


def _add_encoded(appender: BatchAppender, first_index: int, encoded: _Encoded, key: Key) -> None:
    if encoded.extras is None:
        appender.coalescer.extend(first_index, encoded.payloads, key)
        return
    indexed = enumerate(zip(encoded.payloads, encoded.extras, strict=True), first_index)
    for index, (payload, (kind, extra)) in indexed:
        appender.coalescer.add(index, payload, key, kind=kind, extra=extra)


def _encoded(spec: TaskSpec, item: Any) -> tuple[bytes, bytes | None]:
    try:
        return spec.codec.encode_value(item), None
    except InvalidInput as error:
        return b"{}", Failure(type="InvalidPayload", message=error.message).encode()

"""The batches of one `headrace map`: found again by the same command, extended when its input has grown.

Task, input and --batch-key are the identity of a map. Each `--fresh` begins a new *generation* of that identity. A
generation is a chain of batches: the first one, and one more for each time that the input had grown after its batch was
sealed. Run 0 of a later batch is the item `base_index` of the input, and its input begins at `start`, where the batch
before it ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec

from headrace.core.batch import CANCELLED, BatchRecord
from headrace.foundation.errors import Conflict
from headrace.foundation.ids import new_batch_id
from headrace.runtime.engine import Engine
from headrace.runtime.producing.batch_appender import BEGINNING, InputPosition
from headrace.store.protocol import NewBatch

PAGE_BATCHES: Final = 200


class MapIdentity(NamedTuple):
    """Identity of a map: commands with the same source continue the same map. `key` is empty without --batch-key."""

    task: str
    path: str
    key: str

    @property
    def identity(self) -> str:
        """Return a short stable hash of the identity; the batches' metadata holds it in words."""
        return hashlib.sha256(msgspec.json.encode([self.task, self.path, self.key])).hexdigest()[:24]


@dataclass(slots=True)
class ChainBatch:
    """One batch of a chain."""

    batch: BatchRecord
    base_index: int
    start: InputPosition

    @property
    def position(self) -> InputPosition:
        """Return the position up to which the input is durable."""
        return InputPosition.decode(self.batch.cursor) if self.batch.cursor else self.start


@dataclass(slots=True)
class Chain:
    """Batches of one generation, in the order of the input. `is_new`: this command created it."""

    engine: Engine
    source: MapIdentity
    is_resumable: bool
    generation: int = 1
    parts: list[ChainBatch] = field(default_factory=list)
    is_new: bool = False

    @property
    def last(self) -> ChainBatch:
        """Return the batch that takes the next items."""
        return self.parts[-1]

    @property
    def is_finished(self) -> bool:
        """True if no run of the chain will change any more; the input may still grow."""
        return all(part.batch.is_finished for part in self.parts)

    async def refresh(self) -> None:
        """Read the current state of each batch."""
        for part in self.parts:
            part.batch, _ = await self.engine.store.batch(part.batch.id)

    async def extend(self, start: InputPosition) -> ChainBatch:
        """Return the batch for the input after `start`, created here or by a concurrent command."""
        part = await self._open(len(self.parts) + 1, start)
        self.parts.append(part)
        return part

    async def catch_up(self) -> None:
        """Read what a concurrent command did: seals, and batches that follow."""
        await self.refresh()
        while self.is_resumable:
            batch = await self.engine.store.find_batch(self.engine.environment, self._key(len(self.parts) + 1))
            if batch is None:
                return
            self.parts.append(part_of(batch))

    def _key(self, number: int) -> str:
        base = f"map:{self.source.identity}:{self.generation}"
        return base if number == 1 else f"{base}#{number}"

    async def _open(self, number: int, start: InputPosition) -> ChainBatch:
        now_us = self.engine.clock.now_us()
        metadata: dict[str, object] = {
            "map": self.source.identity,
            "input": self.source.path,
            "batch_key": self.source.key,
            "generation": self.generation,
            "part": number,
            "base_index": start.items_count,
            "start": start.encode().hex(),
        }
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=self.engine.environment,
            key=self._key(number) if self.is_resumable else None,
            task=self.source.task,
            metadata=metadata,
            # A batch that can't be resumed must not stay open for ever; the feed's appends keep it open.
            seal_timeout_ms=0 if self.is_resumable else self.engine.limits.seal_timeout_ms,
        )
        batch, _ = await self.engine.store.create_batch(new, now_us=now_us)
        return part_of(batch)


def part_of(batch: BatchRecord) -> ChainBatch:
    """Return a batch of a chain, from its metadata."""
    metadata: dict[str, Any] = batch.metadata
    return ChainBatch(batch, int(metadata["base_index"]), InputPosition.decode(bytes.fromhex(metadata["start"])))


async def open_chain(
    engine: Engine,
    source: MapIdentity,
    *,
    fresh: bool,
    is_resumable: bool,
    before_new: Callable[[], Awaitable[None]],
) -> Chain:
    """Return the newest generation of this map, or a new one. `fresh` cancels the newest and begins a new one.

    `before_new` is awaited before anything is cancelled or created for a new generation; an error of it leaves all as
    it was.
    """
    chain = Chain(engine, source, is_resumable)
    newest = await _newest(engine, source) if is_resumable else None
    if newest is not None:
        chain.generation = int(str(newest.metadata["generation"]))
        await _load(chain)
        is_whole = len(chain.parts) >= int(str(newest.metadata["part"]))
        if fresh or not is_whole:  # retention deleted the beginning: the rest can't be the whole result
            await before_new()
            for batch in {part.batch.id: part.batch for part in (*chain.parts, part_of(newest))}.values():
                if not batch.is_finished:
                    await engine.stop_batch(batch.id, CANCELLED)
            chain = Chain(engine, source, is_resumable, chain.generation + 1)
    if not chain.parts:
        if newest is None:
            await before_new()
        chain.is_new = True
        await chain.extend(BEGINNING)
    for part in chain.parts:
        if part.batch.is_stopped:
            raise Conflict(
                f"the batch of this map was already {part.batch.state}",
                hint="pass --fresh to start over",
                batch_id=part.batch.id,
            )
    return chain


async def _load(chain: Chain) -> None:
    while True:
        number = len(chain.parts) + 1
        batch = await chain.engine.store.find_batch(chain.engine.environment, chain._key(number))  # noqa: SLF001
        if batch is None:
            return
        chain.parts.append(part_of(batch))


async def _newest(engine: Engine, source: MapIdentity) -> BatchRecord | None:
    """Return the newest batch of this identity. Batches are listed newest first, and retention deletes the oldest.

    Raises `Conflict` if another map, of another task or input, has the same --batch-key.
    """
    other: BatchRecord | None = None
    async for batch in _newest_first(engine):
        if batch.metadata.get("map") == source.identity:
            return batch
        if source.key and other is None and batch.metadata.get("batch_key") == source.key:
            other = batch
    if other is not None:
        raise Conflict(
            f"--batch-key {source.key} names the map of {other.task} over {other.metadata['input']}, "
            f"got {source.task} over {source.path}",
            hint="give each map a key of its own",
            batch_id=other.id,
        )
    return None


async def batch_of_key(engine: Engine, key: str) -> BatchRecord | None:
    """Return the newest batch of the map with a --batch-key."""
    async for batch in _newest_first(engine):
        if "map" in batch.metadata and batch.metadata.get("batch_key") == key:
            return batch
    return None


async def _newest_first(engine: Engine) -> AsyncIterator[BatchRecord]:
    before_id = ""
    while True:
        page = await engine.store.batches(engine.environment, before_id=before_id, limit=PAGE_BATCHES)
        for batch, _ in page:
            yield batch
        if not page:
            return
        before_id = page[-1][0].id

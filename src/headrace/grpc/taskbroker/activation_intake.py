"""A stream of activations becomes durable: each once by its id, in groups that share commits, within bounds.

One that can't be kept is refused alone, with its place and its reason; the rest goes in. A stream that was cut is sent
again whole: what is there already is known by its id.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Final, NamedTuple

import msgspec

from headrace.core.delimited import DelimitedDecoder, Oversized
from headrace.core.pack import ACTIVATION
from headrace.foundation.errors import InvalidInput
from headrace.grpc.taskbroker.activation_codec import Entry, entry_of, is_killed
from headrace.runtime.concurrent_map import ingest
from headrace.runtime.dispatch.backpressure import Pressure
from headrace.runtime.dispatch.rule_cache import RuleBook
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer

GROUP_RUNS: Final = 256
GROUP_BYTES: Final = 1024 * 1024
REFUSED_SHOWN: Final = 100


class Refused(msgspec.Struct):
    """One that was not kept. `number` counts the stream's activations from 0."""

    number: int
    id: str
    reason: str


class Taken(msgspec.Struct):
    """What became of a stream. `dropped`: their tasks are switched off. `refused` shows the first 100."""

    accepted: int = 0
    duplicates: int = 0
    dropped: int = 0
    refused_count: int = 0
    refused: list[Refused] = []

    def refuse(self, number: int, name: str, reason: str) -> None:
        """Count one that can't be kept."""
        self.refused_count += 1
        if len(self.refused) < REFUSED_SHOWN:
            self.refused.append(Refused(number, name, reason))


class _Kept(NamedTuple):
    data: bytes
    entry: Entry


class ActivationIntake:
    """Owned by one event loop; streams may be taken in at the same time."""

    def __init__(self, engine: Engine, producer: Producer) -> None:
        self._engine = engine
        self._producer = producer
        self._rules = RuleBook(engine)
        self._pressure = Pressure(engine)

    async def take(self, pieces: AsyncIterable[bytes]) -> Taken:
        """Keep a stream of activations, each after its length as a varint.

        Raises `NoRoom` when a bound on what may wait stays reached, `InvalidInput` where the stream itself is broken.
        Some of what came before may be kept by then: it is known again when the stream is sent once more.
        """
        decoder = DelimitedDecoder(self._engine.limits.activation_bytes_max)
        return await self._taken(_grouped(_messages(decoder, pieces)))

    async def take_all(self, messages: Iterable[bytes]) -> Taken:
        """Keep some activations that are there already."""

        async def given() -> AsyncIterator[bytes | Oversized]:
            for message in messages:
                yield message

        return await self._taken(_grouped(given()))

    async def _taken(self, groups: AsyncIterator[list[tuple[int, bytes | Oversized]]]) -> Taken:
        taken = Taken()

        async def step(group: list[tuple[int, bytes | Oversized]]) -> None:
            await self._keep(group, taken)

        async with aclosing(ingest(groups, step, concurrency=self._engine.limits.ingest_concurrency)) as steps:
            async for _ in steps:
                pass
        return taken

    async def _keep(self, group: list[tuple[int, bytes | Oversized]], taken: Taken) -> None:
        rules = await self._rules.refresh()
        now_us, limits = self._engine.clock.now_us(), self._engine.limits
        kept: list[_Kept] = []
        for number, data in group:
            if isinstance(data, Oversized):
                reason = f"an activation has at most {limits.activation_bytes_max} bytes, not {data.actual_bytes}"
                taken.refuse(number, "", reason)
                continue
            try:
                entry = entry_of(data, limits, now_us)
            except InvalidInput as error:
                taken.refuse(number, str(error.ids.get("id", "")), error.message)
                continue
            if is_killed(rules, entry.extra.name, data):
                taken.dropped += 1
                continue
            key = entry.key._replace(queue=rules.queue_for(entry.key.queue))
            kept.append(_Kept(data, entry._replace(key=key)))
        await self._pressure.admit([one.entry.key for one in kept])
        runs = [(one.entry.key, one.data, ACTIVATION, one.entry.extra) for one in kept]
        for is_new in await self._producer.put_all(runs):
            taken.accepted += is_new
            taken.duplicates += not is_new


async def _messages(decoder: DelimitedDecoder, pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes | Oversized]:
    async for piece in pieces:
        for message in decoder.feed(piece):
            yield message
    decoder.end()


async def _grouped(messages: AsyncIterator[bytes | Oversized]) -> AsyncIterator[list[tuple[int, bytes | Oversized]]]:
    """Messages with their numbers, as many as make a good step; what came before an error goes first."""
    group: list[tuple[int, bytes | Oversized]] = []
    number = held_bytes = 0
    broken: InvalidInput | None = None
    try:
        async for message in messages:
            group.append((number, message))
            number += 1
            held_bytes += len(message) if isinstance(message, bytes) else 0
            if len(group) >= GROUP_RUNS or held_bytes >= GROUP_BYTES:
                yield group
                group, held_bytes = [], 0
    except InvalidInput as error:
        broken = error
    if group:
        yield group
    if broken is not None:
        raise broken

"""Intake of activation streams: each activation is stored once by its id, in groups that share commits.

An invalid activation is refused alone, with its number and the reason; the others are stored. After an interruption the
client sends the whole stream again: activations that are stored already are recognised by their ids.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Final, NamedTuple

import msgspec

from headrace.core.delimited import DelimitedDecoder, OversizedMessage
from headrace.core.pack import ACTIVATION
from headrace.foundation.errors import InvalidInput
from headrace.grpc.taskbroker.activation_codec import ActivationEntry, decode_entry, is_killed
from headrace.runtime.concurrent_map import map_concurrently
from headrace.runtime.dispatch.backpressure import Backpressure
from headrace.runtime.dispatch.rule_cache import RuleCache
from headrace.runtime.engine import Engine
from headrace.runtime.producing.producer import Producer

GROUP_RUNS: Final = 256
GROUP_BYTES: Final = 1024 * 1024
REFUSED_SHOWN: Final = 100


class RefusedActivation(msgspec.Struct):
    """An activation that was not stored. `number` is its position in the stream, from 0."""

    number: int
    id: str
    reason: str


class IntakeResult(msgspec.Struct):
    """Result of a stream. `dropped`: killswitch rules matched. `refused` holds the first 100 refusals."""

    accepted: int = 0
    duplicates: int = 0
    dropped: int = 0
    refused_count: int = 0
    refused: list[RefusedActivation] = []

    def refuse(self, number: int, name: str, reason: str) -> None:
        """Count an activation that was not stored."""
        self.refused_count += 1
        if len(self.refused) < REFUSED_SHOWN:
            self.refused.append(RefusedActivation(number, name, reason))


class _ValidActivation(NamedTuple):
    data: bytes
    entry: ActivationEntry


class ActivationIntake:
    """Intake of one environment. Used by one event loop; streams may run concurrently."""

    def __init__(self, engine: Engine, producer: Producer) -> None:
        self._engine = engine
        self._producer = producer
        self._rules = RuleCache(engine)
        self._pressure = Backpressure(engine)

    async def take(self, pieces: AsyncIterable[bytes]) -> IntakeResult:
        """Store a stream of activations, each preceded by its length as a varint.

        Raises `QueueFull` if the backlog stays full, and `InvalidInput` if the framing of the stream is broken.
        Activations before the error may have been stored; they are recognised when the stream is sent again.
        """
        decoder = DelimitedDecoder(self._engine.limits.activation_bytes_max)
        return await self._store_groups(_grouped(_messages(decoder, pieces)))

    async def take_all(self, messages: Iterable[bytes]) -> IntakeResult:
        """Store activations that are in memory."""

        async def in_memory() -> AsyncIterator[bytes | OversizedMessage]:
            for message in messages:
                yield message

        return await self._store_groups(_grouped(in_memory()))

    async def _store_groups(self, groups: AsyncIterator[list[tuple[int, bytes | OversizedMessage]]]) -> IntakeResult:
        result = IntakeResult()

        async def step(group: list[tuple[int, bytes | OversizedMessage]]) -> None:
            await self._store(group, result)

        async with aclosing(
            map_concurrently(groups, step, concurrency=self._engine.limits.ingest_concurrency)
        ) as steps:
            async for _ in steps:
                pass
        return result

    async def _store(self, group: list[tuple[int, bytes | OversizedMessage]], result: IntakeResult) -> None:
        rules = await self._rules.refresh()
        now_us, limits = self._engine.clock.now_us(), self._engine.limits
        valid: list[_ValidActivation] = []
        for number, data in group:
            if isinstance(data, OversizedMessage):
                reason = (
                    f"expected an activation of at most {limits.activation_bytes_max} bytes, got {data.actual_bytes}"
                )
                result.refuse(number, "", reason)
                continue
            try:
                entry = decode_entry(data, limits, now_us)
            except InvalidInput as error:
                result.refuse(number, str(error.ids.get("id", "")), error.message)
                continue
            if is_killed(rules, entry.extra.name, data):
                result.dropped += 1
                continue
            key = entry.key._replace(queue=rules.queue_for(entry.key.queue))
            valid.append(_ValidActivation(data, entry._replace(key=key)))
        await self._pressure.admit([activation.entry.key for activation in valid])
        runs = [(activation.entry.key, activation.data, ACTIVATION, activation.entry.extra) for activation in valid]
        for is_new in await self._producer.put_all(runs):
            result.accepted += is_new
            result.duplicates += not is_new


async def _messages(decoder: DelimitedDecoder, pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes | OversizedMessage]:
    async for piece in pieces:
        for message in decoder.feed(piece):
            yield message
    decoder.end()


async def _grouped(
    messages: AsyncIterator[bytes | OversizedMessage],
) -> AsyncIterator[list[tuple[int, bytes | OversizedMessage]]]:
    """Group messages, with their numbers, for one commit each. Messages before a framing error are still yielded."""
    group: list[tuple[int, bytes | OversizedMessage]] = []
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

"""Effects: calls out of an indexer, each made once for its arguments, with bounded concurrency and rate.

The result of a call is a row of a table of its own, staged and committed with the batch that asked for it. It is
visible at once, survives a restart, and stays valid when the indexer is rolled back.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import typing
from typing import Any, Final

import msgspec

from headrace.core.entity import Entity
from headrace.core.staging import MISSING, StagedTable, Staging
from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.runtime.clock import SECOND_US, Clock
from headrace.runtime.indexing.read_coalescer import ReadCoalescer
from headrace.runtime.tasks.bounds import check_name

KEY_CHARS: Final = 500
RESULT_BYTES_MAX: Final = 1024 * 1024
_encode: Final = msgspec.json.Encoder(order="sorted").encode


_UNKNOWN: Final = object()


class EffectResult(Entity):
    """The stored result of a call, under its name and arguments."""

    id: str
    result: str


class Effect:
    """A registered function: async, or plain and then called in a thread. Results decode into its return annotation."""

    def __init__(self, function: Any, *, name: str, calls: int | None, per_s: float, cache: bool) -> None:
        self.name = check_name("effect", name)
        if not inspect.isroutine(function):
            raise InvalidSetting(
                f"effect {name}: expected a function, got {function!r}", hint="decorate a def or an async def"
            )
        if calls is not None and (calls < 1 or per_s <= 0):
            raise InvalidSetting(
                f"effect {name}: expected at least 1 call in more than 0 s, got {calls} calls in {per_s} s",
                hint="write calls=10, per_s=1",
            )
        self.function = function
        self.calls = calls
        self.per_s = per_s
        self.cache = cache
        annotation = typing.get_type_hints(function).get("return", Any)
        self.decode = msgspec.json.Decoder(annotation).decode
        self._opened_us = 0
        self._left = 0
        self.waiting_count = 0

    def __call__(self, *args: Any) -> Any:
        """Call the function itself, without limit or cache."""
        return self.function(*args)

    async def wait_for_slot(self, clock: Clock) -> None:
        """Wait until one more call is within the limit: `calls` at once, the next ones when a new window begins."""
        if self.calls is None:
            return
        self.waiting_count += 1
        try:
            while True:
                now_us = clock.now_us()
                if now_us >= self._opened_us + int(self.per_s * SECOND_US):
                    self._opened_us, self._left = now_us, self.calls
                if self._left:
                    self._left -= 1
                    return
                await clock.sleep((self._opened_us - now_us) / SECOND_US + self.per_s)
        finally:
            self.waiting_count -= 1


class Effects:
    """The effects of one running indexer. `table` stores the results of cached ones."""

    def __init__(
        self, staging: Staging, table: StagedTable | None, reads: ReadCoalescer, clock: Clock, *, calls_max: int
    ) -> None:
        self._staging = staging
        self._table = table
        self._reads = reads
        self._clock = clock
        self._free = asyncio.Semaphore(calls_max)
        self._in_flight: dict[str, asyncio.Task[str]] = {}
        self._remembered: dict[str, str] = {}
        self.calls_count = 0

    async def call(self, effect: Any, args: tuple[Any, ...], *, is_preload: bool) -> Any:
        """Return the result of a call, from memory, the store, a call in flight, or the call itself.

        The result of a call that was only made ahead is not stored: what is stored must not depend on the limits of
        batches.
        """
        if not isinstance(effect, Effect):
            raise InvalidInput(
                f"expected an effect of this indexer, got {effect!r}",
                hint="register it with @….effect(calls=10, per_s=1)",
            )
        key = key_of(effect, args)
        text = self._remembered.get(key)
        if text is None and effect.cache and self._table is not None:
            if not self._table.is_read:
                self._table.begin_reading()
            row = self._table.rows.get(key, MISSING)
            if row is MISSING:
                row = await self._reads.get(self._table, key)
            text = None if row is None else row.result
        answer = _UNKNOWN if text is None else _decoded(effect, text)
        if answer is _UNKNOWN:  # or the annotation has changed since it was stored
            task = self._in_flight.get(key)
            if task is None:
                task = self._in_flight[key] = asyncio.ensure_future(self._make_call(effect, key, args))
                task.add_done_callback(_retrieve_error)
            text = await asyncio.shield(task)
            answer = effect.decode(text)
        assert text is not None
        if effect.cache and not is_preload and self._table is not None:
            stored = self._table.rows.get(key)
            if stored is None or stored.result != text:
                self._table.write(EffectResult(key, text), 0)
        return answer

    async def _make_call(self, effect: Effect, key: str, args: tuple[Any, ...]) -> str:
        try:
            await effect.wait_for_slot(self._clock)
            async with self._free:
                self.calls_count += 1
                function: Any = effect.function
                if inspect.iscoroutinefunction(function):
                    answer = await function(*args)
                else:
                    answer = await asyncio.to_thread(function, *args)
                    if inspect.isawaitable(answer):
                        answer = await answer
            text = self._text_of(effect, answer)
            self._remembered[key] = text
            return text
        finally:
            del self._in_flight[key]

    def _text_of(self, effect: Effect, answer: Any) -> str:
        try:
            text = _encode(answer)
            effect.decode(text)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"effect {effect.name} returned {type(answer).__name__}, which can't be stored: {error}",
                hint="return JSON values that fit the return annotation",
                effect=effect.name,
            ) from error
        if len(text) > RESULT_BYTES_MAX:
            raise InvalidInput(
                f"effect {effect.name}: expected a result of at most {RESULT_BYTES_MAX:,} bytes, got {len(text):,}",
                effect=effect.name,
            )
        return text.decode()

    def forget(self) -> None:
        """Forget the results that are not cached: a batch has ended."""
        self._remembered.clear()

    async def close(self) -> None:
        """Cancel the calls in flight."""
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def key_of(effect: Effect, args: tuple[Any, ...]) -> str:
    """Return name and arguments as one text. Raises `InvalidInput` for arguments that are not JSON."""
    try:
        text = _encode(args).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"effect {effect.name} was called with arguments that are not JSON: {error}",
            hint="pass numbers, strings, and lists or objects of them",
            effect=effect.name,
        ) from error
    if len(text) > KEY_CHARS or "\\u0000" in text:
        text = hashlib.sha256(text.encode()).hexdigest()
    return f"{effect.name}{text}"


def _decoded(effect: Effect, text: str) -> Any:
    try:
        return effect.decode(text)
    except msgspec.ValidationError:
        return _UNKNOWN


def _retrieve_error(task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        task.exception()

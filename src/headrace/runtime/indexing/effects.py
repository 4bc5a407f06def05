"""Calls out of an indexer: each asked once for its arguments, a bounded number at once, as often as their limit says.

What a call answered is a row of a table of its own, staged and committed with the batch that asked: it is seen at once,
survives a restart, and stays true when the indexer goes back.
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


class Answered(Entity):
    """What a call answered, under its name and arguments."""

    id: str
    result: str


class Effect:
    """A registered function: async, or plain and then called in a thread. Its annotation says what results become."""

    def __init__(self, function: Any, *, name: str, calls: int | None, per_s: float, cache: bool) -> None:
        self.name = check_name("effect", name)
        if not inspect.isroutine(function):
            raise InvalidSetting(f"effect {name} is made of {function!r}, which is no function", hint="write a def")
        if calls is not None and (calls < 1 or per_s <= 0):
            raise InvalidSetting(f"effect {name} allows {calls} calls in {per_s} s", hint="at least one, in some time")
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
        """Call the function itself, here and now."""
        return self.function(*args)

    async def admitted(self, clock: Clock) -> None:
        """Return when one more call is within the limit: `calls` at once, the next when a new window opens."""
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
    """The calls of one running indexer. `table` keeps the answers of those that are cached."""

    def __init__(
        self, staging: Staging, table: StagedTable | None, lookups: ReadCoalescer, clock: Clock, *, calls_max: int
    ) -> None:
        self._staging = staging
        self._table = table
        self._lookups = lookups
        self._clock = clock
        self._free = asyncio.Semaphore(calls_max)
        self._under_way: dict[str, asyncio.Task[str]] = {}
        self._remembered: dict[str, str] = {}
        self.calls_count = 0

    async def call(self, effect: Any, args: tuple[Any, ...], *, is_preload: bool) -> Any:
        """The answer to a call, from memory, the store, a call under way, or the call itself.

        What was only asked ahead is not kept: what is kept must not hang on where batches begin.
        """
        if not isinstance(effect, Effect):
            raise InvalidInput(
                f"{effect!r} is no effect of this indexer", hint="register it: @….effect(calls=10, per_s=1)"
            )
        key = key_of(effect, args)
        text = self._remembered.get(key)
        if text is None and effect.cache and self._table is not None:
            if not self._table.is_read:
                self._table.begin_reading()
            row = self._table.rows.get(key, MISSING)
            if row is MISSING:
                row = await self._lookups.get(self._table, key)
            text = None if row is None else row.result
        answer = _UNKNOWN if text is None else _decoded(effect, text)
        if answer is _UNKNOWN:  # or the annotation has changed since it was answered
            task = self._under_way.get(key)
            if task is None:
                task = self._under_way[key] = asyncio.ensure_future(self._made(effect, key, args))
                task.add_done_callback(_heard)
            text = await asyncio.shield(task)
            answer = effect.decode(text)
        assert text is not None
        if effect.cache and not is_preload and self._table is not None:
            known = self._table.rows.get(key)
            if known is None or known.result != text:
                self._table.write(Answered(key, text), 0)
        return answer

    async def _made(self, effect: Effect, key: str, args: tuple[Any, ...]) -> str:
        try:
            await effect.admitted(self._clock)
            async with self._free:
                self.calls_count += 1
                found: Any = effect.function
                if inspect.iscoroutinefunction(found):
                    answer = await found(*args)
                else:
                    answer = await asyncio.to_thread(found, *args)
                    if inspect.isawaitable(answer):
                        answer = await answer
            text = self._text_of(effect, answer)
            self._remembered[key] = text
            return text
        finally:
            del self._under_way[key]

    def _text_of(self, effect: Effect, answer: Any) -> str:
        try:
            text = _encode(answer)
            effect.decode(text)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidInput(
                f"effect {effect.name} answered {type(answer).__name__}, which can't be kept: {error}",
                hint="answer JSON values, and annotate what they are",
                effect=effect.name,
            ) from error
        if len(text) > RESULT_BYTES_MAX:
            raise InvalidInput(
                f"effect {effect.name} answered {len(text):,} bytes, more than {RESULT_BYTES_MAX:,}", effect=effect.name
            )
        return text.decode()

    def forget(self) -> None:
        """A batch has ended: what is not cached is asked again from here on."""
        self._remembered.clear()

    async def close(self) -> None:
        """Leave what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def key_of(effect: Effect, args: tuple[Any, ...]) -> str:
    """Name and arguments as one text. Raises `InvalidInput` for arguments that are not JSON."""
    try:
        text = _encode(args).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"effect {effect.name} was asked with what is not JSON: {error}", hint="ask with numbers and texts",
            effect=effect.name,
        ) from error  # fmt: skip
    if len(text) > KEY_CHARS or "\\u0000" in text:
        text = hashlib.sha256(text.encode()).hexdigest()
    return f"{effect.name}{text}"


def _decoded(effect: Effect, text: str) -> Any:
    try:
        return effect.decode(text)
    except msgspec.ValidationError:
        return _UNKNOWN


def _heard(task: asyncio.Task[str]) -> None:
    if not task.cancelled():
        task.exception()

"""Task specifications: everything that an app declares about a task."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from headrace.core.activation import LANE
from headrace.core.block import Extra
from headrace.core.retry import NO_RETRY, Retry, is_number_within
from headrace.core.span import Key
from headrace.foundation.errors import InvalidSetting
from headrace.runtime.tasks.bounds import SECONDS_MAX, TIMEOUT_S_MAX, check_name, check_priority
from headrace.runtime.tasks.payload_codec import Codec

Pool = Literal["auto", "loop", "thread", "process"]

OnExhausted = Literal["discard", "dead_letter"]
"""Handling of a run whose last attempt failed: it stays a failed run, or it is also kept as a dead letter."""


@dataclass(frozen=True, slots=True)
class ImportTarget:
    """Import location of a task for another process: a module by name or by file, and the attribute in it."""

    module: str
    file: str
    attribute: str


@dataclass(frozen=True, slots=True, eq=False)
class TaskSpec:
    """The declaration of a task. Raises `InvalidSetting` if an option is invalid."""

    name: str
    function: Callable[..., Any]
    retry: Retry = NO_RETRY
    timeout_s: float | None = None
    queue: str = "default"
    priority: int = 0
    pool: Pool = "auto"
    at_most_once: bool = False
    delay_s: float = 0
    expires_s: float = 0
    on_exhausted: OnExhausted = "discard"
    codec: Codec = field(init=False)
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        check_name("task", self.name)
        if self.name == LANE:
            raise InvalidSetting(
                f"the name {LANE!r} is reserved for activations", hint="choose another name for the task"
            )
        check_name("queue", self.queue)
        check_priority(self.priority)
        _check_function(self.name, self.function)
        if not isinstance(self.retry, Retry):
            raise InvalidSetting(f"retry: expected a Retry, got {self.retry!r}", hint="write Retry(attempts=3)")
        timeout_s = self.timeout_s
        if timeout_s is not None and (not timeout_s or not is_number_within(timeout_s, 0, TIMEOUT_S_MAX)):
            raise InvalidSetting(
                f"timeout_s: expected a number of more than 0 and at most {TIMEOUT_S_MAX:.0f}, got {self.timeout_s!r}",
                hint="seconds, such as timeout_s=30",
                task=self.name,
            )
        for option in ("delay_s", "expires_s"):
            if not is_number_within(getattr(self, option), 0, SECONDS_MAX):
                raise InvalidSetting(
                    f"{option}: expected 0 to {SECONDS_MAX}, got {getattr(self, option)!r}", task=self.name
                )
        if self.on_exhausted not in get_args(OnExhausted):
            raise InvalidSetting(
                f"on_exhausted: expected one of {', '.join(get_args(OnExhausted))}, got {self.on_exhausted!r}",
                task=self.name,
            )
        if self.pool not in get_args(Pool):
            raise InvalidSetting(
                f"pool: expected one of {', '.join(get_args(Pool))}, got {self.pool!r}", task=self.name
            )
        is_async = inspect.iscoroutinefunction(self.function)
        if self.pool == "loop" and not is_async:
            raise InvalidSetting(
                "pool='loop' needs an async task: a plain function would block every other run",
                hint="write `async def`, or omit pool",
                task=self.name,
            )
        if self.pool == "thread" and is_async:
            raise InvalidSetting(
                "pool='thread' needs a plain function, got an async task", hint="omit pool", task=self.name
            )
        object.__setattr__(self, "is_async", is_async)
        object.__setattr__(self, "codec", Codec(self.name, self.function))

    @property
    def key(self) -> Key:
        """The key of its runs if a call passes no options; `delay_s` and `expires_s` count from each call."""
        return Key(
            self.name,
            queue=self.queue,
            priority=self.priority,
            at_most_once=self.at_most_once,
            dead_letter=self.on_exhausted == "dead_letter",
        )

    def with_overrides(self, extra: Extra | None) -> TaskSpec:
        """Return the task with the attempts and the timeout that one run asks for."""
        if extra is None or not (extra.attempts_max or extra.timeout_ms):
            return self
        adjusted = copy.copy(self)
        if extra.attempts_max:
            object.__setattr__(adjusted, "retry", dataclasses.replace(self.retry, attempts=extra.attempts_max))
        if extra.timeout_ms:
            object.__setattr__(adjusted, "timeout_s", extra.timeout_ms / 1_000)
        return adjusted

    @property
    def target(self) -> ImportTarget:
        """The location from which another process imports this task."""
        module = sys.modules.get(self.function.__module__)
        spec = getattr(module, "__spec__", None) if self.function.__module__ == "__main__" else None
        name = spec.name if spec is not None else self.function.__module__  # `python -m package.module`
        return ImportTarget(name, getattr(module, "__file__", "") or "", self.function.__qualname__)

    @property
    def options(self) -> str:
        """The options that a child process must find with the task too, as text that two processes write the same
        way.
        """
        classes = [[error.__qualname__ for error in errors] for errors in (self.retry.retry_on, self.retry.give_up_on)]
        retry = dataclasses.replace(self.retry, retry_on=(), give_up_on=())
        return (
            f"timeout_s={self.timeout_s}, at_most_once={self.at_most_once}, {retry}, on={classes[0]}, not={classes[1]}"
        )


def _check_function(name: str, function: Any) -> None:
    if not inspect.isroutine(function):
        raise InvalidSetting(
            f"task {name}: expected a function, got {function!r}", hint="decorate a def or an async def"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidSetting(
            f"task {name}: expected one result, got a generator function",
            hint="return a list, or map the task over items",
        )

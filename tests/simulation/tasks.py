"""Tasks of simulated runs: each item is a number, and the plan of the simulation holds its behaviour."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from headrace.core.retry import Retry, RetryAfter
from headrace.runtime.tasks.context import Context
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec

QUEUES: Final = ("default", "side")
WORK: Final = "work"
PLAIN: Final = "plain"
SYNC: Final = "sync"
ONCE: Final = "once"
TASKS: Final = (WORK, PLAIN, SYNC, ONCE)


class ItemFailed(Exception):
    """An item that fails."""


@dataclass(slots=True, frozen=True)
class Behaviour:
    """Behaviour of an item: `failures_count` executions fail before one succeeds; `kills_count` executions crash their
    process.
    """

    sleep_s: float = 0.0
    failures_count: int = 0
    retry_after_s: float = 0.0
    kills_count: int = 0
    hangs: bool = False
    result_chars: int = 0


QUICK: Final = Behaviour()


class Hooks:
    """Functions of the process that its tasks call."""

    def __init__(
        self,
        begin: Callable[[int, str], tuple[Behaviour, int]],
        crash: Callable[[str], None],
        never: Callable[[], asyncio.Future[None]],
    ) -> None:
        """`begin(value, task)` returns the behaviour of an item and the number of its earlier executions."""
        self.begin = begin
        self.crash = crash
        self.never = never

    async def run(self, value: int, task: str) -> str:
        """Execute an item once."""
        behaviour, executions_count = self.begin(value, task)
        if executions_count < behaviour.kills_count:
            self.crash("run:poison")
            await self.never()
        if behaviour.sleep_s:
            await asyncio.sleep(behaviour.sleep_s)
        if behaviour.hangs:
            await self.never()
        if executions_count < behaviour.failures_count:
            if behaviour.retry_after_s:
                raise RetryAfter(behaviour.retry_after_s)
            raise ItemFailed(value)
        return f"{value}:{'x' * behaviour.result_chars}"


def registry_of(hooks: Hooks) -> Registry:
    """Return the registry of the tasks of a process."""

    async def work(value: int, context: Context) -> str:
        assert context.attempt >= 1
        return await hooks.run(value, WORK)

    async def plain(value: int) -> str:
        return await hooks.run(value, PLAIN)

    def sync(value: int) -> int:
        behaviour, executions_count = hooks.begin(value, SYNC)
        if executions_count < behaviour.failures_count:
            raise ItemFailed(value)
        return value

    async def once(value: int) -> str:
        return await hooks.run(value, ONCE)

    registry = Registry()
    retry = Retry(attempts=4, delay_s=0.5, delay_max_s=10)
    registry.add(TaskSpec(WORK, work, retry=retry, timeout_s=8))
    registry.add(TaskSpec(PLAIN, plain, retry=Retry(attempts=2, delay_s=3, backoff="constant"), timeout_s=30))
    registry.add(TaskSpec(SYNC, sync, retry=retry, queue="side"))
    registry.add(TaskSpec(ONCE, once, at_most_once=True, timeout_s=30))
    return registry

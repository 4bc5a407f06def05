"""What simulated runs do: each item is a number, and the plan says how it behaves."""

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


class Broke(Exception):
    """An item that fails."""


@dataclass(slots=True, frozen=True)
class Behaviour:
    """How an item behaves: `failures_count` executions fail before one succeeds; `kills` end their process."""

    sleep_s: float = 0.0
    failures_count: int = 0
    retry_after_s: float = 0.0
    kills_count: int = 0
    hangs: bool = False
    result_chars: int = 0


QUICK: Final = Behaviour()


class Hooks:
    """What tasks need of the process that runs them."""

    def __init__(
        self,
        begin: Callable[[int, str], tuple[Behaviour, int]],
        die: Callable[[str], None],
        never: Callable[[], asyncio.Future[None]],
    ) -> None:
        """`begin(value, task)` answers how an item behaves and how often it had been begun before."""
        self.begin = begin
        self.die = die
        self.never = never

    async def run(self, value: int, task: str) -> str:
        """One execution of one item."""
        behaviour, executions_count = self.begin(value, task)
        if executions_count < behaviour.kills_count:
            self.die("run:poison")
            await self.never()
        if behaviour.sleep_s:
            await asyncio.sleep(behaviour.sleep_s)
        if behaviour.hangs:
            await self.never()
        if executions_count < behaviour.failures_count:
            if behaviour.retry_after_s:
                raise RetryAfter(behaviour.retry_after_s)
            raise Broke(value)
        return f"{value}:{'x' * behaviour.result_chars}"


def registry_of(hooks: Hooks) -> Registry:
    """The tasks of one process."""

    async def work(value: int, context: Context) -> str:
        assert context.attempt >= 1
        return await hooks.run(value, WORK)

    async def plain(value: int) -> str:
        return await hooks.run(value, PLAIN)

    def sync(value: int) -> int:
        behaviour, executions_count = hooks.begin(value, SYNC)
        if executions_count < behaviour.failures_count:
            raise Broke(value)
        return value

    async def once(value: int) -> str:
        return await hooks.run(value, ONCE)

    registry = Registry()
    patient = Retry(attempts=4, delay_s=0.5, delay_max_s=10)
    registry.add(TaskSpec(WORK, work, retry=patient, timeout_s=8))
    registry.add(TaskSpec(PLAIN, plain, retry=Retry(attempts=2, delay_s=3, backoff="constant"), timeout_s=30))
    registry.add(TaskSpec(SYNC, sync, retry=patient, queue="side"))
    registry.add(TaskSpec(ONCE, once, at_most_once=True, timeout_s=30))
    return registry

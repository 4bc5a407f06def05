"""Turns the ticks of schedules into runs, once each however many processes do it.

Every worker of an app does this, and none of them leads: all know the same rules, so all name the same ticks, and who
moves a schedule on in the store is the one who enqueues (`store.tick`, one transaction). The others are told where it
stands. An answer that was lost therefore costs a question and never a run, and a store that is away makes ticks late:
they are asked for again until they are dealt with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import structlog

from headrace.core.schedule import due
from headrace.foundation.errors import HeadraceError
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.schedule_spec import ScheduleSpec
from headrace.runtime.tasks.task_registry import Registry
from headrace.store.protocol import Tick

LOG: Any = structlog.get_logger("headrace.scheduler")
PAUSE_MIN_S: Final = 0.001
PAUSE_MAX_S: Final = 30.0
"""Longest without a look at the clock, which a heartbeat may have put forward."""

RETRY_S: Final = 1.0


@dataclass(slots=True)
class _ScheduleState:
    """A schedule, up to where its ticks are dealt with, and whether the store has another one of this name."""

    spec: ScheduleSpec
    last_us: int
    next_us: int | None
    is_replaced: bool = False

    def move(self, last_us: int) -> None:
        """Ticks are dealt with up to here."""
        self.last_us, self.next_us = last_us, self.spec.rule.after(last_us)


class Scheduler:
    """The schedules of one registry on one engine. Owned by one event loop."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry
        self._standings: list[_ScheduleState] | None = None

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await self._engine.clock.sleep(await self.round())

    async def round(self) -> float:
        """Enqueue what is due; answers how many seconds later to come again."""
        try:
            if self._standings is None:
                await self._keep()
        except HeadraceError as error:
            LOG.warning("schedules could not be made known", error=str(error))
            return RETRY_S
        return max(PAUSE_MIN_S, min([PAUSE_MAX_S, *[await self._served(one) for one in self._standings or ()]]))

    async def _keep(self) -> None:
        """Make the schedules of this code known, and learn where they stand."""
        engine, specs = self._engine, self._registry.schedules
        own = [spec.record(engine.environment, self._registry.app) for spec in specs.values()]
        known = await engine.store.keep_schedules(
            engine.environment, self._registry.app, own, now_us=engine.clock.now_us()
        )
        self._standings = [
            _ScheduleState(specs[one.name], one.last_us, specs[one.name].rule.after(one.last_us)) for one in known
        ]

    async def _served(self, one: _ScheduleState) -> float:
        """Enqueue what is due of one schedule; answers the seconds until its next tick."""
        try:
            while one.next_us is not None and one.next_us <= self._engine.clock.now_us():
                await self._move_on(one)
        except HeadraceError as error:
            LOG.warning("a tick could not be enqueued", schedule=one.spec.name, error=str(error))
            return RETRY_S
        except Exception:
            LOG.exception("a schedule broke", schedule=one.spec.name)
            return RETRY_S
        return PAUSE_MAX_S if one.next_us is None else (one.next_us - self._engine.clock.now_us()) / 1_000_000

    async def _move_on(self, one: _ScheduleState) -> None:
        """Deal with the ticks that are due now."""
        engine, spec = self._engine, one.spec
        now_us = engine.clock.now_us()
        found = due(
            spec.rule,
            after_us=one.last_us,
            now_us=now_us,
            catch_up=spec.catch_up,
            grace_us=engine.limits.schedule_grace_ms * 1_000,
            ticks_max=engine.limits.schedule_ticks_max,
        )
        assert found is not None, "the clock of an engine never goes back"
        wanted = Tick(
            name=spec.name,
            expression=spec.rule.expression,
            zone=spec.rule.zone,
            last_us=one.last_us,
            until_us=found.until_us,
            runs=[spec.run(engine, tick_us) for tick_us in found.ticks_us],
        )
        told = await engine.store.tick(engine.environment, wanted, now_us=now_us)
        if told.is_ours and found.ticks_us:
            engine.wakeup.notify()
        if told.is_ours and found.missed_count:
            LOG.warning("ticks were missed and are passed over", schedule=spec.name, count=found.missed_count)
        stands = told.schedule
        if stands is None:  # somebody deleted it: it begins again
            self._standings, one.next_us = None, None
            return
        was_replaced, one.is_replaced = (
            one.is_replaced,
            (stands.expression, stands.zone)
            != (
                wanted.expression,
                wanted.zone,
            ),
        )
        if one.is_replaced and not was_replaced:
            LOG.warning("another version of a schedule is in force; this one waits", schedule=spec.name)
        # One that waits still looks at each of its ticks: when the other version is taken back, it goes on.
        one.move(found.until_us if one.is_replaced else stands.last_us)

"""The scheduler: it turns the ticks of schedules into runs, each tick once for any number of processes.

Every worker of an app runs it, without a leader. All of them know the same rules and so compute the same ticks. The
process that advances a schedule in the store also enqueues its run (`store.tick`, one transaction); the others get the
schedule's new position. A lost answer therefore costs one more request and never a run. While the store is unreachable
ticks are late; they are retried until they are handled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from headrace.core.schedule import due
from headrace.foundation.errors import HeadraceError
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.schedule_spec import ScheduleSpec
from headrace.runtime.tasks.task_registry import Registry
from headrace.store.protocol import Tick

LOG: Any = get_logger("headrace.scheduler")
PAUSE_MIN_S: Final = 0.001
PAUSE_MAX_S: Final = 30.0
"""Longest pause between two readings of the clock, which a heartbeat may have moved forward."""

RETRY_S: Final = 1.0


@dataclass(slots=True)
class _ScheduleState:
    """A schedule, the time up to which its ticks are handled, and whether the store has another version of it."""

    spec: ScheduleSpec
    last_us: int
    next_us: int | None
    is_replaced: bool = False

    def advance(self, last_us: int) -> None:
        """Note that ticks are handled up to `last_us`."""
        self.last_us, self.next_us = last_us, self.spec.rule.after(last_us)


class Scheduler:
    """The schedules of one registry on one engine. Owned by one event loop."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry
        self._states: list[_ScheduleState] | None = None

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            pause_s = await self.round()
            if self._engine.outage.is_over:
                await self._engine.clock.sleep(pause_s)
            await self._engine.outage.until_over(self._engine.clock)

    async def round(self) -> float:
        """Enqueue the due ticks; return the seconds until the next round."""
        try:
            if self._states is None:
                await self._register()
        except HeadraceError as error:
            LOG.warning("schedule.registration_failed", error=str(error))
            return RETRY_S
        return max(PAUSE_MIN_S, min([PAUSE_MAX_S, *[await self._enqueue_due(state) for state in self._states or ()]]))

    async def _register(self) -> None:
        """Register the schedules of this code, and load their positions."""
        engine, specs = self._engine, self._registry.schedules
        records = [spec.record(engine.environment, self._registry.app) for spec in specs.values()]
        stored_schedules = await engine.store.keep_schedules(
            engine.environment, self._registry.app, records, now_us=engine.clock.now_us()
        )
        self._states = [
            _ScheduleState(specs[stored.name], stored.last_us, specs[stored.name].rule.after(stored.last_us))
            for stored in stored_schedules
        ]

    async def _enqueue_due(self, state: _ScheduleState) -> float:
        """Enqueue the due ticks of one schedule; return the seconds until its next tick."""
        try:
            while state.next_us is not None and state.next_us <= self._engine.clock.now_us():
                await self._handle_due(state)
        except HeadraceError as error:
            LOG.warning("schedule.tick_failed", schedule=state.spec.name, error=str(error))
            return RETRY_S
        except Exception:
            LOG.exception("schedule.crashed", schedule=state.spec.name)
            return RETRY_S
        return PAUSE_MAX_S if state.next_us is None else (state.next_us - self._engine.clock.now_us()) / 1_000_000

    async def _handle_due(self, state: _ScheduleState) -> None:
        """Handle the ticks that are due now."""
        engine, spec = self._engine, state.spec
        now_us = engine.clock.now_us()
        due_ticks = due(
            spec.rule,
            after_us=state.last_us,
            now_us=now_us,
            catch_up=spec.catch_up,
            grace_us=engine.limits.schedule_grace_ms * 1_000,
            ticks_max=engine.limits.schedule_ticks_max,
        )
        assert due_ticks is not None, "the clock of an engine never goes back"
        tick = Tick(
            name=spec.name,
            expression=spec.rule.expression,
            zone=spec.rule.zone,
            last_us=state.last_us,
            until_us=due_ticks.until_us,
            runs=[spec.run(engine, tick_us) for tick_us in due_ticks.ticks_us],
        )
        result = await engine.store.tick(engine.environment, tick, now_us=now_us)
        if result.is_ours and due_ticks.ticks_us:
            engine.wakeup.notify()
        if result.is_ours and due_ticks.missed_count:
            LOG.warning("schedule.ticks_missed", schedule=spec.name, count=due_ticks.missed_count)
        stored = result.schedule
        if stored is None:  # it was deleted: register it again
            self._states, state.next_us = None, None
            return
        was_replaced, state.is_replaced = (
            state.is_replaced,
            (stored.expression, stored.zone)
            != (
                tick.expression,
                tick.zone,
            ),
        )
        if state.is_replaced and not was_replaced:
            LOG.warning("schedule.replaced", schedule=spec.name)
        # A replaced schedule still checks each of its ticks, and resumes once the other version is withdrawn.
        state.advance(due_ticks.until_us if state.is_replaced else stored.last_us)

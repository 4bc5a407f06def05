"""Schedules and their ticks; each tick becomes a run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.foundation.errors import Conflict
from headrace.store.protocol import Schedule, Tick, Ticked
from headrace.store.transactions.append import enqueue
from headrace.store.transactions.row_mapping import as_json
from headrace.store.transactions.sql_script import Script, fetch, fetch_one


class ScheduleRow(NamedTuple):
    """A row of the fragment `schedule_columns`."""

    environment: str
    name: str
    app: str
    task: str
    expression: str
    zone: str
    last_us: int
    ticked_us: int
    gone_us: int


def keep(environment: str, app: str, declared: Sequence[Schedule], now_us: int) -> Script[list[Schedule]]:
    """Store all schedules of an app, sorted, so that two processes that start together don't deadlock."""
    for schedule in sorted(declared, key=lambda schedule: schedule.name):
        yield from fetch(
            "keep_schedule",
            environment=environment,
            name=schedule.name,
            app=app,
            task=schedule.task,
            expression=schedule.expression,
            zone=schedule.zone,
            now_us=now_us,
        )
    names = {schedule.name for schedule in declared}
    yield from fetch("leave_schedules", environment=environment, app=app, names=as_json(sorted(names)), now_us=now_us)
    return [schedule for schedule in (yield from schedules(environment)) if schedule.name in names]


def tick(environment: str, ticks: Tick, now_us: int) -> Script[Ticked]:
    """Advance a schedule, and enqueue the runs of its ticks in the same transaction. The advance is the guard."""
    moved = yield from fetch(
        "move_schedule",
        environment=environment,
        name=ticks.name,
        expression=ticks.expression,
        zone=ticks.zone,
        last_us=ticks.last_us,
        until_us=ticks.until_us,
        runs_count=len(ticks.runs),
    )
    if moved:
        for new, chunk in ticks.runs:
            if (yield from fetch_one("batch", id=new.id)) is not None:
                raise Conflict(f"a batch with the id {new.id!r} exists already", batch_id=new.id)
            yield from enqueue(new, chunk, now_us)
    row = yield from fetch_one("schedule", environment=environment, name=ticks.name)
    return Ticked(bool(moved), None if row is None else _to_schedule(row))


def schedules(environment: str) -> Script[list[Schedule]]:
    """List the schedules of an environment, by name."""
    return [_to_schedule(row) for row in (yield from fetch("schedules", environment=environment))]


def _to_schedule(columns: Sequence[Any]) -> Schedule:
    return Schedule(**ScheduleRow._make(columns)._asdict())

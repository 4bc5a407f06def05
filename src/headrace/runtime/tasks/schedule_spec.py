"""Schedules of an app: the task, the rule, and the argument of its runs."""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from headrace.core.batch import SINGLE
from headrace.core.block import Chunk, Coalescer, Extra
from headrace.core.pack import JSON
from headrace.core.schedule import FIRST_US, CatchUp, Cron, Every, Rule, moment_of, rule_of
from headrace.foundation.errors import InvalidSetting
from headrace.foundation.ids import new_batch_id
from headrace.runtime.engine import Engine
from headrace.runtime.tasks.bounds import check_name
from headrace.runtime.tasks.call_options import Options, key_of
from headrace.runtime.tasks.context import SCHEDULE, SCHEDULED_US
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.store.protocol import NewBatch, Schedule

UTC: Final = "UTC"
ZONE_CHARS_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """A schedule as declared in code. Raises `InvalidSetting` if its runs could not be called."""

    name: str
    task: TaskSpec
    rule: Rule
    zone: ZoneInfo
    catch_up: CatchUp

    def __post_init__(self) -> None:
        check_name("schedule", self.name)
        if self.catch_up not in typing.get_args(CatchUp):
            raise InvalidSetting(
                f"catch_up: expected one of {', '.join(typing.get_args(CatchUp))}, got {self.catch_up!r}",
                schedule=self.name,
            )
        required = [parameter.name for parameter in self.task.codec.parameters if not parameter.has_default]
        if required and not self._takes_time:
            raise InvalidSetting(
                f"task {self.task.name} has required parameters that a schedule can't pass: {', '.join(required)}",
                hint="declare no parameter, or one of type datetime, which gets the time of the tick",
                schedule=self.name,
            )
        self.payload(FIRST_US)

    @property
    def _takes_time(self) -> bool:
        """True if the task's only parameter gets the time of the tick."""
        parameters = self.task.codec.parameters
        return len(parameters) == 1 and _is_datetime(parameters[0].annotation)

    def payload(self, tick_us: int) -> bytes:
        """Return the payload for a tick: its time in the schedule's zone, or nothing."""
        codec = self.task.codec
        return codec.encode_value(moment_of(tick_us, self.zone)) if self._takes_time else codec.encode((), {})

    def record(self, environment: str, app: str) -> Schedule:
        """Return the schedule as the store keeps it."""
        return Schedule(
            environment=environment,
            name=self.name,
            app=app,
            task=self.task.name,
            expression=self.rule.expression,
            zone=self.rule.zone,
        )

    def run(self, engine: Engine, tick_us: int) -> tuple[NewBatch, Chunk]:
        """Return the run of a tick, as a batch of its own."""
        now_us = engine.clock.now_us()
        extra = Extra(headers={SCHEDULE: self.name, SCHEDULED_US: str(tick_us)})
        coalescer = Coalescer(runs_max=1, bytes_max=engine.limits.chunk_bytes_max)
        coalescer.add(0, self.payload(tick_us), key_of(self.task, Options(), now_us), kind=JSON, extra=extra)
        (chunk,) = coalescer.flush()
        new = NewBatch(
            id=new_batch_id(now_us),
            environment=engine.environment,
            kind=SINGLE,
            task=self.task.name,
            expected_count=1,
        )
        return new, chunk


def make_schedule(
    task: TaskSpec,
    cron: object | None,
    every_s: object | None,
    tz: object | None,
    name: str | None,
    catch_up: CatchUp,
) -> ScheduleSpec:
    """Make a schedule from the arguments of `app.schedule`. Raises `InvalidSetting`, naming the argument."""
    if (cron is None) == (every_s is None):
        raise InvalidSetting(
            "expected either a cron expression or every_s", hint="write app.schedule(task, every_s=60)"
        )
    if every_s is not None:
        if tz is not None:
            raise InvalidSetting("tz: an interval does not depend on a time zone", hint="omit tz")
        rule: Rule = Every(every_s)
        zone = time_zone(UTC)
    else:
        zone = time_zone(UTC if tz is None else tz)
        rule = Cron(cron, zone.key, zone)
    return ScheduleSpec(name=task.name if name is None else name, task=task, rule=rule, zone=zone, catch_up=catch_up)


def stored_rule(stored: Schedule) -> Rule:
    """Return the rule of a stored schedule."""
    return rule_of(stored.expression, stored.zone, time_zone(stored.zone))


def time_zone(zone: object) -> ZoneInfo:
    """Return the time zone with a name of the tz database. Raises `InvalidSetting`."""
    if isinstance(zone, str) and len(zone) <= ZONE_CHARS_MAX:
        try:
            return ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            pass
    raise InvalidSetting(
        f"tz: unknown time zone {zone!r:.120}", hint="use a name of the tz database, such as Europe/Berlin or UTC"
    )


def _is_datetime(annotation: Any) -> bool:
    """`datetime`, or `datetime | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set(typing.get_args(annotation)) == {datetime, type(None)}
    return annotation is datetime

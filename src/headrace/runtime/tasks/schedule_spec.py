"""The schedules of an app: which task, by which rule, and what its runs are given."""

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
    """One schedule as the code has it. Raises `InvalidSetting` when its runs could not be called."""

    name: str
    task: TaskSpec
    rule: Rule
    place: ZoneInfo
    catch_up: CatchUp

    def __post_init__(self) -> None:
        check_name("schedule", self.name)
        if self.catch_up not in typing.get_args(CatchUp):
            raise InvalidSetting(
                f"catch_up is one of {', '.join(typing.get_args(CatchUp))}, not {self.catch_up!r}", schedule=self.name
            )
        needed = [one.name for one in self.task.codec.parameters if not one.has_default]
        if needed and not self._takes_time:
            raise InvalidSetting(
                f"task {self.task.name} needs {', '.join(needed)}, which no schedule can give",
                hint="let it take nothing, or one datetime, which is the time of the tick",
                schedule=self.name,
            )
        self.payload(FIRST_US)

    @property
    def _takes_time(self) -> bool:
        """Whether the task's one parameter is the time of its tick."""
        parameters = self.task.codec.parameters
        return len(parameters) == 1 and _is_datetime(parameters[0].annotation)

    def payload(self, tick_us: int) -> bytes:
        """What the run of a tick is given: its time there, or nothing."""
        codec = self.task.codec
        return codec.encode_value(moment_of(tick_us, self.place)) if self._takes_time else codec.encode((), {})

    def known(self, environment: str, app: str) -> Schedule:
        """As a store knows it."""
        return Schedule(
            environment=environment,
            name=self.name,
            app=app,
            task=self.task.name,
            expression=self.rule.expression,
            zone=self.rule.zone,
        )

    def run(self, engine: Engine, tick_us: int) -> tuple[NewBatch, Chunk]:
        """The run of a tick, as a batch of its own."""
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
    """A schedule as `app.schedule` was told it. Raises `InvalidSetting`, by name."""
    if (cron is None) == (every_s is None):
        raise InvalidSetting(
            "a schedule has a cron expression or every_s, and not both", hint="app.schedule(task, every_s=60)"
        )
    if every_s is not None:
        if tz is not None:
            raise InvalidSetting("an interval is the same in every time zone", hint="leave tz out")
        rule: Rule = Every(every_s)
        place = time_zone(UTC)
    else:
        place = time_zone(UTC if tz is None else tz)
        rule = Cron(cron, place.key, place)
    return ScheduleSpec(name=task.name if name is None else name, task=task, rule=rule, place=place, catch_up=catch_up)


def stored_rule(known: Schedule) -> Rule:
    """The rule of a schedule that a store knows."""
    return rule_of(known.expression, known.zone, time_zone(known.zone))


def time_zone(zone: object) -> ZoneInfo:
    """The time zone of a name of the tz database. Raises `InvalidSetting`."""
    if isinstance(zone, str) and len(zone) <= ZONE_CHARS_MAX:
        try:
            return ZoneInfo(zone)
        except (KeyError, ValueError, OSError):
            pass
    raise InvalidSetting(
        f"no time zone is called {zone!r:.120}", hint="write one of the tz database: Europe/Berlin, UTC"
    )


def _is_datetime(annotation: Any) -> bool:
    """`datetime`, or `datetime | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set(typing.get_args(annotation)) == {datetime, type(None)}
    return annotation is datetime

"""The tasks and schedules of one app, by name."""

from __future__ import annotations

from headrace.foundation.errors import InvalidSetting, NotFound
from headrace.runtime.tasks.bounds import SCHEDULES_MAX
from headrace.runtime.tasks.schedule_spec import ScheduleSpec
from headrace.runtime.tasks.task_spec import TaskSpec


class Registry:
    """The tasks and schedules of one app, by name."""

    def __init__(self, app: str = "app") -> None:
        self.app = app
        self._specs: dict[str, TaskSpec] = {}
        self.schedules: dict[str, ScheduleSpec] = {}

    def add(self, spec: TaskSpec) -> None:
        """Register a task. Raises `InvalidSetting` if its name is taken."""
        if spec.name in self._specs:
            raise InvalidSetting(f"two tasks have the name {spec.name!r}", hint="pass name='…' to one of them")
        self._specs[spec.name] = spec

    def add_schedule(self, spec: ScheduleSpec) -> None:
        """Register a schedule. Raises `InvalidSetting` if its name is taken or the app has too many."""
        if spec.name in self.schedules:
            raise InvalidSetting(f"two schedules have the name {spec.name!r}", hint="pass name='…' to one of them")
        if len(self.schedules) >= SCHEDULES_MAX:
            raise InvalidSetting(f"expected at most {SCHEDULES_MAX} schedules in an app", schedule=spec.name)
        self.schedules[spec.name] = spec

    def get(self, name: str) -> TaskSpec:
        """Return a task by name. Raises `NotFound`."""
        try:
            return self._specs[name]
        except KeyError:
            raise NotFound(
                f"no task has the name {name!r}", hint=f"registered tasks: {', '.join(self.names) or 'none'}"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    @property
    def names(self) -> list[str]:
        """All task names, sorted."""
        return sorted(self._specs)

"""The tasks and schedules of one app, by name."""

from __future__ import annotations

from headrace.foundation.errors import InvalidSetting, NotFound
from headrace.runtime.tasks.bounds import SCHEDULES_MAX
from headrace.runtime.tasks.schedule_spec import ScheduleSpec
from headrace.runtime.tasks.task_spec import TaskSpec


class Registry:
    """The tasks of one app, and its schedules, by name."""

    def __init__(self, app: str = "app") -> None:
        self.app = app
        self._specs: dict[str, TaskSpec] = {}
        self.schedules: dict[str, ScheduleSpec] = {}

    def add(self, spec: TaskSpec) -> None:
        """Raises `InvalidSetting` when another task has the name."""
        if spec.name in self._specs:
            raise InvalidSetting(f"two tasks are called {spec.name}", hint="give one of them name='…'")
        self._specs[spec.name] = spec

    def add_schedule(self, spec: ScheduleSpec) -> None:
        """Raises `InvalidSetting` when another schedule has the name, or there are too many."""
        if spec.name in self.schedules:
            raise InvalidSetting(f"two schedules are called {spec.name}", hint="give one of them name='…'")
        if len(self.schedules) >= SCHEDULES_MAX:
            raise InvalidSetting(f"an app has at most {SCHEDULES_MAX} schedules", schedule=spec.name)
        self.schedules[spec.name] = spec

    def get(self, name: str) -> TaskSpec:
        """Raises `NotFound`."""
        try:
            return self._specs[name]
        except KeyError:
            raise NotFound(
                f"no task is called {name!r}", hint=f"there are: {', '.join(self.names) or 'none'}"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    @property
    def names(self) -> list[str]:
        """All task names, sorted."""
        return sorted(self._specs)

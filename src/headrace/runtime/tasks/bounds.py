"""Bounds of the names, priorities and durations that tasks and calls may use, and the checks of them."""

from __future__ import annotations

from typing import Final

from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import DEFAULT

SECONDS_MAX: Final = 3_650 * 86_400


TIMEOUT_S_MAX: Final = 365 * 86_400.0


PRIORITY_MAX: Final = 1_000_000


SCHEDULES_MAX: Final = 1_000


def check_name(what: str, name: object) -> str:
    """`name` when it can name a task, queue, key or tag: 1 to 200 characters, no control characters."""
    most = DEFAULT.name_chars_max
    if not isinstance(name, str) or not 0 < len(name) <= most or not name.isprintable():
        raise InvalidInput(f"a {what}'s name is 1 to {most} printable characters, not {name!r}")
    return name


def check_priority(priority: object) -> int:
    """`priority` when it is an integer from -1,000,000 to 1,000,000; larger goes first."""
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > PRIORITY_MAX:
        raise InvalidInput(f"priority is a whole number from -{PRIORITY_MAX} to {PRIORITY_MAX}, not {priority!r}")
    return priority

"""Bounds of the names, priorities and durations that tasks and calls may use, and the checks of them."""

from __future__ import annotations

from typing import Final

from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import DEFAULT

ENCODABLE: Final = "plain values, dataclasses, msgspec structs, dates, UUIDs, enums or bytes"
"""Values that arguments and results may be made of, as hints say it."""

SECONDS_MAX: Final = 3_650 * 86_400


TIMEOUT_S_MAX: Final = 365 * 86_400.0


PRIORITY_MAX: Final = 1_000_000


SCHEDULES_MAX: Final = 1_000


def check_name(what: str, name: object) -> str:
    """Return `name` if it can name a task, queue, key or tag: 1 to 200 printable characters. Raises `InvalidInput`."""
    chars_max = DEFAULT.name_chars_max
    if not isinstance(name, str) or not 0 < len(name) <= chars_max or not name.isprintable():
        raise InvalidInput(f"{what}: expected a name of 1 to {chars_max} printable characters, got {name!r:.220}")
    return name


def check_text(what: str, text: str) -> str:
    """Return `text` if every database can store it: printable characters, no NUL. Raises `InvalidInput`."""
    if not text.isprintable():
        raise InvalidInput(f"{what}: expected printable characters, got {text!r:.220}")
    return text


def check_is_list(what: str, names: object) -> None:
    """Raise `InvalidInput` for a text where a list of names is expected: it would be taken as its characters."""
    if isinstance(names, str | bytes):
        raise InvalidInput(
            f"{what}: expected a list of names, got {names!r:.220}", hint=f"write {what}=[{names!r:.50}]"
        )


def check_priority(priority: object) -> int:
    """Return `priority` if it is an integer from -1,000,000 to 1,000,000; higher is claimed first. Raises
    `InvalidInput`.
    """
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > PRIORITY_MAX:
        raise InvalidInput(f"priority: expected an integer from -{PRIORITY_MAX} to {PRIORITY_MAX}, got {priority!r}")
    return priority

"""Errors about misspelt names: they name what was given, the near name, and every name there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from headrace.foundation.errors import InvalidSetting

NAMES_SHOWN: Final = 40
"""Most names that are listed beside a near one."""


def near_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that `name` was probably meant to be, or None."""
    import difflib  # only here: most starts make no mistake

    near = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=1, cutoff=0.6)
    return near[0] if near else None


def hint_of(name: str, names: Collection[str], plural: str) -> str:
    """Return a hint for an unknown name: the near one, and the list of all of them."""
    near = near_name(name, names)
    if near and len(names) > NAMES_SHOWN:
        return f"did you mean {near}?"
    shown = ", ".join(list(names)) or "none"
    return f"did you mean {near}? {plural}: {shown}" if near else f"{plural}: {shown}"


def check_names(call: str, given: Iterable[str], names: Collection[str], noun: str) -> None:
    """Raise `InvalidSetting` for the first name that is not one of `names`."""
    for name in given:
        if name not in names:
            raise InvalidSetting(f"{call} has no {noun} {name!r}", hint=hint_of(name, names, f"its {noun}s"))

"""Rules of an environment that operators set while it runs: which activations are dropped, which go to another queue.

Rules are stored as JSON, one value for each of `KILLSWITCH` and `DEMOTIONS`. A rule that can't be evaluated drops
nothing: in doubt an activation runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from headrace.foundation.errors import InvalidInput, StoreBroken

KILLSWITCH: Final = "killswitch"
DEMOTIONS: Final = "demotions"
KILLS_MAX: Final = 1_000
DEMOTIONS_MAX: Final = 1_000
SELECTORS_MAX: Final = 20

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


class Kill(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Activations of a task to drop: all of them, or those in which one of these arguments has this value."""

    name: str
    args: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}

    @property
    def is_selective(self) -> bool:
        """True if arguments are compared."""
        return bool(self.args or self.kwargs)


class Rules(msgspec.Struct, kw_only=True):
    """The rules of one environment. `demotions`: the queue that replaces another, by the other's name."""

    kills: list[Kill] = []
    demotions: dict[str, str] = {}

    def is_killed(self, name: str, arguments: Callable[[], Arguments | None]) -> bool:
        """True if an activation of a task is dropped. `arguments` returns the arguments of its call, None if
        unknown.
        """
        for kill in self.kills:
            if kill.name != name:
                continue
            if not kill.is_selective or _matches(kill, arguments()):
                return True
        return False

    def queue_for(self, queue: str) -> str:
        """Return the queue of a queue's activations; a demotion is followed once, so a cycle has no effect."""
        return self.demotions.get(queue, queue)


NO_RULES: Final = Rules()


def rules_of(stored: Mapping[str, bytes]) -> Rules:
    """Decode stored rules. Raises `StoreBroken`."""
    try:
        return Rules(
            kills=msgspec.json.decode(stored.get(KILLSWITCH, b"[]"), type=list[Kill]),
            demotions=msgspec.json.decode(stored.get(DEMOTIONS, b"{}"), type=dict[str, str]),
        )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreBroken(f"the stored rules of this environment are invalid: {error}") from None


def kills_encoded(kills: Sequence[Kill]) -> bytes:
    """Encode a killswitch. Raises `InvalidInput` if it has more rules than may be compared with each activation."""
    if len(kills) > KILLS_MAX or any(len(kill.args) + len(kill.kwargs) > SELECTORS_MAX for kill in kills):
        raise InvalidInput(f"killswitch: expected at most {KILLS_MAX} rules of {SELECTORS_MAX} arguments")
    for kill in kills:
        if any(not place.isascii() or not place.isdigit() for place in kill.args):
            raise InvalidInput("killswitch: expected numbers from 0 as names of positional arguments", task=kill.name)
    return msgspec.json.encode(kills)


def demotions_encoded(demotions: Mapping[str, str]) -> bytes:
    """Encode demotions. Raises `InvalidInput` for too many, and for one without effect."""
    if len(demotions) > DEMOTIONS_MAX:
        raise InvalidInput(f"demotions: expected at most {DEMOTIONS_MAX} queues, got {len(demotions)}")
    if any(queue == target for queue, target in demotions.items()):
        raise InvalidInput("demotions: expected another queue as target, got the same one")
    return msgspec.json.encode(demotions)


def _matches(kill: Kill, arguments: Arguments | None) -> bool:
    if arguments is None:
        return False
    placed, named = arguments
    if any(int(place) < len(placed) and is_same(placed[int(place)], value) for place, value in kill.args.items()):
        return True
    return any(name in named and is_same(named[name], value) for name, value in kill.kwargs.items())


def is_same(first: Any, second: Any) -> bool:
    """True if both are equal and of the same type, recursively: 1 is neither True nor 1.0."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(is_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(is_same(first[name], second[name]) for name in first)
    return type(first) is type(second) and bool(first == second)

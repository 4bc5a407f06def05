"""What people decided about an environment's activations while it runs: which are dropped, which go to another queue.

Rules are kept in the store as JSON, one value for each of `KILLSWITCH` and `DEMOTIONS`. A rule that can't be applied
drops nothing: who is in doubt lets an activation run.
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
    """Activations of a task to drop: all of them, or those of which one of these arguments is just this value."""

    name: str
    args: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}

    @property
    def is_selective(self) -> bool:
        """Whether arguments are looked at."""
        return bool(self.args or self.kwargs)


class Rules(msgspec.Struct, kw_only=True):
    """The rules of one environment. `demotions`: the queue that takes the place of another, by that one's name."""

    kills: list[Kill] = []
    demotions: dict[str, str] = {}

    def is_killed(self, name: str, arguments: Callable[[], Arguments | None]) -> bool:
        """Whether an activation of a task is dropped. `arguments` answers what it is called with, None when unknown."""
        for kill in self.kills:
            if kill.name != name:
                continue
            if not kill.is_selective or _matches(kill, arguments()):
                return True
        return False

    def queue_for(self, queue: str) -> str:
        """Where a queue's activations go; a demotion is followed once, so a circle is none."""
        return self.demotions.get(queue, queue)


NO_RULES: Final = Rules()


def rules_of(kept: Mapping[str, bytes]) -> Rules:
    """The rules as they are kept. Raises `StoreBroken` for what is none."""
    try:
        return Rules(
            kills=msgspec.json.decode(kept.get(KILLSWITCH, b"[]"), type=list[Kill]),
            demotions=msgspec.json.decode(kept.get(DEMOTIONS, b"{}"), type=dict[str, str]),
        )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreBroken(f"the rules of this environment can't be read: {error}") from None


def kills_encoded(kills: Sequence[Kill]) -> bytes:
    """A killswitch as it is kept. Raises `InvalidInput` when it is more than is looked at for each activation."""
    if len(kills) > KILLS_MAX or any(len(kill.args) + len(kill.kwargs) > SELECTORS_MAX for kill in kills):
        raise InvalidInput(f"a killswitch is at most {KILLS_MAX} rules of {SELECTORS_MAX} arguments")
    for kill in kills:
        if any(not place.isascii() or not place.isdigit() for place in kill.args):
            raise InvalidInput("arguments by place are named by numbers from 0", task=kill.name)
    return msgspec.json.encode(kills)


def demotions_encoded(demotions: Mapping[str, str]) -> bytes:
    """Demotions as they are kept. Raises `InvalidInput` for too many, and for one that changes nothing."""
    if len(demotions) > DEMOTIONS_MAX:
        raise InvalidInput(f"at most {DEMOTIONS_MAX} queues are demoted")
    if any(queue == target for queue, target in demotions.items()):
        raise InvalidInput("a queue is demoted to another one")
    return msgspec.json.encode(demotions)


def _matches(kill: Kill, arguments: Arguments | None) -> bool:
    if arguments is None:
        return False
    placed, named = arguments
    if any(int(place) < len(placed) and is_same(placed[int(place)], value) for place, value in kill.args.items()):
        return True
    return any(name in named and is_same(named[name], value) for name, value in kill.kwargs.items())


def is_same(one: Any, other: Any) -> bool:
    """Equal and of one type, all the way down: 1 is neither True nor 1.0."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)

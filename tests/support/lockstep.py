"""Two stores that get the same calls and must return the same results.

Each store has span ids of its own. They are matched when a claim returns them, and translated from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.core.span import Settlement
from headrace.foundation.errors import HeadraceError
from headrace.store.protocol import Heartbeat, Lease, Release, Store, Suspects


class LockStep:
    """A `Store` by its methods: every call goes to both stores, and the result of the first is returned."""

    def __init__(self, first: Store, second: Store) -> None:
        self._first = first
        self._second = second
        self._ids: dict[int, int] = {}

    def __getattr__(self, verb: str) -> Any:
        async def both(*arguments: Any, **more: Any) -> Any:
            mine = await answer_of(self._first, verb, arguments, more)
            theirs = await answer_of(self._second, verb, [self._translated(argument) for argument in arguments], more)
            if isinstance(mine, list) and isinstance(theirs, list):
                for first_lease, second_lease in zip(mine, theirs, strict=False):
                    if isinstance(first_lease, Lease) and isinstance(second_lease, Lease):
                        self._ids[first_lease.span_id] = second_lease.span_id
            assert self._plain(mine, self._ids) == self._plain(theirs, None), (verb, arguments, more)
            if isinstance(mine, HeadraceError):
                raise mine
            return mine

        return both

    def _translated(self, argument: Any) -> Any:
        if isinstance(argument, Settlement | Release):
            return msgspec.structs.replace(argument, span_id=self._ids[argument.span_id])
        if isinstance(argument, Suspects) and argument.span_slots is not None:
            span_slots = {(self._ids[span_id], token): slots for (span_id, token), slots in argument.span_slots.items()}
            return Suspects(span_slots=span_slots, evidence=argument.evidence)
        if isinstance(argument, list):
            return [self._translated(argument_part) for argument_part in argument]
        return argument

    def _plain(self, answer: Any, ids: Mapping[int, int] | None) -> Any:
        """Convert a result to plain values; `ids` translates span ids of the first store."""
        if isinstance(answer, HeadraceError):
            return type(answer).__name__
        if isinstance(answer, Heartbeat):
            held = [(ids[lease.span_id] if ids else lease.span_id, *lease[1:]) for lease in answer.leases]
            return sorted(held), sorted(answer.stopped), sorted(answer.cancelled)
        if isinstance(answer, msgspec.Struct):
            named = {name: self._plain(value, ids) for name, value in msgspec.structs.asdict(answer).items()}
            if ids is not None and "span_id" in named:
                named["span_id"] = ids[named["span_id"]]
            return named
        if isinstance(answer, Mapping):
            return {name: self._plain(value, ids) for name, value in answer.items()}
        if isinstance(answer, Sequence) and not isinstance(answer, str | bytes):
            return [self._plain(part, ids) for part in answer]
        return answer


async def answer_of(store: Store, verb: str, arguments: Sequence[Any], more: Mapping[str, Any]) -> Any:
    """Return the result of an operation; an error is a result too."""
    try:
        return await getattr(store, verb)(*arguments, **more)
    except HeadraceError as error:
        return error

"""The states of a run: one table.

Rule 1: a state is one byte. The states of hundreds of runs are one small value that the database rewrites at once and
that a person can read in a shell: `cccwwwf`. Rule 2: every change of state is a pair in `TRANSITIONS`. A pair that is
not listed is an error and changes nothing. The diagram in ARCHITECTURE.md is drawn from the same table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Final

from headrace.foundation.errors import IllegalTransition

WAITING: Final = ord("w")
STARTED: Final = ord("s")
COMPLETED: Final = ord("c")
FAILED: Final = ord("f")
CANCELLED: Final = ord("x")
EXPIRED: Final = ord("e")
MOVED: Final = ord("m")

NAMES: Final[dict[int, str]] = {
    WAITING: "waiting",
    STARTED: "started",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "cancelled",
    EXPIRED: "expired",
    MOVED: "moved",
}
BY_NAME: Final[dict[str, int]] = {name: state for state, name in NAMES.items()}

UNSETTLED: Final = bytes((WAITING, STARTED))
FINAL: Final = bytes((COMPLETED, FAILED, CANCELLED, EXPIRED))

ENDED_BADLY: Final = bytes((FAILED, CANCELLED, EXPIRED))
"""Outcomes that a person may want to redrive; the run's idempotency key is free again after one of them."""

TRANSITIONS: Final[dict[tuple[int, int], str]] = {
    (WAITING, STARTED): "delivered, recorded before (at-most-once)",
    (WAITING, COMPLETED): "settled, or linked to another run at ingest",
    (WAITING, FAILED): "settled, or refused at ingest",
    (WAITING, CANCELLED): "cancelled",
    (WAITING, EXPIRED): "not started in time",
    (WAITING, MOVED): "split off",
    (STARTED, WAITING): "released before it ran",
    (STARTED, COMPLETED): "settled",
    (STARTED, FAILED): "settled, or lost with its worker",
    (STARTED, CANCELLED): "cancelled",
    (STARTED, EXPIRED): "delivered too late to run",
    (STARTED, MOVED): "split off",
    (FAILED, MOVED): "redriven",
    (CANCELLED, MOVED): "redriven",
    (EXPIRED, MOVED): "redriven",
}


def check_transition(old: int, new: int) -> None:
    """Raise `IllegalTransition` unless the table lists the pair."""
    if (old, new) not in TRANSITIONS:
        raise IllegalTransition(
            f"a {NAMES.get(old, old)} run can't become {NAMES.get(new, new)}",
            hint="headrace.core.run.TRANSITIONS lists the allowed changes",
        )


def changed(states: bytes, changes: Iterable[tuple[int, int]]) -> bytes:
    """Return `states` after `(slot, new state)` changes, each checked against the table; all or none."""
    after = bytearray(states)
    for slot, new in changes:
        check_transition(after[slot], new)
        after[slot] = new
    return bytes(after)


def at(states: bytes, slots: Sequence[int]) -> bytes:
    """Return the states at some slots."""
    if len(slots) < 2:
        return bytes(states[slot] for slot in slots)
    return bytes(itemgetter(*slots)(states))


def ended(states: bytes, slots: Sequence[int], codes: bytes) -> bytes:
    """Return what `changed` returns if none of these slots has an outcome and each is named once, without checking
    every pair.
    """
    after = bytearray(states)
    for slot, code in zip(slots, codes, strict=True):
        after[slot] = code
    return bytes(after)


def unsettled_count(states: bytes) -> int:
    """Return the number of runs that have no outcome and have not moved."""
    return states.count(WAITING) + states.count(STARTED)


def slots_of(states: bytes, *selected_states: int) -> list[int]:
    """Return the slots whose state is one of `wanted`, ascending."""
    return [slot for slot, state in enumerate(states) if state in selected_states]


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> waiting"]
    lines += [f"    {NAMES[old]} --> {NAMES[new]}: {why}" for (old, new), why in TRANSITIONS.items()]
    lines += [f"    {NAMES[state]} --> [*]" for state in FINAL]
    return "\n".join(lines)

"""Check of the first items of a map, before anything is stored.

A map whose items all have the wrong shape would fail once for each of them. So the first items are decoded as a worker
will decode them. The first one that fits ends the check: of a slow stream nothing is held back longer than that.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Final

from headrace.cli.maps.input import Input
from headrace.core.ndjson import Item, NdjsonMachine, Oversized, Unreadable
from headrace.core.pack import JSON
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import Limits
from headrace.runtime.tasks.superjson import PayloadRefused
from headrace.runtime.tasks.task_spec import TaskSpec

CHECKED_ITEMS: Final = 100
"""Items that must all be invalid for a map to be refused; an input with fewer items is never refused."""


async def check_first_items(source: Input, spec: TaskSpec, limits: Limits) -> None:
    """Raise `InvalidInput` if none of the first items fits the task. What was read is read again by the feed."""
    machine = NdjsonMachine(item_bytes_max=limits.item_bytes_max)
    reasons: list[str] = []
    async with aclosing(source.look_ahead()) as pieces:
        async for piece in pieces:
            for item in machine.feed(piece):
                reason = _reason(item, spec)
                if reason is None:
                    return
                reasons.append(reason)
                if len(reasons) == CHECKED_ITEMS:
                    raise _refused(source, spec, reasons)


def _reason(item: Item, spec: TaskSpec) -> str | None:
    """Return why an item can't be the arguments of a task, or None if it can."""
    if isinstance(item, Unreadable):
        return item.reason
    if isinstance(item, Oversized):
        return f"line {item.line} has {item.actual_bytes:,} bytes, expected at most {item.max_bytes:,} (item_bytes_max)"
    try:
        spec.codec.decode(item, JSON)
    except PayloadRefused as error:
        return str(error)
    return None


def _refused(source: Input, spec: TaskSpec, reasons: list[str]) -> InvalidInput:
    from headrace.runtime.tasks.payload_example import examples

    shapes = examples(spec.codec)
    form = f"a line of the input looks like {' or '.join(shapes)}" if shapes else "correct the input"
    return InvalidInput(
        f"none of the first {len(reasons)} items of {source.shown_name} fits the task "
        f"{spec.name}{spec.codec.signature}: {reasons[0]}",
        hint=f"{form}; nothing was stored",
    )

"""An indexer whose events list the operations that its handler performs: changes of two entities, effects and runs."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from headrace import Headrace
from headrace.indexer import Entity, HandlerContext, Indexed, Indexer, any_of, between


class Cell(Entity):
    id: int
    value: int = 0
    colour: Indexed[str] = "none"
    level: Indexed[int] = 0


class Note(Entity):
    id: str
    text: str = ""
    seen: list[int] = []


class Op(msgspec.Struct):
    """An operation: its name and up to three small numbers."""

    do: str
    a: int = 0
    b: int = 0
    c: int = 0


class Ops(msgspec.Struct, tag_field="type", tag="ops"):
    """An event: operations, and the turns of the event loop that the handler waits before each of them."""

    ops: list[Op]
    turns: int = 0


COLOURS = ("none", "red", "green", "blue")
OPERATIONS = (
    "add", "paint", "move", "delete", "where", "where_in", "where_range", "where_both", "many", "effect", "enqueue", "note",
    "mutate", "recreate",
)  # fmt: skip


def scripted_indexer(app: Headrace, source: Any, **options: Any) -> Indexer:
    """Return an indexer whose handler performs the operations of its events.

    Each value it reads is stored in a row, so that a wrong read shows in the tables.
    """
    indexer = app.indexer(
        "programs", source=source, entities=[Cell, Note], history=options.pop("history", "all"), **options
    )

    async def job(n: int, why: str) -> None: ...

    task: Any = app.task(job) if "job" not in app.registry else _RegisteredTask(app)

    @indexer.effect()
    async def double(n: int) -> int:
        return n * 2

    @indexer.on("ops")
    async def on_ops(event: Ops, ctx: HandlerContext) -> None:
        for op in event.ops:
            for _ in range(event.turns):
                await asyncio.sleep(0)
            await _do(op, ctx, double, task)

    return indexer


class _RegisteredTask:
    """The task `job` of an app that has registered it already."""

    def __init__(self, app: Headrace) -> None:
        self._spec = app.registry.get("job")

    def request(self, *args: Any, **kwargs: Any) -> Any:
        from headrace.runtime.tasks.call_options import Options

        return self._spec, Options(), self._spec.codec.encode(args, kwargs)


def mixed_events(count: int) -> list[tuple[int, Ops]]:
    """Return events that each write both tables and call an effect; every fourth also deletes a row and enqueues a run."""
    return [
        (
            n,
            Ops(
                [
                    Op("add", n % 5, n),
                    Op("note", n % 2, n, n),
                    Op("effect", n % 3),
                    *([] if n % 4 else _EXTRA_OPERATIONS),
                ]
            ),
        )
        for n in range(1, count + 1)
    ]


_EXTRA_OPERATIONS = [Op("delete", 4), Op("enqueue", 1)]


async def _do(op: Op, ctx: HandlerContext, double: Any, task: Any) -> None:
    if op.do in ("add", "paint", "move"):
        cell = await ctx.get_or_create(Cell, op.a)
        changes: dict[str, dict[str, Any]] = {
            "add": {"value": cell.value + op.b}, "paint": {"colour": COLOURS[op.b % 4]}, "move": {"level": op.b},
        }  # fmt: skip
        ctx.set(msgspec.structs.replace(cell, **changes[op.do]))
    elif op.do == "delete":
        ctx.delete(Cell, op.a)
    elif op.do == "recreate":
        ctx.delete(Cell, op.a)
        assert await ctx.get(Cell, op.a) is None
        ctx.set(Cell(op.a, op.b, COLOURS[op.c % 4]))
    elif op.do.startswith("where"):
        rows = await {
            "where": lambda: ctx.where(Cell, colour=COLOURS[op.a % 4]),
            "where_in": lambda: ctx.where(Cell, colour=any_of(COLOURS[op.a % 4], COLOURS[op.b % 4])),
            "where_range": lambda: ctx.where(Cell, level=between(min(op.a, op.b), max(op.a, op.b))),
            "where_both": lambda: ctx.where(Cell, colour=COLOURS[op.a % 4], level=op.b),
        }[op.do]()
        ctx.set(Note(f"{op.do}{op.c % 3}", repr(rows)))
    elif op.do == "many":
        ctx.set(Note(f"many{op.c % 3}", repr(await ctx.get_many(Cell, [op.a, op.b, op.a]))))
    elif op.do == "effect":
        ctx.set(Note(f"effect{op.c % 3}", str(await ctx.effect(double, op.a))))
    elif op.do == "enqueue":
        ctx.enqueue(task, op.a, why=f"{ctx.source}:{ctx.position}")
    elif op.do == "note":
        note = await ctx.get_or_create(Note, f"n{op.a}")
        ctx.set(Note(note.id, note.text + str(op.b)[:1], [*note.seen[-3:], op.c]))
    else:
        note = await ctx.get_or_create(Note, f"n{op.a}")
        note.seen.append(op.b)  # changes only the copy that this handler got

"""Handlers that do what their events say: any sequence of operations on two entities, effects and runs."""

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
    """One operation: its name and up to three small numbers."""

    do: str
    a: int = 0
    b: int = 0
    c: int = 0


class Ops(msgspec.Struct, tag_field="type", tag="ops"):
    """An event: operations, and how many turns of the loop the handler waits before each."""

    ops: list[Op]
    turns: int = 0


COLOURS = ("none", "red", "green", "blue")
OPERATIONS = (
    "add", "paint", "move", "delete", "where", "where_in", "where_range", "where_both", "many", "effect", "enqueue", "note",
    "mutate", "recreate",
)  # fmt: skip


def make(app: Headrace, source: Any, **options: Any) -> Indexer:
    """An indexer whose handler does what events say. Everything it reads ends up in a row, so nothing is read in vain."""
    indexer = app.indexer(
        "programs", source=source, entities=[Cell, Note], history=options.pop("history", "all"), **options
    )

    async def job(n: int, why: str) -> None: ...

    task: Any = app.task(job) if "job" not in app.registry else _Known(app)

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


class _Known:
    def __init__(self, app: Headrace) -> None:
        self._spec = app.registry.get("job")

    def request(self, *args: Any, **kwargs: Any) -> Any:
        from headrace.runtime.tasks.call_options import Options

        return self._spec, Options(), self._spec.codec.encode(args, kwargs)


def busy(count: int) -> list[tuple[int, Ops]]:
    """Events of which each writes both tables and calls an effect, and every fourth deletes a row and enqueues a run."""
    return [
        (n, Ops([Op("add", n % 5, n), Op("note", n % 2, n, n), Op("effect", n % 3), *([] if n % 4 else _FOURTH)]))
        for n in range(1, count + 1)
    ]


_FOURTH = [Op("delete", 4), Op("enqueue", 1)]


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
        found = await {
            "where": lambda: ctx.where(Cell, colour=COLOURS[op.a % 4]),
            "where_in": lambda: ctx.where(Cell, colour=any_of(COLOURS[op.a % 4], COLOURS[op.b % 4])),
            "where_range": lambda: ctx.where(Cell, level=between(min(op.a, op.b), max(op.a, op.b))),
            "where_both": lambda: ctx.where(Cell, colour=COLOURS[op.a % 4], level=op.b),
        }[op.do]()
        ctx.set(Note(f"{op.do}{op.c % 3}", repr(found)))
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
        note.seen.append(op.b)  # its own copy: nobody else may see it

"""Closing a SQLite file to writers, for a move to another store.

Triggers do it, so that a process that has had the file open all along is kept out too, and nobody else pays for it.
"""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from typing import Final

from headrace.foundation.errors import Conflict
from headrace.store.sqlite.script_runner import SQL, statements_of

FENCED: Final = "headrace: fenced"
"""What the triggers say."""


def fence(connection: sqlite3.Connection, move_id: str, target: str, now_us: int) -> tuple[str, bool]:
    """Take no writes any more: `(id of the move, whether it had begun before)`, at once with the look around."""
    known = _known(connection)
    if known is not None:
        own_id, own_target, finished_us = known
        if finished_us:
            raise Conflict(f"this file was moved to {own_target} already", hint=f"use --store {own_target}")
        if own_target != target:
            raise Conflict(
                f"this file is being moved to {own_target}, not to {target}",
                hint="go on with that move, or give it up with --undo",
            )
        return own_id, True
    live = connection.execute(SQL["sessions"]).fetchall()
    if live:
        who = ", ".join(f"{kind} {pid} on {host}" for _, kind, host, pid, *_ in live[:5])
        raise Conflict(f"{len(live)} processes work on this file: {who}", hint="stop them, then move")
    connection.execute(SQL["begin_move"], {"id": move_id, "target": target, "now_us": now_us})
    _apply(connection, "write_fence.sql")
    return move_id, False


def finish(connection: sqlite3.Connection, now_us: int) -> None:
    """Everything is elsewhere; the fence stays."""
    connection.execute(SQL["finish_move"], {"now_us": now_us})


def unfence(connection: sqlite3.Connection) -> str:
    """Take writes again, where a move was begun and is not over; answers its id."""
    known = _known(connection)
    if known is None:
        raise Conflict("no move of this file is under way", hint="there is nothing to undo")
    if known[2]:
        raise Conflict(f"this file was moved to {known[1]}, where its runs may have gone on", hint="use it there")
    connection.execute(SQL["forget_move"])
    _apply(connection, "write_unfence.sql")
    return known[0]


def _known(connection: sqlite3.Connection) -> tuple[str, str, int] | None:
    row = connection.execute(SQL["move_state"]).fetchone()
    if row is None:
        return None
    move_id, target, finished_us = row
    return move_id, target, int(finished_us)


def _apply(connection: sqlite3.Connection, name: str) -> None:
    for statement in statements_of(files("headrace.store.sqlite").joinpath(name).read_text(encoding="utf-8")):
        connection.execute(statement)

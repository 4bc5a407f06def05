"""Blocking of all writes to a SQLite file, for a copy to another store.

Triggers block them, so processes that have the file open are blocked too, and other files pay nothing for it.
"""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from typing import Final

from headrace.foundation.errors import Conflict
from headrace.store.sqlite.script_runner import SQL, statements_of

FENCED: Final = "headrace: fenced"
"""The message of the triggers."""


def fence(connection: sqlite3.Connection, move_id: str, target: str, now_us: int) -> tuple[str, bool]:
    """Block all writes: `(id of the copy, True if it had begun before)`, in one transaction with the check for live
    sessions.
    """
    copy_state = _copy_state(connection)
    if copy_state is not None:
        own_id, own_target, finished_us = copy_state
        if finished_us:
            raise Conflict(f"this file was moved to {own_target} already", hint=f"use --store {own_target}")
        if own_target != target:
            raise Conflict(
                f"this file is being moved to {own_target}, not to {target}",
                hint="continue that move, or undo it with --undo",
            )
        return own_id, True
    live = connection.execute(SQL["sessions"]).fetchall()
    if live:
        who = ", ".join(f"{kind} {pid} on {host}" for _, kind, host, pid, *_ in live[:5])
        raise Conflict(
            f"expected no other process on this file, got {len(live)}: {who}", hint="stop them, then move the file"
        )
    connection.execute(SQL["begin_move"], {"id": move_id, "target": target, "now_us": now_us})
    _apply(connection, "write_fence.sql")
    return move_id, False


def finish(connection: sqlite3.Connection, now_us: int) -> None:
    """Mark the copy as complete; writes stay blocked."""
    connection.execute(SQL["finish_move"], {"now_us": now_us})


def unfence(connection: sqlite3.Connection) -> str:
    """Allow writes again if a copy was begun and is not complete. Returns its id."""
    copy_state = _copy_state(connection)
    if copy_state is None:
        raise Conflict("this file is not being moved", hint="there is no move to undo")
    if copy_state[2]:
        raise Conflict(
            f"the move can't be undone: this file was moved to {copy_state[1]}, where its runs may have continued",
            hint="use that store",
        )
    connection.execute(SQL["forget_move"])
    _apply(connection, "write_unfence.sql")
    return copy_state[0]


def _copy_state(connection: sqlite3.Connection) -> tuple[str, str, int] | None:
    row = connection.execute(SQL["move_state"]).fetchone()
    if row is None:
        return None
    move_id, target, finished_us = row
    return move_id, target, int(finished_us)


def _apply(connection: sqlite3.Connection, name: str) -> None:
    for statement in statements_of(files("headrace.store.sqlite").joinpath(name).read_text(encoding="utf-8")):
        connection.execute(statement)

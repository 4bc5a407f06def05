"""Runner of statements, scripts and SQL files on one SQLite connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar

from headrace.store.statements import statements
from headrace.store.transactions.sql_script import Rows, Script

T = TypeVar("T")

SQL: Final = {name: statement.sql for name, statement in statements("headrace.store.sqlite").items()}


def run_script(connection: sqlite3.Connection, script: Script[T], check: Callable[[], None] | None = None) -> T:
    """Run a script step by step. A database error is raised to the caller, not inside the script.

    `check` is called before each statement, and may raise to end the script.
    """
    rows: Rows = []
    try:
        ask = next(script)
        while True:
            if check is not None:
                check()
            rows = connection.execute(SQL[ask.name], ask.values).fetchall()
            ask = script.send(rows)
    except StopIteration as done:
        answer: T = done.value
        return answer


def statements_of(script: str) -> list[str]:
    """Split a file into its statements."""
    complete, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            complete.append(pending)
            pending = ""
    return complete

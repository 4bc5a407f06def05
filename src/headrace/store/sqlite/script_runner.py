"""Statements, scripts and files of SQL on one SQLite connection."""

from __future__ import annotations

import sqlite3
from typing import Final, TypeVar

from headrace.store.statements import statements
from headrace.store.transactions.sql_script import Rows, Script

T = TypeVar("T")

SQL: Final = {name: statement.sql for name, statement in statements("headrace.store.sqlite").items()}


def run_script(connection: sqlite3.Connection, script: Script[T]) -> T:
    """Run a script step by step. An error of the database goes to the caller, not into the script."""
    rows: Rows = []
    try:
        ask = next(script)
        while True:
            rows = connection.execute(SQL[ask.name], ask.values).fetchall()
            ask = script.send(rows)
    except StopIteration as done:
        answer: T = done.value
        return answer


def statements_of(script: str) -> list[str]:
    """The statements of a file, one by one."""
    found, pending = [], ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            found.append(pending)
            pending = ""
    return found

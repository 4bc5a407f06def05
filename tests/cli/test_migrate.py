"""`headrace migrate`, and commands that must not migrate."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.cli.conftest import Shell


def test_migrate_creates_a_database(shell: Shell) -> None:
    ran = shell("migrate", "--store", "sqlite:///other.db")
    assert ran.code == 0
    assert "is at schema version" in ran.out
    assert (shell.place / "other.db").exists()
    assert shell("batch", "list", "--store", "sqlite:///other.db").out == "no batches\n"


def test_migrate_check_reports_a_schema_that_is_not_current_and_changes_nothing(shell: Shell) -> None:
    before = sorted(shell.place.iterdir())
    ran = shell("migrate", "--check")
    assert (ran.code, "is not current: expected the tables of Headrace in headrace.db, got none" in ran.out) == (
        1,
        True,
    )
    assert shell("migrate", "--check", "--json").json["is_current"] is False
    assert sorted(shell.place.iterdir()) == before
    shell("migrate")
    ran = shell("migrate", "--check")
    assert (ran.code, ran.out) == (0, "sqlite:///headrace.db is at schema version 1, which is current\n")
    assert shell("migrate", "--check", "--json").json["is_current"] is True


READING = [
    ("batch", "list"),
    ("batch", "show", "x"),
    ("run", "list"),
    ("queue", "list"),
    ("schedule", "list"),
    ("dead", "list"),
    ("key", "list"),
    ("killswitch", "list"),
    ("verify",),
    ("prune",),
    ("doctor",),
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
@pytest.mark.parametrize("exists", [True, False])
def test_a_command_that_reads_creates_nothing_in_another_database(
    shell: Shell, command: tuple[str, ...], exists: bool
) -> None:
    if exists:
        with closing(sqlite3.connect("own.db")) as connection:
            connection.execute("CREATE TABLE batch (id INTEGER)")
            connection.commit()
    before = {path: path.read_bytes() for path in shell.place.iterdir() if path.is_file()}
    ran = shell(*command, "--store", "sqlite:///own.db")
    assert ran.code != 0
    reason = "expected the tables of Headrace in own.db" if exists else "there is no database at own.db"
    assert reason in " ".join((ran.out + ran.err).split())
    assert {path: path.read_bytes() for path in shell.place.iterdir() if path.is_file()} == before


def test_a_worker_that_must_not_migrate_says_what_to_run(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_MIGRATE", "never")
    ran = shell("worker", "tasks.py:app")
    assert (ran.code, "expected the tables of Headrace in headrace.db, got none" in ran.err) == (1, True), ran.err
    assert "headrace migrate" in ran.err
    assert not (shell.place / "headrace.db").exists()
    assert shell("migrate").code == 0, "the setting does not apply to the command itself"

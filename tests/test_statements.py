"""Every SQL statement has a name, a sentence, and a verb that uses it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from headrace.store.statements import Statement, migrations, statements

PACKAGES = ["headrace.store.sqlite", "headrace.store.postgres"]
ANSWERED_BY_THE_DRIVER = {"headrace.store.postgres": {"take_ids"}}
STATEMENTS = [(package, statement) for package in PACKAGES for statement in statements(package).values()]


def code_of(package: str) -> str:
    """All Python of a package, and of the scripts that name its statements."""
    folders = [Path(str(files(package))), Path(str(files("headrace.store.transactions")))]
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py")))


@pytest.mark.parametrize(("package", "statement"), STATEMENTS, ids=lambda value: getattr(value, "name", ""))
def test_a_statement_is_used_and_says_what_it_means(package: str, statement: Statement) -> None:
    assert f'"{statement.name}"' in code_of(package), "nobody runs it"
    assert len(statement.meaning.split()) >= 3
    assert statement.sql.count(";") == 1
    assert statement.sql.endswith(";")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_statement_that_the_code_names_exists(package: str) -> None:
    named = set(re.findall(r'fetch(?:_one|_first)?\((?:connection,)?\s*"([a-z_]+)"', code_of(package)))
    assert named
    assert named - ANSWERED_BY_THE_DRIVER.get(package, set()) <= statements(package).keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_code_holds_sql_of_its_own(package: str) -> None:
    written = re.findall(r'"(?:SELECT|INSERT|UPDATE|DELETE|CREATE)\b[^"]*"', code_of(package))
    assert [sql for sql in written if sql != '"SELECT 1"'] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_values_are_bound_by_name_and_never_formatted_in(package: str) -> None:
    for statement in statements(package).values():
        text = re.sub(r"'[^']*'", "", statement.sql.replace("{schema}.", ""))
        assert "{" not in text, statement.name
        assert "?" not in text, statement.name


@pytest.mark.parametrize("package", PACKAGES)
def test_migrations_are_numbered_from_one(package: str) -> None:
    assert [number for number, _ in migrations(package)] == list(range(1, len(migrations(package)) + 1))

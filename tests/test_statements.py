"""Every SQL statement has a name, a sentence, and a verb that uses it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from headrace.store.statements import Fragment, Statement, expanded, migrations, parsed, statements
from headrace.store.transactions.api_keys import ApiKeyRow
from headrace.store.transactions.indexer import IndexerRow
from headrace.store.transactions.row_mapping import BatchRow, PartRow, SpanRow
from headrace.store.transactions.schedules import ScheduleRow

PACKAGES = ["headrace.store.sqlite", "headrace.store.postgres"]
ANSWERED_BY_THE_DRIVER = {"headrace.store.postgres": {"take_ids"}}
ROWS: dict[str, Any] = {
    "span_columns": SpanRow,
    "batch_columns": BatchRow,
    "part_columns": PartRow,
    "api_key_columns": ApiKeyRow,
    "schedule_columns": ScheduleRow,
    "indexer_columns": IndexerRow,
}
STATEMENTS = [(package, statement) for package in PACKAGES for statement in statements(package).values()]


def code_of(package: str) -> str:
    """All Python of a package, and of the scripts that name its statements."""
    folders = [Path(str(files(package))), Path(str(files("headrace.store.transactions")))]
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py")))


@pytest.mark.parametrize(("package", "statement"), STATEMENTS, ids=lambda value: getattr(value, "name", ""))
def test_a_statement_is_used_and_says_what_it_means(package: str, statement: Statement) -> None:
    assert f'"{statement.name}"' in code_of(package), "no code runs it"
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


def sql_of(package: str) -> list[str]:
    """Return the texts of a package's SQL files, and of the fragments that all databases use."""
    paths = [Path(str(files("headrace.store")), "fragments.sql"), *Path(str(files(package)), "sql").glob("*.sql")]
    return [path.read_text(encoding="utf-8") for path in paths]


def fragments_of(package: str) -> dict[str, Fragment]:
    """Return the fragments of a package's SQL files."""
    _, fragments = parsed(sql_of(package))
    return fragments


@pytest.mark.parametrize("package", PACKAGES)
def test_every_fragment_of_a_dialect_is_used_and_expanded(package: str) -> None:
    """`statements` raises for a fragment that no statement uses; here, that none is left in a statement."""
    fragments = fragments_of(package)
    assert ROWS.keys() <= fragments.keys()
    for statement in statements(package).values():
        assert not re.search(rf"\{{({'|'.join(fragments)})\b", statement.sql), statement.name


def test_both_dialects_have_the_fragments_of_the_completion_rule_and_of_the_columns() -> None:
    sqlite, postgres = (fragments_of(package) for package in PACKAGES)
    assert sqlite.keys() - postgres.keys() == set()
    for name in {"ends_batch", *ROWS}:
        assert sqlite[name] == postgres[name]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_completion_rule_is_written_once(package: str) -> None:
    assert len(re.findall(r"completed_count \+ failed_count", "".join(sql_of(package)))) == 1


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("fragment", ROWS)
def test_a_row_type_has_the_columns_of_its_fragment_in_their_order(package: str, fragment: str) -> None:
    columns = re.sub(r"\{table\}", "", fragments_of(package)[fragment].text).replace("\n", " ").split(",")
    offsets = {"positions": "block_offsets"} if fragment in ("span_columns", "part_columns") else {}
    assert tuple(offsets.get(column.strip(), column.strip()) for column in columns) == ROWS[fragment]._fields


FRAGMENTS = {
    "ends": Fragment("ends", ["count"], "received = {count} AND of({schema}.batch)"),
    "columns": Fragment("columns", [], "id, state"),
    "nested": Fragment("nested", [], "{columns}, more"),
}


def test_a_fragment_is_expanded_with_its_arguments() -> None:
    used: set[str] = set()
    sql = expanded("SELECT {columns} FROM {schema}.batch WHERE {ends(:n::int)} OR {ends(0)}", FRAGMENTS, used)
    assert sql == (
        "SELECT id, state FROM {schema}.batch WHERE received = :n::int AND of({schema}.batch) "
        "OR received = 0 AND of({schema}.batch)"
    )
    assert used == {"ends", "columns"}


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT {unknown}", "unknown SQL fragment {unknown}"),
        ("SELECT {nested}", "the SQL fragment nested holds {columns}"),
        ("SELECT {ends}", "the SQL fragment ends takes 1 arguments, got 0"),
        ("SELECT {columns(id)}", "the SQL fragment columns takes 0 arguments, got 1"),
    ],
)
def test_a_fragment_that_is_unknown_nested_or_called_wrongly_is_an_error(sql: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        expanded(sql, FRAGMENTS, set())


def test_an_argument_is_not_expanded_again() -> None:
    fragments = {"own": Fragment("own", ["value"], "{value}")}
    assert expanded("SELECT {own(columns)}", fragments | FRAGMENTS, set()) == "SELECT columns"


@pytest.mark.parametrize("second", ["-- one: read it again", "-- fragment one: a list of columns"])
def test_a_name_is_used_once_by_statements_and_fragments(second: str) -> None:
    with pytest.raises(ValueError, match="the SQL name one is used twice"):
        parsed([f"-- one: read a row\nSELECT 1;\n\n{second}\nSELECT 1;\n"])

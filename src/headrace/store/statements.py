"""SQL in files: each statement has a name and a description, and is loaded once.

A file holds statements, and the fragments that several statements share:

    -- fragment span_columns(table): the columns of a span, each with a prefix
    {table}id, {table}state

    -- claim_candidates: read the best waiting spans of one lane, in claim order
    SELECT {span_columns(span.)} FROM span ...;

A fragment is replaced once, when the files are loaded, and holds no other fragment. Nothing else is ever put into the
text of a statement, except the name of a schema on PostgreSQL (`{schema}`); the driver binds all values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

_NAME: Final = re.compile(r"(?<![:\w]):([a-z_]+)")
_HEAD: Final = re.compile(r"^-- (fragment )?([a-z][a-z0-9_]*)(?:\(([a-z_, ]*)\))?: (.+)$", re.MULTILINE)
_USE: Final = re.compile(r"\{([a-z_]+)(?:\(([^(){}]*)\))?\}")
_COMMENT: Final = re.compile(r"^--.*\n", re.MULTILINE)
SCHEMA: Final = "schema"
"""The one name in braces that is no fragment: a store on PostgreSQL replaces it by its schema."""


class Statement(NamedTuple):
    """One named statement with the sentence that describes it."""

    name: str
    meaning: str
    sql: str


class Fragment(NamedTuple):
    """Text that several statements share; each of `parameters` stands in it in braces."""

    name: str
    parameters: Sequence[str]
    text: str


class Numbered(NamedTuple):
    """A statement whose values are written `$1`, `$2`, …, and their names in that order."""

    sql: str
    names: list[str]


def numbered(sql: str) -> Numbered:
    """Number a statement's values, for drivers that take no names. `::` is a cast and not a value."""
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return Numbered(_NAME.sub(number, sql), names)


def expanded(sql: str, fragments: Mapping[str, Fragment], used: set[str]) -> str:
    """Replace each fragment in a statement by its text, and add its name to `used`.

    Raises `ValueError` for an unknown fragment, for a wrong number of arguments, and for a fragment in a fragment.
    """

    def text_of(match: re.Match[str]) -> str:
        name = match[1]
        if name == SCHEMA:
            return match[0]
        fragment = fragments.get(name)
        if fragment is None:
            raise ValueError(f"unknown SQL fragment {{{name}}}, known are: {', '.join(sorted(fragments))}")
        arguments = [] if match[2] is None else [argument.strip() for argument in match[2].split(",")]
        if len(arguments) != len(fragment.parameters):
            raise ValueError(
                f"the SQL fragment {name} takes {len(fragment.parameters)} arguments, got {len(arguments)}: {match[0]}"
            )
        by_name = dict(zip(fragment.parameters, arguments, strict=True))

        def argument_of(inner: re.Match[str]) -> str:
            if inner[1] in by_name and inner[2] is None:
                return by_name[inner[1]]
            if inner[1] == SCHEMA:
                return inner[0]
            raise ValueError(f"the SQL fragment {name} holds {inner[0]}, expected only its own parameters")

        used.add(name)
        return _USE.sub(argument_of, fragment.text)

    return _USE.sub(text_of, sql)


def parsed(texts: Sequence[str]) -> tuple[list[Statement], dict[str, Fragment]]:
    """Split SQL files into their statements, as written, and their fragments.

    Raises `ValueError` when a name is used twice.
    """
    by_name: dict[str, Statement] = {}
    fragments: dict[str, Fragment] = {}
    for text in texts:
        pieces = _HEAD.split(text)
        for kind, name, parameters, meaning, sql in zip(*(pieces[start::5] for start in range(1, 6)), strict=True):
            if name in by_name or name in fragments:
                raise ValueError(f"the SQL name {name} is used twice")
            if kind:
                names = [parameter.strip() for parameter in parameters.split(",")] if parameters else []
                fragments[name] = Fragment(name, names, _COMMENT.sub("", sql).strip())
            else:
                by_name[name] = Statement(name, meaning, sql.strip())
    return list(by_name.values()), fragments


@cache
def statements(package: str) -> dict[str, Statement]:
    """Load all statements in the `.sql` files of a package's `sql` folder, by name, with their fragments expanded.

    Fragments are those of these files, and of `fragments.sql` beside this module, which all databases use. Raises
    `ValueError` for a name that is used twice, and for a fragment that is unknown, unused or nested.
    """
    folder = files(package).joinpath("sql")
    shared = files(__package__).joinpath("fragments.sql")
    texts = [
        file.read_text(encoding="utf-8") for file in (shared, *sorted(folder.iterdir(), key=lambda path: path.name))
    ]
    written, fragments = parsed(texts)
    used: set[str] = set()
    by_name = {
        statement.name: statement._replace(sql=expanded(statement.sql, fragments, used)) for statement in written
    }
    if unused := fragments.keys() - used:
        raise ValueError(f"unused SQL fragments: {', '.join(sorted(unused))}")
    return by_name


@cache
def migrations(package: str) -> list[tuple[int, str]]:
    """Load the numbered migrations of a package, `(number, script)`, in order.

    Raises `ValueError` when their numbers do not begin at 1 or leave a gap.
    """
    scripts = sorted(
        (int(file.name.split("_")[0]), file.read_text(encoding="utf-8"))
        for file in files(package).joinpath("migrations").iterdir()
        if file.name.endswith(".sql")
    )
    if [number for number, _ in scripts] != list(range(1, len(scripts) + 1)):
        raise ValueError(f"expected migrations numbered from 1 without a gap, got {[number for number, _ in scripts]}")
    return scripts

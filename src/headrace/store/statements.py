"""SQL as files: every statement has a name and a sentence, and is loaded once.

A file holds statements of the form

    -- claim_candidates: the best waiting spans of one lane, in claim order
    SELECT ...;

No text is ever put into SQL but what the file says; values are bound by the driver.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

_NAME: Final = re.compile(r"(?<![:\w]):([a-z_]+)")
_HEAD: Final = re.compile(r"^-- ([a-z][a-z0-9_]*): (.+)$", re.MULTILINE)


class Statement(NamedTuple):
    """One named statement with the sentence that describes it."""

    name: str
    meaning: str
    sql: str


class Numbered(NamedTuple):
    """A statement whose values are written `$1`, `$2`, …, and their names in that order."""

    sql: str
    names: list[str]


def numbered(sql: str) -> Numbered:
    """A statement's values numbered, for drivers that know no names; `::` is a cast and not a value."""
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return Numbered(_NAME.sub(number, sql), names)


@cache
def statements(package: str) -> dict[str, Statement]:
    """All statements in the `.sql` files of a package's `sql` folder, by name. Raises `ValueError` on a second use."""
    found: dict[str, Statement] = {}
    for file in sorted(files(package).joinpath("sql").iterdir(), key=lambda path: path.name):
        pieces = _HEAD.split(file.read_text(encoding="utf-8"))
        for name, meaning, sql in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            if name in found:
                raise ValueError(f"two statements are called {name}")
            found[name] = Statement(name, meaning, sql.strip())
    return found


@cache
def migrations(package: str) -> list[tuple[int, str]]:
    """The numbered migrations of a package, `(number, script)`, in order and without a gap."""
    scripts = sorted(
        (int(file.name.split("_")[0]), file.read_text(encoding="utf-8"))
        for file in files(package).joinpath("migrations").iterdir()
        if file.name.endswith(".sql")
    )
    if [number for number, _ in scripts] != list(range(1, len(scripts) + 1)):
        raise ValueError("migrations are numbered from 1 without a gap")
    return scripts

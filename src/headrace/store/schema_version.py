"""Comparison of the schema version in a database with the version of this code."""

from __future__ import annotations

from headrace.foundation.errors import SchemaOutdated, StoreBroken


def check_known(place: str, version: int, newest: int) -> None:
    """Raise `StoreBroken` for a schema of a newer Headrace. `place` names the database."""
    if version > newest:
        raise StoreBroken(
            f"expected schema version {newest}, got {version} in {place}",
            hint="upgrade Headrace, or name another store with --store",
        )


def check_current(place: str, version: int, newest: int) -> None:
    """Raise `SchemaOutdated` for an older schema or none (version 0), and `StoreBroken` for a newer one."""
    check_known(place, version, newest)
    if version < newest:
        raise SchemaOutdated(
            f"expected schema version {newest}, got {version} in {place}"
            if version
            else f"expected the tables of Headrace in {place}, got none",
            hint="run `headrace migrate` once, or name another store with --store",
        )

"""Rules of an environment: decisions of its operators, each a named value."""

from __future__ import annotations

from headrace.store.transactions.sql_script import Script, fetch


def rules(environment: str) -> Script[dict[str, bytes]]:
    """Return the rules by name."""
    return {name: bytes(value) for name, value in (yield from fetch("rules", environment=environment))}


def keep_rules(environment: str, name: str, value: bytes, before: bytes | None) -> Script[bool]:
    """Store a rule, unless it changed since `before` was read."""
    rows = yield from fetch("keep_rules", environment=environment, name=name, value=value, before=before)
    return bool(rows)

"""`headrace migrate`: create or upgrade the database schema."""

from __future__ import annotations

from headrace.cli.opening import JsonOption, StoreOption, opened, run_async, settings_of, shown_store
from headrace.cli.printing import say, say_json


def command(store: StoreOption = None, json: JsonOption = False) -> None:
    """Create the schema in an empty database, or upgrade an older one. Opening a store does the same."""
    settings = settings_of(store=store)

    async def migrate() -> dict[str, object]:
        async with opened(settings) as engine:
            return await engine.store.check()

    report = run_async(migrate())
    if json:
        say_json(report)
    else:
        say(f"{shown_store(settings)} is at schema version {report.get('schema_version', '-')}")

"""`headrace migrate`: create or upgrade the database schema."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.invocation.opening import JsonOption, StoreOption, run_async, settings_of, shown_store
from headrace.cli.invocation.printing import say, say_json
from headrace.foundation.errors import SchemaOutdated


def command(
    store: StoreOption = None,
    json: JsonOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if the schema is not current.")
    ] = False,
) -> None:
    """Create the schema in an empty database, or upgrade an older one.

    Opening a store does the same, unless the setting `migrate` is `never`.
    """
    settings = settings_of(store=store)

    async def migrate() -> dict[str, object]:
        from headrace.compose import open_engine

        engine = await open_engine(settings, migrates=not check)
        try:
            return await engine.store.check()
        finally:
            await engine.close()

    place = shown_store(settings)
    try:
        report = run_async(migrate())
    except SchemaOutdated as outdated:
        if not check:
            raise
        if json:
            say_json({"is_current": False, "reason": outdated.message})
        else:
            say(f"{place} is not current: {outdated.message}; run `headrace migrate`")
        raise typer.Exit(1) from None
    if json:
        say_json({"is_current": True, **report})
    else:
        say(f"{place} is at schema version {report.get('schema_version', '-')}{', which is current' if check else ''}")

"""`headrace move`: copy a SQLite store to PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cli.invocation.opening import JsonOption, opened, run_async
from headrace.cli.invocation.printing import counted, note, say, say_json

if TYPE_CHECKING:
    from headrace.foundation.settings import Settings
    from headrace.runtime.maintenance.store_copy import CopyReport


def command(
    source: Annotated[str, typer.Argument(metavar="sqlite:///FILE", help="The SQLite file to move.")],
    target: Annotated[str, typer.Argument(metavar="postgresql://…", help="The PostgreSQL database to move it to.")],
    objects: Annotated[str | None, typer.Option(metavar="URL", help="The object store of the target.")] = None,
    source_objects: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The object store of the source. Default: the directory beside the file."),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Cancel an unfinished move: the source accepts writes again.")
    ] = False,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show or hide the progress.")] = True,
    json: JsonOption = False,
) -> None:
    """Move batches, runs, outcomes and payloads from a SQLite file to PostgreSQL, while no process uses the file.

    The file is closed to writers first, and stays closed. After an interruption, repeat the command to resume. At the
    end, the runs of each batch are counted on both sides. Nothing is deleted.
    """
    source_settings = _settings(source, source_objects)
    target_settings = _settings(target, objects)
    if undo:
        run_async(_undone(source_settings, target_settings))
        say(f"{source} accepts writes again")
        return
    moved = run_async(_moved(source_settings, target_settings, shows_progress=progress and not json))
    for key in moved.objects_missing:
        note(f"warning: the payload {key} was missing in the source; its run will fail")
    if json:
        say_json(moved)
    else:
        say(
            f"{counted(moved.batches, 'batch')} with {counted(moved.runs, 'run')} copied"
            f"{' by this command' if moved.resumed else ''}, {counted(moved.objects, 'object')}; both ledgers agree\n"
            f"the file is closed to writers and may be deleted; use --store {shown_target(target_settings)} from now on"
        )


def shown_target(settings: Settings) -> str:
    """Return the target's URL without its password."""
    from headrace.cli.invocation.opening import shown_store

    return shown_store(settings)


async def _moved(source_settings: Settings, target_settings: Settings, *, shows_progress: bool) -> CopyReport:
    from headrace.cli.invocation.progress import ProgressState, display
    from headrace.compose import mover

    async with opened(source_settings, must_exist=True) as source, opened(target_settings) as target:
        move = mover(source, target)
        progress_display = display(is_wanted=shows_progress, label="moving")
        try:
            return await move.run(
                shown_target(target_settings),
                lambda runs, total: progress_display.update(ProgressState(runs, 0, total)),
            )
        finally:
            progress_display.close()


async def _undone(source_settings: Settings, target_settings: Settings) -> None:
    from headrace.compose import mover

    async with opened(source_settings, must_exist=True) as source, opened(target_settings) as target:
        await mover(source, target).undo()


def _settings(store: str, objects: str | None) -> Settings:
    """Load the settings of one side: its own store and objects, without those of the other."""
    from headrace.foundation.settings import load

    sides = {name: value for name, value in os.environ.items() if name not in ("HEADRACE_STORE", "HEADRACE_OBJECTS")}
    given = objects if objects is not None or store.startswith("sqlite") else os.environ.get("HEADRACE_OBJECTS")
    return load({"store": store, "objects": given}, sides, Path.cwd())

"""`headrace demo`: a map over real input that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from headrace.cli.invocation.opening import JsonOption, opened, run_async, settings_of
from headrace.cli.invocation.printing import counted, duration, note, say, say_json, size

if TYPE_CHECKING:
    from headrace.cli.maps.mapping import Summary
    from headrace.demo import Digest, Items
    from headrace.foundation.settings import Settings
    from headrace.store.protocol import Verification

FAILED_SHOWN: Final = 5
OUT_OF_BALANCE: Final = 4
INTERRUPTED: Final = 130


def command(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIRECTORY", help="The directory to work in. Default: a temporary one."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The store of the batches. Default: a SQLite file in the directory."),
    ] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Hide the progress bar.")] = False,
    json: JsonOption = False,
) -> None:
    """Outline every module of this machine's Python standard library, in child processes."""
    import tempfile

    from headrace.cli.maps.mapping import Mapping, load_task
    from headrace.demo import INLINE_BYTES_MAX, digest, paths_of, write_items
    from headrace.foundation.errors import InvalidInput

    try:
        place = Path(tempfile.mkdtemp(prefix="headrace-demo-")) if directory is None else directory.absolute()
        place.mkdir(parents=True, exist_ok=True)
        items = write_items(place / "modules.ndjson")
    except OSError as error:
        raise InvalidInput(
            f"the demo can't write to {directory or tempfile.gettempdir()}: {error.strerror or error}",
            hint="name a writable directory with --dir",
        ) from error
    app, task = load_task("headrace.examples.stdlib:outline")
    settings = settings_of(app, store=store or f"sqlite:///{place / 'headrace.db'}", inline_bytes_max=INLINE_BYTES_MAX)
    if not json:
        note(
            f"{counted(items.modules_count, 'module')} of the standard library, {size(items.bytes_count)}; "
            f"{items.large_count:,} are large and go through the object store"
        )
    output = place / "outlines.ndjson"
    mapping = Mapping.prepare(
        settings,
        app,
        task,
        input_name=str(items.path),
        output_name=str(output),
        batch_key="",
        fresh=False,
        shows_progress=not no_progress,
    )
    with mapping:
        summary = run_async(mapping.run())
    if summary.exit_code == INTERRUPTED:
        note(f"interrupted; to resume: headrace demo --dir {place}")
        raise typer.Exit(INTERRUPTED)
    verifications = run_async(_verified(settings, summary.batches))
    with output.open("rb") as results:
        summary_digest = digest(results, paths_of(items.path))
    is_balanced = all(not verification.differences and verification.ledger.balances for verification in verifications)
    if json:
        say_json(
            {"summary": summary, "digest": summary_digest._asdict(), "balances": is_balanced, "directory": str(place)}
        )
    else:
        _report(items, summary, summary_digest, place, is_balanced=is_balanced)
    if not is_balanced:
        raise typer.Exit(OUT_OF_BALANCE)


async def _verified(settings: Settings, batch_ids: list[str]) -> list[Verification]:
    async with opened(settings) as engine:
        return [await engine.store.verify(batch_id) for batch_id in batch_ids]


def _report(items: Items, summary: Summary, summary_digest: Digest, place: Path, *, is_balanced: bool) -> None:
    say("")
    say(f"  {counted(summary_digest.modules, 'module')}, {summary_digest.lines:,} lines")
    say(f"  {counted(summary_digest.functions, 'function')}, {counted(summary_digest.classes, 'class')}")
    say("")
    width = max((len(path) for path, _ in summary_digest.largest), default=0)
    for heading, (path, count) in zip(
        ("largest", *[""] * len(summary_digest.largest)), summary_digest.largest, strict=False
    ):
        say(f"  {heading:<9}{path:<{width}}  {count:>7,} lines")
    say("")
    say(f"  {'names':<9}" + ", ".join(f"{name} ({count})" for name, count in summary_digest.commonest))
    say("")
    if summary_digest.failed:
        say(f"  {len(summary_digest.failed)} could not be outlined:")
        for path, why in summary_digest.failed[:FAILED_SHOWN]:
            say(f"    {path}: {why if len(why) <= 90 else why[:89] + '…'}")
        if len(summary_digest.failed) > FAILED_SHOWN:
            say(f"    and {len(summary_digest.failed) - FAILED_SHOWN} more: see the results")
        say("")
    ran_count = summary.completed + summary.failed - summary.done_before
    if ran_count:
        say(
            f"  {counted(ran_count, 'run')} in {duration(summary.seconds)}, {summary.runs_per_s:,.0f} runs/s; "
            f"each was stored durably before it ran"
        )
    else:
        say(f"  all {counted(items.modules_count, 'run')} were done by an earlier command; none ran again")
    say(
        f"  the ledger {'balances' if is_balanced else 'DOES NOT BALANCE'}: {summary.completed:,} completed, "
        f"{summary.failed:,} failed, {summary.runs:,} in all"
    )
    say(f"  results: {place / 'outlines.ndjson'}")
    say(f"  next: headrace batch list --store {summary.store}")

"""`headrace verify`: count the runs of batches from their chunks and compare with the counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from headrace.cli.inspection.batch_lookup import find_batch
from headrace.cli.invocation.opening import (
    JsonOption,
    ServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import counted, say, say_json

if TYPE_CHECKING:
    from headrace.runtime.engine import Engine
    from headrace.store.protocol import Verification

OUT_OF_BALANCE: Final = 4
PAGE_BATCHES: Final = 200


def command(
    batch: Annotated[str, typer.Argument(metavar="[BATCH]", help="A batch id or key. Default: all batches.")] = "",
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Count every run again and compare with the counters. Exit codes: 0 they agree, 4 they do not."""
    settings = settings_of(store=place_of(store, server))

    async def count() -> list[Verification]:
        async with opened(settings, must_exist=True) as engine:
            if batch:
                return [await engine.store.verify((await find_batch(engine, batch)).id)]
            return await verify_all(engine)

    verifications = run_async(count())
    wrong = [verification for verification in verifications if differences_of(verification)]
    if json:
        say_json(
            {
                "balances": not wrong,
                "batches": [
                    {
                        "batch": verification.batch_id,
                        "balances": not differences_of(verification),
                        "ledger": verification.ledger._asdict(),
                        "differences": differences_of(verification),
                    }
                    for verification in verifications
                ],
            }
        )
    else:
        for verification in wrong:
            say(f"{verification.batch_id} does not balance:")
            for difference in differences_of(verification):
                say(f"  {difference}")
        runs_count = sum(verification.ledger.expected for verification in verifications)
        verdict = f"{len(wrong):,} of them do not balance" if wrong else "the ledger balances"
        say(f"{counted(len(verifications), 'batch')}, {counted(runs_count, 'run')}: {verdict}")
    if wrong:
        raise typer.Exit(OUT_OF_BALANCE)


async def verify_all(engine: Engine) -> list[Verification]:
    """Verify every batch of the environment."""
    verifications: list[Verification] = []
    before_id = ""
    while True:
        page = await engine.store.batches(engine.environment, before_id=before_id, limit=PAGE_BATCHES)
        verifications += [await engine.store.verify(batch.id) for batch, _ in page]
        if not page:
            return verifications
        before_id = page[-1][0].id


def differences_of(verification: Verification) -> list[str]:
    """Return the differences of a batch, and whether its counts add up."""
    broken_sums = [] if verification.ledger.balances else [f"the counts do not add up: {verification.ledger._asdict()}"]
    return [*verification.differences, *broken_sums]

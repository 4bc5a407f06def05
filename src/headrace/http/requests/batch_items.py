"""Ingestion of a request's items into a batch, shared by trigger.dev's API and `/v1`."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from headrace.core.batch import LISTED, BatchRecord
from headrace.foundation.errors import Conflict, InvalidInput
from headrace.http.requests.error_responses import Forbidden, Unprocessable
from headrace.http.requests.item_codec import HttpItemDecoder
from headrace.http.requests.request_body import body_pieces
from headrace.http.requests.service import RequestContext, Service
from headrace.runtime.producing.indexed_feed import FeedCounts, IndexedFeed, IndexOutside, UnreadableItem

TASKS_OF_BATCH: Final = "taskIdentifiers"
"""Key in a batch's metadata for the tasks that it was created for, if a token may write to it and they are several."""
TASKS_SHOWN: Final = 10


def tasks_of_token(batch: BatchRecord) -> frozenset[str] | None:
    """Return the tasks that a public token may send to a batch; None if the batch was created for no tasks by name."""
    if batch.task:
        return frozenset((batch.task,))
    names = batch.metadata.get(TASKS_OF_BATCH)
    return frozenset(map(str, names)) if isinstance(names, list) else None


async def ingest_items(
    service: Service, context: RequestContext, request: Request, batch: BatchRecord, *, ignores_unknown: bool = False
) -> FeedCounts:
    """Read the items of a request into a batch. Raises errors of reading and of storing.

    `ignores_unknown`: fields of an item that are unknown, and no misspelt known ones, are ignored.
    """
    engine = context.engine
    tasks = None if context.principal.may("batches:write") else tasks_of_token(batch)

    def may_run(task: str) -> None:
        if tasks is not None and task not in tasks:
            names = ", ".join(map(repr, sorted(tasks)[:TASKS_SHOWN]))
            raise Forbidden(f"the token allows only the batch's tasks ({names}), not {task[:60]!r}")

    decoder = HttpItemDecoder(
        defaults=service.default_key,
        limits=service.limits,
        now_us=engine.clock.now_us(),
        may_run=may_run,
        fetched=lambda name: service.packets.fetched(
            context.environment, name, bytes_max=service.limits.packet_bytes_max
        ),
        batch_task=batch.task,
        ignores_unknown=ignores_unknown,
    )
    intake = IndexedFeed(engine, batch, decoder)
    try:
        taken = await intake.run(body_pieces(request, service.limits), meter=service.metrics.bytes.inc)
    except IndexOutside as error:
        raise Unprocessable(error.message, hint=error.hint, batch_id=batch.id) from None
    except UnreadableItem as error:
        raise InvalidInput(error.message, hint=error.hint) from None
    except Conflict as error:
        raise Unprocessable(error.message, hint=error.hint, batch_id=batch.id) from None
    finally:
        service.metrics.items.labels("accepted").inc(intake.counts.accepted_count)
        service.metrics.items.labels("duplicate").inc(intake.counts.duplicates_count)
    return taken


async def seal_if_complete(context: RequestContext, batch: BatchRecord, taken: FeedCounts) -> BatchRecord:
    """Seal a batch if none of its items is missing; otherwise return it unsealed.

    Raises `Unprocessable` if the batch was cancelled or abandoned.
    """
    if taken.sealed is not None:
        context.engine.recorded.notify()
        return taken.sealed
    if batch.expected_count is None:
        return (await context.engine.store.batch(batch.id))[0]
    try:
        after = await context.engine.store.seal(batch.id, None, now_us=context.engine.clock.now_us())
    except Conflict:
        after = (await context.engine.store.batch(batch.id))[0]
        if after.is_stopped:
            raise Unprocessable(
                f"Batch {batch.id} is in unexpected state (status: ABORTED, sealed: {bool(after.sealed_us)}). "
                "Cannot seal batch.",
                batch_id=batch.id,
            ) from None
    context.engine.recorded.notify()
    return after


def check_accepts_items(batch: BatchRecord) -> None:
    """Raise `Unprocessable` for a batch whose indexes are assigned by a producer."""
    if batch.kind != LISTED:
        raise Unprocessable(f"Batch {batch.id} holds single runs and accepts no items", batch_id=batch.id)

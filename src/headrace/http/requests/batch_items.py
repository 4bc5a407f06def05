"""Items of a request's body into a batch, for both APIs that stream them: trigger.dev's and `/v1`."""

from __future__ import annotations

from starlette.requests import Request

from headrace.core.batch import LISTED, Batch
from headrace.foundation.errors import Conflict, InvalidInput
from headrace.http.requests.error_responses import Forbidden, Unprocessable
from headrace.http.requests.item_codec import ItemDecoder
from headrace.http.requests.request_body import pieces
from headrace.http.requests.service import Call, Service
from headrace.runtime.producing.indexed_feed import IndexOutside, Intake, Taken, UnreadableItem


async def take(service: Service, call: Call, request: Request, batch: Batch) -> Taken:
    """Read a body of items into a batch. Raises what reading and storing raise."""
    engine = call.engine
    token_only = not call.principal.may("batches:write")

    def may_run(task: str) -> None:
        if token_only and batch.task and task != batch.task:
            raise Forbidden(f"this token is for a batch of {batch.task}")

    decoder = ItemDecoder(
        defaults=service.defaults,
        limits=service.limits,
        now_us=engine.clock.now_us(),
        may_run=may_run,
        fetched=lambda name: service.packets.fetched(call.environment, name, bytes_max=service.limits.packet_bytes_max),
    )
    intake = Intake(engine, batch, decoder)
    try:
        taken = await intake.run(pieces(request, service.limits), meter=service.metrics.bytes.inc)
    except IndexOutside as error:
        raise Unprocessable(error.message, hint=error.hint, batch_id=batch.id) from None
    except UnreadableItem as error:
        raise InvalidInput(error.message, hint=error.hint) from None
    except Conflict as error:
        raise Unprocessable(error.message, hint=error.hint, batch_id=batch.id) from None
    finally:
        service.metrics.items.labels("accepted").inc(intake.taken.accepted_count)
        service.metrics.items.labels("duplicate").inc(intake.taken.duplicates_count)
    return taken


async def sealed(call: Call, batch: Batch, taken: Taken) -> Batch:
    """The batch sealed when nothing of it is missing, else as it stands. Raises `Unprocessable` when it was stopped."""
    if taken.sealed is not None:
        call.engine.recorded.ring()
        return taken.sealed
    if batch.expected_count is None:
        return (await call.engine.store.batch(batch.id))[0]
    try:
        after = await call.engine.store.seal(batch.id, None, now_us=call.engine.clock.now_us())
    except Conflict:
        after = (await call.engine.store.batch(batch.id))[0]
        if after.is_stopped:
            raise Unprocessable(
                f"Batch {batch.id} is in unexpected state (status: ABORTED, sealed: {bool(after.sealed_us)}). "
                "Cannot seal batch.",
                batch_id=batch.id,
            ) from None
    call.engine.recorded.ring()
    return after


def check_listed(batch: Batch) -> None:
    """Raise `Unprocessable` for a batch whose indexes its producer gives out."""
    if batch.kind != LISTED:
        raise Unprocessable(f"Batch {batch.id} holds single runs, and takes no items", batch_id=batch.id)

"""Resolution of recorded results, which may be stored inline, in the object store, or be a link to another run."""

from __future__ import annotations

from typing import Final

from headrace.core import pack, run
from headrace.foundation.errors import NotFound
from headrace.foundation.ids import parse_run_id
from headrace.http.requests.service import RequestContext
from headrace.store.protocol import RunOutcome, RunRecord

LINKS_MAX: Final = 16
_GONE = b'{"type":"RunGone","message":"the run with this idempotency key was deleted by retention"}'


class ResultResolver:
    """Resolves results of one environment."""

    def __init__(self, context: RequestContext) -> None:
        self._call = context

    async def resolve(self, outcome: RunOutcome) -> RunOutcome | None:
        """Return the outcome, or that of the run it links to; None if that run has not ended."""
        for _ in range(LINKS_MAX):
            if outcome.state != run.COMPLETED or outcome.kind != pack.LINK:
                return outcome
            view = await self.linked_run(outcome.result)
            if view is None:
                return RunOutcome(index=outcome.index, state=run.FAILED, result=_GONE, kind=pack.JSON)
            state = run.BY_NAME.get(view.state, run.WAITING)
            if state not in run.FINAL:
                return None
            outcome = RunOutcome(index=outcome.index, state=state, result=view.result, kind=view.result_kind)
        return None

    async def linked_run(self, link: bytes) -> RunRecord | None:
        """Return the run that a link names; None if it was deleted or belongs to another environment."""
        batch_id, index = parse_run_id(link.decode())
        try:
            view = await self._call.engine.store.run(batch_id, index)
        except NotFound:
            return None
        return view if view.environment == self._call.environment else None

    async def output_bytes(self, outcome: RunOutcome) -> tuple[bytes, int]:
        """Return a completed run's output and its kind. Fetches outputs that are in the object store."""
        if outcome.kind == pack.REFERENCE:
            return await self._call.engine.fetch(outcome.result)
        return outcome.result, outcome.kind

    async def output_text(self, outcome: RunOutcome) -> tuple[str, str]:
        """Return an output as text and its content type, as trigger.dev's clients expect."""
        data, kind = await self.output_bytes(outcome)
        return data.decode("utf-8", "replace"), pack.CONTENT_TYPES[kind]

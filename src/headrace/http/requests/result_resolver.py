"""What a recorded result stands for: itself, an object, or another run."""

from __future__ import annotations

from typing import Final

from headrace.core import pack, run
from headrace.foundation.errors import NotFound
from headrace.foundation.ids import parse_run_id
from headrace.http.requests.service import Call
from headrace.store.protocol import Outcome, RunRecord

LINKS_MAX: Final = 16
_GONE = b'{"type":"RunGone","message":"the run that has this idempotency key was pruned"}'


class Outputs:
    """Results of one environment, followed to where they are."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def resolved(self, one: Outcome) -> Outcome | None:
        """The outcome itself, or of the run that it links to; None while that has not ended."""
        for _ in range(LINKS_MAX):
            if one.state != run.COMPLETED or one.kind != pack.LINK:
                return one
            view = await self.target(one.result)
            if view is None:
                return Outcome(index=one.index, state=run.FAILED, result=_GONE, kind=pack.JSON)
            state = run.BY_NAME.get(view.state, run.WAITING)
            if state not in run.FINAL:
                return None
            one = Outcome(index=one.index, state=state, result=view.result, kind=view.result_kind)
        return None

    async def target(self, link: bytes) -> RunRecord | None:
        """The run that a link names; None when it is gone, or not of this environment."""
        batch_id, index = parse_run_id(link.decode())
        try:
            view = await self._call.engine.store.run(batch_id, index)
        except NotFound:
            return None
        return view if view.environment == self._call.environment else None

    async def bytes(self, one: Outcome) -> tuple[bytes, int]:
        """A completed run's output and its kind, fetched where it lies elsewhere."""
        if one.kind == pack.REFERENCE:
            return await self._call.engine.fetch(one.result)
        return one.result, one.kind

    async def text(self, one: Outcome) -> tuple[str, str]:
        """An output as the field's clients take it: a string, and what it is."""
        data, kind = await self.bytes(one)
        return data.decode("utf-8", "replace"), pack.CONTENT_TYPES[kind]

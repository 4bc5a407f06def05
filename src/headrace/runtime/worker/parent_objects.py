"""Objects of a child process that can't open the object store itself: its parent reads and writes them.

The store may be the parent's memory, a server, or a database whose connections belong to the parent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from headrace.foundation.errors import HeadraceError, InvalidInput, ObjectMissing, StoreBroken, StoreUnavailable
from headrace.runtime.engine import Engine
from headrace.runtime.worker.process_ipc import FetchObject, ObjectAnswer, PutResult

_ERRORS: Final[Mapping[str, type[HeadraceError]]] = {
    error.code: error for error in (InvalidInput, ObjectMissing, StoreBroken, StoreUnavailable)
}


class ParentObjects:
    """The child's end: requests that wait for their answers. Used on the child's event loop."""

    def __init__(self, send: Callable[[FetchObject | PutResult], None]) -> None:
        self._send = send
        self._next_no = 0
        self._waiting: dict[int, asyncio.Future[ObjectAnswer]] = {}

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        """Return the payload that a reference names, and its kind."""
        answer = await self._asked(lambda number: FetchObject(number, reference))
        return answer.data, answer.kind

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        """Store a result; return its reference and the object's key."""
        answer = await self._asked(lambda number: PutResult(number, batch_id, result))
        return answer.data, answer.key

    def resolve(self, answer: ObjectAnswer) -> None:
        """Give an answer to the request that waits for it; a cancelled request has none."""
        waiting = self._waiting.pop(answer.request_no, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def _asked(self, request: Callable[[int], FetchObject | PutResult]) -> ObjectAnswer:
        self._next_no += 1
        number = self._next_no
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(request(number))
            answer: ObjectAnswer = await waiting
        finally:
            self._waiting.pop(number, None)
        if answer.error_code:
            raise _ERRORS.get(answer.error_code, StoreBroken)(answer.error, hint=answer.hint)
        return answer


async def answer_of(engine: Engine, request: FetchObject | PutResult) -> ObjectAnswer:
    """Return the parent's answer to a request of a child."""
    try:
        if isinstance(request, FetchObject):
            data, kind = await engine.fetch(request.reference)
            return ObjectAnswer(request.request_no, data=data, kind=kind)
        reference, key = await engine.put_result(request.batch_id, request.result)
        return ObjectAnswer(request.request_no, data=reference, key=key)
    except HeadraceError as error:
        return ObjectAnswer(
            request.request_no,
            error_code=StoreUnavailable.code if error.retryable else error.code,
            error=error.message,
            hint=error.hint,
        )

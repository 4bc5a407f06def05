"""A tenant that knows the ids of others: it sends their requests again under its own environment or key, and invents
tokens. Each of its requests must be refused, and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from headrace.core.span import LOST, RECORDED
from headrace.foundation.errors import SessionEnded
from headrace.store.memory import MemoryStore
from headrace.store.protocol import Heartbeat, SessionOwner
from tests.simulation.invariant_monitor import result_of

REQUESTS_BETWEEN: Final = 25
OWNERS: Final = (SessionOwner("intruder", ""), SessionOwner("default", "key_intruder"))
REFUSED: Final = (None, Heartbeat(leases=[], stopped=[], cancelled=[]))
"""Answers that tell nothing: the end of a session answers like a repeat, and a session of others has no runs."""
FAR: Final = 1_000_003
"""Distance to an invented token: the next one may be right, and servers sign tokens for that reason."""
Forged = tuple[Sequence[Any], dict[str, Any]]


class Intruder:
    """Forges copies of one request in 25 of other processes. `on_fault` gets what succeeded."""

    def __init__(self, store: MemoryStore, on_fault: Callable[[str], None]) -> None:
        self._store = store
        self._on_fault = on_fault
        self._seen_count = 0
        self.forged_count = 0

    def see(self, operation: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """See a request, and send forged copies of it before it is performed. False if there are none."""
        self._seen_count += 1
        if self._seen_count % REQUESTS_BETWEEN:
            return False
        before_count = self.forged_count
        for forged_args, forged_kwargs in _forged(operation, args, kwargs):
            self.forged_count += 1
            try:
                response = result_of(getattr(self._store, operation)(*forged_args, **forged_kwargs))
            except SessionEnded:
                continue
            if response not in REFUSED and not (isinstance(response, list) and {LOST, RECORDED}.issuperset(response)):
                self._on_fault(f"a forged {operation} was answered {response!r:.100}")
        return self.forged_count > before_count


def _forged(operation: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Forged]:
    """Yield forged copies of a request."""
    if operation == "claim":
        for owner in OWNERS:
            yield [msgspec.structs.replace(args[0], environment=owner.environment, key_id=owner.key_id)], kwargs
    elif operation in ("heartbeat", "unwanted_runs", "end_session"):
        for owner in OWNERS:
            yield args, {**kwargs, "owner": owner}
    elif operation in ("settle", "release"):
        yield [[msgspec.structs.replace(update, token=update.token + FAR) for update in args[0]]], kwargs

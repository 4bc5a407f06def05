"""The lease of an indexer: one process per indexer, and the decision whether its holder is alive.

Clocks of different machines are never compared. A holder sends heartbeats. A process that wants the lease checks
whether one came within `session_timeout_ms` of its own time. It does not wait for a holder on the same machine whose
process has ended. A wrong decision only interrupts the holder: the lease's token fences every commit.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec

from headrace.foundation.errors import Conflict
from headrace.runtime.engine import Engine
from headrace.store.entities.protocol import EntityStore, IndexerState


class LeaseHolder(msgspec.Struct, kw_only=True):
    """The holder of a lease, for people and for processes of the same machine."""

    host: str
    pid: int

    @classmethod
    def here(cls) -> LeaseHolder:
        """This process."""
        return cls(host=socket.gethostname(), pid=os.getpid())


class IndexerBusy(Conflict):
    """Another process runs the indexer."""

    code = "INDEXER_HELD"


async def lease(
    store: EntityStore, engine: Engine, state: IndexerState, *, wait: bool, on_waiting: Callable[[str], None] | None
) -> tuple[IndexerState, int]:
    """Take the lease when it is free, its holder has ended, or it lapses. Raises `IndexerBusy` unless `wait`."""
    holder = msgspec.json.encode(LeaseHolder.here()).decode()
    timeout_us = engine.limits.session_timeout_ms * 1_000
    seen_us = engine.clock.now_us()
    was_reported = False
    while True:
        lapsed = engine.clock.now_us() - seen_us >= timeout_us
        if not state.holder or _has_ended(state.holder) or lapsed:
            token = await store.take(state, holder)
            if token is not None:
                return await _current_state(store, state), token
        elif not wait:
            raise IndexerBusy(
                f"the indexer {state.name!r} already runs: it is held by {describe_holder(state.holder)}",
                hint="an indexer runs in one process: stop the other one, or wait for it",
                indexer=state.name,
            )
        elif not was_reported and on_waiting is not None:
            on_waiting(describe_holder(state.holder))
            was_reported = True
        await engine.clock.sleep(min(engine.limits.poll_interval_ms, engine.limits.session_timeout_ms / 4) / 1_000)
        current = await _current_state(store, state)
        if (current.token, current.beats) != (state.token, state.beats):
            state, seen_us = current, engine.clock.now_us()


async def _current_state(store: EntityStore, state: IndexerState) -> IndexerState:
    states = [stored for stored in await store.indexer_states(state.environment) if stored.name == state.name]
    return states[0] if states else state


def describe_holder(holder: str) -> str:
    """Describe a holder for people."""
    try:
        decoded = msgspec.json.decode(holder, type=LeaseHolder)
    except msgspec.MsgspecError:
        return repr(holder)
    return f"process {decoded.pid} on {decoded.host}"


def _has_ended(holder: str) -> bool:
    """True if the process of a holder on this machine has certainly ended."""
    try:
        decoded = msgspec.json.decode(holder, type=LeaseHolder)
    except msgspec.MsgspecError:
        return False
    if decoded.host != socket.gethostname():
        return False
    if decoded.pid == os.getpid():
        return False
    try:
        os.kill(decoded.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

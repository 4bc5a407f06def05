"""One process an indexer: taking the lease, and judging whether who holds it is alive.

No clock is compared with another machine's. A holder beats; whoever wants the lease looks whether it has beaten within
`session_timeout_ms` of its own time. One on this machine whose process is gone need not be waited for. A mistake costs
nothing but an interruption: the token of the lease fences every commit.
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
    """Who holds a lease, for people and for their neighbours."""

    host: str
    pid: int

    @classmethod
    def here(cls) -> LeaseHolder:
        """This process."""
        return cls(host=socket.gethostname(), pid=os.getpid())


class IndexerBusy(Conflict):
    """Another process works on the indexer."""

    code = "INDEXER_HELD"


async def lease(
    store: EntityStore, engine: Engine, standing: IndexerState, *, wait: bool, on_waiting: Callable[[str], None] | None
) -> tuple[IndexerState, int]:
    """Take the lease: when it is free, its holder is dead, or it lapses. Raises `IndexerBusy` unless `wait`."""
    holder = msgspec.json.encode(LeaseHolder.here()).decode()
    timeout_us = engine.limits.session_timeout_ms * 1_000
    seen_us = engine.clock.now_us()
    told = False
    while True:
        lapsed = engine.clock.now_us() - seen_us >= timeout_us
        if not standing.holder or _is_dead(standing.holder) or lapsed:
            token = await store.take(standing, holder)
            if token is not None:
                return await _seen(store, standing), token
        elif not wait:
            raise IndexerBusy(
                f"the indexer {standing.name!r} is worked on by {describe_holder(standing.holder)}",
                hint="one process an indexer: stop it there, or wait",
                indexer=standing.name,
            )
        elif not told and on_waiting is not None:
            on_waiting(describe_holder(standing.holder))
            told = True
        await engine.clock.sleep(min(engine.limits.poll_interval_ms, engine.limits.session_timeout_ms / 4) / 1_000)
        fresh = await _seen(store, standing)
        if (fresh.token, fresh.beats) != (standing.token, standing.beats):
            standing, seen_us = fresh, engine.clock.now_us()


async def _seen(store: EntityStore, standing: IndexerState) -> IndexerState:
    found = [own for own in await store.standings(standing.environment) if own.name == standing.name]
    return found[0] if found else standing


def describe_holder(holder: str) -> str:
    """A holder in words."""
    try:
        own = msgspec.json.decode(holder, type=LeaseHolder)
    except msgspec.MsgspecError:
        return repr(holder)
    return f"process {own.pid} on {own.host}"


def _is_dead(holder: str) -> bool:
    """Whether a holder on this machine is gone for certain."""
    try:
        own = msgspec.json.decode(holder, type=LeaseHolder)
    except msgspec.MsgspecError:
        return False
    if own.host != socket.gethostname():
        return False
    if own.pid == os.getpid():
        return False
    try:
        os.kill(own.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

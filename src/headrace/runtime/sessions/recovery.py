"""Sessions whose process is gone end, once, and their leases go back.

Rule 1: on the machine where it happened death is seen at once: the kernel gave up the lock on the marks. Elsewhere a
session counts as gone when it was silent for too long.
Rule 2: who sees it first recovers it; the store ends a session once, whoever asks (rule R3).
Rule 3: only runs that had begun and not ended are suspects; of a machine that can't be looked at, all are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from headrace.runtime.engine import Engine
from headrace.runtime.sessions.inflight_marks import dead_sessions, is_dead, merged, of_session, remove
from headrace.store.protocol import Session, Suspects

LOG: Any = structlog.get_logger("headrace.recovery")
STUCK_TIMEOUTS: Final = 20
"""Session timeouts after which a process counts as gone though it lives: stopped by a signal, or hung for good."""

DISPATCHER: Final = "dispatcher"
"""The kind of a session whose runs are with workers elsewhere: they go on when it dies, and may report to another."""

EVER_US: Final = 2**62
"""A dead process is silent, whatever it said last."""


class RecoveryCounts(NamedTuple):
    """What a look at all sessions came to: spans that came back, and when the next one may count as silent."""

    spans_count: int
    next_us: int


async def recover_here(engine: Engine, own_id: str) -> int:
    """Recover the sessions of this machine whose process died; answers how many spans came back.

    Costs the store nothing while nobody has died.
    """
    if engine.live_directory is None:
        return 0
    dead = set(dead_sessions(engine.live_directory)) - {own_id}
    if not dead:
        return 0
    known = {session.id: session for session in await engine.maintenance.sessions() if session.id in dead}
    spans_count = 0
    for session_id in sorted(dead):
        files = of_session(engine.live_directory, session_id)
        if session_id in known and _is_left(engine, known[session_id]):
            continue
        if session_id in known:
            evidence = f"{_who(known[session_id])} died"
            suspects = Suspects(span_slots=merged(files), evidence=evidence)
            spans_count += await _recover(engine, session_id, suspects, EVER_US)
            remove(files)
        else:  # it ended, or is not known yet; a file as old as that belongs to nobody who is still to come
            _remove_old(engine, files)
    return spans_count


async def recover_silent(engine: Engine, own_id: str) -> RecoveryCounts:
    """Recover the sessions that were silent for too long."""
    spans_count, next_us = 0, EVER_US
    for session in await engine.maintenance.sessions():
        if session.id == own_id:
            continue
        now_us, timeout_us = engine.clock.now_us(), _timeout_us(engine, session)
        files = of_session(engine.live_directory, session.id) if engine.live_directory is not None else []
        lives_here = bool(files) and is_dead(files[0]) is not None
        if lives_here:  # a run that blocks all of it for long is no death, but nothing waits for ever
            timeout_us *= STUCK_TIMEOUTS
            suspects = Suspects(span_slots=merged(files), evidence=f"{_who(session)} hung")
        else:
            suspects = Suspects(span_slots=None, evidence=f"{_who(session)} fell silent")
        if session.heartbeat_us <= now_us - timeout_us:
            spans_count += await _recover(engine, session.id, suspects, now_us - timeout_us)
        else:
            next_us = min(next_us, session.heartbeat_us + timeout_us)
    return RecoveryCounts(spans_count, next_us)


async def _recover(engine: Engine, session_id: str, suspects: Suspects, silent_since_us: int) -> int:
    count = await engine.maintenance.recover(
        session_id,
        suspects,
        silent_since_us=silent_since_us,
        crashes_max=engine.limits.crashes_max,
        now_us=engine.clock.now_us(),
    )
    if count:
        LOG.info("recovered the leases of a dead session", session=session_id, spans=count)
        engine.wakeup.notify()
    return count


def _timeout_us(engine: Engine, session: Session) -> int:
    """After how long of silence a session counts as gone."""
    limits = engine.limits
    if session.kind == DISPATCHER:
        return max(limits.session_timeout_ms, limits.delivery_recovery_ms) * 1_000
    return limits.session_timeout_ms * 1_000


def _is_left(engine: Engine, session: Session) -> bool:
    """Whether a dead session's leases are left to the reports of the workers that have its runs, for now."""
    return session.kind == DISPATCHER and session.heartbeat_us > engine.clock.now_us() - _timeout_us(engine, session)


def _who(session: Session) -> str:
    return f"process {session.pid} on {session.host}"


def _remove_old(engine: Engine, files: list[Path]) -> None:
    before_s = (engine.clock.now_us() / 1_000_000) - engine.limits.orphan_grace_ms / 1_000
    remove([path for path in files if path.exists() and path.stat().st_mtime < before_s])

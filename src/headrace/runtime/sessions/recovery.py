"""Recovery: ends the session of a process that is gone, once, and releases its leases.

Rule 1: on the same machine the end of a process is noticed at once, because the kernel has released the lock on its
marks. On other machines a session counts as gone when it has sent no heartbeat for too long. Rule 2: the first process
that notices recovers the session. The store ends a session only once (R3, a lapsed session is ended before it is
recovered). Rule 3: only runs that had begun and not ended are suspects. If the marks can't be read from this machine,
all runs are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

from headrace.foundation.ids import session_name
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine
from headrace.runtime.sessions.inflight_marks import ended_sessions, merged, of_session, owner_has_ended, remove
from headrace.store.protocol import Session, Suspects

LOG: Any = get_logger("headrace.recovery")
STUCK_TIMEOUTS: Final = 20
"""Session timeouts after which a process that still lives counts as gone: it was stopped by a signal, or hangs."""

DISPATCHER: Final = "dispatcher"
"""Kind of a session whose runs are with remote workers. They continue when the session ends, and may report
elsewhere.
"""

NEVER_US: Final = 2**62
"""Later than any heartbeat: the session of an ended process has lapsed, whenever its last heartbeat was."""


class RecoveryCounts(NamedTuple):
    """Result of one check of all sessions: recovered spans, and the earliest time at which another session may
    lapse.
    """

    spans_count: int
    next_us: int


async def recover_here(engine: Engine, own_id: str) -> int:
    """Recover the sessions of this machine whose process has ended; return the number of recovered spans.

    Does not query the store unless a process has ended.
    """
    if engine.live_directory is None:
        return 0
    ended = set(ended_sessions(engine.live_directory)) - {own_id}
    if not ended:
        return 0
    sessions = {session.id: session for session in await engine.maintenance.sessions() if session.id in ended}
    spans_count = 0
    for session_id in sorted(ended):
        files = of_session(engine.live_directory, session_id)
        if session_id in sessions and _is_left(engine, sessions[session_id]):
            continue
        if session_id in sessions:
            crash_details = f"{_process_name(sessions[session_id])} died"
            suspects = Suspects(span_slots=merged(files), evidence=crash_details)
            spans_count += await _recover(engine, session_id, suspects, NEVER_US)
            remove(files)
        # the session has ended, or is not stored yet; a file this old belongs to no session that is about to start
        else:
            _remove_old(engine, files)
    return spans_count


async def recover_silent(engine: Engine, own_id: str) -> RecoveryCounts:
    """Recover the sessions whose last heartbeat is too old."""
    spans_count, next_us = 0, NEVER_US
    for session in await engine.maintenance.sessions():
        if session.id == own_id:
            continue
        now_us, timeout_us = engine.clock.now_us(), _timeout_us(engine, session)
        files = of_session(engine.live_directory, session.id) if engine.live_directory is not None else []
        lives_here = bool(files) and owner_has_ended(files[0]) is not None
        if lives_here:  # a run may block its process for long, but not for ever
            timeout_us *= STUCK_TIMEOUTS
            suspects = Suspects(span_slots=merged(files), evidence=f"{_process_name(session)} hung")
        else:
            suspects = Suspects(span_slots=None, evidence=f"{_process_name(session)} sent no heartbeat")
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
        LOG.info("session.recovered", session=session_name(session_id), spans=count)
        engine.wakeup.notify()
    return count


def _timeout_us(engine: Engine, session: Session) -> int:
    """Return how long a session may send no heartbeat before it counts as gone."""
    limits = engine.limits
    if session.kind == DISPATCHER:
        return max(limits.session_timeout_ms, limits.delivery_recovery_ms) * 1_000
    return limits.session_timeout_ms * 1_000


def _is_left(engine: Engine, session: Session) -> bool:
    """True while the leases of an ended session are left to the reports of the workers that have its runs."""
    return session.kind == DISPATCHER and session.heartbeat_us > engine.clock.now_us() - _timeout_us(engine, session)


def _process_name(session: Session) -> str:
    return f"process {session.pid} on {session.host}"


def _remove_old(engine: Engine, files: list[Path]) -> None:
    before_s = (engine.clock.now_us() / 1_000_000) - engine.limits.orphan_grace_ms / 1_000
    remove([path for path in files if path.exists() and path.stat().st_mtime < before_s])

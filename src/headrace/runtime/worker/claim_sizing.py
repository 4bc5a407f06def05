"""Claim sizing: how many runs a worker claims ahead, and when it releases runs that it claimed.

R19 (claims start small): claims double towards 100 ms of measured work. A slow task never holds runs that other workers
could start, and a fast one claims thousands at a time. If tasks turn slow after a large claim, the runs that can't
begin soon are released. Idle workers take them; a worker without others claims them again when it can run them.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final, Protocol

from headrace.runtime.sessions.active_lease import ActiveLease, RetractedRuns

AHEAD_S: Final = 0.1
RATE_WINDOW_S: Final = 0.05
RATE_WINDOW_MIN_S: Final = 0.002
RELEASE_WINDOW_S: Final = 2.0
CLAIM_RUNS: Final = 8_192
"""Largest claim: many claims of some milliseconds keep runners busier than few long ones."""


class RunExecutor(Protocol):
    """Executes claimed runs: this process's executor, or a pool of child processes."""

    unbegun_count: int
    in_flight_count: int
    ended_count: int
    concurrency: int

    @property
    def waiting_count(self) -> int:
        """Number of runs in flight that wait for other runs, and leave their slots to them."""

    def submit(self, work: ActiveLease) -> None:
        """Queue the runs of a lease."""

    def retract(self, runs_count: int) -> RetractedRuns:
        """Give up at most `runs_count` runs that have not begun, the last first."""

    def take_unbegun(self) -> list[ActiveLease]:
        """Give up all runs that have not begun; return their leases."""

    async def stop(self, *, grace_s: float) -> None:
        """Begin no run; end those in flight within `grace_s`."""


class ClaimSizer:
    """Decides how many runs to claim: as many as can begin now, and 100 ms of measured work ahead."""

    def __init__(self, runs: RunExecutor, *, chunk_runs: int) -> None:
        """`chunk_runs`: fast tasks claim a multiple of it."""
        self._runs = runs
        self._chunk_runs = chunk_runs
        self._ahead = 0
        self._rate = 0.0
        self._since_s = self._long_since_s = perf_counter()
        self._ended_at_since = self._ended_at_long_since = runs.ended_count

    def claim_size(self) -> int:
        """Return the number of runs to claim now; 0 while enough wait."""
        self._measure()
        runs = self._runs
        free = max(0, runs.concurrency - runs.in_flight_count + runs.waiting_count)
        target = free + self._ahead
        low = max(target // 2, target - CLAIM_RUNS)
        if runs.unbegun_count > low or (not free and runs.unbegun_count >= max(self._ahead, 1)):
            return 0
        claim_size = target - runs.unbegun_count
        if claim_size <= 0:
            return 0
        if self._ahead >= self._chunk_runs:  # a fast task takes whole chunks, so that no span is split
            claim_size = -(-claim_size // self._chunk_runs) * self._chunk_runs
        return min(claim_size, CLAIM_RUNS)

    def claimed(self, runs_count: int) -> None:
        """Note the answer to a claim: look further ahead, at most twice as far as before."""
        if runs_count:
            target = int(self._rate * AHEAD_S)
            self._ahead = min(target, max(2 * self._ahead, self._runs.concurrency // 4 + 1))

    def excess(self) -> int:
        """Return the number of runs to release: those that would still wait after twice the work of the last window.

        Decided once per window of two seconds, so neither a short pause nor a task of some seconds makes runs move back
        and forth.
        """
        now_s = perf_counter()
        elapsed_s = now_s - self._long_since_s
        if elapsed_s < RELEASE_WINDOW_S:
            return 0
        ended_count = self._runs.ended_count - self._ended_at_long_since
        self._long_since_s, self._ended_at_long_since = now_s, self._runs.ended_count
        excess = max(0, self._runs.unbegun_count - 2 * ended_count)
        if excess:
            self._ahead = min(self._ahead, int(ended_count / elapsed_s * AHEAD_S))
        return excess

    def _measure(self) -> None:
        now_s = perf_counter()
        elapsed_s = now_s - self._since_s
        ended_count = self._runs.ended_count - self._ended_at_since
        if elapsed_s >= RATE_WINDOW_S or (elapsed_s >= RATE_WINDOW_MIN_S and ended_count > self._runs.concurrency):
            rate = ended_count / elapsed_s
            self._rate = rate if rate > self._rate else (self._rate + rate) / 2
            self._since_s, self._ended_at_since = now_s, self._runs.ended_count

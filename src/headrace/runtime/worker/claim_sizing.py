"""How far ahead a worker claims, and when it gives back what it claimed.

Rule R19: claims start small and double towards 100 ms of measured work, so a slow task never hoards runs that others
could start, and a fast one claims thousands at a time. When tasks turn slow after a large claim, the runs that can't
begin here soon go back: whoever is idle has them, and a worker that is alone claims them again as it gets to them.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final, Protocol

from headrace.runtime.sessions.active_lease import ActiveLease, RetractedRuns

AHEAD_S: Final = 0.1
RATE_WINDOW_S: Final = 0.05
RATE_WINDOW_MIN_S: Final = 0.002
GIVE_BACK_S: Final = 2.0
CLAIM_RUNS: Final = 8_192
"""Runs in one claim at most: many claims of some milliseconds keep runners busy better than few long ones."""


class RunExecutor(Protocol):
    """What runs claimed work: this process's executor, or a crew of child processes."""

    unbegun_count: int
    in_flight_count: int
    ended_count: int
    concurrency: int

    def submit(self, work: ActiveLease) -> None:
        """Queue a lease's runs."""

    def retract(self, runs_count: int) -> RetractedRuns:
        """Let go of runs that nobody has begun, at most `runs_count`, the last first."""

    def take_unbegun(self) -> list[ActiveLease]:
        """All work with runs that have not begun, which will not begin any more."""

    async def stop(self, *, grace_s: float) -> None:
        """Begin nothing more; end what is under way within `grace_s`."""


class ClaimSizer:
    """How many runs to ask for: what is free now, and as much ahead as 100 ms of measured work."""

    def __init__(self, runs: RunExecutor, *, chunk_runs: int) -> None:
        """`chunk_runs`: what fast tasks claim a multiple of."""
        self._runs = runs
        self._chunk_runs = chunk_runs
        self._ahead = 0
        self._rate = 0.0
        self._since_s = self._long_since_s = perf_counter()
        self._ended_then = self._ended_long_ago = runs.ended_count

    def wanted(self) -> int:
        """Runs to claim now; 0 while enough wait."""
        self._measure()
        runs = self._runs
        free = max(0, runs.concurrency - runs.in_flight_count)
        target = free + self._ahead
        low = max(target // 2, target - CLAIM_RUNS)
        if runs.unbegun_count > low or (not free and runs.unbegun_count >= max(self._ahead, 1)):
            return 0
        wanted = target - runs.unbegun_count
        if wanted <= 0:
            return 0
        if self._ahead >= self._chunk_runs:  # a fast task takes whole chunks: no splits
            wanted = -(-wanted // self._chunk_runs) * self._chunk_runs
        return min(wanted, CLAIM_RUNS)

    def claimed(self, runs_count: int) -> None:
        """A claim was answered: look further ahead, at most twice as far as before."""
        if runs_count:
            target = int(self._rate * AHEAD_S)
            self._ahead = min(target, max(2 * self._ahead, self._runs.concurrency // 4 + 1))

    def excess(self) -> int:
        """Runs to give back: those that would still wait here when twice the work of the last window is done.

        Judged once a window of two seconds, so neither a hiccup nor a task of some seconds sends runs to and fro.
        """
        now_s = perf_counter()
        elapsed_s = now_s - self._long_since_s
        if elapsed_s < GIVE_BACK_S:
            return 0
        ended_count = self._runs.ended_count - self._ended_long_ago
        self._long_since_s, self._ended_long_ago = now_s, self._runs.ended_count
        excess = max(0, self._runs.unbegun_count - 2 * ended_count)
        if excess:
            self._ahead = min(self._ahead, int(ended_count / elapsed_s * AHEAD_S))
        return excess

    def _measure(self) -> None:
        now_s = perf_counter()
        elapsed_s = now_s - self._since_s
        ended_count = self._runs.ended_count - self._ended_then
        if elapsed_s >= RATE_WINDOW_S or (elapsed_s >= RATE_WINDOW_MIN_S and ended_count > self._runs.concurrency):
            rate = ended_count / elapsed_s
            self._rate = rate if rate > self._rate else (self._rate + rate) / 2
            self._since_s, self._ended_then = now_s, self._runs.ended_count

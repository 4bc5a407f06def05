"""Progress of a map: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol

from headrace.cli.invocation.printing import duration, note

LINE_EVERY_S: Final = 10.0
RATE_WINDOW_S: Final = 10.0


class ProgressState(NamedTuple):
    """Progress in numbers. `total` is None while the input is still read; `is_estimate`: it is extrapolated."""

    done: int
    failed: int
    total: int | None
    is_estimate: bool = False
    note: str | None = None
    """Shown instead of the number of failed runs."""


class Display(Protocol):
    """Shows the progress."""

    def update(self, state: ProgressState) -> None:
        """Show new numbers."""

    def close(self) -> None:
        """End the display."""


def display(*, is_wanted: bool, label: str) -> Display:
    """Return the display that fits standard error."""
    if not is_wanted:
        return Silent()
    return Bar(label) if sys.stderr.isatty() else Lines(label)


class Rate:
    """Runs a second over the last seconds, without the runs of an earlier command."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> float:
        """Add a count and return the rate."""
        now_s = monotonic()
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > RATE_WINDOW_S:
            self._seen.popleft()
        since_s, before = self._seen[0]
        return (done - before) / (now_s - since_s) if now_s > since_s else 0.0


class Silent:
    """No display."""

    def update(self, state: ProgressState) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._rate = Rate()
        self._next_s = monotonic() + LINE_EVERY_S

    def update(self, state: ProgressState) -> None:
        """Write a line when ten seconds have passed."""
        rate = self._rate.add(state.done)
        if monotonic() >= self._next_s:
            self._next_s = monotonic() + LINE_EVERY_S
            note(f"{self._label}: {line_of(state, rate)}")

    def close(self) -> None:
        """Do nothing: the summary follows."""


class Bar:
    """A bar that is redrawn in place."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._rate = Rate()
        columns: Any = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=None, text="")
        self._progress.start()

    def update(self, state: ProgressState) -> None:
        """Redraw the bar."""
        rate = self._rate.add(state.done)
        self._progress.update(self._task, completed=state.done, total=state.total, text=line_of(state, rate))

    def close(self) -> None:
        """Remove the bar, so that the summary stands alone."""
        self._progress.stop()


def line_of(state: ProgressState, rate: float) -> str:
    """Return `1,200 of 50,000 done, 800/s, 3 failed, 61.0 s left`."""
    parts = [f"{state.done:,} done"]
    if state.total is not None:
        parts = [f"{state.done:,} of {'about ' if state.is_estimate else ''}{state.total:,} done"]
    parts.append(f"{rate:,.0f}/s" if rate >= 10 or not rate else f"{rate:.1f}/s")
    parts.append(f"{state.failed:,} failed" if state.note is None else state.note)
    if state.total is not None and rate:
        parts.append(f"{duration(max(0, state.total - state.done) / rate)} left")
    return ", ".join(parts)

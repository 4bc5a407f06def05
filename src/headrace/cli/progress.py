"""How far a map has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol

from headrace.cli.printing import duration, note

LINE_EVERY_S: Final = 10.0
RATE_WINDOW_S: Final = 10.0


class Standing(NamedTuple):
    """A map in numbers. `total` is None while the input is still read; `is_estimate` says it was guessed."""

    done: int
    failed: int
    total: int | None
    is_estimate: bool = False
    note: str | None = None
    """Said instead of how many failed."""


class Display(Protocol):
    """Something that shows where a map stands."""

    def update(self, standing: Standing) -> None:
        """Show this."""

    def close(self) -> None:
        """Show no more."""


def display(*, is_wanted: bool, label: str) -> Display:
    """The display that fits standard error."""
    if not is_wanted:
        return Silent()
    return Bar(label) if sys.stderr.isatty() else Lines(label)


class Pace:
    """Runs a second over the last seconds, without the speed of those that an earlier start had done."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> float:
        """Take a count; answers the rate."""
        now_s = monotonic()
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > RATE_WINDOW_S:
            self._seen.popleft()
        since_s, before = self._seen[0]
        return (done - before) / (now_s - since_s) if now_s > since_s else 0.0


class Silent:
    """Nobody wants to see it."""

    def update(self, standing: Standing) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._pace = Pace()
        self._next_s = monotonic() + LINE_EVERY_S

    def update(self, standing: Standing) -> None:
        """A line, when it is time."""
        rate = self._pace.add(standing.done)
        if monotonic() >= self._next_s:
            self._next_s = monotonic() + LINE_EVERY_S
            note(f"{self._label}: {line_of(standing, rate)}")

    def close(self) -> None:
        """The summary says the rest."""


class Bar:
    """A bar that is drawn over itself."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self._pace = Pace()
        columns: Any = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=None, said="")
        self._progress.start()

    def update(self, standing: Standing) -> None:
        """Draw it."""
        rate = self._pace.add(standing.done)
        self._progress.update(self._task, completed=standing.done, total=standing.total, said=line_of(standing, rate))

    def close(self) -> None:
        """Wipe the bar, so that the summary stands alone."""
        self._progress.stop()


def line_of(standing: Standing, rate: float) -> str:
    """`1,200 of 50,000 done, 800/s, 3 failed, 61.0 s left`."""
    parts = [f"{standing.done:,} done"]
    if standing.total is not None:
        parts = [f"{standing.done:,} of {'about ' if standing.is_estimate else ''}{standing.total:,} done"]
    parts.append(f"{rate:,.0f}/s" if rate >= 10 or not rate else f"{rate:.1f}/s")
    parts.append(f"{standing.failed:,} failed" if standing.note is None else standing.note)
    if standing.total is not None and rate:
        parts.append(f"{duration(max(0, standing.total - standing.done) / rate)} left")
    return ", ".join(parts)

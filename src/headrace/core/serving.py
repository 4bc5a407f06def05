"""Which waiting runs no live worker will take, and why.

A session records what its worker serves. A *lane* is a pair of queue and task. A lane with waiting runs is stalled when
its queue is paused, or when no live worker serves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

Reason = Literal["paused", "no_worker", "unknown_task", "other_queues"]

REASONS: Final[Mapping[str, str]] = {
    "paused": "which is paused",
    "no_worker": "and no worker is alive",
    "unknown_task": "and no live worker has this task",
    "other_queues": "and no live worker with this task takes that queue",
}
"""Each reason as the end of a clause: runs of this task wait in this queue, …"""

STALLED_AFTER_S: Final = 30
"""Seconds without an outcome after which a waiting caller looks for stalled lanes, and looks again."""

NAMES_MAX: Final = 1_000
"""Most tasks, and most queues, that a session records by name."""

LANES_MAX: Final = 1_000
"""Waiting spans of one batch whose lanes are looked at: a batch has few lanes."""


class Serving(msgspec.Struct, frozen=True, omit_defaults=True):
    """The lanes that a worker serves, of one environment.

    `tasks` and `queues` are None for all. A worker in another language that names none begins with `CLAIMS_DECIDE`: its
    claims add theirs. `queue_prefix`: only queues that begin with it. `concurrency`: runs that it runs at a time, 0
    where that is unknown.
    """

    environment: str = "default"
    tasks: tuple[str, ...] | None = None
    queues: tuple[str, ...] | None = None
    queue_prefix: str = ""
    concurrency: int = 0

    def takes_task(self, task: str) -> bool:
        """True if the worker knows a task."""
        return self.tasks is None or task in self.tasks

    def takes_queue(self, queue: str) -> bool:
        """True if the worker claims from a queue."""
        return (self.queues is None or queue in self.queues) and queue.startswith(self.queue_prefix)

    def widened(self, other: Serving) -> Serving:
        """Return the lanes of both. Too many names become all."""
        return msgspec.structs.replace(
            self, tasks=_united(self.tasks, other.tasks), queues=_united(self.queues, other.queues)
        )


def _united(names: tuple[str, ...] | None, more: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is None or more is None:
        return None
    united = dict.fromkeys((*names, *more))
    return tuple(united) if len(united) <= NAMES_MAX else None


CLAIMS_DECIDE: Final = Serving(tasks=(), queues=())
"""Lanes of a worker that has not claimed yet and named none."""


class WaitingLane(NamedTuple):
    """A lane that has waiting runs."""

    queue: str
    task: str
    is_paused: bool


class StalledLane(msgspec.Struct, frozen=True):
    """A lane whose waiting runs no live worker takes.

    `reason`: one of `REASONS`. Only workers of the same environment count.
    """

    queue: str
    task: str
    reason: Reason

    @property
    def hint(self) -> str:
        """The remedy, for a person."""
        return {
            "paused": f"resume it: headrace queue resume {self.queue}",
            "no_worker": "start one: headrace worker FILE:APP",
            "unknown_task": "start a worker of the app that has it, or check the task's name",
            "other_queues": f"start a worker with --queues {self.queue}, or without --queues",
        }[self.reason]


def stalled_clause(queue: str, task: str, reason: str) -> str:
    """Return a stalled lane and the reason as a clause, for people."""
    return f"runs of {task} wait in the queue {queue}, {REASONS[reason]}"


def stalled_lanes(lanes: Iterable[WaitingLane], serving: Sequence[Serving], environment: str) -> list[StalledLane]:
    """Return the lanes that no worker serves. `serving`: what the live sessions serve, of any environment."""
    workers = [worker for worker in serving if worker.environment == environment]
    stalled = []
    for lane in sorted(lanes):
        reason = _reason(lane, workers)
        if reason is not None:
            stalled.append(StalledLane(lane.queue, lane.task, reason))
    return stalled


def _reason(lane: WaitingLane, workers: Sequence[Serving]) -> Reason | None:
    if lane.is_paused:
        return "paused"
    if not workers:
        return "no_worker"
    with_task = [worker for worker in workers if worker.takes_task(lane.task)]
    if not with_task:
        return "unknown_task"
    return None if any(worker.takes_queue(lane.queue) for worker in with_task) else "other_queues"

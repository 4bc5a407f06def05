"""Settlements of a lease: large results are taken in several parts."""

from __future__ import annotations

import pytest

from headrace.core import run
from headrace.core.pack import unpack
from headrace.core.span import Settlement, decode_uint16s
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.store.protocol import Lease


def ended(*sizes: int) -> ActiveLease:
    """Return a lease whose runs ended with results of these sizes."""
    count = len(sizes)
    lease = Lease(
        span_id=1,
        token=1,
        batch_id="batch",
        task="task",
        queue="default",
        attempt=1,
        crashes_count=0,
        at_most_once=False,
        due_us=0,
        expires_us=0,
        whole=True,
        span_slots=range(count),
        indexes=range(count),
        payloads=[b""] * count,
        kinds=None,
        extras={},
        runs_count=count,
    )
    active = ActiveLease(lease)
    for size in sizes:
        active.end(active.begin(), run.COMPLETED, b"x" * size)
    return active


def parts_of(active: ActiveLease, bytes_max: int) -> list[Settlement]:
    """Take all outcomes, as a worker does."""
    parts: list[Settlement] = []
    while not parts or active.has_untaken:
        part = active.take_settlement(bytes_max)
        assert part is not None
        parts.append(part)
    return parts


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((50, 50), [[0, 1]]),
        ((50, 51), [[0], [1]]),
        ((300, 1, 99, 1), [[0], [1, 2], [3]]),
        ((0, 0, 0), [[0, 1, 2]]),
    ],
)
def test_a_part_takes_results_up_to_the_bound_and_at_least_one(
    sizes: tuple[int, ...], expected: list[list[int]]
) -> None:
    parts = parts_of(ended(*sizes), 100)
    slots = [range(len(sizes)) if part.span_slots is None else decode_uint16s(part.span_slots) for part in parts]
    assert [list(part_slots) for part_slots in slots] == expected
    assert [part.part_no for part in parts] == list(range(len(parts)))
    assert [len(result) for part in parts for result in unpack(part.results)[0]] == list(sizes)


def test_outcomes_of_usual_sizes_are_one_part_of_the_whole_span() -> None:
    active = ended(*[100] * 256)
    part = active.take_settlement()
    assert part is not None
    assert (part.span_slots, len(part.codes), active.has_untaken) == (None, 256, False)

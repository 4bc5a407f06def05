"""How far ahead a worker claims, and when it gives back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from headrace.runtime.worker import claim_sizing as pace_room
from headrace.runtime.worker.claim_sizing import RELEASE_WINDOW_S, ClaimSizer


def test_r19_claims_start_small_and_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(pace_room, "perf_counter", lambda: now_s)

    class Runs:
        concurrency, unbegun_count, in_flight_count, ended_count = 100, 0, 0, 0

    runs: Any = Runs()
    pace = ClaimSizer(runs, chunk_runs=256)
    claims = []
    for _ in range(14):
        wanted = pace.claim_size()
        claims.append(wanted)
        pace.claimed(wanted)
        now_s += 0.06
        runs.ended_count += 60_000  # a million a second: 100,000 in 100 ms, far more than a claim ever holds
    assert claims[0] == 100
    assert all(before <= after <= 2 * before + 512 for before, after in pairwise(claims)), claims
    assert claims[-1] == pace_room.CLAIM_RUNS
    assert [claim for claim in claims if claim > 1_000 and claim % 256] == []

    slow = ClaimSizer(runs, chunk_runs=256)  # ten runs a second: nothing is claimed ahead
    for _ in range(10):
        wanted = slow.claim_size()
        slow.claimed(wanted)
        assert wanted <= runs.concurrency + 1
        now_s += 10
        runs.ended_count += 100


def test_r19_what_can_not_begin_soon_is_given_back_and_not_claimed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(pace_room, "perf_counter", lambda: now_s)

    class Runs:
        concurrency, unbegun_count, in_flight_count, ended_count = 10, 0, 0, 0

    runs: Any = Runs()
    pace = ClaimSizer(runs, chunk_runs=256)
    for _ in range(20):
        pace.claimed(pace.claim_size())
        now_s += 0.06
        runs.ended_count += 6_000
    assert pace.claim_size() > 1_000, "a fast task"
    runs.unbegun_count, runs.in_flight_count = 5_000, 10
    now_s += RELEASE_WINDOW_S
    assert pace.excess() == 0, "it was fast within this window"
    now_s += RELEASE_WINDOW_S / 2
    assert pace.excess() == 0, "a window is not over"
    runs.ended_count += 20
    now_s += RELEASE_WINDOW_S / 2
    assert pace.excess() == 4_960, "ten runs a second: what two more windows can do stays"
    runs.unbegun_count = 40
    assert pace.claim_size() == 0
    now_s += RELEASE_WINDOW_S
    assert pace.excess() == 40, "nothing ended: nothing is kept"
    runs.unbegun_count = 0
    assert pace.claim_size() == 0, "every slot is busy"
    runs.in_flight_count = 9
    assert pace.claim_size() <= 2

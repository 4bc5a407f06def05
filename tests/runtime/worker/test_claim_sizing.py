"""Claim sizing: how many runs a worker claims ahead, and when it releases them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from headrace.runtime.worker import claim_sizing
from headrace.runtime.worker.claim_sizing import RELEASE_WINDOW_S, ClaimSizer


def test_r19_claims_start_small_and_double(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(claim_sizing, "perf_counter", lambda: now_s)

    class Runs:
        concurrency, unbegun_count, in_flight_count, waiting_count, ended_count = 100, 0, 0, 0, 0

    runs: Any = Runs()
    sizer = ClaimSizer(runs, chunk_runs=256)
    claims = []
    for _ in range(14):
        claim = sizer.claim_size()
        claims.append(claim)
        sizer.claimed(claim)
        now_s += 0.06
        runs.ended_count += 60_000  # a million a second: 100,000 in 100 ms, far more than the largest claim
    assert claims[0] == 100
    assert all(before <= after <= 2 * before + 512 for before, after in pairwise(claims)), claims
    assert claims[-1] == claim_sizing.CLAIM_RUNS
    assert [claim for claim in claims if claim > 1_000 and claim % 256] == []

    slow = ClaimSizer(runs, chunk_runs=256)  # ten runs a second: no run is claimed ahead
    for _ in range(10):
        claim = slow.claim_size()
        slow.claimed(claim)
        assert claim <= runs.concurrency + 1
        now_s += 10
        runs.ended_count += 100


def test_r19_runs_that_cannot_begin_soon_are_released_and_not_claimed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(claim_sizing, "perf_counter", lambda: now_s)

    class Runs:
        concurrency, unbegun_count, in_flight_count, waiting_count, ended_count = 10, 0, 0, 0, 0

    runs: Any = Runs()
    sizer = ClaimSizer(runs, chunk_runs=256)
    for _ in range(20):
        sizer.claimed(sizer.claim_size())
        now_s += 0.06
        runs.ended_count += 6_000
    assert sizer.claim_size() > 1_000, "expected large claims for a fast task"
    runs.unbegun_count, runs.in_flight_count = 5_000, 10
    now_s += RELEASE_WINDOW_S
    assert sizer.excess() == 0, "expected no release: the task was fast within this window"
    now_s += RELEASE_WINDOW_S / 2
    assert sizer.excess() == 0, "expected no release before the window ends"
    runs.ended_count += 20
    now_s += RELEASE_WINDOW_S / 2
    assert sizer.excess() == 4_960, "expected the runs of two more windows to stay, at ten runs a second"
    runs.unbegun_count = 40
    assert sizer.claim_size() == 0
    now_s += RELEASE_WINDOW_S
    assert sizer.excess() == 40, "expected all runs to be released: no run ended"
    runs.unbegun_count = 0
    assert sizer.claim_size() == 0, "expected no claim while every slot is busy"
    runs.in_flight_count = 9
    assert sizer.claim_size() <= 2

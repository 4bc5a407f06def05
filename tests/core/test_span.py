"""Decisions over spans: claims, fencing and splits, without a store."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core import run, span
from headrace.core.failure import decode
from headrace.core.pack import pack
from headrace.core.span import LEASED, LOST, RECORDED, SETTLED, WAITING, Counts, Policy, Settlement, Span
from headrace.core.span_release import release
from headrace.foundation.errors import IllegalTransition

NOW = 1_700_000_000_000_000


def leased(count: int = 8, **changes: object) -> Span:
    """Return a span under its first lease."""
    fresh = Span(
        id=1,
        block_id=7,
        batch_id="batch",
        environment="default",
        queue="default",
        task="task",
        states=b"w" * count,
        unsettled_count=count,
    )
    for name, value in changes.items():
        setattr(fresh, name, value)
    return span.leased(fresh, session_id="session", claim_no=1, now_us=7)


def report(
    of: Span, codes: str, span_slots: list[int] | None = None, dues_us: tuple[int, ...] = (), part_no: int = 0
) -> Settlement:
    """Return a settlement with a result for each code."""
    return Settlement(
        span_id=of.id,
        token=of.token,
        part_no=part_no,
        span_slots=None if span_slots is None else span.encode_uint16s(span_slots),
        codes=codes.encode(),
        results=pack([b"1"] * len(codes)),
        dues_us=dues_us,
    )


def settle(
    of: Span | None, settlement: Settlement, *, recorded: bool = False, policy: Policy | None = None
) -> span.SpanDecision:
    """Settle now, at clock 5."""
    return span.settle(of, settlement, recorded=recorded, policy=policy or Policy(), clock=5, now_us=NOW)


def living(spans: list[Span]) -> dict[int, int]:
    """Return the state of each block offset, from the one span that holds its run."""
    states: dict[int, int] = {}
    for living_span in spans:
        assert living_span.unsettled_count == run.unsettled_count(living_span.states)
        for block_offset, state in zip(span.block_offsets_of(living_span), living_span.states, strict=True):
            if state != run.MOVED:
                assert block_offset not in states, "a run lives in one span"
                states[block_offset] = state
    return states


@given(st.integers(1, 40), st.data())
def test_a_split_moves_runs_and_loses_none(count: int, data: st.DataObject) -> None:
    whole = leased(count)
    span_slots = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    kept, taken = span.split(whole, span_slots)
    assert living([kept, taken]) == dict.fromkeys(range(count), run.WAITING)
    assert list(span.block_offsets_of(taken)) == span_slots
    assert (taken.id, taken.token, taken.session_id) == (0, whole.token, "")
    assert (kept.state == span.DONE) == (len(span_slots) == count)


def test_a_small_claim_takes_the_first_and_leaves_the_rest_claimable() -> None:
    waiting = msgspec.structs.replace(leased(10), state=WAITING)
    kept, taken = span.take_first(waiting, 3)
    assert (list(span.block_offsets_of(taken)), kept.states, kept.state) == ([0, 1, 2], b"mmmwwwwwww", WAITING)
    again, more = span.take_first(kept, 3)
    assert (list(span.block_offsets_of(more)), again.unsettled_count) == ([3, 4, 5], 4)


def test_a_lease_raises_the_fence() -> None:
    first = leased()
    second = span.leased(msgspec.structs.replace(first, state=WAITING), session_id="other", claim_no=1, now_us=7)
    assert second.token == first.token + 1
    assert settle(second, report(first, "c" * 8)).word == LOST


def test_a_repeat_is_recorded_and_a_lost_lease_changes_nothing() -> None:
    leased_span = leased()
    assert settle(leased_span, report(leased_span, "c" * 8), recorded=True) == span.SpanDecision(RECORDED)
    assert settle(None, report(leased_span, "c" * 8)) == span.SpanDecision(LOST)
    released = release(
        leased_span, leased_span.token, suspects=(), evidence="", policy=Policy(), clock=0, now_us=NOW
    ).span
    assert settle(released, report(leased_span, "c" * 8)) == span.SpanDecision(LOST)


@given(st.integers(1, 30), st.data())
def test_settling_in_parts_comes_to_what_settling_at_once_does(count: int, data: st.DataObject) -> None:
    codes = data.draw(st.text("cfx", min_size=count, max_size=count))
    whole = leased(count)
    at_once = settle(whole, report(whole, codes))
    assert at_once.span is not None
    now, total = whole, Counts()
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    for number, piece in enumerate((sorted(order[:cut]), sorted(order[cut:]))):
        if piece:
            verdict = settle(now, report(now, "".join(codes[span_slot] for span_slot in piece), piece, part_no=number))
            assert verdict.span is not None
            now, total = verdict.span, total.plus(verdict.counts)
    assert (now, total) == (at_once.span, at_once.counts)
    assert now.state == span.DONE


def test_a_run_can_not_end_twice_under_one_lease() -> None:
    leased_span = leased(3)
    after = settle(leased_span, report(leased_span, "c", [1])).span
    assert after is not None
    for codes, span_slots in (("c", [1]), ("ccc", None)):
        with pytest.raises(IllegalTransition):
            settle(after, report(leased_span, codes, span_slots, part_no=1))
    assert after.states == b"wcw", "the error changed nothing"


@pytest.mark.parametrize("codes", ["m", "w", "s", "?"])
def test_an_outcome_is_one_of_five(codes: str) -> None:
    leased_span = leased(1)
    with pytest.raises(IllegalTransition):
        settle(leased_span, report(leased_span, codes))


def test_retries_due_together_are_one_span_of_the_next_attempt() -> None:
    leased_span = leased(6, attempt=2)
    soon, late = NOW + 10_000_000, NOW + 100_000_000
    verdict = settle(leased_span, report(leased_span, "crrcrr", None, (soon, soon + 1_000, late, soon)))
    assert verdict.span is not None
    assert verdict.span.states == b"cmmcmm"
    assert [list(span.block_offsets_of(fresh)) for fresh in verdict.spans] == [[1, 2, 5], [4]]
    assert {(fresh.attempt, fresh.state, fresh.token, fresh.order_no) for fresh in verdict.spans} == {
        (3, "delayed", leased_span.token, 5)
    }
    assert verdict.counts == Counts(completed=2)
    assert living([verdict.span, *verdict.spans]) == {0: run.COMPLETED, 3: run.COMPLETED} | dict.fromkeys(
        (1, 2, 4, 5), run.WAITING
    )


def test_nothing_is_retried_in_a_stopped_batch_or_against_a_cancel() -> None:
    leased_span = leased(2)
    stopped = settle(leased_span, report(leased_span, "rr", None, (NOW, NOW)), policy=Policy(stopped=True))
    assert (stopped.counts, stopped.spans) == (Counts(cancelled=2), ())
    single = settle(leased_span, report(leased_span, "rr", None, (NOW, NOW)), policy=Policy(cancelled=frozenset({1})))
    assert single.span is not None
    assert (single.span.states, len(single.spans)) == (b"mx", 1)


def crash(of: Span, suspects: list[int], crashes_max: int = 3) -> span.SpanDecision:
    """Release the span of a worker that crashed."""
    policy = Policy(crashes_max=crashes_max)
    return release(of, of.token, suspects=suspects, evidence="signal 9", policy=policy, clock=9, now_us=NOW)


def test_a_crash_is_charged_to_what_had_begun_and_to_nothing_else() -> None:
    leased_span = leased(6)
    verdict = crash(leased_span, [1, 4])
    assert verdict.span is not None
    (guilty,) = verdict.spans
    assert (list(span.block_offsets_of(guilty)), guilty.crashes_count, guilty.attempt) == ([1, 4], 1, 1)
    assert (verdict.span.crashes_count, verdict.span.states, verdict.span.state) == (0, b"wmwwmw", WAITING)


def test_a_graceful_release_counts_no_crash() -> None:
    verdict = crash(leased(4), [])
    assert verdict.span is not None
    assert (verdict.span.states, verdict.span.crashes_count, verdict.spans) == (b"wwww", 0, ())
    assert verdict.span.order_no == 9, "recovered runs come first in their queue"


def test_from_the_second_crash_on_suspects_are_bisected() -> None:
    first = crash(leased(8), list(range(8))).span
    assert first is not None
    assert first.crashes_count == 1
    again = span.leased(first, session_id="s", claim_no=2, now_us=7)
    verdict = crash(again, list(range(8)))
    assert [list(span.block_offsets_of(half)) for half in verdict.spans] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {half.crashes_count for half in verdict.spans} == {2}


@given(st.integers(1, 256), st.data())
def test_the_run_that_kills_is_found_and_the_others_go_on(count: int, data: st.DataObject) -> None:
    killer = data.draw(st.integers(0, count - 1))
    crashes_max = data.draw(st.integers(1, 4))
    waiting = [msgspec.structs.replace(leased(count), state=WAITING)]
    ended: list[Span] = []
    crashes_count = 0
    while waiting:
        now = span.leased(waiting.pop(0), session_id="s", claim_no=crashes_count, now_us=7)
        span_slots = span.unsettled_slots(now)
        if killer in [span.block_offsets_of(now)[span_slot] for span_slot in span_slots]:
            crashes_count += 1
            verdict = crash(now, span_slots, crashes_max)
        else:
            verdict = settle(now, report(now, "c" * len(span_slots), span_slots))
        assert verdict.span is not None
        for after in (verdict.span, *verdict.spans):
            (waiting if after.state == WAITING else ended).append(after)
    states = living(ended)
    assert states == dict.fromkeys(range(count), run.COMPLETED) | {killer: run.FAILED}
    assert {after.attempt for after in ended} == {1}, "a crash is no attempt"
    assert crashes_count <= count.bit_length() + 1 + crashes_max


def test_the_killer_fails_with_its_evidence() -> None:
    alone = leased(1, crashes_count=4, crashes_alone_count=2)
    verdict = crash(alone, [0])
    assert verdict.part is not None
    ((block_offset, code, result, _),) = span.results_of(verdict.part)
    assert (block_offset, code) == (0, run.FAILED)
    failure = decode(result)
    assert (failure.type, failure.crashes) == ("WorkerCrashed", 5)
    assert "signal 9" in failure.message


def test_an_at_most_once_run_that_was_handed_out_is_not_run_again() -> None:
    once = leased(3, at_most_once=True)
    assert once.states == b"sss", "recorded before delivery"
    verdict = crash(once, [1])
    assert verdict.span is not None
    assert verdict.span.states == b"wfw"
    assert verdict.counts == Counts(failed=1)


def test_what_is_given_back_to_a_stopped_batch_is_cancelled() -> None:
    leased_span = leased(3)
    verdict = release(
        leased_span, leased_span.token, suspects=[0], evidence="", policy=Policy(stopped=True), clock=0, now_us=NOW
    )
    assert verdict.counts == Counts(cancelled=3)
    assert verdict.span is not None
    assert set(living([verdict.span, *verdict.spans]).values()) == {run.CANCELLED}


def test_a_redrive_starts_over_and_counts_back() -> None:
    ended = settle(leased_span := leased(4, crashes_count=2, expires_us=1), report(leased_span, "cffx")).span
    assert ended is not None
    kept, fresh, change = span.redrive(ended, None, clock=3)
    assert fresh is not None
    assert (list(span.block_offsets_of(fresh)), fresh.attempt, fresh.crashes_count, fresh.expires_us) == (
        [1, 2],
        1,
        0,
        0,
    )
    assert (kept.states, change) == (b"cmmx", Counts(failed=-2))
    _, named, change = span.redrive(ended, {0, 3}, clock=3)
    assert named is not None
    assert (list(span.block_offsets_of(named)), change) == ([3], Counts(cancelled=-1)), (
        "completed runs are not redriven"
    )


def test_a_lease_is_only_of_a_waiting_span() -> None:
    assert leased().state == LEASED
    assert settle(leased(1), report(leased(1), "c")).word == SETTLED

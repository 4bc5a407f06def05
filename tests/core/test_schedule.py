"""Ticks of schedules, also when clocks change for daylight saving, and missed ticks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.schedule import EVERY_S_MAX, EXPRESSION_CHARS_MAX, CatchUp, Cron, Due, Every, Rule, due, rule_of
from headrace.foundation.errors import InvalidSetting

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
DAY_US = 1_440 * MINUTE_US
NOW_US = 1_700_000_000 * SECOND_US
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Sao_Paulo")


def cron(expression: str, zone: str = "UTC") -> Cron:
    return Cron(expression, zone, ZoneInfo(zone))


def us(text: str, zone: str = "UTC") -> int:
    """Return a local time in microseconds since 1970."""
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * SECOND_US


def ticks(rule: Rule, after_us: int, count: int, zone: str = "UTC") -> list[str]:
    """Return the next ticks as local times."""
    texts = []
    for _ in range(count):
        tick_us = rule.after(after_us)
        assert tick_us is not None
        after_us = tick_us
        texts.append(datetime.fromtimestamp(tick_us // SECOND_US, ZoneInfo(zone)).isoformat(timespec="minutes"))
    return texts


# -- clocks put forward and back


def test_a_fixed_time_that_does_not_exist_is_moved_to_the_first_that_does() -> None:
    start_us = us("2024-03-30T12:00", "Europe/Berlin")
    assert ticks(cron("30 2 * * *", "Europe/Berlin"), start_us, 2, "Europe/Berlin") == [
        "2024-03-31T03:00+02:00",
        "2024-04-01T02:30+02:00",
    ]


def test_two_fixed_times_moved_to_one_moment_are_one_tick() -> None:
    start_us = us("2024-03-31T00:00", "Europe/Berlin")
    assert ticks(cron("0,20,40 2 * * *", "Europe/Berlin"), start_us, 2, "Europe/Berlin") == [
        "2024-03-31T03:00+02:00",
        "2024-04-01T02:00+02:00",
    ]


def test_a_fixed_time_that_exists_twice_ticks_at_its_first() -> None:
    start_us = us("2024-10-26T12:00", "Europe/Berlin")
    rule = cron("30 2 * * *", "Europe/Berlin")
    expected = ["2024-10-27T02:30+02:00", "2024-10-28T02:30+01:00"]
    assert ticks(rule, start_us, 2, "Europe/Berlin") == expected
    between_us = us("2024-10-27T02:10", "Europe/Berlin") + 3_600 * SECOND_US  # 02:10 for the second time
    assert ticks(rule, between_us, 1, "Europe/Berlin") == expected[1:]


def test_what_goes_with_time_ticks_in_both_of_two_hours_and_in_none_that_is_not_there() -> None:
    hourly = cron("30 * * * *", "Europe/Berlin")
    assert ticks(hourly, us("2024-10-27T02:00", "Europe/Berlin"), 3, "Europe/Berlin") == [
        "2024-10-27T02:30+02:00",
        "2024-10-27T02:30+01:00",
        "2024-10-27T03:30+01:00",
    ]
    assert ticks(hourly, us("2024-03-31T01:00", "Europe/Berlin"), 2, "Europe/Berlin") == [
        "2024-03-31T01:30+01:00",
        "2024-03-31T03:30+02:00",
    ]


def test_clocks_that_go_forward_by_half_an_hour_are_no_special_case() -> None:
    zone = "Australia/Lord_Howe"
    start_us = us("2024-10-06T00:00", zone)
    assert ticks(cron("15 2 * * *", zone), start_us, 2, zone) == ["2024-10-06T02:30+11:00", "2024-10-07T02:15+11:00"]


# -- any rule

FIELD = st.sampled_from(["*", "*/5", "*/7", "0", "30", "0,15,45", "10-20"])
HOUR = st.sampled_from(["*", "*/3", "0", "1", "2", "2,3", "0-4"])
DAY = st.sampled_from(["*", "1", "L", "*/2", "31"])
WEEKDAY = st.sampled_from(["*", "MON-FRI", "0", "SUN#2", "5L"])
CRONS = st.builds(
    lambda minute, hour, day, weekday, zone: cron(f"{minute} {hour} {day} * {weekday}", zone),
    FIELD, HOUR, DAY, WEEKDAY, st.sampled_from(ZONES),
)  # fmt: skip
EVERY = st.builds(Every, st.one_of(st.integers(1, 86_400), st.floats(1, 5_000)))
NEAR_CHANGES = st.builds(
    lambda day, seconds: us(day) + seconds * SECOND_US,
    st.sampled_from(["2024-03-31", "2024-10-27", "2024-03-10", "2024-11-03", "2024-04-07", "2024-10-06", "2018-11-04"]),
    st.integers(-86_400, 86_400),
)
MOMENTS = st.one_of(NEAR_CHANGES, st.integers(us("2001-01-01"), us("2060-01-01")))


@settings(max_examples=150, deadline=None)
@given(rule=st.one_of(CRONS, EVERY), moment_us=MOMENTS, share=st.floats(0, 1, exclude_max=True))
def test_the_next_tick_is_strictly_later_and_the_same_for_every_time_before_it(
    rule: Rule, moment_us: int, share: float
) -> None:
    first_us = rule.after(moment_us)
    assert first_us is not None
    assert first_us > moment_us
    second_us = rule.after(first_us)
    assert second_us is not None
    assert second_us > first_us
    between_us = first_us + int((second_us - first_us) * share)
    assert rule.after(between_us) == second_us
    assert rule.after(second_us - 1) == second_us


@settings(max_examples=100, deadline=None)
@given(rule=st.one_of(CRONS, EVERY), moment_us=MOMENTS)
def test_a_rule_is_the_same_by_the_names_a_store_keeps(rule: Rule, moment_us: int) -> None:
    again = rule_of(rule.expression, rule.zone, ZoneInfo(rule.zone))
    assert (again.expression, again.after(moment_us)) == (rule.expression, rule.after(moment_us))


@settings(max_examples=60, deadline=None)
@given(
    minutes=st.integers(1, 90),
    away_minutes=st.integers(0, 3_000),
    ticks_max=st.integers(1, 50),
    grace=st.integers(1, 90),
)
def test_of_missed_ticks_are_run_as_many_as_the_policy_says_and_always_the_newest(
    minutes: int, away_minutes: int, ticks_max: int, grace: int
) -> None:
    rule, after_us = Every(60 * minutes), NOW_US - away_minutes * MINUTE_US
    step_us = 60 * minutes * SECOND_US
    every = list(range((after_us // step_us + 1) * step_us, NOW_US + 1, step_us))
    newest = every[-ticks_max:]
    fresh = [tick_us for tick_us in newest if tick_us > NOW_US - grace * MINUTE_US]
    expected = {"all": newest, "once": fresh or newest[-1:], "skip": fresh}
    for policy in ("skip", "once", "all"):
        decided = asked(rule, after_us, policy, grace_us=grace * MINUTE_US, ticks_max=ticks_max)
        if not every:
            assert decided is None
        else:
            assert decided == Due(expected[policy], every[-1], len(newest) - len(expected[policy]))


def asked(rule: Rule, after_us: int, policy: str, **bounds: int) -> Due | None:
    catch_up: CatchUp = policy  # type: ignore[assignment]  # a word from a list
    return due(rule, after_us=after_us, now_us=NOW_US, catch_up=catch_up, **bounds)


def test_a_rule_that_ticks_each_minute_and_was_away_for_years_is_asked_about_its_newest_ticks_only() -> None:
    asked_count = 0

    class Counting:
        expression, zone = "* * * * *", "UTC"

        def after(self, moment_us: int) -> int:
            nonlocal asked_count
            asked_count += 1
            return Every(60).after(moment_us)

    decided = asked(Counting(), 0, "all", grace_us=MINUTE_US, ticks_max=100)
    assert decided is not None
    assert len(decided.ticks_us) == 100
    assert asked_count < 1_000


# -- what is refused

REFUSED: list[Any] = [
    "", "* * * *", "* * * * * *", "@daily", "61 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8",
    "a * * * *", "*/0 * * * *", "5-1 * * * *", "0 0 30 2 *", "0 0 31 2,4 *", "-1 * * * *", "1.5 * * * *", "٣ * * * *",
    "* * * * " + "1," * EXPRESSION_CHARS_MAX + "1", 5, None, b"* * * * *", "0 0 ? * *", "* * * * *;", "1,,2 * * * *",
]  # fmt: skip


@pytest.mark.parametrize("expression", REFUSED)
def test_what_is_no_cron_expression_is_refused_by_name(expression: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"^cron: "):
        Cron(expression, "UTC", UTC)


@pytest.mark.parametrize("every_s", [0, -1, 0.5, EVERY_S_MAX + 1, float("nan"), float("inf"), True, "60", None])
def test_an_interval_out_of_bounds_is_refused(every_s: Any) -> None:
    with pytest.raises(InvalidSetting, match="every_s: expected 1 to"):
        Every(every_s)


def test_the_longest_and_the_shortest_interval_are_taken() -> None:
    for every_s in (1, EVERY_S_MAX, 1.5):
        assert Every(every_s).after(0) == every_s * SECOND_US

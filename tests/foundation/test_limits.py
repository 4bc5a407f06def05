"""Limits: every bound is enforced, and contradictory limits are refused."""

from __future__ import annotations

import pytest

from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import DEFAULT, TABLE, Limits, check

UNITS = ("_max", "_ms", "_s", "_size", "_mib", "_concurrency", "_percent", "_descriptors")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_limit_is_whole_named_and_within_its_own_bounds(name: str) -> None:
    limit = TABLE[name]
    assert limit.name == name
    assert limit.least <= limit.default <= limit.most
    assert name.endswith(UNITS), "a name ends in its unit"
    assert limit.meaning.endswith(".")
    assert limit.unit
    assert getattr(DEFAULT, name) == limit.default


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_limit_takes_its_ends_and_nothing_beyond(name: str) -> None:
    limit = TABLE[name]
    assert check(limit, limit.least) == limit.least
    assert check(limit, limit.most) == limit.most
    for value in (limit.least - 1, limit.most + 1, "ten", "1", 1.5, float(limit.default), None, True, ""):
        with pytest.raises(InvalidSetting, match=rf"^{name}: expected an integer from {limit.least} to") as caught:
            check(limit, value)
        assert repr(value) in caught.value.message
        assert caught.value.hint == limit.meaning


def test_limits_check_every_value_when_made() -> None:
    with pytest.raises(InvalidSetting, match="flush_size: expected"):
        Limits(flush_size=0)


def test_more_inline_than_a_chunk_holds_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"inline_bytes_max .* is more than a chunk holds"):
        Limits(inline_bytes_max=DEFAULT.chunk_bytes_max + 1)
    Limits(inline_bytes_max=DEFAULT.chunk_bytes_max)


def test_a_session_outlives_a_late_heartbeat() -> None:
    with pytest.raises(InvalidSetting, match=r"session_timeout_ms .* is under two heartbeats"):
        Limits(heartbeat_ms=1_000, session_timeout_ms=1_999)
    Limits(heartbeat_ms=1_000, session_timeout_ms=2_000)


def test_replaced_limits_are_checked_again_and_change_nothing_else() -> None:
    changed = DEFAULT.replaced(flush_size=7)
    assert (changed.flush_size, changed.flush_interval_ms) == (7, DEFAULT.flush_interval_ms)
    assert DEFAULT.flush_size == TABLE["flush_size"].default
    with pytest.raises(InvalidSetting, match="unknown limit flush_sise"):
        DEFAULT.replaced(flush_sise=7)
    with pytest.raises(InvalidSetting, match="flush_size: expected"):
        DEFAULT.replaced(flush_size=0)

"""The table of trigger.dev's behaviours is complete, and each line names a test that runs on both databases."""

from __future__ import annotations

import importlib
import inspect

import pytest

from tests.support.trigger_behaviours import TABLE, Behaviour

behaviours = importlib.import_module("tests.http.trigger_api.test_trigger_behaviours")
NUMBERS = [*map(str, range(1, 45)), *(f"two-phase {number}" for number in range(1, 10))]


def test_every_behaviour_has_exactly_one_line() -> None:
    assert [line.number for line in TABLE] == NUMBERS


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.number)
def test_a_behaviour_is_shown_unreachable_or_not_implemented(line: Behaviour) -> None:
    if line.column == "to come":
        assert "parent" in line.name
        return
    test = getattr(behaviours, line.test, None)
    assert test is not None, f"{line.test} does not exist"
    assert "kind" in inspect.signature(test).parameters, "it runs on both databases"
    assert (line.column == "unreachable") is bool(line.promise)


def test_every_test_is_in_the_table() -> None:
    named = {line.test for line in TABLE}
    assert {name for name in vars(behaviours) if name.startswith("test_")} == named - {""}

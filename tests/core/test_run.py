"""The table of a run's transitions, and the diagram made from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from headrace.core import run
from headrace.foundation.errors import IllegalTransition

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"


@pytest.mark.parametrize(("old", "new"), list(itertools.product(run.NAMES, repeat=2)))
def test_a_pair_that_the_table_does_not_list_is_an_error(old: int, new: int) -> None:
    if (old, new) in run.TRANSITIONS:
        run.check_transition(old, new)
    else:
        with pytest.raises(IllegalTransition):
            run.check_transition(old, new)


def test_a_final_state_leads_nowhere_but_to_a_redrive() -> None:
    assert {(old, new) for old, new in run.TRANSITIONS if old in run.FINAL} == {
        (run.FAILED, run.MOVED),
        (run.CANCELLED, run.MOVED),
        (run.EXPIRED, run.MOVED),
    }


def test_nothing_leaves_the_place_it_moved_away_from() -> None:
    assert not [pair for pair in run.TRANSITIONS if pair[0] == run.MOVED]


def test_changes_are_made_all_or_none() -> None:
    states = bytes((run.WAITING, run.COMPLETED))
    with pytest.raises(IllegalTransition):
        run.changed(states, [(0, run.COMPLETED), (1, run.FAILED)])
    assert run.changed(states, [(0, run.FAILED)]) == b"fc"
    assert states == b"wc"


def test_a_state_is_one_byte_that_a_person_can_read() -> None:
    assert bytes(run.NAMES) == b"wscfxem"


def test_the_diagram_in_the_architecture_page_is_drawn_from_the_table() -> None:
    assert run.diagram() in ARCHITECTURE.read_text(encoding="utf-8")

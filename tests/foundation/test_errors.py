"""Errors: who can correct them, whether a retry can help, and their hints."""

from __future__ import annotations

import pytest

from headrace.foundation import errors
from headrace.foundation.errors import ClientFault, EngineFault, HeadraceError

RAISED = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ClientFault | EngineFault)
]


@pytest.mark.parametrize("kind", RAISED)
def test_an_error_is_the_fault_of_exactly_one_side(kind: type[HeadraceError]) -> None:
    assert issubclass(kind, ClientFault) != issubclass(kind, EngineFault)
    assert kind.__doc__


@pytest.mark.parametrize("kind", RAISED)
def test_the_caller_s_fault_is_not_worth_trying_again(kind: type[HeadraceError]) -> None:
    if issubclass(kind, ClientFault):
        assert not kind.retryable
        assert 400 <= kind.status < 500
        assert kind.exit_code == 2
    else:
        assert kind.exit_code == 1
    assert kind.code == kind.code.upper()


def test_an_error_says_what_which_and_what_to_do() -> None:
    error = errors.NotFound("no such batch", hint="see `headrace batch list`", batch_id="batch_x", index=3)
    assert str(error) == "no such batch (batch_id='batch_x', index=3)\n  hint: see `headrace batch list`"
    assert (error.message, error.ids) == ("no such batch", {"batch_id": "batch_x", "index": 3})
    assert str(HeadraceError("plain")) == "plain"

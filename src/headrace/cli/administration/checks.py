"""Results of the checks of `headrace doctor`."""

from __future__ import annotations

import stat
from typing import Final, NamedTuple

OTHERS: Final = stat.S_IRWXO
"""Mode bits of users who are neither the owner nor in the group of a file."""


class CheckFailed(Exception):
    """A check found a problem."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class CheckNoted(CheckFailed):
    """A check found what may be a problem; it does not fail."""


class Finding(NamedTuple):
    """Result of one check."""

    check: str
    ok: bool
    detail: str
    hint: str = ""

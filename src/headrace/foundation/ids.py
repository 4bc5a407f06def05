"""Ids: short, sortable by time, and never reused.

An id is a prefix that names its kind, and 26 lower-case base-32 characters: 48 bits of milliseconds and 80 random bits.
So ids of one kind sort by creation, and processes need not coordinate. A run has no id of its own: it is `(batch_id,
index)`, written `run_<characters of the batch>_<index>`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final

from headrace.foundation.errors import InvalidInput

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_BODY: Final = re.compile(r"[0-9a-hjkmnp-tv-z]{26}\Z")
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,17}\Z")
INDEX_MAX: Final = 10**18 - 1


def new_batch_id(now_us: int) -> str:
    """Return a new batch id; `now_us` is microseconds since 1970, UTC."""
    return f"batch_{_body(now_us)}"


def new_session_id(now_us: int) -> str:
    """Return a new session id; a process that starts again takes another one, so none is ever reused."""
    return f"session_{_body(now_us)}"


def session_name(session_id: str) -> str:
    """Return the name of a session for log lines and errors: the id is a secret, and can't be read from the name."""
    return hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def new_move_id(now_us: int) -> str:
    """Return a new id for one move of a store into another."""
    return f"move_{_body(now_us)}"


def run_id(batch_id: str, index: int) -> str:
    """Return the id of a run as users see it."""
    return f"run_{batch_id.removeprefix('batch_')}_{index}"


def parse_run_id(text: object) -> tuple[str, int]:
    """Return `(batch_id, index)` of a run id. Raises `InvalidInput` for any text that `run_id` would not write."""
    kind, _, rest = text.partition("_") if isinstance(text, str) else ("", "", "")
    body, _, index = rest.partition("_")
    if kind != "run" or not _BODY.match(body) or not _INDEX.fullmatch(index):
        raise InvalidInput(
            f"expected a run id such as run_…_0, got {text!r:.220}",
            hint="a run id looks like run_<26 characters>_<index>; `headrace run list` shows them",
        )
    return f"batch_{body}", int(index)


def check_batch_id(text: object) -> str:
    """Return `text` if it has the form of a batch id. Raises `InvalidInput`."""
    kind, _, body = text.partition("_") if isinstance(text, str) else ("", "", "")
    if kind != "batch" or not _BODY.match(body):
        raise InvalidInput(
            f"expected a batch id such as batch_…, got {text!r:.220}",
            hint="a batch id looks like batch_<26 characters>; `headrace batch show KEY` finds a batch by its key",
        )
    return f"batch_{body}"


def _body(now_us: int) -> str:
    number = (((now_us // 1_000) & (2**48 - 1)) << 80) | secrets.randbits(80)
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -5, -5))

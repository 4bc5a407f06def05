"""Escaping of control characters in texts that are shown on a terminal.

Names, payloads and error messages come from clients. Raw, an escape sequence in one of them could clear the screen,
forge lines or set the title of the terminal of the person who reads it.
"""

from __future__ import annotations

import re
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and newline, those that reorder text, line separators and lone surrogates."""


def escaped(text: str) -> str:
    """Return a text whose control characters are shown as `\\x1b` or `\\u202e`. Tabs and newlines stay."""
    return text if text.isprintable() else _CONTROL.sub(_escape, text)


def escaped_line(text: str) -> str:
    """Return a text as one line without control characters."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()

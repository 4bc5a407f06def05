"""Malformed lines, each with the result that every reader of items must give.

`HOSTILE` maps a name to a line without its newline, and to the result for it as the first line of a stream when an item
may have `ITEM_BYTES_MAX` bytes. Each reader is fed the line whole, byte by byte, and with another record after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

ITEM_BYTES_MAX: Final = 256 * 1024

ExpectedResult: TypeAlias = Literal["ok", "blank", "unreadable", "oversized"]


class HostileLine(NamedTuple):
    line: bytes
    expected: ExpectedResult


def _padded(prefix: bytes, suffix: bytes, size: int) -> bytes:
    return prefix + b"x" * (size - len(prefix) - len(suffix)) + suffix


HOSTILE: Final[Mapping[str, HostileLine]] = {
    "nothing": HostileLine(b"", "blank"),
    "spaces and tabs": HostileLine(b" \t  ", "blank"),
    "a carriage return alone": HostileLine(b"\r", "blank"),
    "a byte order mark alone": HostileLine(b"\xef\xbb\xbf", "blank"),
    "vertical tab and form feed": HostileLine(b"\x0b\x0c", "blank"),
    "an ordinary record": HostileLine(b'{"index":0,"task":"t","payload":"p"}', "ok"),
    "a carriage return at the end": HostileLine(b'{"index":0}\r', "ok"),
    "white space around": HostileLine(b' \t{"index":0} \t', "ok"),
    "a byte order mark before a record": HostileLine(b'\xef\xbb\xbf{"index":0}', "ok"),
    "two byte order marks": HostileLine(b'\xef\xbb\xbf\xef\xbb\xbf{"index":0}', "unreadable"),
    "a byte order mark after the record": HostileLine(b'{"index":0}\xef\xbb\xbf', "unreadable"),
    "utf-16": HostileLine('{"a":1}'.encode("utf-16-be"), "unreadable"),
    "a number alone": HostileLine(b"0", "ok"),
    "a null alone": HostileLine(b"null", "ok"),
    "an escaped newline": HostileLine(rb'{"text":"one\ntwo"}', "ok"),
    "a carriage return inside a record": HostileLine(b'{"a":\r1}', "ok"),
    "a raw carriage return in a string": HostileLine(b'"a\rb"', "unreadable"),
    "unicode line separators": HostileLine('"a\u2028b\u2029c\u0085d"'.encode(), "ok"),
    "not json": HostileLine(b"hello", "unreadable"),
    "single quotes": HostileLine(b"{'a':1}", "unreadable"),
    "a trailing comma": HostileLine(b'{"a":1,}', "unreadable"),
    "a comment": HostileLine(b'{"a":1} // one', "unreadable"),
    "two values on a line": HostileLine(b"1 2", "unreadable"),
    "two objects on a line": HostileLine(b"{}{}", "unreadable"),
    "half an object": HostileLine(b'{"a":', "unreadable"),
    "a value that goes on": HostileLine(b"[1,", "unreadable"),
    "an open string": HostileLine(b'"abc', "unreadable"),
    "a leading zero": HostileLine(b"01", "unreadable"),
    "a lone minus": HostileLine(b"-", "unreadable"),
    "not a number": HostileLine(b'{"a":NaN}', "unreadable"),
    "infinity": HostileLine(b"Infinity", "unreadable"),
    "minus infinity": HostileLine(b'{"a":-Infinity}', "unreadable"),
    "a float beyond floats": HostileLine(b"1e999", "ok"),
    "an integer of a hundred digits": HostileLine(b"9" * 100, "ok"),
    "an integer of ten thousand digits": HostileLine(b"9" * 10_000, "ok"),
    "a raw nul": HostileLine(b'"a\x00b"', "unreadable"),
    "a nul after the record": HostileLine(b'{"a":1}\x00', "unreadable"),
    "an escaped nul": HostileLine(rb'"a\u0000b"', "ok"),
    "a raw tab in a string": HostileLine(b'"a\tb"', "unreadable"),
    "a bad escape": HostileLine(rb'"\x41"', "unreadable"),
    "half an escape": HostileLine(rb'"\u12"', "unreadable"),
    "a pair of surrogates": HostileLine(rb'"\ud83d\ude00"', "ok"),
    "a high surrogate alone": HostileLine(rb'"\ud800"', "unreadable"),
    "a high surrogate before text": HostileLine(rb'"a\ud800 more text"', "unreadable"),
    "two high surrogates": HostileLine(rb'"\ud800\ud800"', "unreadable"),
    "a low surrogate alone": HostileLine(rb'"\udc00"', "unreadable"),
    "an escaped backslash before u": HostileLine(rb'"\\ud800"', "ok"),
    "a surrogate as raw bytes": HostileLine(b'"\xed\xa0\x80"', "unreadable"),
    "latin-1": HostileLine(b'"caf\xe9"', "unreadable"),
    "an overlong slash": HostileLine(b'"\xc0\xaf"', "unreadable"),
    "a character beyond unicode": HostileLine(b'"\xf4\x90\x80\x80"', "unreadable"),
    "half a character": HostileLine(b'"\xf0\x9f\x98"', "unreadable"),
    "a line cut inside a character": HostileLine(b'"\xf0\x9f', "unreadable"),
    "bytes of two to four a character": HostileLine('"é漢😀"'.encode(), "ok"),
    "duplicate keys": HostileLine(b'{"index":1,"index":2}', "ok"),
    "nesting of a hundred": HostileLine(b"[" * 100 + b"]" * 100, "ok"),
    "nesting of 100,000": HostileLine(b"[" * 100_000 + b"]" * 100_000, "unreadable"),
    "objects nested 20,000 deep": HostileLine(b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "unreadable"),
    "just the limit": HostileLine(_padded(b'{"index":0,"p":"', b'"}', ITEM_BYTES_MAX), "ok"),
    "one byte over the limit": HostileLine(_padded(b'{"index":0,"p":"', b'"}', ITEM_BYTES_MAX + 1), "oversized"),
    "over the limit by its carriage return": HostileLine(
        _padded(b'{"index":0,"p":"', b'"}\r', ITEM_BYTES_MAX + 1), "oversized"
    ),
    "over the limit and not json": HostileLine(b"\x00\xff" * ITEM_BYTES_MAX, "oversized"),
    "over the limit with an index of a hundred digits": HostileLine(
        _padded(b'{"index":' + b"9" * 100 + b',"p":"', b'"}', ITEM_BYTES_MAX + 9), "oversized"
    ),
    "over the limit with a negative index": HostileLine(
        _padded(b'{"index":-1,"p":"', b'"}', ITEM_BYTES_MAX + 9), "oversized"
    ),
    "spaces over the limit": HostileLine(b" " * (ITEM_BYTES_MAX + 1), "oversized"),
}

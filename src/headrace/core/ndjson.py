"""The NDJSON machine: bytes in, one item per line out, in order.

Rule 1: a bad line fails alone. It becomes a marker in its position (`Oversized`, `Unreadable`), never an exception, so
one line can't fail its batch; only an input of mostly blank lines is refused as a whole. Rule 2: memory is bounded by
one line. A line over the limit is dropped as it arrives; 512 bytes of it are kept. Rule 3: the pieces in which the
input arrives have no effect, neither on the items nor on the order of the work.

A line ends at 0x0A and nowhere else. Its size is the number of its raw bytes before that, checked before anything is
decoded. Then the first line loses its byte order mark, and each line the white space around it, including 0x0D. A line
that is blank by then is not an item, but it counts as a line. Lines are numbered from 1, items from 0.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final, TypeAlias

import msgspec

from headrace.foundation.errors import IllegalTransition, InvalidInput
from headrace.foundation.ids import INDEX_MAX

PREFIX_BYTES: Final = 512
"""Bytes kept of a line over the limit: enough to find an index and a task near its beginning."""

RAW_BYTES: Final = 1_024
"""Bytes kept of a line that is not JSON, to be shown with the failed run."""

BLANK_LINES_MAX: Final = 10_000
BLANK_LINES_AN_ITEM: Final = 16
"""Lines that an input may have, beside `BLANK_LINES_MAX`, for each item: blank lines cost time and bring nothing."""
_BLANK_RUN: Final = b"\n" * (BLANK_LINES_MAX + 2)

NO_INDEX: Final = -1
UNKNOWN_TASK: Final = "unknown"

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_INDEX: Final = re.compile(rb"0|[1-9][0-9]{0,17}")
_TOKEN: Final = re.compile(
    rb"""[ \t\r\n]*+ (?P<token> "(?:[^"\\]|\\.)*+" | [{}\[\]:,] | [^ \t\r\n"{}\[\]:,]++ )""",
    re.VERBOSE | re.DOTALL,
)
_LONE_HIGH_SURROGATE: Final = re.compile(
    rb"(?<!\\)(?:\\\\)*+\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)

assert INDEX_MAX == 10**18 - 1, "the pattern of an index allows at most 18 digits, as INDEX_MAX does"


def wide_encoding(prefix: bytes) -> str | None:
    """Return the encoding of a text that is UTF-16 or UTF-32, by its first bytes; None if it may be UTF-8."""
    if prefix.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if prefix.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if len(prefix) >= 4 and 0 in prefix[:4]:  # no text in UTF-8 has a NUL, and text in UTF-16 begins with ASCII
        return "UTF-32" if prefix[:4].count(0) > 2 else "UTF-16"
    return None


class Oversized(msgspec.Struct, frozen=True):
    """A line over the size limit of an item.

    `index` and `task` are those of the line if its first 512 bytes contain them; otherwise its position among the items
    and "unknown". `raw`: these bytes.
    """

    index: int
    task: str
    actual_bytes: int
    max_bytes: int
    line: int
    raw: bytes = b""


class Unreadable(msgspec.Struct, frozen=True):
    """A line that is not UTF-8 or not JSON; `index` is its position among the items, `reason` the error.

    `raw`: its first `RAW_BYTES` bytes.
    """

    index: int
    line: int
    reason: str
    raw: bytes = b""


Item: TypeAlias = bytes | Oversized | Unreadable


class NdjsonMachine:
    """Splits a stream of bytes into items, in pieces of any size.

    `validate=False` leaves UTF-8 and JSON to the decoder of the items; sizes are checked all the same. For a stream
    that is resumed in the middle, the arguments give the bytes, items and lines before it.

    Linear: each byte is read and copied a fixed number of times, for any pieces. An unfinished line is kept in one
    bytearray instead of a list of its pieces: 3 MiB in pieces of two bytes would be 60 MiB of small objects.
    """

    def __init__(
        self,
        *,
        item_bytes_max: int,
        validate: bool = True,
        bytes_before: int = 0,
        items_before: int = 0,
        lines_before: int = 0,
    ) -> None:
        if item_bytes_max < 1 or min(bytes_before, items_before, lines_before) < 0:
            raise InvalidInput(
                "expected a limit of at least one byte and a start of at least 0",
                item_bytes_max=item_bytes_max,
                bytes_before=bytes_before,
                items_before=items_before,
                lines_before=lines_before,
            )
        self._item_bytes_max = item_bytes_max
        self._validate = validate
        self._decoder = msgspec.json.Decoder(msgspec.Raw)
        self._held = bytearray()  # the unfinished line, or the prefix of one that is over the limit
        self._held_bytes = 0  # length of the unfinished line so far, including dropped bytes
        self._line_start = bytes_before
        self._resume_at = bytes_before
        self._items_count = items_before
        self._lines_count = self._lines_before = lines_before
        self._ends: list[int] = []
        self._closed = False

    @property
    def line_no(self) -> int:
        """Number of the last line that ended; 0 before the first."""
        return self._lines_count

    @property
    def items_count(self) -> int:
        """Number of items returned so far, markers included: the position of the next one."""
        return self._items_count

    @property
    def consumed_bytes(self) -> int:
        """Offset after the last item's line: a reader that resumes there misses and repeats nothing."""
        return self._resume_at

    @property
    def last_ends(self) -> list[int]:
        """For each item returned last, the offset after its line: where to resume once the item is durable."""
        return self._ends

    def feed(self, data: bytes) -> list[Item]:
        """Return the items whose lines end in `data`. Raises `InvalidInput` for an input of mostly blank lines."""
        if self._closed:
            raise IllegalTransition(
                "got bytes after the end of the stream",
                hint="create a new machine for a new stream",
                line=self._lines_count,
            )
        self._ends = []
        items: list[Item] = []
        if _BLANK_RUN in data:
            raise self._too_blank()
        lines = data.split(b"\n")
        unfinished = lines.pop()
        if lines:
            # A line that began in earlier pieces, and the very first line, are handled alone; the rest together.
            skipped_bytes = 0
            if self._held_bytes or not self._line_start:
                first = lines.pop(0)
                skipped_bytes = len(first) + 1
                self._hold(first)
                self._finish_held(newline_bytes=1, items=items)
            if lines:
                self._take_lines(lines, memoryview(data)[skipped_bytes : len(data) - len(unfinished)], items)
        if unfinished:
            self._hold(unfinished)
        if self._lines_count - self._lines_before > BLANK_LINES_MAX + BLANK_LINES_AN_ITEM * self._items_count:
            raise self._too_blank()
        return items

    def _too_blank(self) -> InvalidInput:
        return InvalidInput(
            f"expected items, got more than {BLANK_LINES_MAX} blank lines after line {self._lines_count}",
            hint="remove the blank lines, or send the input in its own format",
        )

    def close(self) -> list[Item]:
        """Return the item of a last line without a newline, if there is one. May be called twice."""
        self._ends = []
        items: list[Item] = []
        if self._held_bytes:
            self._finish_held(newline_bytes=0, items=items)
        self._closed = True
        return items

    def _hold(self, piece: bytes) -> None:
        """Keep a piece of the unfinished line; once the line is over the limit, only its first bytes."""
        over_before = self._held_bytes > self._item_bytes_max
        self._held_bytes += len(piece)
        if over_before:
            return
        if self._held_bytes <= self._item_bytes_max:
            self._held += piece
            return
        self._held += piece[:PREFIX_BYTES]
        self._held = self._held[:PREFIX_BYTES]

    def _finish_held(self, *, newline_bytes: int, items: list[Item]) -> None:
        line = bytes(self._held)
        actual_bytes = self._held_bytes
        self._held = bytearray()
        self._held_bytes = 0
        self._take_line(line, actual_bytes, newline_bytes, items)

    def _take_lines(self, lines: list[bytes], block: memoryview, items: list[Item]) -> None:
        """Handle many whole lines at once; `block` holds them, newlines included.

        The usual case, in which every line is valid, takes a few calls for all of them: a method call per line costs
        four times as much. If any line is invalid, each line is handled alone.
        """
        stripped = list(map(bytes.strip, lines))
        is_small = len(block) <= self._item_bytes_max or max(map(len, lines)) <= self._item_bytes_max
        if not is_small or (self._validate and not self._are_readable(stripped, block)):
            for line in lines:
                self._take_line(line, len(line), 1, items)
            return
        items_before = len(items)
        end = self._line_start
        ends = self._ends
        for line, item in zip(lines, stripped, strict=True):
            end += len(line) + 1
            if item:
                items.append(item)
                ends.append(end)
        self._items_count += len(items) - items_before
        self._lines_count += len(lines)
        self._line_start = end
        if ends:
            self._resume_at = ends[-1]

    def _are_readable(self, stripped: list[bytes], block: memoryview) -> bool:
        """True if every line is UTF-8, and JSON or blank. No character contains a newline, so one check is enough."""
        try:
            str(block, "utf-8")
            deque(map(self._decoder.decode, filter(None, stripped)), maxlen=0)
        except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
            return False
        return True

    def _take_line(self, line: bytes, actual_bytes: int, newline_bytes: int, items: list[Item]) -> None:
        """Handle one line alone. Of a line over the limit, `line` may have only the first bytes."""
        if not self._line_start:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        self._lines_count += 1
        self._line_start += actual_bytes + newline_bytes
        item = self._item_of(line, actual_bytes)
        if item:
            items.append(item)
            self._ends.append(self._line_start)
            self._resume_at = self._line_start
            self._items_count += 1

    def _item_of(self, line: bytes, actual_bytes: int) -> Item | None:
        """Return the item or marker of a line, or None for a blank line."""
        if actual_bytes > self._item_bytes_max:
            index, task = extract_index_and_task(line[:PREFIX_BYTES])
            if index == NO_INDEX:
                index = self._items_count
            raw = line[: min(PREFIX_BYTES, self._item_bytes_max)]  # no more is kept of a line that arrives in pieces
            return Oversized(index, task, actual_bytes, self._item_bytes_max, self._lines_count, raw)
        item = line.strip()
        if not item:
            return None
        fault = self._fault(item) if self._validate else None
        if fault is None:
            return item
        kind, detail = fault
        reason = f"Invalid {kind} at line {self._lines_count}: {detail}"
        return Unreadable(self._items_count, self._lines_count, reason, item[:RAW_BYTES])

    def _fault(self, item: bytes) -> tuple[str, str] | None:
        """Return the format that an item violates, and the error; bytes are counted from 0. None for a valid item."""
        try:
            if not item.isascii():
                item.decode()
            self._decoder.decode(item)
        except UnicodeDecodeError as error:
            return "UTF-8", f"{error.reason} (byte {error.start})"
        except RecursionError:
            return "JSON", "it is nested too deeply"
        except msgspec.DecodeError as error:
            return "JSON", _plain_reason(str(error), item)
        return None


def extract_index_and_task(prefix: bytes) -> tuple[int, str]:
    """Return index and task of an item of which only the beginning is known; -1 and "unknown" if it does not contain
    them.

    Only keys of the outermost object count, in any order; as in decoding, the last of two equal keys wins. A value that
    the prefix cuts off is ignored: the 12 of a cut 1234 would be another item's index. An invalid index is ignored too:
    negative, a fraction, or with more digits than any index has.
    """
    index, task = NO_INDEX, UNKNOWN_TASK
    depth = 0
    key = ""
    is_key_next = False
    position = 0
    while match := _TOKEN.match(prefix, position):
        position = match.end()
        token = match["token"]
        if depth == 0 and token != b"{":
            break
        if token in b"{}[]:,":
            depth += (token in b"{[") - (token in b"}]")
            is_key_next = token in b"{,"
        elif depth == 1 and is_key_next:
            key = _decoded_text(token)
            is_key_next = False
        elif depth == 1 and key == "index":
            is_whole = position < len(prefix) and _INDEX.fullmatch(token)
            index = int(token) if is_whole else NO_INDEX
        elif depth == 1 and key == "task":
            task = _decoded_text(token) or UNKNOWN_TASK
    return index, task


def _decoded_text(token: bytes) -> str:
    """Return the string of a JSON token; empty if it is not a string."""
    try:
        return msgspec.json.decode(token, type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""


def _plain_reason(reason: str, item: bytes) -> str:
    """Return the decoder's reason in plain words.

    msgspec 0.22 reports an escape of half a surrogate pair as truncated input, or as the unexpected end of an escape,
    because it looks for the other half after the end of the string.
    """
    is_about_the_end = "truncated" in reason or "hex escape" in reason
    if is_about_the_end and _LONE_HIGH_SURROGATE.search(item):
        return "an escape contains half a surrogate pair"
    if "truncated" in reason:
        return "the line ends before its value does"
    return reason.removeprefix("JSON is malformed: ")

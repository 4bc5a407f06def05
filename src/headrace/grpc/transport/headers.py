"""Header blocks: read by `hpack`, and written without state.

What we write names no entry of the dynamic table, so a block is the same bytes whatever went before, and those that
every answer begins and ends with are made once. What a peer writes is decoded once and remembered while its dynamic
table stays as it is: a client's calls differ in their messages and seldom in their headers, and decoding a block costs
more than all the frames of a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote

from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.table import HeaderTable

from headrace.grpc.transport.frames import Broken, Fault
from headrace.grpc.transport.signing import HEADER

LIST_BYTES_MAX: Final = 16 * 1024
"""Of one header list, decoded; a name or value counts 32 bytes more than it has."""

BLOCK_BYTES_MAX: Final = 16 * 1024
"""Of one header block as it is sent, in however many frames."""

MESSAGE_BYTES_MAX: Final = 4 * 1024
"""Of the words of a status, as they are carried: grpcio takes headers of 8 KiB."""

_SEEN_BLOCKS_MAX: Final = 64
_SEEN_BYTES_MAX: Final = 1_024
_SIGNATURE_CHARS: Final = 64
_SIGNED: Final = bytes((len(HEADER),)) + HEADER.encode() + bytes((_SIGNATURE_CHARS,))
_SIGNED_BYTES: Final = 1 + len(_SIGNED) + _SIGNATURE_CHARS
_UNINDEXED: Final = b"\x00\x10"
_RESIZE: Final = range(0x20, 0x40)
_NAME: Final = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+\Z")
_VALUE: Final = re.compile(rb"[^\x00\r\n]*\Z")
_OF_HTTP_1: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
_PLAIN: Final = frozenset(range(0x20, 0x7F)) - {ord("%")}

Headers = Mapping[str, str]
"""By name, pseudo-headers too (`:path`); of several of one name the last. Shared between calls: not to be changed."""


class _Table(HeaderTable):
    """Counts what it is told, so that a block that changed nothing is known as one."""

    def __init__(self) -> None:
        super().__init__()
        self.changes_count = 0

    def add(self, name: bytes, value: bytes) -> None:
        """An entry of the dynamic table."""
        self.changes_count += 1
        super().add(name, value)


class HeaderReader:
    """One peer's header blocks, in order."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=LIST_BYTES_MAX)
        self._table = self._decoder.header_table = _Table()
        self._seen: dict[bytes, Headers | None] = {}

    def read(self, block: bytes) -> Headers | None:
        """The headers of a block; None when they are none that a request or answer may have. Raises `Broken`.

        A signature is another for each message. Where it stands last and plainly, as clients send it, what is before it
        is a block of its own, and mostly one that was seen: it ends where a field does, or can't be decoded (when
        the end of a value looks like a signature, with a byte in it that no value may have).
        """
        seen = self._seen
        if block in seen:
            return seen[block]
        if block[-_SIGNED_BYTES + 1 : -_SIGNATURE_CHARS] == _SIGNED and block[-_SIGNED_BYTES] in _UNINDEXED:
            signature = block[-_SIGNATURE_CHARS:]
            if signature.isalnum():
                others = self.read(block[:-_SIGNED_BYTES])
                return None if others is None else {**others, HEADER: signature.decode("ascii")}
        before = self._table.changes_count
        try:
            fields: Iterable[tuple[bytes, bytes]] = self._decoder.decode(block, raw=True)
            found = _checked(fields)
        except (HPACKError, ValueError, IndexError) as error:
            raise Broken(Fault.COMPRESSION_ERROR, f"a header block can't be read: {error}"[:200]) from None
        if self._table.changes_count != before or (block and block[0] in _RESIZE):
            seen.clear()
        elif len(block) <= _SEEN_BYTES_MAX:
            if len(seen) >= _SEEN_BLOCKS_MAX:
                seen.clear()
            seen[block] = found
        return found


def _checked(fields: Iterable[tuple[bytes, bytes]]) -> Headers | None:
    found: dict[str, str] = {}
    is_past_pseudo = False
    for name, value in fields:
        if not _NAME.match(name) or not _VALUE.match(value) or name in _OF_HTTP_1:
            return None
        text = name.decode("ascii")
        if text[0] == ":":
            if is_past_pseudo or text in found:
                return None
        else:
            is_past_pseudo = True
        found[text] = value.decode("latin-1")
    return found


def literal(name: str, value: str, *, is_secret: bool = False) -> bytes:
    """A field as it is, for no table. `is_secret`: nor for one of anybody who passes it on."""
    field = value.encode("latin-1", "replace")
    return b"".join((b"\x10" if is_secret else b"\x00", _length(len(name)), name.encode(), _length(len(field)), field))


def block(fields: Mapping[str, str]) -> bytes:
    """Fields as a block."""
    return b"".join(literal(name, value) for name, value in fields.items())


def _length(size: int) -> bytes:
    if size < 127:
        return bytes((size,))
    found, size = bytearray((127,)), size - 127
    while size >= 128:
        found.append(size & 127 | 128)
        size >>= 7
    found.append(size)
    return bytes(found)


def percent(message: str) -> str:
    """A message as `grpc-message` carries it; the beginning of one that many peers would find too long a header."""
    carried = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in message.encode("utf-8", "replace"))
    return carried if len(carried) <= MESSAGE_BYTES_MAX else percent(message[: len(message) // 2])


def from_percent(text: str) -> str:
    """What `grpc-message` carries; anything that can't be read stays as it is."""
    return unquote(text, errors="replace")

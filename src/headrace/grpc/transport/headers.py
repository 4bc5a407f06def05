"""Header blocks: decoded by `hpack`, encoded here without state.

Blocks written here use no entry of the dynamic table. So a block does not depend on what was sent before, and the
blocks that begin and end every response are built once.

Received blocks are cached while the peer's dynamic table does not change. The calls of one client differ in their
messages and seldom in their headers, and decoding a block costs more than handling all the frames of a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote

from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.table import HeaderTable

from headrace.grpc.transport.frames import ErrorCode, ProtocolError
from headrace.grpc.transport.signing import HEADER

LIST_BYTES_MAX: Final = 16 * 1024
"""Largest decoded header list. Each field counts 32 bytes more than its name and value (RFC 9113, section 6.5.2)."""

BLOCK_BYTES_MAX: Final = 16 * 1024
"""Largest encoded header block, over all of its frames."""

MESSAGE_BYTES_MAX: Final = 4 * 1024
"""Largest `grpc-message`, encoded: grpcio accepts headers of up to 8 KiB."""

_SEEN_BLOCKS_MAX: Final = 64
_SEEN_BYTES_MAX: Final = 1_024
_SIGNATURE_CHARS: Final = 64
_SIGNED: Final = bytes((len(HEADER),)) + HEADER.encode() + bytes((_SIGNATURE_CHARS,))
_SIGNED_BYTES: Final = 1 + len(_SIGNED) + _SIGNATURE_CHARS
_UNINDEXED: Final = b"\x00\x10"
_RESIZE: Final = range(0x20, 0x40)
_NAME: Final = re.compile(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+\Z")
_VALUE: Final = re.compile(rb"(?:[^\x00\r\n\t ](?:[^\x00\r\n]*[^\x00\r\n\t ])?)?\Z")
_PSEUDO: Final = frozenset((":method", ":scheme", ":path", ":authority", ":status"))
_HTTP_1_ONLY: Final = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))
_ONCE: Final = frozenset(("content-length", "host"))
"""Fields that may be repeated only with the same value."""
_UNESCAPED: Final = frozenset(range(0x20, 0x7F)) - {ord("%")}

Headers = Mapping[str, str]
"""Headers by name, pseudo-headers (`:path`) included. Of repeated names the last value wins. Shared between calls: do
not modify.
"""


class _Table(HeaderTable):
    """Dynamic table that counts its changes, so that a block that changed nothing can be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.changes_count = 0

    def add(self, name: bytes, value: bytes) -> None:
        """Add an entry and count the change."""
        self.changes_count += 1
        super().add(name, value)


class HeaderReader:
    """Decoder of one peer's header blocks, in the order they were sent. `decoded_bytes`: bytes of the last block that
    were decoded, 0 if it was in the cache.
    """

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=LIST_BYTES_MAX)
        self._table = self._decoder.header_table = _Table()
        self._seen: dict[bytes, Headers | None] = {}
        self.decoded_bytes = 0

    def read(self, block: bytes) -> Headers | None:
        """Decode a block. Returns None for headers that no request or response may have. Raises `ProtocolError`.

        The signature differs for every message. Where it is the last field and not indexed, as clients send it, the
        rest of the block is decoded alone, since that part is usually cached. The cut is safe: either the rest ends at
        a field boundary, or it fails to decode (a value whose end looks like a signature would hold a byte that no
        value may have).
        """
        seen = self._seen
        self.decoded_bytes = 0
        if block in seen:
            return seen[block]
        if block[-_SIGNED_BYTES + 1 : -_SIGNATURE_CHARS] == _SIGNED and block[-_SIGNED_BYTES] in _UNINDEXED:
            signature = block[-_SIGNATURE_CHARS:]
            if signature.isalnum():
                unsigned = self.read(block[:-_SIGNED_BYTES])
                return None if unsigned is None else {**unsigned, HEADER: signature.decode("ascii")}
        self.decoded_bytes = len(block)
        before = self._table.changes_count
        try:
            fields: Iterable[tuple[bytes, bytes]] = self._decoder.decode(block, raw=True)
            headers = _headers_of(fields)
        except (HPACKError, ValueError, IndexError) as error:
            raise ProtocolError(
                ErrorCode.COMPRESSION_ERROR,
                f"expected a valid HPACK header block, got one that can't be decoded: {error}"[:200],
            ) from None
        if self._table.changes_count != before or (block and block[0] in _RESIZE):
            seen.clear()
        elif len(block) <= _SEEN_BYTES_MAX:
            if len(seen) >= _SEEN_BLOCKS_MAX:
                seen.clear()
            seen[block] = headers
        return headers


def _headers_of(fields: Iterable[tuple[bytes, bytes]]) -> Headers | None:
    headers: dict[str, str] = {}
    is_past_pseudo = False
    for name, value in fields:
        if not _NAME.match(name) or not _VALUE.match(value) or name in _HTTP_1_ONLY:
            return None
        text = name.decode("ascii")
        if text[0] == ":":
            if is_past_pseudo or text in headers or text not in _PSEUDO:
                return None
        else:
            is_past_pseudo = True
        words = value.decode("latin-1")
        if text in _ONCE and headers.get(text, words) != words:
            return None
        headers[text] = words
    return headers if _is_consistent(headers) else None


def _is_consistent(headers: Mapping[str, str]) -> bool:
    """Check the fields whose values HTTP/2 restricts (RFC 9113, sections 8.1.1, 8.2.2 and 8.3.1)."""
    length = headers.get("content-length", "0")
    host = headers.get("host")
    return (
        headers.get("te", "trailers") == "trailers"
        and length.isascii()
        and length.isdigit()
        and headers.get(":path", "/")[:1] == "/"
        and (host is None or headers.get(":authority", host) == host)
    )


def encode_field(name: str, value: str, *, is_secret: bool = False) -> bytes:
    """Encode a literal field without indexing. `is_secret`: never indexed, so no proxy may put it into its table
    either.
    """
    field = value.encode("latin-1", "replace")
    return b"".join(
        (b"\x10" if is_secret else b"\x00", _encode_length(len(name)), name.encode(), _encode_length(len(field)), field)
    )


def encode_block(fields: Mapping[str, str]) -> bytes:
    """Encode fields as a header block."""
    return b"".join(encode_field(name, value) for name, value in fields.items())


def _encode_length(size: int) -> bytes:
    if size < 127:
        return bytes((size,))
    headers, size = bytearray((127,)), size - 127
    while size >= 128:
        headers.append(size & 127 | 128)
        size >>= 7
    headers.append(size)
    return bytes(headers)


def encode_status_message(message: str) -> str:
    """Percent-encode a status message for `grpc-message`. One that would exceed `MESSAGE_BYTES_MAX` is cut."""
    encoded = "".join(
        chr(byte) if byte in _UNESCAPED else f"%{byte:02X}" for byte in message.encode("utf-8", "replace")
    )
    return encoded if len(encoded) <= MESSAGE_BYTES_MAX else encode_status_message(message[: len(message) // 2])


def decode_status_message(text: str) -> str:
    """Decode a `grpc-message`; sequences that are not UTF-8 are replaced."""
    return unquote(text, errors="replace")

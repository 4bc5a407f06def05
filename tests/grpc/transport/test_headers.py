"""Header blocks of gRPC: status messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.grpc.transport.headers import decode_status_message, encode_status_message


@given(st.text(max_size=20))
def test_a_status_message_survives_percent_encoding(text: str) -> None:
    encoded = encode_status_message(text)
    assert encoded.isascii()
    assert not any(character in encoded for character in "\r\n\0")
    assert decode_status_message(encoded) == text.encode("utf-8", "replace").decode()

"""What both floors run: the items, their packing, and a coroutine that does nothing, called the straight way."""

from __future__ import annotations

import contextvars
from itertools import accumulate, pairwise
from typing import Final

import msgspec

CHUNK_RUNS: Final = 256
CHUNKS_A_COMMIT: Final = 32
ITEM_BYTES: Final = 100
PAD: Final = "x" * 79


class Item(msgspec.Struct):
    """One input: 100 bytes as JSON."""

    n: int
    pad: str


def run(items: bytes) -> list[bytes]:
    """Decode, call and encode every run of one block, each in a context of its own."""
    decode = msgspec.json.Decoder(Item).decode
    encode = msgspec.json.Encoder().encode
    encoded: list[bytes] = []
    for item in unpack(items):
        coroutine = _nothing(decode(item))
        try:
            contextvars.copy_context().run(coroutine.send, None)
        except StopIteration as done:
            encoded.append(encode(done.value))
    return encoded


def pack(strings: list[bytes]) -> bytes:
    """Lengths of one byte, then the strings, as the product packs short ones."""
    return b"".join((b"\x01", len(strings).to_bytes(4, "little"), bytes(map(len, strings)), *strings))


def unpack(packed: bytes) -> list[bytes]:
    """The strings that `pack` was given."""
    count = int.from_bytes(packed[1:5], "little")
    return [packed[start:end] for start, end in pairwise(accumulate(packed[5 : 5 + count], initial=5 + count))]


async def _nothing(_item: Item) -> None:
    return None

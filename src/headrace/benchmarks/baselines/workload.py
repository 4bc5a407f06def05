"""The workload of the baselines: the items, their packing, and a no-op coroutine."""

from __future__ import annotations

import contextvars
import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

import msgspec

CHUNK_RUNS: Final = 256
CHUNKS_A_COMMIT: Final = 32
ITEM_BYTES: Final = 100
PAD: Final = "x" * 79
SESSION: Final = "session_00000000000000000000000000"
SESSION_ROW: Final[dict[str, object]] = {
    "id": SESSION,
    "kind": "baseline",
    "host": "",
    "pid": 0,
    "started_us": 0,
    "heartbeat_us": 0,
    "serves": "",
    "environment": "default",
    "key_id": "",
}
"""Values of `insert_session`."""


class Item(msgspec.Struct):
    """One input: 100 bytes as JSON."""

    n: int
    pad: str


def run(items: bytes) -> list[bytes]:
    """Decode, call and encode every run of one block, each in its own context."""
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
    """Pack strings: lengths of one byte, then the strings, as the product packs short ones."""
    return b"".join((b"\x01", len(strings).to_bytes(4, "little"), bytes(map(len, strings)), *strings))


def unpack(packed: bytes) -> list[bytes]:
    """Return the strings that `pack` was given."""
    count = int.from_bytes(packed[1:5], "little")
    return [packed[start:end] for start, end in pairwise(accumulate(packed[5 : 5 + count], initial=5 + count))]


async def _nothing(_item: Item) -> None:
    return None


def statements(folder: Path) -> dict[str, str]:
    """Read the product's statements in `store/…/sql` by name, with the fragments expanded."""
    texts: dict[str, str] = {}
    fragments: dict[str, tuple[list[str], str]] = {}
    head = re.compile(r"^-- (fragment )?([a-z_0-9]+)(?:\(([a-z_, ]*)\))?: .+$", re.MULTILINE)
    for file in (folder.parents[1] / "fragments.sql", *sorted(folder.glob("*.sql"))):
        pieces = head.split(file.read_text(encoding="utf-8"))
        for kind, name, parameters, text in zip(pieces[1::4], pieces[2::4], pieces[3::4], pieces[4::4], strict=True):
            if kind:
                fragments[name] = (parameters or "").split(", "), re.sub(r"(?m)^--.*\n", "", text).strip()
            else:
                texts[name] = text

    def expanded(match: re.Match[str]) -> str:
        if match[1] == "schema":
            return match[0]
        parameters, text = fragments[match[1]]
        for parameter, argument in zip(parameters, (match[2] or "").split(","), strict=True):
            text = text.replace(f"{{{parameter}}}", argument.strip())
        return text

    return {name: re.sub(r"\{([a-z_]+)(?:\(([^(){}]*)\))?\}", expanded, text) for name, text in texts.items()}

"""Messages between a worker and its child processes: length-prefixed MessagePack over a socket pair."""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from headrace.core.block import Extra

HEADER: Final = struct.Struct("<I")


class ChildSetup(msgspec.Struct, tag="begin"):
    """First message to a child: where its tasks are and how it runs them.

    Without a `payloads_url`, it reads and writes objects by messages to its parent.
    """

    tasks: list[tuple[str, str, str, str]]
    options: dict[str, str]
    paths: list[str]
    concurrency: int
    inline_sync: bool
    payloads_url: str | None
    environment: str
    marks_path: str
    limits: dict[str, int]
    settings: dict[str, str | int]
    configures_logs: bool


class LeaseSlice(msgspec.Struct, tag="slice"):
    """Some runs of one lease, for one child."""

    id: int
    span_id: int
    token: int
    batch_id: str
    task: str
    queue: str
    attempt: int
    crashes_count: int
    at_most_once: bool
    expires_us: int
    runs_count: int
    span_slots: list[int]
    indexes: list[int]
    payloads: list[bytes]
    kinds: bytes | None
    extras: dict[int, Extra]


class InterruptRuns(msgspec.Struct, tag="interrupt"):
    """Interrupt these runs of a slice: they were cancelled. `numbers` count in the slice, from 0."""

    id: int
    numbers: list[int]


class StopChild(msgspec.Struct, tag="stop"):
    """Begin no run; end those in flight within `grace_s`, report them, and exit."""

    grace_s: float


class ObjectAnswer(msgspec.Struct, tag="object"):
    """The parent's answer to `FetchObject` or `PutResult`: `data` with a kind or a key, or the error."""

    request_no: int
    data: bytes = b""
    kind: int = 0
    key: str = ""
    error_code: str = ""
    error: str = ""
    hint: str = ""


class FetchObject(msgspec.Struct, tag="fetch"):
    """Ask the parent for the payload that a reference names: the child can't open the object store itself."""

    request_no: int
    reference: bytes


class PutResult(msgspec.Struct, tag="put"):
    """Ask the parent to store a result over the inline limit."""

    request_no: int
    batch_id: str
    result: bytes


class SliceOutcomes(msgspec.Struct, tag="ended"):
    """Outcomes of runs of a slice: `(number in the slice, code, result, kind, due_us, object_key)` each."""

    id: int
    runs: list[tuple[int, int, bytes, int, int, str]]
    over: bool


class ChildReady(msgspec.Struct, tag="ready"):
    """The child has loaded its tasks and waits for slices."""


class ChildFailed(msgspec.Struct, tag="broken"):
    """The child could not load its tasks."""

    reason: str


ToChild = ChildSetup | LeaseSlice | InterruptRuns | ObjectAnswer | StopChild
FromChild = SliceOutcomes | FetchObject | PutResult | ChildReady | ChildFailed

_encode: Final = msgspec.msgpack.Encoder().encode
to_child: Final = msgspec.msgpack.Decoder(ToChild)
from_child: Final = msgspec.msgpack.Decoder(FromChild)


def framed(message: ToChild | FromChild) -> bytes:
    """Encode a message as it is sent over the socket."""
    body = _encode(message)
    return HEADER.pack(len(body)) + body

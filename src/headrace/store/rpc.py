"""Verbs of the seam as messages, in MessagePack: what a store far away says to the server that keeps it.

Rule 1: the messages are made from the seam's own signatures, so a verb can't mean two things on its two ends.
Rule 2: time and bounds stay with the server: no message carries `now_us` or `crashes_max`.
Rule 3: a lease is named by a ticket that the server signed, since span numbers can be guessed and tickets can't.
Verbs that belong to whoever keeps the store (upkeep, recovery, keys) have no message.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, get_type_hints

import msgspec

from headrace.core.span import Settlement
from headrace.foundation import errors
from headrace.foundation.errors import HeadraceError, StoreBroken, StoreUnavailable
from headrace.store.protocol import Heartbeat, Lease, Release, Store

CONTENT_TYPE: Final = "application/msgpack"
BEAT: Final = b"\xc0"
"""A sign of life before an answer that takes long: MessagePack's nil, which no answer begins with."""

BYTES_MAX: Final = 64 * 1024 * 1024
PART_BYTES: Final = 16 * 1024 * 1024
"""What one message holds; more goes in several."""

_OWN: Final = {"self", "now_us", "crashes_max"}


class LeaseWithToken(msgspec.Struct, array_like=True):
    """A lease and the ticket that names it."""

    lease: Lease
    ticket: bytes


class HeartbeatWithTokens(msgspec.Struct, array_like=True):
    """A heartbeat's answer, with a ticket for each of its leases."""

    heartbeat: Heartbeat
    tickets: list[bytes]


class SettleRequest(msgspec.Struct):
    """Outcomes, each under its ticket."""

    settlements: list[Settlement]
    tickets: list[bytes]


class ReleaseRequest(msgspec.Struct):
    """Leases given back, each under its ticket."""

    releases: list[Release]
    tickets: list[bytes]


class Operation(NamedTuple):
    """One verb's messages. `scope`: what a key must be allowed."""

    name: str
    request: type[msgspec.Struct]
    answer: Any
    scope: str


class ServerInfo(msgspec.Struct):
    """What a remote process must know of a server: its time, and whose it is."""

    environment: str
    now_us: int
    version: str


def _verb(name: str, scope: str, request: Any = None, answer: Any = None) -> Operation:
    verb = getattr(Store, name)
    hints = get_type_hints(verb)
    if request is None:
        fields = [
            (parameter.name, hints[parameter.name])
            if parameter.default is inspect.Parameter.empty
            else (parameter.name, hints[parameter.name], parameter.default)
            for parameter in inspect.signature(verb).parameters.values()
            if parameter.name not in _OWN
        ]
        request = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    return Operation(name, request, hints["return"] if answer is None else answer, scope)


OPERATIONS: Final[Mapping[str, Operation]] = {
    verb.name: verb
    for verb in (
        _verb("create_batch", "batches:write"),
        _verb("append", "batches:write"),
        _verb("seal", "batches:write"),
        _verb("stop_batch", "batches:write"),
        _verb("redrive", "batches:write"),
        _verb("cancel_runs", "runs:write"),
        _verb("batch", "batches:read"),
        _verb("find_batch", "batches:read"),
        _verb("batches", "batches:read"),
        _verb("missing", "batches:read"),
        _verb("outcomes", "batches:read"),
        _verb("verify", "batches:read"),
        _verb("run", "runs:read"),
        _verb("runs", "runs:read"),
        _verb("queues", "runs:read"),
        _verb("pause_queue", "runs:write"),
        _verb("dead_letters", "runs:read"),
        _verb("purge_dead", "runs:write"),
        _verb("rules", "runs:read"),
        _verb("keep_rules", "runs:write"),
        _verb("start_session", "work|batches:write"),
        _verb("heartbeat", "work|batches:write", answer=HeartbeatWithTokens),
        _verb("end_session", "work|batches:write"),
        _verb("claim", "work", answer=list[LeaseWithToken]),
        _verb("settle", "work", request=SettleRequest),
        _verb("release", "work", request=ReleaseRequest),
        _verb("next_due_us", "work"),
        _verb("keep_schedules", "work"),
        _verb("tick", "work"),
        _verb("schedules", "runs:read|work"),
    )
}

ERRORS: Final[Mapping[str, type[HeadraceError]]] = {
    found.code: found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, HeadraceError) and found is not HeadraceError
}
"""Errors by their codes; where a class has no code of its own, its parent's stands for it."""

_encoder: Final = msgspec.msgpack.Encoder(enc_hook=list)


def encode(message: Any) -> bytes:
    """A message as bytes; a range is written as the list that it is."""
    return _encoder.encode(message)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """What reads messages of a kind."""
    return msgspec.msgpack.Decoder(kind)


def error_of(status: int, body: bytes) -> HeadraceError:
    """The error that an answer is, as the store itself would have raised it."""
    try:
        told = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = {}
    kind = ERRORS.get(str(told.get("code", "")))
    detail = str(told.get("detail") or told.get("error") or f"the server answered {status}")
    if kind is None:
        kind = StoreUnavailable if status in (408, 425, 429) or status >= 500 else errors.ClientFault
    if kind is StoreBroken and status >= 500:
        return StoreBroken(detail, hint="the server's own store is broken: ask whoever runs it")
    return kind(detail, hint=str(told.get("hint", "")))


def parts_of(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """A list in pieces of at most `PART_BYTES`, one item at the least."""
    parts: list[list[Any]] = [[]]
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if parts[-1] and held + size > PART_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size
    return parts

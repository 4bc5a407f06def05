"""Messages of the store's operations, in MessagePack, between a remote process and the server of the store.

Rule 1: messages are made from the signatures of the protocols, so an operation means the same on both ends. Rule 2:
time, bounds and owners belong to the server: no message contains `now_us`, `crashes_max` or `owner`. Rule 3: a lease is
named by a lease token (`ticket`) that the server signed: span ids can be guessed, tokens can't. Operations of
maintenance and administration have no message.
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
"""A keep-alive byte before a slow answer: MessagePack's nil, with which no answer begins."""

BYTES_MAX: Final = 64 * 1024 * 1024
PART_BYTES: Final = 16 * 1024 * 1024
"""The size of one message; more is sent in several."""

SMALL_BYTES_MAX: Final = 512 * 1024
"""Bound of a request that carries no payloads: decoded, it may take a hundred times as much memory."""
_LARGE_REQUESTS: Final[Mapping[str, int]] = {
    "append": BYTES_MAX,
    "settle": BYTES_MAX,
    "release": 4 * 1024 * 1024,
    "tick": BYTES_MAX,
}

_SERVER_ARGUMENTS: Final = {"self", "now_us", "crashes_max", "owner", "serves"}


class LeaseWithToken(msgspec.Struct, array_like=True):
    """A lease and its lease token."""

    lease: Lease
    ticket: bytes


class HeartbeatWithTokens(msgspec.Struct, array_like=True):
    """The answer to a heartbeat, with the lease token of each lease."""

    heartbeat: Heartbeat
    tickets: list[bytes]


class SettleRequest(msgspec.Struct):
    """Outcomes, each with its lease token."""

    settlements: list[Settlement]
    tickets: list[bytes]


class ReleaseRequest(msgspec.Struct):
    """Leases to release, each with its lease token."""

    releases: list[Release]
    tickets: list[bytes]


class Operation(NamedTuple):
    """The messages of one operation. `scope`: what the API key must be allowed to do; `bytes_max`: the bound of its
    request. Small messages may decode to many times their size.
    """

    name: str
    request: type[msgspec.Struct]
    answer: Any
    scope: str
    bytes_max: int


class ServerInfo(msgspec.Struct):
    """The facts that a remote process needs about a server: its time, and the environment of the API key."""

    environment: str
    now_us: int
    version: str


def _operation(name: str, scope: str, request: Any = None, answer: Any = None) -> Operation:
    method = getattr(Store, name)
    hints = get_type_hints(method)
    if request is None:
        fields = [
            (parameter.name, hints[parameter.name])
            if parameter.default is inspect.Parameter.empty
            else (parameter.name, hints[parameter.name], parameter.default)
            for parameter in inspect.signature(method).parameters.values()
            if parameter.name not in _SERVER_ARGUMENTS
        ]
        request = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
    bytes_max = _LARGE_REQUESTS.get(name, SMALL_BYTES_MAX)
    return Operation(name, request, hints["return"] if answer is None else answer, scope, bytes_max)


OPERATIONS: Final[Mapping[str, Operation]] = {
    verb.name: verb
    for verb in (
        _operation("create_batch", "batches:write"),
        _operation("append", "batches:write"),
        _operation("seal", "batches:write"),
        _operation("stop_batch", "batches:write"),
        _operation("redrive", "batches:write"),
        _operation("cancel_runs", "runs:write"),
        _operation("batch", "batches:read"),
        _operation("find_batch", "batches:read"),
        _operation("batches", "batches:read"),
        _operation("missing", "batches:read"),
        _operation("outcomes", "batches:read"),
        _operation("verify", "batches:read"),
        _operation("run", "runs:read"),
        _operation("runs", "runs:read"),
        _operation("queues", "runs:read"),
        _operation("tasks_of_batches", "batches:read|runs:read"),
        _operation("stalled_lanes", "batches:read|runs:read"),
        _operation("pause_queue", "runs:write"),
        _operation("dead_letters", "runs:read"),
        _operation("purge_dead", "runs:write"),
        _operation("rules", "runs:read"),
        _operation("keep_rules", "runs:write"),
        _operation("start_session", "work|batches:write"),
        _operation("heartbeat", "work|batches:write", answer=HeartbeatWithTokens),
        _operation("unwanted_runs", "work"),
        _operation("end_session", "work|batches:write"),
        _operation("claim", "work", answer=list[LeaseWithToken]),
        _operation("settle", "work", request=SettleRequest),
        _operation("release", "work", request=ReleaseRequest),
        _operation("next_due_us", "work"),
        _operation("keep_schedules", "work"),
        _operation("tick", "work"),
        _operation("schedules", "runs:read|work"),
    )
}

ERRORS: Final[Mapping[str, type[HeadraceError]]] = {
    error_class.code: error_class
    for error_class in vars(errors).values()
    if isinstance(error_class, type) and issubclass(error_class, HeadraceError) and error_class is not HeadraceError
}
"""Errors by their codes. A class without a code of its own has the code of its base class."""

_encoder: Final = msgspec.msgpack.Encoder(enc_hook=list)


def encode(message: Any) -> bytes:
    """Encode a message; a range is encoded as a list."""
    return _encoder.encode(message)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make a decoder of a type of messages."""
    return msgspec.msgpack.Decoder(kind)


def error_of(status: int, body: bytes) -> HeadraceError:
    """Return the error of an HTTP answer, as the store itself would have raised it."""
    try:
        problem = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = {}
    kind = ERRORS.get(str(problem.get("code", "")))
    detail = str(problem.get("detail") or problem.get("error") or f"the server answered {status}")
    if kind is None:
        kind = StoreUnavailable if status in (408, 425, 429) or status >= 500 else errors.ClientFault
    if kind is StoreBroken and status >= 500:
        return StoreBroken(detail, hint="the store of the server is broken: ask its operator")
    return kind(detail, hint=str(problem.get("hint", "")))


def parts_of(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Split a list into pieces of at most `PART_BYTES`, with at least one item each."""
    parts: list[list[Any]] = [[]]
    piece_bytes = 0
    for item, size in zip(items, sizes, strict=True):
        if parts[-1] and piece_bytes + size > PART_BYTES:
            parts.append([])
            piece_bytes = 0
        parts[-1].append(item)
        piece_bytes += size
    return parts

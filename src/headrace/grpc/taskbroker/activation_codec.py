"""Conversion of `TaskActivation` messages: to what the store keeps beside their bytes, and to what a worker receives.

The bytes are stored unchanged. Beside them the store keeps what the engine needs: queue, due time, expiry, attempts and
processing deadline.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from headrace.core.activation import LANE, delivery_of, queue_of
from headrace.core.block import Extra
from headrace.core.delimited import with_length
from headrace.core.pack import ACTIVATION
from headrace.core.retry import SECOND_US, quantised_due_us
from headrace.core.rules import Arguments, Rules
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import MIB, Limits
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import DeliveredRun
from headrace.runtime.tasks.bounds import check_name

SECONDS_MAX: Final = 365 * 86_400
"""Upper bound of deadlines, expiries and retry delays: a year."""

_FIRST_FIELD: Final = b"\x0a"
"""Key of field 1 with a length. `TaskActivation` is field 1 of the messages that carry it."""

UINT32_MAX: Final = 2**32 - 1
UNPACKED_BYTES_MAX: Final = 64 * MIB
ZSTD_WINDOW_BYTES: Final = 8 * MIB


class ActivationEntry(NamedTuple):
    """Fields that the store keeps beside the bytes of an activation."""

    key: Key
    extra: Extra


def decode_entry(data: bytes, limits: Limits, now_us: int) -> ActivationEntry:
    """Decode what is stored beside an activation's bytes. Raises `InvalidInput`, which names the invalid field."""
    if len(data) > limits.activation_bytes_max:
        raise InvalidInput(
            f"expected an activation of at most {limits.activation_bytes_max} bytes, got {len(data)}",
            hint="raise activation_bytes_max, or send less data",
        )
    try:
        message = wire.TaskActivation.FromString(data)
    except DecodeError:
        raise InvalidInput("expected a TaskActivation, got bytes that can't be decoded as one") from None
    check_name("activation", message.id)
    if delivery_of(message.id).id != message.id:
        raise InvalidInput(
            f"expected an activation id without a delivery suffix (~2.0), got {message.id[:200]!r}",
            hint="send the activation under its original id",
            id=message.id,
        )
    check_name("task", message.taskname)
    queue = check_name("queue", queue_of(message.application, message.namespace))
    received_us = now_us
    if message.HasField("received_at"):
        received_us = min(max(message.received_at.ToMicroseconds(), 0), now_us)
    state = message.retry_state
    key = Key(
        LANE,
        queue=queue,
        due_us=_due_us(received_us, min(message.delay, limits.delivery_delay_max_s), now_us),
        expires_us=_expires_us(message, received_us),
        at_most_once=state.at_most_once,
        dead_letter=state.on_attempts_exceeded == wire.ON_ATTEMPTS_EXCEEDED_DEADLETTER,
    )
    extra = Extra(
        idempotency_key=message.id,
        name=message.taskname,
        attempts_max=state.max_attempts,
        timeout_ms=min(message.processing_deadline_duration, SECONDS_MAX) * 1_000,
        retry_delay_ms=min(state.delay_on_retry, SECONDS_MAX) * 1_000,
    )
    return ActivationEntry(key, extra)


def _due_us(received_us: int, delay_s: int, now_us: int) -> int:
    """Compute the due time, 0 for now. Rounded, so that many activations share a due time and with it a row."""
    due_us = received_us + delay_s * SECOND_US
    return 0 if due_us <= now_us else quantised_due_us(due_us, now_us)


def _expires_us(message: Any, received_us: int) -> int:
    """Compute the expiry, 0 for never. Rounded up to a second, the unit of `expires`, so that many share a row."""
    if not message.HasField("expires"):
        return 0
    expires_us = received_us + min(message.expires, SECONDS_MAX) * SECOND_US
    return int(max(-(-expires_us // SECOND_US), 1) * SECOND_US)


def decode_arguments(data: bytes) -> Arguments | None:
    """Decode the arguments of an activation's task. Returns None if they can't be decoded or exceed 64 MiB
    decompressed.
    """
    try:
        message = wire.TaskActivation.FromString(data)
        packed = message.parameters_bytes
        if not packed:
            parameters = msgspec.json.decode(message.parameters or b"{}", type=_Parameters)
        else:
            if message.headers.get("compression-type") == "zstd":
                packed = _decompressed(packed)
            parameters = msgspec.msgpack.decode(packed, type=_Parameters)
    except (DecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidInput):
        return None
    return parameters.args, parameters.kwargs


def as_first_field(activation: bytes) -> bytes:
    """Encode a message whose first field is an activation: `GetTaskResponse` or `PushTaskRequest`."""
    return _FIRST_FIELD + with_length(activation)


class _Parameters(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def _decompressed(data: bytes) -> bytes:
    """Decompress zstd within a bound, regardless of the size in its header. Raises `InvalidInput`."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).stream_reader(data) as reader:
            decompressed = reader.read(UNPACKED_BYTES_MAX + 1)
    except zstandard.ZstdError as error:
        raise InvalidInput(f"expected zstd-compressed parameters, got invalid data: {error}") from None
    if len(decompressed) > UNPACKED_BYTES_MAX:
        raise InvalidInput(f"expected parameters of at most {UNPACKED_BYTES_MAX} bytes decompressed, got more")
    return decompressed


def is_killed(rules: Rules, name: str, data: bytes) -> bool:
    """True if a killswitch rule drops the activation. Its arguments are decoded only if a rule matches on arguments."""
    return bool(rules.kills) and rules.is_killed(name, lambda: decode_arguments(data))


def delivery_message(dispatcher: Dispatcher, delivered: DeliveredRun) -> bytes | None:
    """Encode the message that a worker receives. A run whose payload is no activation fails, and None is returned.

    The first attempt of an activation that came in over this protocol is its original bytes.
    """
    if delivered.kind == ACTIVATION and delivered.is_unchanged:
        return delivered.payload
    try:
        return build_delivery(delivered, dispatcher.engine.clock.now_us()).SerializeToString()
    except DecodeError:
        dispatcher.refuse(delivered, "expected a TaskActivation as payload, got bytes that can't be decoded as one")
        return None


def build_delivery(delivered: DeliveredRun, now_us: int) -> wire.TaskActivation:
    """Build the message that a worker receives: the original, updated with what later attempts changed.

    Raises `DecodeError` for a payload that is no activation.
    """
    message = wire.TaskActivation.FromString(delivered.payload)
    message.id = delivered.name
    lease, note = delivered.buffered.active.lease, delivered.buffered.note
    if lease.attempt > 1:
        state = message.retry_state
        state.attempts = min(state.attempts + lease.attempt - 1, UINT32_MAX)
        if note.attempts_max is not None:
            state.max_attempts = note.attempts_max
        if note.delay_s is not None:
            state.delay_on_retry = note.delay_s
        message.ClearField("delay")
        if state.HasField("delay_on_retry"):
            message.delay = state.delay_on_retry
        message.received_at.FromMicroseconds(now_us)
    return message

"""`TaskActivation` as it is taken in and as it is handed out.

Its bytes are kept as they came. What the engine must know of it stands beside them: the queue, when it is due and
expires, how often it may run, how long its worker has.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from google.protobuf.message import DecodeError

from headrace.core.activation import LANE, delivery_of, queue_of
from headrace.core.block import Extra
from headrace.core.pack import ACTIVATION
from headrace.core.retry import SECOND_US, quantised_due_us
from headrace.core.rules import Arguments, Rules
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import MIB, Limits
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.runtime.dispatch.dispatcher import Dispatcher
from headrace.runtime.dispatch.lease_buffer import Handout
from headrace.runtime.tasks.bounds import check_name

SECONDS_MAX: Final = 365 * 86_400
"""No deadline, expiry or rest is longer than a year."""

UINT32_MAX: Final = 2**32 - 1
UNPACKED_BYTES_MAX: Final = 64 * MIB
ZSTD_WINDOW_BYTES: Final = 8 * MIB


class Entry(NamedTuple):
    """An activation as the store keeps it, but for its bytes."""

    key: Key
    extra: Extra


def entry_of(data: bytes, limits: Limits, now_us: int) -> Entry:
    """What is kept beside the bytes of an activation. Raises `InvalidInput` that says which field is wrong."""
    if len(data) > limits.activation_bytes_max:
        raise InvalidInput(
            f"an activation has at most {limits.activation_bytes_max} bytes, not {len(data)}",
            hint="activation_bytes_max is the limit",
        )
    try:
        message = wire.TaskActivation.FromString(data)
    except DecodeError:
        raise InvalidInput("the message is no TaskActivation") from None
    check_name("activation", message.id)
    if delivery_of(message.id).id != message.id:
        raise InvalidInput(
            "the id of an activation doesn't end as that of a later delivery does: ~attempt.times",
            hint="send it under the id that it had at first",
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
    return Entry(key, extra)


def _due_us(received_us: int, delay_s: int, now_us: int) -> int:
    """When it is due; 0 when that is now. Many share a moment, so that they wait in one row."""
    due_us = received_us + delay_s * SECOND_US
    return 0 if due_us <= now_us else quantised_due_us(due_us, now_us)


def _expires_us(message: Any, received_us: int) -> int:
    """When it expires, 0 for never: to the second, as its own words are, so that many wait in one row."""
    if not message.HasField("expires"):
        return 0
    expires_us = received_us + min(message.expires, SECONDS_MAX) * SECOND_US
    return int(max(-(-expires_us // SECOND_US), 1) * SECOND_US)


def arguments_of(data: bytes) -> Arguments | None:
    """What an activation's task is called with; None where that can't be told, or would take more than 64 MiB."""
    try:
        message = wire.TaskActivation.FromString(data)
        packed = message.parameters_bytes
        if not packed:
            called = msgspec.json.decode(message.parameters or b"{}", type=_Called)
        else:
            if message.headers.get("compression-type") == "zstd":
                packed = _unpacked(packed)
            called = msgspec.msgpack.decode(packed, type=_Called)
    except (DecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidInput):
        return None
    return called.args, called.kwargs


class _Called(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


def _unpacked(data: bytes) -> bytes:
    """zstd within a bound, whatever its head says. Raises `InvalidInput`."""
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).stream_reader(data) as reader:
            unpacked = reader.read(UNPACKED_BYTES_MAX + 1)
    except zstandard.ZstdError as error:
        raise InvalidInput(f"the parameters are not zstd: {error}") from None
    if len(unpacked) > UNPACKED_BYTES_MAX:
        raise InvalidInput(f"the parameters become more than {UNPACKED_BYTES_MAX} bytes")
    return unpacked


def is_killed(rules: Rules, name: str, data: bytes) -> bool:
    """Whether rules drop an activation; its arguments are looked at only where one asks for that."""
    return bool(rules.kills) and rules.is_killed(name, lambda: arguments_of(data))


def told(dispatcher: Dispatcher, handout: Handout) -> bytes | None:
    """The message of an activation as its worker gets it; None for one whose bytes are none, which fails.

    The first delivery of one that came in by our own door is what came in.
    """
    if handout.kind == ACTIVATION and not handout.held.suffix:
        return handout.payload
    try:
        return message_of(handout, dispatcher.engine.clock.now_us()).SerializeToString()
    except DecodeError:
        dispatcher.refuse(handout, "its bytes are no TaskActivation")
        return None


def message_of(handout: Handout, now_us: int) -> wire.TaskActivation:
    """An activation as its worker gets it: as it came the first time, with what has changed since from then on.

    Raises `DecodeError` for bytes that are none.
    """
    message = wire.TaskActivation.FromString(handout.payload)
    message.id = handout.name
    lease, note = handout.held.work.lease, handout.held.note
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

"""Options of one call beside its arguments, and the key and extras that its run is stored with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import msgspec

from headrace.core.block import Extra
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput
from headrace.foundation.limits import Limits
from headrace.runtime.tasks.bounds import SECONDS_MAX, check_name, check_priority
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.tasks.tracing import trace_headers


class Options(NamedTuple):
    """The options of a call beside its arguments. Durations are in seconds; 0 means at once, never, or without end."""

    delay_s: float = 0
    expires_s: float = 0
    priority: int | None = None
    queue: str | None = None
    idempotency_key: str = ""
    idempotency_ttl_s: float = 0
    tags: tuple[str, ...] = ()
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


def key_of(spec: TaskSpec, options: Options, now_us: int) -> Key:
    """Return the key under which a run of a task is queued."""
    return spec.key._replace(
        queue=spec.queue if options.queue is None else check_name("queue", options.queue),
        priority=spec.priority if options.priority is None else check_priority(options.priority),
        due_us=_time_after_us("delay_s", options.delay_s or spec.delay_s, now_us),
        expires_us=_time_after_us("expires_s", options.expires_s or spec.expires_s, now_us),
    )


def with_trace(options: Options) -> Options:
    """Return the options with the headers of the current trace, unless they name a trace. Not used for maps, where
    every run would pay.
    """
    trace = trace_headers()
    return options._replace(headers={**trace, **options.headers}) if trace else options


def extra_of(options: Options, limits: Limits, now_us: int) -> Extra | None:
    """Return the options that only some runs have, or None for a run that has none. Raises `InvalidInput`."""
    if not options.idempotency_key and not options.tags and not options.headers:
        return None
    if options.idempotency_key:
        check_name("idempotency key", options.idempotency_key)
    if len(options.tags) > limits.tags_max:
        raise InvalidInput(f"tags: expected at most {limits.tags_max}, got {len(options.tags)}")
    for tag in options.tags:
        check_name("tag", tag)
    _check_headers(cast("Mapping[object, object]", options.headers), limits.headers_bytes_max)
    return Extra(
        idempotency_key=options.idempotency_key,
        idempotency_expires_us=_time_after_us("idempotency_ttl_s", options.idempotency_ttl_s, now_us),
        tags=options.tags,
        headers=options.headers,
    )


def _time_after_us(what: str, seconds: float, now_us: int) -> int:
    if not 0 <= seconds <= SECONDS_MAX:
        raise InvalidInput(f"{what}: expected 0 to {SECONDS_MAX} seconds, got {seconds!r}")
    return now_us + int(seconds * 1_000_000) if seconds else 0


def _check_headers(headers: Mapping[object, object], bytes_max: int) -> None:
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidInput(f"headers: expected strings by name, got {name!r}: {value!r}")
    try:
        size = len(msgspec.json.encode(headers))
    except UnicodeEncodeError as error:
        raise InvalidInput(f"headers: expected valid Unicode text: {error}") from None
    if size > bytes_max:
        raise InvalidInput(f"headers: expected at most {bytes_max} bytes, got {size}")

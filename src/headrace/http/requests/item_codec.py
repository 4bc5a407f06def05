"""Decoding of batch items, one NDJSON line each, and the handling of every option.

The table `OPTIONS` lists all options: honoured, stored and returned unchanged, or refused. An option that is not in the
table is refused too, so that none is ignored silently.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from headrace.core.block import Extra
from headrace.core.pack import ACTIVATION, JSON, KINDS, MSGPACK, REFERENCE, SUPER_JSON, TEXT
from headrace.core.span import Key
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import INDEX_MAX
from headrace.foundation.limits import DAY_MS, Limits
from headrace.foundation.suggestions import hint_of, near_name
from headrace.runtime.producing.indexed_feed import EntryGroup, IndexedItem, ItemRange, UnreadableItem
from headrace.runtime.tasks.bounds import PRIORITY_MAX, TIMEOUT_S_MAX, check_name

Disposition = Literal["honoured", "kept", "refused"]


class OptionHandling(NamedTuple):
    """Handling of an option."""

    disposition: Disposition
    meaning: str


OPTIONS: Final[Mapping[str, OptionHandling]] = {
    "idempotencyKey": OptionHandling("honoured", "If the key names a run of the same task, the item becomes that run."),
    "idempotencyKeyTTL": OptionHandling("honoured", "Lifetime of the idempotency key; 30 days by default."),
    "delay": OptionHandling("honoured", "Earliest start: a date, or a duration from now."),
    "ttl": OptionHandling("honoured", "The run expires if it has not started this long after it could."),
    "priority": OptionHandling("honoured", "Runs with a larger value start first."),
    "queue": OptionHandling("honoured", "Name of the queue that the run waits in."),
    "tags": OptionHandling("honoured", "Labels to find the run by."),
    "metadata": OptionHandling("honoured", "Stored with the run and returned with it."),
    "metadataType": OptionHandling("honoured", "Content type of metadata that is a string."),
    "maxAttempts": OptionHandling("honoured", "Attempts of the run, instead of the task's setting."),
    "maxDuration": OptionHandling("honoured", "Seconds one attempt may take, instead of the task's setting."),
    "payloadType": OptionHandling("honoured", "Content type of the payload."),
    "payloadSize": OptionHandling("kept", "Size measured by the client."),
    "machine": OptionHandling("kept", "Workers have no machine types."),
    "region": OptionHandling("kept", "Workers have no regions."),
    "test": OptionHandling("kept", "Test runs are executed like others."),
    "lockToVersion": OptionHandling("kept", "A worker runs the version it was started with."),
    "externalDeploymentId": OptionHandling("kept", "A worker runs the version it was started with."),
    "idempotencyKeyOptions": OptionHandling("kept", "The key arrives complete; these describe its origin."),
    "concurrencyKey": OptionHandling("kept", "Concurrency limits by key are not implemented yet."),
    "debounce": OptionHandling("kept", "Debouncing is not implemented yet."),
    "parentAttempt": OptionHandling("refused", "Runs that wait for their children are not implemented yet."),
    "gates": OptionHandling("refused", "Gates over several queues are not implemented yet."),
    "concurrency": OptionHandling("refused", "Concurrency limits are set on queues, not on items."),
}

TAG_CHARS_MAX: Final = 128
KEY_CHARS_MAX: Final = 2_048
KEY_CHARS_STORED: Final = 200
KEY_TTL_DEFAULT_S: Final = 30 * 86_400
SECONDS_MAX: Final = 3_650 * DAY_MS // 1_000

_Text = Annotated[str, Meta(min_length=1, max_length=512)]
_Machine = Literal["micro", "small-1x", "small-2x", "medium-1x", "medium-2x", "large-1x", "large-2x"]


class QueueOption(msgspec.Struct):
    """Name of the queue of an item."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]


class IdempotencyKeyOptions(msgspec.Struct):
    """Origin of an idempotency key, as reported by the client."""

    key: Any = None
    scope: str | None = None


class DebounceOption(msgspec.Struct, rename="camel", omit_defaults=True):
    """Debounce settings of an item."""

    key: Annotated[str, Meta(min_length=1, max_length=512)]
    delay: str
    mode: Literal["leading", "trailing"] | None = None
    max_delay: str | None = None


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("TTL" if word == "ttl" else word.capitalize() for word in rest)


class ItemOptions(msgspec.Struct, forbid_unknown_fields=True, rename=_camel_case):
    """Options of an item."""

    idempotency_key: Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX)] | None = None
    idempotency_key_ttl: _Text | None = None
    delay: _Text | None = None
    ttl: _Text | Annotated[int, Meta(ge=0)] | None = None
    priority: Annotated[float, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    queue: QueueOption | None = None
    tags: str | list[str] | None = None
    metadata: msgspec.Raw | UnsetType = UNSET
    metadata_type: _Text | None = None
    max_attempts: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    max_duration: Annotated[float, Meta(gt=0, le=TIMEOUT_S_MAX)] | None = None
    payload_type: _Text | None = None
    payload_size: Annotated[int, Meta(ge=0, le=INDEX_MAX)] | UnsetType = UNSET
    machine: _Machine | UnsetType = UNSET
    region: _Text | UnsetType = UNSET
    test: bool | UnsetType = UNSET
    lock_to_version: _Text | UnsetType = UNSET
    external_deployment_id: _Text | UnsetType = UNSET
    idempotency_key_options: IdempotencyKeyOptions | UnsetType = UNSET
    concurrency_key: Annotated[str, Meta(max_length=512)] | int | float | UnsetType = UNSET
    debounce: DebounceOption | UnsetType = UNSET
    parent_attempt: Any = UNSET
    gates: Any = UNSET
    concurrency: Any = UNSET


class ItemLine(msgspec.Struct, forbid_unknown_fields=True):
    """One item as sent. An item without a task has that of its batch."""

    index: Annotated[int, Meta(ge=0, le=INDEX_MAX)]
    task: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    payload: msgspec.Raw | UnsetType = UNSET
    options: ItemOptions | None = None


class LenientItemLine(msgspec.Struct):
    """One item of a client of trigger.dev's API: unknown fields are ignored, unless they are misspelt known ones."""

    index: Annotated[int, Meta(ge=0, le=INDEX_MAX)]
    task: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    payload: msgspec.Raw | UnsetType = UNSET
    options: ItemOptions | None = None


assert set(ItemOptions.__struct_encode_fields__) == set(OPTIONS), "OPTIONS and ItemOptions must have the same names"
_FIELD_OF_OPTION: Final = dict(zip(ItemOptions.__struct_encode_fields__, ItemOptions.__struct_fields__, strict=True))
_STORED_OPTIONS: Final = [
    (name, _FIELD_OF_OPTION[name]) for name, fate in OPTIONS.items() if fate.disposition == "kept"
]
_REFUSED_OPTIONS: Final = [
    (name, _FIELD_OF_OPTION[name]) for name, fate in OPTIONS.items() if fate.disposition == "refused"
]

_strict: Final = msgspec.json.Decoder(ItemLine)
_lenient: Final = msgspec.json.Decoder(LenientItemLine)
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `(?P<name>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_text: Final = msgspec.json.Decoder(str)
_encode: Final = msgspec.json.Encoder().encode
_MAY_HOLD_JSON: Final = frozenset(b'"' + bytes((byte,)) for byte in b'{["-0123456789tfn\\ ')
"""First characters of a JSON string whose content may itself be JSON."""

_DURATION: Final = re.compile(r"(?:(\d{1,9})(w|d|hr|h|m|s))+")
_DURATION_PART: Final = re.compile(r"(\d{1,9})(w|d|hr|h|m|s)")
_KEY_TTL: Final = re.compile(r"(\d{1,9})([smhd])")
_UNIT_S: Final = {"w": 604_800, "d": 86_400, "hr": 3_600, "h": 3_600, "m": 60, "s": 1}


class TaskDefaults(Protocol):
    """Returns how runs of a task are stored if an item has no options."""

    def __call__(self, task: str) -> Key:
        """Return the key of a plain run of this task."""


class HttpItemDecoder:
    """Decoder of the items of one request. `now_us`: the time from which delays and expiries count."""

    def __init__(
        self,
        *,
        defaults: TaskDefaults,
        limits: Limits,
        now_us: int,
        may_run: Callable[[str], None],
        fetched: Callable[[bytes], Awaitable[tuple[bytes, int]]],
        batch_task: str = "",
        ignores_unknown: bool = False,
    ) -> None:
        """`may_run` raises if the client may not run a task. `batch_task`: the task of items that name none.

        `ignores_unknown`: an unknown field that resembles none of the known ones is ignored, as trigger.dev does.
        """
        self.fetched = fetched
        self._batch_task = batch_task
        self._ignores_unknown = ignores_unknown
        self._decoder: msgspec.json.Decoder[ItemLine] | msgspec.json.Decoder[LenientItemLine] = _strict
        self._defaults = defaults
        self._limits = limits
        self._now_us = now_us
        self._may_run = may_run
        self._keys: dict[str | UnsetType, Key] = {}

    def key_of(self, task: str | UnsetType) -> Key:
        """Return the key of a task's plain runs; UNSET is that of the batch. Each task is looked up once."""
        key = self._keys.get(task)
        if key is None:
            if isinstance(task, UnsetType):
                if not self._batch_task:
                    raise InvalidItem(
                        "Invalid item: it has no task, and neither has its batch",
                        hint="give the item a task, or create the batch with one",
                    )
                self._keys[task] = self.key_of(self._batch_task)
                return self._keys[task]
            self._may_run(task)
            if not task.isprintable():
                raise InvalidItem(f"expected a task name of printable characters, got {task[:60]!r}")
            key = self._defaults(task)
            if len(self._keys) < 10_000:
                self._keys[task] = key
        return key

    def many(self, lines: Sequence[bytes]) -> EntryGroup | None:
        """Decode many lines at once. Returns None if any of them is invalid; then `one` finds the error."""
        try:
            items = self._decoder.decode_lines(b"\n".join(lines))
            if len(items) != len(lines):
                return None
            return self._grouped(items)
        except (msgspec.DecodeError, InvalidInput, UnicodeDecodeError, RecursionError):
            return None

    def _grouped(self, items: Sequence[ItemLine | LenientItemLine]) -> EntryGroup:
        """Group consecutive plain items of the same task, which are then appended to a chunk in a few calls."""
        group: list[IndexedItem | ItemRange] = []
        for (_, task), numbered in groupby(enumerate(items), lambda pair: (pair[1].index - pair[0], pair[1].task)):
            lines = [line for _, line in numbered]
            if all(map(_is_plain, lines)):
                payloads = [bytes(line.payload) for line in lines]  # type: ignore[arg-type]  # a plain line has one
                if len(lines) > 1 and _MAY_HOLD_JSON.isdisjoint(payload[:2] for payload in payloads):
                    group.append(ItemRange(lines[0].index, self.key_of(task), payloads))
                    continue
            group += map(self._entry, lines)
        return group

    def decode_line(self, line: bytes) -> IndexedItem:
        """Decode one line. Raises `InvalidInput` with the reason if it is invalid."""
        try:
            return self._entry(self._decoder.decode(line))
        except msgspec.ValidationError as error:
            if unknown := _UNKNOWN_FIELD.search(str(error)):
                if self._may_ignore(unknown):
                    self._decoder = _lenient  # for the other lines too: this client sends such a field with each
                    return self.decode_line(line)
                raise _unknown_field(unknown) from None
            raise InvalidItem(
                f"Invalid item: {_without_object(error)}", hint="docs/http.md lists the fields and options of an item"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableItem(f"Invalid JSON: {error}") from None

    def _may_ignore(self, unknown: re.Match[str]) -> bool:
        name, path = unknown["name"], unknown["path"] or ""
        return self._ignores_unknown and not path and near_name(name, ItemLine.__struct_fields__) is None

    def entry(self, task: str, payload: msgspec.Raw | UnsetType, options: ItemOptions | None) -> IndexedItem:
        """Build a run that was requested by itself, without a batch. Raises `InvalidInput`."""
        return self._entry(ItemLine(index=0, task=check_name("task", task), payload=payload, options=options))

    def _entry(self, line: ItemLine | LenientItemLine) -> IndexedItem:
        key = self.key_of(line.task)
        options = line.options
        if options is None:
            payload, kind = _payload(line.payload, None)
            return IndexedItem(line.index, key, payload, kind)
        for name, attribute in _REFUSED_OPTIONS:
            if getattr(options, attribute) is not UNSET:
                raise InvalidItem(
                    f"Item {line.index}: option {name!r} is not supported. {OPTIONS[name].meaning}",
                    hint="remove the option",
                )
        payload, kind = _payload(line.payload, options.payload_type)
        return IndexedItem(line.index, self._key_with_options(key, options), payload, kind, self._extra(options))

    def _key_with_options(self, key: Key, options: ItemOptions) -> Key:
        due_us = 0 if options.delay is None else parse_time_us("delay", options.delay, self._now_us)
        if due_us <= self._now_us:
            due_us = 0
        expires_us = 0
        if options.ttl is not None:
            ttl_s = options.ttl if isinstance(options.ttl, int) else parse_duration_s("ttl", options.ttl)
            if ttl_s > SECONDS_MAX:
                raise InvalidItem(f"expected ttl of at most {SECONDS_MAX} seconds, got {ttl_s}")
            expires_us = max(due_us, self._now_us) + ttl_s * 1_000_000 if ttl_s else 0
        if options.queue is not None and not options.queue.name.isprintable():
            raise InvalidItem(f"expected a queue name of printable characters, got {options.queue.name[:60]!r}")
        return key._replace(
            queue=key.queue if options.queue is None else options.queue.name,
            priority=key.priority if options.priority is None else round(options.priority),
            due_us=due_us,
            expires_us=expires_us,
        )

    def _extra(self, options: ItemOptions) -> Extra | None:
        kept: dict[str, Any] = {
            name: value for name, attribute in _STORED_OPTIONS if (value := getattr(options, attribute)) is not UNSET
        }
        key, expires_us, ttl_s = "", 0, parse_key_ttl_s(options.idempotency_key_ttl)
        if options.idempotency_key is not None:
            key = stored_idempotency_key(options.idempotency_key)
            expires_us = self._now_us + ttl_s * 1_000_000
            if key != options.idempotency_key:
                kept["idempotencyKey"] = options.idempotency_key
        if options.metadata is not UNSET and isinstance(options.metadata, msgspec.Raw):
            kept["metadata"] = _metadata(options.metadata, options.metadata_type, self._limits.metadata_bytes_max)
        tags = _tags(options.tags, self._limits.tags_max)
        if not (kept or key or tags or options.max_attempts or options.max_duration):
            return None
        return Extra(
            idempotency_key=key,
            idempotency_expires_us=expires_us,
            tags=tags,
            attempts_max=options.max_attempts or 0,
            timeout_ms=0 if options.max_duration is None else max(1, round(options.max_duration * 1_000)),
            kept=_encode(kept) if kept else b"",
        )


class InvalidItem(InvalidInput):
    """The line is valid JSON, but not a valid item."""

    code = "INVALID_ITEM"
    status = 422


def _unknown_field(unknown: re.Match[str]) -> InvalidItem:
    """Return the error for a field that an item or its options do not have."""
    name, path = unknown["name"], (unknown["path"] or "").removeprefix(".")
    if not path:
        hint = hint_of(name, ItemLine.__struct_fields__, "fields of an item")
        return InvalidItem(f"Invalid item: unknown field {name[:60]!r}", hint=hint)
    names = OPTIONS if path == "options" else ()
    hint = hint_of(name, names, "options") if names else f"see the options of an item in docs/http.md: {path}"
    return InvalidItem(f"Invalid item: unknown option {name[:60]!r} in {path}", hint=hint)


def stored_idempotency_key(key: str) -> str:
    """Return the form in which an idempotency key is stored: the key itself, or the digest of a long one."""
    if len(key) <= KEY_CHARS_STORED:
        return key
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def parse_key_ttl_s(text: str | None) -> int:
    """Parse the lifetime of an idempotency key to seconds. Raises `InvalidItem`."""
    if text is None:
        return KEY_TTL_DEFAULT_S
    match = _KEY_TTL.fullmatch(text)
    if match is None or (seconds := int(match[1]) * _UNIT_S[match[2]]) > SECONDS_MAX:
        raise InvalidItem(f"expected idempotencyKeyTTL as a number and one of s, m, h, d, got {text[:40]!r}")
    return seconds


def parse_duration_s(field: str, text: str) -> int:
    """Parse a duration like 1h52m18s to seconds. Raises `InvalidItem`."""
    if not _DURATION.fullmatch(text):
        raise InvalidItem(f"expected {field} as a duration like 1h52m18s, got {text[:40]!r}")
    seconds = sum(int(count) * _UNIT_S[unit] for count, unit in _DURATION_PART.findall(text))
    if seconds > SECONDS_MAX:
        raise InvalidItem(f"expected {field} of at most {SECONDS_MAX} seconds, got {seconds}")
    return seconds


def parse_time_us(field: str, text: str, now_us: int) -> int:
    """Parse an ISO 8601 date, or a duration from now. Raises `InvalidItem`."""
    if _DURATION.fullmatch(text):
        return now_us + parse_duration_s(field, text) * 1_000_000
    try:
        date = datetime.fromisoformat(text)
        time_us = int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError, OSError):
        raise InvalidItem(
            f"expected {field} as a date like 2030-01-31T12:00:00Z or a duration, got {text[:40]!r}"
        ) from None
    if time_us > now_us + SECONDS_MAX * 1_000_000:
        raise InvalidItem(f"expected {field} within {SECONDS_MAX} seconds from now, got {text[:40]!r}")
    return time_us


_NOT_FOR_ITEMS: Final = (MSGPACK, ACTIVATION)


def _is_plain(line: ItemLine | LenientItemLine) -> bool:
    return line.options is None and line.payload is not UNSET


def _payload(raw: msgspec.Raw | UnsetType, content_type: str | None) -> tuple[bytes, int]:
    """Convert a payload to its stored bytes and kind. A string that contains JSON becomes that JSON, as trigger.dev's
    clients expect.
    """
    kind = JSON if content_type is None else KINDS.get(content_type.partition(";")[0].strip().lower())
    if kind is None or kind in _NOT_FOR_ITEMS:
        named = ", ".join(name for name, payload_kind in KINDS.items() if payload_kind not in _NOT_FOR_ITEMS)
        raise InvalidItem(f"unknown payloadType {content_type!r}", hint=f"expected one of {named}")
    if isinstance(raw, UnsetType):
        if kind == REFERENCE:
            raise InvalidItem("expected the name of an uploaded packet as payload of type application/store, got none")
        return (b"", kind) if kind == TEXT else (b"null", JSON)
    data = bytes(raw)
    if data[:1] != b'"':
        if kind in (TEXT, REFERENCE):
            raise InvalidItem(f"expected a string as payload of type {content_type}")
        return data, kind
    if kind == JSON and data[:2] not in _MAY_HOLD_JSON:
        return data, JSON  # an ordinary string, as most are: it can't contain JSON
    text = _text.decode(data)
    inner = text.encode()
    if kind in (TEXT, REFERENCE):
        return inner, kind
    try:
        msgspec.json.decode(inner, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        if kind == SUPER_JSON:
            raise InvalidItem("expected JSON in a payload of type application/super+json") from None
        return data, JSON
    return inner, kind


def _tags(value: str | list[str] | None, most: int) -> tuple[str, ...]:
    tags = () if value is None else (value,) if isinstance(value, str) else tuple(dict.fromkeys(value))
    if len(tags) > most:
        raise InvalidItem(f"expected at most {most} tags, got {len(tags)}")
    for tag in tags:
        if not 0 < len(tag) <= TAG_CHARS_MAX or not tag.isprintable():
            raise InvalidItem(f"expected tags of 1 to {TAG_CHARS_MAX} printable characters, got {tag[:40]!r}")
    return tags


def _metadata(raw: msgspec.Raw, content_type: str | None, bytes_max: int) -> Any:
    data = bytes(raw)
    if len(data) > bytes_max:
        raise InvalidItem(f"expected metadata of at most {bytes_max} bytes, got {len(data)}")
    value = msgspec.json.decode(data)
    if not isinstance(value, str) or "json" not in (content_type or "application/json"):
        return value
    try:
        document = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return value
    if "super+json" in (content_type or "") and isinstance(document, dict) and "json" in document:
        return document["json"]
    return document


def _without_object(error: msgspec.ValidationError) -> str:
    return str(error).replace("Object contains", "it contains")

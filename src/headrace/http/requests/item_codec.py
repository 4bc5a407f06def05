"""What a line of a batch says, and what becomes of each option.

The table `OPTIONS` is the whole of it: an option is honoured, kept and echoed, or refused by its name. A name that is
not in the table is refused too, so none is ever dropped in silence.
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
from headrace.runtime.producing.indexed_feed import Bulk, Entry, Group, UnreadableItem
from headrace.runtime.tasks.bounds import PRIORITY_MAX, TIMEOUT_S_MAX, check_name

Disposition = Literal["honoured", "kept", "refused"]


class Fate(NamedTuple):
    """What becomes of an option."""

    disposition: Disposition
    meaning: str


OPTIONS: Final[Mapping[str, Fate]] = {
    "idempotencyKey": Fate("honoured", "An item whose key names a run of its task is that run."),
    "idempotencyKeyTTL": Fate("honoured", "How long the key names it; 30 days without."),
    "delay": Fate("honoured", "Not before: a date, or a duration from now."),
    "ttl": Fate("honoured", "The run expires when it has not begun so long after it could."),
    "priority": Fate("honoured", "Larger goes first."),
    "queue": Fate("honoured", "The queue that it waits in."),
    "tags": Fate("honoured", "Words to find it by."),
    "metadata": Fate("honoured", "Kept with the run and given back with it."),
    "metadataType": Fate("honoured", "How metadata that is a string is read."),
    "maxAttempts": Fate("honoured", "Instead of the task's own."),
    "maxDuration": Fate("honoured", "Seconds an attempt may take, instead of the task's own."),
    "payloadType": Fate("honoured", "How the payload is read."),
    "payloadSize": Fate("kept", "What the client measured."),
    "machine": Fate("kept", "Workers are not of kinds."),
    "region": Fate("kept", "Workers are not of places."),
    "test": Fate("kept", "A run is a run."),
    "lockToVersion": Fate("kept", "A worker runs the version it has."),
    "externalDeploymentId": Fate("kept", "A worker runs the version it has."),
    "idempotencyKeyOptions": Fate("kept", "The key arrives made; this says how."),
    "concurrencyKey": Fate("kept", "Until there is flow control by key."),
    "debounce": Fate("kept", "Until there is flow control by key."),
    "parentAttempt": Fate("refused", "Runs that wait for their children are still to come."),
    "gates": Fate("refused", "Gates of several queues are still to come."),
    "concurrency": Fate("refused", "Limits come from queues, not from items."),
}

TAG_CHARS_MAX: Final = 128
KEY_CHARS_MAX: Final = 2_048
KEY_CHARS_KEPT: Final = 200
KEY_TTL_DEFAULT_S: Final = 30 * 86_400
SECONDS_MAX: Final = 3_650 * DAY_MS // 1_000

_Text = Annotated[str, Meta(min_length=1, max_length=512)]
_Machine = Literal["micro", "small-1x", "small-2x", "medium-1x", "medium-2x", "large-1x", "large-2x"]


class Queue(msgspec.Struct):
    """The queue an item names."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]


class KeyOptions(msgspec.Struct):
    """How a client made an idempotency key."""

    key: Any = None
    scope: str | None = None


class Debounce(msgspec.Struct, rename="camel", omit_defaults=True):
    """Calls that would collapse into one."""

    key: Annotated[str, Meta(min_length=1, max_length=512)]
    delay: str
    mode: Literal["leading", "trailing"] | None = None
    max_delay: str | None = None


def _on_the_wire(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("TTL" if word == "ttl" else word.capitalize() for word in rest)


class Options(msgspec.Struct, forbid_unknown_fields=True, rename=_on_the_wire):
    """The options of an item."""

    idempotency_key: Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX)] | None = None
    idempotency_key_ttl: _Text | None = None
    delay: _Text | None = None
    ttl: _Text | Annotated[int, Meta(ge=0)] | None = None
    priority: Annotated[float, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    queue: Queue | None = None
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
    idempotency_key_options: KeyOptions | UnsetType = UNSET
    concurrency_key: Annotated[str, Meta(max_length=512)] | int | float | UnsetType = UNSET
    debounce: Debounce | UnsetType = UNSET
    parent_attempt: Any = UNSET
    gates: Any = UNSET
    concurrency: Any = UNSET


class Line(msgspec.Struct):
    """One line as it is sent. Other fields of it mean nothing and are passed over."""

    index: Annotated[int, Meta(ge=0, le=INDEX_MAX)]
    task: Annotated[str, Meta(min_length=1, max_length=200)]
    payload: msgspec.Raw | UnsetType = UNSET
    options: Options | None = None


assert set(Options.__struct_encode_fields__) == set(OPTIONS), "an option is in the table and in Options, or in neither"
_FIELDS: Final = dict(zip(Options.__struct_encode_fields__, Options.__struct_fields__, strict=True))
_KEPT: Final = [(name, _FIELDS[name]) for name, fate in OPTIONS.items() if fate.disposition == "kept"]
_REFUSED: Final = [(name, _FIELDS[name]) for name, fate in OPTIONS.items() if fate.disposition == "refused"]

_decoder: Final = msgspec.json.Decoder(Line)
_text: Final = msgspec.json.Decoder(str)
_encode: Final = msgspec.json.Encoder().encode
_MAY_HOLD_JSON: Final = frozenset(b'"' + bytes((byte,)) for byte in b'{["-0123456789tfn\\ ')
"""How a string begins that may be JSON once more."""

_DURATION: Final = re.compile(r"(?:(\d{1,9})(w|d|hr|h|m|s))+")
_DURATION_PART: Final = re.compile(r"(\d{1,9})(w|d|hr|h|m|s)")
_KEY_TTL: Final = re.compile(r"(\d{1,9})([smhd])")
_UNIT_S: Final = {"w": 604_800, "d": 86_400, "hr": 3_600, "h": 3_600, "m": 60, "s": 1}


class Defaults(Protocol):
    """What a server knows of tasks: how their runs are kept unless an item says otherwise."""

    def __call__(self, task: str) -> Key:
        """The key of a plain run of this task."""


class ItemDecoder:
    """Lines of the batch API as entries. `now_us`: what delays and deadlines are counted from."""

    def __init__(
        self,
        *,
        defaults: Defaults,
        limits: Limits,
        now_us: int,
        may_run: Callable[[str], None],
        fetched: Callable[[bytes], Awaitable[tuple[bytes, int]]],
    ) -> None:
        """`may_run` raises for a task that whoever sends may not run."""
        self.fetched = fetched
        self._defaults = defaults
        self._limits = limits
        self._now_us = now_us
        self._may_run = may_run
        self._keys: dict[str, Key] = {}

    def key_of(self, task: str) -> Key:
        """How runs of a task are kept when an item says no more; each task is asked for once."""
        key = self._keys.get(task)
        if key is None:
            self._may_run(task)
            if not task.isprintable():
                raise InvalidItem("a task's name is printable characters")
            key = self._defaults(task)
            if len(self._keys) < 10_000:
                self._keys[task] = key
        return key

    def many(self, lines: Sequence[bytes]) -> Group | None:
        """Many lines at once; None when any of them is refused."""
        try:
            found = _decoder.decode_lines(b"\n".join(lines))
            if len(found) != len(lines):
                return None
            return self._grouped(found)
        except (msgspec.DecodeError, InvalidInput, UnicodeDecodeError, RecursionError):
            return None

    def _grouped(self, found: list[Line]) -> Group:
        """Consecutive plain items of one task together: then a chunk takes them in a few calls."""
        group: list[Entry | Bulk] = []
        for (_, task), numbered in groupby(enumerate(found), lambda known: (known[1].index - known[0], known[1].task)):
            lines = [line for _, line in numbered]
            if all(map(_is_plain, lines)):
                payloads = [bytes(line.payload) for line in lines]  # type: ignore[arg-type]  # a plain line has one
                if len(lines) > 1 and _MAY_HOLD_JSON.isdisjoint(payload[:2] for payload in payloads):
                    group.append(Bulk(lines[0].index, self.key_of(task), payloads))
                    continue
            group += map(self._entry, lines)
        return group

    def one(self, line: bytes) -> Entry:
        """One line, with what is wrong with it. Raises `InvalidInput`."""
        try:
            return self._entry(_decoder.decode(line))
        except msgspec.ValidationError as error:
            raise InvalidItem(f"Invalid item: {_plain(error)}", hint="the docs list what an item may say") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableItem(f"Invalid JSON: {error}") from None

    def entry(self, task: str, payload: msgspec.Raw, options: Options | None) -> Entry:
        """A run that is asked for by itself. Raises `InvalidInput`."""
        return self._entry(Line(index=0, task=check_name("task", task), payload=payload, options=options))

    def _entry(self, line: Line) -> Entry:
        key = self.key_of(line.task)
        options = line.options
        if options is None:
            payload, kind = _payload(line.payload, None)
            return Entry(line.index, key, payload, kind)
        for name, own in _REFUSED:
            if getattr(options, own) is not UNSET:
                raise InvalidItem(
                    f"Item {line.index}: option {name} is not supported. {OPTIONS[name].meaning}", hint="leave it out"
                )
        payload, kind = _payload(line.payload, options.payload_type)
        return Entry(line.index, self._own_key(key, options), payload, kind, self._extra(options))

    def _own_key(self, key: Key, options: Options) -> Key:
        due_us = 0 if options.delay is None else moment_us("delay", options.delay, self._now_us)
        if due_us <= self._now_us:
            due_us = 0
        expires_us = 0
        if options.ttl is not None:
            ttl_s = options.ttl if isinstance(options.ttl, int) else seconds_of("ttl", options.ttl)
            if ttl_s > SECONDS_MAX:
                raise InvalidItem(f"ttl is at most {SECONDS_MAX} seconds, not {ttl_s}")
            expires_us = max(due_us, self._now_us) + ttl_s * 1_000_000 if ttl_s else 0
        if options.queue is not None and not options.queue.name.isprintable():
            raise InvalidItem("a queue's name is printable characters")
        return key._replace(
            queue=key.queue if options.queue is None else options.queue.name,
            priority=key.priority if options.priority is None else round(options.priority),
            due_us=due_us,
            expires_us=expires_us,
        )

    def _extra(self, options: Options) -> Extra | None:
        kept: dict[str, Any] = {name: value for name, own in _KEPT if (value := getattr(options, own)) is not UNSET}
        key, expires_us, ttl_s = "", 0, key_ttl_s(options.idempotency_key_ttl)
        if options.idempotency_key is not None:
            key = kept_key(options.idempotency_key)
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
    """An item is JSON, and not an item."""

    code = "INVALID_ITEM"
    status = 422


def kept_key(key: str) -> str:
    """An idempotency key as it is kept: itself, or the digest of a long one."""
    if len(key) <= KEY_CHARS_KEPT:
        return key
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"


def key_ttl_s(text: str | None) -> int:
    """Seconds of an idempotency key's life. Raises `InvalidItem`."""
    if text is None:
        return KEY_TTL_DEFAULT_S
    found = _KEY_TTL.fullmatch(text)
    if found is None or (seconds := int(found[1]) * _UNIT_S[found[2]]) > SECONDS_MAX:
        raise InvalidItem(f"idempotencyKeyTTL is a number and one of s, m, h, d, not {text[:40]!r}")
    return seconds


def seconds_of(what: str, text: str) -> int:
    """A duration like 1h52m18s. Raises `InvalidItem`."""
    if not _DURATION.fullmatch(text):
        raise InvalidItem(f"{what} is a duration like 1h52m18s, not {text[:40]!r}")
    seconds = sum(int(count) * _UNIT_S[unit] for count, unit in _DURATION_PART.findall(text))
    if seconds > SECONDS_MAX:
        raise InvalidItem(f"{what} is at most {SECONDS_MAX} seconds, not {seconds}")
    return seconds


def moment_us(what: str, text: str, now_us: int) -> int:
    """A date in ISO 8601, or a duration from now. Raises `InvalidItem`."""
    if _DURATION.fullmatch(text):
        return now_us + seconds_of(what, text) * 1_000_000
    try:
        moment = datetime.fromisoformat(text)
        moved_us = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)
    except (ValueError, OverflowError, OSError):
        raise InvalidItem(f"{what} is a date like 2030-01-31T12:00:00Z or a duration, not {text[:40]!r}") from None
    if moved_us > now_us + SECONDS_MAX * 1_000_000:
        raise InvalidItem(f"{what} is at most {SECONDS_MAX} seconds from now")
    return moved_us


_NOT_OF_ITEMS: Final = (MSGPACK, ACTIVATION)


def _is_plain(line: Line) -> bool:
    return line.options is None and line.payload is not UNSET


def _payload(raw: msgspec.Raw | UnsetType, content_type: str | None) -> tuple[bytes, int]:
    """A payload as it is kept, and its kind. A string that holds JSON is that JSON, as the field's clients mean it."""
    kind = JSON if content_type is None else KINDS.get(content_type.partition(";")[0].strip().lower())
    if kind is None or kind in _NOT_OF_ITEMS:
        named = ", ".join(name for name, own in KINDS.items() if own not in _NOT_OF_ITEMS)
        raise InvalidItem(f"nothing reads a payload of type {content_type!r}", hint=f"one of {named}")
    if isinstance(raw, UnsetType):
        if kind == REFERENCE:
            raise InvalidItem("a payload of type application/store is the name of an upload")
        return (b"", kind) if kind == TEXT else (b"null", JSON)
    data = bytes(raw)
    if data[:1] != b'"':
        if kind in (TEXT, REFERENCE):
            raise InvalidItem(f"a payload of type {content_type} is a string")
        return data, kind
    if kind == JSON and data[:2] not in _MAY_HOLD_JSON:
        return data, JSON  # a string of words, as most are: it is not looked through for JSON
    text = _text.decode(data)
    inner = text.encode()
    if kind in (TEXT, REFERENCE):
        return inner, kind
    try:
        msgspec.json.decode(inner, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        if kind == SUPER_JSON:
            raise InvalidItem("a payload of type application/super+json holds no JSON") from None
        return data, JSON
    return inner, kind


def _tags(given: str | list[str] | None, most: int) -> tuple[str, ...]:
    tags = () if given is None else (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    if len(tags) > most:
        raise InvalidItem(f"a run has at most {most} tags, not {len(tags)}")
    for tag in tags:
        if not 0 < len(tag) <= TAG_CHARS_MAX or not tag.isprintable():
            raise InvalidItem(f"a tag is 1 to {TAG_CHARS_MAX} printable characters, not {tag[:40]!r}")
    return tags


def _metadata(raw: msgspec.Raw, content_type: str | None, bytes_max: int) -> Any:
    data = bytes(raw)
    if len(data) > bytes_max:
        raise InvalidItem(f"metadata has at most {bytes_max} bytes, not {len(data)}")
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


def _plain(error: msgspec.ValidationError) -> str:
    return str(error).replace("Object contains", "it contains")

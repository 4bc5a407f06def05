"""Blocks and chunks: a stream of new runs becomes chunks, each a block of inputs and the spans over it.

A block is written once and never changed. The coalescer is a state machine: `add` runs, `take` the chunks that are
closed (by count or by bytes), `flush` the rest when no append is in flight. With this natural batching no timer delays
a lone item.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Final, NamedTuple

import msgspec

from headrace.core.pack import JSON, LINK, pack, unpack_some
from headrace.core.run import COMPLETED, FAILED
from headrace.core.span import Key, decode_uint16s, encode_uint16s
from headrace.foundation.errors import InvalidInput

EMPTY: Final = b""


class Extra(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Properties that only some runs have; only those pay for them.

    `failure`: an encoded failure; the run is created as failed (an oversized or unreadable item). `link`: the id of the
    run that its idempotency key named before; the run is created as completed and has that run's outcome. `object_key`
    and `object_bytes`: the payload is a reference to that object. `attempts_max` and `timeout_ms`: instead of the
    task's own, 0 for those. `kept`: client options without a meaning here, returned as JSON. `name` and
    `retry_delay_ms`: the task name of an activation, and its delay between attempts.
    """

    idempotency_key: str = ""
    idempotency_expires_us: int = 0
    tags: tuple[str, ...] = ()
    headers: dict[str, str] = {}
    failure: bytes = EMPTY
    link: str = ""
    attempts_max: int = 0
    timeout_ms: int = 0
    kept: bytes = EMPTY
    object_key: str = ""
    object_bytes: int = 0
    name: str = ""
    retry_delay_ms: int = 0


class Chunk(msgspec.Struct, kw_only=True):
    """A block with its spans, not yet stored.

    `gaps` is None for consecutive indexes, otherwise 32-bit distances from `first_index`. `spans` maps each key to the
    block offsets of its runs, or to None if all runs have that key. `extras` is by block offset.
    """

    first_index: int
    last_index: int
    runs_count: int
    gaps: bytes | None
    items: bytes
    spans: dict[Key, bytes | None]
    extras: dict[int, Extra]

    def index_at(self, block_offset: int) -> int:
        """Return the batch index of the run at a block offset."""
        return self.first_index + (block_offset if self.gaps is None else array("I", self.gaps)[block_offset])


class Coalescer:
    """Collects runs into chunks. Owned by one task; never waits.

    A chunk closes at `runs_max` runs, before it would exceed `bytes_max` of payload, and where indexes are more than 32
    bits apart. `open_bytes`: the payload bytes of the open chunk.
    """

    def __init__(self, *, runs_max: int, bytes_max: int) -> None:
        self.runs_max = runs_max
        self.bytes_max = bytes_max
        self.open_bytes = 0
        self._closed: list[Chunk] = []
        self._begin()

    def _begin(self) -> None:
        self._indexes: list[int] = []
        self._highest = -1
        self._payloads: list[bytes] = []
        self._kinds: bytearray | None = None
        self._keys: list[Key] = []
        self._extras: dict[int, Extra] = {}
        self.open_bytes = 0

    @property
    def open_count(self) -> int:
        """Number of runs in the open chunk."""
        return len(self._payloads)

    def add(self, index: int, payload: bytes, key: Key, *, kind: int = JSON, extra: Extra | None = None) -> None:
        """Add one run. Indexes may come in any order, each at most once."""
        size = len(payload)
        if self._payloads and self.open_bytes + size > self.bytes_max:
            self._close()
        block_offset = len(self._payloads)
        self._indexes.append(index)
        if index > self._highest:
            self._highest = index
        self._payloads.append(payload)
        self._keys.append(key)
        if kind != JSON or self._kinds is not None:
            if self._kinds is None:
                self._kinds = bytearray(block_offset)
            self._kinds.append(kind)
        if extra is not None:
            self._extras[block_offset] = extra
        self.open_bytes += size
        if block_offset + 1 >= self.runs_max:
            self._close()

    def extend(self, first_index: int, payloads: Sequence[bytes], key: Key) -> None:
        """Add many runs of one key with consecutive indexes and JSON payloads; the same as `add`, in a few calls."""
        start = 0
        while start < len(payloads):
            piece = payloads[start : start + self.runs_max - len(self._payloads)]
            size = sum(map(len, piece))
            index = first_index + start
            start += len(piece)
            if self.open_bytes + size > self.bytes_max:
                for number, payload in enumerate(piece, index):
                    self.add(number, payload, key)
                continue
            self._indexes += range(index, index + len(piece))
            self._highest = max(self._highest, self._indexes[-1])
            self._payloads += piece
            self._keys += repeat(key, len(piece))
            if self._kinds is not None:
                self._kinds += bytes(len(piece))
            self.open_bytes += size
            if len(self._payloads) >= self.runs_max:
                self._close()

    def holds(self, first_index: int, count: int) -> bool:
        """True if the open chunk already has one of `count` consecutive indexes."""
        if first_index > self._highest:
            return False
        if count == 1:
            return first_index in self._indexes
        return any(first_index <= index < first_index + count for index in self._indexes)

    def take(self) -> list[Chunk]:
        """Return the closed chunks, oldest first."""
        closed, self._closed = self._closed, []
        return closed

    def flush(self) -> list[Chunk]:
        """Close the open chunk and return all chunks."""
        if self._payloads:
            self._close()
        return self.take()

    def _close(self) -> None:
        indexes, payloads = self._indexes, self._payloads
        first, last = indexes[0], indexes[-1]
        in_order = last - first + 1 == len(indexes) and all(map(int.__eq__, indexes, range(first, last + 1)))
        if in_order:
            gaps = None
        else:
            first, last = min(indexes), max(indexes)
            if last - first >= 1 << 32 or sorted(indexes) != indexes:
                self._close_sorted()
                return
            gaps = array("I", [index - first for index in indexes]).tobytes()
        self._closed.append(
            Chunk(
                first_index=first,
                last_index=last,
                runs_count=len(indexes),
                gaps=gaps,
                items=pack(payloads, None if self._kinds is None else bytes(self._kinds)),
                spans=_spans(self._keys),
                extras=self._extras,
            )
        )
        self._begin()

    def _close_sorted(self) -> None:
        """Add the runs of an unordered chunk again, sorted, and close chunks where 32 bits don't suffice."""
        kinds = self._kinds or bytearray(len(self._payloads))
        runs = sorted(
            zip(self._indexes, self._payloads, self._keys, kinds, range(len(kinds)), strict=True),
            key=lambda run: run[0],
        )
        extras = self._extras
        self._begin()
        for index, payload, key, kind, block_offset in runs:
            if self._indexes and index - self._indexes[0] >= 1 << 32:
                self._close()
            self.add(index, payload, key, kind=kind, extra=extras.get(block_offset))
        if self._payloads:
            self._close()


def _spans(keys: list[Key]) -> dict[Key, bytes | None]:
    first = keys[0]
    if keys.count(first) == len(keys):
        return {first: None}
    block_offsets: dict[Key, list[int]] = {}
    for block_offset, key in enumerate(keys):
        block_offsets.setdefault(key, []).append(block_offset)
    return {key: encode_uint16s(offsets) for key, offsets in block_offsets.items()}


class EndedAtCreation(NamedTuple):
    """The outcome of a run that has nothing to execute."""

    state: int
    result: bytes
    kind: int


def ended_at_creation(chunk: Chunk) -> dict[int, EndedAtCreation]:
    """Return the runs that are created with an outcome, by block offset: unreadable, or linked to another run."""
    outcomes = {}
    for block_offset, extra in chunk.extras.items():
        if extra.failure:
            outcomes[block_offset] = EndedAtCreation(FAILED, extra.failure, JSON)
        elif extra.link:
            outcomes[block_offset] = EndedAtCreation(COMPLETED, extra.link.encode(), LINK)
    return outcomes


def linked(chunk: Chunk, links: Mapping[int, str]) -> Chunk:
    """Return the chunk with the runs at some block offsets linked to other runs, given by id."""
    extras = dict(chunk.extras)
    for block_offset, run_id in links.items():
        extras[block_offset] = msgspec.structs.replace(
            extras[block_offset], link=run_id, idempotency_key="", idempotency_expires_us=0
        )
    return msgspec.structs.replace(chunk, extras=extras)


def check_names(chunk: Chunk) -> None:
    """Raise `InvalidInput` unless every database can store the names in a chunk: UTF-8 text without NUL.

    SQLite's JSON cuts a string at a NUL, which would merge two idempotency keys; PostgreSQL rejects NUL.
    """
    for key in chunk.spans:
        _check_name("task", key.task)
        _check_name("queue", key.queue)
    for extra in chunk.extras.values():
        _check_name("idempotency key", extra.idempotency_key)
        _check_name("object key", extra.object_key)
        for tag in extra.tags:
            _check_name("tag", tag)


def _check_name(field: str, name: str) -> None:
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"{field}: {name!r} is not text that can be stored: {error.reason}") from error
    if "\0" in name:
        raise InvalidInput(f"{field}: {name!r} contains a NUL character", hint="remove the NUL character")


def narrowed(chunk: Chunk, keep: list[int]) -> Chunk | None:
    """Return the chunk with only the runs at the offsets `keep`, ascending; None if there are none.

    A store uses it when some indexes of a chunk are durable already: the others are appended without them.
    """
    if len(keep) == chunk.runs_count:
        return chunk
    if not keep:
        return None
    payloads, kinds = unpack_some(chunk.items, keep)
    indexes = [chunk.index_at(block_offset) for block_offset in keep]
    new_offsets = {old: new for new, old in enumerate(keep)}
    spans: dict[Key, bytes | None] = {}
    for key, block_offsets in chunk.spans.items():
        if block_offsets is None:
            spans[key] = None
        elif kept_offsets := [
            new_offsets[block_offset] for block_offset in decode_uint16s(block_offsets) if block_offset in new_offsets
        ]:
            spans[key] = encode_uint16s(kept_offsets)
    first, last = indexes[0], indexes[-1]
    return Chunk(
        first_index=first,
        last_index=last,
        runs_count=len(keep),
        gaps=None if last - first + 1 == len(keep) else array("I", [index - first for index in indexes]).tobytes(),
        items=pack(payloads, kinds),
        spans=spans,
        extras={
            new_offsets[block_offset]: extra
            for block_offset, extra in chunk.extras.items()
            if block_offset in new_offsets
        },
    )

"""Payloads and results that are too large for a row: one object each, named by its content.

Rule 1: a key is `{environment}/{batch_id}/{sha256}`, with the environment as `environment_segment` writes it. The same
bytes of one batch are one object, a second write changes nothing, and what is read can be checked against its key.
Rule 2: when `put` returns, the object survives a power cut. Rule 3: an object is written before the row that names it,
and deleted after that row, so a row never names a missing object. After a crash in between, the object is an orphan;
upkeep finds it by `list` and deletes it when it is old.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice
from typing import Final, NamedTuple, Protocol, runtime_checkable

import msgspec

from headrace.foundation.errors import InvalidInput, ObjectMissing, StoreUnavailable
from headrace.foundation.limits import MIB, TABLE, Limit, check

_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+\Z")
_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
_KEY_CHARS_MAX: Final = 512
_PAGE_OBJECTS: Final = 1_000
_HASH_IN_THREAD_BYTES: Final = 256 * 1024
CONCURRENCY: Final = Limit("payload_concurrency", "requests", 16, 1, 10_000, "Concurrent requests to the object store.")
_OBJECT_BYTES_MAX: Final = TABLE["item_bytes_max"].most + MIB


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value in a row that stands for a payload in the object store."""

    key: str
    bytes_count: int
    content_type: str = "application/json"

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Reference:
        """Decode a reference. Raises `InvalidInput` for anything that `encode` does not write; access rights are not
        checked here.
        """
        try:
            reference = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"expected a reference to a stored payload, got bytes that can't be decoded: {error}",
                hint='a reference looks like {"key": "…", "bytes_count": 0, "content_type": "…"}',
            ) from error
        check_key(reference.key)
        if reference.bytes_count < 0:
            raise InvalidInput(f"expected bytes_count >= 0, got {reference.bytes_count}", key=reference.key)
        return reference


class StoredObject(NamedTuple):
    """An entry of a listing."""

    key: str
    modified_us: int
    bytes_count: int


def environment_segment(environment: str) -> str:
    """Return the first segment of the keys of an environment: its name, or a hash of a name that may not be one.

    Different environments have different segments, and none is that of another folder: a plain name does not begin with
    an underscore.
    """
    if _PLAIN.match(environment):
        return environment
    return f"_{hashlib.sha256(environment.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"


def payload_key(environment: str, batch_id: str, sha256_hex: str) -> str:
    """Return the key of a payload with this hash. Raises `InvalidInput` for a batch id or hash that can't be part of a
    key.
    """
    for part in (batch_id, sha256_hex):
        if "/" in part:
            raise _bad_key(part, "a part of a key has no slash")
    return check_key(f"{environment_segment(environment)}/{batch_id}/{sha256_hex}")


def check_key(key: str) -> str:
    """Return `key` if it names a payload and nothing else; raises `InvalidInput` otherwise.

    Only plain segments pass, so no key leaves the directory or bucket prefix of the store, however it is decoded.
    """
    _check_segments(key)
    if key.count("/") != 2 or not _SHA256.match(key.rpartition("/")[2]):
        raise _bad_key(key, "a key looks like environment/batch/sha256")
    return key


class ReadObject(NamedTuple):
    """An object that was read. `content_type` is empty where the store keeps none."""

    data: bytes
    content_type: str = ""


class ObjectTooLarge(Exception):
    """An object has more bytes than the reader takes; nothing of it was read."""

    def __init__(self, bytes_count: int) -> None:
        super().__init__(f"the object has {bytes_count} bytes")
        self.bytes_count = bytes_count


class ObjectBackend(Protocol):
    """The place where objects are kept: a directory, a bucket, or a database. Raises `StoreUnavailable`."""

    async def write(self, key: str, data: bytes, /) -> None:
        """Store an object durably, in place of an older one. A partial object can never be read."""

    async def write_stream(self, key: str, pieces: AsyncIterator[bytes], /) -> None:
        """Store an object that arrives in pieces. An error of `pieces` leaves nothing."""

    async def read(self, key: str, bytes_max: int, /) -> ReadObject | None:
        """Return an object, None if it is missing. Raises `ObjectTooLarge` instead of loading more than `bytes_max`."""

    async def delete(self, keys: Sequence[str], /) -> None:
        """Delete objects. Missing ones are no error."""

    def pages(self, prefix: str, page_objects: int, /) -> AsyncIterator[list[StoredObject]]:
        """List the objects under whole segments, unsorted, one page at a time."""

    async def delete_unfinished(self, before_us: int, /) -> int:
        """Delete what writers that crashed before a time have left. Returns how many objects those were."""

    async def delete_folder(self, prefix: str, /) -> None:
        """Remove what is left of an empty folder, where the place has folders."""


@runtime_checkable
class SigningBackend(Protocol):
    """A place to which clients upload, and from which they download, by signed URLs and without this process."""

    async def signed_url(self, method: str, key: str, seconds: int, /) -> str:
        """Return a URL to `PUT` or `GET` an object, valid for some seconds."""


class PayloadStore:
    """Reader and writer of payload objects. Requests are bounded in number, and none blocks the event loop.

    `url` names the place for people. `shared_url` is a URL by which another process of this machine opens the same
    place with `open_payloads`; None if it can't.
    """

    def __init__(
        self,
        objects: ObjectBackend,
        *,
        url: str,
        shared_url: str | None = None,
        concurrency: int = CONCURRENCY.default,
    ) -> None:
        self.url = url
        self.shared_url = shared_url
        self.objects = objects
        self._requests = asyncio.Semaphore(check(CONCURRENCY, concurrency))

    async def put(self, key: str, data: bytes) -> None:
        """Store `data` durably under its `key`. Storing it again changes nothing but its age.

        Raises `InvalidInput` if the key is not that of these bytes, and `StoreUnavailable` if they could not be
        written; then no partial object can be read.
        """
        check_key(key)
        if await _sha256(data) != key.rpartition("/")[2]:
            raise InvalidInput(
                "the key does not match the hash of these bytes", hint="make the key with payload_key", key=key
            )
        async with self._requests:
            await self.objects.write(key, data)

    async def get(self, key: str) -> bytes:
        """Return the bytes under `key`, checked against the key.

        Raises `ObjectMissing` if the object is missing or has other bytes, and `StoreUnavailable` if the store does not
        answer.
        """
        check_key(key)
        async with self._requests:
            try:
                stored = await self.objects.read(key, _OBJECT_BYTES_MAX)
            except ObjectTooLarge as error:
                raise ObjectMissing(
                    f"the object is larger than any payload ({error.bytes_count} bytes)",
                    key=key,
                    url=shown_url(self.url),
                ) from None
        if stored is None:
            raise ObjectMissing(
                "the payload is not in the object store",
                hint="it was deleted by another program, or its writer uses another object store than this process",
                key=key,
                url=shown_url(self.url),
            )
        if await _sha256(stored.data) != key.rpartition("/")[2]:
            raise ObjectMissing(
                f"the object has other bytes than were written ({len(stored.data)} of them)",
                hint="it was damaged or replaced by another program; restore it, or send the item again",
                key=key,
                url=shown_url(self.url),
            )
        return stored.data

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in bounded requests. Missing objects are no error."""
        pending = iter(keys)
        while page := [check_key(key) for key in islice(pending, _PAGE_OBJECTS)]:
            async with self._requests:
                await self.objects.delete(page)

    async def list(self, prefix: str = "", *, page_objects: int = _PAGE_OBJECTS) -> AsyncIterator[StoredObject]:
        """List every object under `prefix` (whole segments), unsorted, one page at a time.

        Objects whose names are no keys are skipped: Headrace did not write them.
        """
        if prefix:
            _check_segments(prefix)
        async for page in self.objects.pages(prefix, page_objects):
            for stored in page:
                if _is_ours(stored.key):
                    yield stored

    async def delete_older(self, folder: str, before_us: int) -> int:
        """Delete the objects of a folder beside the payloads that were written before a time, and what crashed writers
        have left anywhere. Returns how many.
        """
        _check_segments(folder)
        count = await self.objects.delete_unfinished(before_us)
        async for page in self.objects.pages(folder, _PAGE_OBJECTS):
            old = [stored.key for stored in page if stored.modified_us < before_us]
            if old:
                async with self._requests:
                    await self.objects.delete(old)
            count += len(old)
        return count

    async def delete_batch(self, environment: str, batch_id: str) -> int:
        """Delete every payload of a batch, page by page. Returns how many there were. May be repeated."""
        prefix = payload_key(environment, batch_id, "0" * 64).rpartition("/")[0]
        page: list[str] = []
        count = 0
        async for stored in self.list(prefix):
            page.append(stored.key)
            if len(page) == _PAGE_OBJECTS:
                await self.delete(page)
                count += len(page)
                page = []
        await self.delete(page)
        await self.objects.delete_folder(prefix)
        return count + len(page)

    async def check(self) -> None:
        """Write, read, list and delete one small object, as `headrace doctor` does. Raises the error of the step that
        failed.
        """
        key = await self.put_probe()
        try:
            await self.get(key)
        finally:
            await self.delete_probe(key)

    async def put_probe(self) -> str:
        """Write a small object of random bytes, and return its key."""
        data = b"headrace checks its object store " + secrets.token_bytes(16)
        batch = f"check-{secrets.token_hex(8)}"
        key = payload_key("headrace-check", batch, hashlib.sha256(data).hexdigest())
        await self.put(key, data)
        return key

    async def delete_probe(self, key: str) -> None:
        """List and delete an object of `put_probe`. Raises `StoreUnavailable` if it is not listed."""
        _, batch, _ = key.split("/")
        if await self.delete_batch("headrace-check", batch) != 1:
            raise StoreUnavailable(
                "the object store does not list an object that was just written",
                hint="check that its credentials allow listing",
                url=shown_url(self.url),
            )


async def _sha256(data: bytes) -> str:
    if len(data) < _HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


def _check_segments(path: str) -> None:
    if len(path) > _KEY_CHARS_MAX:
        raise _bad_key(path[:40] + "…", f"a key has at most {_KEY_CHARS_MAX} characters")
    for segment in path.split("/"):
        if not _SEGMENT.match(segment) or segment in (".", "..") or len(segment) > TABLE["name_chars_max"].default:
            raise _bad_key(
                path, "segments consist of letters, digits, dots, dashes and underscores, and are not . or .."
            )


def _is_ours(path: str) -> bool:
    try:
        check_key(path)
    except InvalidInput:
        return False
    return True


def _bad_key(key: str, hint: str) -> InvalidInput:
    return InvalidInput(f"expected the key of a payload, got {key!r}", hint=hint)


def shown_url(url: str) -> str:
    """Return the URL without its secrets."""
    return re.sub(r"//[^/@]*@", "//…@", url)

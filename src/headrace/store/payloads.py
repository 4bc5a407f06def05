"""Payloads and results that are too large for a row: one object each, named by its content.

Rule 1: a key is `{environment}/{batch_id}/{sha256}`, so the same bytes of one batch are one object, a second
write changes nothing, and what is read back can be checked without asking anyone.
Rule 2: when `put` returns, the object outlives a power cut. Object stores promise that; a directory does only
after the file and the directories that name it were synced, which obstore leaves to us.
Rule 3: an object is written before the row that names it and removed after it, so a row never points at
nothing; what a crash leaves between the two is an orphan, found by `list` and old enough to go.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import msgspec
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from headrace.foundation.errors import InvalidInput, InvalidSetting, ObjectMissing, StoreUnavailable
from headrace.foundation.limits import MIB, TABLE, Limit, check

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig, RetryConfig, S3Config

_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+\Z")
_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
_KEY_CHARS_MAX: Final = 512
_PAGE_OBJECTS: Final = 1_000
_DIRECTORIES_KNOWN_MAX: Final = 4_096
_HASH_IN_THREAD_BYTES: Final = 256 * 1024
_CONCURRENCY: Final = Limit(
    "payload_concurrency", "requests", 16, 1, 10_000, "Requests to the object store at the same time."
)
_OBJECT_BYTES_MAX: Final = TABLE["item_bytes_max"].most + MIB
_REMOTE: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_PARAMETERS: Final = {
    limit.name: limit
    for limit in (
        Limit("retries", "requests", 8, 0, 100, "Times a failed request is tried again, with growing waits."),
        Limit("retry_s", "s", 60, 1, 86_400, "Longest that one request is tried for, waits included."),
        Limit("timeout_s", "s", 30, 1, 86_400, "Longest that one try of a request may take."),
    )
}
"""What the URL of a remote store may say beside `endpoint` and `region`."""

_NO_BUCKET: Final = "NoSuchBucket"
_ANSWER: Final = re.compile(r"<Code>([^<]{1,100})</Code>\s*<Message>([^<]{1,300})</Message>")
_CONNECT_S: Final = 5
_BACKOFF: Final[BackoffConfig] = {
    "init_backoff": timedelta(milliseconds=50),
    "max_backoff": timedelta(seconds=5),
    "base": 2,
}


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a row keeps in place of a payload that went to the object store."""

    key: str
    bytes_count: int
    content_type: str = "application/json"

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Reference:
        """Raises `InvalidInput` for anything `encode` would not write; who may read the key is not judged here."""
        try:
            reference = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(
                f"this is not a reference to a stored payload: {error}",
                hint='a reference looks like {"key": "…", "bytes_count": 0, "content_type": "…"}',
            ) from error
        check_key(reference.key)
        if reference.bytes_count < 0:
            raise InvalidInput("a payload can't have fewer than zero bytes", key=reference.key)
        return reference


class StoredObject(NamedTuple):
    """One line of a listing."""

    key: str
    modified_us: int
    bytes_count: int


def payload_key(environment: str, batch_id: str, sha256_hex: str) -> str:
    """Where the bytes with this hash live. Raises `InvalidInput` for parts that can't be part of a key."""
    for part in (environment, batch_id, sha256_hex):
        if "/" in part:
            raise _bad_key(part, "a part of a key holds no slash")
    return check_key(f"{environment}/{batch_id}/{sha256_hex}")


def check_key(key: str) -> str:
    """`key` when it names an object of ours and nothing else, wherever it came from; else `InvalidInput`.

    Only plain segments pass, so no key leaves the store's own directory or bucket prefix, by any decoding.
    """
    _check_segments(key)
    if key.count("/") != 2 or not _SHA256.match(key.rpartition("/")[2]):
        raise _bad_key(key, "a key looks like environment/batch/sha256")
    return key


def open_payloads(url: str, *, concurrency: int = _CONCURRENCY.default) -> PayloadStore:
    """The object store behind `url`: a directory, `file:///directory`, `memory://`, `s3://bucket/prefix`, `gs://` or
    `az://`.

    A directory is made when it is not there, a bucket is not. Credentials come from the usual environment variables
    (`AWS_ACCESS_KEY_ID`, …), and so do region and endpoint where the URL does not say `?endpoint=…&region=…`. Requests
    to them are tried again with growing waits: `retries`, `retry_s` and `timeout_s` in the URL bound that. Raises
    `InvalidSetting` for a url nobody understands and `StoreUnavailable` for a directory that can't be used.
    """
    check(_CONCURRENCY, concurrency)
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        if not url or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise _bad_url(url, "a directory is written as a path or as file:///path")
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        if not parts.path.strip("/"):
            raise _bad_url(url, "name a directory for payloads, not the root of the disk")
        return PayloadStore(_open_directory(path), url=url, concurrency=concurrency)
    if parts.scheme == "memory":
        return PayloadStore(MemoryStore(), url=url, concurrency=concurrency)
    if parts.scheme not in _REMOTE:
        raise _bad_url(url, "payloads go to a directory, memory://, s3://, gs:// or az://")
    return PayloadStore(_open_remote(url), url=url, concurrency=concurrency)


def _open_remote(url: str) -> ObjectStore:
    """A bucket with its bounds; nothing is asked of it yet."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise _bad_url(url, "name a bucket: s3://bucket/prefix")
    said = dict(parse_qsl(parts.query, keep_blank_values=True))
    config: S3Config = {}
    if "endpoint" in said:
        config["endpoint"] = said["endpoint"]
    if "region" in said:
        config["region"] = said["region"]
    bounds = {name: limit.default for name, limit in _PARAMETERS.items()}
    for name, value in said.items():
        if name in config:
            continue
        if name not in bounds:
            known = ", ".join(("endpoint", "region", *_PARAMETERS))
            raise _bad_url(url, f"nothing is called {name} there; a URL may say {known}")
        bounds[name] = check(_PARAMETERS[name], int(value) if value.isdigit() else value)
    bare = urlunsplit(parts._replace(query="", fragment=""))
    retries: RetryConfig = {
        "max_retries": bounds["retries"],
        "retry_timeout": timedelta(seconds=bounds["retry_s"]),
        "backoff": _BACKOFF,
    }
    client: ClientConfig = {
        "timeout": timedelta(seconds=bounds["timeout_s"]),
        "connect_timeout": timedelta(seconds=min(_CONNECT_S, bounds["timeout_s"])),
        "allow_http": said.get("endpoint", "").startswith("http://"),
    }
    try:
        return from_url(bare, config=config, retry_config=retries, client_options=client)
    except (BaseError, ValueError, TypeError, OSError) as error:
        raise _bad_url(url, _first_line(error)) from error


class PayloadStore:
    """Reads and writes payload objects; every request is bounded in number, none blocks the event loop."""

    def __init__(self, store: ObjectStore, *, url: str, concurrency: int = _CONCURRENCY.default) -> None:
        self.url = url
        self._store = store
        self._root = store.prefix if isinstance(store, LocalStore) else None
        self._requests = asyncio.Semaphore(check(_CONCURRENCY, concurrency))
        self._synced_directories: dict[Path, None] = {}

    @property
    def objects(self) -> ObjectStore:
        """What lies beneath, for objects that are not payloads."""
        return self._store

    async def put(self, key: str, data: bytes) -> None:
        """Store `data` durably under its `key`; storing it again changes nothing but its age.

        Raises `InvalidInput` when the key is not that of these bytes, `StoreUnavailable` when they could
        not be written: then nothing half-written is there to be read.
        """
        check_key(key)
        if await _sha256(data) != key.rpartition("/")[2]:
            raise InvalidInput("the key is not that of these bytes", hint="make it with payload_key", key=key)
        async with self._requests:
            try:
                if self._root is None:
                    await obstore.put_async(self._store, key, data)
                else:
                    await self._put_file(self._root / key, key, data)
            except (BaseError, OSError) as error:
                raise self._unavailable("written", error, key=key) from error

    async def get(self, key: str) -> bytes:
        """The bytes under `key`, checked against it.

        Raises `ObjectMissing` when nothing is there or something else is, `StoreUnavailable` when nobody
        can say.
        """
        check_key(key)
        async with self._requests:
            data = await self._read(key)
        if data is None:
            raise ObjectMissing(
                "the payload is not in the object store",
                hint="it was removed from outside, or this process looks at another object store than the writer",
                key=key,
                url=shown_url(self.url),
            )
        if await _sha256(data) != key.rpartition("/")[2]:
            raise ObjectMissing(
                f"the object holds other bytes than were written ({len(data)} of them)",
                hint="it was damaged or replaced from outside; restore it, or send the item again",
                key=key,
                url=shown_url(self.url),
            )
        return data

    async def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, in bounded requests; those that are gone already are no error."""
        pending = iter(keys)
        while page := [check_key(key) for key in islice(pending, _PAGE_OBJECTS)]:
            async with self._requests:
                await self._delete_page(page)

    async def list(self, prefix: str = "", *, page_objects: int = _PAGE_OBJECTS) -> AsyncIterator[StoredObject]:
        """Every object under `prefix` (whole segments), in no order, holding one page at a time.

        What is not named as ours is passed over: a stray file is nobody's orphan.
        """
        if prefix:
            _check_segments(prefix)
        try:
            async for page in obstore.list(self._store, prefix=prefix or None, chunk_size=page_objects):
                for found in page:
                    if _is_ours(found["path"]):
                        modified_us = int(found["last_modified"].timestamp() * 1_000_000)
                        yield StoredObject(found["path"], modified_us, found["size"])
        except (BaseError, OSError) as error:
            raise self._unavailable("listed", error, prefix=prefix) from error

    async def delete_older(self, folder: str, before_us: int) -> int:
        """Remove what lies in a folder beside the payloads and was written before then; answers how many."""
        _check_segments(folder)
        count = 0
        try:
            async for page in obstore.list(self._store, prefix=folder, chunk_size=_PAGE_OBJECTS):
                old = [one["path"] for one in page if one["last_modified"].timestamp() * 1_000_000 < before_us]
                if old:
                    async with self._requests:
                        await self._delete_page(old)
                count += len(old)
        except (BaseError, OSError) as error:
            raise self._unavailable("listed", error, folder=folder) from error
        return count

    async def delete_batch(self, environment: str, batch_id: str) -> int:
        """Remove every payload of a batch, page by page, and say how many there were. May be repeated."""
        prefix = payload_key(environment, batch_id, "0" * 64).rpartition("/")[0]
        page: list[str] = []
        count = 0
        async for found in self.list(prefix):
            page.append(found.key)
            if len(page) == _PAGE_OBJECTS:
                await self.delete(page)
                count += len(page)
                page = []
        await self.delete(page)
        if self._root is not None:
            directory = self._root / prefix
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            self._synced_directories.pop(directory, None)
        return count + len(page)

    async def check(self) -> None:
        """Write, read, list and remove one small object, as `doctor` does. Raises what went wrong."""
        data = b"headrace checks its object store " + secrets.token_bytes(16)
        batch = f"check-{secrets.token_hex(8)}"
        key = payload_key("headrace-check", batch, hashlib.sha256(data).hexdigest())
        await self.put(key, data)
        await self.get(key)
        if await self.delete_batch("headrace-check", batch) != 1:
            raise StoreUnavailable(
                "the object store does not list what was just written",
                hint="check that its credentials allow listing",
                url=shown_url(self.url),
            )

    async def _read(self, key: str) -> bytes | None:
        try:
            found = await obstore.get_async(self._store, key)
            if found.meta["size"] > _OBJECT_BYTES_MAX:
                raise ObjectMissing(
                    f"the object is larger than any payload ({found.meta['size']} bytes)",
                    key=key,
                    url=shown_url(self.url),
                )
            return (await found.bytes_async()).to_bytes()
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):  # then nothing is known of any object in it
                raise self._unavailable("read", error, key=key) from error
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable("read", error, key=key) from error

    async def _put_file(self, path: Path, key: str, data: bytes) -> None:
        """Write-once, since replacing a good object by an unsynced copy would lose it in a power cut.

        What is there already is either the same or was torn before it was synced, and only then replaced.
        """
        is_fresh = True
        try:
            await obstore.put_async(self._store, key, data, mode="create")
        except AlreadyExistsError:
            is_fresh = await self._read(key) != data
            if is_fresh:
                await obstore.put_async(self._store, key, data, mode="overwrite", use_multipart=False)
        try:
            await asyncio.to_thread(self._sync_file, path)
        except OSError:
            # After a failed sync the kernel may call the same pages clean: only a new write is to be believed.
            # What was there before is another put's, accepted perhaps, and stays.
            if is_fresh:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    def _sync_file(self, path: Path) -> None:
        assert self._root is not None
        os.utime(path)  # a payload that is sent again is young again, so its orphan's grace starts anew
        _sync(path)
        _sync(path.parent)
        for directory in path.relative_to(self._root).parents[:-1]:
            known = self._root / directory
            if known not in self._synced_directories:
                _sync(known.parent)
                if len(self._synced_directories) >= _DIRECTORIES_KNOWN_MAX:
                    self._synced_directories.clear()
                self._synced_directories[known] = None

    async def _delete_page(self, page: Sequence[str]) -> None:
        try:
            await obstore.delete_async(self._store, page)
        except FileNotFoundError:
            for key in page:  # a directory stops at the first that is gone; the others are still to go
                try:
                    await obstore.delete_async(self._store, key)
                except FileNotFoundError:
                    continue
                except (BaseError, OSError) as error:
                    raise self._unavailable("removed", error, key=key) from error
        except (BaseError, OSError) as error:
            raise self._unavailable("removed", error, objects=len(page)) from error

    def _unavailable(self, verb: str, error: Exception, **ids: object) -> StoreUnavailable:
        return StoreUnavailable(
            f"the payload could not be {verb}: {_first_line(error)}", hint=_hint(error), url=shown_url(self.url), **ids
        )


def _open_directory(path: Path) -> LocalStore:
    try:
        missing = [directory for directory in (path, *path.parents) if not directory.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for directory in missing:
            _sync(directory.parent)
        return LocalStore(path)
    except (BaseError, OSError) as error:
        raise StoreUnavailable(
            f"the directory for payloads can't be used: {_first_line(error)}", hint=_hint(error), url=str(path)
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def _sha256(data: bytes) -> str:
    if len(data) < _HASH_IN_THREAD_BYTES:
        return hashlib.sha256(data).hexdigest()
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


def _check_segments(path: str) -> None:
    if len(path) > _KEY_CHARS_MAX:
        raise _bad_key(path[:40] + "…", f"a key has {_KEY_CHARS_MAX} characters at most")
    for segment in path.split("/"):
        if not _SEGMENT.match(segment) or segment in (".", "..") or len(segment) > TABLE["name_chars_max"].default:
            raise _bad_key(path, "segments hold letters, digits, dots, dashes and underscores, and are not . or ..")


def _is_ours(path: str) -> bool:
    try:
        check_key(path)
    except InvalidInput:
        return False
    return True


def _bad_key(key: str, hint: str) -> InvalidInput:
    return InvalidInput(f"{key!r} is not a key of a payload", hint=hint)


def _bad_url(url: str, hint: str) -> InvalidSetting:
    return InvalidSetting(f"{shown_url(url)!r} is not an object store", hint=hint)


def shown_url(url: str) -> str:
    """The URL as it may be shown."""
    return re.sub(r"//[^/@]*@", "//…@", url)


def _first_line(error: Exception) -> str:
    """What an error says, in one line: the server's own words where there are any."""
    said = _ANSWER.search(str(error))
    if said:
        return f"the server says {said[1]}: {said[2]}"
    return str(error).partition("\n")[0] or type(error).__name__


def _hint(error: Exception) -> str:
    """What a person can do; obstore keeps the system's error number in its text only."""
    text = str(error)
    number = getattr(error, "errno", None)
    named = re.search(r"os error (\d+)", text)
    if named:
        number = int(named.group(1))
    if number in (27, 28, 122):
        return "the disk or the quota is full: free space, then try again"
    if number == 30:
        return "the file system is mounted read-only: remount it or choose another directory"
    if number in (1, 13) or isinstance(error, PermissionDeniedError):
        return "this process may not do that there: check the permissions of its user or its credentials"
    if isinstance(error, UnauthenticatedError):
        return "the object store does not know these credentials: check them and the clock of this machine"
    if number in (2, 20) or isinstance(error, FileNotFoundError):
        return "the directory or bucket is not there: create it, or correct the url"
    return "check that the object store can be reached, with `headrace doctor`"

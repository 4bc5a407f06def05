"""Payloads and results that are too large for a row: one object each, named by its content.

Rule 1: a key is `{environment}/{batch_id}/{sha256}`. The same bytes of one batch are one object, a second write changes
nothing, and what is read can be checked against its key. Rule 2: when `put` returns, the object survives a power cut.
Object stores promise that. A directory does so only after the file and the directories above it were synced, which
obstore leaves to its caller. Rule 3: an object is written before the row that names it, and deleted after that row, so
a row never names a missing object. After a crash in between, the object is an orphan; upkeep finds it by `list` and
deletes it when it is old.
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
    "payload_concurrency", "requests", 16, 1, 10_000, "Concurrent requests to the object store."
)
_OBJECT_BYTES_MAX: Final = TABLE["item_bytes_max"].most + MIB
_REMOTE: Final = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_PARAMETERS: Final = {
    limit.name: limit
    for limit in (
        Limit("retries", "requests", 8, 0, 100, "Attempts after a failed request, with growing waits."),
        Limit("retry_s", "s", 60, 1, 86_400, "Time limit of a request with its retries and waits."),
        Limit("timeout_s", "s", 30, 1, 86_400, "Time limit of one attempt of a request."),
    )
}
"""Options of the URL of a remote store, beside `endpoint` and `region`."""

_NO_BUCKET: Final = "NoSuchBucket"
_ANSWER: Final = re.compile(r"<Code>([^<]{1,100})</Code>\s*<Message>([^<]{1,300})</Message>")
_CONNECT_S: Final = 5
_BACKOFF: Final[BackoffConfig] = {
    "init_backoff": timedelta(milliseconds=50),
    "max_backoff": timedelta(seconds=5),
    "base": 2,
}


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


def payload_key(environment: str, batch_id: str, sha256_hex: str) -> str:
    """Return the key of a payload with this hash. Raises `InvalidInput` for parts that can't be part of a key."""
    for part in (environment, batch_id, sha256_hex):
        if "/" in part:
            raise _bad_key(part, "a part of a key has no slash")
    return check_key(f"{environment}/{batch_id}/{sha256_hex}")


def check_key(key: str) -> str:
    """Return `key` if it names a payload and nothing else; raises `InvalidInput` otherwise.

    Only plain segments pass, so no key leaves the directory or bucket prefix of the store, however it is decoded.
    """
    _check_segments(key)
    if key.count("/") != 2 or not _SHA256.match(key.rpartition("/")[2]):
        raise _bad_key(key, "a key looks like environment/batch/sha256")
    return key


def open_payloads(url: str, *, concurrency: int = _CONCURRENCY.default) -> PayloadStore:
    """Open the object store at `url`: a directory, `file:///directory`, `memory://`, `s3://bucket/prefix`, `gs://` or
    `az://`.

    A directory is created if it is missing, a bucket is not. Credentials come from the usual environment variables
    (`AWS_ACCESS_KEY_ID`, …), and so do region and endpoint unless the URL has `?endpoint=…&region=…`. Failed requests
    are repeated with growing waits, bounded by `retries`, `retry_s` and `timeout_s` in the URL. Raises `InvalidSetting`
    for an unknown URL, and `StoreUnavailable` for a directory that can't be used.
    """
    check(_CONCURRENCY, concurrency)
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        if not url or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise _bad_url(url, "write a directory as a path or as file:///path")
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        if not parts.path.strip("/"):
            raise _bad_url(url, "name a directory for payloads, not the root of the file system")
        return PayloadStore(_open_directory(path), url=url, concurrency=concurrency)
    if parts.scheme == "memory":
        return PayloadStore(MemoryStore(), url=url, concurrency=concurrency)
    if parts.scheme not in _REMOTE:
        raise _bad_url(url, "payloads are stored in a directory, memory://, s3://, gs:// or az://")
    return PayloadStore(_open_remote(url), url=url, concurrency=concurrency)


def _open_remote(url: str) -> ObjectStore:
    """Make the client of a bucket, without any request."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise _bad_url(url, "name a bucket: s3://bucket/prefix")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    config: S3Config = {}
    if "endpoint" in options:
        config["endpoint"] = options["endpoint"]
    if "region" in options:
        config["region"] = options["region"]
    bounds = {name: limit.default for name, limit in _PARAMETERS.items()}
    for name, value in options.items():
        if name in config:
            continue
        if name not in bounds:
            spelled = ", ".join(("endpoint", "region", *_PARAMETERS))
            raise _bad_url(url, f"unknown option {name}; the options are {spelled}")
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
        "allow_http": options.get("endpoint", "").startswith("http://"),
    }
    try:
        return from_url(bare, config=config, retry_config=retries, client_options=client)
    except (BaseError, ValueError, TypeError, OSError) as error:
        raise _bad_url(url, _first_line(error)) from error


class PayloadStore:
    """Reader and writer of payload objects. Requests are bounded in number, and none blocks the event loop."""

    def __init__(self, store: ObjectStore, *, url: str, concurrency: int = _CONCURRENCY.default) -> None:
        self.url = url
        self._store = store
        self._root = store.prefix if isinstance(store, LocalStore) else None
        self._requests = asyncio.Semaphore(check(_CONCURRENCY, concurrency))
        self._synced_directories: dict[Path, None] = {}

    @property
    def objects(self) -> ObjectStore:
        """The object store itself, for objects that are not payloads."""
        return self._store

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
            try:
                if self._root is None:
                    await obstore.put_async(self._store, key, data)
                else:
                    await self._put_file(self._root / key, key, data)
            except (BaseError, OSError) as error:
                raise self._unavailable("written", error, key=key) from error

    async def get(self, key: str) -> bytes:
        """Return the bytes under `key`, checked against the key.

        Raises `ObjectMissing` if the object is missing or has other bytes, and `StoreUnavailable` if the store does not
        answer.
        """
        check_key(key)
        async with self._requests:
            data = await self._read(key)
        if data is None:
            raise ObjectMissing(
                "the payload is not in the object store",
                hint="it was deleted by another program, or its writer uses another object store than this process",
                key=key,
                url=shown_url(self.url),
            )
        if await _sha256(data) != key.rpartition("/")[2]:
            raise ObjectMissing(
                f"the object has other bytes than were written ({len(data)} of them)",
                hint="it was damaged or replaced by another program; restore it, or send the item again",
                key=key,
                url=shown_url(self.url),
            )
        return data

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in bounded requests. Missing objects are no error."""
        pending = iter(keys)
        while page := [check_key(key) for key in islice(pending, _PAGE_OBJECTS)]:
            async with self._requests:
                await self._delete_page(page)

    async def list(self, prefix: str = "", *, page_objects: int = _PAGE_OBJECTS) -> AsyncIterator[StoredObject]:
        """List every object under `prefix` (whole segments), unsorted, one page at a time.

        Objects whose names are no keys are skipped: Headrace did not write them.
        """
        if prefix:
            _check_segments(prefix)
        try:
            async for page in obstore.list(self._store, prefix=prefix or None, chunk_size=page_objects):
                for entry in page:
                    if _is_ours(entry["path"]):
                        modified_us = int(entry["last_modified"].timestamp() * 1_000_000)
                        yield StoredObject(entry["path"], modified_us, entry["size"])
        except (BaseError, OSError) as error:
            raise self._unavailable("listed", error, prefix=prefix) from error

    async def delete_older(self, folder: str, before_us: int) -> int:
        """Delete the objects of a folder beside the payloads that were written before a time. Returns how many."""
        _check_segments(folder)
        count = 0
        try:
            async for page in obstore.list(self._store, prefix=folder, chunk_size=_PAGE_OBJECTS):
                old = [entry["path"] for entry in page if entry["last_modified"].timestamp() * 1_000_000 < before_us]
                if old:
                    async with self._requests:
                        await self._delete_page(old)
                count += len(old)
        except (BaseError, OSError) as error:
            raise self._unavailable("listed", error, folder=folder) from error
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
        if self._root is not None:
            directory = self._root / prefix
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            self._synced_directories.pop(directory, None)
        return count + len(page)

    async def check(self) -> None:
        """Write, read, list and delete one small object, as `headrace doctor` does. Raises the error of the step that
        failed.
        """
        data = b"headrace checks its object store " + secrets.token_bytes(16)
        batch = f"check-{secrets.token_hex(8)}"
        key = payload_key("headrace-check", batch, hashlib.sha256(data).hexdigest())
        await self.put(key, data)
        await self.get(key)
        if await self.delete_batch("headrace-check", batch) != 1:
            raise StoreUnavailable(
                "the object store does not list an object that was just written",
                hint="check that its credentials allow listing",
                url=shown_url(self.url),
            )

    async def _read(self, key: str) -> bytes | None:
        try:
            response = await obstore.get_async(self._store, key)
            if response.meta["size"] > _OBJECT_BYTES_MAX:
                raise ObjectMissing(
                    f"the object is larger than any payload ({response.meta['size']} bytes)",
                    key=key,
                    url=shown_url(self.url),
                )
            return (await response.bytes_async()).to_bytes()
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):  # without a bucket, nothing is known about any object
                raise self._unavailable("read", error, key=key) from error
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable("read", error, key=key) from error

    async def _put_file(self, path: Path, key: str, data: bytes) -> None:
        """Write a file once: replacing a good object by an unsynced copy would lose it in a power cut.

        An existing file either has the same bytes, or was only partly synced; only then is it replaced.
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
            # After a failed sync the kernel may report the same pages as clean, so only a new write is trusted.
            if is_fresh:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            raise

    def _sync_file(self, path: Path) -> None:
        assert self._root is not None
        os.utime(path)  # a payload that is sent again counts as new, so the grace period of orphans begins again
        _sync(path)
        _sync(path.parent)
        for directory in path.relative_to(self._root).parents[:-1]:
            directory_path = self._root / directory
            if directory_path not in self._synced_directories:
                _sync(directory_path.parent)
                if len(self._synced_directories) >= _DIRECTORIES_KNOWN_MAX:
                    self._synced_directories.clear()
                self._synced_directories[directory_path] = None

    async def _delete_page(self, page: Sequence[str]) -> None:
        try:
            await obstore.delete_async(self._store, page)
        except FileNotFoundError:
            for key in page:  # a directory stops at the first missing file, and the others still have to be deleted
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
            f"can't use the directory for payloads: {_first_line(error)}", hint=_hint(error), url=str(path)
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


def _bad_url(url: str, hint: str) -> InvalidSetting:
    return InvalidSetting(f"expected the URL of an object store, got {shown_url(url)!r}", hint=hint)


def shown_url(url: str) -> str:
    """Return the URL without its secrets."""
    return re.sub(r"//[^/@]*@", "//…@", url)


def _first_line(error: Exception) -> str:
    """Return an error in one line, in the server's own words if it has any."""
    answer = _ANSWER.search(str(error))
    if answer:
        return f"the server answered {answer[1]}: {answer[2]}"
    return str(error).partition("\n")[0] or type(error).__name__


def _hint(error: Exception) -> str:
    """Return what an operator can do; obstore has the system's error number only in its text."""
    text = str(error)
    number = getattr(error, "errno", None)
    named = re.search(r"os error (\d+)", text)
    if named:
        number = int(named.group(1))
    if number in (27, 28, 122):
        return "the disk is full, or a quota is reached: free space, then try again"
    if number == 30:
        return "the file system is read-only: remount it, or choose another directory"
    if number in (1, 13) or isinstance(error, PermissionDeniedError):
        return "permission denied: check the permissions of this process's user or its credentials"
    if isinstance(error, UnauthenticatedError):
        return "the object store does not know these credentials: check them, and the clock of this machine"
    if number in (2, 20) or isinstance(error, FileNotFoundError):
        return "the directory or bucket does not exist: create it, or correct the URL"
    return "check that the object store is reachable, with `headrace doctor`"

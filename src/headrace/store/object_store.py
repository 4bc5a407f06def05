"""Objects in a directory, in memory, or in a bucket (S3, Google Cloud Storage, Azure).

When a write returns, the object survives a power cut. Buckets promise that. A directory does so only after the file and
the directories above it were synced, which obstore leaves to its caller.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from headrace.foundation.errors import InvalidSetting, StoreUnavailable
from headrace.foundation.limits import Limit, check
from headrace.store.payloads import (
    CONCURRENCY,
    ObjectTooLarge,
    PayloadStore,
    ReadObject,
    StoredObject,
    shown_url,
)

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, ClientConfig, RetryConfig, S3Config

_DIRECTORIES_KNOWN_MAX: Final = 4_096
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


def open_payloads(url: str, *, concurrency: int = CONCURRENCY.default) -> PayloadStore:
    """Open the object store at `url`: a directory, `file:///directory`, `memory://`, `s3://bucket/prefix`, `gs://` or
    `az://`.

    A directory is created if it is missing, a bucket is not. Credentials come from the usual environment variables
    (`AWS_ACCESS_KEY_ID`, …), and so do region and endpoint unless the URL has `?endpoint=…&region=…`. Failed requests
    are repeated with growing waits, bounded by `retries`, `retry_s` and `timeout_s` in the URL. Raises `InvalidSetting`
    for an unknown URL, and `StoreUnavailable` for a directory that can't be used.
    """
    check(CONCURRENCY, concurrency)
    parts = urlsplit(url)
    if parts.scheme in ("", "file"):
        if not url or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise _bad_url(url, "write a directory as a path or as file:///path")
        path = Path(unquote(parts.path) if parts.scheme else url).expanduser().absolute()
        if not parts.path.strip("/"):
            raise _bad_url(url, "name a directory for payloads, not the root of the file system")
        directory = ObjectStoreBackend(_open_directory(path), url)
        return PayloadStore(directory, url=url, shared_url=str(path), concurrency=concurrency)
    if parts.scheme == "memory":
        return PayloadStore(ObjectStoreBackend(MemoryStore(), url), url=url, concurrency=concurrency)
    if parts.scheme not in _REMOTE:
        raise _bad_url(url, "payloads are stored in a directory, memory://, s3://, gs:// or az://")
    return PayloadStore(SigningBucket(_open_remote(url), url), url=url, shared_url=url, concurrency=concurrency)


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


def is_of_one_machine(url: str) -> bool:
    """True if a URL names a directory or this process's memory, which other machines don't see."""
    return urlsplit(url).scheme in ("", "file", "memory")


class _Threads:
    """The threads of obstore. They start with its first request, and a forked child does not have them."""

    def __init__(self) -> None:
        self._pid = 0

    def check(self) -> None:
        """Raise `InvalidSetting` if the threads belong to the parent process."""
        pid = os.getpid()
        if not self._pid:
            self._pid = pid
        if self._pid != pid:
            raise InvalidSetting(
                f"the object store can't be used in process {pid}: it was forked from process {self._pid}, which had "
                "used it before",
                hint="start child processes with the method 'spawn', or before the first large payload",
            )


_THREADS: Final = _Threads()


class ObjectStoreBackend:
    """Objects in one object store of obstore. `url` is for errors."""

    def __init__(self, store: ObjectStore, url: str) -> None:
        self._store = store
        self._url = url
        self._root = store.prefix if isinstance(store, LocalStore) else None
        self._synced_directories: dict[Path, None] = {}

    @property
    def store(self) -> ObjectStore:
        """The store of obstore. Raises `InvalidSetting` in a forked child of a process that has used one: obstore's
        threads do not exist there, and a request would never end.
        """
        _THREADS.check()
        return self._store

    async def write(self, key: str, data: bytes) -> None:
        """Store an object durably."""
        try:
            if self._root is None:
                await obstore.put_async(self.store, key, data)
            else:
                await self._put_file(self._root / key, key, data)
        except (BaseError, OSError) as error:
            raise self._unavailable("written", error, key=key) from error

    async def write_stream(self, key: str, pieces: AsyncIterator[bytes]) -> None:
        """Store an object that arrives in pieces."""
        try:
            await obstore.put_async(self.store, key, pieces)
        except (BaseError, OSError) as error:
            raise self._unavailable("written", error, key=key) from error

    async def read(self, key: str, bytes_max: int) -> ReadObject | None:
        """Return an object, None if it is missing."""
        try:
            response = await obstore.get_async(self.store, key)
            if response.meta["size"] > bytes_max:
                raise ObjectTooLarge(response.meta["size"])
            data = (await response.bytes_async()).to_bytes()
            return ReadObject(data, str(response.attributes.get("Content-Type", "")))
        except FileNotFoundError as error:
            if _NO_BUCKET in str(error):  # without a bucket, nothing is known about any object
                raise self._unavailable("read", error, key=key) from error
            return None
        except (BaseError, OSError) as error:
            raise self._unavailable("read", error, key=key) from error

    async def pages(self, prefix: str, page_objects: int) -> AsyncIterator[list[StoredObject]]:
        """List the objects under whole segments, unsorted, one page at a time."""
        try:
            async for page in obstore.list(self.store, prefix=prefix or None, chunk_size=page_objects):
                yield [
                    StoredObject(entry["path"], int(entry["last_modified"].timestamp() * 1_000_000), entry["size"])
                    for entry in page
                ]
        except (BaseError, OSError) as error:
            raise self._unavailable("listed", error, prefix=prefix) from error

    async def delete_unfinished(self, _before_us: int) -> int:
        """Return 0: an object store shows only whole objects, and discards the parts of others by itself."""
        return 0

    async def delete_folder(self, prefix: str) -> None:
        """Remove an empty folder of a directory. Buckets have no folders."""
        if self._root is not None:
            directory = self._root / prefix
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            self._synced_directories.pop(directory, None)

    async def _bytes(self, key: str) -> bytes | None:
        stored = await self.read(key, sys.maxsize)
        return None if stored is None else stored.data

    async def _put_file(self, path: Path, key: str, data: bytes) -> None:
        """Write a file once: replacing a good object by an unsynced copy would lose it in a power cut.

        An existing file either has the same bytes, or was only partly synced; only then is it replaced.
        """
        is_fresh = True
        try:
            await obstore.put_async(self.store, key, data, mode="create")
        except AlreadyExistsError:
            is_fresh = await self._bytes(key) != data
            if is_fresh:
                await obstore.put_async(self.store, key, data, mode="overwrite", use_multipart=False)
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

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Missing ones are no error."""
        try:
            await obstore.delete_async(self.store, keys)
        except FileNotFoundError:
            for key in keys:  # a directory stops at the first missing file, and the others still have to be deleted
                try:
                    await obstore.delete_async(self.store, key)
                except FileNotFoundError:
                    continue
                except (BaseError, OSError) as error:
                    raise self._unavailable("removed", error, key=key) from error
        except (BaseError, OSError) as error:
            raise self._unavailable("removed", error, objects=len(keys)) from error

    def _unavailable(self, verb: str, error: Exception, **ids: object) -> StoreUnavailable:
        return StoreUnavailable(
            f"the payload could not be {verb}: {_first_line(error)}", hint=_hint(error), url=shown_url(self._url), **ids
        )


class SigningBucket(ObjectStoreBackend):
    """Objects in a bucket, whose URLs can be signed."""

    async def signed_url(self, method: str, key: str, seconds: int) -> str:
        """Return a URL to `PUT` or `GET` an object."""
        store: Any = self.store
        url: str = await obstore.sign_async(store, "PUT" if method == "PUT" else "GET", key, timedelta(seconds=seconds))
        return url


def _open_directory(path: Path) -> LocalStore:
    try:
        missing = [directory for directory in (path, *path.parents) if not directory.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)  # it holds payloads; one that exists keeps its mode
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


def _bad_url(url: str, hint: str) -> InvalidSetting:
    return InvalidSetting(f"expected the URL of an object store, got {shown_url(url)!r}", hint=hint)


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

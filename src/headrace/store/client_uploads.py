"""Payloads that a client uploads before it sends the item that names them ("packets" in trigger.dev's API).

Rule 1: the client chooses the path of a packet in its environment, so the path says nothing about the bytes. When an
item names it, its bytes become a payload of the item's batch. A packet that no item names for long is deleted. Rule 2:
where the object store can sign URLs, a client uploads to it directly. Otherwise it uploads through the server, and the
object begins with a line that holds the content type.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from headrace.core.pack import JSON, KINDS, MSGPACK, REFERENCE, SUPER_JSON, TEXT
from headrace.foundation.errors import InvalidInput, ObjectMissing
from headrace.store.payloads import ObjectTooLarge, PayloadStore, SigningBackend, environment_segment

FOLDER: Final = "_packets"
"""Folder beside those of the environments; `environment_segment` never returns it."""
PATH_CHARS_MAX: Final = 1_024
SIGNED_S: Final = 300
TYPE_BYTES_MAX: Final = 128


def check_path(path: str) -> str:
    """Return `path` if it names a packet and nothing else, however it is decoded. Raises `InvalidInput`."""
    segments = path.split("/")
    if (
        not path
        or len(path) > PATH_CHARS_MAX
        or not path.isascii()
        or not path.isprintable()
        or any(forbidden in path for forbidden in ("\\", "%", "?", "#", ":"))
        or any(segment in ("", ".", "..") or segment.startswith("~") for segment in segments)
    ):
        raise InvalidInput(
            "Invalid packet storage path",
            hint="expected segments of letters and digits, joined by slashes, as the server returned it",
        )
    return path


class ClientUploads:
    """Uploads of all environments, in the object store of their payloads."""

    def __init__(self, payloads: PayloadStore) -> None:
        self._objects = payloads.objects
        self.can_sign = isinstance(payloads.objects, SigningBackend)

    def key(self, environment: str, path: str) -> str:
        """Return the key of a packet's object."""
        return f"{FOLDER}/{environment_segment(environment)}/{check_path(path)}"

    async def signed_url(self, method: str, environment: str, path: str) -> str:
        """Return a URL of the object store, valid for five minutes."""
        assert isinstance(self._objects, SigningBackend)
        return await self._objects.signed_url(method, self.key(environment, path), SIGNED_S)

    async def put(
        self, environment: str, path: str, content_type: str, pieces: AsyncIterator[bytes], *, bytes_max: int
    ) -> None:
        """Store a packet that is uploaded through the server. Raises `InvalidInput` if it is too large."""

        async def body() -> AsyncIterator[bytes]:
            count = 0
            yield content_type.encode("ascii", "replace")[:TYPE_BYTES_MAX].replace(b"\n", b" ") + b"\n"
            async for piece in pieces:
                count += len(piece)
                if count > bytes_max:
                    raise InvalidInput(
                        f"expected a packet of at most {bytes_max} bytes, got a larger one",
                        hint="the setting packet_bytes_max is this bound",
                    )
                yield piece

        await self._objects.write_stream(self.key(environment, path), body())

    async def get(self, environment: str, path: str, *, bytes_max: int) -> tuple[bytes, str]:
        """Return a packet and its content type. Raises `ObjectMissing`, `InvalidInput`, `StoreUnavailable`."""
        try:
            stored = await self._objects.read(self.key(environment, path), bytes_max + TYPE_BYTES_MAX + 1)
        except ObjectTooLarge as error:
            raise InvalidInput(f"expected a packet of at most {bytes_max} bytes, got {error.bytes_count}") from None
        if stored is None:
            raise ObjectMissing(f"no packet was uploaded at {path!r}", hint="upload it, then send the item again")
        if self.can_sign:
            return stored.data, stored.content_type or "application/json"
        head, _, data = stored.data.partition(b"\n")
        return data, head.decode("ascii")

    async def fetched(self, environment: str, path: bytes, *, bytes_max: int) -> tuple[bytes, int]:
        """Return a packet as a payload: its bytes and their kind."""
        name = path.decode("utf-8", "replace")
        data, content_type = await self.get(environment, name, bytes_max=bytes_max)
        kind = KINDS.get(content_type.partition(";")[0].strip().lower(), JSON)
        if kind in (REFERENCE, MSGPACK):
            raise InvalidInput(f"a packet can't have the content type {content_type}")
        _check_readable(data, kind)
        return data, kind


def _check_readable(data: bytes, kind: int) -> None:
    import msgspec

    try:
        if kind == TEXT:
            data.decode()
        elif kind in (JSON, SUPER_JSON):
            msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the packet can't be decoded as its content type: {error}") from None

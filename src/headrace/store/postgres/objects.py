"""`DatabaseObjects`: payloads in the database itself, for stores without an object store.

An object is a row and its pieces of `PIECE_BYTES`, each written by a statement of its own, so neither the server nor
this process holds a second copy of it. The row is finished in the end; until then no process reads it, and upkeep
deletes it if its writer crashed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from headrace.foundation.errors import HeadraceError, InvalidInput, StoreUnavailable
from headrace.foundation.limits import MIB
from headrace.store.payloads import ObjectTooLarge, ReadObject, StoredObject
from headrace.store.postgres.store import PostgresStore
from headrace.store.transactions.sql_script import Script, fetch, fetch_column, fetch_one

PIECE_BYTES: Final = MIB
PIECES_A_READ: Final = 4
CONCURRENCY: Final = 4
"""Concurrent requests of one process: half of the connections of its store."""
_LAST_KEY: Final = "\U0010ffff"
"""A text behind every key, in the order of bytes."""


class DatabaseObjects:
    """Objects in the schema of a `PostgresStore`, up to `bytes_max` each."""

    def __init__(self, store: PostgresStore, *, bytes_max: int) -> None:
        self._store = store
        self._bytes_max = bytes_max

    async def write(self, key: str, data: bytes) -> None:
        """Store an object durably. One that is stored already only counts as new again."""
        self._check_size(key, len(data))
        if await self._store.alone("renew_object", key=key, bytes_count=len(data)):
            return
        view = memoryview(data)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(data), PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])

        await self._write_pieces(key, pieces())

    async def write_stream(self, key: str, pieces: AsyncIterator[bytes]) -> None:
        """Store an object that arrives in pieces of any size."""

        async def even() -> AsyncIterator[bytes]:
            buffer = bytearray()
            async for piece in pieces:
                buffer += piece
                while len(buffer) >= PIECE_BYTES:
                    yield bytes(buffer[:PIECE_BYTES])
                    del buffer[:PIECE_BYTES]
            if buffer:
                yield bytes(buffer)

        await self._write_pieces(key, even())

    async def _write_pieces(self, key: str, pieces: AsyncIterator[bytes]) -> None:
        ((object_id,),) = await self._store.alone("begin_object", key=key)
        bytes_count = piece_no = 0
        try:
            async for piece in pieces:
                bytes_count += len(piece)
                self._check_size(key, bytes_count)
                await self._add(object_id, piece_no, piece)
                piece_no += 1
            await self._store.write(lambda: _finish(object_id, key, bytes_count))
        except BaseException:
            with suppress(HeadraceError):  # upkeep deletes it later
                await self._store.alone("drop_object", object_id=object_id)
            raise

    async def _add(self, object_id: int, piece_no: int, data: bytes) -> None:
        if not await self._store.alone("add_piece", object_id=object_id, piece_no=piece_no, data=data):
            raise _taken_as_old()

    async def read(self, key: str, bytes_max: int) -> ReadObject | None:
        """Return an object, None if it is missing; its pieces are read on one snapshot."""
        return await self._store.read(lambda: _read(key, bytes_max))

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Missing ones are no error."""
        await self._store.alone("delete_stored_objects", keys=list(keys))

    async def pages(self, prefix: str, page_objects: int) -> AsyncIterator[list[StoredObject]]:
        """List the objects under whole segments, in the order of their keys."""
        after_key, before_key = (f"{prefix}/", f"{prefix}0") if prefix else ("", _LAST_KEY)  # 0 follows the slash
        while True:
            query = partial(fetch, "list_objects", after_key=after_key, before_key=before_key, rows_max=page_objects)
            rows = await self._store.read(query)
            if rows:
                yield [StoredObject(*row) for row in rows]
            if len(rows) < page_objects:
                return
            after_key = rows[-1][0]

    async def delete_unfinished(self, before_us: int) -> int:
        """Delete objects that a crashed writer began before a time. Returns how many."""
        return len(await self._store.alone("delete_unfinished_objects", before_us=before_us))

    async def delete_folder(self, _prefix: str) -> None:
        """Do nothing: a database has no folders."""

    def _check_size(self, key: str, bytes_count: int) -> None:
        if bytes_count > self._bytes_max:
            raise InvalidInput(
                f"expected at most {self._bytes_max} bytes of a payload in the database, got {bytes_count} or more",
                hint="configure an object store (objects = s3://bucket/prefix), or raise database_object_bytes_max",
                key=key,
            )


def _taken_as_old() -> StoreUnavailable:
    return StoreUnavailable(
        "the object took too long to write: upkeep deleted it as one of a crashed writer", hint="raise orphan_grace_ms"
    )


def _finish(object_id: int, key: str, bytes_count: int) -> Script[None]:
    yield from fetch("lock_object", key=key)
    yield from fetch("delete_object", key=key)
    if not (yield from fetch("finish_object", object_id=object_id, bytes_count=bytes_count)):
        raise _taken_as_old()


def _read(key: str, bytes_max: int) -> Script[ReadObject | None]:
    row = yield from fetch_one("find_object", key=key)
    if row is None:
        return None
    object_id, bytes_count = row
    if bytes_count > bytes_max:
        raise ObjectTooLarge(bytes_count)
    pieces: list[bytes] = []
    for piece_no in range(0, -(-bytes_count // PIECE_BYTES), PIECES_A_READ):
        pieces += yield from fetch_column(
            "next_pieces", object_id=object_id, piece_no=piece_no, pieces_max=PIECES_A_READ
        )
    return ReadObject(b"".join(pieces))

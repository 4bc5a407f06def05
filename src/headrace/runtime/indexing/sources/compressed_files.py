"""Readers of compressed files that detect a truncated end."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final

ZSTD_STEP_BYTES: Final = 2 * 1024
"""Compressed bytes read at a time: even the most repetitive file then expands to some tens of MiB at most."""


class Truncated(Exception):
    """A compressed file ends inside a frame."""


class Zstandard:
    """Reader of consecutive Zstandard frames that fails if the last one is truncated.

    The library's own stream reader takes a truncated frame for the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._new: Callable[[], zstandard.ZstdDecompressionObj] = zstandard.ZstdDecompressor(
            max_window_size=1 << 31
        ).decompressobj
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._fault = zstandard.ZstdError
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """Return about `size` bytes, none at the end. Raises `Truncated`, and `ValueError` for data that is not
        Zstandard.
        """
        pieces: list[bytes] = []
        count = 0
        while count < size:
            data = self._rest or self._file.read(ZSTD_STEP_BYTES)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise Truncated
                break
            if self._frame is None:
                self._frame = self._new()
            try:
                piece = self._frame.decompress(data)
            except self._fault as error:
                raise ValueError(str(error)) from error
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
            pieces.append(piece)
            count += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Release the decompressor."""
        self._frame = None

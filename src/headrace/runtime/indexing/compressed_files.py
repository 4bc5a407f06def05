"""Compressed files whose end can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final

ZSTD_STEP_BYTES: Final = 2 * 1024
"""Compressed bytes taken at once: even the most repetitive archive then unfolds by some tens of MiB at most."""


class Truncated(Exception):
    """An archive that ends inside a frame."""


class Zstandard:
    """Frames of Zstandard, one after the other, with an error where the last one is cut off.

    The library's own stream reader takes a cut frame for the end.
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
        """About so many bytes, and none at the end. Raises `Truncated`, and `ValueError` for what is no archive."""
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
        """Let go of it."""
        self._frame = None

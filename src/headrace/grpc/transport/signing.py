"""Signatures of calls: `hex(HMAC-SHA256(secret, path + ":" + message))` in the header `sentry-signature`.

The message is what its sender serialized, without gRPC's frame and before compression. Any of the secrets verifies, so
that they can be changed one after the other; we sign with the first.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

HEADER: Final = "sentry-signature"
_HEX_CHARS: Final = 64


class Secrets:
    """What calls are signed with; none at all signs nothing and verifies nothing."""

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._keys = tuple(secret.encode() for secret in secrets)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Secrets({len(self._keys)} of them)"

    def sign(self, path: str, message: bytes) -> str:
        """The signature of a call; empty when there is no secret."""
        return _signature(self._keys[0], path, message) if self._keys else ""

    def verifies(self, path: str, message: bytes, signature: str) -> bool:
        """Whether a call was signed with one of them; as slow for a wrong signature as for a right one."""
        if len(signature) != _HEX_CHARS:
            return False
        given = signature.encode("utf-8", "replace")
        found = [hmac.compare_digest(_signature(key, path, message).encode(), given) for key in self._keys]
        return any(found)


def _signature(key: bytes, path: str, message: bytes) -> str:
    # The message may be large: it is hashed where it lies.
    digest = hmac.new(key, path.encode("utf-8", "replace") + b":", hashlib.sha256)
    digest.update(message)
    return digest.hexdigest()

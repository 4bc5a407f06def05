"""Call signatures: `hex(HMAC-SHA256(secret, path + ":" + message))` in the header `sentry-signature`.

The message is signed as its sender serialized it, without the gRPC prefix and before compression. Calls are signed with
the first secret and verified with any of them, so that secrets can be rotated one after the other.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

HEADER: Final = "sentry-signature"
_HEX_CHARS: Final = 64


class Secrets:
    """Secrets for signing calls. Without any, nothing is signed and no signature is valid."""

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._keys = tuple(secret.encode() for secret in secrets)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Secrets(<{len(self._keys)} keys>)"

    def sign(self, path: str, message: bytes) -> str:
        """Sign a call. Returns an empty string if there is no secret."""
        return _signature(self._keys[0], path, message) if self._keys else ""

    def verifies(self, path: str, message: bytes, signature: str) -> bool:
        """True if the call was signed with one of the secrets. Takes equally long for wrong and right signatures."""
        if len(signature) != _HEX_CHARS:
            return False
        given = signature.encode("utf-8", "replace")
        matches = [hmac.compare_digest(_signature(key, path, message).encode(), given) for key in self._keys]
        return any(matches)


def _signature(key: bytes, path: str, message: bytes) -> str:
    # Two updates instead of a concatenation: the message may be large and is not copied.
    digest = hmac.new(key, path.encode("utf-8", "replace") + b":", hashlib.sha256)
    digest.update(message)
    return digest.hexdigest()

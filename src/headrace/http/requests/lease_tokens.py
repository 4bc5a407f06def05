"""Lease tokens: signed names of leases, so that no client can settle a lease that it was not given."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from headrace.http.requests.service import Caller, Service

SIGNATURE_BYTES: Final = 16


class LeaseTokens:
    """Signs and verifies lease tokens with the signing keys of environments."""

    def __init__(self, service: Service) -> None:
        self._doorkeeper = service.authenticator

    async def signing_key(self, context: Caller) -> bytes:
        """Return the key that signs the tokens of the client's environment."""
        return await self._doorkeeper.signing_key(context.environment)

    @staticmethod
    def sign(key: bytes, span_id: int, token: int) -> bytes:
        """Sign a lease."""
        return hmac.new(key, b"lease %d %d" % (span_id, token), hashlib.sha256).digest()[:SIGNATURE_BYTES]

    @classmethod
    def verify(cls, key: bytes, span_id: int, token: int, signature: bytes) -> bool:
        """True if the signature is that of this lease."""
        return hmac.compare_digest(cls.sign(key, span_id, token), signature)

    @classmethod
    def encode(cls, key: bytes, span_id: int, token: int) -> str:
        """Encode a lease token as text: span id, fencing token and signature."""
        return f"lease_{span_id}_{token}_{cls.sign(key, span_id, token).hex()}"

    @classmethod
    def decode(cls, key: bytes, lease_token: str) -> tuple[int, int] | None:
        """Decode a lease token to `(span id, fencing token)`; None if it was not issued by this server."""
        words = lease_token.split("_")
        if len(words) != 4 or words[0] != "lease" or len(lease_token) > 128:
            return None
        try:
            span_id, token, signature = int(words[1]), int(words[2]), bytes.fromhex(words[3])
        except ValueError:
            return None
        if not 0 <= span_id < 2**63 or not 0 <= token < 2**63:
            return None
        return (span_id, token) if cls.verify(key, span_id, token, signature) else None

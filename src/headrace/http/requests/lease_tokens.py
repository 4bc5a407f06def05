"""Leases as the outside names them: signed, so that no tenant can settle what it was not given."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from headrace.http.requests.service import Caller, Service

TICKET_BYTES: Final = 16


class Tickets:
    """Signs and checks tickets with the signing keys of environments."""

    def __init__(self, service: Service) -> None:
        self._doorkeeper = service.doorkeeper

    async def key(self, call: Caller) -> bytes:
        """What this environment's tickets are signed with."""
        return await self._doorkeeper.signing_key(call.environment)

    @staticmethod
    def of(key: bytes, span_id: int, token: int) -> bytes:
        """The ticket of a lease."""
        return hmac.new(key, b"lease %d %d" % (span_id, token), hashlib.sha256).digest()[:TICKET_BYTES]

    @classmethod
    def is_true(cls, key: bytes, span_id: int, token: int, ticket: bytes) -> bool:
        """Whether a lease was given to whoever shows this."""
        return hmac.compare_digest(cls.of(key, span_id, token), ticket)

    @classmethod
    def name(cls, key: bytes, span_id: int, token: int) -> str:
        """A lease as text: its numbers and its ticket."""
        return f"lease_{span_id}_{token}_{cls.of(key, span_id, token).hex()}"

    @classmethod
    def parsed(cls, key: bytes, name: str) -> tuple[int, int] | None:
        """The `(span id, token)` of a lease's name; None when it was not given out here."""
        words = name.split("_")
        if len(words) != 4 or words[0] != "lease" or len(name) > 128:
            return None
        try:
            span_id, token, ticket = int(words[1]), int(words[2]), bytes.fromhex(words[3])
        except ValueError:
            return None
        if not 0 <= span_id < 2**63 or not 0 <= token < 2**63:
            return None
        return (span_id, token) if cls.is_true(key, span_id, token, ticket) else None

"""Who asks, and what they may do.

A key belongs to an environment and has scopes; only its digest is kept. A public token is signed by the server, names
one batch, and expires. Neither ever reaches a log.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import jwt

from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import new_batch_id
from headrace.http.requests.error_responses import Forbidden, Unauthorized
from headrace.runtime.clock import Clock
from headrace.runtime.engine import Engine
from headrace.store.protocol import ApiKey

SCOPES: Final[Mapping[str, str]] = {
    "*": "All of these.",
    "batches:write": "Create batches, stream and seal them, cancel and redrive them, upload payloads.",
    "batches:read": "Read batches and their results.",
    "runs:write": "Cancel, replay and reschedule runs, and start single ones.",
    "runs:read": "Read runs.",
    "work": "Run tasks: sessions, claims, settlements.",
}
KEY_PREFIX: Final = "tr_headrace_"
TOKEN_S: Final = 3_600
TOKEN_CHARS_MAX: Final = 8_192
CREDENTIAL_CHARS_MAX: Final = 8_192
SEEN_KEYS_MAX: Final = 10_000
SEEN_S: Final = 2
"""How long a key that was looked up is believed: a revoked one is let in for no longer."""

ISSUER: Final = "https://id.trigger.dev"
AUDIENCE: Final = "https://api.trigger.dev"


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever asks. `batches`: of a public token, what it may do with which batch."""

    environment: str
    scopes: frozenset[str]
    name: str = ""
    batches: frozenset[str] = frozenset()

    def may(self, scope: str, batch_id: str = "") -> bool:
        """Whether a scope covers this, or a token names this batch for it."""
        if "*" in self.scopes or scope in self.scopes:
            return True
        verb = "write" if scope == "batches:write" else "read" if scope in ("batches:read", "runs:read") else ""
        return bool(batch_id and verb) and f"{verb}:batch:{batch_id}" in self.batches

    def check(self, scope: str, batch_id: str = "") -> None:
        """Raises `Forbidden`."""
        if not self.may(scope, batch_id):
            raise Forbidden(f"this key may not do that: it takes {scope}", hint="`headrace key create --scopes …`")


def new_key(environment: str, scopes: tuple[str, ...], name: str, now_us: int) -> tuple[str, ApiKey]:
    """A fresh key, to be shown once, and what is kept of it. Raises `InvalidInput` for a scope nobody knows."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidInput(
            f"no scope is called {', '.join(unknown)}" if unknown else "a key has at least one scope",
            hint=f"one of {', '.join(SCOPES)}",
        )
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    kept = ApiKey(
        id=f"key_{new_batch_id(now_us).removeprefix('batch_')}",
        environment=environment,
        digest=digest_of(secret),
        scopes=scopes,
        name=name,
    )
    return secret, kept


def digest_of(secret: str) -> str:
    """What is kept of a key. Keys are random and long, so one round of a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Doorkeeper:
    """Lets in who has a key, a token, or (`is_open`) anybody."""

    def __init__(self, engine: Engine, *, static_key: str | None, is_open: bool) -> None:
        self._store = engine.store
        self._clock: Clock = engine.clock
        self._environment = engine.environment
        self._static_digest = None if static_key is None else digest_of(static_key)
        self._is_open = is_open
        self._seen: OrderedDict[str, tuple[int, ApiKey | None]] = OrderedDict()
        self._signing_keys: dict[str, bytes] = {}

    async def admit(self, authorization: str | None) -> Principal:
        """Who shows this header. Raises `Unauthorized`."""
        if not authorization:
            if self._is_open:
                return Principal(self._environment, frozenset("*"), "anybody")
            raise Unauthorized("no Authorization header", hint="send `Authorization: Bearer <key>`")
        scheme, _, credential = authorization.partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential or len(credential) > CREDENTIAL_CHARS_MAX:
            raise Unauthorized("Invalid API Key", hint="send `Authorization: Bearer <key>`")
        digest = digest_of(credential)
        if self._static_digest is not None and hmac.compare_digest(digest, self._static_digest):
            return Principal(self._environment, frozenset("*"), "static")
        if credential.count(".") == 2:
            return await self._by_token(credential)
        key = await self._known(digest)
        if key is None or key.revoked_us or not hmac.compare_digest(key.digest, digest):
            if self._is_open:
                return Principal(self._environment, frozenset("*"), "anybody")
            raise Unauthorized("Invalid API Key", hint="`headrace key create` makes one")
        return Principal(key.environment, frozenset(key.scopes), key.id)

    async def _known(self, digest: str) -> ApiKey | None:
        now_us = self._clock.now_us()
        found = self._seen.get(digest)
        if found is not None and found[0] > now_us:
            return found[1]
        key = await self._store.find_key(digest)
        self._seen[digest] = (now_us + SEEN_S * 1_000_000, key)
        self._seen.move_to_end(digest)
        while len(self._seen) > SEEN_KEYS_MAX:
            self._seen.popitem(last=False)
        return key

    # -- public tokens

    async def token(self, environment: str, scopes: list[str]) -> tuple[str, str]:
        """A public token of these scopes, and its claims as clients that sign for themselves want them."""
        now_s = self._clock.now_us() // 1_000_000
        claims = {
            "sub": environment,
            "pub": True,
            "scopes": scopes,
            "iss": ISSUER,
            "aud": AUDIENCE,
            "iat": now_s,
            "exp": now_s + TOKEN_S,
        }
        signed = jwt.encode(claims, await self.signing_key(environment), algorithm="HS256")
        return signed, json.dumps({"sub": environment, "pub": True}, separators=(",", ":"))

    async def _by_token(self, token: str) -> Principal:
        try:
            named = jwt.decode(token, options={"verify_signature": False})
            environment = named.get("sub")
            if not isinstance(environment, str) or not 0 < len(environment) <= 200 or "\0" in environment:
                raise Unauthorized("Invalid API Key")
            claims = jwt.decode(
                token,
                await self.signing_key(environment, make=False),
                algorithms=["HS256"],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={"require": ["exp", "sub"], "verify_exp": False, "verify_iat": False},
            )
        except (jwt.PyJWTError, ValueError, RecursionError, UnicodeError):
            raise Unauthorized("Invalid API Key", hint="the token is not one of this server's") from None
        expires_s, scopes = claims.get("exp"), claims.get("scopes")
        if not isinstance(expires_s, int) or expires_s * 1_000_000 <= self._clock.now_us():
            raise Unauthorized("Invalid API Key", hint="the token has expired")
        if claims.get("pub") is not True or not isinstance(scopes, list):
            raise Unauthorized("Invalid API Key", hint="the token has no scopes")
        return Principal(environment, frozenset(), "token", frozenset(str(scope) for scope in scopes))

    async def signing_key(self, environment: str, *, make: bool = True) -> bytes:
        """What an environment signs with; a token of one that signed nothing yet is checked against chance."""
        known = self._signing_keys.get(environment)
        if known is not None:
            return known
        offered = secrets.token_bytes(32)
        if not make and not await self._store.keys(environment) and environment != self._environment:
            return offered
        key = self._signing_keys[environment] = await self._store.signing_key(environment, offered)
        return key

"""Authentication and authorization.

An API key belongs to an environment and has scopes; only its digest is stored. A public token is signed by the server,
names one batch and expires. Neither is ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    "*": "All scopes.",
    "batches:write": "Create batches, stream and seal them, cancel and redrive them, upload payloads.",
    "batches:read": "Read batches and their results.",
    "runs:write": "Enqueue single runs; cancel, replay and reschedule runs.",
    "runs:read": "Read runs.",
    "work": "Run tasks: sessions, claims, settlements.",
    "metrics:read": "Read the server's metrics.",
}
KEY_PREFIX: Final = "tr_headrace_"
TOKEN_S: Final = 3_600
TOKEN_CHARS_MAX: Final = 8_192
CREDENTIAL_CHARS_MAX: Final = 8_192
CACHED_KEYS_MAX: Final = 10_000
KEY_CACHE_S: Final = 2
"""Seconds for which a key lookup is cached: a revoked key is accepted no longer than that."""

ANONYMOUS: Final = "anonymous"
"""Name of a client without a key, on a server without authentication."""

ISSUER: Final = "https://id.trigger.dev"
AUDIENCE: Final = "https://api.trigger.dev"


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated client. `batches`: the per-batch permissions of a public token."""

    environment: str
    scopes: frozenset[str]
    name: str = ""
    batches: frozenset[str] = frozenset()

    def may(self, scope: str, batch_id: str = "") -> bool:
        """True if a scope, or a token's permission for this batch, allows the operation."""
        if "*" in self.scopes or scope in self.scopes:
            return True
        verb = "write" if scope == "batches:write" else "read" if scope in ("batches:read", "runs:read") else ""
        return bool(batch_id and verb) and f"{verb}:batch:{batch_id}" in self.batches

    def check_any(self, scopes: Sequence[str], batch_id: str = "") -> None:
        """Raise `Forbidden` unless one of the scopes is allowed."""
        if not any(self.may(scope, batch_id) for scope in scopes):
            self.check(scopes[0], batch_id)

    def check(self, scope: str, batch_id: str = "") -> None:
        """Raise `Forbidden` unless the operation is allowed."""
        if not self.may(scope, batch_id):
            raise Forbidden(
                f"the API key lacks the scope {scope!r}",
                hint=f"create a key with it: headrace key create --scopes {scope}",
            )


def new_key(environment: str, scopes: tuple[str, ...], name: str, now_us: int) -> tuple[str, ApiKey]:
    """Create an API key. Returns the secret, to be shown once, and what is stored. Raises `InvalidInput`."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidInput(
            f"unknown scope {', '.join(map(repr, unknown))}" if unknown else "expected at least one scope, got none",
            hint=f"expected some of {', '.join(SCOPES)}",
        )
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    stored = ApiKey(
        id=f"key_{new_batch_id(now_us).removeprefix('batch_')}",
        environment=environment,
        digest=digest_of(secret),
        scopes=scopes,
        name=name,
    )
    return secret, stored


def digest_of(secret: str) -> str:
    """Hash a key for storage. Keys are long and random, so one round of a plain hash is enough."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _credential_of(authorization: str) -> str:
    scheme, _, credential = authorization.partition(" ")
    credential = credential.strip()
    if scheme.lower() != "bearer" or not credential or len(credential) > CREDENTIAL_CHARS_MAX:
        raise Unauthorized("Invalid API Key", hint="send `Authorization: Bearer <key>`")
    return credential


class Authenticator:
    """Authenticates requests by API key or public token. With `is_open` any client is accepted."""

    def __init__(self, engine: Engine, *, static_key: str | None, is_open: bool) -> None:
        self._store = engine.administration
        self._clock: Clock = engine.clock
        self._environment = engine.environment
        self._static_digest = None if static_key is None else digest_of(static_key)
        self.is_open = is_open
        self._a_key_exists = static_key is not None
        self._a_key_exists_until_us = 0
        self._key_cache: OrderedDict[str, tuple[int, ApiKey | None]] = OrderedDict()
        self._signing_keys: OrderedDict[str, bytes] = OrderedDict()

    async def authenticate(self, authorization: str | None) -> Principal:
        """Authenticate an Authorization header. Raises `Unauthorized`."""
        principal = self.authenticate_nowait(authorization)
        if principal is not None:
            return principal
        assert authorization is not None
        credential = _credential_of(authorization)
        if credential.count(".") == 2:
            return await self._verify_token(credential)
        digest = digest_of(credential)
        return self._principal_of(digest, await self._find_key(digest))

    def authenticate_nowait(self, authorization: str | None) -> Principal | None:
        """Authenticate by the keys that are cached; None if only `authenticate` can tell. Raises `Unauthorized`."""
        if not authorization:
            if self.is_open:
                return Principal(self._environment, frozenset("*"), ANONYMOUS)
            raise Unauthorized("expected an Authorization header, got none", hint="send `Authorization: Bearer <key>`")
        credential = _credential_of(authorization)
        digest = digest_of(credential)
        if self._static_digest is not None and hmac.compare_digest(digest, self._static_digest):
            return Principal(self._environment, frozenset("*"), "static")
        cached = self._key_cache.get(digest)
        if cached is None or cached[0] <= self._clock.now_us():
            return None
        return self._principal_of(digest, cached[1])

    def _principal_of(self, digest: str, key: ApiKey | None) -> Principal:
        if key is None or key.revoked_us or not hmac.compare_digest(key.digest, digest):
            if self.is_open:
                return Principal(self._environment, frozenset("*"), ANONYMOUS)
            raise Unauthorized("Invalid API Key", hint="create one with `headrace key create`")
        return Principal(key.environment, frozenset(key.scopes), key.id)

    async def a_key_exists(self) -> bool:
        """True if the server has a key, or its store has one of any environment, also a revoked one."""
        exists = self.a_key_exists_nowait()
        if exists is None:
            now_us = self._clock.now_us()
            exists = self._a_key_exists = await self._store.has_keys()
            self._a_key_exists_until_us = now_us + KEY_CACHE_S * 1_000_000
        return exists

    def a_key_exists_nowait(self) -> bool | None:
        """Return the same as `a_key_exists`, as it was some seconds ago at most; None if that is not known."""
        if self._a_key_exists:
            return True
        return None if self._a_key_exists_until_us <= self._clock.now_us() else False

    async def _find_key(self, digest: str) -> ApiKey | None:
        now_us = self._clock.now_us()
        key = await self._store.find_key(digest)
        self._key_cache[digest] = (now_us + KEY_CACHE_S * 1_000_000, key)
        self._key_cache.move_to_end(digest)
        while len(self._key_cache) > CACHED_KEYS_MAX:
            self._key_cache.popitem(last=False)
        return key

    # -- public tokens

    async def issue_token(self, environment: str, scopes: list[str]) -> tuple[str, str]:
        """Issue a public token, and its claims for clients that sign tokens themselves."""
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

    async def _verify_token(self, token: str) -> Principal:
        try:
            unverified = jwt.decode(token, options={"verify_signature": False})
            environment = unverified.get("sub")
            if not isinstance(environment, str) or not 0 < len(environment) <= 200 or "\0" in environment:
                raise Unauthorized("Invalid API Key")
            claims = jwt.decode(
                token,
                await self.verifying_key(environment),
                algorithms=["HS256"],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={"require": ["exp", "sub"], "verify_exp": False, "verify_iat": False},
            )
        except (jwt.PyJWTError, ValueError, RecursionError, UnicodeError):
            raise Unauthorized("Invalid API Key", hint="the token was not issued by this server") from None
        expires_s, scopes = claims.get("exp"), claims.get("scopes")
        if not isinstance(expires_s, int) or expires_s * 1_000_000 <= self._clock.now_us():
            raise Unauthorized("Invalid API Key", hint="the token has expired")
        if claims.get("pub") is not True or not isinstance(scopes, list):
            raise Unauthorized("Invalid API Key", hint="the token has no scopes")
        return Principal(environment, frozenset(), "token", frozenset(str(scope) for scope in scopes))

    async def signing_key(self, environment: str) -> bytes:
        """Return the signing key of an environment that a request was authenticated for; it is made at first."""
        signing_key = await self._cached_key(environment)
        if signing_key is None:
            signing_key = await self._store.signing_key(environment, secrets.token_bytes(32))
            self._remember_key(environment, signing_key)
        return signing_key

    async def verifying_key(self, environment: str) -> bytes:
        """Return the signing key of an environment that a client names, and write nothing.

        An environment that never signed anything gets a random key, so that nothing verifies.
        """
        signing_key = await self._cached_key(environment)
        return secrets.token_bytes(32) if signing_key is None else signing_key

    async def _cached_key(self, environment: str) -> bytes | None:
        signing_key = self._signing_keys.get(environment)
        if signing_key is None:
            signing_key = await self._store.find_signing_key(environment)
            if signing_key is not None:
                self._remember_key(environment, signing_key)
        return signing_key

    def _remember_key(self, environment: str, signing_key: bytes) -> None:
        self._signing_keys[environment] = signing_key
        while len(self._signing_keys) > CACHED_KEYS_MAX:
            self._signing_keys.popitem(last=False)

"""Authentication of gRPC calls: by signature, or by an API key as over HTTP."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from headrace.foundation.access import Access
from headrace.grpc.transport.gate import AUTHORIZATION, unauthenticated
from headrace.grpc.transport.service_methods import CallContext
from headrace.http.requests.auth import ANONYMOUS, Principal
from headrace.http.requests.error_responses import Unauthorized
from headrace.http.requests.service import Service


class CallGate:
    """Admits calls that are signed with a secret of the server or carry an API key, and sets their callers.

    Methods that need a key only once one exists are open on a server without any key and secret: its other settings
    see to it that only this machine reaches them.
    """

    def __init__(self, service: Service, *, has_secrets: bool) -> None:
        self._service = service
        self._authenticator = service.authenticator
        self._has_secrets = has_secrets
        self._signed = {scope: service.signed_caller(scope) for scope in ("work",)}

    @property
    def is_open(self) -> bool:
        """True if authentication is disabled, so that messages without a credential may have their full size."""
        return self._authenticator.is_open

    def admit(self, access: Access, call: CallContext) -> Coroutine[Any, Any, None] | None:
        """Admit a call. Returns a coroutine if its key, or the existence of keys, must be looked up.

        Raises `GrpcError`, `Unauthorized` or `Forbidden`, also in the coroutine.
        """
        if access.is_open:
            return None
        if call.is_signed:
            call.caller = self._signed[access.scopes[0]]
            return None
        authorization = call.metadata.get(AUTHORIZATION)
        if authorization is None and access.credential == "key_once_one_exists":
            return self._admit_keyless()
        principal = self._authenticator.authenticate_nowait(authorization)
        if principal is None:
            return self._look_up(access, call, authorization)
        self._check(access, call, principal)
        return None

    def _admit_keyless(self) -> Coroutine[Any, Any, None] | None:
        if self._has_secrets:
            raise unauthenticated()
        if self._authenticator.is_open:
            return None
        exists = self._authenticator.a_key_exists_nowait()
        if exists is None:
            return self._admit_unless_a_key_exists()
        _refuse_keyless(exists=exists)
        return None

    async def _admit_unless_a_key_exists(self) -> None:
        _refuse_keyless(exists=await self._authenticator.a_key_exists())

    async def _look_up(self, access: Access, call: CallContext, authorization: str | None) -> None:
        self._check(access, call, await self._authenticator.authenticate(authorization))

    def _check(self, access: Access, call: CallContext, principal: Principal) -> None:
        if access.is_of_server:
            if principal.name == ANONYMOUS and self._has_secrets:
                raise unauthenticated()
            self._service.check_is_of_server(principal)
        principal.check_any(access.scopes)
        if not access.is_of_server:  # the others act in the server's environment and know no callers
            call.caller = self._service.caller(principal)


def _refuse_keyless(*, exists: bool) -> None:
    if exists:
        raise Unauthorized(
            "expected an API key or a signed call, got neither",
            hint="send the metadata `authorization: Bearer <key>` with a key of the scope work, or set "
            "HEADRACE_GRPC_SECRETS here and in the workers",
        )

"""Packets: payloads that a client uploads before it sends their items.

The object store signs the URLs if it can; otherwise the uploads go through this server.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import InvalidInput, NotFound, ObjectMissing
from headrace.http.requests.declared_access import admit
from headrace.http.requests.error_responses import Forbidden, json_response
from headrace.http.requests.request_body import body_pieces
from headrace.http.requests.service import RequestContext, Service
from headrace.store.client_uploads import SIGNED_S, check_path

UPLOAD: Final = "/api/packets"


class Uploads:
    """Endpoints of `/api/v?/packets`, and of the URLs that this server signs."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def presign_upload(self, request: Request) -> Response:
        """`PUT /api/v2/packets/{path}` and `/api/v1/…`: return a URL to upload a packet to, and the packet's name."""
        context = await self._service.authorize(request)
        path = check_path(request.path_params["path"])
        body = {"presignedUrl": await self._signed_url(request, context, "PUT", path)}
        if request.url.path.startswith("/api/v2"):
            body["storagePath"] = path
        return json_response(body)

    async def presign_download(self, request: Request) -> Response:
        """`GET /api/v1/packets/{path}`: return a URL to download a packet from."""
        context = await self._service.authorize(request)
        path = check_path(request.path_params["path"])
        return json_response({"presignedUrl": await self._signed_url(request, context, "GET", path)})

    async def upload(self, request: Request) -> Response:
        """`PUT` of a URL signed by this server."""
        environment, path = await self._check(request, "PUT")
        content_type = request.headers.get("content-type", "application/json")
        limits = self._service.limits
        await self._service.packets.put(
            environment, path, content_type, body_pieces(request, limits), bytes_max=limits.packet_bytes_max
        )
        return Response(status_code=200)

    async def download(self, request: Request) -> Response:
        """`GET` of a URL signed by this server."""
        environment, path = await self._check(request, "GET")
        try:
            data, content_type = await self._service.packets.get(
                environment, path, bytes_max=self._service.limits.packet_bytes_max
            )
        except ObjectMissing:
            raise NotFound("packet not found: it was never uploaded, or its batch was deleted") from None
        return Response(data, media_type=content_type)

    async def _signed_url(self, request: Request, context: RequestContext, method: str, path: str) -> str:
        packets = self._service.packets
        if packets.can_sign:
            return await packets.signed_url(method, context.environment, path)
        until_s = context.engine.clock.now_us() // 1_000_000 + SIGNED_S
        key = await self._service.authenticator.signing_key(context.environment)
        signature = _signature(key, method, context.environment, path, until_s)
        # The header only changes the URL that its own sender gets.
        scheme = "https" if request.headers.get("x-forwarded-proto") == "https" else request.url.scheme
        base = f"{scheme}://{request.url.netloc}{UPLOAD}"
        return f"{base}/{context.environment.encode().hex()}/{quote(path)}?until={until_s}&signature={signature}"

    async def _check(self, request: Request, method: str) -> tuple[str, str]:
        """Verify a signed URL and return its environment and path. Raises `Forbidden`."""
        path = check_path(request.path_params["path"])
        try:
            environment = bytes.fromhex(request.path_params["environment"]).decode()
        except ValueError:
            raise NotFound("packet not found: the URL names no environment") from None
        until = request.query_params.get("until", "")
        if not until.isascii() or not until.isdigit() or len(until) > 12:
            raise InvalidInput(f"expected a signed URL with `until` as seconds since 1970, got {until[:20]!r}")
        key = await self._service.authenticator.verifying_key(environment)
        expected = _signature(key, method, environment, path, int(until))
        signature_param = request.query_params.get("signature", "")
        if not hmac.compare_digest(expected.encode(), signature_param.encode("utf-8", "replace")):
            raise Forbidden("the signature of the URL is invalid")
        if int(until) * 1_000_000 < self._service.engine.clock.now_us():
            raise Forbidden("the URL has expired", hint="request another one")
        admit(request)
        return environment, path


def _signature(key: bytes, method: str, environment: str, path: str, until_s: int) -> str:
    text = "\n".join((method, environment, path, str(until_s)))
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

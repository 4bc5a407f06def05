"""Packets: payloads that a client uploads before it sends the item, where the object store signs, or through here."""

from __future__ import annotations

import hashlib
import hmac
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from headrace.foundation.errors import InvalidInput, NotFound, ObjectMissing
from headrace.http.requests.error_responses import Forbidden, json_response
from headrace.http.requests.request_body import body_pieces
from headrace.http.requests.service import RequestContext, Service
from headrace.store.client_uploads import SIGNED_S, check_path

UPLOAD: Final = "/api/packets"


class Uploads:
    """The endpoints of `/api/v?/packets`, and of the signed URLs they give out."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def presign_upload(self, request: Request) -> Response:
        """`PUT /api/v2/packets/{path}` and `/api/v1/…`: where to upload, and what to call it then."""
        call = await self._service.authorize(request, "batches:write", is_free=True)
        path = check_path(request.path_params["path"])
        body = {"presignedUrl": await self._signed(request, call, "PUT", path)}
        if request.url.path.startswith("/api/v2"):
            body["storagePath"] = path
        return json_response(body)

    async def presign_download(self, request: Request) -> Response:
        """`GET /api/v1/packets/{path}`: where to read it."""
        call = await self._service.authorize(request, "batches:read", is_free=True)
        path = check_path(request.path_params["path"])
        return json_response({"presignedUrl": await self._signed(request, call, "GET", path)})

    async def upload(self, request: Request) -> Response:
        """`PUT` of a signed URL of ours."""
        environment, path = await self._check(request, "PUT")
        kind = request.headers.get("content-type", "application/json")
        limits = self._service.limits
        await self._service.packets.put(
            environment, path, kind, body_pieces(request, limits), bytes_max=limits.packet_bytes_max
        )
        return Response(status_code=200)

    async def download(self, request: Request) -> Response:
        """`GET` of a signed URL of ours."""
        environment, path = await self._check(request, "GET")
        try:
            data, kind = await self._service.packets.get(
                environment, path, bytes_max=self._service.limits.packet_bytes_max
            )
        except ObjectMissing:
            raise NotFound("no such packet was uploaded") from None
        return Response(data, media_type=kind)

    async def _signed(self, request: Request, call: RequestContext, method: str, path: str) -> str:
        packets = self._service.packets
        if packets.can_sign:
            return await packets.signed_url(method, call.environment, path)
        until_s = call.engine.clock.now_us() // 1_000_000 + SIGNED_S
        signature = await self._signature(method, call.environment, path, until_s)
        base = f"{request.url.scheme}://{request.url.netloc}{UPLOAD}"
        return f"{base}/{call.environment.encode().hex()}/{quote(path)}?until={until_s}&signature={signature}"

    async def _check(self, request: Request, method: str) -> tuple[str, str]:
        """The environment and path of a signed URL. Raises `Forbidden` for what was not signed here, or is late."""
        path = check_path(request.path_params["path"])
        try:
            environment = bytes.fromhex(request.path_params["environment"]).decode()
        except ValueError:
            raise NotFound("there is no such packet") from None
        until = request.query_params.get("until", "")
        if not until.isascii() or not until.isdigit() or len(until) > 12:
            raise InvalidInput("the URL is not one that was given out here")
        expected = await self._signature(method, environment, path, int(until))
        shown = request.query_params.get("signature", "")
        if not hmac.compare_digest(expected.encode(), shown.encode("utf-8", "replace")):
            raise Forbidden("the URL was not signed here")
        if int(until) * 1_000_000 < self._service.engine.clock.now_us():
            raise Forbidden("the URL is over", hint="ask for another one")
        return environment, path

    async def _signature(self, method: str, environment: str, path: str, until_s: int) -> str:
        key = await self._service.authenticator.signing_key(environment)
        text = "\n".join((method, environment, path, str(until_s)))
        return hmac.new(key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

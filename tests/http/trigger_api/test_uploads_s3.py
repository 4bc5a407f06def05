"""Packets in a real S3: the client uploads and downloads directly, with URLs signed by the server."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from headrace.store.client_uploads import FOLDER
from headrace.store.object_store import open_payloads
from tests.support.http_server import LIMITS, line, running_server
from tests.support.s3_server import CREDENTIALS, s3


def put(url: str, data: bytes, kind: str) -> int:
    request = urllib.request.Request(url, data=data, method="PUT", headers={"content-type": kind})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return int(answer.status)


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        data: bytes = answer.read()
        return data


async def test_a_packet_is_uploaded_to_and_downloaded_from_s3_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    payloads = open_payloads(s3().url("packets-test"))
    limits = LIMITS.replaced(packet_bytes_max=300_000)
    async with running_server(tmp_path, "sqlite", payloads=payloads, limits=limits) as server:
        assert server.service.packets.can_sign
        presigned = (await server.ask("PUT", "/api/v2/packets/trigger%2Fa%2Fpayload.json")).json
        assert f":{s3().port}/" in presigned["presignedUrl"]
        body = b'{"json":"' + b"p" * 200_000 + b'"}'
        assert await asyncio.to_thread(put, presigned["presignedUrl"], body, "application/super+json") == 200
        other = (await server.ask("PUT", "/api/v2/packets/huge.json")).json["presignedUrl"]
        await asyncio.to_thread(put, other, b'"' + b"h" * 400_000 + b'"', "application/json")
        with pytest.raises(urllib.error.HTTPError):  # signed for one name only
            await asyncio.to_thread(
                put, presigned["presignedUrl"].replace("trigger/a", "trigger/b"), b"1", "text/plain"
            )
        batch_id = await server.create(2)
        items = [
            line(0, presigned["storagePath"], payloadType="application/store"),
            line(1, "huge.json", payloadType="application/store"),
        ]
        assert (await server.stream(batch_id, items)).json["sealed"]
        run = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_0")).json
        assert run["payload"] == "p" * 200_000
        late = (await server.ask("GET", f"/api/v3/runs/run_{batch_id.removeprefix('batch_')}_1")).json
        assert (late["isFailed"], "300000" in late["error"]["message"]) == (True, True)
        read = (await server.ask("GET", "/api/v1/packets/trigger%2Fa%2Fpayload.json")).json["presignedUrl"]
        assert await asyncio.to_thread(get, read) == body
        assert await payloads.delete_older(FOLDER, 2**62) == 2

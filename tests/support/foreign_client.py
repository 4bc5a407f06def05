r"""A client written from the wire contract alone: no Headrace code, only sockets and JSON.

Run as `python -I foreign_client.py HOST PORT KEY`. It sends byte for byte what trigger.dev's client sends: one
keep-alive connection, chunked, exactly one chunk for each item, `\\n` after every line, non-ASCII unescaped, no
Content-Length, no compression, no Expect. It prints the results as one JSON object.
"""

import json
import socket
import sys
import urllib.parse
from typing import Any

ITEMS = [
    '{"index":0,"task":"echo","payload":"{\\"json\\":{\\"i\\":0}}","options":{"payloadType":"application/super+json","payloadSize":17}}',
    '{"index":1,"task":"echo","payload":"plain – ünïcode 日本","options":{"payloadType":"text/plain","payloadSize":28}}',
    '{"index":2,"task":"echo","options":{"payloadType":"application/json"}}',
    '{"index":3,"task":"echo","payload":"","options":{"payloadType":"text/plain"}}',
    (
        '{"index":4,"task":"echo","payload":"{\\"json\\":{\\"when\\":\\"2026-01-01T00:00:00.000Z\\",\\"big\\":\\"12345678901234567890\\"},'
        '\\"meta\\":{\\"values\\":{\\"when\\":[\\"Date\\"],\\"big\\":[\\"bigint\\"]}}}","options":{"payloadType":"application/super+json"}}'
    ),
]


class Connection:
    """One keep-alive connection."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self.host, self.port, self.key = host, port, key
        self.socket = socket.create_connection((host, port))
        self.file = self.socket.makefile("rb")

    def head(self, method: str, path: str, *more: str) -> None:
        """Send a request head as trigger.dev's client does."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {self.host}:{self.port}", "connection: keep-alive"]
        lines += [f"authorization: Bearer {self.key}", "accept-encoding: gzip, deflate", *more]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Read a response: status, headers, JSON."""
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while (size := int(self.file.readline(), 16)) > 0:
                body += self.file.read(size)
                self.file.readline()
            self.file.readline()
        else:
            body = self.file.read(int(headers.get("content-length", "0")))
        return status, headers, json.loads(body) if body.startswith((b"{", b"[")) else body.decode()

    def post(self, path: str, value: object) -> tuple[int, dict[str, str], Any]:
        """Send a JSON request with its length."""
        body = json.dumps(value, separators=(",", ":")).encode()
        self.head("POST", path, "content-type: application/json", f"content-length: {len(body)}")
        self.socket.sendall(body)
        return self.answer()

    def get(self, path: str) -> tuple[int, dict[str, str], Any]:
        """Send a GET, with a content type and no body."""
        self.head("GET", path, "content-type: application/json")
        return self.answer()

    def stream(self, batch_id: str, items: list[str]) -> tuple[int, dict[str, str], Any]:
        """Send items, one chunk each."""
        path = f"/api/v3/batches/{batch_id}/items"
        self.head("POST", path, "content-type: application/x-ndjson", "transfer-encoding: chunked")
        for item in items:
            line = item.encode() + b"\n"
            self.socket.sendall(b"%x\r\n" % len(line) + line + b"\r\n")
        self.socket.sendall(b"0\r\n\r\n")
        return self.answer()


def upload(wire: Connection) -> str:
    """Upload a payload of 200 KiB. Returns its name."""
    wire.head("PUT", f"/api/v2/packets/{urllib.parse.quote('trigger/packet_abc/payload.json', safe='')}")
    status, _, upload_response = wire.answer()
    assert status == 200, upload_response
    target = upload_response["presignedUrl"]
    assert target.startswith(f"http://{wire.host}:{wire.port}/"), target
    body = json.dumps({"json": "x" * 200 * 1024}).encode()
    other = socket.create_connection((wire.host, wire.port))
    head = f"PUT {target[target.index('/', 8) :]} HTTP/1.1\r\nhost: {wire.host}:{wire.port}\r\n"
    other.sendall(f"{head}content-type: application/super+json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    assert other.recv(4_096).startswith(b"HTTP/1.1 200"), "upload failed"
    other.close()
    return str(upload_response["storagePath"])


def main() -> None:
    """Run one batch from its creation to its results."""
    wire = Connection(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    stored = upload(wire)
    packet = f'{{"index":5,"task":"echo","payload":"{stored}","options":{{"payloadType":"application/store"}}}}'
    created = wire.post("/api/v3/batches", {"runCount": 6, "taskIdentifiers": ["echo"]})
    batch_id = created[2]["id"]
    partial = wire.stream(batch_id, ITEMS[:2])
    whole = wire.stream(batch_id, [*ITEMS, packet])
    batch = wire.get(f"/api/v2/batches/{batch_id}")
    while batch[2]["status"] != "COMPLETED":
        batch = wire.get(f"/api/v2/batches/{batch_id}")
    runs = [wire.get(f"/api/v3/runs/{run_id}")[2] for run_id in batch[2]["runs"]]
    results = {
        "created": created,
        "partial": partial[2],
        "whole": whole[2],
        "batch": batch[2],
        "outputs": [run.get("output") for run in runs],
        "payloads": [run.get("payload") for run in runs],
        "refused": wire.post("/api/v3/batches", {"runCount": 10**9})[:1] + wire.stream("batch_nonsense", ITEMS)[:1],
        "replayed": wire.stream(batch_id, ITEMS)[2],
    }
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()

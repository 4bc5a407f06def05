"""Peers that attack the gRPC port: what they make a server hold and do is counted, and other peers are served."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from headrace.foundation.limits import MIB
from headrace.grpc.transport import budget, frames, server
from headrace.grpc.transport.connection import STEP_UNITS
from headrace.grpc.transport.frames import ErrorCode, frame
from headrace.grpc.transport.headers import encode_block
from headrace.grpc.transport.sender import ALLOWANCE_MAX
from headrace.grpc.transport.server import OUT_BYTES_MAX, PROGRESS_BYTES_PER_S
from tests.support.grpc_peer import IDLE_S, Peer, call
from tests.support.grpc_server import ECHO, Echo
from tests.support.http2_frames import GREETING, framed

REQUEST = {":method": "POST", ":scheme": "http", ":path": ECHO, "content-type": "application/grpc"}
BLOCK = encode_block(REQUEST)
TURN_MAX = STEP_UNITS
"""Frames of one peer that may be processed before another peer's call is answered."""


def bodiless(stream_id: int) -> bytes:
    """A call without a message."""
    return frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, BLOCK)


def large_block() -> bytes:
    """A header block of 9 KiB of Huffman code, which takes long to decode."""
    from hpack import Encoder

    encoder = Encoder()
    value = "".join(map(chr, itertools.islice(itertools.cycle(range(0x21, 0x7F)), 7_000)))
    block: bytes = encoder.encode([*REQUEST.items(), ("x-large", value)], huffman=True)
    return block


def is_read(peer: Peer) -> bool:
    """True while the server reads what the peer sends."""
    return peer.transport.is_read


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each step of a connection take its whole turn."""
    ticks = itertools.count(step=budget.TURN_S)
    monkeypatch.setattr(server, "perf_counter", lambda: next(ticks))


async def test_answers_that_a_peer_does_not_read_are_bounded_and_it_is_not_read_further() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    peer.connection.pause_writing()
    for number in range(200):
        if not is_read(peer):
            break
        peer.now_s += 60  # as slowly as the allowance permits
        data = b"".join(bodiless(2 * (100 * number + call_no) + 1) for call_no in range(100))
        peer.connection.data_received(data)
        await asyncio.sleep(0)
    assert not is_read(peer)
    assert peer.connection._http2.out_bytes <= 2 * OUT_BYTES_MAX
    peer.connection.resume_writing()
    await peer.read()
    assert is_read(peer)
    assert peer.connection._http2.out_bytes == 0


async def test_a_peer_that_reads_nothing_is_disconnected() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    peer.connection.pause_writing()
    await peer.wait(IDLE_S / 2)
    await peer.wait(IDLE_S)
    assert peer.transport.end == "aborted"


@pytest.mark.parametrize("name", ["without a message", "to an unknown method", "that is not gRPC", "reset at once"])
async def test_calls_that_reach_no_handler_use_up_the_allowance(name: str) -> None:
    def attack(stream_id: int) -> bytes:
        if name == "without a message":
            return bodiless(stream_id)
        if name == "to an unknown method":
            return call("/nothing/Here", stream_id)
        if name == "that is not gRPC":
            block = encode_block(REQUEST | {"content-type": "text/plain"})
            return frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream_id, block)
        return frame(frames.HEADERS, frames.END_HEADERS, stream_id, BLOCK) + frames.rst_stream(
            stream_id, ErrorCode.CANCEL
        )

    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    calls_count = 0
    while not peer.transport.end and calls_count < 10 * ALLOWANCE_MAX:
        await peer.send(attack(2 * calls_count + 1))
        calls_count += 1
    assert peer.transport.end == "closed"
    assert calls_count <= ALLOWANCE_MAX / 2


async def test_calls_that_are_handled_never_use_up_the_allowance() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    await peer.send(GREETING)
    for number in range(ALLOWANCE_MAX):
        await peer.send(call(ECHO, 2 * number + 1), frame(frames.PING, 0, 0, b"12345678"))
    assert (len(echo.calls), peer.transport.end) == (ALLOWANCE_MAX, "")


async def test_settings_cost_as_much_as_the_streams_and_values_that_they_change() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING, *(frame(frames.HEADERS, frames.END_HEADERS, 2 * n + 1, BLOCK) for n in range(256)))
    changes = frame(frames.SETTINGS, 0, 0, frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1_000) * 2_730)
    frames_count = 0
    while not peer.transport.end and frames_count < 100:
        await peer.send(changes)
        frames_count += 1
    assert (peer.transport.end, frames_count <= 10) == ("closed", True)


async def test_large_header_blocks_use_up_the_allowance() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    block = large_block()
    blocks_count = 0
    while not peer.transport.end and blocks_count < 1_000:
        await peer.send(frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 2 * blocks_count + 1, block))
        blocks_count += 1
    assert (peer.transport.end, blocks_count <= 100) == ("closed", True)


def taken_count(peer: Peer) -> int:
    """Return the number of calls whose headers were processed."""
    return (peer.connection._http2.last_id + 1) // 2


@pytest.mark.usefixtures("short_turns")
async def test_another_peer_s_call_is_answered_between_the_turns_of_a_busy_one() -> None:
    echo = Echo()
    busy = Peer(echo.methods)
    other = Peer(echo.methods, server=busy.server, address="10.0.0.2")
    await busy.send(GREETING)
    await other.send(GREETING)
    busy.connection.data_received(b"".join(call(ECHO, 2 * number + 1) for number in range(1_000)))
    assert 0 < taken_count(busy) <= TURN_MAX
    assert not busy.transport.is_read, "nothing more is read for it before its next turn"
    other.connection.data_received(call(ECHO, 1))
    assert frames.DATA in [kind for kind, *_ in await other.read()]
    assert taken_count(busy) <= 8 * TURN_MAX, "a few turns of the loop passed"
    while busy.connection._http2.has_more:
        await asyncio.sleep(0)
    await busy.read()
    assert taken_count(busy) == 1_000
    assert busy.transport.is_read


@pytest.mark.usefixtures("short_turns")
async def test_the_connections_of_one_address_share_a_turn_and_each_of_them_goes_on() -> None:
    echo = Echo()
    first = Peer(echo.methods)
    busy = [first, *(Peer(echo.methods, server=first.server) for _ in range(9))]
    other = Peer(echo.methods, server=first.server, address="10.0.0.2")
    for peer in (*busy, other):
        await peer.send(GREETING)
    flood = b"".join(call(ECHO, 2 * number + 1) for number in range(1_000))
    for peer in busy:
        peer.connection.data_received(flood)
    counts = [taken_count(peer) for peer in busy]
    assert all(0 < count <= STEP_UNITS for count in counts), "one step each: the first has used the time of them all"
    for peer in busy:
        while peer.connection._http2.has_more:
            await asyncio.sleep(0)
        assert taken_count(peer) == 1_000


@pytest.mark.usefixtures("short_turns")
async def test_busy_addresses_leave_time_for_other_work_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SERVER_TURN_S", 5 * budget.TURN_S)
    monkeypatch.setattr(budget, "TURN_S", 3 * budget.TURN_S)
    echo = Echo()
    first = Peer(echo.methods)
    busy = [first, *(Peer(echo.methods, server=first.server, address=f"10.0.1.{n}") for n in range(9))]
    for peer in busy:
        await peer.send(GREETING)
    for peer in busy:
        peer.connection.data_received(b"".join(call(ECHO, 2 * number + 1) for number in range(1_000)))
    assert sum(map(taken_count, busy)) <= (5 + len(busy)) * STEP_UNITS
    assert all(map(taken_count, busy))
    for peer in busy:
        while peer.connection._http2.has_more:
            await asyncio.sleep(0)
        await peer.read()
    assert len(echo.calls) == 10_000


async def test_an_address_that_used_up_an_allowance_starts_with_less_for_a_minute() -> None:
    def attack(peer: Peer) -> bytes:
        stream_id = 2 * taken_count(peer) + 1
        return frame(frames.HEADERS, frames.END_HEADERS, stream_id, BLOCK) + frames.rst_stream(
            stream_id, ErrorCode.CANCEL
        )

    async def calls_until_closed(peer: Peer) -> int:
        await peer.send(GREETING)
        while not peer.transport.end:
            await peer.send(attack(peer))
        return taken_count(peer)

    echo = Echo()
    first = Peer(echo.methods)
    count = await calls_until_closed(first)
    again = await calls_until_closed(Peer(echo.methods, server=first.server))
    assert again <= count / 5
    assert await calls_until_closed(Peer(echo.methods, server=first.server, address="10.0.0.2")) == count
    later = Peer(echo.methods, server=first.server)
    await later.send(GREETING)
    for number in range(50):  # a client that makes calls earns its allowance again
        await later.send(call(ECHO, 2 * number + 1))
    assert (len(echo.calls), later.transport.end) == (50, "")
    first.server.budget.distrust("10.0.0.1", first.now_s - budget.DISTRUST_S)
    assert await calls_until_closed(Peer(echo.methods, server=first.server)) == count


async def test_the_addresses_that_are_remembered_are_bounded() -> None:
    peers = budget.Budget(1)
    for number in range(budget.DISTRUSTED_MAX + 1):
        peers.distrust(str(number), 0.0)
    assert not peers.is_distrusted("0", 0.0)
    assert peers.is_distrusted("1", 0.0)
    assert peers.is_distrusted(str(budget.DISTRUSTED_MAX), budget.DISTRUST_S - 1)
    assert not peers.is_distrusted(str(budget.DISTRUSTED_MAX), budget.DISTRUST_S)


@pytest.mark.usefixtures("short_turns")
async def test_repeated_reads_of_one_socket_share_a_turn() -> None:
    peer = Peer(Echo().methods)
    await peer.send(GREETING)
    for number in range(30):
        peer.connection.data_received(b"".join(call(ECHO, 2 * (40 * number + n) + 1) for n in range(40)))
    assert taken_count(peer) <= TURN_MAX
    while peer.connection._http2.has_more:
        await asyncio.sleep(0)
    assert taken_count(peer) == 30 * 40


async def test_the_messages_of_one_address_are_bounded_and_others_are_served() -> None:
    echo = Echo()
    first = Peer(echo.methods, grpc_buffer_bytes_max=8 * MIB, grpc_message_bytes_max=MIB)
    attackers = [first, *(Peer(echo.methods, server=first.server) for _ in range(5))]
    refused_count = 0
    for peer in attackers:
        await peer.send(GREETING)
        for stream_id in (1, 3, 5):
            opening = frame(frames.HEADERS, frames.END_HEADERS, stream_id, BLOCK)
            half = framed(b"x" * (MIB - 100))[: MIB - 200]
            pieces = [half[start : start + 16_384] for start in range(0, len(half), 16_384)]
            written = await peer.send(opening, *(frame(frames.DATA, 0, stream_id, piece) for piece in pieces))
            refused_count += any(kind == frames.HEADERS for kind, *_ in written)
    assert refused_count
    assert first.server.budget.held_bytes <= 5 * MIB, "half of all, and the message that exceeded it"
    other = Peer(echo.methods, server=first.server, address="10.0.0.2")
    await other.send(GREETING)
    data = call(ECHO, 1, "x" * (MIB - 200))
    await other.send(*(data[start : start + 65_536] for start in range(0, len(data), 65_536)))
    assert len(echo.calls) == 1
    for peer in (*attackers, other):
        peer.connection.connection_lost(None)
    assert (first.server.budget.held_bytes, first.server.budget.peers) == (0, {})


async def test_a_message_that_arrives_in_drops_is_reset_in_time() -> None:
    peer = Peer(Echo().methods)
    opening = frame(frames.HEADERS, frames.END_HEADERS, 1, BLOCK)
    await peer.send(GREETING, opening, frame(frames.DATA, 0, 1, framed(b"x" * MIB)[:5]))
    reset = frames.RST_STREAM
    intervals = 0
    while not any(kind == reset for kind, *_ in await peer.wait(IDLE_S / 2)):
        await peer.send(frame(frames.DATA, 0, 1, b"12345"))
        intervals += 1
        assert intervals < 5
    assert intervals <= 2


async def test_a_message_that_arrives_at_the_required_rate_is_taken() -> None:
    echo = Echo()
    peer = Peer(echo.methods)
    message = call(ECHO, 1, "x" * 200_000)
    await peer.send(GREETING)
    step = int(PROGRESS_BYTES_PER_S * IDLE_S / 2 * 1.2)
    for start in range(0, len(message), step):
        await peer.send(message[start : start + step])
        await peer.wait(IDLE_S / 2)
    assert len(echo.calls) == 1


def test_the_limits_of_a_peer_are_described() -> None:
    page = (Path(__file__).parents[3] / "docs" / "grpc.md").read_text(encoding="utf-8")
    assert "of one address" in page
    assert f"{PROGRESS_BYTES_PER_S:,}" in page

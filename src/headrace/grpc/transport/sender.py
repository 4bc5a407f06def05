"""Sending half of an HTTP/2 connection: streams, their flow-control windows, and messages that wait for a window.

A small response is one write: headers, message and status. A message that exceeds the peer's windows or the frame size
waits in its stream's queue. Queues are drained in turn, one frame a stream, by `take_output`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from headrace.grpc.transport import frames
from headrace.grpc.transport.budget import Allotment
from headrace.grpc.transport.frames import FRAME_BYTES, ErrorCode
from headrace.grpc.transport.headers import Headers, encode_field, encode_status_message
from headrace.grpc.transport.status import Code

STREAM_WINDOW: Final = 256 * 1024
"""Bytes a peer may send on one stream before a WINDOW_UPDATE. The window reopens as bytes arrive."""

TAKE_BYTES: Final = 256 * 1024
"""Approximate bytes of queued messages that one `take_output` returns."""

LAST_ID: Final = 2**31 - 1
RECENT_IDS: Final = 512
"""Ended streams that are remembered, to tell frames in flight from violations."""
ALLOWANCE_MAX: Final = 2_000
ALLOWANCE_PER_CALL: Final = 10
DISTRUSTED_ALLOWANCE: Final = 200
PAYING_BYTES: Final = 1_024
"""A DATA frame of at least this size pays for the WINDOW_UPDATE frames that it causes."""

PREFIX_BYTES: Final = 5
"""gRPC message prefix: a compressed flag and the length."""

CONTENT_TYPE: Final = "application/grpc"
ENCODINGS: Final = "identity,gzip"
_ANSWER: Final = b"\x88" + encode_field("content-type", CONTENT_TYPE) + encode_field("grpc-accept-encoding", ENCODINGS)
_DONE: Final = encode_field("grpc-status", "0")
_ANSWER_HEAD: Final = len(_ANSWER).to_bytes(3, "big") + bytes((frames.HEADERS, frames.END_HEADERS))
_DONE_HEAD: Final = len(_DONE).to_bytes(3, "big") + bytes((frames.HEADERS, frames.END_HEADERS | frames.END_STREAM))


class CallStream:
    """One call on a connection. `is_received`: the peer has sent everything; `is_sent`: this end has."""

    __slots__ = (
        "body",
        "checked_bytes",
        "expected",
        "headers",
        "id",
        "is_begun",
        "is_received",
        "is_sent",
        "last_frames",
        "queue",
        "receive_window",
        "trailers",
        "window",
    )

    def __init__(self, stream_id: int, window: int) -> None:
        self.id = stream_id
        self.headers: Headers | None = None
        self.trailers: Headers | None = None
        self.body: bytes | bytearray = b""
        self.expected = -1
        self.checked_bytes = -1
        self.receive_window = STREAM_WINDOW
        self.window = window
        self.queue: deque[memoryview] = deque()
        self.last_frames: bytes | None = None
        self.is_begun = False
        self.is_received = False
        self.is_sent = False


class RecentIds:
    """The most recent ids that were added, at least `RECENT_IDS` of them and at most twice as many."""

    __slots__ = ("_before", "_ids")

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._before: set[int] = set()

    def add(self, stream_id: int) -> None:
        """Add an id, and forget the oldest ones."""
        self._ids.add(stream_id)
        if len(self._ids) == RECENT_IDS:
            self._ids, self._before = set(), self._ids

    def __contains__(self, stream_id: int) -> bool:
        return stream_id in self._ids or stream_id in self._before


class Sender:
    """Sending half of a connection. `sent_bytes` counts message bytes sent; `pending_bytes` wait for a window, and
    `out_bytes` for `take_output`.
    """

    def __init__(self, allotment: Allotment, *, is_client: bool) -> None:
        self.is_client = is_client
        self.is_leaving = False
        self.last_id = 0
        self.pending_bytes = 0
        self.sent_bytes = 0
        self.allotment = allotment
        self.out_bytes = 0
        self._streams: dict[int, CallStream] = {}
        self._abandoned: set[int] = set()
        self._ended_by_peer = RecentIds()
        self._ended_here = RecentIds()
        self._queued: dict[int, CallStream] = {}
        self._window = frames.WINDOW_FIRST
        self._stream_window = frames.WINDOW_FIRST
        self._frame_max = FRAME_BYTES
        self._allowance, self._paid_us = ALLOWANCE_MAX, 0
        self._next_id = 1
        self._out: list[bytes] = []

    def take_output(self) -> bytes:
        """Return the bytes to write now; empty if the peer's windows are full or nothing is queued."""
        if self._queued and self._window > 0:
            self._send_queued()
        if not self._out:
            return b""
        out, self._out, self.out_bytes = self._out, [], 0
        return out[0] if len(out) == 1 else b"".join(out)

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        self.out_bytes += len(data)

    def credit_call(self) -> None:
        """Pay for the control frames of a call that reached its handler."""
        self._allowance += ALLOWANCE_PER_CALL
        if self._allowance > ALLOWANCE_MAX:
            self._allowance = ALLOWANCE_MAX

    def distrust(self, *, now_us: int) -> None:
        """Start with a small allowance: an earlier connection of this address used up its own."""
        self._allowance, self._paid_us = DISTRUSTED_ALLOWANCE, now_us

    @property
    def streams_count(self) -> int:
        """Count open calls, including those that were ended while their handlers still run."""
        return len(self._streams) + len(self._abandoned)

    @property
    def is_out_of_stream_ids(self) -> bool:
        """True if a client has used nearly all stream ids and should open a new connection."""
        return self._next_id > LAST_ID - 2_000

    def send_response(self, stream_id: int, message: bytes) -> None:
        """End a call with its response message."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        size = PREFIX_BYTES + len(message)
        if self._queued or stream.is_begun or size > min(self._window, stream.window, self._frame_max):
            self.send_message(stream_id, message)
            self.end_call(stream_id, Code.OK, "")
            return
        self._window -= size
        self.sent_bytes += size
        word = stream_id.to_bytes(4, "big")
        parts = (_ANSWER_HEAD, word, _ANSWER, size.to_bytes(3, "big"), b"\x00\x00", word)
        data = b"".join((*parts, b"\x00", len(message).to_bytes(4, "big"), message, _DONE_HEAD, word, _DONE))
        self._out.append(data)
        self.out_bytes += len(data)
        self._remove_stream(stream)

    def send_message(self, stream_id: int, message: bytes) -> None:
        """Send one message of a streaming response."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not stream.is_begun:
            stream.is_begun = True
            self._write(frames.frame(frames.HEADERS, frames.END_HEADERS, stream_id, _ANSWER))
        self._queue(stream, message)

    def end_call(self, stream_id: int, code: Code, reason: str) -> None:
        """End a call with a status. OK ends a streaming response."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if code is Code.OK:
            status = _DONE
        else:
            status = encode_field("grpc-status", str(int(code))) + encode_field(
                "grpc-message", encode_status_message(reason)
            )
            if code is Code.UNIMPLEMENTED and not stream.is_begun:
                status += encode_field("grpc-accept-encoding", ENCODINGS)
        self._end(stream, status if stream.is_begun else b"\x88" + encode_field("content-type", CONTENT_TYPE) + status)

    def _end(self, stream: CallStream, block: bytes) -> None:
        """Send the final headers of a response, after its queued messages."""
        if stream.last_frames is not None:
            return
        last_frames = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, stream.id, block)
        if not stream.is_received:
            last_frames += frames.rst_stream(stream.id, ErrorCode.NO_ERROR)
        if stream.queue:
            stream.last_frames = last_frames
        else:
            self._write(last_frames)
            self._remove_stream(stream)

    def start_call(self, block: bytes, message: bytes) -> int:
        """Start a call as a client. Returns its stream id."""
        stream_id = self._next_id
        self._next_id += 2
        stream = self._streams[stream_id] = CallStream(stream_id, self._stream_window)
        opening = frames.frame_header(len(block), frames.HEADERS, frames.END_HEADERS, stream_id)
        size = PREFIX_BYTES + len(message)
        if self._queued or size > min(self._window, stream.window, self._frame_max):
            self._write(opening + block)
            self._queue(stream, message)
            stream.last_frames = b""
            return stream_id
        self._window -= size
        self.sent_bytes += size
        stream.is_sent = True
        data = frames.frame_header(size, frames.DATA, frames.END_STREAM, stream_id)
        self._write(b"".join((opening, block, data, b"\x00", len(message).to_bytes(4, "big"), message)))
        return stream_id

    def reset_stream(self, stream_id: int, error_code: ErrorCode) -> None:
        """Reset a stream."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._write(frames.rst_stream(stream_id, error_code))
            self._remove_stream(stream)

    def abandon_call(self, stream_id: int, code: Code, reason: str) -> None:
        """End a call with a status while its handler still runs. It counts as open until `handler_ended`."""
        self._abandoned.add(stream_id)
        self.end_call(stream_id, code, reason)

    def handler_ended(self, stream_id: int) -> None:
        """Stop counting a call that was abandoned: its handler has ended."""
        self._abandoned.discard(stream_id)

    def ping(self) -> None:
        """Send a PING, which the peer must acknowledge."""
        self._write(frames.frame(frames.PING, 0, 0, b"headrace"))

    def go_away(self) -> None:
        """Accept no new streams; open ones may finish."""
        if not self.is_leaving:
            self.is_leaving = True
            self._write(frames.goaway(self.last_id, ErrorCode.NO_ERROR))

    def _queue(self, stream: CallStream, message: bytes) -> None:
        framed = b"\x00" + len(message).to_bytes(4, "big") + message
        stream.queue.append(memoryview(framed))
        self.pending_bytes += len(framed)
        self.allotment.hold(len(framed))
        self._queued[stream.id] = stream

    def _send_queued(self) -> None:
        """Send queued messages, one frame a stream in turn, as far as the windows allow."""
        left = TAKE_BYTES
        while left > 0:
            sent = 0
            for stream in tuple(self._queued.values()):
                send_window = min(self._window, stream.window, self._frame_max)
                if send_window <= 0:
                    continue
                sent += self._send_queued_frame(stream, send_window)
            if not sent:
                return
            left -= sent

    def _send_queued_frame(self, stream: CallStream, send_window: int) -> int:
        first = stream.queue[0]
        piece, rest = first[:send_window], first[send_window:]
        size = len(piece)
        self._window -= size
        stream.window -= size
        self.pending_bytes -= size
        self.allotment.hold(-size)
        self.sent_bytes += size
        if size >= PAYING_BYTES:
            self._allowance = min(ALLOWANCE_MAX, self._allowance + 2)
        if rest:
            stream.queue[0] = rest
        else:
            stream.queue.popleft()
        is_last = not stream.queue and stream.last_frames is not None
        flags = frames.END_STREAM if is_last and self.is_client else 0
        self._write(b"".join((frames.frame_header(size, frames.DATA, flags, stream.id), piece)))
        if not stream.queue:
            del self._queued[stream.id]
            if is_last:
                stream.is_sent = True
                if not self.is_client:
                    self._write(stream.last_frames or b"")
                    self._remove_stream(stream)
        return size

    def _remove_stream(self, stream: CallStream) -> None:
        self._streams.pop(stream.id, None)
        (self._ended_by_peer if stream.is_received else self._ended_here).add(stream.id)
        held = len(stream.body)
        if self._queued:
            self._queued.pop(stream.id, None)
            unsent = sum(map(len, stream.queue))
            self.pending_bytes -= unsent
            held += unsent
        if held:
            self.allotment.hold(-held)

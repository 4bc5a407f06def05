"""`headrace.v1.Broker`: sessions, claims and settlements over gRPC, hundreds of runs a call.

The same operations as `/v1/claims` in JSON, but with spans as the store keeps them: lists of span slots (`places`),
indexes, payloads and states. Clients send an API key (`authorization: Bearer …`) with the scope `work`, or sign their
calls with one of the server's secrets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import msgspec

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.serving import CLAIMS_DECIDE
from headrace.core.span import LOST, RECORDED, RETRY, SETTLED, Settlement, encode_uint16s
from headrace.foundation.access import SMALL_BYTES_MAX, Access
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import new_session_id, run_id
from headrace.foundation.limits import MIB
from headrace.grpc.messages import broker_pb2 as wire
from headrace.grpc.transport.service_methods import CallContext
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RUNS_MAX, RemoteWork, check_session
from headrace.http.requests.service import Caller, Service
from headrace.runtime.tasks.bounds import check_text
from headrace.store.protocol import Claim, Lease, Release, Session

SERVICE: Final = wire.DESCRIPTOR.services_by_name["Broker"]
WAIT_MS_MAX: Final = 30_000
SETTLEMENTS_MAX: Final = 4_096
HEAD_BYTES: Final = 256
"""Bytes of a response beside its leases."""
RETRY_MS_MAX: Final = 365 * 24 * 3_600_000
HOST_CHARS_MAX: Final = 200
CAUSE_CHARS_MAX: Final = 200
_KEYED: Final = Access(
    credential="key", scopes=("work",), body_bytes_max=SMALL_BYTES_MAX, unauthenticated_bytes_max=SMALL_BYTES_MAX
)
ACCESS: Final = {
    "StartSession": _KEYED,
    "Heartbeat": _KEYED,
    "EndSession": _KEYED,
    "ClaimMany": replace(_KEYED, body_bytes_max=4 * MIB),
    "SettleMany": replace(_KEYED, body_bytes_max=None),
    "ReleaseMany": replace(_KEYED, body_bytes_max=MIB),
}
"""Access to each method. The message of an outcome is bounded by `grpc_message_bytes_max`."""
_CODES: Final = bytes((run.COMPLETED, run.FAILED, run.CANCELLED, RETRY)).ljust(256, b"\0")
"""The store's state byte for each state number of the protocol."""

_WORDS: Final = {SETTLED: wire.WORD_SETTLED, RECORDED: wire.WORD_RECORDED, LOST: wire.WORD_LOST}
_NULL: Final = b"null"
_json: Final = msgspec.json.Decoder(msgspec.Raw)


class BrokerService:
    """Implementation of the service for remote workers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._remote_work = RemoteWork(service)
        self._lease_tokens = LeaseTokens(service)

    @staticmethod
    def _caller(call: CallContext) -> Caller:
        """Return the client that the gate admitted."""
        caller: Caller = call.caller
        return caller

    async def start_session(self, request: wire.StartSessionRequest, call: CallContext) -> wire.StartSessionResponse:
        """Start a worker's session. It must send heartbeats from now on."""
        caller = self._caller(call)
        now_us, limits = caller.engine.clock.now_us(), self._service.limits
        session = Session(
            id=new_session_id(now_us),
            kind="remote",
            host=check_text("host", request.host[:HOST_CHARS_MAX]),
            pid=min(request.pid, 2**31),
            started_us=now_us,
            serves=msgspec.structs.replace(CLAIMS_DECIDE, environment=caller.environment),
            **caller.owner._asdict(),
        )
        await caller.engine.store.start_session(session, now_us=now_us)
        return wire.StartSessionResponse(
            session=session.id, heartbeat_ms=limits.heartbeat_ms, session_timeout_ms=limits.session_timeout_ms
        )

    async def heartbeat(self, request: wire.HeartbeatRequest, call: CallContext) -> wire.HeartbeatResponse:
        """Keep a session alive. Returns its leases and the runs that were cancelled."""
        caller = self._caller(call)
        store, now_us = caller.engine.store, caller.engine.clock.now_us()
        reply = await store.heartbeat(check_session(request.session), now_us=now_us, owner=caller.owner)
        key = await self._lease_tokens.signing_key(caller)
        return wire.HeartbeatResponse(
            leases=[self._lease_tokens.encode(key, held.span_id, held.token) for held in reply.leases],
            claim_nos=[held.claim_no for held in reply.leases],
            stopped=reply.stopped,
            cancelled=[run_id(batch_id, index) for batch_id, index in reply.cancelled],
        )

    async def end_session(self, request: wire.EndSessionRequest, call: CallContext) -> wire.EndSessionResponse:
        """End a session and release its leases."""
        caller = self._caller(call)
        session_id, now_us = check_session(request.session), caller.engine.clock.now_us()
        await caller.engine.store.end_session(session_id, now_us=now_us, owner=caller.owner)
        caller.engine.wakeup.notify()
        return wire.EndSessionResponse()

    # -- claims

    async def claim_many(self, request: wire.ClaimManyRequest, call: CallContext) -> wire.ClaimManyResponse:
        """Lease runs, waiting for some if requested."""
        caller = self._caller(call)
        if not request.tasks:
            raise InvalidInput("expected the names of the worker's tasks in `tasks`, got none")
        if request.wait_ms > WAIT_MS_MAX or not 0 < request.runs_max <= RUNS_MAX:
            raise InvalidInput(
                f"expected runs_max from 1 to {RUNS_MAX} and wait_ms up to {WAIT_MS_MAX}, "
                f"got {request.runs_max} and {request.wait_ms}"
            )
        claim = Claim(
            session_id=check_session(request.session),
            claim_no=request.claim_no,
            environment=caller.environment,
            tasks=list(request.tasks),
            queues=list(request.queues) or None,
            runs_max=request.runs_max,
        )
        leases: list[Lease] | None = None
        limits = self._service.limits
        bytes_max = min(limits.claim_bytes_max, limits.grpc_message_bytes_max - HEAD_BYTES)
        claiming = self._remote_work.claim(
            caller, claim, request.wait_ms / 1_000, bytes_max=bytes_max, states_lanes=True
        )
        async for claimed in claiming:
            leases = claimed
        key = await self._lease_tokens.signing_key(caller)
        return wire.ClaimManyResponse(leases=[await self._leased(caller, key, lease) for lease in leases or ()])

    async def _leased(self, caller: Caller, key: bytes, lease: Lease) -> wire.Lease:
        payloads, kinds = lease.payloads, lease.kinds
        if kinds is not None and pack.REFERENCE in kinds:
            payloads, kinds = await self._fetched(caller, payloads, kinds)
        message = wire.Lease(
            lease=self._lease_tokens.encode(key, lease.span_id, lease.token),
            batch_id=lease.batch_id,
            task=lease.task,
            queue=lease.queue,
            attempt=lease.attempt,
            at_most_once=lease.at_most_once,
            expires_us=lease.expires_us,
            places=lease.span_slots,
            indexes=lease.indexes,
            payloads=payloads,
        )
        if kinds is not None:
            message.kinds.extend(kinds)  # type: ignore[arg-type]  # the numbers of the enum are those of `pack`
        for place, extra in lease.extras.items():
            if extra.headers:
                message.headers[place].values.update(extra.headers)
        return message

    @staticmethod
    async def _fetched(caller: Caller, payloads: Sequence[bytes], kinds: bytes) -> tuple[list[bytes], bytes]:
        """Fetch the payloads that are in the object store."""
        fetched, fetched_kinds = list(payloads), bytearray(kinds)
        for offset, kind in enumerate(kinds):
            if kind == pack.REFERENCE:
                fetched[offset], fetched_kinds[offset] = await caller.engine.fetch(fetched[offset])
        return fetched, bytes(fetched_kinds)

    # -- settlements

    async def settle_many(self, request: wire.SettleManyRequest, call: CallContext) -> wire.SettleManyResponse:
        """Record outcomes. Returns after their commit."""
        caller = self._caller(call)
        if len(request.settlements) > SETTLEMENTS_MAX:
            raise InvalidInput(
                f"expected at most {SETTLEMENTS_MAX} settlements in a call, got {len(request.settlements)}"
            )
        key = await self._lease_tokens.signing_key(caller)
        now_us = caller.engine.clock.now_us()
        leases = [self._lease_tokens.decode(key, settlement.lease) for settlement in request.settlements]
        valid = [
            self._settlement(settlement, lease, now_us)
            for settlement, lease in zip(request.settlements, leases, strict=True)
            if lease is not None
        ]
        words = iter(await self._remote_work.settle(caller, valid))
        return wire.SettleManyResponse(
            words=[_WORDS[LOST] if lease is None else _WORDS[next(words)] for lease in leases]
        )

    def _settlement(self, settlement: wire.Settlement, lease: tuple[int, int], now_us: int) -> Settlement:
        places = list(settlement.places)
        codes = _codes(settlement, len(places))
        if not places or places[-1] >= 1 << 16 or sorted(set(places)) != places:
            raise InvalidInput(
                "expected the places of a settlement's runs in ascending order, each once", lease=settlement.lease
            )
        failed_count = codes.count(run.FAILED) + codes.count(RETRY)
        if len(settlement.failures) != failed_count or len(settlement.retry_after_ms) != codes.count(RETRY):
            raise InvalidInput(
                "expected one failure for each run that failed or retries, and one retry_after_ms for each that "
                f"retries, got {len(settlement.failures)} and {len(settlement.retry_after_ms)}",
                lease=settlement.lease,
            )
        if any(after_ms > RETRY_MS_MAX for after_ms in settlement.retry_after_ms):
            raise InvalidInput(f"expected retry_after_ms of at most {RETRY_MS_MAX}", lease=settlement.lease)
        return Settlement(
            span_id=lease[0],
            token=lease[1],
            part_no=settlement.part_no,
            span_slots=encode_uint16s(places),
            codes=codes,
            results=pack.pack(self._results(settlement, codes)),
            dues_us=tuple(now_us + after_ms * 1_000 for after_ms in settlement.retry_after_ms),
        )

    def _results(self, settlement: wire.Settlement, codes: bytes) -> Sequence[bytes]:
        completed_count = codes.count(run.COMPLETED)
        outputs = list(settlement.outputs) or [_NULL] * completed_count
        if len(outputs) != completed_count:
            raise InvalidInput(
                f"expected no outputs, or one for each of {completed_count} completed runs, got {len(outputs)}",
                lease=settlement.lease,
            )
        bytes_max = self._service.limits.inline_bytes_max
        if outputs and max(map(len, outputs)) >= bytes_max:
            raise InvalidInput(
                f"expected outputs of fewer than {bytes_max} bytes",
                hint="store the output elsewhere and return a reference to it",
                lease=settlement.lease,
            )
        try:
            for output in outputs:
                _json.decode(output)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"expected outputs in JSON: {error}", lease=settlement.lease) from None
        if completed_count == len(codes):
            return outputs
        completed, failures = iter(outputs), iter(settlement.failures)
        return [
            next(completed)
            if code == run.COMPLETED
            else b""
            if code == run.CANCELLED
            else self._failure(next(failures))
            for code in codes
        ]

    def _failure(self, failure: wire.Failure) -> bytes:
        chars_max = self._service.limits.error_chars_max
        return Failure(
            type=failure.type[:CAUSE_CHARS_MAX] or "Error",
            message=failure.message[:chars_max],
            trace=failure.trace[:chars_max],
        ).encode()

    async def release_many(self, request: wire.ReleaseManyRequest, call: CallContext) -> wire.ReleaseManyResponse:
        """Release leases, whose runs then wait again."""
        caller = self._caller(call)
        if len(request.leases) > SETTLEMENTS_MAX:
            raise InvalidInput(f"expected at most {SETTLEMENTS_MAX} leases in a call, got {len(request.leases)}")
        key = await self._lease_tokens.signing_key(caller)
        leases = [self._lease_tokens.decode(key, lease) for lease in request.leases]
        valid = [Release(span_id=lease[0], token=lease[1]) for lease in leases if lease is not None]
        words = iter(await self._remote_work.release(caller, valid))
        return wire.ReleaseManyResponse(
            words=[_WORDS[LOST] if lease is None else _WORDS[next(words)] for lease in leases]
        )


def _codes(settlement: wire.Settlement, count: int) -> bytes:
    """Return the state byte of each run."""
    if not settlement.states:
        return bytes((run.COMPLETED,)) * count
    try:
        codes = bytes(settlement.states).translate(_CODES)
    except ValueError:
        codes = b"\0"
    if 0 in codes:
        raise InvalidInput("expected states COMPLETED, FAILED, CANCELLED or RETRY", lease=settlement.lease)
    if len(codes) != count:
        raise InvalidInput(
            f"expected no states, or one for each of {count} runs, got {len(codes)}", lease=settlement.lease
        )
    return codes

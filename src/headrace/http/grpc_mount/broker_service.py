"""`headrace.v1.Broker`: sessions, claims and settlements over gRPC, hundreds of runs a call.

What `/v1/claims` does as JSON, with spans as the store keeps them: lists of places, indexes, payloads and states.
Callers show an API key (`authorization: Bearer …`) that may `work`, or sign with one of the server's secrets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from headrace.core import pack, run
from headrace.core.failure import Failure
from headrace.core.span import LOST, RECORDED, RETRY, SETTLED, Settlement, encode_uint16s
from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import new_session_id, run_id
from headrace.grpc.messages import broker_pb2 as wire
from headrace.grpc.transport.service_methods import CallContext
from headrace.http.requests.lease_tokens import LeaseTokens
from headrace.http.requests.long_poll import RUNS_MAX, RemoteWork, check_session
from headrace.http.requests.service import Caller, Service
from headrace.store.protocol import Claim, Lease, Release, Session

SERVICE: Final = wire.DESCRIPTOR.services_by_name["Broker"]
WAIT_MS_MAX: Final = 30_000
SETTLEMENTS_MAX: Final = 4_096
RETRY_MS_MAX: Final = 365 * 24 * 3_600_000
HOST_CHARS_MAX: Final = 200
CAUSE_CHARS_MAX: Final = 200
_CODES: Final = bytes((run.COMPLETED, run.FAILED, run.CANCELLED, RETRY)).ljust(256, b"\0")
"""The store's byte for each state of the wire, by its number."""

_WORDS: Final = {SETTLED: wire.WORD_SETTLED, RECORDED: wire.WORD_RECORDED, LOST: wire.WORD_LOST}
_NULL: Final = b"null"
_json: Final = msgspec.json.Decoder(msgspec.Raw)


class Broker:
    """The service. A method is a claim, a settlement or a sign of life of some worker far away."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._remote_work = RemoteWork(service)
        self._lease_tokens = LeaseTokens(service)

    async def _caller(self, call: CallContext) -> Caller:
        if call.is_signed:
            return self._service.signed_caller("work")
        return await self._service.authorize_header(call.metadata.get("authorization"), "work")

    async def start_session(self, request: wire.StartSessionRequest, call: CallContext) -> wire.StartSessionResponse:
        """A worker becomes known, and beats from now on."""
        caller = await self._caller(call)
        now_us, limits = caller.engine.clock.now_us(), self._service.limits
        session = Session(
            id=new_session_id(now_us),
            kind="remote",
            host=request.host[:HOST_CHARS_MAX],
            pid=min(request.pid, 2**31),
            started_us=now_us,
        )
        await caller.engine.store.start_session(session, now_us=now_us)
        return wire.StartSessionResponse(
            session=session.id, heartbeat_ms=limits.heartbeat_ms, session_timeout_ms=limits.session_timeout_ms
        )

    async def heartbeat(self, request: wire.HeartbeatRequest, call: CallContext) -> wire.HeartbeatResponse:
        """A sign of life; answers what is leased, and what nobody wants any more."""
        caller = await self._caller(call)
        store, now_us = caller.engine.store, caller.engine.clock.now_us()
        reply = await store.heartbeat(check_session(request.session), now_us=now_us)
        key = await self._lease_tokens.signing_key(caller)
        return wire.HeartbeatResponse(
            leases=[self._lease_tokens.encode(key, held.span_id, held.token) for held in reply.leases],
            claim_nos=[held.claim_no for held in reply.leases],
            stopped=reply.stopped,
            cancelled=[run_id(batch_id, index) for batch_id, index in reply.cancelled],
        )

    async def end_session(self, request: wire.EndSessionRequest, call: CallContext) -> wire.EndSessionResponse:
        """Leave in good order; leases go back."""
        caller = await self._caller(call)
        await caller.engine.store.end_session(check_session(request.session), now_us=caller.engine.clock.now_us())
        caller.engine.wakeup.notify()
        return wire.EndSessionResponse()

    # -- claims

    async def claim_many(self, request: wire.ClaimManyRequest, call: CallContext) -> wire.ClaimManyResponse:
        """Lease runs, waiting for some when asked to."""
        caller = await self._caller(call)
        if not request.tasks:
            raise InvalidInput("a claim names the tasks that its worker has")
        if request.wait_ms > WAIT_MS_MAX or not 0 < request.runs_max <= RUNS_MAX:
            raise InvalidInput(f"a claim is for 1 to {RUNS_MAX} runs, and waits {WAIT_MS_MAX} ms at most")
        claim = Claim(
            session_id=check_session(request.session),
            claim_no=request.claim_no,
            environment=caller.environment,
            tasks=list(request.tasks),
            queues=list(request.queues) or None,
            runs_max=request.runs_max,
        )
        leases: list[Lease] | None = None
        async for found in self._remote_work.claim(caller, claim, request.wait_ms / 1_000):
            leases = found
        key = await self._lease_tokens.signing_key(caller)
        return wire.ClaimManyResponse(leases=[await self._leased(caller, key, lease) for lease in leases or ()])

    async def _leased(self, caller: Caller, key: bytes, lease: Lease) -> wire.Lease:
        payloads, kinds = lease.payloads, lease.kinds
        if kinds is not None and pack.REFERENCE in kinds:
            payloads, kinds = await self._fetched(caller, payloads, kinds)
        told = wire.Lease(
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
            told.kinds.extend(kinds)  # type: ignore[arg-type]  # the numbers of the enum are those of `pack`
        for place, extra in lease.extras.items():
            if extra.headers:
                told.headers[place].values.update(extra.headers)
        return told

    @staticmethod
    async def _fetched(caller: Caller, payloads: Sequence[bytes], kinds: bytes) -> tuple[list[bytes], bytes]:
        """Payloads that lie in the object store are brought from there."""
        found, found_kinds = list(payloads), bytearray(kinds)
        for number, kind in enumerate(kinds):
            if kind == pack.REFERENCE:
                found[number], found_kinds[number] = await caller.engine.fetch(found[number])
        return found, bytes(found_kinds)

    # -- settlements

    async def settle_many(self, request: wire.SettleManyRequest, call: CallContext) -> wire.SettleManyResponse:
        """Record outcomes; the answer comes after their commit."""
        caller = await self._caller(call)
        if len(request.settlements) > SETTLEMENTS_MAX:
            raise InvalidInput(f"a call brings at most {SETTLEMENTS_MAX} settlements")
        key = await self._lease_tokens.signing_key(caller)
        now_us = caller.engine.clock.now_us()
        named = [self._lease_tokens.decode(key, one.lease) for one in request.settlements]
        told = zip(request.settlements, named, strict=True)
        known = [self._settlement(one, lease, now_us) for one, lease in told if lease is not None]
        words = iter(await self._remote_work.settle(caller, known))
        return wire.SettleManyResponse(
            words=[_WORDS[LOST] if lease is None else _WORDS[next(words)] for lease in named]
        )

    def _settlement(self, one: wire.Settlement, lease: tuple[int, int], now_us: int) -> Settlement:
        places = list(one.places)
        codes = _codes(one, len(places))
        if not places or places[-1] >= 1 << 16 or sorted(set(places)) != places:
            raise InvalidInput("a settlement names the places of its runs, ascending, each once", lease=one.lease)
        failed_count = codes.count(run.FAILED) + codes.count(RETRY)
        if len(one.failures) != failed_count or len(one.retry_after_ms) != codes.count(RETRY):
            raise InvalidInput(
                "a settlement has one failure for each run that failed or is to run again, and one time for each of "
                "the latter",
                lease=one.lease,
            )
        if any(after_ms > RETRY_MS_MAX for after_ms in one.retry_after_ms):
            raise InvalidInput(f"a run is run again within {RETRY_MS_MAX} ms", lease=one.lease)
        return Settlement(
            span_id=lease[0],
            token=lease[1],
            part_no=one.part_no,
            span_slots=encode_uint16s(places),
            codes=codes,
            results=pack.pack(self._results(one, codes)),
            dues_us=tuple(now_us + after_ms * 1_000 for after_ms in one.retry_after_ms),
        )

    def _results(self, one: wire.Settlement, codes: bytes) -> Sequence[bytes]:
        completed_count = codes.count(run.COMPLETED)
        outputs = list(one.outputs) or [_NULL] * completed_count
        if len(outputs) != completed_count:
            raise InvalidInput("a settlement has one output for each run that completed, or none", lease=one.lease)
        bytes_max = self._service.limits.inline_bytes_max
        if outputs and max(map(len, outputs)) >= bytes_max:
            raise InvalidInput(
                f"an output has fewer than {bytes_max} bytes here",
                hint="put it where your caller finds it, and return that",
                lease=one.lease,
            )
        try:
            for output in outputs:
                _json.decode(output)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInput(f"an output is not JSON: {error}", lease=one.lease) from None
        if completed_count == len(codes):
            return outputs
        completed, failures = iter(outputs), iter(one.failures)
        return [
            next(completed)
            if code == run.COMPLETED
            else b""
            if code == run.CANCELLED
            else self._failure(next(failures))
            for code in codes
        ]

    def _failure(self, told: wire.Failure) -> bytes:
        chars_max = self._service.limits.error_chars_max
        return Failure(
            type=told.type[:CAUSE_CHARS_MAX] or "Error", message=told.message[:chars_max], trace=told.trace[:chars_max]
        ).encode()

    async def release_many(self, request: wire.ReleaseManyRequest, call: CallContext) -> wire.ReleaseManyResponse:
        """Give leases back as they were."""
        caller = await self._caller(call)
        if len(request.leases) > SETTLEMENTS_MAX:
            raise InvalidInput(f"a call gives at most {SETTLEMENTS_MAX} leases back")
        key = await self._lease_tokens.signing_key(caller)
        named = [self._lease_tokens.decode(key, lease) for lease in request.leases]
        known = [Release(span_id=one[0], token=one[1]) for one in named if one is not None]
        words = iter(await self._remote_work.release(caller, known))
        return wire.ReleaseManyResponse(words=[_WORDS[LOST] if one is None else _WORDS[next(words)] for one in named])


def _codes(one: wire.Settlement, count: int) -> bytes:
    """A state for each run, as the store writes it."""
    if not one.states:
        return bytes((run.COMPLETED,)) * count
    try:
        codes = bytes(one.states).translate(_CODES)
    except ValueError:
        codes = b"\0"
    if 0 in codes:
        raise InvalidInput("a settlement has a state that nobody knows", lease=one.lease)
    if len(codes) != count:
        raise InvalidInput("a settlement has one state for each of its runs, or none", lease=one.lease)
    return codes

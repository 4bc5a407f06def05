"""Any order of operations, from any number of workers, alive or crashed: the invariants hold after every step.

The machine stores what a client may rely on: which runs were acknowledged, which leases are held and which are stale,
and which outcome was recorded for which run. It runs on each store alone, and on two stores in lockstep, where every
result is compared. A failure prints the steps as a program, to be put in a test of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.core.batch import COMPLETED, LISTED, STREAM
from headrace.core.block import Extra
from headrace.core.run import NAMES
from headrace.core.span import Key, Settlement
from headrace.foundation.errors import Conflict, InvalidInput, SessionEnded
from headrace.foundation.ids import new_batch_id, new_session_id
from headrace.foundation.limits import DEFAULT
from headrace.store.memory import MemoryStore
from headrace.store.postgres import PostgresStore
from headrace.store.protocol import Claim, Lease, NewBatch, Release, Session, Store, Suspects
from headrace.store.sqlite import SqliteStore
from tests.support import invariants
from tests.support.lockstep import LockStep
from tests.support.store_rig import SECOND_US, START_US, chunks_of, fresh_schema, settlement_of

pytestmark = pytest.mark.timeout(600)  # a failure is reduced before it is reported, which takes time

Answer = TypeVar("Answer")
INDEXES_MAX = 14
TASKS = ("task", "other")
numbers = st.integers(0, 1_000)
few_indexes = st.lists(st.integers(0, INDEXES_MAX - 1), min_size=1, max_size=5, unique=True)
keys = st.builds(
    Key,
    st.sampled_from(TASKS),
    queue=st.sampled_from(["default", "side"]),
    priority=st.sampled_from([0, 0, 0, 5]),
    due_us=st.sampled_from([0, 0, 0, START_US + 30 * SECOND_US]),
    expires_us=st.sampled_from([0, 0, 0, START_US + 60 * SECOND_US]),
    at_most_once=st.sampled_from([False, False, True]),
)


KEYED = 2


class Held:
    """A lease as its worker knows it."""

    def __init__(self, session_id: str, lease: Lease) -> None:
        self.session_id = session_id
        self.lease = lease
        self.open_slots = list(lease.span_slots)
        self.part_no = 0
        self.is_stale = False


def key_of(batch_id: str, index: int) -> str:
    """Return the idempotency key of a run; one run in `KEYED` has it."""
    return f"{batch_id}-{index}"


class StoreMachine(RuleBasedStateMachine):
    """Clients, workers and upkeep that know only what the store returned to them."""

    def open_store(self, folder: Path) -> Store:
        """Return the store under test."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-"))
        self.store = self.open_store(self.folder)
        self.wait(self.store.open())
        self.now_us = START_US
        self.batches: dict[str, str] = {}
        self.acknowledged: dict[str, set[int]] = {}
        self.live: list[str] = []
        self.ended: list[str] = []
        self.held: list[Held] = []
        self.past: list[Settlement] = []
        self.outcomes: dict[tuple[str, int], str] = {}
        self.record = invariants.Record()
        self.claims_count = 0

    def teardown(self) -> None:
        """Delete everything."""
        self.wait(self.store.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    def wait(self, verb: Coroutine[Any, Any, Answer]) -> Answer:
        """Run one operation to its end."""
        return self.loop.run_until_complete(verb)

    def batch_at(self, number: int) -> str:
        """One of the batches."""
        return list(self.batches)[number % len(self.batches)]

    @initialize(runs_max=st.integers(1, 6))
    def begin(self, runs_max: int) -> None:
        """Begin a program with runs and with two workers, so that few steps do nothing."""
        self.start_session()
        self.start_session()
        self.create(None, LISTED, owned=False)
        self.offer(self.batch_at(0), list(range(6)), Key("task"), runs_max)

    # -- clients

    @rule(
        expected=st.none() | st.integers(0, INDEXES_MAX),
        kind=st.sampled_from([LISTED, LISTED, STREAM]),
        owned=st.booleans(),
    )
    def create(self, expected: int | None, kind: str, owned: bool) -> None:
        """Create a batch; a stream may belong to a session."""
        self.now_us += 1_000
        owner = self.live[-1] if owned and kind == STREAM and self.live else ""
        wanted = None if kind == STREAM else expected
        seal_timeout_ms = 40_000 if owned else 0
        new = NewBatch(
            id=new_batch_id(self.now_us),
            kind=kind,
            expected_count=wanted,
            session_id=owner,
            seal_timeout_ms=seal_timeout_ms,
        )
        batch, created = self.wait(self.store.create_batch(new, now_us=self.now_us))
        assert created
        self.batches[batch.id] = kind
        self.acknowledged[batch.id] = set()

    @precondition(lambda self: self.batches)
    @rule(
        number=numbers,
        start=st.integers(0, INDEXES_MAX - 1),
        count=st.integers(1, 8),
        key=keys,
        runs_max=st.integers(1, 5),
        seals=st.booleans(),
    )
    def append(self, number: int, start: int, count: int, key: Key, runs_max: int, seals: bool) -> None:
        """Append some runs in order, new or sent before."""
        indexes = list(range(start, min(start + count, INDEXES_MAX)))
        self.offer(self.batch_at(number), indexes, key, runs_max, seals=seals)

    @precondition(lambda self: self.batches)
    @rule(number=numbers, indexes=few_indexes, key=keys)
    def append_in_any_order(self, number: int, indexes: list[int], key: Key) -> None:
        """Append some runs with gaps between them."""
        self.offer(self.batch_at(number), indexes, key, 3)

    def offer(self, batch_id: str, indexes: list[int], key: Key, runs_max: int, *, seals: bool = False) -> None:
        """Append, and check the result."""
        acknowledged = self.acknowledged[batch_id]
        extras = {index: Extra(idempotency_key=key_of(batch_id, index)) for index in indexes if index % KEYED == 0}
        chunks = chunks_of(indexes, key=key, runs_max=runs_max, extras=extras)
        try:
            appended = self.wait(self.store.append(batch_id, chunks, now_us=self.now_us, seals=seals))
        except (Conflict, InvalidInput):
            return
        assert appended.accepted_count == len(set(indexes) - acknowledged)
        assert appended.duplicates_count == len(set(indexes) & acknowledged)
        assert appended.conflicts == []
        acknowledged |= set(indexes)
        if appended.sealed is not None:
            assert seals
            assert appended.sealed.expected_count == len(acknowledged)

    @precondition(lambda self: self.batches)
    @rule(number=numbers, again=st.booleans())
    def seal(self, number: int, again: bool) -> None:
        """Seal at the announced or the sent count."""
        batch_id = self.batch_at(number)
        for _ in range(1 + again):
            try:
                batch = self.wait(self.store.seal(batch_id, None, now_us=self.now_us))
            except Conflict:
                return
            assert batch.expected_count == len(self.acknowledged[batch_id])

    @precondition(lambda self: self.batches)
    @rule(number=numbers, state=st.sampled_from(["cancelled", "abandoned"]))
    def stop(self, number: int, state: str) -> None:
        """Cancel or abandon a batch."""
        self.wait(self.store.stop_batch(self.batch_at(number), state, now_us=self.now_us))

    @precondition(lambda self: self.batches)
    @rule(number=numbers, indexes=few_indexes)
    def cancel_runs(self, number: int, indexes: list[int]) -> None:
        """Cancel single runs."""
        batch_id = self.batch_at(number)
        existing = [index for index in indexes if index in self.acknowledged[batch_id]]
        self.wait(self.store.cancel_runs(batch_id, existing, now_us=self.now_us))

    @precondition(lambda self: self.batches)
    @rule(number=numbers, indexes=few_indexes)
    def complete_waiting(self, number: int, indexes: list[int]) -> None:
        """Complete runs by their keys: those that wait end, and no others."""
        batch_id = self.batch_at(number)
        before = self.states(batch_id)
        names = [key_of(batch_id, index) for index in indexes]
        count = sum(
            self.wait(self.store.complete_waiting("default", task, names, b"null", now_us=self.now_us))
            for task in TASKS
        )
        ended = [index for index in set(indexes) if index % KEYED == 0 and before.get(index) in ("waiting", "delayed")]
        assert count == len(ended)
        assert self.states(batch_id) == before | dict.fromkeys(ended, "completed")
        for index in ended:
            self.outcomes[batch_id, index] = "completed"

    @precondition(lambda self: self.batches)
    @rule(number=numbers, indexes=st.none() | few_indexes)
    def redrive(self, number: int, indexes: list[int] | None) -> None:
        """Redrive failed, cancelled and expired runs: the only operation that may take an outcome back."""
        batch_id = self.batch_at(number)
        existing = None if indexes is None else [index for index in indexes if index in self.acknowledged[batch_id]]
        before = self.states(batch_id)
        try:
            count = self.wait(self.store.redrive(batch_id, existing))
        except Conflict:
            return
        bad = {"failed"} if existing is None else {"failed", "cancelled", "expired"}
        again = [index for index, state in before.items() if state in bad and (existing is None or index in existing)]
        assert count == len(again)
        for index in again:
            self.outcomes.pop((batch_id, index), None)
            self.record.forget(batch_id, index)

    # -- workers

    @rule()
    def start_session(self) -> None:
        """Start a worker."""
        session_id = new_session_id(self.now_us)
        session = Session(id=session_id, kind="worker", host="h", pid=1, started_us=self.now_us)
        for _ in range(2):
            self.wait(self.store.start_session(session, now_us=self.now_us))
        self.live.append(session_id)

    @precondition(lambda self: self.live)
    @rule(number=numbers, runs_max=st.sampled_from([1, 2, 3, 5, 50]), answer_lost=st.booleans())
    def claim(self, number: int, runs_max: int, answer_lost: bool) -> None:
        """Claim, and repeat the claim as after a lost answer."""
        session_id = self.live[number % len(self.live)]
        self.claims_count += 1
        claim = Claim(
            session_id=session_id,
            claim_no=self.claims_count,
            environment="default",
            tasks=TASKS[: 1 + number % 2],
            queues=None,
            runs_max=runs_max,
        )
        leases = self.wait(self.store.claim(claim, now_us=self.now_us))
        if answer_lost:
            assert self.wait(self.store.claim(claim, now_us=self.now_us)) == leases
        assert sum(len(lease.span_slots) for lease in leases) <= runs_max
        for lease in leases:
            for index in lease.indexes:
                assert index in self.acknowledged[lease.batch_id]
                assert (lease.batch_id, index) not in self.outcomes, "delivered after its outcome was recorded"
            states = self.states(lease.batch_id)
            handed_out = "started" if lease.at_most_once else "leased"
            assert {states[index] for index in lease.indexes} == {handed_out}, "recorded as started before delivery"
            self.held.append(Held(session_id, lease))

    @precondition(lambda self: self.held)
    @rule(
        number=numbers,
        codes=st.lists(st.sampled_from("ccccfxer"), min_size=1, max_size=6),
        delay=st.sampled_from([0, 0, 20]),
        answer_lost=st.booleans(),
    )
    def settle(self, number: int, codes: list[str], delay: int, answer_lost: bool) -> None:
        """Settle some or all of a lease's open runs, under a token that may be stale."""
        held = self.held[-1 - number % len(self.held)]
        span_slots = held.open_slots[: len(codes)]
        if not span_slots:
            return
        codes_text = "".join(codes[: len(span_slots)])
        settlement = settlement_of(
            held.lease,
            codes_text,
            span_slots=span_slots,
            part_no=held.part_no,
            dues_us=[self.now_us + delay * SECOND_US] * codes_text.count("r"),
        )
        before = {batch_id: self.states(batch_id) for batch_id in self.batches}
        (word,) = self.wait(self.store.settle([settlement], now_us=self.now_us))
        if held.is_stale:
            assert word == "lost"
            assert before == {batch_id: self.states(batch_id) for batch_id in self.batches}, (
                "a stale token changes nothing"
            )
            return
        assert word == "settled"
        self.past.append(settlement)
        held.part_no += 1
        held.open_slots = held.open_slots[len(span_slots) :]
        held.is_stale = not held.open_slots
        index_at = dict(zip(held.lease.span_slots, held.lease.indexes, strict=True))
        for span_slot, code in zip(span_slots, codes_text, strict=True):
            if code != "r":
                self.outcomes[held.lease.batch_id, index_at[span_slot]] = NAMES[ord(code)]
        if answer_lost:
            assert self.wait(self.store.settle([settlement], now_us=self.now_us)) == ["recorded"]

    def overtaken(self) -> list[Held]:
        """Return stale leases whose spans are leased by another session now."""
        now = {held.lease.span_id for held in self.held if not held.is_stale}
        return [held for held in self.held if held.is_stale and held.open_slots and held.lease.span_id in now]

    @precondition(lambda self: self.overtaken())
    @rule(number=numbers, code=st.sampled_from("cfrx"), gives_back=st.booleans())
    def a_late_worker_tells_of_a_lease_that_is_another_s(self, number: int, code: str, gives_back: bool) -> None:
        """Settle under an old token: nothing changes, though the span is leased and its runs are open."""
        late = self.overtaken()
        held = late[number % len(late)]
        if gives_back:
            given = Release(span_id=held.lease.span_id, token=held.lease.token, suspects=tuple(held.open_slots))
            assert self.wait(self.store.release([given], crashes_max=1, now_us=self.now_us)) == ["lost"]
        else:
            settlement = settlement_of(held.lease, code, span_slots=held.open_slots, part_no=held.part_no + 7)
            assert self.wait(self.store.settle([settlement], now_us=self.now_us)) == ["lost"]

    @precondition(lambda self: self.held)
    @rule(number=numbers, kept=st.integers(0, 3), answer_lost=st.booleans())
    def give_part_back(self, number: int, kept: int, answer_lost: bool) -> None:
        """Release the last runs of a lease before they started; the lease continues with the first ones."""
        held = self.held[number % len(self.held)]
        given = Release(span_id=held.lease.span_id, token=held.lease.token, span_slots=tuple(held.open_slots[kept:]))
        for _ in range(1 + answer_lost):
            words = self.wait(self.store.release([given], crashes_max=1, now_us=self.now_us))
            if held.is_stale:
                assert words == ["lost"]
        if not held.is_stale:
            del held.open_slots[kept:]
            held.is_stale = not held.open_slots

    @precondition(lambda self: self.held and self.live)
    @rule(number=numbers)
    def hand_over(self, number: int) -> None:
        """Release a lease, and claim waiting runs at once."""
        self.release(number, guilty=0, crashes_max=3)
        self.claim(number, 50, answer_lost=False)

    @precondition(lambda self: self.past)
    @rule(number=numbers)
    def settle_again_much_later(self, number: int) -> None:
        """Repeat a settlement that was recorded long ago: it is recognised, also after later changes."""
        settlement = self.past[number % len(self.past)]
        assert self.wait(self.store.settle([settlement], now_us=self.now_us)) == ["recorded"]

    @precondition(lambda self: self.held)
    @rule(number=numbers, guilty=st.integers(0, 3), crashes_max=st.integers(1, 3))
    def release(self, number: int, guilty: int, crashes_max: int) -> None:
        """Release a lease, with or without suspects."""
        held = self.held[-1 - number % len(self.held)]
        given = Release(
            span_id=held.lease.span_id,
            token=held.lease.token,
            suspects=tuple(held.open_slots[:guilty]),
            evidence="killed",
        )
        words = self.wait(self.store.release([given], crashes_max=crashes_max, now_us=self.now_us))
        assert words == ["lost" if held.is_stale else "settled"]
        held.is_stale = True

    @precondition(lambda self: self.live)
    @rule(number=numbers, has_marks=st.booleans(), guilty=st.integers(0, 2))
    def recover(self, number: int, has_marks: bool, guilty: int) -> None:
        """Crash a worker; another process recovers its session, once."""
        session_id = self.live.pop(number % len(self.live))
        held_leases = [held for held in self.held if held.session_id == session_id and not held.is_stale]
        span_slots = {(held.lease.span_id, held.lease.token): tuple(held.open_slots[:guilty]) for held in held_leases}
        suspects = Suspects(span_slots=span_slots if has_marks else None, evidence="signal 9")
        for count in (len(held_leases), 0):
            assert count == self.wait(
                self.store.recover(session_id, suspects, silent_since_us=self.now_us, crashes_max=2, now_us=self.now_us)
            )
        self.leave(session_id)

    @precondition(lambda self: self.live)
    @rule(number=numbers)
    def end_session(self, number: int) -> None:
        """End a worker's session in good order."""
        session_id = self.live.pop(number % len(self.live))
        self.wait(self.store.end_session(session_id, now_us=self.now_us))
        self.leave(session_id)

    def leave(self, session_id: str) -> None:
        """Treat the leases of a session as stale from now on."""
        self.ended.append(session_id)
        for held in self.held:
            held.is_stale |= held.session_id == session_id

    @precondition(lambda self: self.ended)
    @rule(number=numbers)
    def a_thawed_session_is_refused(self, number: int) -> None:
        """Continue after SIGSTOP: the heartbeat and the claim are refused. (Settlements are in `settle`.)"""
        session_id = self.ended[number % len(self.ended)]
        claim = Claim(session_id=session_id, claim_no=1, environment="default", tasks=TASKS, queues=None, runs_max=9)
        for verb in (
            self.store.heartbeat(session_id, now_us=self.now_us),
            self.store.claim(claim, now_us=self.now_us),
        ):
            try:
                self.wait(cast("Coroutine[Any, Any, object]", verb))
            except SessionEnded:
                continue
            raise AssertionError("an ended session is alive")

    @precondition(lambda self: self.live)
    @rule(number=numbers)
    def heartbeat(self, number: int) -> None:
        """Check that the store's leases of a session are those that it knows, and that no process recovers a live
        session.
        """
        session_id = self.live[number % len(self.live)]
        beat = self.wait(self.store.heartbeat(session_id, now_us=self.now_us))
        self.wait(self.store.unwanted_runs(session_id))  # both stores return the same
        suspects = Suspects(span_slots=None, evidence="a slow supervisor")
        recovered = self.store.recover(
            session_id, suspects, silent_since_us=self.now_us - 1, crashes_max=1, now_us=self.now_us
        )
        assert self.wait(recovered) == 0
        assert self.wait(self.store.heartbeat(session_id, now_us=self.now_us)) == beat
        mine = {
            (held.lease.span_id, held.lease.token)
            for held in self.held
            if held.session_id == session_id and not held.is_stale
        }
        assert {(lease.span_id, lease.token) for lease in beat.leases} == mine

    # -- upkeep, time, and the end of a process

    @rule(seconds=st.sampled_from([1, 10, 30]))
    def later(self, seconds: int) -> None:
        """Advance the clock."""
        self.now_us += seconds * SECOND_US

    @rule()
    def sweep(self) -> None:
        """Run upkeep."""
        self.wait(self.store.sweep(now_us=self.now_us, rows_max=100))

    @rule()
    def crash(self) -> None:
        """Restart the store's process; what was acknowledged is stored."""
        self.wait(self.store.close())
        self.wait(self.store.open())

    # -- after every step

    def states(self, batch_id: str) -> dict[int, str]:
        """Return the state of each run by index."""
        return {run.index: run.state for run in self.wait(self.store.runs("default", batch_id=batch_id, limit=999))}

    @invariant()
    def all_is_well(self) -> None:
        """Check the ledger, verification and completion, and that all queries agree."""
        assert self.wait(invariants.faults(self.store)) == []

    @invariant()
    def what_was_acknowledged_is_there_and_what_was_recorded_stands(self) -> None:
        """Check that accepted runs exist once, that recorded outcomes are returned, and that no final one changes."""
        for batch_id, indexes in self.acknowledged.items():
            states = self.states(batch_id)
            assert set(states) == indexes
            final = {index for index, state in states.items() if state in invariants.FINAL_NAMES}
            for (owner, index), state in self.outcomes.items():
                assert owner != batch_id or states[index] == state, (owner, index)
            outcomes = self.wait(self.store.outcomes(batch_id, 0, 999))
            assert self.record.note(batch_id, outcomes) == []
            assert self.record.lost(batch_id, final) == []
            batch, _ = self.wait(self.store.batch(batch_id))
            if batch.is_stopped:
                assert not {"waiting", "delayed"} & set(states.values()), "no run of a stopped batch may start"
            if batch.state == COMPLETED:
                assert len(final) == batch.expected_count


class MemoryMachine(StoreMachine):
    """The memory store alone."""

    def open_store(self, folder: Path) -> Store:
        return MemoryStore(DEFAULT)


class SqliteMachine(StoreMachine):
    """The SQLite store alone."""

    def open_store(self, folder: Path) -> Store:
        return SqliteStore(folder / "headrace.db", DEFAULT)


class LockStepMachine(StoreMachine):
    """Memory and SQLite, with every result compared."""

    def open_store(self, folder: Path) -> Store:
        return cast("Store", LockStep(MemoryStore(DEFAULT), SqliteStore(folder / "headrace.db", DEFAULT)))


class PostgresMachine(StoreMachine):
    """PostgreSQL and memory, with every result compared."""

    def open_store(self, folder: Path) -> Store:
        return cast("Store", LockStep(MemoryStore(DEFAULT), PostgresStore(fresh_schema(folder), DEFAULT)))


EFFORT = int(os.environ.get("HEADRACE_TEST_EFFORT", "1"))
"""Multiple of the usual number of programs; the usual number takes about twenty seconds."""


def profile(programs_max: int, steps_max: int) -> settings:
    """Bounds of one run of a machine."""
    return settings(
        max_examples=programs_max * EFFORT,
        stateful_step_count=steps_max,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


TestMemory = MemoryMachine.TestCase
TestMemory.settings = profile(120, 60)
TestSqlite = SqliteMachine.TestCase
TestSqlite.settings = profile(15, 40)
TestLockStep = LockStepMachine.TestCase
TestLockStep.settings = profile(45, 50)
TestPostgres = PostgresMachine.TestCase
TestPostgres.settings = profile(15, 40)

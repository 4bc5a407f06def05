"""A scenario that uses every operation of a store. It can be repeated from its beginning after any crash, with the same
end.

All calls go through `ask`. It sets the name of the operation first, so that a fault can be injected at any point, and
it notes what was acknowledged, since that must be stored after the fault.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from headrace.core.admission import Bucket
from headrace.core.batch import CANCELLED, STREAM
from headrace.core.block import Extra
from headrace.core.failure import Failure
from headrace.core.serving import Serving
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, HeadraceError, StoreUnavailable
from headrace.foundation.ids import new_batch_id, new_session_id
from headrace.store.protocol import ApiKey, Claim, Lease, NewBatch, Release, Session, SessionOwner, Store, Suspects
from tests.support import invariants
from tests.support.store_rig import SECOND_US, chunks_of, settlement_of

MAIN_COUNT = 60
BAD_ITEM = 35
CANCELLED_ITEM = 55
TRIES = 50
REDRIVEN = "redriven"
"""Noted before failed runs are redriven: their last outcome is not what was acknowledged any more."""
NAMES = {"c": "completed", "f": "failed"}


class Acknowledged(NamedTuple):
    """Something that was acknowledged: a run that was appended, or its last outcome."""

    batch_id: str
    run_index: int
    state: str = ""


class StoreScenario:
    """One process in an environment of its own.

    `inject(operation)` is called after an answer and before it is noted; `pause` is awaited between two attempts.
    """

    def __init__(
        self,
        store: Store,
        environment: str,
        now_us: int,
        *,
        note: Callable[[Acknowledged], None] = lambda acknowledged: None,
        inject: Callable[[str], None] = lambda verb: None,
        completed: Iterable[tuple[str, int]] = (),
        pause: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0),
    ) -> None:
        self.store = store
        self.environment = environment
        self.now_us = now_us
        self.verb = ""
        self.note = note
        self.inject = inject
        self.pause = pause
        self.failures: list[HeadraceError] = []
        self.completed = set(completed)
        self._session = ""
        self._claims_count = 0

    async def ask(self, verb: str, *args: Any, **more: Any) -> Any:
        """Call one operation, again while the store is unavailable. The state between two attempts is not known
        here.
        """
        self.now_us += 1_000
        for tries_left in range(TRIES, -1, -1):
            self.verb = verb
            try:
                answer = await getattr(self.store, verb)(*args, **more)
            except StoreUnavailable as error:
                self.failures.append(error)
                if not tries_left:
                    raise
                await self.pause()
            else:
                self.inject(verb)
                return answer
        raise AssertionError

    async def run_all(self) -> None:
        """Run the whole scenario."""
        await self._arrive()
        main = await self._produce()
        await self._work(main)
        await self._watch(main)
        await self._intervene(main)
        await self._keep_up()
        await self._let_in()
        await self.ask("end_session", self._session, now_us=self.now_us)

    async def faults(self) -> list[str]:
        """Return the faults in this environment, read without fault injection."""
        self.verb = ""
        return await invariants.faults(self.store, self.environment)

    # -- parts of the scenario

    async def _arrive(self) -> None:
        """Start a session; recover one that crashed, and one that falls silent now."""
        self._session = await self._start_session()
        silent = await self._start_session()
        await self._append(await self._batch("early", expected_count=4), range(4), runs_max=2)
        await self._claim(2, session=silent)
        for session in await self.ask("sessions"):
            if session.id != self._session and session.host == self.environment:
                self.now_us += 1
                await self.ask(
                    "recover",
                    session.id,
                    Suspects(span_slots=None, evidence="killed"),
                    silent_since_us=self.now_us,
                    crashes_max=3,
                    now_us=self.now_us,
                )

    async def _produce(self) -> str:
        main = await self._batch("main", expected_count=MAIN_COUNT)
        await self._append(main, range(10), runs_max=10)
        await self._append(main, range(10, 30), runs_max=10, cursor=b"at 30")
        extras = {
            30: Extra(idempotency_key="once", tags=("red", "round"), headers={"a": "b"}),
            31: Extra(object_key=f"{self.environment}/x/one", object_bytes=9),
            38: Extra(idempotency_key="fails"),
            BAD_ITEM: Extra(failure=Failure(type="Bad", message="no").encode()),
        }
        await self._append(main, range(30, 40), key=Key("task", queue="b", priority=1), extras=extras)
        await self._append(main, range(25, 35))
        await self._append(main, range(50, MAIN_COUNT), runs_max=5)
        await self.ask("missing", main, 10)
        await self._append(main, range(40, 50), key=Key("once", at_most_once=True))
        await self.ask("seal", main, None, now_us=self.now_us)
        await self.ask("stalled_lanes", self.environment, batch_id=main, now_us=self.now_us)
        await self.ask("stalled_lanes", self.environment, now_us=self.now_us)
        await self.ask("lease_loads")
        await self.ask("tasks_of_batches", self.environment, [main])
        stream = NewBatch(
            id=new_batch_id(self.now_us), environment=self.environment, kind=STREAM, session_id=self._session
        )
        batch, _ = await self.ask("create_batch", stream, now_us=self.now_us)
        await self._append(batch.id, [0])
        await self._append(batch.id, [1, 2], key=Key("task", due_us=self.now_us + SECOND_US))
        await self._append(batch.id, [3], extras={3: Extra(idempotency_key="once")})
        return main

    async def _work(self, main: str) -> None:
        """Make small claims, one of them repeated, until nothing is left."""
        await self.ask("heartbeat", self._session, now_us=self.now_us, serves=Serving(tasks=("task",)))
        leases = await self._claim(3)
        assert await self._claim(3, again=True) == leases
        if leases:
            numbers = range(len(leases[0].span_slots))
            for part_no, half in enumerate([numbers[::2][::-1], numbers[1::2]]):
                if half:
                    await self._settle(leases[:1], half, part_no=part_no)
        back = await self._claim(4)
        if back:
            given = [
                Release(span_id=lease.span_id, token=lease.token, suspects=tuple(lease.span_slots[:1]))
                for lease in back
            ]
            await self.ask("release", given, crashes_max=3, now_us=self.now_us)
        held = await self._claim(1_000)
        if any(lease.batch_id == main and CANCELLED_ITEM in lease.indexes for lease in held):
            await self.ask("cancel_runs", main, [CANCELLED_ITEM], now_us=self.now_us)
        owner = SessionOwner(self.environment, "")
        await self.ask("heartbeat", self._session, now_us=self.now_us, owner=owner)
        await self.ask("unwanted_runs", self._session, owner=owner)
        fives = [lease for lease in held if len(lease.span_slots) == 5]
        # two runs that are not adjacent, the run between them, then the rest of two leases together
        for lease in fives:
            await self._settle([lease], [0, 2], part_no=0)
            await self._settle([lease], [1], part_no=1)
        for start in range(0, len(fives), 2):
            await self._settle(fives[start : start + 2], [3, 4], part_no=2)
        await self._settle_all([lease for lease in held if lease not in fives])
        await self._drain()

    async def _drain(self) -> None:
        while True:
            leases = await self._claim(17)
            await self._settle_all(leases)
            if not leases:
                if await self.ask("next_due_us", self.environment, ["task", "once"]) is None:
                    return
                self.now_us += 5 * SECOND_US

    async def _watch(self, main: str) -> None:
        await self.ask("batch", main)
        await self.ask("find_batch", self.environment, "main")
        await self.ask("batches", self.environment, states=["sealed", "completed"])
        await self.ask("outcomes", main, 0, 1_000)
        await self.ask("run", main, 30)
        await self.ask("runs", self.environment, batch_id=main, state="failed")
        await self.ask("runs", self.environment, tag="red")
        await self.ask("queues", self.environment)
        await self.ask("verify", main)
        await self.ask("unnamed", [f"{self.environment}/x/one", "nobody/x/two"])

    async def _intervene(self, main: str) -> None:
        await self._append(await self._batch("after"), [0], extras={0: Extra(idempotency_key="fails")})
        stopped = await self._batch("doomed")
        with suppress(Conflict):
            await self._append(stopped, range(20), runs_max=5)
        leases = await self._claim(5)
        await self.ask("stop_batch", stopped, CANCELLED, now_us=self.now_us)
        await self._settle_all(leases)
        for paused in (True, False):
            await self.ask("pause_queue", self.environment, "b", paused=paused)
        self.note(Acknowledged(main, 0, REDRIVEN))
        await self.ask("redrive", main, [3])
        await self.ask("cancel_runs", main, [3], now_us=self.now_us)
        await self.ask("redrive", main, None)
        await self._drain()

    async def _keep_up(self) -> None:
        """Move on what is overdue, and delete what is old."""
        brief, late = await self._batch("brief"), await self._batch("late", seal_timeout_ms=1_000)
        for batch_id, key in ((brief, Key("nobody", expires_us=self.now_us + SECOND_US)), (late, Key("nobody"))):
            with suppress(Conflict):
                await self._append(batch_id, range(4), key=key)
        with suppress(Conflict):
            await self.ask("seal", brief, None, now_us=self.now_us)
        self.now_us += 10 * SECOND_US
        await self.ask("take_duty", self.environment, self._session, free_us=self.now_us, now_us=self.now_us)
        await self.ask("sweep", now_us=self.now_us, rows_max=100)
        await self.ask("duties")
        await self.ask("end_duty", self.environment, self._session, free_us=self.now_us)
        await self.ask("prune", self.now_us - 3_600 * SECOND_US, batches_max=100, rows_max=1_000)

    async def _let_in(self) -> None:
        """Use API keys and rate limits, which have nothing to do with batches and get faults too."""
        name = self.environment
        digest = hashlib.sha256(name.encode()).hexdigest()
        key = ApiKey(id=f"key_{name}", environment=name, digest=digest, scopes=("read",), created_us=self.now_us)
        with suppress(Conflict):
            await self.ask("add_key", key, now_us=self.now_us)
        assert (await self.ask("find_key", digest)).id == key.id
        assert await self.ask("has_keys")
        assert len(await self.ask("keys", name)) == 1
        await self.ask("revoke_key", name, key.id, now_us=self.now_us)
        assert await self.ask("signing_key", name, b"first" * 8) == b"first" * 8
        assert await self.ask("signing_key", name, b"other" * 8) == b"first" * 8
        await self.ask("spend", name, "bucket", Bucket(capacity=10, refill_us=SECOND_US), 1, now_us=self.now_us)

    # -- short calls

    async def _start_session(self) -> str:
        session = Session(
            id=new_session_id(self.now_us),
            kind="worker",
            host=self.environment,
            pid=1,
            started_us=self.now_us,
            serves=Serving(environment=self.environment, tasks=()),
            environment=self.environment,
        )
        await self.ask("start_session", session, now_us=self.now_us)
        return session.id

    async def _batch(self, key: str, **more: Any) -> str:
        new = NewBatch(id=new_batch_id(self.now_us), environment=self.environment, key=key, task="task", **more)
        batch, _ = await self.ask("create_batch", new, now_us=self.now_us)
        return str(batch.id)

    async def _append(self, batch_id: str, indexes: Iterable[int], *, cursor: bytes | None = None, **more: Any) -> None:
        named = list(indexes)
        chunks = chunks_of(named, **more)
        appended = await self.ask("append", batch_id, chunks, now_us=self.now_us, cursor=cursor)
        for index in named:
            if index not in appended.existing:
                self.note(Acknowledged(batch_id, index))

    async def _claim(self, runs_max: int, *, session: str = "", again: bool = False) -> list[Lease]:
        self._claims_count += not again
        request = Claim(
            session_id=session or self._session,
            claim_no=self._claims_count,
            environment=self.environment,
            tasks=["task", "once"],
            queues=None,
            runs_max=runs_max,
        )
        leases: list[Lease] = await self.ask("claim", request, now_us=self.now_us)
        handed = {(lease.batch_id, index) for lease in leases for index in lease.indexes}
        assert not handed & self.completed, "a completed run was delivered again"
        return leases

    async def _settle_all(self, leases: list[Lease]) -> None:
        for lease in leases:
            await self._settle([lease])

    async def _settle(self, leases: list[Lease], numbers: Sequence[int] | None = None, part_no: int = 0) -> None:
        """Settle some runs of each lease, by their offsets in it, or all of them; together."""
        settlements, ends = [], []
        for lease in leases:
            chosen = range(len(lease.span_slots)) if numbers is None else numbers
            codes = "".join(_code(lease.indexes[number], lease) for number in chosen)
            dues = [self.now_us + SECOND_US for code in codes if code == "r"]
            keys = [f"{self.environment}/x/{lease.span_id}"] if lease.indexes[chosen[0]] % 4 == 0 else []
            span_slots = None if numbers is None else [lease.span_slots[number] for number in chosen]
            settlements.append(
                settlement_of(lease, codes, span_slots=span_slots, part_no=part_no, dues_us=dues, object_keys=keys)
            )
            ends += [(lease.batch_id, lease.indexes[number], code) for number, code in zip(chosen, codes, strict=True)]
        words = await self.ask("settle", settlements, now_us=self.now_us)
        assert set(words) <= {"settled", "recorded"}, words
        for batch_id, index, code in ends:
            if code in NAMES:
                self.note(Acknowledged(batch_id, index, NAMES[code]))
            if code == "c":
                self.completed.add((batch_id, index))


def _code(index: int, lease: Lease) -> str:
    if index % 7 == 3:
        return "f"
    if index % 5 == 1 and lease.attempt == 1 and not lease.at_most_once:
        return "r"
    return "c"

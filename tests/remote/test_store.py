"""A store kept by a server: an app, a worker and a map use it unchanged."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import Headrace, Task
from headrace.core.block import Extra
from headrace.foundation.errors import ClientFault, Conflict, NotFound, SessionEnded, StoreUnavailable
from headrace.foundation.ids import new_batch_id
from headrace.remote.connection import ServerConnection
from headrace.remote.store import RemoteStore
from headrace.runtime.clock import ManualClock
from headrace.runtime.maintenance.scheduler import Scheduler
from headrace.store.protocol import NewBatch, Schedule, Store, Tick
from headrace.store.rpc import OPERATIONS
from tests.support.http_server import KEY, LIMITS, ServerUnderTest, StoreHook, running_server
from tests.support.store_rig import StoreRig, chunks_of, settlement_of

SMALL = LIMITS.replaced(inline_bytes_max=256)


def remote_of(server: ServerUnderTest, key: str | None = KEY, *, wait_s: int = 0) -> RemoteStore:
    return RemoteStore(ServerConnection(server.server.url, key, attempts=1), LIMITS, wait_s=wait_s)


def app_of(server: ServerUnderTest, **more: Any) -> Headrace:
    app = Headrace("far", store=server.server.url, inline_bytes_max=256, poll_interval_ms=20, **more)

    @app.task
    async def double(value: int) -> int:
        return value * 2

    @app.task
    async def repeat(text: str) -> str:
        return text * 2

    @app.task
    async def broken() -> None:
        raise ValueError("no")

    return app


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", KEY)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_an_app_enqueues_maps_works_and_reads_over_a_server(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind, limits=SMALL) as server:
        app = app_of(server)
        tasks = {name: app.registry.get(name) for name in app.registry.names}
        assert set(tasks) == {"double", "repeat", "broken"}
        async with app, app.worker() as worker:
            double: Task[..., Any] = Task(app, tasks["double"])
            repeat: Task[..., Any] = Task(app, tasks["repeat"])
            broken: Task[..., Any] = Task(app, tasks["broken"])
            run = await double.enqueue(21)
            assert await run.result(timeout_s=20) == 42
            batch = await double.map(range(500))
            outcomes = [outcome.output async for outcome in batch.results(timeout_s=20)]
            assert outcomes == [2 * value for value in range(500)]
            large = await repeat.enqueue("x" * 1_000)
            assert await large.result(timeout_s=20) == "x" * 2_000, "payload and result are objects"
            failed = await broken.enqueue()
            with pytest.raises(Exception, match="ValueError: no"):
                await failed.result(timeout_s=20)
            assert worker.stats.failed == 1


async def test_every_remote_operation_is_a_store_operation_with_the_same_result(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        remote = remote_of(server)
        assert set(OPERATIONS) <= {name for name in dir(Store) if not name.startswith("_")}
        async with StoreRig(remote) as remote_store:
            remote_store.was_tampered_with = True  # its clock is not the server's
            batch_id = await remote_store.batch(4, key="k", metadata={"a": 1})
            extras = {1: Extra(tags=("t",), headers={"h": "v"}, idempotency_key="i")}
            assert (await remote_store.append(batch_id, range(4), extras=extras)).accepted_count == 4
            assert (await remote_store.append(batch_id, [3, 1], payload=lambda _: b"9")).conflicts == [1, 3]
            await remote_store.store.seal(batch_id, 4, now_us=1)
            session_id = await remote_store.session()
            (lease,) = await remote_store.claim(session_id)
            assert lease.extras[1].headers == {"h": "v"}
            held = (await remote.heartbeat(session_id, now_us=1)).leases
            assert [(held_lease.span_id, held_lease.token) for held_lease in held] == [(lease.span_id, lease.token)]
            assert await remote_store.settle(lease, "cfcc") == "settled"
            near = await server.engine.store.outcomes(batch_id, 0, 10)
            assert await remote.outcomes(batch_id, 0, 10) == near
            assert await remote.run(batch_id, 1) == await server.engine.store.run(batch_id, 1)
            assert await remote.batch(batch_id) == await server.engine.store.batch(batch_id)
            assert await remote.find_batch("other", "k") == (await remote.batch(batch_id))[0]
            assert [view.index for view in await remote.runs("default", tag="t")] == [1]
            assert (await remote.verify(batch_id)).differences == []
            assert await remote.redrive(batch_id, None) == 1
            assert [queue.name for queue in await remote.queues("default")] == ["default"]
            assert (await remote.missing(batch_id, 10), await remote.next_due_us("default", ["task"])) == ([], None)
            assert await remote.cancel_runs(batch_id, [1], now_us=1) == 1
            await remote.end_session(session_id, now_us=1)
            with pytest.raises(SessionEnded):
                await remote.heartbeat(session_id, now_us=1)


async def test_schedules_tick_once_over_the_network_in_the_key_s_environment(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        remotes = [remote_of(server), remote_of(server)]
        app = app_of(server)

        @app.task
        async def echo() -> None: ...

        app.schedule(echo, every_s=1, catch_up="all")
        for remote in remotes:
            await remote.open()
        now_us = server.engine.clock.now_us()
        engines = [replace(server.engine, store=remote, clock=ManualClock(now_us)) for remote in remotes]
        schedulers = [Scheduler(replace(engine, environment="elsewhere"), app.registry) for engine in engines]
        await asyncio.gather(*(scheduler.round() for scheduler in schedulers))
        for engine in engines:
            engine.clock.advance(5)  # type: ignore[attr-defined]  # a clock that a test holds
        await asyncio.gather(*(scheduler.round() for scheduler in schedulers))
        batches = [batch for batch, _ in await server.engine.store.batches("default")]
        assert [(batch.kind, batch.task, batch.state) for batch in batches] == [("single", "echo", "sealed")] * 5
        (stored,) = await remotes[0].schedules("elsewhere")
        assert (stored.environment, stored.ticked_us) == ("default", (now_us + 5_000_000) // 1_000_000 * 1_000_000)
        assert await server.engine.store.schedules("elsewhere") == []


async def test_a_client_cannot_tick_beyond_the_store_s_limits(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server, StoreRig(remote_of(server)) as remote_store:
        remote_store.was_tampered_with = True  # its clock is not the server's
        now_us = server.engine.clock.now_us()
        hourly = Schedule(environment="", name="s", app="app", task="task", expression="0 * * * *", zone="UTC")
        (stored,) = await remote_store.store.keep_schedules("", "app", [hourly], now_us=1)
        bad = [
            msgspec.structs.replace(hourly, expression="61 * * * *"),
            msgspec.structs.replace(hourly, zone="Europe/Atlantis"),
            msgspec.structs.replace(hourly, expression="every x s"),
            msgspec.structs.replace(hourly, name=""),
            msgspec.structs.replace(hourly, task="x" * 300),
        ]
        for schedule in bad:
            with pytest.raises(ClientFault):
                await remote_store.store.keep_schedules("", "app", [schedule], now_us=1)
        with pytest.raises(ClientFault, match="at most 1000 schedules"):
            await remote_store.store.keep_schedules("", "app", [hourly] * 1_001, now_us=1)
        (two,) = chunks_of(range(2))
        (single,) = chunks_of([0])
        (keyed,) = chunks_of([0], extras={0: Extra(idempotency_key="k")})
        new = NewBatch(id=new_batch_id(now_us), task="task")
        fine = Tick(
            name="s", expression="0 * * * *", zone="UTC", last_us=stored.last_us, until_us=stored.last_us + 1, runs=[]
        )
        for changed in (
            {"runs": [(new, two)]},
            {"runs": [(new, keyed)]},
            {"runs": [(msgspec.structs.replace(new, id="batch_x"), single)]},
            {"runs": [(new, single)] * 1_001},
            {"until_us": now_us + 2 * 3_600_000_000},
            {"until_us": stored.last_us},
            {"last_us": -1},
        ):
            with pytest.raises(ClientFault):
                await remote_store.store.tick("", msgspec.structs.replace(fine, **changed), now_us=1)
        assert await server.engine.store.schedules("default") == [stored]
        result = await remote_store.store.tick("", msgspec.structs.replace(fine, runs=[(new, single)]), now_us=1)
        assert result.is_ours


async def test_store_errors_keep_their_class_over_the_network(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        async with StoreRig(remote_of(server)) as remote_store:
            remote_store.was_tampered_with = True
            batch_id = await remote_store.batch(2)
            with pytest.raises(Conflict, match="missing"):
                await remote_store.store.seal(batch_id, None, now_us=1)
            with pytest.raises(ClientFault, match="is not in the batch"):
                await remote_store.append(batch_id, [7])
            with pytest.raises(NotFound):
                await remote_store.store.batch("batch_00000000000000000000000000")
        await server.server.stop()
        closed = RemoteStore(ServerConnection(server.server.url, KEY, attempts=1), LIMITS)
        with pytest.raises(StoreUnavailable):
            await closed.connection.send_once("GET", "/v1/about")


async def test_a_lease_is_settled_only_with_its_token(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.filled(3)
        async with StoreRig(remote_of(server)) as thief, StoreRig(remote_of(server)) as remote_store:
            thief.was_tampered_with = remote_store.was_tampered_with = True
            (lease,) = await remote_store.claim(await remote_store.session())
            assert await thief.store.settle([settlement_of(lease)], now_us=1) == ["lost"]
            assert await thief.release(lease) == "lost"
            assert await remote_store.settle(lease) == "settled"
            assert (await server.engine.store.batch(batch_id))[0].state == "completed"


async def test_an_invalid_chunk_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    import msgspec

    def broken(**changes: Any) -> Any:
        (chunk,) = chunks_of(range(3))
        return msgspec.structs.replace(chunk, **changes)

    bad = [
        broken(items=b""),
        broken(items=b"\x01\xff\xff\xff\xff"),
        broken(runs_count=2),
        broken(runs_count=0),
        broken(first_index=-1),
        broken(last_index=9),
        broken(gaps=b"\0\0\0"),
        broken(gaps=b"\1\0\0\0" * 3),
        broken(spans={}),
        broken(spans={next(iter(broken().spans)): b"\0\0\0\0"}),
        broken(extras={9: Extra(tags=("x",))}),
        broken(extras={0: Extra(link="run_00000000000000000000000000_0")}),
        broken(extras={0: Extra(object_key=f"other/batch/{'0' * 64}")}),
        broken(extras={0: Extra(tags=tuple("abcdefghijklmn"))}),
    ]
    async with running_server(tmp_path, "sqlite") as server, StoreRig(remote_of(server)) as remote_store:
        remote_store.was_tampered_with = True
        batch_id = await remote_store.batch(3)
        for chunk in bad:
            with pytest.raises(ClientFault):
                await remote_store.store.append(batch_id, [chunk], now_us=1)
        assert await remote_store.store.missing(batch_id, 10) == [(0, 3)]


async def test_another_environment_sees_none_of_the_data(tmp_path: Path) -> None:
    from headrace.http.requests.auth import new_key

    async with running_server(tmp_path, "sqlite") as server:
        batch_id = await server.filled(1)
        secret, stored_key = new_key("elsewhere", ("*",), "", 1)
        await server.engine.administration.add_key(stored_key, now_us=1)
        async with StoreRig(remote_of(server, secret)) as other:
            other.was_tampered_with = True
            assert await other.claim(await other.session(), environment="default") == []
            assert await other.store.batches("default") == []
            for operation in (
                other.store.batch(batch_id),
                other.store.seal(batch_id, 1, now_us=1),
                other.store.append(batch_id, chunks_of([0]), now_us=1),
                other.store.outcomes(batch_id, 0, 1),
                other.store.run(batch_id, 0),
                other.store.redrive(batch_id, None),
                other.store.stop_batch(batch_id, "cancelled", now_us=1),
            ):
                with pytest.raises(NotFound):
                    await operation
            with pytest.raises(Conflict):
                await other.store.create_batch(NewBatch(id=batch_id, environment="default"), now_us=1)
            batch, _ = await other.store.create_batch(NewBatch(id=new_batch_id(1), environment="default"), now_us=1)
            assert batch.environment == "elsewhere"


async def test_a_claim_waits_at_the_server_until_work_comes(tmp_path: Path) -> None:
    operation = asyncio.Event()

    async def note(_store: Store, _claim: object) -> None:
        operation.set()

    async with (
        running_server(tmp_path, "sqlite", wrap=lambda store: StoreHook(store, "claim", note)) as server,
        StoreRig(remote_of(server, wait_s=10)) as remote_store,
    ):
        remote_store.was_tampered_with = True
        claiming = asyncio.create_task(remote_store.claim(await remote_store.session()))
        await operation.wait()
        await server.filled(2)
        (lease,) = await claiming
        assert list(lease.indexes) == [0, 1]


async def test_heartbeats_have_a_thread_of_their_own_over_a_server_too(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        app = app_of(server, heartbeat_ms=20, session_timeout_ms=10_000)
        async with app, app.worker() as worker:
            session_id = worker.session.session_id
            heartbeats: set[int] = set()
            while len(heartbeats) < 4:
                heartbeats |= {
                    session.heartbeat_us
                    for session in await server.engine.maintenance.sessions()
                    if session.id == session_id
                }


def test_a_missing_extra_is_named_with_its_install_command(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules |= dict.fromkeys(('starlette', 'jwt', 'uvicorn', 'pyqwest'))\n"
    for arguments, extra in (
        (["serve"], "headrace[server]"),
        (["key", "create"], "headrace[server]"),
        (["batch", "list", "--store", "https://far.example"], "headrace[client]"),
    ):
        code = f"{blocked}from headrace.cli import main\nsys.argv = {['headrace', *arguments]!r}\nsys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, extra in done.stderr) == (2, True), (arguments, done.stderr)
    whole = f"{blocked}import headrace\nprint(headrace.Client, headrace.Headrace)"
    assert subprocess.run([sys.executable, "-c", whole], check=False, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("batch_id", ["", "../../x", "batch_x", "x" * 100_000])
async def test_a_batch_with_an_invalid_id_is_refused(batch_id: str, tmp_path: Path) -> None:
    async with running_server(tmp_path, "memory") as server:
        store = remote_of(server)
        await store.open()
        with pytest.raises(ClientFault, match="expected a batch id"):
            await store.create_batch(NewBatch(id=batch_id, environment="default"), now_us=1)
        assert await store.batches("default") == []

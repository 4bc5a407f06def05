"""Faults at every statement of every operation: a process is killed there, or its connection is lost, and no run is
lost or doubled.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from headrace.core.index_set import IndexSet
from headrace.foundation.errors import StoreUnavailable
from tests.support.failing_stores import FaultyStore, faulty_scenario, faulty_store, read_log
from tests.support.faulty_proxy import LATE, MODES, FaultyProxy
from tests.support.fork_server import Forks, forks_of
from tests.support.postgres_server import Server, server
from tests.support.store_rig import SECOND_US, START_US, fresh_schema
from tests.support.store_scenario import REDRIVEN, Acknowledged

SQL_FILES = ("fast_path", "queries", "leases", "writes", "api_keys")
"""SQL files whose statements the scenario must use."""
READS = {
    "batch", "find_batch", "batches", "missing", "outcomes", "run", "runs", "queues", "verify", "unnamed", "sessions",
    "duties", "next_due_us", "find_key", "keys", "has_keys",
}  # fmt: skip
"""Operations that change nothing: a process killed in one is as if killed after the operation before."""
EVERYWHERE = "HEADRACE_TEST_EVERYWHERE"
"""If set, a process is killed at each fault point on PostgreSQL too; else at each statement once, and at each
operation's ends.
"""
LIFE_US = 20 * SECOND_US
SCENARIO_US = 7_200 * SECOND_US


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a store on which a process can be killed."""
    return fresh_schema(tmp_path) if request.param == "postgres" else f"sqlite:///{tmp_path}/story.db"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[FaultyStore]:
    """Open a store for a block."""
    store = faulty_store(url)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def fault_points_of(url: str) -> list[str]:
    """Return all fault points of the scenario, in their order."""
    places: list[str] = []
    async with opened(url) as store:
        for number in range(2):  # the second run prunes what the first left
            places = []
            scenario = faulty_scenario(store, f"dry{number}", START_US + number * SCENARIO_US, places.append)
            await scenario.run_all()
            assert await scenario.faults() == []
    return places


async def lost_promises(store: FaultyStore, environment: str, acknowledged: list[Acknowledged]) -> list[str]:
    """Return what was acknowledged and is not stored."""
    losses: list[str] = []
    is_redriven = any(fact.state == REDRIVEN for fact in acknowledged)
    for batch_id in {fact.batch_id for fact in acknowledged if fact.state != REDRIVEN}:
        facts = [fact for fact in acknowledged if fact.batch_id == batch_id]
        states = {run.index: run.state for run in await store.runs(environment, batch_id=batch_id, limit=1_000)}
        received = IndexSet(states)
        for fact in facts:
            if fact.state == REDRIVEN:
                continue
            if fact.run_index not in received:
                losses.append(f"run {fact.run_index} of {batch_id} was appended and is gone")
            elif fact.state == "completed" and states[fact.run_index] != "completed":
                losses.append(f"run {fact.run_index} of {batch_id} was completed and is {states[fact.run_index]}")
            elif fact.state == "failed" and states[fact.run_index] != "failed" and not is_redriven:
                losses.append(f"run {fact.run_index} of {batch_id} was failed and is {states[fact.run_index]}")
    return losses


def deadly(places: list[str], url: str) -> list[str]:
    """The points at which a process is killed."""
    deadly_places = [place for place in places if place.partition(":")[0] not in READS]
    if url.startswith("sqlite") or os.environ.get(EVERYWHERE):
        return deadly_places
    by_statement = {place.partition(":")[2]: place for place in reversed(deadly_places)}
    ends = {place for place in deadly_places if place.endswith((":commit", ":answered"))}
    return [place for place in deadly_places if place in ends or place in by_statement.values()]


class Lives:
    """Processes that run one after the other in one environment, each killed at its own fault point."""

    def __init__(self, url: str, folder: Path, forks: Forks) -> None:
        self._url = url
        self._folder = folder
        self._forks = forks
        self._environments_count = 0
        self.begin()

    def begin(self) -> None:
        """Continue in a new environment."""
        self._environments_count += 1
        self.environment = f"lives{self._environments_count}"
        self.now_us = START_US + (10 + self._environments_count) * SCENARIO_US
        self.log = self._folder / self.environment
        self.log.touch()

    @property
    def acknowledged(self) -> list[Acknowledged]:
        """Return what was acknowledged to the processes so far."""
        return list(read_log(self.log))

    async def live(self, place: str) -> str:
        """Run one more process, and return how it ended."""
        self.now_us += LIFE_US
        return await self._forks.live(
            url=self._url,
            environment=self.environment,
            now_us=self.now_us,
            place=place,
            log=str(self.log),
            completed=[(fact.batch_id, fact.run_index) for fact in self.acknowledged if fact.state == "completed"],
        )


@pytest.mark.journey
@pytest.mark.timeout(300)
async def test_a_process_killed_at_any_statement_of_any_operation_loses_and_doubles_nothing(
    url: str, tmp_path: Path
) -> None:
    places = deadly(await fault_points_of(url), url)
    async with forks_of("tests.support.killed_process") as forks:
        lives = Lives(url, tmp_path, forks)
        for place in places:
            if await lives.live(place) == "ended":  # after what earlier processes left, the scenario takes another way
                lives.begin()
                assert await lives.live(place) == "killed", place
            async with opened(url) as store:
                if place.endswith((":commit", ":answered")):  # a wrong balance stays wrong, so it is checked seldom
                    scenario = faulty_scenario(store, lives.environment, lives.now_us, lambda place: None)
                    assert await scenario.faults() == [], place
                assert await lost_promises(store, lives.environment, lives.acknowledged) == [], place
        assert await lives.live("") == "ended"
        async with opened(url) as store:
            assert await faulty_scenario(store, lives.environment, lives.now_us, lambda place: None).faults() == []
            main = await store.find_batch(lives.environment, "main")
            assert main is not None
            assert main.state == "completed"


async def test_the_scenario_reaches_every_statement(url: str) -> None:
    package = "headrace.store.postgres" if url.startswith("postgresql") else "headrace.store.sqlite"
    met = {place.partition(":")[2] for place in await fault_points_of(url)}
    folder = files(package).joinpath("sql")
    texts = [file.read_text() for file in folder.iterdir() if file.name.removesuffix(".sql") in SQL_FILES]
    wanted = {name for text in texts for name in re.findall(r"^-- (\w+):", text, re.MULTILINE)}
    answered_by_the_driver = {"take_ids", "clock"}
    assert wanted - met - answered_by_the_driver == set(), (
        "tests/support/store_scenario.py should use them, or they die untested"
    )


@pytest.mark.parametrize("mode", MODES)
async def test_a_connection_lost_at_any_statement_of_any_operation_is_an_error_that_a_repeat_resolves(
    mode: str, tmp_path: Path
) -> None:
    async with FaultyProxy(server().dsn) as wire:
        url = fresh_schema(tmp_path, wire.dsn)
        places = [place for place in await fault_points_of(url) if not place.endswith(":answered")]
        wire.injected_count = 0
        async with opened(url) as store:
            acknowledged: list[Acknowledged] = []
            injected: list[str] = []

            def inject(place: str) -> None:
                if not place.endswith(":answered"):
                    injected.append(place)
                    wire.inject(mode)

            scenario = faulty_scenario(store, "cut", START_US + 10 * SCENARIO_US, inject, note=acknowledged.append)
            await scenario.run_all()
            assert wire.injected_count == len(injected) >= len(places) - 20
            if mode == LATE:
                assert scenario.failures == []
            else:
                assert len(scenario.failures) >= len(injected) * 0.95
                assert all("did not answer" in error.message and error.retryable for error in scenario.failures)
            assert await scenario.faults() == []
            assert await lost_promises(store, "cut", acknowledged) == []
            batch = await store.find_batch("cut", "main")
            assert batch is not None
            assert batch.state == "completed"


# -- errors that the server makes


ERRORS: list[tuple[type[asyncpg.PostgresError], str, bool]] = [
    (asyncpg.SerializationError, "", True),
    (asyncpg.DeadlockDetectedError, "", True),
    (asyncpg.AdminShutdownError, "is shutting down", False),
    (asyncpg.CannotConnectNowError, "starting up", False),
    (asyncpg.DiskFullError, "has a full disk", False),
    (asyncpg.OutOfMemoryError, "ran out of memory", False),
    (asyncpg.QueryCanceledError, "statement_timeout", False),
    (asyncpg.LockNotAvailableError, "another transaction", False),
]


@pytest.mark.parametrize(("error", "message", "is_silent"), ERRORS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_server_error_at_any_statement_rolls_the_operation_back(
    error: type[asyncpg.PostgresError], message: str, is_silent: bool, tmp_path: Path
) -> None:
    async with opened(fresh_schema(tmp_path)) as store:
        acknowledged: list[Acknowledged] = []

        def inject(place: str) -> None:
            if not place.endswith((":answered", ":begin")):
                raise error(f"injected at {place}")

        scenario = faulty_scenario(store, "errors", START_US, inject, note=acknowledged.append)
        await scenario.run_all()
        if is_silent:  # repeated at once and not reported, unless all attempts fail
            assert all("several times" in str(failure) for failure in scenario.failures)
        else:
            assert len(scenario.failures) > 150
            assert all(message in str(failure) for failure in scenario.failures)
        assert all(isinstance(failure, StoreUnavailable) for failure in scenario.failures)
        assert await scenario.faults() == []
        assert await lost_promises(store, "errors", acknowledged) == []


async def test_concurrent_scenarios_succeed_though_the_server_crashes_twice(tmp_path: Path) -> None:
    own_server = Server()
    try:
        async with opened(fresh_schema(tmp_path, own_server.dsn)) as store:
            names = [f"many{number}" for number in range(4)]
            acknowledged: dict[str, list[Acknowledged]] = {name: [] for name in names}
            restarts = [asyncio.Event(), asyncio.Event()]
            up = [asyncio.Event(), asyncio.Event()]
            places_count = 0

            def at(place: str) -> None:
                nonlocal places_count
                places_count += 1
                for number, count in enumerate((200, 600)):
                    if places_count == count:
                        restarts[number].set()

            async def restart() -> None:
                for down, back in zip(restarts, up, strict=True):
                    await down.wait()
                    await asyncio.to_thread(own_server.stop, "immediate")
                    await asyncio.to_thread(own_server.start)
                    back.set()

            async def until_up() -> None:
                for down, back in zip(restarts, up, strict=True):
                    if down.is_set():
                        await back.wait()

            stories = [
                faulty_scenario(store, name, START_US, at, note=acknowledged[name].append, pause=until_up)
                for name in names
            ]
            restarting = asyncio.create_task(restart())
            await asyncio.gather(*(scenario.run_all() for scenario in stories), restarting)
            assert sum(len(scenario.failures) for scenario in stories) >= 2
            for scenario in stories:
                assert await scenario.faults() == []
                assert await lost_promises(store, scenario.environment, acknowledged[scenario.environment]) == []
    finally:
        own_server.remove()

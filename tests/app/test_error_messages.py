"""Mistakes that a new user makes: each error says what was given, what was expected, and what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from headrace import Conflict, Headrace, HeadraceError, InvalidInput, InvalidSetting, Retry, RunFailed, StoreUnavailable
from headrace.testing import in_database_sync, in_memory_sync
from tests.cli.conftest import Shell
from tests.cli.conftest import shell as shell

PASSWORD = "swordfish"


def misspelt_option() -> None:
    Headrace("app").task(timout_s=3)  # type: ignore[call-overload]  # the mistake


def positional_name() -> None:
    Headrace("app").task("my name")  # type: ignore[call-overload]  # the mistake


def two_functions() -> None:
    Headrace("app").task(print, print)  # type: ignore[call-overload]  # the mistake


def timeout_as_text() -> None:
    Headrace("app").task(timeout_s="30")(timeout_as_text)  # type: ignore[call-overload]  # the mistake


def small_task() -> Any:
    return Headrace("app").task(abs)


def enter(context: AbstractContextManager[Any]) -> None:
    with context:
        pass


MISTAKES: list[tuple[Callable[[], Any], str, str]] = [
    (
        misspelt_option,
        "app.task() has no option 'timout_s'",
        "did you mean timeout_s? its options: name, retry, timeout_s",
    ),
    (positional_name, "app.task() expected a function, got 'my name'", "name='…'"),
    (two_functions, "expected one function or options by name, got 2 positional arguments", "@app.task(timeout_s=30)"),
    (timeout_as_text, "timeout_s: expected a number of more than 0 and at most 31536000, got '30'", "timeout_s=30"),
    (lambda: Headrace("app", flush_sise=5), "Headrace() has no setting 'flush_sise'", "did you mean flush_size?"),
    (lambda: Headrace("app", zebra=3), "Headrace() has no setting 'zebra'", "docs/settings.md describes all settings"),
    (lambda: Headrace(""), "Headrace(): name: expected a name of 1 to 200 printable characters, got ''", "my-app"),
    (lambda: Headrace(5), "Headrace(): name: expected a name of 1 to 200", "my-app"),  # type: ignore[arg-type]  # the mistake
    (
        lambda: Headrace("app", store=Path("x.db")),  # type: ignore[arg-type]  # the mistake
        "store: expected a URL, got PosixPath('x.db')",
        'store="sqlite:///x.db"',
    ),
    (lambda: Retry(max=3), "Retry() has no option 'max'", "its options: attempts, backoff, delay_s"),  # type: ignore[call-arg]  # the mistake
    (lambda: Retry(atempts=3), "Retry() has no option 'atempts'", "did you mean attempts?"),  # type: ignore[call-arg]  # the mistake
    (lambda: Retry(3), "Retry(): too many positional arguments", "attempts=…"),  # type: ignore[call-arg]  # the mistake
    (lambda: small_task().options(prio=3), "task.options() has no option 'prio'", "did you mean priority?"),
    (lambda: Headrace("app").worker(queue=["a"]), "app.worker() has no option 'queue'", "did you mean queues?"),  # type: ignore[call-arg]  # the mistake
    (
        lambda: Headrace("app").schedule(small_task(), every=5),  # type: ignore[call-overload]  # the mistake
        "app.schedule() has no option 'every'",
        "did you mean every_s?",
    ),
    (
        lambda: Headrace("app").schedule("* * * * *", timezone="UTC"),  # type: ignore[call-overload]  # the mistake
        "app.schedule() has no option 'timezone'",
        "its options: every_s, tz, name, catch_up",
    ),
    (
        lambda: Headrace("app").endpoint("x", url="https://x.example", secrets="a"),  # type: ignore[call-arg]  # the mistake
        "app.endpoint() has no option 'secrets'",
        "did you mean secret?",
    ),
    (
        lambda: Headrace("app").endpoint("x", url="https://x.example"),  # type: ignore[call-arg]  # the mistake
        "app.endpoint(): missing a required",
        "secret=…",
    ),
    (
        lambda: Headrace("app").indexer("x", source=[], entity=[]),  # type: ignore[call-arg, arg-type]  # the mistake
        "app.indexer() has no option 'entity'",
        "did you mean entities?",
    ),
    (lambda: small_task().map([], key="a"), "task.map() has no option 'key'", "its options: batch_key"),
    (
        lambda: small_task().options(priority=1).map_sync([], batchkey="a"),
        "task.map_sync() has no option 'batchkey'",
        "did you mean batch_key?",
    ),
    (
        lambda: enter(in_memory_sync(Headrace("app"), crash_max=1)),
        "in_memory() has no limit 'crash_max'",
        "crashes_max",
    ),
    (lambda: enter(in_memory_sync(Headrace("app"), crashes_max=0)), "in_memory(): crashes_max: expected", ""),
    (
        lambda: enter(in_database_sync(Headrace("app"), crash_max=1)),
        "in_database() has no setting 'crash_max'",
        "crashes_max",
    ),
    (lambda: Headrace("app", api_key="short"), "api_key: expected 8 to 4096 printable characters, got 5", ""),
    (lambda: Headrace("app", api_key=PASSWORD + "\n"), "got 10, some of them not printable", ""),
    (lambda: Headrace("app", flush_size=0), "Headrace(): flush_size: expected an integer from 1", ""),
    (lambda: Headrace("app", store="nonsense"), "store: expected a URL, got 'nonsense'", "sqlite:///relative/file.db"),
    (lambda: Headrace("app", store=f"ada:{PASSWORD}@host"), "store: expected a URL", "postgresql://user@host/database"),
]


@pytest.mark.parametrize(("make", "message", "hint"), MISTAKES)
def test_a_mistake_in_a_declaration_is_refused_at_once(make: Callable[[], Any], message: str, hint: str) -> None:
    with pytest.raises(InvalidSetting) as raised:
        make()
    assert message in raised.value.message
    assert hint in raised.value.hint
    assert "TaskSpec" not in str(raised.value)
    assert len(raised.value.hint) < 300
    assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    ("store", "message", "hint"),
    [
        (f"mysql://ada:{PASSWORD}@host/db", "unknown kind of store 'mysql'", "postgresql://user@host/database"),
        ("sqlite:///no/such/file.db", "its directory no/such does not exist", "mkdir -p no/such"),
        (f"postgresql://ada:{PASSWORD}@127.0.0.1:1/db", "127.0.0.1:1", "running"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1", "running"),
        ("sqlite://host/file.db", "does not name a file", "sqlite:///relative.db"),
    ],
)
def test_a_store_that_can_t_be_opened_is_named_without_its_password(
    store: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = Headrace("app", store=store, objects=str(tmp_path / "objects"), objects_shared=True)
    with pytest.raises(HeadraceError) as raised:
        app.batches_sync()
    app.close_sync()
    assert message in str(raised.value)
    assert hint in raised.value.hint
    assert PASSWORD not in str(raised.value)


def test_wrong_arguments_are_refused_at_the_call_with_the_signature() -> None:
    app = Headrace("app", store="memory://")

    @app.task
    async def add(a: int, b: int = 1) -> int:
        return a + b

    anything: Any = add
    with pytest.raises(InvalidInput, match="called with wrong arguments: too many positional arguments") as raised:
        anything.enqueue_sync(1, 2, 3)
    assert "(a: int, b: int = 1)" in raised.value.hint
    with pytest.raises(InvalidInput, match=r"Expected `int`, got `str` - at `\$.a`"):
        anything.enqueue_sync("x")
    with pytest.raises(InvalidInput, match="can't be encoded as JSON") as raised:
        anything.enqueue_sync(object())
    assert "dataclasses, msgspec structs" in raised.value.hint
    app.close_sync()


async def test_a_text_in_place_of_a_list_is_refused() -> None:
    app = Headrace("app", store="memory://")

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    anything: Any = double
    async with app:
        with pytest.raises(InvalidInput, match="tags: expected a list of names, got 'urgent'") as raised:
            double.options(tags="urgent")
        assert "tags=['urgent']" in raised.value.hint
        for option in ("tasks", "queues"):
            with pytest.raises(InvalidInput, match=f"{option}: expected a list of names, got 'default'"):
                async with app.worker(**{option: "default"}):  # type: ignore[arg-type]  # the mistake
                    pass
        with pytest.raises(InvalidSetting, match="concurrency: expected an integer from 1 to 100000"):
            async with app.worker(concurrency=0):
                pass
        for items, kind in (("abc", "a str"), (b"abc", "a bytes"), ({"n": 1}, "a dict"), (5, "an int")):
            for mapped in (anything, anything.options(priority=1)):
                with pytest.raises(InvalidInput, match=f"expected an iterable of items, got {kind}") as raised:
                    await mapped.map(items)
                assert "[…]" in raised.value.hint
        assert await app.batches() == []


async def test_a_batch_key_of_another_map_is_named_with_both_tasks_and_both_counts() -> None:
    app = Headrace("app", store="memory://")

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    @app.task
    async def slow(n: int) -> int:
        return n

    async with app:
        batch = await double.map(range(1_000), batch_key="d1")
        with pytest.raises(Conflict, match="batch_key 'd1' names a batch of the task 'double', got the task 'slow'"):
            await slow.map(range(1_000), batch_key="d1")
        for items, got in ((range(500), "500"), (range(1_001), "1,001"), (iter(range(2_000)), "more")):
            with pytest.raises(Conflict, match=f"batch_key 'd1' names a batch of 1,000 items, got {got}") as raised:
                await double.map(items, batch_key="d1")
            assert "another batch_key" in raised.value.hint
        assert (await double.map(range(1_000), batch_key="d1")).id == batch.id
        assert (await batch.view()).expected == 1_000


async def test_ids_of_another_form_or_type_are_refused() -> None:
    app = Headrace("app", store="memory://")
    anything: Any = app
    async with app:
        for wrong in ("d1", 5, None):
            with pytest.raises(InvalidInput, match=f"expected a batch id such as batch_…, got {wrong!r}") as raised:
                await anything.get_batch(wrong)
            assert "`headrace batch show KEY`" in raised.value.hint
            with pytest.raises(InvalidInput, match=f"expected a run id such as run_…_0, got {wrong!r}"):
                await anything.get_run(wrong)


async def test_a_result_that_can_t_be_stored_says_what_can(tmp_path: Path) -> None:
    app = Headrace("app", store=f"sqlite:///{tmp_path / 'headrace.db'}")

    @app.task
    async def returns_an_object() -> object:
        return object()

    async with app, app.worker():
        run = await returns_an_object.enqueue()
        with pytest.raises(RunFailed, match=r"can't be encoded as JSON.*hint: return plain values, dataclasses"):
            await run.result(timeout_s=30)


def test_a_directory_that_takes_no_files_is_named(shell: Shell) -> None:
    ran = shell("migrate", "--store", "sqlite:////proc/x.db")
    assert (ran.code, "/proc/x.db" in ran.err, "hint:" in ran.err) == (1, True, True), ran.err


def test_a_file_that_can_t_be_written_is_named(shell: Shell) -> None:
    shell.items(1)
    (shell.place / "folder").mkdir()
    ran = shell("map", "tasks.py:double", "in.ndjson", "-o", "folder")
    assert (ran.code, "folder can't be written: Is a directory" in ran.err) == (2, True)
    ran = shell("migrate", "--store", "sqlite:///folder")
    assert (ran.code, "folder" in ran.err, "hint:" in ran.err) == (1, True, True)
    ran = shell("demo", "--dir", "tasks.py")
    assert (ran.code, "can't write to tasks.py" in ran.err) == (2, True)


def test_a_sqlite_file_of_another_program_is_refused_by_name(shell: Shell) -> None:
    with sqlite3.connect("foreign.db") as connection:
        connection.execute("CREATE TABLE batch (baked_at TEXT)")
    connection.close()
    ran = shell("batch", "list", "--store", "sqlite:///foreign.db")
    assert ran.code != 0
    assert "expected the tables of Headrace in foreign.db, got none" in ran.err
    assert "name another store with --store" in ran.err


def test_enqueueing_into_a_database_without_headrace_is_refused(tmp_path: Path) -> None:
    app = Headrace("app", store=f"sqlite:///{tmp_path / 'headrace.db'}")

    @app.task
    def task(n: int) -> int:
        return n

    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE mine (n INTEGER)")
        connection.execute("INSERT INTO mine VALUES (1)")
        with pytest.raises(InvalidInput, match="has no Headrace tables") as raised:
            task.enqueue_in_sync(connection, 1)
    connection.close()
    assert raised.value.hint
    app.close_sync()


def test_indexers_on_a_store_without_tables_and_servers_that_are_none_are_explained(shell: Shell) -> None:
    assert "no indexers" in shell("index", "status", "--store", "memory://").out
    ran = shell("batch", "list", "--server", "ftp://x")
    assert (ran.code, "expected an http or https URL for --server, got 'ftp://x'" in ran.err) == (2, True)
    ran = shell("batch", "list", "--server", "http://127.0.0.1:1", "--store", "memory://")
    assert "expected --store or --server, got both" in ran.err


def test_errors_of_waiting_are_both_ours_and_the_language_s() -> None:
    assert issubclass(StoreUnavailable, HeadraceError)
    from headrace import WaitTimeout

    error = WaitTimeout("the run has not ended", hint="wait longer")
    assert isinstance(error, TimeoutError)
    assert str(error) == "the run has not ended\n  hint: wait longer"

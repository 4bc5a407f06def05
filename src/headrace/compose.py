"""Composition root: the only module that chooses the store, object store and clock of a process."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from headrace.foundation.errors import InvalidInput, InvalidSetting, StoreUnavailable
from headrace.foundation.limits import Limits
from headrace.foundation.settings import STORE_URLS, Settings, hidden
from headrace.runtime.clock import Clock, SystemClock
from headrace.runtime.engine import Engine
from headrace.runtime.maintenance.store_copy import StoreCopy
from headrace.runtime.outage import Outage
from headrace.runtime.wakeup import Wakeup
from headrace.store.caller_transaction import CallerTransaction, JoinsTransactions
from headrace.store.entities.protocol import EntityStore
from headrace.store.notifications import CANCELLED, RECORDED, WORK, Notifier
from headrace.store.object_store import is_of_one_machine, open_payloads
from headrace.store.payloads import PayloadStore, shown_url
from headrace.store.protocol import Store
from headrace.store.reachability import Reachability

SQLITE: Final = "sqlite"
MEMORY: Final = "memory"
POSTGRES: Final = ("postgresql", "postgres")
SERVER: Final = ("http", "https")


async def open_engine(settings: Settings, *, migrates: bool | None = None) -> Engine:
    """Open the store, the object store and the clock of the settings.

    `migrates`: True creates or upgrades the schema of the database. False creates and changes nothing, and raises
    `SchemaOutdated` where the schema is not current. The default is what the setting `migrate` says. Raises
    `InvalidSetting` for an unknown kind of store, and `StoreUnavailable` and `StoreBroken` as the store does.
    """
    url = urlsplit(settings.store)
    if migrates is None:
        migrates = settings.migrate == "auto"
    if url.scheme == MEMORY:
        return await memory_engine(settings.limits, SystemClock(), environment=settings.environment)
    if url.scheme in POSTGRES:
        return await _postgres_engine(settings, migrates=migrates)
    if url.scheme in SERVER:
        return await _remote_engine(settings)
    if url.scheme != SQLITE:
        raise InvalidSetting(
            f"unknown kind of store {url.scheme!r} in the URL {hidden('store', settings.store)!r}",
            hint=f"write {STORE_URLS}",
        )
    path = sqlite_path(settings.store)
    if not path.parent.is_dir():
        raise StoreUnavailable(
            f"can't open the database {path}: its directory {path.parent} does not exist",
            hint=f"create the directory: mkdir -p {path.parent}",
        )
    from headrace.store.sqlite import CommitWatcher, SqliteStore
    from headrace.store.sqlite.entities import SqliteEntities

    store = SqliteStore(path, settings.limits, migrates=migrates)
    await store.open()
    try:
        objects = settings.objects or str(objects_directory(path).resolve())
        payloads = open_payloads(objects)
    except BaseException:
        await store.close()
        raise
    return _shared_engine(
        settings,
        store,
        payloads,
        SystemClock(),
        CommitWatcher(path),
        SqliteEntities(store, settings.limits.batch_runs_max),
        live_directory=marks_directory(path),
        reachability=store.reachability,
    )


async def _postgres_engine(settings: Settings, *, migrates: bool) -> Engine:
    try:
        from headrace.store.postgres import PostgresNotifier, PostgresStore
        from headrace.store.postgres.entities import PostgresEntities
        from headrace.store.postgres.objects import CONCURRENCY as OBJECTS_CONCURRENCY
        from headrace.store.postgres.objects import DatabaseObjects
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"a PostgreSQL store requires the package {error.name}", hint="pip install 'headrace[postgres]'"
        ) from None
    _check_objects(settings)
    store = PostgresStore(settings.store, settings.limits, direct_url=settings.direct_dsn, migrates=migrates)
    await store.open()
    try:
        # clocks of machines may differ by minutes; each heartbeat corrects this one
        clock = SystemClock(await store.clock_us())
    except BaseException:
        await store.close()
        raise
    payloads = (
        PayloadStore(
            DatabaseObjects(store, bytes_max=settings.limits.database_object_bytes_max),
            url=hidden("store", settings.store),
            concurrency=OBJECTS_CONCURRENCY,
        )
        if settings.objects is None
        else open_payloads(settings.objects)
    )
    notifier = PostgresNotifier(store.direct_address or store.address, store.address.schema, store.reachability)
    entities = PostgresEntities(store, settings.limits.batch_runs_max)
    place = _machine_directory(store.identity)
    return _shared_engine(
        settings, store, payloads, clock, notifier, entities, live_directory=place, reachability=store.reachability
    )


def _check_objects(settings: Settings) -> None:
    """Raise `InvalidSetting` for an object store that other machines of a PostgreSQL store would not see."""
    limits = settings.limits
    if settings.objects is None:
        if limits.item_bytes_max > limits.database_object_bytes_max:
            raise InvalidSetting(
                f"item_bytes_max ({limits.item_bytes_max}) is more than the database takes, "
                f"database_object_bytes_max ({limits.database_object_bytes_max})",
                hint="lower the first, raise the second, or configure an object store: objects = s3://bucket/prefix",
            )
    elif is_of_one_machine(settings.objects) and not settings.objects_shared:
        raise InvalidSetting(
            f"objects: expected an object store that all machines of a PostgreSQL store reach, got "
            f"{shown_url(settings.objects)!r}, which is of this machine",
            hint="leave `objects` unset to keep large payloads in the database, name a bucket (s3://bucket/prefix), or "
            "set objects_shared=true if all machines share the directory",
        )


def _shared_engine(
    settings: Settings,
    store: Store,
    payloads: PayloadStore,
    clock: SystemClock,
    notifier: Notifier,
    entities: EntityStore,
    *,
    live_directory: Path | None,
    reachability: Reachability,
) -> Engine:
    """Make an engine on a store that other processes use too."""
    return Engine(
        store=store,
        payloads=payloads,
        clock=clock,
        limits=settings.limits,
        environment=settings.environment,
        live_directory=live_directory,
        beats_beside=True,
        wakeup=Wakeup(notifier, WORK),
        recorded=Wakeup(notifier, RECORDED),
        cancelled=Wakeup(notifier, CANCELLED),
        notifier=notifier,
        entities=entities,
        outage=Outage(reachability),
    )


def joined(engine: Engine, connection: Any) -> CallerTransaction:
    """Return the engine's statements on a connection of the caller, inside the transaction that is open on it.

    Raises `InvalidInput` for a store without transactions.
    """
    store = engine.store
    if not isinstance(store, JoinsTransactions):
        raise InvalidInput(
            f"expected a store with transactions, got {type(store).__name__}, which has no transactions",
            hint="use a SQLite file or PostgreSQL; in a test, `headrace.testing.in_database`",
        )
    return store.joined(connection)


def mover(source: Engine, target: Engine) -> StoreCopy:
    """Return the copier of one store into another. Raises `InvalidInput` for any but SQLite into PostgreSQL."""
    from headrace.store.sqlite import SqliteStore

    if not isinstance(source.store, SqliteStore) or type(target.store).__name__ != "PostgresStore":
        raise InvalidInput(
            f"expected a move from SQLite to PostgreSQL, got {type(source.store).__name__} "
            f"to {type(target.store).__name__}",
            hint="headrace move sqlite:///its/file.db postgresql://user@host/database; between PostgreSQL servers use "
            "pg_dump or replication, and a SQLite file is copied as a file",
        )
    from headrace.store.postgres import PostgresCopyTarget, PostgresStore
    from headrace.store.sqlite import SqliteCopySource

    assert isinstance(target.store, PostgresStore)
    return StoreCopy(
        source, target, copy_source=SqliteCopySource(source.store), copy_target=PostgresCopyTarget(target.store)
    )


def _machine_directory(identity: str) -> Path | None:
    """Return the directory in which the processes of one user on this machine keep in-flight marks for a remote store.

    None when other users could write to it. Then crashes are seen by missing heartbeats only, and all runs of a crashed
    process are suspects.
    """
    directory = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"headrace-{os.getuid()}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return directory / name


async def _remote_engine(settings: Settings) -> Engine:
    """Make the engine of a server: its environment is that of the key, its time the server's."""
    from headrace.remote.connection import ServerConnection
    from headrace.remote.store import RemotePayloads, RemoteStore

    connection = ServerConnection(settings.store, settings.api_key)
    store = RemoteStore(connection, settings.limits)
    await store.open()
    assert store.about is not None
    clock = SystemClock()
    clock.anchor(store.about.now_us)
    return Engine(
        store=store,
        payloads=RemotePayloads(connection),
        clock=clock,
        limits=settings.limits,
        environment=store.about.environment,
        live_directory=None,
        beats_beside=True,
        wakeup=Wakeup(),
        outage=store.outage,
    )


async def memory_engine(limits: Limits, clock: Clock, *, environment: str = "default") -> Engine:
    """Make an engine in memory: for tests, and for trying things out."""
    from headrace.store.memory import MemoryEntities, MemoryStore

    store = MemoryStore(limits)
    await store.open()
    return Engine(
        store=store,
        payloads=open_payloads("memory://"),
        clock=clock,
        limits=limits,
        environment=environment,
        live_directory=None,
        beats_beside=False,
        wakeup=Wakeup(),
        entities=MemoryEntities(store),
    )


def sqlite_path(url: str) -> Path:
    """Return the file of `sqlite:///relative` or `sqlite:////absolute`. Raises `InvalidSetting`."""
    parts = urlsplit(url)
    if parts.netloc or not parts.path.strip("/") or parts.query or parts.fragment:
        raise InvalidSetting(
            f"{url!r} does not name a file", hint="write sqlite:///relative.db or sqlite:////absolute.db"
        )
    return Path(unquote(parts.path)[1:])


def objects_directory(path: Path) -> Path:
    """Return the directory of the payloads of a SQLite file, where no object store is configured."""
    return path.with_name(path.name + ".objects")


def marks_directory(path: Path) -> Path:
    """Return the directory of the in-flight marks of the processes that have a SQLite file open."""
    return path.with_name(path.name + ".live")

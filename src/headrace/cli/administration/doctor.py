"""`headrace doctor`: check everything that batches depend on.

A check is a function that returns what it saw, or raises `CheckFailed` with the problem and what to do. A failed check
does not keep others from running.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from headrace.cli.administration.checks import OTHERS, CheckFailed, CheckNoted, Finding
from headrace.cli.administration.exposure import exposure, secrets
from headrace.cli.invocation.opening import (
    JsonOption,
    ServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
    shown_store,
)
from headrace.cli.invocation.printing import counted, duration, say, say_json, size
from headrace.core.serving import stalled_clause
from headrace.foundation.errors import HeadraceError, StoreBroken

if TYPE_CHECKING:
    from headrace.foundation.settings import Settings
    from headrace.runtime.engine import Engine
    from headrace.store.protocol import Session

CHECK_FAILED: Final = 1
CLIENT_CHECKS: Final = ("version", "exposure", "workers", "batches")
CLOCK_OFFSET_MAX_S: Final = 2.0
FREE_BYTES_MIN: Final = 512 * 1024 * 1024
FULL_AFTER_S: Final = 60
STUCK_AFTER_S: Final = 3_600
DELAY_FAR_S: Final = 7 * 86_400
PAGE_BATCHES: Final = 200


def command(
    app: Annotated[
        str,
        typer.Argument(metavar="[MODULE_OR_FILE:APP]", help="The app whose store to check. Default: none."),
    ] = "",
    store: StoreOption = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Check the store, its durability, clock, disk, objects, sessions and access, and find stuck batches.

    With --server, check what a client can see. Exit code 1 if any check fails.
    """
    from headrace.cli.invocation.target_loader import load_app

    settings = settings_of(load_app(app) if app else None, store=place_of(store, server))
    findings = run_async(examine(settings))
    all_ok = all(finding.ok for finding in findings)
    if json:
        say_json({"ok": all_ok, "checks": [finding._asdict() for finding in findings]})
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check:<{width}}  {finding.detail}")
            if finding.hint:
                say(f"{'':<6}{'':<{width}}  hint: {finding.hint}")
    if not all_ok:
        raise typer.Exit(CHECK_FAILED)


async def examine(settings: Settings) -> list[Finding]:
    """Run every check; those that need an open store are left out when it can't be opened."""
    directory = _directory_of(settings)
    findings: list[Finding] = []
    try:
        async with opened(settings, must_exist=True) as engine:
            findings.append(Finding("store", ok=True, detail=f"{shown_store(settings)} answers"))
            checks: list[tuple[str, Callable[[], Awaitable[str]]]] = [
                ("version", lambda: version(engine)),
                ("durability", lambda: durability(engine)),
                ("clock", lambda: clock(engine, directory)),
                ("disk", lambda: disk(directory)),
                ("access", lambda: access(settings)),
                ("secrets", lambda: secrets(settings)),
                ("exposure", lambda: exposure(engine, settings)),
                ("objects", lambda: objects(engine, settings)),
                ("sessions", lambda: sessions(engine)),
                ("workers", lambda: workers(engine)),
                ("batches", lambda: batches(engine)),
            ]
            if not engine.is_maintained_here:  # a server keeps the store: only its operator can check the others
                checks = [(name, check) for name, check in checks if name in CLIENT_CHECKS]
            for name, check in checks:
                findings.append(await _run_check(name, check))
    except HeadraceError as error:
        is_version = isinstance(error, StoreBroken) and "schema version" in error.message
        findings.append(Finding("version" if is_version else "store", ok=False, detail=error.message, hint=error.hint))
        if directory is not None and directory.is_dir():
            findings.append(await _run_check("disk", lambda: disk(directory)))
    return findings


async def _run_check(name: str, check: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name, ok=True, detail=await check())
    except CheckFailed as failure:
        return Finding(name, ok=isinstance(failure, CheckNoted), detail=str(failure), hint=failure.hint)
    except HeadraceError as error:
        return Finding(name, ok=False, detail=error.message, hint=error.hint)


async def version(engine: Engine) -> str:
    """Return the versions of Headrace, the store and its schema."""
    from headrace import __version__

    report = await engine.store.check()
    schema = report.get("schema_version")
    if schema == 0:
        raise CheckFailed("the database has no schema yet", "run `headrace migrate`")
    versions = ", ".join(
        f"{name.removesuffix('_version')} {value}" for name, value in report.items() if "version" in name
    )
    return f"headrace {__version__}{', ' if versions else ''}{versions}"


async def durability(engine: Engine) -> str:
    """Check that acknowledged writes survive a power failure."""
    report = await engine.store.check()
    if report.get("store") == "postgres":
        fsync, commit = str(report.get("fsync")), str(report.get("synchronous_commit"))
        if fsync != "on" or commit == "off":
            raise CheckFailed(
                f"fsync is {fsync} and synchronous_commit is {commit}: a power failure may lose acknowledged runs",
                "turn both on, on the server or for this user",
            )
        return f"fsync {fsync}, synchronous_commit {commit}"
    if report.get("store") != "sqlite":
        return f"{report.get('store')}: data ends with the process"
    mode, synchronous = str(report.get("journal_mode")), str(report.get("synchronous"))
    if mode != "wal" or synchronous not in ("full", "extra"):
        raise CheckFailed(
            f"journal_mode is {mode} and synchronous is {synchronous}: a power failure may lose acknowledged runs",
            "keep the file on a local disk: network shares do not support WAL and full syncs",
        )
    return f"journal_mode {mode}, synchronous {synchronous}"


async def clock(engine: Engine, directory: Path | None) -> str:
    """Compare the clock of this process with that of the store's disk."""
    if directory is None:
        return "no disk to compare with"
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".headrace-doctor-") as file:
        now_us = engine.clock.now_us()
        os.utime(file.name)
        offset_s = (os.fstat(file.fileno()).st_mtime_ns // 1_000 - now_us) / 1_000_000
    if abs(offset_s) > CLOCK_OFFSET_MAX_S:
        raise CheckFailed(
            f"the clocks of this process and of the disk differ by {duration(abs(offset_s))}",
            "set the clock of this machine by NTP, or that of the server with the disk",
        )
    return f"{abs(offset_s) * 1_000:.1f} ms from the disk's clock"


async def disk(directory: Path | None) -> str:
    """Check the free space on the store's disk."""
    if directory is None:
        return "no disk is used"
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < FREE_BYTES_MIN:
        raise CheckFailed(
            f"only {size(free_bytes)} are free on the store's disk",
            "free some space, or run `headrace prune`; on a full disk nothing is lost, but everything stops",
        )
    return f"{size(free_bytes)} free"


async def access(settings: Settings) -> str:
    """Find files of the store that other users of this machine may read: they hold payloads and keys."""
    if urlsplit(settings.store).scheme != "sqlite":
        return "no file holds data"
    from headrace.compose import marks_directory, objects_directory, sqlite_path

    path = sqlite_path(settings.store)
    wide = [
        f"{part} ({part.stat().st_mode & 0o777:04o})"
        for part in (path, objects_directory(path), marks_directory(path))
        if part.exists() and part.stat().st_mode & OTHERS
    ]
    if wide:
        raise CheckNoted(
            f"other users of this machine may read {', '.join(wide)}",
            "chmod go-rwx, unless they should",
        )
    return "only this user may read the store's files"


async def objects(engine: Engine, settings: Settings) -> str:
    """Write one object, read it in another process, list and remove it."""
    from headrace.cli.administration.object_probe import read_elsewhere
    from headrace.store.payloads import shown_url

    place = shown_url(engine.payloads.url)
    key = await engine.payloads.put_probe()
    try:
        await engine.payloads.get(key)
        problem = await read_elsewhere(settings, key)
    finally:
        await engine.payloads.delete_probe(key)
    if problem:
        raise CheckFailed(
            f"another process could not read an object that this one wrote in {place}: {problem}",
            "name an object store that all processes reach: a bucket, or an absolute directory on a shared disk",
        )
    return f"wrote one in {place}, read it in another process, listed and removed it"


async def sessions(engine: Engine) -> str:
    """Find sessions without heartbeats: their leases wait for a worker that recovers them."""
    live_sessions = await engine.maintenance.sessions()
    now_us = engine.clock.now_us()
    silent = [
        session
        for session in live_sessions
        if max(session.heartbeat_us, session.started_us) + engine.limits.session_timeout_ms * 1_000 < now_us
    ]
    if silent:
        named = ", ".join(f"{session.kind} {session.pid} on {session.host}" for session in silent[:3])
        silent_s = (now_us - max(silent[0].heartbeat_us, silent[0].started_us)) / 1_000_000
        raise CheckFailed(
            f"{counted(len(silent), 'session')} without heartbeats, the first for {duration(silent_s)}: {named}",
            "any worker or `headrace map` on this store recovers their leases",
        )
    return f"{counted(len(live_sessions), 'live session')}"


async def workers(engine: Engine) -> str:
    """Find waiting runs that no live worker takes, and workers whose runs take all slots and seem to wait."""
    now_us = engine.clock.now_us()
    lanes = await engine.store.stalled_lanes(engine.environment, now_us=now_us)
    stalled = [lane for lane in lanes if lane.reason != "paused"]
    if stalled:
        named = "; ".join(stalled_clause(lane.queue, lane.task, lane.reason) for lane in stalled[:3])
        more = f" (and {len(stalled) - 3} more)" if len(stalled) > 3 else ""
        raise CheckFailed(named + more, stalled[0].hint)
    if not engine.is_maintained_here:
        return "all waiting runs have a live worker"
    live_sessions = [session for session in await engine.maintenance.sessions() if session.serves is not None]
    if full := await _full_workers(engine, live_sessions, now_us):
        raise CheckNoted(
            f"{full}: tasks that take long, or that wait for runs of their own, which need a slot too",
            "give the awaited tasks a queue with workers of their own (--queues), or raise --concurrency",
        )
    return f"{counted(len(live_sessions), 'live worker')}, all waiting runs have one"


async def _full_workers(engine: Engine, sessions: Sequence[Session], now_us: int) -> str:
    """Describe workers that began no run for a minute with all slots taken, while runs wait; empty for none."""
    waiting_count = sum(view.waiting_count for view in await engine.store.queues(engine.environment) if not view.paused)
    loads = await engine.maintenance.lease_loads()
    slots_count = 0
    for session in sessions:
        load = loads.get(session.id)
        concurrency = session.serves.concurrency if session.serves is not None else 0
        if load is None or load.runs_count < concurrency or load.claimed_us > now_us - FULL_AFTER_S * 1_000_000:
            return ""
        slots_count += concurrency
    if not waiting_count or not slots_count:
        return ""
    return (
        f"all {slots_count:,} slots of {counted(len(sessions), 'worker')} have been taken for over a minute, "
        f"and {counted(waiting_count, 'run')} wait"
    )


async def batches(engine: Engine) -> str:
    """Find batches without progress: open without items, waiting without a worker, delayed for very long."""
    now_us = engine.clock.now_us()
    live_count = len(await engine.maintenance.sessions()) if engine.is_maintained_here else 1
    paused = {view.name for view in await engine.store.queues(engine.environment) if view.paused and view.waiting_count}
    stuck: list[str] = []
    unfinished_count = 0
    tasks: set[str] = set()
    before_id = ""
    while True:
        page = await engine.store.batches(
            engine.environment, states=["open", "sealed"], before_id=before_id, limit=PAGE_BATCHES
        )
        for batch, ledger in page:
            unfinished_count += 1
            tasks.add(batch.task)
            idle_s = (now_us - max(batch.created_us, batch.appended_us)) / 1_000_000
            if idle_s < STUCK_AFTER_S or (batch.kind == "stream" and not ledger.waiting):
                continue
            if batch.state == "open" and batch.kind != "stream":
                stuck.append(f"{batch.id} is open and got no item for {duration(idle_s)}")
            elif ledger.waiting and not live_count:
                stuck.append(f"{batch.id} has {counted(ledger.waiting, 'waiting run')} and no worker is alive")
        if not page:
            break
        before_id = page[-1][0].id
    due_us = await engine.store.next_due_us(engine.environment, sorted(tasks))
    if due_us is not None and due_us - now_us > DELAY_FAR_S * 1_000_000:
        stuck.append(f"the next delayed run is due in {duration((due_us - now_us) / 1_000_000)}")
    stuck += [f"the queue {name} is paused and has waiting runs" for name in sorted(paused)]
    if stuck:
        more = f" (and {len(stuck) - 3} more)" if len(stuck) > 3 else ""
        raise CheckFailed(
            "; ".join(stuck[:3]) + more,
            "repeat its `headrace map` command, or run `headrace batch cancel` or `headrace queue resume`",
        )
    return f"{counted(unfinished_count, 'unfinished batch')}, none stuck"


def _directory_of(settings: Settings) -> Path | None:
    if urlsplit(settings.store).scheme != "sqlite":
        return None
    from headrace.compose import sqlite_path

    return sqlite_path(settings.store).absolute().parent

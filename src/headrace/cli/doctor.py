"""`headrace doctor`: is everything well that batches depend on?

A check is a function that returns what it saw, or raises `Unwell` with what is wrong and what to do. One that fails
keeps no other from being made.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

import typer

from headrace.cli.opening import JsonOption, StoreOption, opened, run_async, settings_of, shown_store
from headrace.cli.printing import counted, duration, say, say_json, size
from headrace.foundation.errors import HeadraceError, StoreBroken

if TYPE_CHECKING:
    from headrace.foundation.settings import Settings
    from headrace.runtime.engine import Engine

UNWELL: Final = 1
CLOCK_OFFSET_MAX_S: Final = 2.0
FREE_BYTES_MIN: Final = 512 * 1024 * 1024
STUCK_AFTER_S: Final = 3_600
DELAY_FAR_S: Final = 7 * 86_400
PAGE_BATCHES: Final = 200


class Unwell(Exception):
    """A check failed."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Finding(NamedTuple):
    """What one check came to."""

    check: str
    ok: bool
    said: str
    hint: str = ""


def command(store: StoreOption = None, json: JsonOption = False) -> None:
    """Check store, durability, clock, disk, objects, and that no batch is stuck. Exit code 1 if anything is unwell."""
    settings = settings_of(store=store)
    findings = run_async(examine(settings))
    is_well = all(finding.ok for finding in findings)
    if json:
        say_json({"ok": is_well, "checks": [finding._asdict() for finding in findings]})
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check:<{width}}  {finding.said}")
            if finding.hint:
                say(f"{'':<6}{'':<{width}}  hint: {finding.hint}")
    if not is_well:
        raise typer.Exit(UNWELL)


async def examine(settings: Settings) -> list[Finding]:
    """Every check; those that need a store that can't be opened are said to have been left out."""
    directory = _directory_of(settings)
    findings: list[Finding] = []
    try:
        async with opened(settings, must_exist=True) as engine:
            findings.append(Finding("store", ok=True, said=f"{shown_store(settings)} answers"))
            checks: list[tuple[str, Callable[[], Awaitable[str]]]] = [
                ("version", lambda: version(engine)),
                ("durability", lambda: durability(engine)),
                ("clock", lambda: clock(engine, directory)),
                ("disk", lambda: disk(directory)),
                ("objects", lambda: objects(engine)),
                ("sessions", lambda: sessions(engine)),
                ("batches", lambda: batches(engine)),
            ]
            for name, check in checks:
                findings.append(await _made(name, check))
    except HeadraceError as error:
        is_version = isinstance(error, StoreBroken) and "schema version" in error.message
        findings.append(Finding("version" if is_version else "store", ok=False, said=error.message, hint=error.hint))
        if directory is not None and directory.is_dir():
            findings.append(await _made("disk", lambda: disk(directory)))
    return findings


async def _made(name: str, check: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name, ok=True, said=await check())
    except Unwell as unwell:
        return Finding(name, ok=False, said=str(unwell), hint=unwell.hint)
    except HeadraceError as error:
        return Finding(name, ok=False, said=error.message, hint=error.hint)


async def version(engine: Engine) -> str:
    """The versions of what is at work; a schema of another version than this one knows is refused on opening."""
    from headrace import __version__

    found = await engine.store.check()
    schema = found.get("schema_version")
    if schema == 0:
        raise Unwell("the database has no schema yet", "run `headrace migrate`")
    said = ", ".join(f"{name.removesuffix('_version')} {value}" for name, value in found.items() if "version" in name)
    return f"headrace {__version__}{', ' if said else ''}{said}"


async def durability(engine: Engine) -> str:
    """What an acknowledgement hangs on."""
    found = await engine.store.check()
    if found.get("store") == "postgres":
        fsync, commit = str(found.get("fsync")), str(found.get("synchronous_commit"))
        if fsync != "on" or commit == "off":
            raise Unwell(
                f"fsync is {fsync}, synchronous_commit is {commit}: what was acknowledged may not survive a power cut",
                "turn both on, on the server or for this user",
            )
        return f"fsync {fsync}, synchronous_commit {commit}"
    if found.get("store") != "sqlite":
        return f"{found.get('store')}: nothing outlives the process"
    mode, synchronous = str(found.get("journal_mode")), str(found.get("synchronous"))
    if mode != "wal" or synchronous not in ("full", "extra"):
        raise Unwell(
            f"journal_mode is {mode}, synchronous is {synchronous}: what was acknowledged may not survive a power cut",
            "the file must allow WAL and full syncs: keep it on a local disk, not on a network share",
        )
    return f"journal_mode {mode}, synchronous {synchronous}"


async def clock(engine: Engine, directory: Path | None) -> str:
    """Whether this process and the disk that holds the store agree on the time."""
    if directory is None:
        return "no disk to compare with"
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".headrace-doctor-") as file:
        now_us = engine.clock.now_us()
        os.utime(file.name)
        offset_s = (os.fstat(file.fileno()).st_mtime_ns // 1_000 - now_us) / 1_000_000
    if abs(offset_s) > CLOCK_OFFSET_MAX_S:
        raise Unwell(
            f"the clock of this process and that of the disk are {duration(abs(offset_s))} apart",
            "let NTP set the clock of this machine, or of the server that holds the disk",
        )
    return f"{abs(offset_s) * 1_000:.1f} ms apart from the disk's"


async def disk(directory: Path | None) -> str:
    """Room for what is still to come."""
    if directory is None:
        return "none is used"
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < FREE_BYTES_MIN:
        raise Unwell(
            f"only {size(free_bytes)} are free where the store is",
            "free some space, or run `headrace prune`; a full disk loses nothing but stops everything",
        )
    return f"{size(free_bytes)} free"


async def objects(engine: Engine) -> str:
    """One object written, read, listed and removed."""
    from headrace.store.payloads import shown_url

    await engine.payloads.check()
    return f"written, read, listed and removed one in {shown_url(engine.payloads.url)}"


async def sessions(engine: Engine) -> str:
    """Processes that count as alive and are not heard from: their leases wait for a worker that takes them back."""
    found = await engine.store.sessions()
    now_us = engine.clock.now_us()
    silent = [
        session
        for session in found
        if max(session.heartbeat_us, session.started_us) + engine.limits.session_timeout_ms * 1_000 < now_us
    ]
    if silent:
        named = ", ".join(f"{session.kind} {session.pid} on {session.host}" for session in silent[:3])
        silent_s = (now_us - max(silent[0].heartbeat_us, silent[0].started_us)) / 1_000_000
        raise Unwell(
            f"{counted(len(silent), 'session')} silent, the first for {duration(silent_s)}: {named}",
            "any worker or `headrace map` on this store takes back what they held",
        )
    return f"{counted(len(found), 'live session')}"


async def batches(engine: Engine) -> str:
    """Batches that nothing moves on: open without an append, waiting without a worker, delayed without an end."""
    now_us = engine.clock.now_us()
    live_count = len(await engine.store.sessions())
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
                stuck.append(f"{batch.id} has {counted(ledger.waiting, 'waiting run')} and no process works on it")
        if len(page) < PAGE_BATCHES:
            break
        before_id = page[-1][0].id
    due_us = await engine.store.next_due_us(engine.environment, sorted(tasks))
    if due_us is not None and due_us - now_us > DELAY_FAR_S * 1_000_000:
        stuck.append(f"the next delayed run is due in {duration((due_us - now_us) / 1_000_000)}")
    stuck += [f"the queue {name} is paused and has runs that wait" for name in sorted(paused)]
    if stuck:
        more = f" (and {len(stuck) - 3} more)" if len(stuck) > 3 else ""
        raise Unwell(
            "; ".join(stuck[:3]) + more,
            "run its `headrace map` command again, `headrace batch cancel` it, or `headrace queue resume` the queue",
        )
    return f"{counted(unfinished_count, 'unfinished batch')}, none stuck"


def _directory_of(settings: Settings) -> Path | None:
    if urlsplit(settings.store).scheme != "sqlite":
        return None
    from headrace.compose import sqlite_path

    return sqlite_path(settings.store).absolute().parent

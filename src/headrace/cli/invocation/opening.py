"""Settings, engine and event loop of a command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import typer

from headrace.foundation import interpreter
from headrace.foundation.descriptors import raise_descriptor_limit
from headrace.foundation.errors import InvalidInput, NotFound
from headrace.foundation.settings import Settings, hidden, load

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.runtime.engine import Engine

T = TypeVar("T")
RUNS_FAILED: Final = 3
"""Exit code of commands that wait for runs, if some did not complete."""


StoreOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The store of the batches. Default: HEADRACE_STORE, else that of the app, else sqlite:///headrace.db.",
    ),
]
ServerOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="A Headrace server instead of a store; HEADRACE_API_KEY is its key."),
]
NoServerOption: TypeAlias = Annotated[str | None, typer.Option("--server", metavar="URL", hidden=True)]
"""A server for a command that needs the database itself: its engine refuses it with the reason."""

JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def settings_of(app: Headrace | None = None, /, **flags: object | None) -> Settings:
    """Load the effective settings and configure logging. `app` is the app that the command names: it gets them too."""
    settings = load(flags, os.environ, Path.cwd(), code=None if app is None else app.declared)
    _configure_logs(settings)
    if app is not None:
        app.use(settings)
    return settings


def log_before_import() -> None:
    """Configure logging before the user's module is imported, so that lines of the import have the right format.

    The arguments of the module's `Headrace(…)` are not known yet: `settings_of` configures again with them.
    """
    _configure_logs(load({}, os.environ, Path.cwd()))


def _configure_logs(settings: Settings) -> None:
    from headrace.cli.invocation import printing
    from headrace.foundation import logs

    logs.configure(is_json=settings.log_format == "json", level=settings.log_level)
    printing.notes_are_logged(are_logged=settings.log_format == "json")


def place_of(store: str | None, server: str | None) -> str | None:
    """Return the store or server that one of two flags names. Raises `InvalidInput` when both do."""
    if store is not None and server is not None:
        raise InvalidInput("expected --store or --server, got both", hint="give one of them")
    if server is not None and urlsplit(server).scheme not in ("http", "https"):
        raise InvalidInput(
            f"expected an http or https URL for --server, got {hidden('store', server)!r}",
            hint="write https://host or http://host:port",
        )
    return store if server is None else server


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command on an event loop of its own, uvloop where there is one, with all descriptors that it may have."""
    interpreter.tune()
    raise_descriptor_limit()
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    try:
        from uvloop import new_event_loop as loop_factory
    except ImportError:  # not on this platform
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(coroutine)


@asynccontextmanager
async def opened(settings: Settings, *, must_exist: bool = False) -> AsyncIterator[Engine]:
    """Open the engine that the settings name.

    With `must_exist`, nothing is created or migrated: a missing file and a schema that is not current are errors.
    """
    from headrace.compose import open_engine, sqlite_path

    if must_exist and urlsplit(settings.store).scheme == "sqlite":
        path = sqlite_path(settings.store)
        if not path.exists():
            raise NotFound(
                f"there is no database at {path}",
                hint="name another with --store or HEADRACE_STORE (`headrace config show FILE:APP` prints that of an "
                "app), or create it with `headrace map` or `headrace migrate`",
            )
    engine = await open_engine(settings, migrates=False if must_exist else None)
    try:
        yield engine
    finally:
        await engine.close()


def shown_store(settings: Settings) -> str:
    """Return the store's URL without its password."""
    return hidden("store", settings.store)

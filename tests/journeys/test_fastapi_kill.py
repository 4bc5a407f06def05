"""A FastAPI application under load whose server and workers are killed with -9: no order is lost, none is doubled.

The application is the one of docs/fastapi.md: a `def` and an `async def` route, and a `def` task that itself enqueues.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from headrace import Headrace
from tests.support.postgres_server import free_port
from tests.support.store_rig import fresh_schema

pytestmark = [pytest.mark.journey, pytest.mark.timeout(300)]

ORDERS: Final = 600
KILLS: Final = 3
CLIENTS: Final = 12
PAGE: Final = Path(__file__).parents[2] / "docs" / "fastapi.md"
WORKER_INSIDE: Final = ("async with hr:", "async with hr, hr.worker():")
NO_LIFESPAN: Final = ("FastAPI(lifespan=lifespan)", "FastAPI()")


class Shop:
    """The application's processes in a directory."""

    def __init__(self, folder: Path, store: str, change: tuple[str, str], *, has_worker: bool) -> None:
        self.folder, self.store, self.has_worker = folder, store, has_worker
        self.port = free_port()
        (page,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for old, new in (change, ("sqlite:///shop.db", store)):
            assert old in page
            page = page.replace(old, new)
        (folder / "shop.py").write_text(page, encoding="utf-8")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the server, and a worker unless it is inside the server."""
        commands = [["uvicorn", "shop:app", "--port", str(self.port), "--log-level", "warning"]]
        if self.has_worker:
            commands.append(["headrace", "worker", "shop.py:hr"])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, env=environment, stderr=subprocess.DEVNULL
            )
            for command in commands
        ]

    def end(self, number: signal.Signals) -> None:
        """Send a signal to every process, and wait for the ends."""
        for process in self.processes:
            process.send_signal(number)
        for process in self.processes:
            process.wait(timeout=60)

    def place(self, order: int) -> str:
        """Place an order, and repeat the request until it is answered, as a careful client does."""
        path = f"/{'express' if order % 2 else 'orders'}/{order}"
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request("POST", path)
                answer = connection.getresponse()
                body = answer.read()
                assert answer.status == 200, body
                return str(json.loads(body))
            except (OSError, http.client.HTTPException):
                continue  # the server was killed; it starts again
            finally:
                connection.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize(
    ("change", "has_worker"), [(WORKER_INSIDE, False), (NO_LIFESPAN, True)], ids=["inside", "beside"]
)
def test_orders_survive_kills_of_the_server_and_its_workers(
    kind: str, change: tuple[str, str], has_worker: bool, tmp_path: Path
) -> None:
    store = fresh_schema(tmp_path) if kind == "postgres" else f"sqlite:///{tmp_path}/shop.db"
    shop = Shop(tmp_path, store, change, has_worker=has_worker)
    thresholds = {ORDERS * (number + 1) // (KILLS + 1): threading.Event() for number in range(KILLS)}
    answers: list[str] = []

    def client(order: int) -> None:
        answers.append(shop.place(order))
        if len(answers) in thresholds:
            thresholds[len(answers)].set()

    shop.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as clients:
            placing = [clients.submit(client, order) for order in range(ORDERS)]
            for reached in thresholds.values():
                assert reached.wait(120)
                shop.end(signal.SIGKILL)
                shop.start()
            for placed in placing:
                placed.result()
        wait_until_all_ended(store)
    finally:
        shop.end(signal.SIGTERM)
    check_ended(store, answers)


def wait_until_all_ended(store: str) -> None:
    app = Headrace("check", store=store)
    waiting = threading.Event()
    while any(view.waiting or view.leased for view in app.batches_sync(limit=1_000)):
        waiting.wait(0.1)
    app.close_sync()


def check_ended(store: str, answers: list[str]) -> None:
    """Check that each order and each notification is one completed run."""
    app = Headrace("check", store=store)
    runs: list[Any] = app.runs_sync(limit=100_000)
    assert len(set(answers)) == ORDERS
    assert {run.state for run in runs} == {"completed"}
    assert Counter(run.task for run in runs) == {"ship": ORDERS, "notify": ORDERS}
    assert {run.id for run in runs if run.task == "ship"} == set(answers)
    orders = Counter(app.get_run_sync(run.id).view_sync().input for run in runs if run.task == "notify")
    assert orders == dict.fromkeys(range(ORDERS), 1)
    app.close_sync()

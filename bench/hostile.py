"""Two tenants on one server: one attacks it, and the other's small batches go on.

    python -m bench.hostile [ATTACK…] [--store URL] [--serve COMMAND] [--rounds 5] [--json]

The figures, for each attack alone and for all of them at once: the median time of a batch of 500 items of the other
tenant, from its creation to its last result, beside the same without an attack; and the largest resident memory of the
server. `--serve` measures another version of the server, for example `/old/.venv/bin/headrace`.

The attackers are processes on the same machine. They have the lowest priority there, since attackers elsewhere would
take no processor time from the server. `busy processors` shows what is left of their effect: the same with a process of
that priority for each core that only computes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.hostile_peers import ATTACKS, LARGE_BYTES, MIB, Target
from headrace import Headrace

ITEMS: Final = 500
RESULTS: Final = 150
"""Large results of the attacking tenant: 60 MB."""
QUIET_ROUNDS: Final = 9
RATIO_MAX: Final = 2.0
WARM_S: Final = 2.0
ANSWER_S: Final = 60.0
BUSY: Final = "busy"

app = Headrace("hostile")


@app.task
async def nothing(_number: int) -> None:
    """Do nothing."""


@app.task
async def large(number: int) -> str:
    """Return a large result."""
    return f"{number} ".ljust(LARGE_BYTES, "x")


def attack(name: str, target: Target) -> None:
    """Run an attack with the lowest priority."""
    os.nice(19)
    (compute if name == BUSY else ATTACKS[name])(target)


def compute(_target: Target) -> None:
    """Use one processor."""
    while True:
        sum(range(100_000))


class Tenant:
    """A client of the server with the key of one tenant."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self.host, self.port, self.key = host, port, key

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
        """Send a request on a connection of its own; return the body of the answer. Raises `OSError` if refused."""
        peer = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_S)
        try:
            peer.request(method, path, body, {"authorization": f"Bearer {self.key}", "content-type": kind})
            answer = peer.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from error
        finally:
            peer.close()
        if answer.status >= 300:
            raise OSError(f"{method} {path}: {answer.status} {data[:200]!r}")
        return data

    def batch(self, task: str, count: int) -> str:
        """Send a batch and wait for its last result; return its id."""
        created = json.loads(self.ask("POST", "/v1/batches", json.dumps({"run_count": count, "task": task}).encode()))
        batch_id = str(created["id"])
        items = b"".join(b'{"index":%d,"payload":%d}\n' % (index, index) for index in range(count))
        self.ask("POST", f"/v1/batches/{batch_id}/items", items, "application/x-ndjson")
        lines = self.ask("GET", f"/v1/batches/{batch_id}/results?from=0").split(b"\n")
        results_count = sum(bool(line.strip()) for line in lines)
        assert results_count == count, f"expected {count} results, got {results_count}"
        return batch_id


class Figure(NamedTuple):
    """Figures of one attack. `batch_s` is None if not one batch was completed."""

    attack: str
    batch_s: float | None
    ratio: float | None
    failed_count: int
    peak_mib: float


def rss(pid: int) -> int:
    """Return the resident bytes of a process."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextmanager
def peak_of(pid: int) -> Iterator[list[int]]:
    """Sample the memory of a process while the block lasts; the list holds the largest value."""
    peak, over = [rss(pid)], threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], rss(pid))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


@contextmanager
def attacked(names: Sequence[str], target: Target) -> Iterator[None]:
    """Run attacks while the block lasts, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=attack, args=(name, target), daemon=True) for name in names]
    for process in processes:
        process.start()
    try:
        time.sleep(WARM_S if names else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def measure(names: Sequence[str], label: str, calm: Tenant, target: Target, pid: int, rounds: int) -> Figure:
    """Return the figures of some attacks at once."""
    walls_s, failed_count = [], 0
    with peak_of(pid) as peak, attacked(names, target):
        for _ in range(rounds):
            began_s = time.perf_counter()
            try:
                calm.batch("nothing", ITEMS)
            except (OSError, AssertionError) as error:
                failed_count += 1
                print(f"{label}: {error}", file=sys.stderr)
            else:
                walls_s.append(time.perf_counter() - began_s)
    return Figure(label, statistics.median(walls_s) if walls_s else None, None, failed_count, peak[0] / MIB)


def key_of(command: list[str], tenant: str, scopes: str, environment: dict[str, str]) -> str:
    """Create a key of a tenant."""
    made = subprocess.run(
        [*command, "key", "create", "--environment", tenant, "--scopes", scopes, "--json"],
        env=environment, check=True, capture_output=True,
    )  # fmt: skip
    return str(json.loads(made.stdout)["key"])


@contextmanager
def serving(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[tuple[int, str, int]]:
    """Serve on a free port, with a worker for each tenant; yield the server's process id and address."""
    with ExitStack() as stack:
        log = folder / "serve.log"
        server = subprocess.Popen(
            [*command, "serve", "--port", "0", "--no-worker"],
            env=environment,
            stderr=stack.enter_context(log.open("w")),
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        for tenant in ("calm", "hostile"):
            worker = subprocess.Popen(
                [*command, "worker", "bench.hostile:app"],
                env=environment | {"HEADRACE_ENVIRONMENT": tenant},
                stderr=stack.enter_context((folder / f"{tenant}.log").open("w")),
            )
            stack.callback(worker.wait)
            stack.callback(worker.kill)
        address = None
        while address is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
            address = re.search(r"http://([\d.]+):(\d+)", log.read_text())
        yield server.pid, address[1], int(address[2])


def run(chosen: Sequence[str], store: str | None, command: list[str], rounds: int) -> Iterator[Figure]:
    """Yield the figures of no attack, of each one, and of all at once."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = {**os.environ, "HEADRACE_STORE": store or f"sqlite:///{folder}/hostile.db"}
        keys = [key_of(command, "calm", "*", environment), key_of(command, "hostile", "*", environment)]
        with serving(command, environment, folder) as (pid, host, port):
            calm, hostile = (Tenant(host, port, key) for key in keys)
            for _ in range(2):
                calm.batch("nothing", ITEMS)
            target = Target(host, port, hostile.key, hostile.batch("large", RESULTS))
            quiet = measure([], "none", calm, target, pid, QUIET_ROUNDS)
            assert quiet.batch_s is not None, "expected batches to complete without an attack"
            yield quiet._replace(ratio=1.0)
            sets = [([name], name) for name in chosen]
            sets.append(([BUSY] * (os.cpu_count() or 1), "busy processors"))
            if len(chosen) > 1:
                sets.append((list(chosen), "all at once"))
            for names, label in sets:
                figure = measure(names, label, calm, target, pid, rounds)
                yield figure._replace(ratio=figure.batch_s and figure.batch_s / quiet.batch_s)


def row(figure: Figure) -> str:
    """Return a figure as a row of a table."""
    wall = "never" if figure.batch_s is None else f"{1_000 * figure.batch_s:,.0f} ms"
    ratio = "-" if figure.ratio is None else f"{figure.ratio:.1f}"
    return f"| {figure.attack} | {wall} | {ratio} | {figure.failed_count} | {figure.peak_mib:,.0f} MiB |"


def main() -> int:
    """Measure, and return 1 if the other tenant's batches took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=", ".join(ATTACKS))
    parser.add_argument("--store", help="a PostgreSQL store; default: a SQLite file")
    parser.add_argument("--serve", default=f"{shlex.quote(sys.executable)} -m headrace", help="the measured command")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.attacks) - ATTACKS.keys():
        parser.error(f"expected attacks among {', '.join(ATTACKS)}, got {', '.join(sorted(unknown))}")
    figures: list[dict[str, Any]] = []
    if not given.json:
        print("| attack | a batch of the other tenant | ratio | failed | server's memory |\n|---|--:|--:|--:|--:|")
    for figure in run(given.attacks or list(ATTACKS), given.store, shlex.split(given.serve), given.rounds):
        figures.append(figure._asdict())
        if not given.json:
            print(row(figure), flush=True)
    if given.json:
        print(json.dumps(figures))
    last = figures[-1]
    return int(last["ratio"] is None or last["ratio"] > RATIO_MAX or bool(last["failed_count"]))


if __name__ == "__main__":
    sys.exit(main())

"""The flights of 2013, indexed by a process that is killed repeatedly, compared with plain SQL over the raw log."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import flights as example  # noqa: E402 - it lies beside the package

KILLS: Final = int(os.environ.get("HEADRACE_TEST_COUNT", "20"))
SEED: Final = int(os.environ.get("HEADRACE_TEST_SEED", "2013"))
EVENTS: Final = 336_776

# Expected rows of each entity, as plain SQL over the rows of the log.
EXPECTED_SQL: Final = {
    "airport": """
        SELECT code, sum(departures), sum(arrivals), sum(cancelled), sum(delay), max(worst) FROM (
            SELECT origin AS code, dep_delay IS NOT NULL AS departures, 0 AS arrivals, dep_delay IS NULL AS cancelled,
                coalesce(dep_delay, 0) AS delay, dep_delay AS worst FROM log
            UNION ALL SELECT dest, 0, 1, 0, 0, NULL FROM log WHERE air_time IS NOT NULL
        ) GROUP BY code ORDER BY code""",
    "carrier": """
        SELECT carrier, count(*), sum(dep_delay IS NULL), sum(distance), (
            SELECT json_group_array(dest) FROM (
                SELECT DISTINCT dest FROM log AS other WHERE other.carrier = log.carrier ORDER BY dest)
        ) FROM log GROUP BY carrier ORDER BY carrier""",
    "plane": """
        SELECT plane, count(*), sum(distance),
            (SELECT dest FROM log AS other WHERE other.plane = log.plane ORDER BY other.no DESC LIMIT 1),
            coalesce((
                SELECT CASE WHEN arr_delay > 15 THEN 'late' ELSE 'on time' END FROM log AS other
                WHERE other.plane = log.plane AND arr_delay IS NOT NULL ORDER BY other.no DESC LIMIT 1), 'unknown')
        FROM log WHERE plane <> '' GROUP BY plane ORDER BY plane""",
    "route": """
        SELECT origin || '-' || dest AS route, count(*), count(air_time), coalesce(sum(air_time), 0),
            coalesce(sum(air_time) * 1.0 / count(air_time), 0.0), min(air_time)
        FROM log GROUP BY route ORDER BY route""",
    "day": """
        WITH days AS (
            SELECT day, count(*) AS flights, sum(dep_delay IS NULL) AS cancelled, min(no) AS first
            FROM log GROUP BY day)
        SELECT day, flights, cancelled,
            (SELECT count(*) FROM late WHERE late.no < first) - (SELECT count(*) FROM late WHERE until < first)
        FROM days ORDER BY day""",
}


def load_log(path: Path) -> sqlite3.Connection:
    """Load the log into a table, without Headrace."""
    db = sqlite3.connect(path)
    db.execute(
        "CREATE TABLE log (no INTEGER PRIMARY KEY, day, carrier, plane, origin, dest, distance, dep_delay, arr_delay, "
        "air_time)"
    )
    db.executemany(
        "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ((no, *_cells(row)) for no, row in enumerate(example.rows(), 1)),
    )
    db.execute("CREATE INDEX by_plane ON log (plane, no)")
    # The flights from which, and up to which, an aircraft counted as late.
    db.execute(
        "CREATE TABLE late AS SELECT no, until FROM (SELECT no, arr_delay, lead(no, 1, 1000000) OVER "
        "(PARTITION BY plane ORDER BY no) AS until FROM log WHERE arr_delay IS NOT NULL AND plane <> '') "
        "WHERE arr_delay > 15"
    )
    db.execute("CREATE INDEX by_no ON late (no)")
    db.execute("CREATE INDEX by_until ON late (until)")
    db.commit()
    return db


def _cells(row: list[str]) -> list[Any]:
    year, month, day = row[:3]
    cells = [None if cell in ("", "NA") else cell for cell in row]
    numbers = [None if cells[column] is None else int(float(row[column])) for column in (15, 5, 8, 14)]
    return [f"{year}-{int(month):02}-{int(day):02}", row[9], cells[11] or "", row[12], row[13], *numbers]


def indexed_rows(database: Path, table: str) -> list[tuple[Any, ...]]:
    """Return the rows that the indexer stored."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        rows = db.execute(f'SELECT * FROM "{table}" ORDER BY id').fetchall()
    if table == "carrier":
        rows = [(*row[:-1], json.dumps(json.loads(row[-1]), separators=(",", ":"))) for row in rows]
    return rows


def checkpoint_and_flights(database: Path) -> tuple[int, int]:
    """Return the checkpoint and the number of flights in the tables, in one snapshot."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        db.execute("BEGIN")
        (no,) = db.execute("SELECT no FROM headrace_indexer").fetchone()
        (flights,) = db.execute("SELECT coalesce(sum(flights), 0) FROM carrier").fetchone()
    return no, flights


@pytest.mark.journey
@pytest.mark.timeout(600)
def test_flights_indexed_by_a_process_that_is_killed_repeatedly_equal_plain_sql(tmp_path: Path) -> None:
    database = tmp_path / "flights.db"
    command = [sys.executable, "-m", "headrace", "index", str(ROOT / "examples" / "flights.py:flights")]
    command += ["--store", f"sqlite:///{database}", "--no-progress", "--batch-size", "2000"]
    choose = random.Random(SEED)
    targets = sorted(choose.randrange(EVENTS) for _ in range(KILLS))
    for number, target in enumerate(targets):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while process.poll() is None and (not database.exists() or _checkpoint(database) < target):
            try:
                process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
        try:
            process.wait(timeout=choose.random() / 20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, error_output = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"seed {SEED}, kill {number}: {error_output}"
        no, flights = checkpoint_and_flights(database)
        assert flights == no, f"seed {SEED}, kill {number}: the tables belong to another checkpoint"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert checkpoint_and_flights(database) == (EVENTS, EVENTS)
    db = load_log(tmp_path / "raw.db")
    try:
        for table, sql in EXPECTED_SQL.items():
            assert indexed_rows(database, table) == db.execute(sql).fetchall(), f"{table}, seed {SEED}"
    finally:
        db.close()


def _checkpoint(database: Path) -> int:
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            row = db.execute("SELECT no FROM headrace_indexer").fetchone()
    except sqlite3.OperationalError:  # not created yet
        return -1
    return -1 if row is None else int(row[0])

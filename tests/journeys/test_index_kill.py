"""The flights of 2013 indexed by a process that is killed again and again, against plain SQL over the raw log."""

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

# What the handlers should have made, as plain SQL over the rows of the log.
PLAIN: Final = {
    "airport": """
        SELECT code, sum(departures), sum(arrivals), sum(cancelled), sum(delay), max(worst) FROM (
            SELECT origin AS code, dep_delay IS NOT NULL AS departures, 0 AS arrivals, dep_delay IS NULL AS cancelled,
                coalesce(dep_delay, 0) AS delay, dep_delay AS worst FROM log
            UNION ALL SELECT dest, 0, 1, 0, 0, NULL FROM log WHERE air_time IS NOT NULL
        ) GROUP BY code ORDER BY code""",
    "carrier": """
        SELECT carrier, count(*), sum(dep_delay IS NULL), sum(distance), (
            SELECT json_group_array(dest) FROM (
                SELECT DISTINCT dest FROM log AS own WHERE own.carrier = log.carrier ORDER BY dest)
        ) FROM log GROUP BY carrier ORDER BY carrier""",
    "plane": """
        SELECT plane, count(*), sum(distance),
            (SELECT dest FROM log AS own WHERE own.plane = log.plane ORDER BY own.no DESC LIMIT 1),
            coalesce((
                SELECT CASE WHEN arr_delay > 15 THEN 'late' ELSE 'on time' END FROM log AS own
                WHERE own.plane = log.plane AND arr_delay IS NOT NULL ORDER BY own.no DESC LIMIT 1), 'unknown')
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


def raw(path: Path) -> sqlite3.Connection:
    """The log as a table, put there without Headrace."""
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
    # From which flight up to which other one an aircraft counted as late.
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
    known = [None if cell in ("", "NA") else cell for cell in row]
    numbers = [None if known[at] is None else int(float(row[at])) for at in (15, 5, 8, 14)]
    return [f"{year}-{int(month):02}-{int(day):02}", row[9], known[11] or "", row[12], row[13], *numbers]


def made(database: Path, table: str) -> list[tuple[Any, ...]]:
    """The rows that the indexer left."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        rows = db.execute(f'SELECT * FROM "{table}" ORDER BY id').fetchall()
    if table == "carrier":
        rows = [(*row[:-1], json.dumps(json.loads(row[-1]), separators=(",", ":"))) for row in rows]
    return rows


def standing(database: Path) -> tuple[int, int]:
    """The checkpoint, and how many flights the tables say there were, in one snapshot."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        db.execute("BEGIN")
        (no,) = db.execute("SELECT no FROM indexer").fetchone()
        (flights,) = db.execute("SELECT coalesce(sum(flights), 0) FROM carrier").fetchone()
    return no, flights


@pytest.mark.journey
@pytest.mark.timeout(600)
def test_flights_indexed_by_a_process_that_dies_again_and_again_equal_plain_sql(tmp_path: Path) -> None:
    database = tmp_path / "flights.db"
    command = [sys.executable, "-m", "headrace", "index", str(ROOT / "examples" / "flights.py:flights")]
    command += ["--store", f"sqlite:///{database}", "--no-progress", "--batch-size", "2000"]
    choose = random.Random(SEED)
    targets = sorted(choose.randrange(EVENTS) for _ in range(KILLS))
    for number, target in enumerate(targets):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while process.poll() is None and (not database.exists() or _no(database) < target):
            try:
                process.wait(timeout=0.005)
            except subprocess.TimeoutExpired:
                continue
        try:
            process.wait(timeout=choose.random() / 20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, told = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"seed {SEED}, kill {number}: {told}"
        no, flights = standing(database)
        assert flights == no, f"seed {SEED}, kill {number}: the tables are those of another checkpoint"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert standing(database) == (EVENTS, EVENTS)
    db = raw(tmp_path / "raw.db")
    try:
        for table, sql in PLAIN.items():
            assert made(database, table) == db.execute(sql).fetchall(), f"{table}, seed {SEED}"
    finally:
        db.close()


def _no(database: Path) -> int:
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            row = db.execute("SELECT no FROM indexer").fetchone()
    except sqlite3.OperationalError:  # not made yet
        return -1
    return -1 if row is None else int(row[0])

"""In-flight marks: the record of started runs that survives a crash of its process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.foundation.errors import ClientFault, StoreUnavailable
from headrace.runtime.sessions.active_lease import BEGUN, ENDED, NOT_BEGUN
from headrace.runtime.sessions.inflight_marks import (
    ALL_SLOTS,
    InflightMarks,
    ended_sessions,
    merged,
    of_session,
    owner_has_ended,
    read,
    read_deadline,
    remove,
)

WRITER = """
import sys
from pathlib import Path
from headrace.runtime.sessions.inflight_marks import InflightMarks
marks = InflightMarks(Path(sys.argv[1]), slot_runs=8)
_, body = marks.take(7, 3, 5)
body[0], body[1], body[4] = 2, 1, 1
marks.set_deadline(99)
print("marked", flush=True)
sys.stdin.read()
"""


def test_marks_record_the_runs_that_had_begun_and_not_ended(tmp_path: Path) -> None:
    marks = InflightMarks(tmp_path / "marks", slot_runs=8)
    _, first = marks.take(1, 10, 4)
    _, second = marks.take(2, 20, 8)
    first[0], first[2], first[3] = BEGUN, ENDED, BEGUN
    assert read(marks.path) == {(1, 10): (0, 3)}
    second[7] = BEGUN
    assert read(marks.path) == {(1, 10): (0, 3), (2, 20): (7,)}
    first[0] = first[3] = NOT_BEGUN
    assert read(marks.path) == {(2, 20): (7,)}
    marks.close()
    assert not marks.path.exists()


def test_the_space_of_a_file_is_allocated_before_a_run_is_marked(tmp_path: Path) -> None:
    """Allocate the file: a write into a hole of a mapped file on a full disk would end the process by SIGBUS."""
    marks = InflightMarks(tmp_path / "marks", slot_runs=256)
    status = marks.path.stat()
    assert status.st_blocks * 512 >= status.st_size > 256 * marks.free_count
    marks.close()


def test_a_reused_slot_starts_empty(tmp_path: Path) -> None:
    marks = InflightMarks(tmp_path / "marks", slot_runs=8, slots=2)
    slot, body = marks.take(1, 1, 8)
    body[5] = BEGUN
    assert marks.free_count == 1
    marks.free(slot)
    assert (marks.free_count, read(marks.path)) == (2, {})
    again, body = marks.take(2, 2, 8)
    assert again == slot
    assert bytes(body) == bytes(8)
    assert read(marks.path) == {}
    marks.close()


def test_a_span_too_long_for_a_slot_is_suspect_as_a_whole(tmp_path: Path) -> None:
    marks = InflightMarks(tmp_path / "marks", slot_runs=8)
    slot, body = marks.take(1, 1, 9)
    assert len(body) == 9
    assert read(marks.path) == {(1, 1): ALL_SLOTS}
    marks.free(slot)
    assert read(marks.path) == {}
    marks.close()


def test_two_slots_of_a_lease_are_merged(tmp_path: Path) -> None:
    marks = InflightMarks(tmp_path / "marks", slot_runs=8)
    for span_slot in (1, 4):
        _, body = marks.take(1, 1, 8)
        body[span_slot] = BEGUN
    assert read(marks.path) == {(1, 1): (1, 4)}
    marks.close()


def test_a_locked_file_has_a_live_owner_and_an_unlocked_file_an_ended_owner(tmp_path: Path) -> None:
    marks = InflightMarks(tmp_path / "marks", slot_runs=8)
    assert owner_has_ended(marks.path) is False
    with pytest.raises(StoreUnavailable):
        InflightMarks(marks.path, slot_runs=8)
    _, body = marks.take(1, 1, 1)
    body[0] = BEGUN
    marks.close(keep=True)  # although a run still holds its part of the map
    assert owner_has_ended(marks.path) is True
    assert read(marks.path) == {(1, 1): (0,)}
    remove([marks.path])
    assert owner_has_ended(marks.path) is None


def test_marks_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "live" / "session_1"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"marked\n"
        assert owner_has_ended(path) is False
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert owner_has_ended(path) is True
    assert read(path) == {(7, 3): (1, 4)}
    assert read_deadline(path) == 99


@pytest.mark.parametrize("content", [b"", b"HR", b"x" * 100, b"HRMARK01" + b"\xff" * 16, b"HRMARK01" + b"\0" * 60])
def test_an_unreadable_file_marks_no_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "marks"
    path.write_bytes(content)
    assert read(path) == {}
    assert read(tmp_path / "none") == {}
    assert read_deadline(tmp_path / "none") == 0


def test_children_are_merged_into_their_session(tmp_path: Path) -> None:
    all_marks = []
    for name, span_slot in (("session_a", 0), ("session_a.0-1", 2), ("session_a.1-2", 5), ("session_ab", 7)):
        marks = InflightMarks(tmp_path / name, slot_runs=8)
        _, body = marks.take(1, 1, 8)
        body[span_slot] = BEGUN
        all_marks.append(marks)
    assert merged(of_session(tmp_path, "session_a")) == {(1, 1): (0, 2, 5)}
    for marks in all_marks:
        marks.close()
    assert merged(of_session(tmp_path, "session_a")) == {}


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="can't be created"):
        InflightMarks(tmp_path / "file" / "marks", slot_runs=8)


def test_directories_and_pipes_among_the_marks_belong_to_no_session(tmp_path: Path) -> None:
    ended = InflightMarks(tmp_path / "session_a", slot_runs=8)
    ended.close(keep=True)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "session_a.2").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    assert ended_sessions(tmp_path) == ["session_a"]
    assert owner_has_ended(tmp_path / "lost+found") is None
    files = of_session(tmp_path, "session_a")
    assert merged(files) == {}
    remove(files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost+found", "pipe", "session_a.2"]


def test_other_users_can_neither_list_nor_read_the_marks(tmp_path: Path) -> None:
    directory = tmp_path / "old" / "marks"
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    (directory / "session_old").touch(0o644)
    for name in ("session_old", "session_new"):
        marks = InflightMarks(directory / name, slot_runs=4, slots=2)
        assert (marks.path.stat().st_mode & 0o777, directory.stat().st_mode & 0o777) == (0o600, 0o700)
        marks.close()
    fresh = InflightMarks(tmp_path / "new" / "session_new", slot_runs=4, slots=2)
    assert fresh.path.parent.stat().st_mode & 0o777 == 0o700
    fresh.close()


def test_marks_that_do_not_fit_on_the_disk_are_a_fault_of_the_machine_and_keep_no_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(StoreUnavailable, match="can't be created") as error:
            InflightMarks(tmp_path / "session_a", slot_runs=4, slots=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.exit_code != ClientFault.exit_code  # the supervisor starts another child
    assert list(tmp_path.iterdir()) == []

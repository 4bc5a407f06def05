"""`headrace doctor`: objects that one process writes and another reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.support.store_rig import fresh_schema


def objects_check(shell: Shell, *flags: str) -> tuple[bool, str]:
    """Return the result of the check of objects, and its text."""
    for check in shell("doctor", "--json", *flags).json["checks"]:
        if check["check"] == "objects":
            return check["ok"], check["detail"]
    raise AssertionError("doctor did not check the objects")


def test_doctor_reports_an_object_store_that_loses_objects(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.foundation.errors import ObjectMissing
    from headrace.store.payloads import PayloadStore

    async def get(self: PayloadStore, key: str) -> bytes:
        raise ObjectMissing("the payload is not in the object store", hint="look for it", key=key)

    monkeypatch.setattr(PayloadStore, "get", get)
    shell("migrate")
    ok, detail = objects_check(shell)
    assert not ok
    assert "not in the object store" in detail


def test_doctor_reads_in_another_process_what_it_wrote_beside_a_file(shell: Shell) -> None:
    shell("migrate")
    ok, detail = objects_check(shell)
    assert (ok, "read it in another process" in detail) == (True, True), detail


def test_doctor_reads_in_another_process_what_it_wrote_into_the_database(shell: Shell, tmp_path: Path) -> None:
    store = fresh_schema(tmp_path)
    shell("migrate", "--store", store)
    ok, detail = objects_check(shell, "--store", store)
    assert (ok, "wrote one in postgresql://" in detail) == (True, True), detail


def test_doctor_reports_a_directory_that_other_processes_do_not_find(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fresh_schema(tmp_path)
    shell("migrate", "--store", store)
    monkeypatch.setenv("HEADRACE_OBJECTS", "share")
    monkeypatch.setenv("HEADRACE_OBJECTS_SHARED", "true")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("headrace.cli.administration.object_probe.OTHER_PLACE", str(tmp_path / "other"))
    ok, detail = objects_check(shell, "--store", store)
    assert not ok
    assert "another process could not read an object" in detail
    assert "not in the object store" in detail


def test_the_files_of_a_store_are_private_and_doctor_notes_those_that_are_not(shell: Shell) -> None:
    shell.items(3)
    assert shell.map().code == 0
    for name in ("headrace.db", "headrace.db.objects"):
        assert (shell.place / name).stat().st_mode & 0o077 == 0, name
    (shell.place / "headrace.db").chmod(0o644)
    (check,) = [check for check in shell("doctor", "--json").json["checks"] if check["check"] == "access"]
    assert (check["ok"], "headrace.db (0644)" in check["detail"], "chmod" in check["hint"]) == (True, True, True)

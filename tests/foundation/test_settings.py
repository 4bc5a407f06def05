"""Settings: precedence of sources, errors, and hidden secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting
from headrace.foundation.limits import TABLE
from headrace.foundation.settings import FILE_BYTES_MAX, HIDDEN, NAMES, Settings, hidden, load


def write(directory: Path, text: str, name: str = "headrace.toml") -> None:
    (directory / name).write_text(text, encoding="utf-8")


def refused(
    directory: Path, flags: dict[str, object | None] | None = None, environ: dict[str, str] | None = None
) -> InvalidSetting:
    with pytest.raises(InvalidSetting) as caught:
        load(flags or {}, environ or {}, directory)
    return caught.value


def source(settings: Settings, name: str) -> tuple[object, str]:
    return settings.value(name), settings.sources[name]


def test_defaults_apply_when_nothing_is_set(tmp_path: Path) -> None:
    settings = load({}, {}, tmp_path)
    assert settings.store == "sqlite:///headrace.db"
    assert settings.objects is None
    assert settings.environment == "default"
    assert (settings.log_format, settings.log_level) == ("console", "info")
    assert (settings.concurrency, settings.processes) == (100, 0)
    assert {name: settings.value(name) for name in TABLE} == {n: limit.default for n, limit in TABLE.items()}
    assert set(settings.sources.values()) == {"default"}


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, 'store = "sqlite:///file.db"\nconcurrency = 7\nprocesses = 2\n[limits]\nflush_size = 9\n')
    environ = {"HEADRACE_STORE": "sqlite:///environment.db", "HEADRACE_CONCURRENCY": "8"}
    settings = load({"store": "sqlite:///flag.db", "concurrency": None}, environ, tmp_path)
    assert source(settings, "store") == ("sqlite:///flag.db", "flag --store")
    assert source(settings, "concurrency") == (8, "environment HEADRACE_CONCURRENCY")
    assert source(settings, "processes") == (2, "headrace.toml")
    assert source(settings, "flush_size") == (9, "headrace.toml")
    assert source(settings, "flush_interval_ms") == (100, "default")
    assert settings.limits.flush_size == 9


def test_a_flag_that_was_not_given_hides_nothing(tmp_path: Path) -> None:
    settings = load({"store": None, "flush_size": None}, {"HEADRACE_FLUSH_SIZE": "5"}, tmp_path)
    assert source(settings, "flush_size") == (5, "environment HEADRACE_FLUSH_SIZE")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_limit_can_be_set_from_every_place(tmp_path: Path, name: str) -> None:
    value = TABLE[name].default
    write(tmp_path, f"[limits]\n{name} = {value}\n")
    assert load({}, {}, tmp_path).sources[name] == "headrace.toml"
    variable = f"HEADRACE_{name.upper()}"
    assert load({}, {variable: str(value)}, tmp_path).sources[name] == f"environment {variable}"
    assert load({name: value}, {}, tmp_path).sources[name] == f"flag --{name.replace('_', '-')}"


def test_the_file_can_be_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, "concurrency = 3\n")
    write(tmp_path, "concurrency = 4\n", "other.toml")
    settings = load({}, {"HEADRACE_CONFIG": "other.toml"}, tmp_path)
    assert source(settings, "concurrency") == (4, "other.toml")
    settings = load({}, {"HEADRACE_CONFIG": str(tmp_path / "other.toml")}, tmp_path / "nowhere")
    assert settings.concurrency == 4


@pytest.mark.parametrize("value", ["ten", "1.5", "-1", "", " 5", "0", "1e3", "٣", "9" * 30, "true", "1_000"])
def test_a_number_out_of_form_or_bounds_is_refused_by_name_with_bounds(tmp_path: Path, value: str) -> None:
    for error, source_name in (
        (refused(tmp_path, environ={"HEADRACE_FLUSH_SIZE": value}), "environment HEADRACE_FLUSH_SIZE"),
        (refused(tmp_path, flags={"flush_size": value}), "flag --flush-size"),
    ):
        assert error.message.startswith(f"{source_name}: expected an integer from 1 to 100000 (updates)")
        assert repr(value) in error.message or repr(int(value)) in error.message
        assert error.exit_code == 2


@pytest.mark.parametrize("text", ['"500"', "1.5", "-1", "0", "true", "[1]", "1979-05-27"])
def test_a_number_in_the_file_is_a_number(tmp_path: Path, text: str) -> None:
    write(tmp_path, f"[limits]\nflush_size = {text}\n")
    assert refused(tmp_path).message.startswith("headrace.toml: flush_size: expected an integer from 1")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("store", "", "store: expected a URL"),
        ("store", "headrace.db", "store: expected a URL"),
        ("store", "sqlite:///a\x00b", "store: expected a URL"),
        ("store", 5, "store: expected a URL, got 5"),
        ("objects", "", "objects: expected a URL or a directory"),
        ("environment", " ", "environment: expected a name"),
        ("environment", "x" * 201, "environment: expected at most 200 characters, got 201"),
        ("log_format", "xml", "log_format: expected one of console, json, got 'xml'"),
        ("log_level", "loud", "log_level: expected one of debug, info, warning, error, critical, got 'loud'"),
        ("concurrency", "0", "concurrency: expected an integer from 1 to 100000 (runs), got 0"),
        ("concurrency", True, "concurrency: expected an integer"),
        ("processes", "-1", "processes: expected an integer from 0 to 1024 (processes), got -1"),
    ],
)
def test_a_bad_value_is_refused_by_name(tmp_path: Path, name: str, value: object, message: str) -> None:
    error = refused(tmp_path, flags={name: value})
    assert error.message.startswith(f"flag --{name.replace('_', '-')}: {message.removeprefix(f'{name}: ')}")


def test_choices_are_read_in_any_case(tmp_path: Path) -> None:
    settings = load({}, {"HEADRACE_LOG_LEVEL": "WARNING", "HEADRACE_LOG_FORMAT": "JSON"}, tmp_path)
    assert (settings.log_level, settings.log_format) == ("warning", "json")


def test_a_bad_value_that_another_overrides_is_still_refused(tmp_path: Path) -> None:
    write(tmp_path, "concurrency = 0\n")
    assert "headrace.toml: concurrency" in refused(tmp_path, flags={"concurrency": 5}).message


def test_limits_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert "session_timeout_ms" in refused(tmp_path, environ={"HEADRACE_SESSION_TIMEOUT_MS": "100"}).message


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("HEADRACE_FLUSHSIZE", "did you mean HEADRACE_FLUSH_SIZE?"),
        ("HEADRACE_STOER", "did you mean HEADRACE_STORE?"),
        ("HEADRACE_CONFIGS", "did you mean HEADRACE_CONFIG?"),
        ("HEADRACE_store", "did you mean HEADRACE_STORE?"),
        ("HEADRACE_QQQQQQ", "unset it, or see `headrace config show`"),
    ],
)
def test_an_unknown_variable_is_refused_with_what_was_meant(tmp_path: Path, variable: str, hint: str) -> None:
    error = refused(tmp_path, environ={variable: "1"})
    assert variable in error.message
    assert error.hint == hint


def test_variables_of_others_and_of_later_versions_pass(tmp_path: Path) -> None:
    environ = {"PATH": "x", "headrace_x": "1", "HEADRACE_LISTEN": "k", "HEADRACE_TEST_SEED": "4"}
    assert set(load({}, environ, tmp_path).sources.values()) == {"default"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stoer = 1", "headrace.toml: unknown setting stoer", "did you mean store?"),
        ("[limit]\nx = 1", "headrace.toml: unknown setting limit", "did you mean limits?"),
        ("[limits]\nflush = 1", "headrace.toml [limits]: unknown setting", "did you mean flush_size?"),
        ("flush_size = 1", "headrace.toml: flush_size is a", "write it under [limits] in headrace.toml"),
        ("limits = 4", "headrace.toml: expected limits to be a table, got 4", "write [limits]"),
        ("store = ", "headrace.toml: expected TOML", 'write lines like store = "…"'),
        ("x = " + "[" * 50_000, "headrace.toml: expected TOML", 'write lines like store = "…"'),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_a_hint(tmp_path: Path, text: str, message: str, hint: str) -> None:
    write(tmp_path, text)
    error = refused(tmp_path)
    assert error.message.startswith(message)
    assert error.hint == hint


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "nowhere.toml can't be read" in refused(tmp_path, environ={"HEADRACE_CONFIG": "nowhere.toml"}).message
    assert (
        "HEADRACE_CONFIG: expected the path of a file, got an empty text"
        in refused(tmp_path, environ={"HEADRACE_CONFIG": ""}).message
    )
    (tmp_path / "headrace.toml").write_bytes(b'store = "\xff"')
    assert "expected UTF-8, got an invalid byte at 9" in refused(tmp_path).message
    (tmp_path / "headrace.toml").write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    assert "expected at most" in refused(tmp_path).message
    (tmp_path / "headrace.toml").unlink()
    (tmp_path / "headrace.toml").mkdir()
    assert "headrace.toml can't be read" in refused(tmp_path).message


def test_an_unknown_flag_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, flags={"stor": None}).hint == "did you mean --store?"


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    store = "postgres://me:hunter2@host/db?sslpassword=hunter2&application_name=x"
    direct = "postgres://me:hunter2@host:5433/db"
    objects = "s3://bucket?secret_access_key=hunter2"
    settings = load({"store": store, "direct_dsn": direct, "objects": objects}, {}, tmp_path)
    assert settings.store == store
    lines = settings.shown()
    assert [line.name for line in lines] == list(NAMES)
    assert "hunter2" not in repr(lines) + repr(settings)
    assert lines[0] == (
        "store",
        "postgres://me:***@host/db?sslpassword=***&application_name=x",
        "flag --store",
    )
    assert lines[1] == ("direct_dsn", "postgres://me:***@host:5433/db", "flag --direct-dsn")
    assert lines[5] == ("environment", "default", "default")


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("grpc_secret", "abc", HIDDEN),
        ("api_key", "abc", HIDDEN),
        ("store", "sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("store", "postgres://u:p@ss/w@rd@host/db", "postgres://u:***@host/db"),
        ("store", "postgres://:p@host/db", "postgres://:***@host/db"),
        ("store", "postgres://u@host:5432/db", "postgres://u@host:5432/db"),
        ("objects", "s3://b?access_key_id=a&token=b#f", "s3://b?access_key_id=***&token=***#f"),
    ],
)
def test_only_what_is_secret_is_hidden(name: str, value: str, shown: str) -> None:
    assert hidden(name, value) == shown


def test_an_error_does_not_tell_a_secret(tmp_path: Path) -> None:
    for value in ("postgres:/u:hunter2@host", "postgres://u:hunter2@host/\x01"):
        assert "hunter2" not in str(refused(tmp_path, flags={"store": value}))

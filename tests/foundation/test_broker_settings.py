"""Settings of the task broker: secrets are never shown, endpoints are valid addresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting
from headrace.foundation.settings import HIDDEN, SECRET_BYTES_MIN, SECRETS_MAX, load, secrets_of
from headrace.foundation.targets import TARGETS_MAX, PushTarget, push_targets

ONE, TWO = "the first of two secrets", "the second, an older one"


@pytest.mark.parametrize("text", [f'["{ONE}"]', f' [ "{ONE}" ]', ONE, f" {ONE} "])
def test_one_secret_is_read_however_it_is_written(text: str) -> None:
    assert secrets_of(text) == (ONE,)


def test_several_secrets_keep_their_order(tmp_path: Path) -> None:
    word = TWO.replace(",", "")
    assert secrets_of(f"{ONE}, {word}") == (ONE, word)
    settings = load({}, {"HEADRACE_GRPC_SECRETS": json.dumps([ONE, TWO])}, tmp_path)
    assert settings.grpc_secrets == (ONE, TWO)
    (tmp_path / "headrace.toml").write_text(f'grpc_secrets = ["{ONE}", "{TWO}"]')
    assert load({}, {}, tmp_path).grpc_secrets == (ONE, TWO)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        '["a secret that is never closed"',
        "a secret of many bytes,",
        "x" * (SECRET_BYTES_MIN - 1),
        "a secret of many bytes\n and lines",
        ",".join(["x" * SECRET_BYTES_MIN] * (SECRETS_MAX + 1)),
        "[" * 100_000,
    ],
)
def test_what_is_no_secret_is_refused_by_name_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSetting, match="environment HEADRACE_GRPC_SECRETS: expected") as refused:
        load({}, {"HEADRACE_GRPC_SECRETS": text}, tmp_path)
    assert "many bytes" not in str(refused.value)


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    settings = load({}, {"HEADRACE_GRPC_SECRETS": ONE}, tmp_path)
    shown = {setting.name: setting.value for setting in settings.shown()}
    assert shown["grpc_secrets"] == HIDDEN
    assert ONE not in repr(settings)


def test_endpoints_are_read_in_order(tmp_path: Path) -> None:
    text = "a=http://localhost:50052, b=https://hands.example,a=http://[::1]:7"
    targets = (
        PushTarget("a", "localhost", 50_052, is_tls=False),
        PushTarget("b", "hands.example", 443, is_tls=True),
        PushTarget("a", "::1", 7, is_tls=False),
    )
    assert push_targets(text) == targets
    settings = load({}, {"HEADRACE_PUSH": text}, tmp_path)
    assert settings.push == targets
    shown = {setting.name: setting.value for setting in settings.shown()}
    assert shown["push"] == "a=http://localhost:50052, b=https://hands.example:443, a=http://[::1]:7"


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:1",
        "a",
        "a=",
        "=http://localhost:1",
        "a b=http://localhost:1",
        "a=localhost:1",
        "a=ftp://localhost:1",
        "a=http://:1",
        "a=http://localhost:0",
        "a=http://localhost:65536",
        "a=http://localhost:x",
        "a=http://user:hidden@localhost:1",
        "a=http://localhost:1/path",
        "a=http://localhost:1?query",
        "a=http://[::1:1",
        "a=http://localhost:1,",
        "a=http://localhost:1,a=http://localhost:1",
        "x" * 201 + "=http://localhost:1",
        ",".join(f"a{number}=http://h:1" for number in range(TARGETS_MAX + 1)),
    ],
)
def test_what_is_no_endpoint_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSetting, match="environment HEADRACE_PUSH: expected") as refused:
        load({}, {"HEADRACE_PUSH": text}, tmp_path)
    assert "hidden" not in str(refused.value)


def test_choices_are_checked(tmp_path: Path) -> None:
    settings = load({"delivery": "BOTH", "ack": "received"}, {}, tmp_path)
    assert (settings.delivery, settings.ack) == ("both", "received")
    assert (load({}, {}, tmp_path).delivery, load({}, {}, tmp_path).ack) == (None, "committed")
    for name in ("delivery", "ack"):
        with pytest.raises(InvalidSetting, match=f"{name}: expected one of"):
            load({name: "sometimes"}, {}, tmp_path)


def test_all_calls_hold_at_least_one_message(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="does not hold one message"):
        load({"grpc_buffer_bytes_max": 1_024, "grpc_message_bytes_max": 1_025}, {}, tmp_path)

"""`headrace doctor`: unsafe set-ups of a server, found in its settings and in what it answers without a key."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cli.conftest import Shell

EVERYWHERE = "0.0.0.0"
SECRET = "a secret of many bytes"


def check_of(shell: Shell, name: str, *flags: str) -> dict[str, Any]:
    """Return the result of one check."""
    for check in shell("doctor", "--json", *flags).json["checks"]:
        if check["check"] == name:
            return dict(check)
    raise AssertionError(f"expected the check {name}, got none")


@contextmanager
def served(shell: Shell, *flags: str) -> Iterator[str]:
    """Serve the store on a loopback address while the block lasts. Yields the port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", "--no-worker", "--port", "0", *flags],
        cwd=shell.place,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving" in line)
        yield re.findall(r":(\d+),", line)[0]
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture
def shell(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A directory with a store, whose settings name a port on which nothing listens."""
    shell("migrate")
    monkeypatch.setenv("HEADRACE_PORT", "1")
    return shell


def test_a_set_up_on_a_loopback_address_is_safe(shell: Shell) -> None:
    check = check_of(shell, "exposure")
    assert (check["ok"], check["hint"]) == (True, "")
    assert "127.0.0.1 is a loopback address" in check["detail"]


def test_a_public_address_without_key_and_tls_is_noted(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOST", EVERYWHERE)
    check = check_of(shell, "exposure")
    assert check["ok"]
    assert "no API key exists" in check["detail"]
    assert "has no TLS" in check["detail"]
    assert "headrace key create" in check["hint"]
    shell("key", "create", "--scopes", "work")
    assert "no API key exists" not in check_of(shell, "exposure")["detail"]


def test_activations_on_a_public_address_without_secrets_fail(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HOST", EVERYWHERE)
    monkeypatch.setenv("HEADRACE_DELIVERY", "pull")
    check = check_of(shell, "exposure")
    assert (check["ok"], "grpc_secrets is not set" in check["detail"]) == (False, True)
    assert "HEADRACE_GRPC_SECRETS" in check["hint"]
    monkeypatch.setenv("HEADRACE_GRPC_SECRETS", SECRET)
    monkeypatch.setenv("HEADRACE_PUSH", "app=http://192.0.2.1:50052")
    assert check_of(shell, "exposure")["ok"]


def test_a_server_without_authentication_on_a_public_address_fails(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(shell, "--no-auth") as port:
        monkeypatch.setenv("HEADRACE_PORT", port)
        check = check_of(shell, "exposure")
        assert check["ok"], "it listens on a loopback address"
        assert "every program of this machine has access" in check["detail"]
        monkeypatch.setenv("HEADRACE_HOST", EVERYWHERE)
        check = check_of(shell, "exposure")
        assert not check["ok"]
        assert f"http://127.0.0.1:{port} answers /v1/about without a key" in check["detail"]
        assert "--no-auth" in check["hint"]
        assert "FAIL  exposure" in shell("doctor").out


def test_metrics_that_are_open_on_a_public_address_fail_for_the_server_and_for_a_client(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_API_KEY", SECRET)
    with served(shell) as port:
        monkeypatch.setenv("HEADRACE_PORT", port)
        monkeypatch.setenv("HEADRACE_HOST", EVERYWHERE)
        for flags in ((), ("--server", f"http://{EVERYWHERE}:{port}")):
            check = check_of(shell, "exposure", *flags)
            assert not check["ok"], check
            assert "answers /metrics without a key" in check["detail"]
            assert "/v1/about" not in check["detail"]
        assert check_of(shell, "exposure", "--server", f"http://127.0.0.1:{port}")["ok"]


def test_files_with_secrets_that_others_can_read_are_noted(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shell.write("headrace.toml", 'concurrency = 3\nstore = "sqlite:///headrace.db"\n')
    config.chmod(0o644)
    assert check_of(shell, "secrets")["hint"] == "", "it holds no secret"
    config.write_text(f'grpc_secrets = ["{SECRET}"]\n')
    key = shell.write("key.pem", "not read by doctor")
    key.chmod(0o640)
    monkeypatch.setenv("HEADRACE_TLS_KEY", "key.pem")
    check = check_of(shell, "secrets")
    assert (check["ok"], check["hint"]) == (True, "chmod go-rwx")
    assert "headrace.toml (0644) holds grpc_secrets" in check["detail"]
    assert "key.pem" not in check["detail"]
    assert SECRET not in check["detail"]
    key.chmod(0o644)
    config.chmod(0o600)
    assert "key.pem (0644) is the TLS key" in check_of(shell, "secrets")["detail"]

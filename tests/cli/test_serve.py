"""Invalid settings of `headrace serve` are refused before anything listens."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Shell


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--delivery", "pull", "--host", "0.0.0.0"), "grpc_secrets is not set"),
        (("--delivery", "push"), "--delivery push requires push"),
        (("--delivery", "sideways"), "delivery: expected one of"),
        (("--ack", "never"), "ack: expected one of"),
        (("--tls-cert", "cert.pem"), "tls_key is not set"),
        (("--tls-key", "key.pem"), "tls_cert is not set"),
        (("--tls-cert", "tasks.py", "--tls-key", "tasks.py", "--port", "0"), "can't load tls_cert"),
        (("--no-auth", "--host", "0.0.0.0"), "--no-auth"),
    ],
)
def test_invalid_server_settings_are_refused_by_name(shell: Shell, flags: tuple[str, ...], message: str) -> None:
    ran = shell("serve", *flags)
    assert ran.code == 2
    assert message in ran.err


def test_with_secrets_a_server_may_listen_on_other_addresses(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_GRPC_SECRETS", "a secret of many bytes")
    ran = shell("serve", "--delivery", "pull", "--host", "0.0.0.0", "--tls-cert", "no.pem", "--tls-key", "no.pem")
    assert "grpc_secrets" not in ran.err
    assert "can't load tls_cert" in ran.err


def test_unused_push_endpoints_are_reported(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_PUSH", "app=http://localhost:50052")
    store = "sqlite:///no/such/directory/x.db"
    for flags, is_reported in (((), True), (("--delivery", "pull"), True), (("--delivery", "both"), False)):
        ran = shell("serve", *flags, "--port", "0", "--store", store)
        assert ("HEADRACE_PUSH is set but not used" in ran.err) is is_reported, ran.err
        assert ran.code != 0

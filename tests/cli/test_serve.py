"""What `headrace serve` refuses before anything listens."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Shell


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--delivery", "pull", "--host", "0.0.0.0"), "grpc_secrets is not set"),
        (("--delivery", "push"), "--delivery push requires push"),
        (("--delivery", "sideways"), "delivery must be one of"),
        (("--ack", "never"), "ack must be one of"),
        (("--tls-cert", "cert.pem"), "tls_key is not set"),
        (("--tls-key", "key.pem"), "tls_cert is not set"),
        (("--tls-cert", "tasks.py", "--tls-key", "tasks.py", "--port", "0"), "can't load tls_cert"),
        (("--no-auth", "--host", "0.0.0.0"), "--no-auth"),
    ],
)
def test_what_can_t_be_served_is_refused_by_name(shell: Shell, flags: tuple[str, ...], said: str) -> None:
    ran = shell("serve", *flags)
    assert ran.code == 2
    assert said in ran.err


def test_secrets_let_a_server_be_reached_from_elsewhere(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_GRPC_SECRETS", "a secret of many bytes")
    ran = shell("serve", "--delivery", "pull", "--host", "0.0.0.0", "--tls-cert", "no.pem", "--tls-key", "no.pem")
    assert "grpc_secrets" not in ran.err
    assert "can't load tls_cert" in ran.err


def test_endpoints_that_nothing_is_pushed_to_are_told_of(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_PUSH", "app=http://localhost:50052")
    store = "sqlite:///no/such/directory/x.db"
    for flags, is_told in (((), True), (("--delivery", "pull"), True), (("--delivery", "both"), False)):
        ran = shell("serve", *flags, "--port", "0", "--store", store)
        assert ("HEADRACE_PUSH is set but not used" in ran.err) is is_told, ran.err
        assert ran.code != 0

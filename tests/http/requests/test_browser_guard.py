"""Host names of a server without authentication: a page whose name leads to this machine gets nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.foundation.errors import InvalidSetting
from headrace.foundation.settings import load
from tests.support.http_server import AUTH, HttpAnswer, ServerUnderTest, running_server

HOSTS = ("batches.internal", "fd00::7")
DATA = ("/v1/batches", "/api/v1/runs", "/metrics")


async def ask_by_name(server: ServerUnderTest, path: str, host: str, headers: dict[str, str]) -> HttpAnswer:
    """Send a GET with a `Host` header."""
    peer = await server.peer().connect()
    lines = [f"GET {path} HTTP/1.1", f"host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    await peer.send(("\r\n".join(lines) + "\r\n\r\n").encode())
    return await peer.answer("GET")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("batches.internal:1", 200),
        ("[fd00::7]:8000", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("evil-localhost", 421),
        ("localhost@evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.10", 421),
        ("[::1].evil.example", 421),
        ("[::2]", 421),
        ("[fd00::7", 421),
        ("::1", 421),
        ("", 421),
    ],
)
async def test_an_open_server_answers_to_its_own_names_only(host: str, status: int, tmp_path: Path) -> None:
    async with running_server(tmp_path, is_open=True, hosts=HOSTS) as server:
        for path in DATA:
            answer = await ask_by_name(server, path, host, {})
            assert (answer.status, path) == (status, path), answer
        if status == 421:
            forged = await ask_by_name(server, "/v1/batches", host, {"authorization": "Bearer forged"})
            assert (forged.status, forged.json["code"]) == (421, "WRONG_HOST")
            assert "allowed_hosts" in forged.json["hint"]


async def test_a_server_with_keys_answers_to_any_name(tmp_path: Path) -> None:
    async with running_server(tmp_path, hosts=()) as server:
        assert (await ask_by_name(server, "/v1/batches", "batches.example", AUTH)).status == 200
        assert (await ask_by_name(server, "/v1/batches", "batches.example", {})).status == 401


async def test_a_key_is_enough_for_an_open_server_under_another_name(tmp_path: Path) -> None:
    async with running_server(tmp_path, is_open=True, hosts=()) as server:
        assert (await ask_by_name(server, "/v1/batches", "batches.example", AUTH)).status == 200


def test_names_are_a_setting(tmp_path: Path) -> None:
    settings = load({}, {"HEADRACE_ALLOWED_HOSTS": "Batches.Internal, 10.0.0.7,[fd00::7]"}, tmp_path)
    assert settings.allowed_hosts == ("batches.internal", "10.0.0.7", "[fd00::7]")
    assert settings.value("allowed_hosts") == "batches.internal, 10.0.0.7, [fd00::7]"


@pytest.mark.parametrize("text", ["a:8000", "http://a", "a,,b", "a b", "fd00::7", "*"])
def test_a_name_with_a_port_or_a_scheme_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="expected host names"):
        load({}, {"HEADRACE_ALLOWED_HOSTS": text}, tmp_path)

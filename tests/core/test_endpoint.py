"""Endpoints: allowed addresses, signatures, and the outcome of each response."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.endpoint import (
    NETWORKS_MAX,
    RETRY_AFTER_S_MAX,
    SECRETS_MAX,
    URL_CHARS_MAX,
    EndpointBusy,
    EndpointFailed,
    EndpointRefused,
    is_allowed,
    judge,
    networks_of,
    parse_url,
    secrets_of,
    signature,
)
from headrace.foundation.errors import InvalidSetting

NOW_US = 1_700_000_000_000_000


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://example.com", ("https", "example.com", 443, "/")),
        ("https://Example.com:8443/a/b?c=d", ("https", "example.com", 8443, "/a/b?c=d")),
        ("http://[fd00::1]/x", ("http", "fd00::1", 80, "/x")),
    ],
)
def test_a_url_names_a_place(url: str, place: tuple[str, str, int, str]) -> None:
    assert parse_url(url) == place


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com", "ftp://example.com", "https://", "https://u:p@example.com", "https://example.com/#part",
        "https://example.com:0", "https://example.com:99999", "https://exa mple.com", "https://example.com/\r\nhost: x",
        "https://[::1", "https://\u00e9.example", None, 7, "https://example.com/" + "a" * URL_CHARS_MAX,
    ],
)  # fmt: skip
def test_what_is_no_such_url_is_refused(url: object) -> None:
    with pytest.raises(InvalidSetting):
        parse_url(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::", "::1",
        "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001:0:1::1", "2001:db8::1", "no address",
        "", "1.2.3", "::10.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8", "fec0::1",
        "feff:ffff::1", "192.88.99.1", "192.0.0.8", "3fff::1", "3fff:fff::1", "5f00::1", "100::1", "100:0:0:1::1",
        "64:ff9b::10.0.0.1", "64:ff9b:1::7f00:1", "2002:a00:1::1", "2001:2::1", "2001:10::1", "2001:20::1", "1::1",
        "4000::1", "8000::1", "fc00::1",
    ],
)  # fmt: skip
def test_what_is_not_public_is_never_reached(address: str) -> None:
    assert not is_allowed(address, "https", ())
    assert not is_allowed(address, "http", ())


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_what_is_public_is_reached_over_https_only(address: str) -> None:
    assert is_allowed(address, "https", ())
    assert not is_allowed(address, "http", ())


def test_a_network_that_is_allowed_is_reached_over_both_and_nothing_beside_it() -> None:
    allowed = networks_of(["10.1.0.0/16", "fd00::/8"])
    for scheme in ("http", "https"):
        assert is_allowed("10.1.2.3", scheme, allowed)
        assert is_allowed("::ffff:10.1.2.3", scheme, allowed)
        assert is_allowed("fd12::1", scheme, allowed)
        assert not is_allowed("10.2.0.1", scheme, allowed)


@given(st.ip_addresses())
def test_an_address_is_reached_only_if_it_is_global(address: object) -> None:
    if is_allowed(str(address), "https", ()):
        assert getattr(getattr(address, "ipv4_mapped", None) or address, "is_global", False)


def test_networks_have_a_form_and_a_bound() -> None:
    assert networks_of([f"10.0.{number}.0/24" for number in range(NETWORKS_MAX)])
    for names in (["10.0.0.1/8"], ["everything"], "10.0.0.0/8", ["10.0.0.0/8"] * (NETWORKS_MAX + 1)):
        with pytest.raises(InvalidSetting):
            networks_of(names)


def test_a_signature_is_that_of_standard_webhooks_one_for_each_secret() -> None:
    first, second = b"k" * 24, b"another secret of ours"
    secrets = secrets_of(["whsec_" + base64.b64encode(first).decode(), second.decode()])
    assert secrets == (first, second)
    signatures = signature(secrets, "run_1", 1_700_000_000, b'{"a":1}')
    for key, signed in zip(secrets, signatures.split(" "), strict=True):
        digest = hmac.new(key, b'run_1.1700000000.{"a":1}', hashlib.sha256).digest()
        assert signed == "v1," + base64.b64encode(digest).decode()


def test_a_secret_that_is_none_is_refused_and_not_repeated() -> None:
    for secret in ("short", "whsec_not base64!", "whsec_" + base64.b64encode(b"short").decode(), [], [7], None, 7,
                   "\ud800" * 20, ["a secret of sixteen bytes"] * (SECRETS_MAX + 1)):  # fmt: skip
        with pytest.raises(InvalidSetting) as raised:
            secrets_of(secret)
        assert "short" not in str(raised.value)


def verdict(status: int, retry_after: str | None = None) -> object:
    try:
        judge(status, retry_after, NOW_US)
    except EndpointBusy as busy:
        return busy.seconds
    except (EndpointFailed, EndpointRefused) as error:
        return type(error)
    return None


def test_the_status_decides() -> None:
    assert [verdict(status) for status in (200, 201, 202, 204, 299)] == [None] * 5
    assert [verdict(status) for status in (101, 429, 500, 502, 503, 504, 599)] == [EndpointFailed] * 7
    assert [verdict(status) for status in (300, 301, 302, 304, 400, 401, 404, 408, 410, 422)] == [EndpointRefused] * 10
    with pytest.raises(EndpointRefused, match="redirects are not followed"):
        judge(302, None, NOW_US)


def test_retry_after_is_heard_of_429_and_503_in_both_forms_and_kept_to_a_day() -> None:
    date = format_datetime(datetime.fromtimestamp(NOW_US / 1e6 + 90, UTC), usegmt=True)
    for status in (429, 503):
        assert verdict(status, "7") == 7
        assert verdict(status, " 0 ") == 0
        assert verdict(status, date) == 90
        assert verdict(status, "Wed, 21 Oct 2015 07:28:00 GMT") == 0
        assert verdict(status, "9" * 50) == RETRY_AFTER_S_MAX
        assert verdict(status, "Wed, 21 Oct 9999 07:28:00 GMT") == RETRY_AFTER_S_MAX
        for nothing in ("", "soon", "-5", "1.5", "\u0663", "Wed, 99 Oct 2015 07:28:00 GMT"):
            assert verdict(status, nothing) is EndpointFailed, nothing
    assert verdict(500, "7") is EndpointFailed
    assert verdict(404, "7") is EndpointRefused

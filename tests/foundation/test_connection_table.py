"""The table of a server's connections: shares of peers, and which connection is closed for a new one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.foundation.connection_table import (
    REFUSED_MAX,
    RESCAN_S_EACH,
    Admission,
    ConnectionTable,
    HeldConnection,
    network_of,
)
from headrace.foundation.descriptors import connections_max_of


class Held:
    """A connection that counts how often it was closed."""

    def __init__(self, idle_since_s: float | None = 0.0) -> None:
        self.idle_since_s = idle_since_s
        self.closed_count = 0

    def close_idle(self) -> None:
        """Note the call."""
        self.closed_count += 1


def filled(table: ConnectionTable, address: str, *idle_since_s: float | None) -> list[Held]:
    """Admit connections of one address."""
    connections = [Held(since_s) for since_s in idle_since_s]
    assert all(table.admit(connection, address, now_s=1.0) is Admission.ADMITTED for connection in connections)
    return connections


def test_the_connection_that_is_idle_longest_is_closed_for_a_new_one() -> None:
    table = ConnectionTable(connections_max=3, peer_connections_max=3)
    connections = filled(table, "10.0.0.1", 3.0, 1.0, 2.0)
    for _ in range(3):
        assert table.admit(Held(None), "10.0.0.2", now_s=4.0) is Admission.ADMITTED
        assert len(table) == 3
    assert [connection.closed_count for connection in connections] == [1, 1, 1]
    assert table.admit(Held(), "10.0.0.2", now_s=4.0) is Admission.REFUSED


def test_a_connection_that_became_busy_is_not_closed() -> None:
    table = ConnectionTable(connections_max=3, peer_connections_max=3)
    connections = filled(table, "10.0.0.1", 1.0, 2.0, 3.0)
    table.admit(Held(None), "10.0.0.2", now_s=4.0)
    connections[1].idle_since_s = None
    table.admit(Held(None), "10.0.0.2", now_s=4.0)
    assert [connection.closed_count for connection in connections] == [1, 0, 1]


def test_a_peer_at_its_share_loses_a_connection_of_its_own() -> None:
    table = ConnectionTable(connections_max=4, peer_connections_max=2)
    (other,) = filled(table, "10.0.0.2", 0.5)
    mates = filled(table, "10.0.0.1", 1.0, 2.0)
    assert table.admit(Held(None), "10.0.0.1", now_s=3.0) is Admission.ADMITTED
    assert (mates[0].closed_count, mates[1].closed_count, other.closed_count, len(table)) == (1, 0, 0, 3)
    mates[1].idle_since_s = None
    assert table.admit(Held(), "10.0.0.1", now_s=3.0) is Admission.REFUSED
    assert table.admit(Held(), "10.0.0.3", now_s=3.0) is Admission.ADMITTED, "a place that no peer's share takes"


def test_refused_connections_are_few_and_the_search_for_an_idle_one_is_not_repeated_at_once() -> None:
    table = ConnectionTable(connections_max=2, peer_connections_max=2)
    busy = filled(table, "10.0.0.1", None, None)
    refused = [Held() for _ in range(REFUSED_MAX)]
    assert {table.admit(connection, "10.0.0.2", now_s=1.0) for connection in refused} == {Admission.REFUSED}
    assert table.admit(Held(), "10.0.0.2", now_s=1.0) is Admission.DROPPED
    table.remove(refused[0])
    busy[0].idle_since_s = 1.0
    assert table.admit(Held(), "10.0.0.2", now_s=1.0) is Admission.REFUSED
    assert table.admit(Held(), "10.0.0.2", now_s=1.0 + 2 * RESCAN_S_EACH) is Admission.ADMITTED
    assert busy[0].closed_count == 1


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("2001:db8:1:3::1", "2001:db8:1:3::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_a_peer_is_an_ipv4_address_or_a_network_of_ipv6(address: str, peer: str) -> None:
    assert network_of(address) == peer


@pytest.mark.parametrize(
    ("connections_max", "descriptors", "expected"),
    [(4_096, 1_048_576, 4_096), (4_096, 1_024, 896), (100, 1_024, 100), (4_096, 64, 32), (4_096, 1, 1)],
)
def test_descriptors_bound_the_connections(connections_max: int, descriptors: int, expected: int) -> None:
    assert connections_max_of(connections_max, descriptors=descriptors, reserve=128) == expected


steps = st.lists(
    st.tuples(st.sampled_from("oicr"), st.integers(0, 3), st.integers(0, 30)), max_size=80
)  # open, idle, call, remove


@given(steps)
def test_no_sequence_exceeds_a_bound_or_loses_count(sequence: list[tuple[str, int, int]]) -> None:
    table = ConnectionTable(connections_max=5, peer_connections_max=2)
    opened: dict[HeldConnection, str] = {}
    for number, (step, peer, which) in enumerate(sequence):
        now_s = float(number)
        if step == "o":
            connection = Held(now_s)
            if table.admit(connection, f"10.0.0.{peer}", now_s=now_s) is Admission.ADMITTED:
                opened[connection] = f"10.0.0.{peer}"
        elif opened:
            picked = list(opened)[which % len(opened)]
            assert isinstance(picked, Held)
            if step == "r":
                table.remove(picked)
                del opened[picked]
            else:
                picked.idle_since_s = None if step == "c" else now_s
        for connection in [held for held in opened if isinstance(held, Held) and held.closed_count]:
            assert connection.closed_count == 1
            table.remove(connection)
            del opened[connection]
        assert set(table) == set(opened)
        assert len(table) <= 5
        assert all(list(opened.values()).count(address) <= 2 for address in opened.values())

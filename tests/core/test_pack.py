"""Many small byte strings in one value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core import pack
from headrace.foundation.errors import StoreBroken

STRINGS = st.lists(st.binary(max_size=300), max_size=40)


@given(STRINGS)
def test_what_was_packed_comes_back(strings: list[bytes]) -> None:
    assert pack.unpack(pack.pack(strings)) == (strings, None)
    assert pack.count(pack.pack(strings)) == len(strings)


@given(STRINGS, st.data())
def test_kinds_come_back_beside_their_strings(strings: list[bytes], data: st.DataObject) -> None:
    kinds = bytes(
        data.draw(st.lists(st.sampled_from(list(pack.CONTENT_TYPES)), min_size=len(strings), max_size=len(strings)))
    )
    unpacked, unpacked_kinds = pack.unpack(pack.pack(strings, kinds))
    assert unpacked == strings
    assert (unpacked_kinds or bytes(len(strings))) == kinds


@given(STRINGS.filter(bool), st.data())
def test_some_can_be_taken_without_the_others(strings: list[bytes], data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, len(strings) - 1), max_size=10))
    assert pack.unpack_some(pack.pack(strings), positions) == ([strings[position] for position in positions], None)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65_535, 65_536])
def test_a_length_at_each_edge_of_its_width_comes_back(length: int) -> None:
    strings = [b"x" * length, b"", b"y"]
    assert pack.unpack(pack.pack(strings)) == (strings, None)


def test_256_items_of_100_bytes_cost_one_byte_a_run_and_five() -> None:
    assert len(pack.pack([b"x" * 100] * 256)) == 256 * 101 + 5


def test_kinds_that_are_all_json_cost_nothing() -> None:
    assert pack.pack([b"1", b"2"], bytes(2)) == pack.pack([b"1", b"2"])


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_decoded(data: bytes) -> None:
    try:
        strings, kinds = pack.unpack(data)
    except StoreBroken:
        return
    assert b"".join(strings) == data[len(data) - sum(map(len, strings)) :]
    assert kinds is None or len(kinds) == len(strings)


@given(STRINGS.filter(bool), st.integers(1, 50))
def test_a_value_that_was_cut_short_is_not_read(strings: list[bytes], cut: int) -> None:
    packed = pack.pack(strings)
    with pytest.raises(StoreBroken):
        pack.unpack(packed[: max(0, len(packed) - cut)])

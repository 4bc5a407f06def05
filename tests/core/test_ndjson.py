"""The NDJSON parser, fed whole input and single bytes, and with a record after. Each rule of the module has tests."""

from __future__ import annotations

import json
from collections import deque
from typing import Any, ClassVar, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core import ndjson
from headrace.core.ndjson import BLANK_LINES_MAX, Item, NdjsonMachine, Oversized, Unreadable, extract_index_and_task
from headrace.foundation.errors import IllegalTransition, InvalidInput
from tests.support.hostile import HOSTILE, ITEM_BYTES_MAX, HostileLine


def items_of(*pieces: bytes, item_bytes_max: int = 1_000, validate: bool = True) -> list[Item]:
    machine = NdjsonMachine(item_bytes_max=item_bytes_max, validate=validate)
    return [item for piece in pieces for item in machine.feed(piece)] + machine.close()


def values_of(*pieces: bytes, item_bytes_max: int = 1_000) -> list[Any]:
    return [json.loads(item) for item in items_of(*pieces, item_bytes_max=item_bytes_max) if isinstance(item, bytes)]


def is_good(item: Item) -> bool:
    return isinstance(item, bytes)


def single_bytes(data: bytes) -> list[bytes]:
    return [data[position : position + 1] for position in range(len(data))]


def only_oversized(items: list[Item]) -> Oversized:
    (item,) = items
    assert isinstance(item, Oversized)
    return item


def only_unreadable(items: list[Item]) -> Unreadable:
    (item,) = items
    assert isinstance(item, Unreadable)
    return item


class TestBehavioursOfTriggerDev:
    """The assertions of trigger.dev's tests of its parser (numbers 21 to 44 of the contract)."""

    def test_21_basic_ndjson_is_parsed(self) -> None:
        assert values_of(b'{"index":0}\n{"index":1}\n{"index":2}\n') == [
            {"index": 0},
            {"index": 1},
            {"index": 2},
        ]

    def test_22_a_last_line_without_a_newline_is_an_item(self) -> None:
        assert values_of(b'{"index":0}\n{"index":1}') == [{"index": 0}, {"index": 1}]

    def test_23_an_escaped_newline_does_not_split_an_item(self) -> None:
        assert values_of(rb'{"text":"one\ntwo"}' + b"\n") == [{"text": "one\ntwo"}]

    def test_24_empty_lines_are_skipped(self) -> None:
        assert values_of(b'\n{"a":1}\n\n\n{"a":2}\n  \n\r\n{"a":3}\n\n') == [{"a": 1}, {"a": 2}, {"a": 3}]

    def test_25_chunks_may_split_a_line(self) -> None:
        assert values_of(b'{"ind', b'ex":', b"7}\n") == [{"index": 7}]

    def test_26_chunks_may_split_a_character(self) -> None:
        line = '{"text":"a😀b"}\n'.encode()
        cut = line.index(b"\xf0") + 2
        assert values_of(line[:cut], line[cut:]) == [{"text": "a😀b"}]

    def test_27_chunks_may_split_many_characters(self) -> None:
        line = '{"text":"日本語のテキスト"}\n'.encode()
        assert values_of(*(line[start : start + 2] for start in range(0, len(line), 2))) == [
            {"text": "日本語のテキスト"}
        ]

    def test_28_a_line_over_the_limit_is_a_marker(self) -> None:
        line = b'{"index":3,"task":"my-task","payload":"' + b"x" * 200 + b'"}'
        marker = only_oversized(items_of(line + b"\n", item_bytes_max=100))
        assert marker == Oversized(
            index=3, task="my-task", actual_bytes=len(line), max_bytes=100, line=1, raw=line[:100]
        )

    def test_29_a_line_that_never_ends_is_a_marker(self) -> None:
        pieces = [b'{"index":7,"task":"big-task","payload":"'] + [b"x" * 50] * 20
        marker = only_oversized(items_of(*pieces, item_bytes_max=100))
        assert (marker.index, marker.task, marker.actual_bytes) == (7, "big-task", 1_040)

    def test_30_the_rest_of_a_line_over_the_limit_is_skipped_in_later_chunks(self) -> None:
        first, marker, last = items_of(
            b'{"index":0}\n{"index":1,"payload":"' + b"x" * 100,
            b"x" * 100,
            b'xx"}\n{"index":2}\n',
            item_bytes_max=60,
        )
        assert (first, last) == (b'{"index":0}', b'{"index":2}')
        assert isinstance(marker, Oversized)
        assert (marker.index, marker.line) == (1, 2)

    def test_31_an_index_that_can_not_be_read_is_the_position(self) -> None:
        _, marker = items_of(b'{"index":0}\n{"task":"big","payload":"' + b"x" * 100 + b'"}\n', item_bytes_max=60)
        assert isinstance(marker, Oversized)
        assert (marker.index, marker.task) == (1, "big")

    def test_32_size_is_counted_in_bytes_before_decoding(self) -> None:
        small, large = '"漢漢"'.encode(), '"漢漢漢"'.encode()
        assert items_of(small, item_bytes_max=8) == [small]
        assert only_oversized(items_of(large, item_bytes_max=8)).actual_bytes == 11

    def test_33_the_flush_emits_a_last_line(self) -> None:
        machine = NdjsonMachine(item_bytes_max=100)
        assert machine.feed(b'{"a":1}\n{"a":2}') == [b'{"a":1}']
        assert machine.close() == [b'{"a":2}']

    def test_34_invalid_json_names_its_line(self) -> None:
        _, marker = items_of(b'{"a":1}\n\nnot json\n')
        assert isinstance(marker, Unreadable)
        assert (marker.index, marker.line) == (1, 3)
        assert marker.reason == "Invalid JSON at line 3: invalid character (byte 1)"

    def test_35_invalid_utf_8_names_its_line(self) -> None:
        marker = only_unreadable(items_of(b'\n"\xff\xfe"\n'))
        assert marker.reason == "Invalid UTF-8 at line 2: invalid start byte (byte 1)"

    def test_36_many_small_chunks_make_one_item(self) -> None:
        line = b'{"index":0,"payload":"' + b"x" * 500 + b'"}'
        assert items_of(*single_bytes(line + b"\n")) == [line]

    def test_37_one_chunk_may_hold_many_lines(self) -> None:
        assert values_of(b"1\n2\n3\n4\n5\n") == [1, 2, 3, 4, 5]

    def test_38_an_empty_stream_has_no_items(self) -> None:
        assert items_of() == []
        assert items_of(b"") == []

    def test_39_good_lines_and_markers_share_a_stream(self) -> None:
        first, marker, last = items_of(
            b'{"index":0}\n{"index":1,"p":"' + b"x" * 100 + b'"}\n{"index":2}\n', item_bytes_max=50
        )
        assert (first, last) == (b'{"index":0}', b'{"index":2}')
        assert isinstance(marker, Oversized)
        assert marker.index == 1

    def test_40_white_space_alone_has_no_items(self) -> None:
        assert items_of(b"   \n\t\n \r\n  ") == []

    def test_41_index_and_task_are_extracted(self) -> None:
        assert extract_index_and_task(b'{"index":42,"task":"my-task","payload":{}}') == (42, "my-task")

    @pytest.mark.parametrize(
        "prefix", [b"", b"{", b"not json", b"[]", b'"index":3', b'[{"index":1,"task":"t"}]', b"\xff\x00"]
    )
    def test_42_empty_or_malformed_bytes_give_the_defaults(self, prefix: bytes) -> None:
        assert extract_index_and_task(prefix) == (-1, "unknown")

    def test_43_keys_may_come_in_any_order(self) -> None:
        prefix = b'{"payload":"p","task":"other-task","options":[1,2],"index":99,"x'
        assert extract_index_and_task(prefix) == (99, "other-task")

    def test_44_nested_keys_do_not_count(self) -> None:
        prefix = b'{"payload":{"index":1,"task":"in"},"index":5,"a":[{"index":2}],"task":"outer","b":{"task":"x"'
        assert extract_index_and_task(prefix) == (5, "outer")


class TestHostileLines:
    """Every malformed line, in every way it can arrive."""

    @pytest.mark.parametrize("terminator", [b"", b"\n"], ids=["unfinished", "finished"])
    @pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
    def test_whole(self, hostile: HostileLine, terminator: bytes) -> None:
        assert_expected(hostile, items_of(hostile.line + terminator, item_bytes_max=ITEM_BYTES_MAX))

    @pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
    def test_byte_by_byte(self, hostile: HostileLine) -> None:
        whole = items_of(hostile.line + b"\n1", item_bytes_max=ITEM_BYTES_MAX)
        pieces = single_bytes(hostile.line + b"\n1")
        assert items_of(*pieces, item_bytes_max=ITEM_BYTES_MAX) == whole

    @pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
    def test_with_records_after(self, hostile: HostileLine) -> None:
        items = items_of(hostile.line + b"\n1\n2", item_bytes_max=ITEM_BYTES_MAX)
        assert items[-2:] == [b"1", b"2"]
        assert_expected(hostile, items[:-2])

    @pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
    def test_between_records(self, hostile: HostileLine) -> None:
        before, *middle, after = items_of(b"1\n" + hostile.line + b"\n2\n", item_bytes_max=ITEM_BYTES_MAX)
        assert (before, after) == (b"1", b"2")
        if not hostile.line.startswith(b"\xef\xbb\xbf"):
            assert_expected(hostile, middle, position=1)
        elif middle:
            assert only_unreadable(middle).line == 2, "a byte order mark is only one at the very beginning"

    @pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
    def test_without_validation_only_sizes_are_judged(self, hostile: HostileLine) -> None:
        items = items_of(hostile.line + b"\n", item_bytes_max=ITEM_BYTES_MAX, validate=False)
        assert [is_good(item) for item in items] == {
            "blank": [],
            "ok": [True],
            "unreadable": [True],
            "oversized": [False],
        }[hostile.expected]

    def test_a_lone_surrogate_is_called_by_its_name(self) -> None:
        for line in (rb'"\ud800"', rb'"\ud800 and more"', rb'{"\\\ud800":1}'):
            reason = only_unreadable(items_of(line)).reason
            assert reason == "Invalid JSON at line 1: an escape contains half a surrogate pair"
        assert "surrogate pair" in only_unreadable(items_of(rb'"\udc00"')).reason

    def test_a_cut_line_is_not_blamed_on_a_surrogate(self) -> None:
        for line in (rb'{"a":"\ud83d\ude00"', rb'{"a":"\\ud800"'):
            assert only_unreadable(items_of(line)).reason == (
                "Invalid JSON at line 1: the line ends before its value does"
            )

    def test_deep_nesting_says_so(self) -> None:
        line = HOSTILE["nesting of 100,000"].line
        reason = only_unreadable(items_of(line, item_bytes_max=ITEM_BYTES_MAX)).reason
        assert reason == "Invalid JSON at line 1: it is nested too deeply"


def assert_expected(hostile: HostileLine, items: list[Item], *, position: int = 0) -> None:
    if hostile.expected == "blank":
        assert items == []
    elif hostile.expected == "ok":
        assert items == [hostile.line.removeprefix(b"\xef\xbb\xbf").strip()]
    elif hostile.expected == "unreadable":
        marker = only_unreadable(items)
        assert (marker.index, marker.line) == (position, position + 1)
    else:
        expected_index, expected_task = extract_index_and_task(hostile.line[:512])
        marked = only_oversized(items)
        assert marked == Oversized(
            index=position if expected_index < 0 else expected_index,
            task=expected_task,
            actual_bytes=len(hostile.line),
            max_bytes=ITEM_BYTES_MAX,
            line=position + 1,
            raw=marked.raw,
        )
        assert hostile.line.removeprefix(b"\xef\xbb\xbf").startswith(marked.raw)


class TestTheIndexOfALineOverTheLimit:
    @pytest.mark.parametrize(
        "value",
        [b"9" * 100, b"9" * 19, b"-1", b"-0", b"1.5", b"1e3", b"007", b'"3"', b"true", b"[1]", b"null"],
    )
    def test_an_invalid_index_is_not_returned(self, value: bytes) -> None:
        assert extract_index_and_task(b'{"index":' + value + b',"task":"t"}') == (-1, "t")

    def test_the_largest_index_is_returned(self) -> None:
        assert extract_index_and_task(b'{"index":999999999999999999,"') == (10**18 - 1, "unknown")

    def test_a_number_at_the_edge_is_not_returned(self) -> None:
        assert extract_index_and_task(b'{"index":12') == (-1, "unknown")

    def test_a_number_cut_by_the_prefix_is_not_mistaken_for_a_shorter_one(self) -> None:
        head = b'{"p":"' + b"x" * (ndjson.PREFIX_BYTES - 18) + b'","index":'
        assert len(head) < ndjson.PREFIX_BYTES < len(head + b"1234")
        marker = only_oversized(items_of(head + b'1234,"q":"' + b"x" * 600 + b'"}', item_bytes_max=600))
        assert marker.index == 0

    def test_an_index_beyond_the_prefix_is_not_returned_even_when_the_line_came_whole(self) -> None:
        line = b'{"p":"' + b"x" * 600 + b'","index":7,"task":"t"}'
        for pieces in ([b"1\n" + line + b"\n"], [b"1\n", *single_bytes(line), b"\n"]):
            _, marker = items_of(*pieces, item_bytes_max=100)
            assert isinstance(marker, Oversized)
            assert (marker.index, marker.task) == (1, "unknown")

    def test_a_text_cut_by_the_prefix_is_not_returned(self) -> None:
        assert extract_index_and_task(b'{"index":1,"task":"half a na') == (1, "unknown")
        assert extract_index_and_task(b'{"index":1,"task":"escaped \\') == (1, "unknown")

    def test_escapes_in_keys_and_tasks_are_read(self) -> None:
        prefix = rb'{"a\"index":1,"\u0069ndex":8,"task":"a\"b\\","c":"}"}'
        assert extract_index_and_task(prefix) == (8, 'a"b\\')

    def test_a_text_of_keys_is_not_read_as_keys(self) -> None:
        assert extract_index_and_task(rb'{"p":"{\"index\":1,","q":"index","index":2,') == (2, "unknown")

    def test_the_last_of_two_equal_keys_wins_as_in_decoding(self) -> None:
        assert extract_index_and_task(b'{"index":1,"index":2,"task":"a","task":"b",') == (2, "b")
        assert extract_index_and_task(b'{"index":1,"index":"x",') == (-1, "unknown")

    @pytest.mark.parametrize("task", [b'""', b"5", b"null", b'"\xff"', rb'"\ud800"', b'{"task":"t"}'])
    def test_a_task_that_is_no_name_is_unknown(self, task: bytes) -> None:
        assert extract_index_and_task(b'{"index":4,"task":' + task + b"}") == (4, "unknown")

    def test_a_byte_order_mark_hides_no_index(self) -> None:
        line = b'\xef\xbb\xbf{"index":5,"p":"' + b"x" * 100 + b'"}'
        marker = only_oversized(items_of(line, item_bytes_max=50))
        assert (marker.index, marker.actual_bytes) == (5, len(line))

    @given(st.binary(max_size=512))
    def test_any_prefix_is_survived(self, prefix: bytes) -> None:
        index, task = extract_index_and_task(b'{"index":' + prefix)
        assert -1 <= index < 10**18
        assert task


class TestTheCutChangesNothing:
    @given(
        st.lists(
            st.sampled_from([b"1", b"\n", b'{"index":3}\n', b" ", b"\r\n", b"\xff", b"\xc3\xa9", b'"', b"xyz" * 9]),
            max_size=30,
        ),
        st.data(),
    )
    def test_items_ends_and_counts_are_the_same_however_it_is_cut(
        self, parts: list[bytes], data: st.DataObject
    ) -> None:
        stream = b"".join(parts)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
        pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert traced([stream]) == traced(pieces) == traced(single_bytes(stream))

    @given(st.lists(st.sampled_from([b"1\n", b"\n", b"22 \r\n", b"oops\n", b"x" * 30 + b"\n"]), min_size=1, max_size=9))
    def test_a_reader_that_resumes_after_any_item_gets_exactly_the_rest(self, lines: list[bytes]) -> None:
        stream = b"".join(lines)
        machine = NdjsonMachine(item_bytes_max=20)
        items = machine.feed(stream)
        ends = machine.last_ends
        assert len(ends) == len(items)
        for items_before, end in enumerate(ends, start=1):
            resumed = NdjsonMachine(
                item_bytes_max=20,
                bytes_before=end,
                items_before=items_before,
                lines_before=stream[:end].count(b"\n"),
            )
            assert resumed.feed(stream[end:]) == items[items_before:]
            assert resumed.last_ends == ends[items_before:]
            assert resumed.consumed_bytes == machine.consumed_bytes
            assert resumed.line_no == machine.line_no
            assert resumed.items_count == machine.items_count

    def test_a_byte_order_mark_in_the_middle_is_not_removed_by_a_resumed_reader(self) -> None:
        resumed = NdjsonMachine(item_bytes_max=20, bytes_before=2)
        assert isinstance(resumed.feed(b"\xef\xbb\xbf1\n")[0], Unreadable)


def traced(pieces: list[bytes]) -> tuple[list[Item], list[int], int, int, int]:
    machine = NdjsonMachine(item_bytes_max=20)
    items: list[Item] = []
    ends: list[int] = []
    for piece in pieces:
        items += machine.feed(piece)
        ends += machine.last_ends
    items += machine.close()
    ends += machine.last_ends
    assert machine.consumed_bytes == (ends[-1] if ends else 0)
    return items, ends, machine.consumed_bytes, machine.line_no, machine.items_count


class TestMemoryAndWork:
    def test_of_a_line_over_the_limit_512_bytes_stay(self) -> None:
        machine = NdjsonMachine(item_bytes_max=2_000)
        for _ in range(1_000):
            machine.feed(b"x" * 300)
            assert len(machine._held) <= 2_000
        assert len(machine._held) == ndjson.PREFIX_BYTES
        assert only_oversized(machine.feed(b"\n")).actual_bytes == 300_000

    def test_one_huge_piece_is_not_kept_either(self) -> None:
        machine = NdjsonMachine(item_bytes_max=100)
        machine.feed(b"x" * 1_000_000)
        assert len(machine._held) == ndjson.PREFIX_BYTES

    @pytest.mark.parametrize("item_bytes_max", [50_000, 1_000], ids=["within the limit", "over the limit"])
    @pytest.mark.parametrize("piece_bytes", [1, 7, 40_001], ids=["by ones", "by sevens", "whole"])
    def test_the_work_is_linear_however_the_input_is_cut(
        self, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, item_bytes_max: int
    ) -> None:
        monkeypatch.setattr(ndjson, "bytearray", CountedBytearray, raising=False)
        monkeypatch.setattr(Work, "bytes_handled", 0)
        stream = b'"' + b"x" * 39_998 + b'"\n'
        machine = NdjsonMachine(item_bytes_max=item_bytes_max)
        items: list[Item] = []
        for start in range(0, len(stream), piece_bytes):
            items += machine.feed(CountedBytes(stream[start : start + piece_bytes]))
        assert len(items) == 1
        assert 0 < Work.bytes_handled <= 4 * len(stream)


class Work:
    """Number of bytes that the counting types below read or copied."""

    bytes_handled: ClassVar[int] = 0


class CountedBytes(bytes):
    """Bytes that count reads and copies."""

    def split(self, *arguments: Any) -> list[bytes]:
        Work.bytes_handled += len(self)
        return super().split(*arguments)

    def find(self, *arguments: Any) -> int:
        Work.bytes_handled += len(self)
        return super().find(*arguments)

    def __radd__(self, other: bytes) -> bytes:
        Work.bytes_handled += len(other) + len(self)
        return bytes(other) + bytes(self)

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        Work.bytes_handled += len(part) if isinstance(part, bytes) else 1
        return part


class CountedBytearray(bytearray):
    """A bytearray that counts reads and copies."""

    def __iadd__(self, other: Any) -> Self:
        Work.bytes_handled += len(other)
        super().__iadd__(other)
        return self

    def __add__(self, other: Any) -> CountedBytearray:
        Work.bytes_handled += len(self) + len(other)
        return CountedBytearray(super().__add__(other))

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        Work.bytes_handled += len(part) if isinstance(part, bytearray) else 1
        return part

    def __bytes__(self) -> bytes:
        Work.bytes_handled += len(self)
        return bytes(memoryview(self))

    def find(self, *arguments: Any) -> int:
        Work.bytes_handled += len(self)
        return super().find(*arguments)


class TestTheMachinesOwnLife:
    def test_closing_twice_is_harmless(self) -> None:
        machine = NdjsonMachine(item_bytes_max=100)
        machine.feed(b"1")
        assert machine.close() == [b"1"]
        assert machine.close() == []
        assert machine.items_count == 1

    def test_bytes_after_the_end_are_refused(self) -> None:
        machine = NdjsonMachine(item_bytes_max=100)
        machine.close()
        with pytest.raises(IllegalTransition, match="after the end"):
            machine.feed(b"1\n")

    def test_impossible_settings_are_refused(self) -> None:
        with pytest.raises(InvalidInput):
            NdjsonMachine(item_bytes_max=0)
        with pytest.raises(InvalidInput):
            NdjsonMachine(item_bytes_max=9, bytes_before=-1)
        with pytest.raises(InvalidInput):
            NdjsonMachine(item_bytes_max=9, items_before=-1)

    def test_one_bad_line_among_thousands_is_the_only_marker(self) -> None:
        lines = [b'{"index":%d}' % index for index in range(3_000)]
        lines[1_234] = b"{oops"
        items = items_of(b"\n".join(lines))
        assert [position for position, item in enumerate(items) if not is_good(item)] == [1_234]
        marker = items[1_234]
        assert isinstance(marker, Unreadable)
        assert (marker.index, marker.line) == (1_234, 1_235)


# -- blank lines


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"  \n"])
@pytest.mark.parametrize("piece_bytes", [1_000, 1_000_000])
def test_an_input_of_blank_lines_is_refused_after_few_of_them(blank: bytes, piece_bytes: int) -> None:
    machine = NdjsonMachine(item_bytes_max=1_000)
    data = b'{"a":1}\n' + blank * 100_000
    pieces = (data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes))
    with pytest.raises(InvalidInput, match="expected items, got more than 10000 blank lines"):
        deque(map(machine.feed, pieces), maxlen=0)
    assert machine.line_no <= max(BLANK_LINES_MAX + 2_000, piece_bytes // len(blank) + 1)


def test_blank_lines_between_items_are_no_error() -> None:
    machine = NdjsonMachine(item_bytes_max=1_000)
    items = machine.feed(b"1" + b"\n" * 9_000 + (b"2\n" + b"\n" * 10) * 5_000)
    assert len(items) == 5_001

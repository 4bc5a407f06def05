"""Staging of rows, and merging of sources, compared with plain lists and dicts."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.condition import Range, all_hold, any_of, conditions_of
from headrace.core.entity import Entity, EntityType, Indexed
from headrace.core.sequencer import Arrived, Sequencer
from headrace.core.staging import MISSING, Staging, merged


class Cell(Entity):
    id: int
    value: Indexed[int | None] = 0
    note: str = ""


CELL = EntityType(Cell, row_bytes_max=1_000_000)

numbers = st.one_of(st.none(), st.integers(-3, 3))
changes = st.lists(st.tuples(st.integers(0, 8), st.one_of(st.just("delete"), st.just("drop"), numbers)), max_size=40)
bounds = st.one_of(st.none(), st.integers(-4, 4))


def filled(count: int, *, history: bool = False) -> Staging:
    """Stage the rows 0 to `count`, in a cut batch that is not committed."""
    staging = Staging([CELL], keeps_history=["cell"] if history else ())
    staging.tables[0].begin_reading()
    for n in range(count):
        staging.tables[0].write(Cell(n, n), n + 1)
    staging.cut()
    return staging


@given(changes, bounds, bounds, st.booleans(), st.booleans(), st.lists(numbers, max_size=3))
def test_an_index_follows_every_change_of_its_rows(
    steps: list[tuple[int, Any]],
    least: int | None,
    most: int | None,
    above: bool,
    below: bool,
    values: list[int | None],
) -> None:
    staging = Staging([CELL])
    table = staging.tables[0]
    table.index("value")
    staging.staged(table, conditions_of(CELL, {"value": Range(0)}))  # now the values are also kept in order
    plain: dict[int, Cell] = {}
    for row_id, step in steps:
        if step == "drop":
            if plain.pop(row_id, None) is not None:
                table.drop([row_id])
        elif step == "delete":
            table.delete(row_id, 1)
            plain.pop(row_id, None)
        else:
            table.write(Cell(row_id, step), 1)
            plain[row_id] = Cell(row_id, step)
    asked = [{"value": any_of(*values)}]
    if least is not None or most is not None:
        asked.append({"value": Range(least, most, above, below)})
    for question in asked:
        conditions = conditions_of(CELL, question)
        wanted = [row for _, row in sorted(plain.items()) if all_hold(conditions, row)]
        assert staging.staged(table, conditions) == wanted


def test_what_is_not_committed_never_leaves_memory() -> None:
    staging = filled(100)
    table = staging.tables[0]
    assert not staging.evict(0)
    assert len(table.rows) == 100
    table.write(Cell(7, 70), 101)
    staging.begin_read()
    staging.committed(1)
    assert not staging.evict(0), "a read that began before the commit may not have seen it"
    assert len(table.rows) == 100
    staging.end_read()
    assert not staging.evict(0)
    assert table.rows == {7: Cell(7, 70)}, "rows changed since then stay"


def test_eviction_takes_the_oldest_committed_rows_and_no_more_than_it_must() -> None:
    staging = filled(10_000)
    table = staging.tables[0]
    for n in range(10_000, 20_000):
        staging.adopt(table, n, Cell(n, n))
    staging.committed(1)
    before = staging.bytes
    assert staging.evict(before * 9 // 10)
    assert before * 6 // 10 < staging.bytes <= before * 9 // 10
    assert 0 not in table.rows
    assert 19_999 in table.rows


def test_bytes_grow_and_shrink_with_what_rows_hold() -> None:
    staging = Staging([CELL])
    table = staging.tables[0]
    table.write(Cell(1, 1), 1)
    small = staging.bytes
    table.write(Cell(1, 1, "x" * 100_000), 2)
    assert staging.bytes >= small + 100_000
    table.write(Cell(1, 1), 3)
    assert staging.bytes == small
    staging.clear()
    assert staging.bytes == 0


def test_what_a_select_says_never_replaces_what_memory_knows() -> None:
    staging = Staging([CELL])
    table = staging.tables[0]
    table.write(Cell(1, 5), 1)
    table.delete(2, 1)
    conditions = conditions_of(CELL, {"value": any_of(1, 5)})
    merged = staging.merged(table, conditions, [Cell(1, 1), Cell(2, 1), Cell(3, 1)])
    assert merged == [Cell(1, 5), Cell(3, 1)]
    assert staging.adopt(table, 1, None) == Cell(1, 5)
    assert staging.adopt(table, 4, None) is None
    assert table.rows.get(4, MISSING) is None, "its absence is known now"


def test_a_row_set_twice_by_one_event_is_one_row_of_history() -> None:
    staging = Staging([CELL], keeps_history=["cell"])
    table = staging.tables[0]
    for no, value in ((1, 1), (1, 2), (2, 3)):
        table.write(Cell(1, value), no)
    first = staging.cut()
    table.delete(1, 3)
    both = merged([first, staging.cut()])
    assert both.changes == [{(1, 1): Cell(1, 2), (1, 2): Cell(1, 3), (1, 3): None}]
    assert both.deltas == [{1: None}]


@given(st.data())
def test_sources_in_any_pieces_merge_into_the_one_order(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    times = [sorted(data.draw(st.lists(st.integers(0, 9), max_size=12))) for _ in range(count)]
    wanted = sorted(
        (time, source, at) for source, source_times in enumerate(times) for at, time in enumerate(source_times, 1)
    )
    machine = Sequencer([f"s{n}" for n in range(count)], [None] * count)
    left = [list(enumerate(source_times, 1)) for source_times in times]
    is_open = [True] * count
    got: list[tuple[int, int, int]] = []
    while not machine.is_over:
        taken = machine.take(data.draw(st.integers(1, 5)))
        if taken is not None:
            assert taken.times is not None
            got += zip(taken.times, taken.sources or [0] * taken.events_count, map(int, taken.positions), strict=True)
            continue
        source = data.draw(st.sampled_from([n for n in range(count) if is_open[n]]))
        size = data.draw(st.integers(1, 4))
        piece, left[source] = left[source][:size], left[source][size:]
        if piece:
            machine.feed(source, Arrived([at for at, _ in piece], ["e"] * len(piece), [time for _, time in piece]))
        else:
            machine.close(source)
            is_open[source] = False
    assert got == wanted
    assert isinstance(msgspec.json.encode(got), bytes)


def test_rows_of_a_type_that_is_never_read_are_held_until_their_commit_and_the_first_read_sees_them() -> None:
    staging = Staging([CELL])
    table = staging.tables[0]
    table.write(Cell(1, 1), 1)
    table.write(Cell(2, 2, "x" * 10_000), 1)
    staging.cut()
    table.write(Cell(2, 3), 2)
    table.write(Cell(3, 3), 2)
    table.delete(1, 2)
    staging.cut()
    staging.committed(1)
    assert not table.rows, "no row was requested"
    table.write(Cell(4, 4), 3)
    table.begin_reading()
    assert table.rows == {1: None, 2: Cell(2, 3), 3: Cell(3, 3), 4: Cell(4, 4)}
    staging.committed(1)
    assert table.rows[3] == Cell(3, 3), "once read, rows stay while memory allows"
    unread = Staging([CELL])
    unread.tables[0].write(Cell(1, 1, "x" * 10_000), 1)
    unread.cut()
    assert unread.bytes > 10_000
    unread.committed(1)
    assert unread.bytes == 0

"""Conformance suite of the implementations of entity tables."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from headrace.core.condition import above, any_of, at_least, at_most, below, between, conditions_of
from headrace.core.entity import Entity, EntityType, Indexed, Int64
from headrace.core.sequencer import Position
from headrace.foundation.errors import Conflict, InvalidInput, InvalidSetting, NotFound, StoreBroken
from headrace.store.entities.protocol import (
    Commit,
    EntityPlan,
    HistoryGone,
    IndexerState,
    LeaseLost,
    SchemaChanged,
    Write,
)
from headrace.store.entities.sql import RESERVED, RESERVED_PREFIX, index_name, quoted
from headrace.store.statements import migrations
from tests.indexer.indexer_stores import STORES, IndexerStores, stores_in

BYTES_MAX = 1_000_000
EACH_STORE = pytest.mark.parametrize("name", list(STORES))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    S = 1
    L = 2


class Inner(msgspec.Struct, frozen=True):
    x: int
    y: list[float] = []


class Account(Entity):
    id: str
    balance: int = 0
    country: Indexed[str] = ""


class Wide(Entity):
    id: int
    huge: Indexed[int] = 0
    small: Int64 = 0
    ratio: Indexed[float] = 0.0
    flag: Indexed[bool] = False
    text: Indexed[str | None] = None
    raw: bytes = b""
    price: Indexed[Decimal] = Decimal(0)
    at: Indexed[datetime | None] = None
    day: Indexed[date | None] = None
    key: Indexed[UUID | None] = None
    colour: Indexed[Colour] = Colour.RED
    size: Size = Size.S
    names: list[str] = []
    inner: Inner | None = None
    anything: Any = None
    pairs: dict[str, int] = {}


class ByKey(Entity, kw_only=True, table="keyed"):
    note: str = ""
    id: UUID


ACCOUNT = EntityType(Account, row_bytes_max=BYTES_MAX)
WIDE = EntityType(Wide, row_bytes_max=BYTES_MAX)
KEYED = EntityType(ByKey, row_bytes_max=BYTES_MAX)
WIDES = [
    Wide(1),
    Wide(
        2,
        huge=10**40,
        small=-(2**63),
        ratio=0.1 + 0.2,
        flag=True,
        text="tab\tnew\nline \\N \\. é 漢 🙂 '\"",
        raw=bytes(range(256)),
        price=Decimal("-12345678901234567890.123456789"),
        at=datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
        day=date(1, 1, 1),
        key=UUID(int=5),
        colour=Colour.BLUE,
        size=Size.L,
        names=["a\\b", "", "é\n"],
        inner=Inner(3, [0.1, 1e300]),
        anything={"z": 1, "a": [1.0, 2, None, True]},
        pairs={"b": 2**70, "a": 1},
    ),
    Wide(3, huge=-(10**30), ratio=5e-324, text="", price=Decimal("1.00"), at=datetime(9999, 12, 31, tzinfo=UTC)),
    Wide(4, huge=2**63 - 1, ratio=1.7976931348623157e308, text="\\N", price=Decimal("1.0")),
    Wide(-5, huge=2**63, ratio=-2.5, text="z", price=Decimal("0.3"), day=date(9999, 12, 31)),
]


class NumberedCommits:
    """An indexer over entity tables whose commits a test numbers by hand."""

    def __init__(self, stores: IndexerStores, entities: Sequence[EntityType], *, history: bool = True) -> None:
        self.stores = stores
        self.plan = EntityPlan("default", "book", tuple(entities), history)
        self.token = 0
        self.no = 0
        self.positions: dict[str, Position] = {}

    async def begin(self) -> IndexerState:
        state = await self.stores.entities.prepare(self.plan)
        token = await self.stores.entities.take(state, "tester")
        assert token is not None
        self.token, self.no, self.positions = token, state.no, dict(state.positions)
        return state

    async def commit(self, changes: Sequence[dict[Any, Any]], *, entity: EntityType = ACCOUNT, **more: Any) -> None:
        """Commit an event for each `{id: row or None}`."""
        old_no, latest, history = self.no, {}, []
        log = []
        for change in changes:
            self.no += 1
            latest.update(change)
            history += [(row_id, self.no, row) for row_id, row in change.items()]
            log.append((self.no, "main", self.no * 10))
            self.positions = {"main": self.no * 10}
        rows = [row for row in latest.values() if row is not None]
        write = Write(entity, rows, [row_id for row_id, row in latest.items() if row is None], history)
        commit = Commit(
            self.plan, self.token, old_no, self.no, self.positions, [write], log if self.plan.history else (), **more
        )
        self.last = commit
        await self.stores.entities.commit(commit, now_us=1)

    async def rows(self, entity: EntityType = ACCOUNT) -> list[Any]:
        return await self.stores.entities.find(entity, ())

    async def back(self, to: Position | None) -> IndexerState:
        state = await self.stores.entities.rollback(self.plan, self.token, old_no=self.no, source="main", to=to)
        self.no, self.positions = state.no, dict(state.positions)
        return state


def account(name: str, balance: int = 0, country: str = "NZ") -> Account:
    return Account(name, balance, country)


@EACH_STORE
async def test_each_value_type_is_returned_as_it_was_set(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [WIDE, KEYED])
        await commits.begin()
        checked = {row.id: WIDE.checked(row)[0] for row in WIDES}
        await commits.commit([checked], entity=WIDE)
        key = ByKey(id=UUID(int=7), note="by key")
        await commits.commit([{key.id: key}, {UUID(int=8): None}], entity=KEYED)
        expected = [checked[row_id] for row_id in sorted(checked)]
        for rows in (
            await commits.rows(WIDE),
            sorted(await stores.entities.load(WIDE, list(checked)), key=lambda row: row.id),
        ):
            assert list(map(repr, rows)) == list(map(repr, expected))
            assert [type(row.key) for row in rows] == [type(row.key) for row in expected]
        assert [row for _, _, row in await stores.entities.history(WIDE)] == expected
        assert await commits.rows(KEYED) == [key]
        assert await stores.entities.history(KEYED) == [(key.id, 2, key), (UUID(int=8), 3, None)]


@EACH_STORE
async def test_names_of_maximum_length_get_distinct_tables_histories_and_indexes(name: str, tmp_path: Path) -> None:
    class First(Entity, table="x" * 47 + "1"):
        id: str
        a_name_of_forty_eight_characters_that_is_alike_1: Indexed[str] = ""
        a_name_of_forty_eight_characters_that_is_alike_2: Indexed[str] = ""

    class Second(Entity, table="x" * 47 + "2"):
        id: str

    first, second = (EntityType(cls, row_bytes_max=BYTES_MAX) for cls in (First, Second))
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [first, second])
        await commits.begin()
        await commits.commit([{"a": First("a", "x", "y")}], entity=first)
        await commits.commit([{"a": Second("a")}, {"b": Second("b")}], entity=second)
        for filters in ({first.names[1]: "x"}, {first.names[2]: "y"}):
            assert await stores.entities.find(first, conditions_of(first, filters)) == [First("a", "x", "y")]
        assert [no for _, no, _ in await stores.entities.history(first)] == [1]
        assert [no for _, no, _ in await stores.entities.history(second)] == [2, 3]
        if name != "memory":  # both indexes exist, under shortened names that differ
            index_names = {index_name(first, column) for column in first.columns if column.is_indexed}
            assert len({index[:63] for index in index_names}) == 2


@EACH_STORE
async def test_where_returns_the_same_rows_as_a_scan_of_all_rows(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [WIDE])
        await commits.begin()
        rows = [WIDE.checked(row)[0] for row in WIDES]
        await commits.commit([{row.id: row for row in rows}], entity=WIDE)
        cases: list[dict[str, Any]] = [
            {"huge": 10**40}, {"huge": any_of(0, -(10**30), 2**63)}, {"huge": at_least(2**63)}, {"huge": below(0)},
            {"huge": between(-(10**31), 5)}, {"ratio": 0.1 + 0.2}, {"ratio": above(0.1)}, {"flag": True}, {"text": None},
            {"text": any_of(None, "\\N")}, {"text": at_most("a")}, {"price": Decimal("1.000")}, {"price": above(Decimal(1))},
            {"price": between(Decimal("0.3"), Decimal(1))}, {"at": datetime(9999, 12, 31, tzinfo=UTC)},
            {"at": below(datetime(9000, 1, 1, tzinfo=UTC))}, {"day": at_least(date(1, 1, 1))}, {"key": UUID(int=5)},
            {"colour": Colour.BLUE}, {"colour": any_of(Colour.RED, Colour.BLUE), "flag": False}, {"flag": any_of()},
        ]  # fmt: skip
        for filters in cases:
            conditions = conditions_of(WIDE, filters)
            expected = [
                row
                for row in sorted(rows, key=lambda row: row.id)
                if all(condition.holds(row) for condition in conditions)
            ]
            candidates = await stores.entities.find(WIDE, conditions)
            assert [row for row in candidates if all(condition.holds(row) for condition in conditions)] == expected, (
                filters
            )


@EACH_STORE
async def test_the_last_change_of_an_id_is_stored_and_history_has_each_change(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT])
        await commits.begin()
        await commits.commit([{"a": account("a", 1)}, {"a": account("a", 2), "b": account("b")}, {"b": None}])
        await commits.commit([{"a": account("a", 3)}, {"c": account("c"), "gone": None}])
        assert await commits.rows() == [account("a", 3), account("c")]
        assert await stores.entities.history(ACCOUNT) == [
            ("a", 1, account("a", 1)), ("a", 2, account("a", 2)), ("a", 4, account("a", 3)), ("b", 2, account("b")),
            ("b", 3, None), ("c", 5, account("c")), ("gone", 5, None),
        ]  # fmt: skip


@EACH_STORE
async def test_a_repeated_commit_is_applied_once(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT])
        await commits.begin()
        await commits.commit([{"a": account("a", 1)}])
        await stores.entities.commit(commits.last, now_us=2)
        await commits.commit([{"a": account("a", 2)}])
        with pytest.raises(StoreBroken):
            await stores.entities.commit(commits.last._replace(no=9), now_us=3)
        assert await commits.rows() == [account("a", 2)]
        assert len(await stores.entities.history(ACCOUNT)) == 2


@EACH_STORE
async def test_a_lost_lease_commits_nothing(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        old, new = NumberedCommits(stores, [ACCOUNT]), NumberedCommits(stores, [ACCOUNT])
        await old.begin()
        assert await stores.entities.beat("default", "book", old.token)
        seen = await stores.entities.prepare(old.plan)
        assert seen.holder == "tester"
        assert await stores.entities.beat("default", "book", old.token)
        assert await stores.entities.take(seen, "late") is None, (
            "expected the lease to be refused: its holder has sent a heartbeat since it was read"
        )
        await new.begin()
        assert not await stores.entities.beat("default", "book", old.token)
        with pytest.raises(LeaseLost):
            await old.commit([{"a": account("a")}])
        with pytest.raises(LeaseLost):
            await old.back(None)
        await stores.entities.leave("default", "book", old.token)
        (state,) = await stores.entities.indexer_states("default")
        assert (state.holder, state.no) == ("tester", 0)
        await stores.entities.leave("default", "book", new.token)
        (state,) = await stores.entities.indexer_states("default")
        assert state.holder == ""
        assert await new.rows() == []


@EACH_STORE
async def test_repeated_rollbacks_restore_the_earlier_rows(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT])
        await commits.begin()
        states: list[list[Any]] = [[]]
        for event in (
            {"a": account("a", 1)}, {"a": None, "b": account("b", 1)}, {"a": account("a", 3)}, {"c": account("c"), "b": None},
            {"b": account("b", 5)}, {"c": None, "a": account("a", 6)},
        ):  # fmt: skip
            await commits.commit([event])
            states.append(await commits.rows())
        history = await stores.entities.history(ACCOUNT)
        for to, no in ((55, 5), (50, 5), (31, 3), (20, 2), (None, 0)):
            state = await commits.back(to)
            assert (state.no, state.positions) == (no, {"main": no * 10} if no else {})
            assert await commits.rows() == states[no]
            assert await stores.entities.history(ACCOUNT) == [change for change in history if change[1] <= no]
            assert [no for no, _, _ in await stores.entities.checkpoints("default", "book")] == list(range(1, no + 1))
        await commits.commit([{"a": account("a", 9)}])
        assert await stores.entities.history(ACCOUNT) == [("a", 1, account("a", 9))]


@EACH_STORE
async def test_pruned_history_allows_rollback_to_its_oldest_checkpoint_only(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT])
        await commits.begin()
        for number in range(1, 9):
            await commits.commit([{"hot": account("hot", number), f"once{number}": account(f"once{number}")}])
        await commits.commit([{"once1": None, "hot": None}], floor_no=5)
        history = await stores.entities.history(ACCOUNT)
        assert [(row_id, no) for row_id, no, _ in history if row_id == "hot"] == [
            ("hot", 5),
            ("hot", 6),
            ("hot", 7),
            ("hot", 8),
            ("hot", 9),
        ]
        assert {row_id for row_id, no, _ in history if no <= 5} == {"hot", "once1"}, (
            "expected no history of rows that no later change builds on"
        )
        await commits.commit([{"once2": None}])
        assert ("once2", 0, account("once2")) in await stores.entities.history(ACCOUNT), (
            "expected the row before the change in the history"
        )
        with pytest.raises(HistoryGone):
            await commits.back(40)
        with pytest.raises(HistoryGone):
            await commits.back(None)
        state = await commits.back(50)
        assert (state.no, state.positions) == (5, {"main": 50})
        names = [f"once{number}" for number in range(1, 6)]
        assert await commits.rows() == [account("hot", 5), *map(account, names)]


@EACH_STORE
async def test_without_history_no_change_is_recorded_and_rollback_fails(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT], history=False)
        await commits.begin()
        await commits.commit([{"a": account("a", 1)}, {"a": account("a", 2)}])
        with pytest.raises(HistoryGone):
            await commits.back(10)
        with_history = NumberedCommits(stores, [ACCOUNT], history=True)
        assert (await with_history.begin()).floor_no == 2
        await with_history.commit([{"a": account("a", 3)}])
        await with_history.back(20)
        assert await with_history.rows() == [account("a", 2)]
        with pytest.raises(HistoryGone):
            await with_history.back(10)


def variant(**fields: Any) -> EntityType:
    """Return `Account` as another version of the program defines it: `name=(type, default)`."""
    namespace: dict[str, Any] = {"__annotations__": {name: field[0] for name, field in fields.items()}}
    namespace |= {name: field[1] for name, field in fields.items() if len(field) > 1}
    make: Any = type(Entity)
    return EntityType(make("Account", (Entity,), namespace), row_bytes_max=BYTES_MAX)


@EACH_STORE
async def test_a_new_field_is_added_with_its_default_to_rows_and_history(name: str, tmp_path: Path) -> None:
    later = variant(
        id=(str,), balance=(int, 0), country=(Indexed[str], ""), tier=(Indexed[str], "free"), note=(str | None, None)
    )
    async with stores_in(name, tmp_path) as stores:
        first = NumberedCommits(stores, [ACCOUNT])
        await first.begin()
        await first.commit([{"a": account("a", 1)}])
        commits = NumberedCommits(stores, [later])
        assert (await commits.begin()).no == 1
        old = later.cls("a", 1, "NZ", "free", None)
        assert await commits.rows(later) == [old]
        assert await stores.entities.find(later, conditions_of(later, {"tier": "free"})) == [old]
        await commits.commit([{"b": later.cls("b", tier="gold")}], entity=later)
        await commits.back(10)
        assert [row for _, _, row in await stores.entities.history(later)] == [old]


@EACH_STORE
@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"balance": (str, "")}, "balance was integer and is text"),
        ({"balance": (int | None, None)}, "balance was integer and is an optional integer"),
        ({"id": (int,)}, "id was text and is integer"),
        ({"country": None}, "the field country (text) is missing"),
        ({"needed": (str,)}, "needed is new and has no default"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_changed_type_is_refused_with_the_difference(
    name: str, tmp_path: Path, fields: dict[str, Any], difference: str
) -> None:
    all_fields = {"id": (str,), "balance": (int, 0), "country": (Indexed[str], "")} | fields
    ordered = sorted(((n, d) for n, d in all_fields.items() if d is not None), key=lambda field: len(field[1]))
    later = variant(**dict(ordered))
    async with stores_in(name, tmp_path) as stores:
        commits = NumberedCommits(stores, [ACCOUNT])
        await commits.begin()
        await commits.commit([{"a": account("a", 1)}])
        with pytest.raises(SchemaChanged, match=difference.replace("(", r"\(").replace(")", r"\)")):
            await stores.entities.prepare(EntityPlan("default", "book", (later,), True))
        await commits.commit([{"a": account("a", 2)}])
        assert await commits.rows() == [account("a", 2)]


@EACH_STORE
async def test_a_table_belongs_to_a_single_indexer_and_names_are_unique(name: str, tmp_path: Path) -> None:
    class Span(Entity):
        id: str

    class AccountHistory(Entity):
        id: str

    class Checked(Entity):
        id: str
        checkpoint: int = 0

    async with stores_in(name, tmp_path) as stores:
        await stores.entities.prepare(EntityPlan("default", "book", (ACCOUNT,), True))
        with pytest.raises(Conflict, match="belongs to the indexer 'book'"):
            await stores.entities.prepare(EntityPlan("default", "other", (ACCOUNT,), True))
        for cls, words in (
            (Span, "belongs to Headrace"),
            (AccountHistory, "would share"),
            (Checked, "reserved for the history"),
        ):
            entity = EntityType(cls, row_bytes_max=BYTES_MAX)
            with pytest.raises(InvalidSetting, match=words):
                await stores.entities.prepare(EntityPlan("default", "book", (ACCOUNT, entity), True))
        assert await stores.entities.reset("default", "book") == ["account", "account_history"]
        with pytest.raises(NotFound):
            await stores.entities.reset("default", "book")
        assert (await stores.entities.prepare(EntityPlan("default", "other", (ACCOUNT,), False))).no == 0


@pytest.mark.parametrize("name", ["sqlite", "postgres"])
async def test_a_table_that_headrace_did_not_create_is_left_unchanged(name: str, tmp_path: Path) -> None:
    async with stores_in(name, tmp_path) as stores:
        if name == "sqlite":
            stores.entities._connection().execute("CREATE TABLE account (other)")  # type: ignore[attr-defined]  # not in the protocol
        else:
            schema = stores.store.schema  # type: ignore[attr-defined]  # not in the protocol
            await stores.store.within(lambda db, _: db.raw.execute(f'CREATE TABLE "{schema}".account (other int)'))  # type: ignore[attr-defined]  # not in the protocol
        with pytest.raises(Conflict, match="no indexer created"):
            await stores.entities.prepare(EntityPlan("default", "book", (ACCOUNT,), True))
        assert await stores.entities.indexer_states("default") == []


@pytest.mark.parametrize("package", ["headrace.store.sqlite", "headrace.store.postgres"])
def test_an_entity_cannot_use_the_name_of_a_headrace_table(package: str) -> None:
    import re

    scripts = "\n".join(script for _, script in migrations(package))
    created = re.findall(r"CREATE (?:TABLE|SEQUENCE) (?:\{schema\}\.)?(\w+)", scripts)
    assert {name for name in created if not name.startswith(RESERVED_PREFIX)} <= RESERVED
    assert created


@pytest.mark.parametrize("name", ['a"b', "a b", "A", "", "é", "a;drop", "a" * 64, "1a"])
def test_an_invalid_identifier_is_never_put_into_sql(name: str) -> None:
    with pytest.raises(InvalidInput):
        quoted(name)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Account("a\0b"), "NUL"),
        (Account("\ud800"), "not text that can be stored"),
        (Account(3), "expected a string"),  # type: ignore[arg-type]  # that is the fault
        (Account("a", True), "expected an integer"),
        (Account("a", 10**4_000), "digits"),
        (Account("a", country=None), "has no country"),  # type: ignore[arg-type]  # that is the fault
        (Account("x" * 2_001), "2,001 bytes of id"),
        (Account("a", country="é" * 1_001), "2,002 bytes of country"),
        ("a", "Account was expected"),
        (Wide(1), "Account was expected"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_row_that_no_database_could_keep_is_refused_by_name(row: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        ACCOUNT.checked(row)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratio": float("nan")}, "finite"), ({"ratio": float("inf")}, "finite"), ({"small": 2**63}, "64 bits"),
        ({"price": Decimal("NaN")}, "finite"), ({"price": Decimal("1e2000")}, "digits"), ({"price": 1.5}, "Decimal"),
        ({"at": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001 - that is the fault
        ({"at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=2)))}, "years 1 to 9999"),
        ({"day": datetime(2026, 1, 1, tzinfo=UTC)}, "expected a date"), ({"raw": "text"}, "expected bytes"),
        ({"key": "text"}, "UUID"), ({"colour": "red"}, "expected a Colour"), ({"names": [1]}, "Expected"),
        ({"names": ["\0"]}, "NUL"), ({"inner": {"x": "y"}}, "Expected"), ({"anything": object()}, "Encoding"),
        ({"flag": 1}, "True or False"), ({"anything": "x" * BYTES_MAX}, "bytes, expected at most"), ({"text": 5}, "expected a string"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:60],
)  # fmt: skip
def test_a_value_that_no_database_can_store_is_refused_with_its_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        WIDE.checked(msgspec.structs.replace(Wide(1), **change))


def test_a_value_is_normalised_to_the_form_that_is_returned() -> None:
    row, _ = WIDE.checked(
        Wide(1, ratio=-0.0, price=Decimal("1e3"), at=datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2))))
    )
    assert (str(row.ratio), str(row.price), row.at.isoformat()) == ("0.0", "1000", "2026-01-01T10:00:00+00:00")
    names = ["a"]
    row, _ = WIDE.checked(Wide(1, names=names))
    names.append("b")
    assert row.names == ["a"]


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({}, "expected at least one condition"), ({"nope": 1}, "has no field"), ({"balance": 1}, "not indexed"), ({"id": "a"}, "get_many"),
        ({"country": 3}, "expected a string"), ({"country": None}, "has no country"), ({"country": between(None, None)}, "no bound"),
        ({"country": any_of(*map(str, range(10_001)))}, "at most 10000"), ({"country": below(3)}, "expected a string"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:60],
)  # fmt: skip
def test_an_invalid_condition_is_refused_with_a_hint(filters: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        conditions_of(ACCOUNT, filters)


def test_an_invalid_entity_class_is_refused_with_the_reason() -> None:
    class NoId(Entity):
        name: str

    class FloatId(Entity):
        id: float

    class ListIndex(Entity):
        id: str
        names: Indexed[list[str]] = []

    class Bad(Entity, table="drop table"):
        id: str

    class Long(Entity, table="x" * 49):
        id: str

    for cls, words in (
        (NoId, "has no id"),
        (FloatId, "expected a str, int or UUID"),
        (ListIndex, "can't be indexed"),
        (Bad, "is not a valid name of a table"),
        (Long, "at most 48"),
    ):
        with pytest.raises(InvalidSetting, match=words):
            EntityType(cls, row_bytes_max=BYTES_MAX)
    with pytest.raises(InvalidSetting, match="expected an entity class"):
        EntityType(Inner, row_bytes_max=BYTES_MAX)  # type: ignore[arg-type]  # that is the fault

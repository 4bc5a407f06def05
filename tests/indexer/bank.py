"""What the tests of running indexers share: accounts that payments add to."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from headrace import Headrace
from headrace.indexer import (
    Entity,
    HandlerContext,
    Indexed,
    Indexer,
)
from tests.indexer.houses import HOUSES
from tests.indexer.rig import Listed, Rig

EVERY = pytest.mark.parametrize("name", list(HOUSES))
DATABASES = pytest.mark.parametrize("name", ["sqlite", "postgres"])


class Account(Entity):
    id: str
    balance: int = 0
    country: Indexed[str] = ""


FIVE: Any = 5


class Pay(msgspec.Struct, tag_field="type", tag="pay"):
    to: str
    amount: int = 1
    country: str = "NZ"


def bank(app: Headrace, source: Any, **options: Any) -> Indexer:
    """Each payment adds to an account."""
    indexer = app.indexer("bank", source=source, entities=[Account], **({"history": "all"} | options))

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.to, country=event.country)
        ctx.set(msgspec.structs.replace(account, balance=account.balance + event.amount))

    return indexer


def handled(handler: Any, **options: Any) -> Indexer:
    """An indexer of one handler over accounts, for `simulate`."""
    indexer = Headrace("tests").indexer("bank", source=Listed(), entities=[Account], **options)
    indexer.on("pay")(handler)
    return indexer


def pays(count: int, *, accounts: int = 7, first: int = 1) -> list[tuple[int, Any]]:
    return [(n, Pay(f"a{n % accounts}", n)) for n in range(first, first + count)]


def balances(count: int, *, accounts: int = 7) -> dict[str, int]:
    found: dict[str, int] = {}
    for n, event in pays(count, accounts=accounts):
        found[event.to] = found.get(event.to, 0) + n
    return found


async def found(own: Rig, indexing: Any) -> dict[str, int]:
    rows = await own.house.entities.find(indexing.plan.entities[0], ())
    return {row.id: row.balance for row in rows}


def release(indexing: Any, gate: asyncio.Event) -> None:
    indexing._committer._call(gate.set)

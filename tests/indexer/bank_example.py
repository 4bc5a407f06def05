"""Example shared by the tests of running indexers: payments that add to the balances of accounts."""

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
from tests.indexer.indexer_rig import IndexerRig, ListSource
from tests.indexer.indexer_stores import STORES

EACH_STORE = pytest.mark.parametrize("name", list(STORES))
EACH_DATABASE = pytest.mark.parametrize("name", ["sqlite", "postgres"])


class Account(Entity):
    id: str
    balance: int = 0
    country: Indexed[str] = ""


NOT_A_STRING: Any = 5
"""Hides the wrong type of an argument from mypy."""


class Pay(msgspec.Struct, tag_field="type", tag="pay"):
    to: str
    amount: int = 1
    country: str = "NZ"


def bank_indexer(app: Headrace, source: Any, **options: Any) -> Indexer:
    """Return an indexer that adds each payment to its account."""
    indexer = app.indexer("bank", source=source, entities=[Account], **({"history": "all"} | options))

    @indexer.on("pay")
    async def on_pay(event: Pay, ctx: HandlerContext) -> None:
        account = await ctx.get_or_create(Account, event.to, country=event.country)
        ctx.set(msgspec.structs.replace(account, balance=account.balance + event.amount))

    return indexer


def account_indexer(handler: Any, **options: Any) -> Indexer:
    """Return an indexer over accounts whose only handler is `handler`, for `simulate`."""
    indexer = Headrace("tests").indexer("bank", source=ListSource(), entities=[Account], **options)
    indexer.on("pay")(handler)
    return indexer


def payments(count: int, *, accounts: int = 7, first: int = 1) -> list[tuple[int, Any]]:
    return [(n, Pay(f"a{n % accounts}", n)) for n in range(first, first + count)]


def balances(count: int, *, accounts: int = 7) -> dict[str, int]:
    """Return the balance of each account after the first `count` payments."""
    totals: dict[str, int] = {}
    for n, event in payments(count, accounts=accounts):
        totals[event.to] = totals.get(event.to, 0) + n
    return totals


async def stored_balances(rig: IndexerRig, indexing: Any) -> dict[str, int]:
    """Return the balance of each account in the tables."""
    rows = await rig.stores.entities.find(indexing.plan.entities[0], ())
    return {row.id: row.balance for row in rows}


def open_gate(indexing: Any, gate: asyncio.Event) -> None:
    indexing._committer._call(gate.set)

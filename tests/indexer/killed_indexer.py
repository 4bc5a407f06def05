"""Indexers that are killed by SIGKILL during a commit: `python -m tests.indexer.killed_indexer`, see `tests.support.fork_server`.

A life is `{"url", "count", "at"}`: an indexer continues an event log of `count` events. Its first commit repeats the
commit that the life before it did not complete. In its second commit it is killed just before statement `at`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, Final

from headrace import Headrace
from headrace.indexer import Indexer
from tests.indexer.fault_injection import COMMITTED, watched_commits
from tests.indexer.indexer_rig import IndexerRig, ListSource
from tests.indexer.indexer_stores import opened, stores_at
from tests.indexer.scripted_handlers import mixed_events, scripted_indexer
from tests.support.fork_server import serve

BATCH: Final = 4


def pruning_indexer(app: Headrace, source: Any) -> Indexer:
    """Return an indexer each of whose commits prunes some history."""
    return scripted_indexer(app, source, history=2)


class StatementTarget:
    """Recogniser of statement `at` of an indexer's second commit."""

    def __init__(self, at: int) -> None:
        self._is_first = True
        self._left = at

    def is_reached(self, sql: str) -> bool:
        """Return True if the next statement is the target."""
        if self._is_first:
            self._is_first = sql != COMMITTED
            return False
        self._left -= 1
        is_reached = not self._left
        if sql == COMMITTED:  # the commit has ended, and no later commit is a target
            self._left = -1
        return is_reached


def live(life: dict[str, Any]) -> None:
    """Index until the target statement, then be killed."""
    asyncio.run(_indexed(life["url"], life["count"], StatementTarget(life["at"])))


async def _indexed(url: str, count: int, target: StatementTarget) -> None:
    def before(sql: str, _: Any) -> None:
        if target.is_reached(sql):
            os.kill(os.getpid(), signal.SIGKILL)

    async with opened(stores_at(url)) as stores:
        with watched_commits(stores.entities, before):
            await IndexerRig(stores, pruning_indexer).run(
                ListSource(mixed_events(count)), index_batch_events_max=BATCH, index_depth_max=0
            )


if __name__ == "__main__":
    serve(live)

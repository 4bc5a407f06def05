"""Indexers that are killed by SIGKILL in the middle of a commit: `python -m tests.indexer.doomed`, see `tests.support.fork_server`.

A life is `{"url", "count", "at"}`: an indexer goes on with an event log of so many events. Its first commit is what the
life before it did not bring to an end; in the second it dies just before statement `at`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, Final

from headrace import Headrace
from headrace.indexer import Indexer
from tests.indexer.harm import ANSWERED, commits_told
from tests.indexer.houses import house_at, opened_house
from tests.indexer.programs import busy, make
from tests.indexer.rig import Listed, Rig
from tests.support.fork_server import serve

BATCH: Final = 4


def pruned(app: Headrace, source: Any) -> Indexer:
    """Of which every commit lets some history go."""
    return make(app, source, history=2)


class Deadly:
    """Tells statement `at` of an indexer's second commit from all others."""

    def __init__(self, at: int) -> None:
        self._is_first = True
        self._left = at

    def is_here(self, sql: str) -> bool:
        """Whether it comes now."""
        if self._is_first:
            self._is_first = sql != ANSWERED
            return False
        self._left -= 1
        is_here = not self._left
        if sql == ANSWERED:  # its end: of the next commits none is meant
            self._left = -1
        return is_here


def live(life: dict[str, Any]) -> None:
    """Index, and die."""
    asyncio.run(_indexed(life["url"], life["count"], Deadly(life["at"])))


async def _indexed(url: str, count: int, deadly: Deadly) -> None:
    def before(sql: str, _: Any) -> None:
        if deadly.is_here(sql):
            os.kill(os.getpid(), signal.SIGKILL)

    async with opened_house(house_at(url)) as house:
        with commits_told(house.entities, before):
            await Rig(house, pruned).run(Listed(busy(count)), index_batch_events_max=BATCH, index_depth_max=0)


if __name__ == "__main__":
    serve(live)

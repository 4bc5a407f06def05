"""Interfaces of a store copy: what is copied from one store into another, and the operations of source and target.

Until the row of its batch is copied, nothing of the batch is visible or claimable in the target: its spans have a state
that no statement reads. A page and the progress after it are one transaction, so a copy that was killed continues where
it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from headrace.core.span import Part, Span

MOVING: Final = "moving"
"""The state of a copied span before its batch is visible. Its real state follows from its unsettled runs and its due
time.
"""

PAGE_BLOCKS: Final = 64
PAGE_ROWS: Final = 2_000


class CopiedBlock(NamedTuple):
    """A block as its source stores it."""

    id: int
    batch_id: str
    first_index: int
    last_index: int
    runs_count: int
    gaps: bytes | None
    extras: bytes | None
    items: bytes


class Page(NamedTuple):
    """Some blocks with their spans and parts, under the ids of their source."""

    blocks: list[CopiedBlock]
    spans: list[Span]
    parts: list[Part]

    @property
    def runs_count(self) -> int:
        """The number of runs in these blocks."""
        return sum(block.runs_count for block in self.blocks)


class Belongings(NamedTuple):
    """A page of what only some runs of a batch have; all lists are empty after the last page."""

    keys: list[tuple[str, str, int, int]]
    tags: list[tuple[str, int]]
    objects: list[tuple[str, str]]
    dead: list[tuple[int, str, str, int]]


NOTHING: Final = Belongings([], [], [], [])


class CopySource(Protocol):
    """The source of a copy. Every method is one transaction."""

    async def fence(self, move_id: str, target: str, *, now_us: int) -> tuple[str, bool]:
        """Block all writes. Returns `(id of the copy, True if it had begun before)`.

        Raises `Conflict` if processes use the store, or if it was moved or is being moved to another target.
        """
        ...

    async def finish(self, *, now_us: int) -> None:
        """Mark the copy as complete; writes stay blocked."""
        ...

    async def unfence(self) -> str:
        """Allow writes again, and return the id of the copy. Raises `Conflict` if it is complete, or if there was
        none.
        """
        ...

    async def runs_count(self) -> int:
        """Return the number of runs to copy."""
        ...

    async def page(self, after_id: int) -> Page:
        """Return the blocks after an id, with their spans and parts."""
        ...

    async def batches(self, after_id: str) -> list[dict[str, Any]]:
        """Return the batches after an id, by column."""
        ...

    async def belongings(self, batch_id: str, after: Belongings | None) -> Belongings:
        """Return the keys, tags, objects and dead letters of a batch that follow those of `after`, or the first
        ones.
        """
        ...

    async def cancellations(self, batch_id: str) -> list[int]:
        """Return the runs of a batch that are to be cancelled."""
        ...

    async def queues(self) -> list[tuple[str, str, int, bool]]:
        """Return `(environment, name, clock, paused)` of every queue."""
        ...

    async def lanes(self, environment: str) -> list[tuple[str, str]]:
        """Return `(queue, task)` of every lane."""
        ...

    async def rules(self) -> list[tuple[str, str, bytes]]:
        """Return `(environment, name, value)` of every rule."""
        ...


class CopyTarget(Protocol):
    """The target of a copy. Every method is one transaction, and a repeat changes nothing."""

    async def moved_until(self, move_id: str) -> int:
        """Return the last block of the source that was copied."""
        ...

    async def check_keys(self, named: Sequence[tuple[str, str, str]]) -> None:
        """Raise `Conflict` if keys of batches `(environment, key, batch id)` name other batches here."""
        ...

    async def insert_page(self, move_id: str, after_id: int, page: Page) -> None:
        """Insert a page, once. Ids are the target's own."""
        ...

    async def create_queues(
        self, environment: str, queues: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]
    ) -> int:
        """Create the queues `(name, clock, paused)` of an environment, and return by how much order numbers grow.

        In an environment that was never used, clocks and order numbers stay as they were. Otherwise everything that is
        copied gets the environment's current virtual time.
        """
        ...

    async def insert_belongings(self, batch_id: str, environment: str, belongings: Belongings, *, now_us: int) -> None:
        """Insert what belongs to a batch. A key that names another run here keeps naming that run."""
        ...

    async def publish_batch(self, batch: dict[str, Any], cancelled: Sequence[int], offset: int, *, now_us: int) -> None:
        """Make a batch that was copied completely visible and runnable."""
        ...

    async def delete_unpublished(self, batch_ids: Sequence[str]) -> bool:
        """Delete a bounded part of batches that are not visible yet. Returns False when nothing is left of them.

        Raises `Conflict` if one of them is visible: its runs may have continued here.
        """
        ...

    async def keep_rules(self, rules: Sequence[tuple[str, str, bytes]]) -> None:
        """Insert the rules whose names do not exist here."""
        ...

    async def forget(self, move_id: str) -> None:
        """Delete the progress of a copy, which is complete or was undone."""
        ...

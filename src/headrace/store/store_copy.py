"""What travels when all of one store moves into another, and what the two sides of a move can do.

Until its batch's own row comes, nothing of it can be seen or claimed where it goes: its spans are in a state that no
statement looks for. A page and how far it reaches are one transaction, so a move that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from headrace.core.span import Part, Span

MOVING: Final = "moving"
"""The state of a span on its way; what it was is told from what is left to settle and when that is due."""

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
        """The runs of these blocks."""
        return sum(block.runs_count for block in self.blocks)


class Belongings(NamedTuple):
    """What only some runs of a batch have, a page of each; all empty when there is no more."""

    keys: list[tuple[str, str, int, int]]
    tags: list[tuple[str, int]]
    objects: list[tuple[str, str]]
    dead: list[tuple[int, str, str, int]]


NOTHING: Final = Belongings([], [], [], [])


class CopySource(Protocol):
    """The side that is left. Every method is one transaction."""

    async def fence(self, move_id: str, target: str, *, now_us: int) -> tuple[str, bool]:
        """Take no writes any more: `(id of the move, whether it had begun before)`.

        Raises `Conflict` when somebody works here, or the store was moved or is being moved elsewhere.
        """
        ...

    async def finish(self, *, now_us: int) -> None:
        """Everything is elsewhere; the fence stays."""
        ...

    async def unfence(self) -> str:
        """Take writes again; answers the id of the move. Raises `Conflict` when it is over, or there was none."""
        ...

    async def runs_count(self) -> int:
        """How many runs there are to move."""
        ...

    async def page(self, after_id: int) -> Page:
        """The blocks after one, with their spans and parts."""
        ...

    async def batches(self, after_id: str) -> list[dict[str, Any]]:
        """The batches after one, by column."""
        ...

    async def belongings(self, batch_id: str, after: Belongings | None) -> Belongings:
        """The keys, tags, objects and dead letters of a batch that come after the last of those given, or the first."""
        ...

    async def cancellations(self, batch_id: str) -> list[int]:
        """The runs of a batch that somebody asked to cancel."""
        ...

    async def queues(self) -> list[tuple[str, str, int, bool]]:
        """`(environment, name, clock, paused)` of every queue."""
        ...

    async def lanes(self, environment: str) -> list[tuple[str, str]]:
        """`(queue, task)` of every lane."""
        ...

    async def rules(self) -> list[tuple[str, str, bytes]]:
        """`(environment, name, value)` of every rule."""
        ...


class CopyTarget(Protocol):
    """The side that takes in. Every method is one transaction, and a repeat changes nothing."""

    async def moved_until(self, move_id: str) -> int:
        """The last of the source's blocks that is here."""
        ...

    async def check_keys(self, named: Sequence[tuple[str, str, str]]) -> None:
        """Raise `Conflict` when keys of batches `(environment, key, batch id)` name other batches here."""
        ...

    async def take_in(self, move_id: str, after_id: int, came: Page) -> None:
        """Keep a page, once. Ids are this side's own."""
        ...

    async def know(
        self, environment: str, own: Sequence[tuple[str, int, bool]], lanes: Sequence[tuple[str, str]]
    ) -> int:
        """Make the queues `(name, clock, paused)` of an environment known; answers what order numbers go up by.

        In an environment that was never used clocks are as they were, and so is the order; else everything that comes
        stands where the environment is now.
        """
        ...

    async def own(self, batch_id: str, environment: str, came: Belongings, *, now_us: int) -> None:
        """Keep what belongs to a batch; a key that names another run here goes on naming that."""
        ...

    async def let_in(self, batch: dict[str, Any], cancelled: Sequence[int], offset: int, *, now_us: int) -> None:
        """Let a batch be seen and run, all of which is here."""
        ...

    async def take_back(self, batch_ids: Sequence[str]) -> bool:
        """Delete what came of batches that were not let in, a bounded step; False when nothing is left of them.

        Raises `Conflict` when one of them was let in: its runs may have gone on here.
        """
        ...

    async def keep_rules(self, rules: Sequence[tuple[str, str, bytes]]) -> None:
        """Keep rules that there are none of that name of here."""
        ...

    async def forget(self, move_id: str) -> None:
        """Everything is here, or gone again."""
        ...

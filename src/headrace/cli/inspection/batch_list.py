"""`headrace batch list`: batches newest first, with the streams and batches of single runs folded into one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from headrace.cli.invocation.printing import moment, table
from headrace.core.batch import LISTED
from headrace.views import BatchView, batch_view

if TYPE_CHECKING:
    from headrace.core.batch import BatchRecord, Ledger
    from headrace.runtime.engine import Engine

PAGE_BATCHES: Final = 200
PAGES_MAX: Final = 50
"""Pages that are read for one list: an app that enqueues single runs makes a stream for each of its processes."""

FOLDED: Final = "single runs"
COUNTS: Final = ("runs", "waiting", "leased", "completed", "failed", "cancelled", "expired")
ALWAYS_SHOWN: Final = frozenset({"runs", "completed", "failed"})
TASKS_SHOWN: Final = 3


class BatchPage(NamedTuple):
    """Listed batches, and the ledgers of those that were folded. `next_id` continues the list; empty at its end."""

    views: list[BatchView]
    folded: list[BatchView]
    tasks: dict[str, list[str]]
    next_id: str


async def read_page(engine: Engine, *, states: list[str] | None, before_id: str, limit: int, folds: bool) -> BatchPage:
    """Read at most `limit` batches. With `folds`, streams and batches of single runs are not among them."""
    views: list[BatchView] = []
    folded: list[BatchView] = []
    next_id, is_full = before_id, False
    for _ in range(PAGES_MAX):
        page: list[tuple[BatchRecord, Ledger]] = await engine.store.batches(
            engine.environment, states=states, before_id=next_id, limit=PAGE_BATCHES
        )
        for batch, ledger in page:
            is_folded = folds and batch.kind != LISTED
            if is_full := len(views) == limit and not is_folded:
                break
            (folded if is_folded else views).append(batch_view(batch, ledger))
            next_id = batch.id
        if is_full or not page:
            break
    else:
        is_full = True
    unnamed = [view.id for view in (*views, *folded) if not view.task]
    tasks = await engine.store.tasks_of_batches(engine.environment, unnamed) if unnamed else {}
    return BatchPage(views, folded, tasks, next_id if is_full else "")


def print_page(page: BatchPage) -> None:
    """Write the batches as a table; columns without any count, and the column of keys without any key, are left out."""
    rows = [
        {
            "batch": view.id,
            "key": shown_key(view),
            "task": _tasks([view], page.tasks),
            "state": shown_state(view),
            "created (UTC)": moment(view.created_at),
            **_counts([view]),
        }
        for view in page.views
    ]
    if page.folded:
        open_count = sum(not view.is_finished for view in page.folded)
        rows.append(
            {
                "batch": FOLDED,
                "key": "",
                "task": _tasks(page.folded, page.tasks),
                "state": f"{open_count:,} open" if open_count else "ended",
                "created (UTC)": moment(max(view.created_at for view in page.folded)),
                **_counts(page.folded),
            }
        )
    numbers = [name for name in COUNTS if name in ALWAYS_SHOWN or any(row[name] for row in rows)]
    columns = [
        "batch",
        *(["key"] if any(row["key"] for row in rows) else []),
        "task",
        "state",
        "created (UTC)",
        *numbers,
    ]
    table(columns, [[row[name] for name in columns] for row in rows], numbers=numbers)


def shown_key(view: BatchView) -> str:
    """Return the key that the user gave to a batch, also to that of a map; empty for none."""
    given = view.metadata.get("batch_key") if "map" in view.metadata else view.key
    return str(given or "")


def shown_metadata(view: BatchView) -> dict[str, Any]:
    """Return the metadata of a batch; of a map, what identifies it and not its position."""
    if "map" not in view.metadata:
        return view.metadata
    return {name: view.metadata[name] for name in ("input", "batch_key") if view.metadata.get(name)}


def shown_state(view: BatchView) -> str:
    """Return the outcome of a finished batch in words, the state of any other."""
    return (view.outcome or view.state).replace("_", " ")


def _counts(views: list[BatchView]) -> dict[str, Any]:
    names = ("expected", *COUNTS[1:])
    return {name: sum(getattr(view, field) for view in views) for name, field in zip(COUNTS, names, strict=True)}


def _tasks(views: list[BatchView], tasks: dict[str, list[str]]) -> str:
    names = sorted({name for view in views for name in ([view.task] if view.task else tasks.get(view.id, []))})
    more = ", …" if len(names) > TASKS_SHOWN else ""
    return ", ".join(names[:TASKS_SHOWN]) + more or "-"

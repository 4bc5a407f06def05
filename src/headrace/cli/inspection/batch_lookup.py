"""Lookup of the batch that a command names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.foundation.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from headrace.core.batch import BatchRecord
    from headrace.runtime.engine import Engine


async def find_batch(engine: Engine, text: str) -> BatchRecord:
    """Find a batch by its id, its key, or the --batch-key of its map (the newest batch of it). Raises `NotFound`."""
    from headrace.cli.maps.chain import batch_of_key
    from headrace.foundation.ids import check_batch_id

    try:
        batch_id = check_batch_id(text)
    except InvalidInput:
        batch = await engine.store.find_batch(engine.environment, text) or await batch_of_key(engine, text)
        if batch is None:
            raise NotFound(
                f"no batch has the id or key {text!r}", hint="`headrace batch list` shows all batches"
            ) from None
        return batch
    batch, _ = await engine.store.batch(batch_id)
    return batch

"""The log events of Headrace during a block of a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headrace.foundation.logs import FIELDS


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, FIELDS, None) or {"event": record.getMessage()}
        self.events.append({**fields, "log_level": record.levelname.lower(), "logger": record.name})


@contextmanager
def logged_events(level: int = logging.INFO) -> Iterator[list[dict[str, Any]]]:
    """Collect the events that Headrace logs, each with its fields, `event` and `log_level`."""
    logger, collector = logging.getLogger("headrace"), _Collector()
    level_before = logger.level
    logger.addHandler(collector)
    logger.setLevel(level)
    try:
        yield collector.events
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level_before)

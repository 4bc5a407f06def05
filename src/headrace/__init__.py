"""Durable batches for Python: stream a million items in, run every one, know when it is done."""

from __future__ import annotations

__version__ = "0.1.0"

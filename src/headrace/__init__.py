"""Durable batches for Python: stream a million items in, run every one, know when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.core.retry import Retry, RetryAfter
    from headrace.foundation.errors import HeadraceError
    from headrace.handles import Batch, Outcome, Run, RunFailed, Summary, WaitTimedOut
    from headrace.remote.client import Client
    from headrace.runtime.tasks.context import DETACHED, Context
    from headrace.task import Task

__version__ = "0.1.0"

__all__ = [
    "DETACHED",
    "Batch",
    "Client",
    "Context",
    "Headrace",
    "HeadraceError",
    "Outcome",
    "Retry",
    "RetryAfter",
    "Run",
    "RunFailed",
    "Summary",
    "Task",
    "WaitTimedOut",
]

_HOMES = {
    "DETACHED": "headrace.runtime.tasks.context",
    "Batch": "headrace.handles",
    "Client": "headrace.remote.client",
    "Context": "headrace.runtime.tasks.context",
    "Headrace": "headrace.app",
    "HeadraceError": "headrace.foundation.errors",
    "Outcome": "headrace.handles",
    "Retry": "headrace.core.retry",
    "RetryAfter": "headrace.core.retry",
    "Run": "headrace.handles",
    "RunFailed": "headrace.handles",
    "Summary": "headrace.handles",
    "Task": "headrace.task",
    "WaitTimedOut": "headrace.handles",
}


def __getattr__(name: str) -> Any:
    """Load public names when they are first used, so that `headrace --version` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)

"""Durable batches for Python: stream a million items in, run every one, know when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.app import Headrace
    from headrace.core.failure import Failure
    from headrace.core.retry import Retry, RetryAfter
    from headrace.foundation.errors import (
        Conflict,
        HeadraceError,
        InvalidInput,
        InvalidSetting,
        NotFound,
        StoreUnavailable,
    )
    from headrace.foundation.logs import RunIdFilter
    from headrace.handles import Batch, Outcome, Run, RunFailed, WaitTimeout
    from headrace.remote.client import Client
    from headrace.runtime.tasks.context import DETACHED, Context
    from headrace.task import AsyncTask, SyncTask, Task
    from headrace.views import AttemptView, BatchView, RunError, RunView

__version__ = "0.1.0"

__all__ = [
    "DETACHED",
    "AsyncTask",
    "AttemptView",
    "Batch",
    "BatchView",
    "Client",
    "Conflict",
    "Context",
    "Failure",
    "Headrace",
    "HeadraceError",
    "InvalidInput",
    "InvalidSetting",
    "NotFound",
    "Outcome",
    "Retry",
    "RetryAfter",
    "Run",
    "RunError",
    "RunFailed",
    "RunIdFilter",
    "RunView",
    "StoreUnavailable",
    "SyncTask",
    "Task",
    "WaitTimeout",
]

_MODULES = {
    "DETACHED": "headrace.runtime.tasks.context",
    "AsyncTask": "headrace.task",
    "AttemptView": "headrace.views",
    "Batch": "headrace.handles",
    "BatchView": "headrace.views",
    "Client": "headrace.remote.client",
    "Conflict": "headrace.foundation.errors",
    "Context": "headrace.runtime.tasks.context",
    "Failure": "headrace.core.failure",
    "Headrace": "headrace.app",
    "HeadraceError": "headrace.foundation.errors",
    "InvalidInput": "headrace.foundation.errors",
    "InvalidSetting": "headrace.foundation.errors",
    "NotFound": "headrace.foundation.errors",
    "Outcome": "headrace.handles",
    "Retry": "headrace.core.retry",
    "RetryAfter": "headrace.core.retry",
    "Run": "headrace.handles",
    "RunError": "headrace.views",
    "RunFailed": "headrace.handles",
    "RunIdFilter": "headrace.foundation.logs",
    "RunView": "headrace.views",
    "StoreUnavailable": "headrace.foundation.errors",
    "SyncTask": "headrace.task",
    "Task": "headrace.task",
    "WaitTimeout": "headrace.handles",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `headrace --version` loads none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)

"""An executor under test: hand-made leases, a manual clock, an object store that is a dict."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from headrace.core import pack, run
from headrace.core.failure import Failure, decode
from headrace.core.span import RETRY
from headrace.foundation.errors import ObjectMissing
from headrace.foundation.limits import Limits
from headrace.runtime.clock import ManualClock
from headrace.runtime.sessions.active_lease import ActiveLease
from headrace.runtime.tasks.task_registry import Registry
from headrace.runtime.tasks.task_spec import TaskSpec
from headrace.runtime.worker.executor import Executor, ExecutorCallbacks
from headrace.store.protocol import Lease

NAMES = {**run.NAMES, RETRY: "retry", 0: "open"}


class Objects:
    """An object store as a dict. `faults` are raised first, one per request."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[bytes, int]] = {}
        self.faults: list[Exception] = []
        self.requests_count = 0

    async def fetch(self, reference: bytes) -> tuple[bytes, int]:
        self._request()
        if reference not in self.kept:
            raise ObjectMissing("the payload is not in the object store")
        return self.kept[reference]

    async def put_result(self, batch_id: str, result: bytes) -> tuple[bytes, str]:
        self._request()
        key = hashlib.sha256(result).hexdigest()
        self.kept[key.encode()] = (result, pack.JSON)
        return key.encode(), f"{batch_id}/{key}"

    def _request(self) -> None:
        self.requests_count += 1
        if self.faults:
            raise self.faults.pop(0)


class Rig:
    """An executor with one task, `task`, and the outcomes of its runs."""

    def __init__(
        self, function: Callable[..., Any], *, concurrency: int = 8, limits: Limits | None = None, **options: Any
    ):
        self.inline = options.pop("inline", False)
        self.deadlines: list[int] = []
        self.clock = ManualClock()
        self.objects = Objects()
        self.registry = Registry()
        self.registry.add(TaskSpec("task", function, **options))
        self.over: list[ActiveLease] = []
        self.dirty: list[ActiveLease] = []
        self.executor = Executor(
            self.registry,
            concurrency=concurrency,
            clock=self.clock,
            offload=self.objects,
            limits=limits or Limits(),
            hooks=ExecutorCallbacks(over=self._over, dirty=self._dirty),
            inline_sync=self.inline,
            deadline=self.deadlines.append if self.inline else None,
        )
        self._tokens = 0
        self._changed = asyncio.Event()

    def _over(self, work: ActiveLease) -> None:
        self.over.append(work)
        self._changed.set()

    def _dirty(self, work: ActiveLease) -> None:
        work.dirty_since_us = self.clock.now_us()
        self.dirty.append(work)

    def work(self, payloads: Sequence[bytes], *, kinds: bytes | None = None, **more: Any) -> ActiveLease:
        """Make a lease of runs with these payloads, without submitting it."""
        self._tokens += 1
        defaults: dict[str, Any] = {
            "attempt": 1, "crashes_count": 0, "at_most_once": False, "expires_us": 0, "extras": {}, "task": "task"
        }  # fmt: skip
        lease = Lease(
            span_id=self._tokens,
            token=1,
            batch_id="batch_0",
            queue="default",
            due_us=0,
            whole=True,
            span_slots=range(len(payloads)),
            indexes=range(len(payloads)),
            payloads=list(payloads),
            kinds=kinds,
            runs_count=len(payloads),
            **(defaults | more),
        )
        return ActiveLease(lease)

    def submit(self, *payloads: bytes, **more: Any) -> ActiveLease:
        """Submit a lease to the executor."""
        work = self.work(payloads, **more)
        self.executor.submit(work)
        return work

    async def until_over(self, *works: ActiveLease) -> None:
        """Wait until the executor has ended all runs of these leases, also runs in threads."""
        while any(work not in self.over for work in works):
            self._changed.clear()
            await self._changed.wait()

    async def ran(self, *payloads: bytes, **more: Any) -> ActiveLease:
        """Execute a lease to its end."""
        work = self.submit(*payloads, **more)
        await self.until_over(work)
        return work


@asynccontextmanager
async def rig(function: Callable[..., Any], **options: Any):  # type: ignore[no-untyped-def]  # the decorator's own
    """Yield a rig, and stop it at the end, also if runs are in flight."""
    made = Rig(function, **options)
    try:
        yield made
    finally:
        await made.executor.stop(grace_s=0)


def numbers(count: int) -> list[bytes]:
    """Return the payloads 0, 1, 2, …"""
    return [b"%d" % number for number in range(count)]


def states(work: ActiveLease) -> list[str]:
    """Return the outcome of each run by name."""
    return [NAMES[code] for code in work.codes]


def failure(work: ActiveLease, number: int = 0) -> Failure:
    """Return the failure of a run."""
    assert work.codes[number] in (run.FAILED, RETRY), states(work)
    return decode(work.results[number])

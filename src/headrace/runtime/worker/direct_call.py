"""The choice between the two ways in which an executor calls the runs of a lease.

A *direct call* is an async function of one parameter, called with the decoded payload and nothing else: the hot path.
Everything else (options of single runs, contexts, threads, references, expiry) takes the general way.
"""

from __future__ import annotations

from typing import Any, Final

from headrace.runtime.sessions.active_lease import ActiveLease, DirectCall
from headrace.runtime.tasks.task_registry import Registry


async def _never_called(_value: Any) -> None:
    raise AssertionError


GENERAL_CALL: Final = DirectCall(_never_called, bytes, frozenset(), len, 0, lambda _value, _result: None)
"""The mark of a lease whose runs take the general way."""


def choose_call(work: ActiveLease, registry: Registry, *, has_deadline: bool) -> DirectCall:
    """Choose how the runs of a lease are called, and keep the choice in the lease's `plan`.

    `has_deadline`: this process is killed when a run passes its timeout, so each run must announce its deadline.
    """
    lease = work.lease
    work.plan = GENERAL_CALL
    if lease.kinds is not None or lease.expires_us or lease.at_most_once or lease.task not in registry:
        return GENERAL_CALL
    spec = registry.get(lease.task)
    decode = spec.codec.decode_one
    if decode is None or not spec.is_async or spec.codec.context_name:
        return GENERAL_CALL
    if has_deadline and spec.timeout_s is not None:
        return GENERAL_CALL
    if any(extra.attempts_max or extra.timeout_ms for extra in lease.extras.values()):
        return GENERAL_CALL
    results = spec.codec.results
    work.plan = DirectCall(
        spec.function, decode, results.plain_types, results.validate or len, results.checks_values, results.check_values
    )
    return work.plan

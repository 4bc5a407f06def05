"""JSON forms of batches and runs: trigger.dev's objects and states, and those of `/v1`."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from headrace.core import pack, run
from headrace.core.batch import ABANDONED, CANCELLED, COMPLETED, OPEN, SEALED, BatchRecord
from headrace.core.failure import Failure, decode
from headrace.core.span import DELAYED, LEASED
from headrace.foundation.ids import run_id
from headrace.store.protocol import RunOutcome, RunRecord

BATCH_STATUS: Final = {
    OPEN: "PENDING",
    SEALED: "PROCESSING",
    COMPLETED: "COMPLETED",
    CANCELLED: "ABORTED",
    ABANDONED: "ABORTED",
}
RUN_STATUS: Final = {
    "waiting": "QUEUED",
    DELAYED: "DELAYED",
    LEASED: "DEQUEUED",
    "started": "EXECUTING",
    "completed": "COMPLETED",
    "failed": "FAILED",
    "cancelled": "CANCELED",
    "expired": "EXPIRED",
}
STATES_OF_STATUS: Final = {
    "PENDING_VERSION": (),
    "QUEUED": ("waiting",),
    "DEQUEUED": (LEASED,),
    "EXECUTING": ("started",),
    "WAITING": (),
    "COMPLETED": ("completed",),
    "CANCELED": ("cancelled",),
    "FAILED": ("failed",),
    "CRASHED": ("failed",),
    "SYSTEM_FAILURE": ("failed",),
    "DELAYED": (DELAYED,),
    "EXPIRED": ("expired",),
    "TIMED_OUT": ("failed",),
}
_FAILED_AS: Final = {
    "PAYLOAD_TOO_LARGE": "SYSTEM_FAILURE",
    "InvalidJSON": "SYSTEM_FAILURE",
    "InvalidUTF8": "SYSTEM_FAILURE",
    "OBJECT_MISSING": "SYSTEM_FAILURE",
    "WorkerCrashed": "CRASHED",
    "WorkerLost": "CRASHED",
    "TimeoutError": "TIMED_OUT",
}
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def iso_time(us: int) -> str | None:
    """Format a time in ISO 8601; None for 0."""
    if not us:
        return None
    return datetime.fromtimestamp(us / 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def run_status(state: str, failure: Failure | None) -> str:
    """Convert a run's state to trigger.dev's. For a failed run it depends on the error."""
    if state == "failed" and failure is not None:
        return _FAILED_AS.get(failure.type, "FAILED")
    return RUN_STATUS[state]


def trigger_batch(batch: BatchRecord) -> dict[str, Any]:
    """Build trigger.dev's batch object, as in `GET /api/v1/batches/{id}`, without its runs."""
    fields: dict[str, Any] = {
        "id": batch.id,
        "status": BATCH_STATUS[batch.state],
        "createdAt": iso_time(batch.created_us),
        "updatedAt": iso_time(max(batch.created_us, batch.appended_us, batch.sealed_us, batch.finished_us)),
        "runCount": batch.received_count if batch.expected_count is None else batch.expected_count,
    }
    key = batch.metadata.get("idempotencyKey")
    if isinstance(key, str):
        fields["idempotencyKey"] = key
    return fields


def trigger_error(failure: Failure | None, state: str) -> dict[str, Any]:
    """Build trigger.dev's error object of a run that did not complete."""
    if failure is None:
        return {"type": "INTERNAL_ERROR", "code": f"TASK_RUN_{RUN_STATUS[state]}", "message": f"the run was {state}"}
    fields = {"type": "BUILT_IN_ERROR", "name": failure.type, "message": failure.message, "stackTrace": failure.trace}
    if _FAILED_AS.get(failure.type) == "SYSTEM_FAILURE":
        return fields | {"type": "INTERNAL_ERROR", "code": failure.type}
    return fields


def trigger_run(view: RunRecord, batch: BatchRecord) -> dict[str, Any]:
    """Build trigger.dev's run object, as `GET /api/v3/runs/{id}` returns it, without payload and output."""
    failure = decode(view.result) if view.state == "failed" and view.result else None
    status = run_status(view.state, failure)
    kept: dict[str, Any] = msgspec.json.decode(view.kept) if view.kept else {}
    code = run.BY_NAME.get(view.state, run.WAITING)
    is_final = code in run.FINAL
    ended = view.attempts[-1]["settled_us"] if view.attempts and is_final else 0
    fields: dict[str, Any] = {
        "id": run_id(view.batch_id, view.index),
        "status": status,
        "taskIdentifier": view.task,
        "isQueued": status in ("QUEUED", "DELAYED", "PENDING_VERSION"),
        "isExecuting": status in ("EXECUTING", "DEQUEUED"),
        "isWaiting": False,
        "isCompleted": is_final,
        "isSuccess": status == "COMPLETED",
        "isFailed": status in ("FAILED", "CRASHED", "SYSTEM_FAILURE", "TIMED_OUT"),
        "isCancelled": status == "CANCELED",
        "isTest": bool(kept.get("test", False)),
        "createdAt": iso_time(batch.created_us),
        "updatedAt": iso_time(int(str(ended)) or max(batch.created_us, batch.appended_us)),
        "tags": view.tags,
        "costInCents": 0,
        "baseCostInCents": 0,
        "durationMs": 0,
        "depth": 0,
        "triggerFunction": "batchTrigger" if batch.kind == "batch" else "trigger",
        "relatedRuns": {},
        "batchId": view.batch_id,
        "attemptCount": len(view.attempts) if view.attempts else (0 if not is_final else view.attempt),
    }
    optional = {
        "idempotencyKey": kept.get("idempotencyKey") or view.idempotency_key,
        "finishedAt": iso_time(int(str(ended))),
        "delayedUntil": iso_time(view.due_us) if view.state == DELAYED else None,
        "expiredAt": iso_time(view.expires_us) if view.state == "expired" else None,
        "metadata": kept.get("metadata"),
        "region": kept.get("region"),
        "version": kept.get("lockToVersion"),
    }
    fields |= {name: value for name, value in optional.items() if value}
    fields |= {name: kept[name] for name in ("machine", "concurrencyKey", "debounce", "payloadSize") if name in kept}
    if failure is not None:
        fields["error"] = {"message": failure.message, "name": failure.type, "stackTrace": failure.trace}
    return fields


def json_value(data: bytes, kind: int) -> Any:
    """Convert a payload or output to JSON: text as a string, super+json as its `json` part, protobuf in base64."""
    if kind == pack.TEXT:
        return data.decode("utf-8", "replace")
    if kind == pack.SUPER_JSON:
        document = msgspec.json.decode(data)
        return document.get("json") if isinstance(document, dict) else document
    if kind == pack.ACTIVATION:
        return base64.b64encode(data).decode()
    return msgspec.Raw(data) if data else None


def result_line(batch_id: str, outcome: RunOutcome, output: bytes | None = None) -> bytes:
    """Encode outcome line of `GET /v1/batches/{id}/results`. `output`: the resolved value of a reference or link."""
    head = b'{"index":%d,"id":"%s","state":"%s",' % (
        outcome.index,
        run_id(batch_id, outcome.index).encode(),
        run.NAMES[outcome.state].encode(),
    )
    if outcome.state == run.COMPLETED:
        return head + b'"ok":true,"output":%s}\n' % ((outcome.result if output is None else output) or b"null")
    return head + b'"ok":false,"error":%s}\n' % (outcome.result or b"null")

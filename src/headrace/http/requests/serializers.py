"""How batches and runs look outside: the states, moments and objects of the field's API, and our own."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from headrace.core import pack, run
from headrace.core.batch import ABANDONED, CANCELLED, COMPLETED, OPEN, SEALED, Batch, Ledger
from headrace.core.failure import Failure, decode
from headrace.core.span import DELAYED, LEASED
from headrace.foundation.ids import run_id
from headrace.store.protocol import Outcome, RunRecord

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


def moment(us: int) -> str | None:
    """A moment in ISO 8601, or None for none."""
    if not us:
        return None
    return datetime.fromtimestamp(us / 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def status_of(state: str, failure: Failure | None) -> str:
    """A run's state as the field calls it; of a failed one also why."""
    if state == "failed" and failure is not None:
        return _FAILED_AS.get(failure.type, "FAILED")
    return RUN_STATUS[state]


def batch_object(batch: Batch) -> dict[str, Any]:
    """A batch as `GET /api/v1/batches/{id}` has it, without its runs."""
    shown: dict[str, Any] = {
        "id": batch.id,
        "status": BATCH_STATUS[batch.state],
        "createdAt": moment(batch.created_us),
        "updatedAt": moment(max(batch.created_us, batch.appended_us, batch.sealed_us, batch.finished_us)),
        "runCount": batch.received_count if batch.expected_count is None else batch.expected_count,
    }
    key = batch.metadata.get("idempotencyKey")
    if isinstance(key, str):
        shown["idempotencyKey"] = key
    return shown


def summary(batch: Batch, ledger: Ledger) -> dict[str, Any]:
    """A batch as `/v1` has it."""
    return {
        "id": batch.id,
        "key": batch.key,
        "task": batch.task,
        "state": batch.state,
        "is_finished": batch.is_finished,
        "expected": batch.expected_count,
        "received": batch.received_count,
        **ledger._asdict(),
        "created_at": moment(batch.created_us),
        "sealed_at": moment(batch.sealed_us),
        "finished_at": moment(batch.finished_us),
        "metadata": batch.metadata,
    }


def error_object(failure: Failure | None, state: str) -> dict[str, Any]:
    """Why a run did not complete, as the field's clients read it."""
    if failure is None:
        return {"type": "INTERNAL_ERROR", "code": f"TASK_RUN_{RUN_STATUS[state]}", "message": f"the run was {state}"}
    shown = {"type": "BUILT_IN_ERROR", "name": failure.type, "message": failure.message, "stackTrace": failure.trace}
    if _FAILED_AS.get(failure.type) == "SYSTEM_FAILURE":
        return shown | {"type": "INTERNAL_ERROR", "code": failure.type}
    return shown


def run_object(view: RunRecord, batch: Batch) -> dict[str, Any]:
    """One run as `GET /api/v3/runs/{id}` and `GET /api/v1/runs` have it, without payload and output."""
    failure = decode(view.result) if view.state == "failed" and view.result else None
    status = status_of(view.state, failure)
    kept: dict[str, Any] = msgspec.json.decode(view.kept) if view.kept else {}
    code = run.BY_NAME.get(view.state, run.WAITING)
    is_final = code in run.FINAL
    ended = view.attempts[-1]["settled_us"] if view.attempts and is_final else 0
    shown: dict[str, Any] = {
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
        "createdAt": moment(batch.created_us),
        "updatedAt": moment(int(str(ended)) or max(batch.created_us, batch.appended_us)),
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
        "finishedAt": moment(int(str(ended))),
        "delayedUntil": moment(view.due_us) if view.state == DELAYED else None,
        "expiredAt": moment(view.expires_us) if view.state == "expired" else None,
        "metadata": kept.get("metadata"),
        "region": kept.get("region"),
        "version": kept.get("lockToVersion"),
    }
    shown |= {name: value for name, value in optional.items() if value}
    shown |= {name: kept[name] for name in ("machine", "concurrencyKey", "debounce", "payloadSize") if name in kept}
    if failure is not None:
        shown["error"] = {"message": failure.message, "name": failure.type, "stackTrace": failure.trace}
    return shown


def value_of(data: bytes, kind: int) -> Any:
    """A payload or output as JSON: text as a string, super+json reduced to its plain part, protobuf in base 64."""
    if kind == pack.TEXT:
        return data.decode("utf-8", "replace")
    if kind == pack.SUPER_JSON:
        document = msgspec.json.decode(data)
        return document.get("json") if isinstance(document, dict) else document
    if kind == pack.ACTIVATION:
        return base64.b64encode(data).decode()
    return msgspec.Raw(data) if data else None


def line_of(batch_id: str, one: Outcome, output: bytes | None = None) -> bytes:
    """One line of `GET /v1/batches/{id}/results`. `output`: what a reference or a link stands for."""
    head = b'{"index":%d,"id":"%s","state":"%s",' % (
        one.index,
        run_id(batch_id, one.index).encode(),
        run.NAMES[one.state].encode(),
    )
    if one.state == run.COMPLETED:
        return head + b'"ok":true,"output":%s}\n' % ((one.result if output is None else output) or b"null")
    return head + b'"ok":false,"error":%s}\n' % (one.result or b"null")

"""The API described: OpenAPI 3.1, and a page to read, both made from the list of endpoints."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

_PARAMETER: Final = re.compile(r"{(\w+)(?::path)?}")
_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string"}
_QUERY: Final[dict[str, dict[str, Any]]] = {
    "/v1/batches": {"limit": {"type": "integer", "minimum": 1, "maximum": 200}, "before": _TEXT, "state": _TEXT},
    "/v1/batches/{batch_id}/missing": {"ranges": {"type": "integer", "minimum": 1, "maximum": 1_000}},
    "/v1/batches/{batch_id}/results": {
        "from": _COUNT,
        "limit": {"type": "integer", "minimum": 1},
        "wait": {"type": "integer", "minimum": 0, "maximum": 1},
    },
    "/api/v1/runs": {
        "filter[batch]": _TEXT,
        "filter[status]": _TEXT,
        "filter[taskIdentifier]": _TEXT,
        "filter[tag]": _TEXT,
        "filter[queue]": _TEXT,
        "filter[createdAt][from]": _COUNT,
        "filter[createdAt][to]": _COUNT,
        "filter[createdAt][period]": _TEXT,
        "page[size]": {"type": "integer", "minimum": 1, "maximum": 100},
        "page[after]": _TEXT,
    },
}
_NO_KEY: Final = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"}
_PROBLEM: Final = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": _TEXT,
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "code": _TEXT,
        "hint": _TEXT,
        "retryable": {"type": "boolean"},
        "request_id": _TEXT,
    },
}
_SCHEMAS: Final[dict[str, Any]] = {
    "Problem": _PROBLEM,
    "CreateBatch": {
        "type": "object",
        "required": ["runCount"],
        "properties": {
            "runCount": {"type": "integer", "minimum": 1},
            "taskIdentifiers": {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            "idempotencyKey": {"type": "string", "minLength": 1, "maxLength": 2_048},
        },
    },
    "NewBatch": {
        "type": "object",
        "properties": {
            "run_count": {"type": ["integer", "null"], "minimum": 0},
            "key": {"type": ["string", "null"], "minLength": 1, "maxLength": 200},
            "task": {"type": "string", "maxLength": 200},
            "metadata": {"type": "object"},
            "seal_timeout_ms": {"type": ["integer", "null"], "minimum": 1_000},
        },
    },
    "Seal": {"type": "object", "properties": {"run_count": {"type": ["integer", "null"], "minimum": 0}}},
    "Redrive": {"type": "object", "properties": {"indexes": {"type": ["array", "null"], "items": _COUNT}}},
}
_BODY: Final = {
    ("POST", "/api/v3/batches"): "CreateBatch",
    ("POST", "/v1/batches"): "NewBatch",
    ("POST", "/v1/batches/{batch_id}/seal"): "Seal",
    ("POST", "/v1/batches/{batch_id}/redrive"): "Redrive",
}


def document(paths: Sequence[Any]) -> dict[str, Any]:
    """The OpenAPI document."""
    described: dict[str, dict[str, Any]] = {}
    for one in paths:
        if one.tag:
            path = one.path.replace(":path}", "}")
            described.setdefault(path, {})[one.method.lower()] = _operation(one, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": version("headrace"), "license": {"name": "Apache-2.0"}},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}, "schemas": _SCHEMAS},
        "security": [{"key": []}],
        "paths": described,
    }


def _operation(one: Any, path: str) -> dict[str, Any]:
    first = (one.endpoint.__doc__ or "").strip().partition("\n")[0]
    said = first.partition(": ")[2] or first
    described: dict[str, Any] = {
        "operationId": f"{one.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path.lower()).strip('_')}",
        "summary": said[:1].upper() + said[1:],
        "tags": [one.tag],
        "responses": _responses(path),
    }
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(one.path)
    ]
    if one.method == "GET":
        parameters += [{"name": name, "in": "query", "schema": kind} for name, kind in _QUERY.get(path, {}).items()]
    if parameters:
        described["parameters"] = parameters
    body = _BODY.get((one.method, path))
    if path.endswith("/items"):
        described["requestBody"] = {"required": True, "content": {"application/x-ndjson": {"schema": _TEXT}}}
    elif path == "/v1/activations":
        kind = {"type": "string", "format": "binary"}
        described["requestBody"] = {"required": True, "content": {"application/octet-stream": {"schema": kind}}}
    elif body is not None:
        schema = {"$ref": f"#/components/schemas/{body}"}
        is_needed = body in ("CreateBatch", "NewBatch")
        described["requestBody"] = {"required": is_needed, "content": {"application/json": {"schema": schema}}}
    if path in _NO_KEY:
        described["security"] = []
    return described


def _responses(path: str) -> dict[str, Any]:
    fault: dict[str, Any] = {"description": "What went wrong, whether trying again helps, and what to do."}
    if path.startswith("/v1/"):
        fault["content"] = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {"2XX": {"description": "Done."}, "4XX": fault, "503": {"description": "Try again later."}}


def page(paths: Sequence[Any]) -> str:
    """The same for people: one page, no scripts, nothing fetched from elsewhere."""
    rows = []
    for one in paths:
        if one.tag:
            words = html.escape(" ".join((one.endpoint.__doc__ or "").split()).replace("`", ""))
            rows.append(f"<tr><td>{one.method}</td><td><code>{html.escape(one.path)}</code></td><td>{words}</td></tr>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Headrace</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.3rem .6rem;vertical-align:top;border-top:1px solid #ddd}</style>"
        "<h1>Headrace</h1><p>Machines read <a href=/openapi.json>/openapi.json</a>. "
        "Every request but those of the server itself shows <code>Authorization: Bearer &lt;key&gt;</code>.</p>"
        f"<table>{''.join(rows)}</table></html>"
    )

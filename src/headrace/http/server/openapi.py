"""The API's documents: OpenAPI 3.1 and a web page, both made from the list of endpoints.

The schemas of request bodies and responses are made from the structs that the endpoints decode and encode.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import msgspec

from headrace.foundation.access import Access
from headrace.http.requests.error_responses import PROBLEM, Problem

if TYPE_CHECKING:
    from headrace.http.server.app import ApiEndpoint

_PARAMETER: Final = re.compile(r"{(\w+)(?::path)?}")
_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string"}
_REF: Final = "#/components/schemas/{name}"
_QUERY: Final[dict[str, dict[str, Any]]] = {
    "/v1/batches": {"limit": {"type": "integer", "minimum": 1, "maximum": 200}, "before": _TEXT, "state": _TEXT},
    "/v1/batches/{batch_id}/missing": {"ranges": {"type": "integer", "minimum": 1, "maximum": 1_000}},
    "/v1/batches/{batch_id}/results": {
        "from": _COUNT,
        "limit": {"type": "integer", "minimum": 1},
        "wait": {"type": "integer", "minimum": 0, "maximum": 1},
    },
    "/v1/sessions/{session_id}/heartbeat": {"wait_s": {"type": "integer", "minimum": 0, "maximum": 30}},
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
NDJSON: Final = "application/x-ndjson"


def document(endpoints: Sequence[ApiEndpoint]) -> dict[str, Any]:
    """Build the OpenAPI document."""
    structs = {struct: None for each in endpoints for struct in (each.body, each.line, each.response) if struct}
    _, schemas = msgspec.json.schema_components([Problem, *structs], ref_template=_REF)
    operations: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        if endpoint.tag:
            path = endpoint.path.replace(":path}", "}")
            operations.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headrace", "version": version("headrace"), "license": {"name": "Apache-2.0"}},
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}, "schemas": schemas},
        "security": [{"key": []}],
        "paths": operations,
    }


def _operation(endpoint: ApiEndpoint, path: str) -> dict[str, Any]:
    summary, _, description = (endpoint.function.__doc__ or "").strip().partition("\n")
    summary = summary.partition(": ")[2] or summary
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', path.lower()).strip('_')}",
        "summary": summary[:1].upper() + summary[1:],
        "tags": [endpoint.tag],
        "responses": _responses(endpoint, path),
    }
    if description := " ".join(description.split()):
        operation["description"] = description
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(endpoint.path)
    ]
    if endpoint.method == "GET":
        parameters += [{"name": name, "in": "query", "schema": kind} for name, kind in _QUERY.get(path, {}).items()]
    if parameters:
        operation["parameters"] = parameters
    if (schema := _body_schema(endpoint)) is not None:
        content = {endpoint.content_type: {"schema": schema}}
        operation["requestBody"] = {"required": not endpoint.is_body_optional, "content": content}
    operation["security"] = _security(endpoint.access)
    if endpoint.access.body_bytes_max is not None:
        operation["x-body-bytes-max"] = endpoint.access.body_bytes_max
    return operation


def _security(access: Access) -> list[dict[str, list[str]]]:
    """Return the alternatives: a key with one of the scopes, or nothing."""
    alternatives: list[dict[str, list[str]]] = [{"key": [scope]} for scope in access.scopes]
    return [*alternatives, {}] if access.scopes and access.credential != "key" else alternatives


def _body_schema(endpoint: ApiEndpoint) -> dict[str, Any] | None:
    if endpoint.body is not None:
        return {"$ref": _REF.format(name=endpoint.body.__name__)}
    if endpoint.content_type == "application/json":
        return None
    if endpoint.line is not None:
        schema = {"$ref": _REF.format(name=endpoint.line.__name__)}
        return {
            **_TEXT,
            "description": "One item a line.",
            "contentMediaType": "application/json",
            "contentSchema": schema,
        }
    return _TEXT if "json" in endpoint.content_type else {"type": "string", "format": "binary"}


def _responses(endpoint: ApiEndpoint, path: str) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success."}
    if endpoint.response is not None:
        schema = {"$ref": _REF.format(name=endpoint.response.__name__)}
        success["content"] = {"application/json": {"schema": schema}}
    error: dict[str, Any] = {"description": "Error, with its cause, a hint, and whether a retry can help."}
    if path.startswith("/v1/"):
        error["content"] = {PROBLEM: {"schema": {"$ref": _REF.format(name=Problem.__name__)}}}
    return {"2XX": success, "4XX": error, "503": {"description": "Temporarily unavailable; retry later."}}


def page(endpoints: Sequence[ApiEndpoint]) -> str:
    """Build the same as a web page without scripts or external resources."""
    rows = []
    for endpoint in endpoints:
        if endpoint.tag:
            text = html.escape(" ".join((endpoint.function.__doc__ or "").split()).replace("`", ""))
            path = html.escape(endpoint.path)
            scopes = " or ".join(f"<code>{scope}</code>" for scope in endpoint.access.scopes) or "everyone"
            rows.append(
                f"<tr><td>{endpoint.method}</td><td><code>{path}</code></td><td>{text}</td><td>{scopes}</td></tr>"
            )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Headrace</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.3rem .6rem;vertical-align:top;border-top:1px solid #ddd}</style>"
        "<h1>Headrace</h1><p>The OpenAPI document is <a href=/openapi.json>/openapi.json</a>. "
        "A request needs <code>Authorization: Bearer &lt;key&gt;</code> with a key of the scope named here.</p>"
        f"<table>{''.join(rows)}</table></html>"
    )

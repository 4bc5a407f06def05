"""The trace context of a run, in W3C headers, if the process uses OpenTelemetry."""

from __future__ import annotations

import sys
from typing import Final

MODULE: Final = "opentelemetry.trace"
NAMES: Final = ("traceparent", "tracestate", "baggage")


def trace_headers() -> dict[str, str]:
    """Return `traceparent`, `tracestate` and `baggage` of the current span; nothing if OpenTelemetry was never
    imported.

    A run stores them as headers at enqueue, and its task reads them from `Context.headers`.
    """
    if MODULE not in sys.modules:
        return {}
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name: value for name, value in carrier.items() if name in NAMES}

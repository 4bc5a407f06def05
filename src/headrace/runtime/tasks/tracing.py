"""The trace that a run belongs to, in W3C's own headers, where its process uses OpenTelemetry."""

from __future__ import annotations

import sys
from typing import Final

MODULE: Final = "opentelemetry.trace"
NAMES: Final = ("traceparent", "tracestate", "baggage")


def trace_headers() -> dict[str, str]:
    """`traceparent` and its company of the span that is open here; nothing where OpenTelemetry was never imported.

    A run gets them at enqueue, as headers, and its task finds them in `Context.headers`.
    """
    if MODULE not in sys.modules:
        return {}
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {name: value for name, value in carrier.items() if name in NAMES}

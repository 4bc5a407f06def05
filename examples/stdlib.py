"""The example of `headrace demo`; it lives in the package, so that the demo needs no checkout."""

from headrace.examples.stdlib import Outline, app, outline

__all__ = ["Outline", "app", "outline"]

"""File descriptors of this process: how many it may have, and how many of them its connections may use."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

resource: Any
try:
    import resource
except ImportError:  # not on this platform
    resource = None

DESCRIPTORS_ENOUGH: Final = 1_048_576
"""No process needs more, and some programs loop over all descriptors that they may have."""
UNKNOWN_LIMIT: Final = 8_192


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one. Returns the soft limit."""
    if resource is None:
        return UNKNOWN_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_ENOUGH if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems have a lower limit that they don't report
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()


def descriptor_limit() -> int:
    """Return the number of descriptors that this process may have."""
    if resource is None:
        return UNKNOWN_LIMIT
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DESCRIPTORS_ENOUGH if soft == resource.RLIM_INFINITY else soft


def connections_max_of(connections_max: int, *, descriptors: int, reserve: int) -> int:
    """Return how many connections a server may have: `reserve` descriptors are left for its files and its store.

    With few descriptors the reserve is half of them at most.
    """
    return max(1, min(connections_max, max(descriptors // 2, descriptors - reserve)))

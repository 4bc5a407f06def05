"""The rules of an environment, cached for a poll interval. While the store does not respond, the old rules stay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from headrace.core.rules import NO_RULES, Rules, rules_of
from headrace.foundation.errors import Conflict, HeadraceError
from headrace.foundation.logs import get_logger
from headrace.runtime.engine import Engine

LOG: Any = get_logger("headrace.rules")
TRIES_MAX: Final = 20


async def change_rules(engine: Engine, name: str, change: Callable[[Rules], bytes]) -> Rules:
    """Change the rules under a name, on top of concurrent changes; return all rules after the change.

    A change without effect writes nothing. Raises `Conflict` if other writers are faster again and again.
    """
    store, environment = engine.store, engine.environment
    for _ in range(TRIES_MAX):
        stored = await store.rules(environment)
        value = change(rules_of(stored))
        after = rules_of(stored | {name: value})
        if after == rules_of(stored) or await store.keep_rules(environment, name, value, before=stored.get(name)):
            return after
    raise Conflict(
        f"the {name} could not be changed: other writers changed it at the same time", hint="run the command again"
    )


class RuleCache:
    """The rules, read often and refreshed seldom. Owned by one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read_us = 0
        self._reading = asyncio.Lock()
        self.rules: Rules = NO_RULES

    async def refresh(self) -> Rules:
        """Return the rules, read again if they are older than a poll interval."""
        engine = self._engine
        async with self._reading:
            now_us = engine.clock.now_us()
            if not engine.outage.is_over:
                engine.outage.ensure_probing(engine.clock)
                return self.rules
            if self._read_us and now_us - self._read_us < engine.limits.poll_interval_ms * 1_000:
                return self.rules
            self._read_us = now_us
            try:
                self.rules = rules_of(await engine.store.rules(engine.environment))
            except HeadraceError as error:
                LOG.warning("rules.refresh_failed", error=error.message)
            return self.rules

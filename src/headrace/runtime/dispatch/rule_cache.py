"""The rules of an environment, as fresh as a poll interval; a store that does not answer leaves them as they were."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from headrace.core.rules import NO_RULES, Rules, rules_of
from headrace.foundation.errors import Conflict, HeadraceError
from headrace.runtime.engine import Engine

LOG: Any = structlog.get_logger("headrace.rules")
TRIES_MAX: Final = 20


async def change_rules(engine: Engine, name: str, change: Callable[[Rules], bytes]) -> Rules:
    """Change what is decided under a name, on top of what others decide at the same time; answers all rules after it.

    What changes nothing writes nothing. Raises `Conflict` when others are faster again and again.
    """
    store, environment = engine.store, engine.environment
    for _ in range(TRIES_MAX):
        kept = await store.rules(environment)
        value = change(rules_of(kept))
        after = rules_of(kept | {name: value})
        if after == rules_of(kept) or await store.keep_rules(environment, name, value, before=kept.get(name)):
            return after
    raise Conflict(f"others change the {name} all the time", hint="try again in a moment")


class RuleCache:
    """Looked at often, read seldom. Owned by one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._read_us = 0
        self._reading = asyncio.Lock()
        self.rules: Rules = NO_RULES

    async def refresh(self) -> Rules:
        """The rules, read anew when they are older than a poll interval."""
        engine = self._engine
        async with self._reading:
            now_us = engine.clock.now_us()
            if self._read_us and now_us - self._read_us < engine.limits.poll_interval_ms * 1_000:
                return self.rules
            self._read_us = now_us
            try:
                self.rules = rules_of(await engine.store.rules(engine.environment))
            except HeadraceError as error:
                LOG.warning("the rules stay as they were", error=error.message)
            return self.rules

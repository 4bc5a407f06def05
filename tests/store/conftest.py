"""Fixtures of the store tests: each coroutine test runs on an open store of each kind, and ends with the invariants."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from headrace.foundation.limits import DEFAULT
from tests.support.store_rig import FACTORIES, StoreRig


@pytest.fixture(params=list(FACTORIES))
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> StoreRig:
    """Return a rig around each kind of store."""
    return StoreRig(FACTORIES[request.param](tmp_path, DEFAULT))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on an event loop of their own, inside the rigs that they use."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(_within(pyfuncitem.obj, {name: pyfuncitem.funcargs[name] for name in wanted}))
    return True


async def _within(test: Callable[..., Coroutine[Any, Any, None]], arguments: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        for argument in arguments.values():
            if isinstance(argument, StoreRig):
                await stack.enter_async_context(argument)
        await test(**arguments)

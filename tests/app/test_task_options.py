"""Options of tasks and of calls: delays, expiry, dead letters, traces."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from headrace.core.retry import Retry
from headrace.foundation.errors import InvalidSetting
from headrace.handles import RunFailed
from headrace.runtime.clock import ManualClock
from headrace.runtime.tasks.context import DETACHED, Context
from headrace.views import moment_of
from tests.support.engines import app_on, on_each_store, opened

TRACE = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, is_remote=True, trace_flags=TraceFlags(1))
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@on_each_store
async def test_a_task_s_delay_and_expiry_apply_unless_a_call_overrides_them(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with opened(kind, tmp_path, clock=clock) as engine, app_on(engine) as app:

        @app.task(delay_s=60, expires_s=600)
        async def late(n: int) -> int:
            return n

        usual = await (await late.enqueue(1)).view()
        overridden = await (await late.options(delay_s=5, expires_s=50).enqueue(2)).view()
        now = moment_of(clock.now_us())
        assert (usual.due_at, usual.expires_at) == (now + timedelta(seconds=60), now + timedelta(seconds=600))
        assert (overridden.due_at, overridden.expires_at) == (now + timedelta(seconds=5), now + timedelta(seconds=50))
        mapped = await late.map([3])
        (view,) = await app.runs(batch=mapped.id)
        assert view.due_at == usual.due_at


@on_each_store
async def test_a_run_that_failed_for_good_becomes_a_dead_letter_if_its_task_asks_for_it(
    kind: str, tmp_path: Path
) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        ran: list[str] = []

        @app.task(on_exhausted="dead_letter", retry=Retry(attempts=2, delay_s=0, jitter=0))
        async def buried(n: int) -> int:
            ran.append("buried")
            raise ValueError(n)

        @app.task
        async def plain(n: int) -> int:
            raise ValueError(n)

        runs = [await buried.enqueue(1), await plain.enqueue(2)]
        async with app.worker():
            for run in runs:
                with pytest.raises(RunFailed):
                    await run.result()
        (dead,) = await engine.store.dead_letters("default")
        assert (dead.task, dead.batch_id, dead.index) == ("buried", runs[0].batch_id, runs[0].index)
        assert ran == ["buried", "buried"], "it is a dead letter only when its attempts are exhausted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_exhausted": "bury"}, "on_exhausted: expected one of discard, dead_letter"),
        ({"delay_s": -1}, "delay_s: expected 0 to"),
        ({"expires_s": 1e12}, "expires_s: expected 0 to"),
        ({"expires_s": True}, "expires_s: expected 0 to"),
        ({"name": "headrace.activation"}, "is reserved for activations"),
    ],
)
async def test_an_invalid_task_option_is_refused_at_declaration(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    async with opened("memory", tmp_path) as engine, app_on(engine) as app:
        with pytest.raises(InvalidSetting, match=message):
            app.task(**options)(lambda: None)


@on_each_store
async def test_the_trace_of_a_call_reaches_the_context_of_its_run(kind: str, tmp_path: Path) -> None:
    async with opened(kind, tmp_path) as engine, app_on(engine) as app:
        seen: dict[str, dict[str, str]] = {}

        @app.task
        async def traced(name: str, context: Context = DETACHED) -> None:
            seen[name] = dict(context.headers)

        with trace.use_span(NonRecordingSpan(TRACE)):
            runs = [await traced.enqueue("traced"), await traced.options(headers={"traceparent": "x"}).enqueue("own")]
        runs.append(await traced.options(headers={"h": "1"}).enqueue("plain"))
        async with app.worker():
            for run in runs:
                await run.result()
        assert seen == {"traced": {"traceparent": PARENT}, "own": {"traceparent": "x"}, "plain": {"h": "1"}}


def test_trace_headers_do_not_import_opentelemetry() -> None:
    code = "import sys, headrace.app, headrace.runtime.tasks.tracing as t; assert t.trace_headers() == {}; "
    code += "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

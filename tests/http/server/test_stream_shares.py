"""Item streams of several environments: none takes all places, and a further environment always finds one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.core.admission import StreamShares
from headrace.http.requests.auth import new_key
from tests.support.http_server import LIMITS, NDJSON, HttpAnswer, HttpPeer, ServerUnderTest, line, running_server

PLACES = 8


async def key_of(server: ServerUnderTest, environment: str) -> dict[str, str]:
    """Create a key of an environment. Returns its header."""
    secret, stored = new_key(environment, ("*",), "", server.engine.clock.now_us())
    await server.engine.administration.add_key(stored, now_us=1)
    return {"authorization": f"Bearer {secret}"}


async def batch_of(server: ServerUnderTest, key: dict[str, str]) -> str:
    """Create a batch of one run with a key."""
    answer = await server.ask("POST", "/v1/batches", {"run_count": 1, "task": "task"}, key, auth=False)
    return str(answer.json["id"])


async def begin(server: ServerUnderTest, key: dict[str, str], path: str) -> HttpPeer:
    """Begin a stream that never ends by itself."""
    peer = await server.peer().connect()
    await peer.head("POST", path, {**key, **NDJSON, "transfer-encoding": "chunked"})
    await peer.chunk(b"\n")
    return peer


async def hold_streams(server: ServerUnderTest, key: dict[str, str], count: int) -> HttpAnswer:
    """Open streams until one is refused, and return that answer. `count`: those that are expected to stay open."""
    path = f"/v1/batches/{await batch_of(server, key)}/items"
    held = server.service.streams_count
    for number in range(count):
        await begin(server, key, path)
        while server.service.streams_count < held + number + 1:
            await asyncio.sleep(0)
    return await (await begin(server, key, path)).answer()


@pytest.mark.parametrize("api", ["/v1", "/api/v3"])
async def test_slow_streams_of_one_environment_leave_places_for_another(tmp_path: Path, api: str) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(streams_max=PLACES)) as server:
        slow, other = await key_of(server, "slow"), await key_of(server, "other")
        refused = await hold_streams(server, slow, PLACES // 2)
        assert (refused.status, refused.json["code"]) == (429, "TOO_MANY_STREAMS")
        assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("5", "true")
        assert "streams_max" in refused.json["hint"]
        path = f"{api}/batches/{await batch_of(server, other)}/items"
        answer = await server.ask("POST", path, [line(0)], {**other, **NDJSON}, auth=False)
        assert answer.status == 200, answer


async def test_an_environment_holds_no_more_streams_than_its_own_limit(tmp_path: Path) -> None:
    limits = LIMITS.replaced(streams_max=PLACES, environment_streams_max=1)
    async with running_server(tmp_path, "sqlite", limits=limits) as server:
        refused = await hold_streams(server, await key_of(server, "slow"), 1)
        assert (refused.status, "environment_streams_max" in refused.json["hint"]) == (429, True)


async def test_a_place_is_free_again_when_its_stream_has_ended(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite", limits=LIMITS.replaced(streams_max=2)) as server:
        key = await key_of(server, "one")
        for _ in range(3):
            path = f"/v1/batches/{await batch_of(server, key)}/items"
            answer = await server.ask("POST", path, [line(0)], {**key, **NDJSON}, auth=False)
            assert answer.status == 200, answer
        assert server.service.streams_count == 0


@pytest.mark.parametrize("environments_count", [1, 2, 3, 7, 30])
def test_any_number_of_greedy_environments_leaves_a_place_for_one_more(environments_count: int) -> None:
    shares = StreamShares(places=64, places_each=64)
    names = [f"greedy {number}" for number in range(environments_count)]
    for _ in range(64):
        for name in names:
            shares.enter(name)
    held = [shares.held(name) for name in names]
    assert max(held) - min(held) <= max(held) // 2 + 1, "their shares are similar"
    assert shares.enter("one more")


def test_a_lone_environment_gets_half_and_a_single_place_can_be_used() -> None:
    shares = StreamShares(places=64, places_each=64)
    assert sum(shares.enter("lone") for _ in range(100)) == 32
    single = StreamShares(places=1, places_each=1)
    assert (single.enter("lone"), single.enter("lone"), single.is_full) == (True, False, True)
    single.leave("lone")
    assert (single.held("lone"), single.enter("other")) == (0, True)

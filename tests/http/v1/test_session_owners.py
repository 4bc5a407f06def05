"""Sessions belong to an environment and an API key: no other key can use their ids, over HTTP or gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import grpc
from headrace.foundation.ids import new_batch_id, session_name
from headrace.grpc.messages import broker_pb2 as wire
from headrace.http.requests.auth import new_key
from headrace.store.protocol import Claim, NewBatch, Session
from headrace.store.rpc import CONTENT_TYPE
from tests.support.grpcio_client import channel
from tests.support.http_server import ServerUnderTest, running_server
from tests.support.logged_events import logged_events

UNKNOWN = f"session_{'0' * 26}"
KINDS = ("memory", "sqlite", "postgres")
CLIENTS = (("elsewhere", ("*",)), ("default", ("work",)), ("default", ("batches:write",)))
"""Clients that did not start the session: another environment, another key, and a key that may not work."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CLIENTS, ids=("environment", "key", "scope"))
def client(request: pytest.FixtureRequest) -> tuple[str, tuple[str, ...]]:
    environment, scopes = request.param
    return str(environment), scopes


async def key_of(server: ServerUnderTest, environment: str, scopes: tuple[str, ...]) -> dict[str, str]:
    """Create a key, and return the header that shows it."""
    secret, stored = new_key(environment, scopes, "", server.engine.clock.now_us())
    await server.engine.administration.add_key(stored, now_us=1)
    return {"authorization": f"Bearer {secret}"}


async def post(server: ServerUnderTest, headers: dict[str, str], path: str, body: Any = None) -> tuple[int, Any]:
    """Post JSON to an endpoint; return the status and the answer, without the number of the request."""
    answer = await server.ask("POST", path, body, headers, auth=False)
    return answer.status, {name: value for name, value in answer.json.items() if name not in ("request_id", "session")}


async def perform(server: ServerUnderTest, headers: dict[str, str], operation: str, **values: Any) -> tuple[int, Any]:
    """Perform a store operation; return the status and the answer, without the number of the request."""
    body = msgspec.msgpack.encode(values)
    headers = {**headers, "content-type": CONTENT_TYPE}
    answer = await server.ask("POST", f"/v1/store/{operation}", body, headers, auth=False)
    if answer.status == 200:
        return answer.status, msgspec.msgpack.decode(answer.body)
    return answer.status, {name: value for name, value in answer.json.items() if name not in ("request_id", "session")}


async def leased(server: ServerUnderTest) -> tuple[str, dict[str, Any]]:
    """Claim two runs as a worker; return its session and its lease."""
    await server.filled(2)
    session = str((await server.ask("POST", "/v1/sessions", {"host": "far"})).json["id"])
    body = {"session": session, "claim_no": 1, "tasks": ["task"], "runs_max": 9}
    (lease,) = (await server.ask("POST", "/v1/claims", body)).json["leases"]
    return session, lease


async def keeps_its_lease(server: ServerUnderTest, session: str, lease: dict[str, Any]) -> None:
    """Check that a session still has its lease, and can settle it."""
    beat = (await server.ask("POST", f"/v1/sessions/{session}/heartbeat")).json
    assert beat["leases"] == [{"lease": lease["lease"], "claim_no": 1}]
    outcomes = [{"place": place, "state": "completed"} for place in range(2)]
    body = {"settlements": [{"lease": lease["lease"], "outcomes": outcomes}]}
    assert (await server.ask("POST", "/v1/settlements", body)).json == {"words": ["settled"]}


async def test_a_session_of_another_owner_is_answered_like_an_unknown_one(
    tmp_path: Path, kind: str, client: tuple[str, tuple[str, ...]]
) -> None:
    async with running_server(tmp_path, kind) as server:
        session, lease = await leased(server)
        foreign = await key_of(server, *client)
        if client[1] != ("batches:write",):
            for path in ("/v1/sessions/{}/heartbeat", "/v1/sessions/{}/heartbeat?wait_s=1"):
                answer = await post(server, foreign, path.format(session))
                assert answer == await post(server, foreign, path.format(UNKNOWN))
                assert (answer[0], answer[1]["code"]) == (409, "SESSION_ENDED")
            claim = {"claim_no": 1, "tasks": ["task"], "runs_max": 9}
            answer = await post(server, foreign, "/v1/claims", {"session": session, **claim})
            assert answer == await post(server, foreign, "/v1/claims", {"session": UNKNOWN, **claim})
            assert answer[1]["code"] == "SESSION_ENDED"
            path = f"/v1/sessions/{session}"
            assert (await server.ask("DELETE", path, None, foreign, auth=False)).status == 204, "as for any ended one"
        await keeps_its_lease(server, session, lease)


async def test_store_operations_do_not_use_a_session_of_another_owner(
    tmp_path: Path, kind: str, client: tuple[str, tuple[str, ...]]
) -> None:
    async with running_server(tmp_path, kind) as server:
        session, lease = await leased(server)
        foreign = await key_of(server, *client)
        answer = await perform(server, foreign, "heartbeat", session_id=session)
        assert answer == await perform(server, foreign, "heartbeat", session_id=UNKNOWN)
        assert answer[1]["code"] == "SESSION_ENDED"
        assert (await perform(server, foreign, "end_session", session_id=session))[0] == 200, "as for any ended one"
        taken = Session(
            id=session, kind="worker", host="h", pid=1, started_us=0, environment="default", key_id="static"
        )
        again = await perform(server, foreign, "start_session", session=msgspec.to_builtins(taken))
        assert again[1]["code"] == "SESSION_ENDED"
        if client[1] != ("batches:write",):
            await server.ask("POST", f"/v1/batches/{lease['batch_id']}/cancel")
            claim = Claim(
                session_id=session,
                claim_no=1,
                environment="default",
                tasks=["task"],
                queues=None,
                runs_max=9,
                key_id="static",
            )
            assert (await perform(server, foreign, "claim", claim=msgspec.to_builtins(claim)))[1]["code"] == (
                "SESSION_ENDED"
            )
            unwanted = await perform(server, foreign, "unwanted_runs", session_id=session)
            assert unwanted == await perform(server, foreign, "unwanted_runs", session_id=UNKNOWN)
            assert (unwanted[0], unwanted[1]["leases"], unwanted[1]["stopped"]) == (200, [], [])
        await keeps_its_lease(server, session, lease)


async def test_a_batch_is_not_created_for_a_session_of_another_environment(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        session, _ = await leased(server)
        foreign = await key_of(server, "elsewhere", ("*",))
        new = NewBatch(id=new_batch_id(server.engine.clock.now_us()), environment="elsewhere", session_id=session)
        answer = await perform(server, foreign, "create_batch", new=msgspec.to_builtins(new))
        assert answer[1]["code"] == "SESSION_ENDED"


async def test_a_lease_of_another_owner_is_neither_settled_nor_released(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        session, lease = await leased(server)
        foreign = await key_of(server, "elsewhere", ("*",))
        outcomes = [{"place": 0, "state": "completed", "output": "forged"}]
        body = {"settlements": [{"lease": lease["lease"], "outcomes": outcomes}]}
        assert await post(server, foreign, "/v1/settlements", body) == (200, {"words": ["lost"]})
        released = await post(server, foreign, "/v1/releases", {"leases": [lease["lease"]]})
        assert released == (200, {"words": ["lost"]})
        await keeps_its_lease(server, session, lease)


@pytest.mark.parametrize("client", CLIENTS[:2], ids=("environment", "key"))
async def test_grpc_calls_do_not_use_a_session_of_another_owner(
    tmp_path: Path, kind: str, client: tuple[str, tuple[str, ...]]
) -> None:
    async with running_server(tmp_path, kind) as server, channel(server.server.address[1]) as connection:
        session, lease = await leased(server)
        foreign = await key_of(server, *client)

        async def call(method: str, request: Any) -> Any:
            response = getattr(wire, f"{method}Response")
            unary = connection.unary_unary(
                f"/headrace.v1.Broker/{method}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )
            return await unary(request, metadata=tuple(foreign.items()))

        claim: dict[str, Any] = {"claim_no": 1, "tasks": ["task"], "runs_max": 9}
        for method, request, unknown in (
            ("Heartbeat", wire.HeartbeatRequest(session=session), wire.HeartbeatRequest(session=UNKNOWN)),
            (
                "ClaimMany",
                wire.ClaimManyRequest(session=session, **claim),
                wire.ClaimManyRequest(session=UNKNOWN, **claim),
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(method, request)
            with pytest.raises(grpc.aio.AioRpcError) as refused_unknown:
                await call(method, unknown)
            assert refused.value.code() == refused_unknown.value.code()
        await call("EndSession", wire.EndSessionRequest(session=session))
        if client[0] == "elsewhere":
            settlement = wire.Settlement(lease=lease["lease"], places=[0, 1])
            words = (await call("SettleMany", wire.SettleManyRequest(settlements=[settlement]))).words
            assert list(words) == [wire.WORD_LOST]
            words = (await call("ReleaseMany", wire.ReleaseManyRequest(leases=[lease["lease"]]))).words
            assert list(words) == [wire.WORD_LOST]
        await keeps_its_lease(server, session, lease)


async def test_a_session_ends_for_the_key_that_started_it(tmp_path: Path, kind: str) -> None:
    async with running_server(tmp_path, kind) as server:
        narrow = await key_of(server, "default", ("batches:write",))
        session = f"session_{'1' * 26}"
        started = Session(id=session, kind="producer", host="h", pid=1, started_us=0)
        for _ in range(2):  # the second after a lost answer
            assert (await perform(server, narrow, "start_session", session=msgspec.to_builtins(started)))[0] == 200
        (stored,) = await server.engine.maintenance.sessions()
        assert (stored.environment, stored.key_id[:4]) == ("default", "key_")
        assert (await perform(server, narrow, "heartbeat", session_id=session))[0] == 200
        assert (await perform(server, narrow, "end_session", session_id=session))[0] == 200
        assert await server.engine.maintenance.sessions() == []


async def test_a_failed_request_is_logged_without_its_session_id(tmp_path: Path) -> None:
    async def fail(*_arguments: Any, **_more: Any) -> None:
        raise RuntimeError("a bug")

    async with running_server(tmp_path) as server:
        session, _ = await leased(server)
        object.__setattr__(server.engine.store, "heartbeat", fail)
        with logged_events() as events:
            assert (await server.ask("POST", f"/v1/sessions/{session}/heartbeat")).status == 500
        paths = [event["path"] for event in events if "path" in event]
        assert paths == [f"/v1/sessions/{session_name(session)}/heartbeat"]
        assert session not in str(events)

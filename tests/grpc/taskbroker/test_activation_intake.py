"""Intake of activations over HTTP, from files and from the library, with its rules and limits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from headrace.app import Headrace
from headrace.core.delimited import DelimitedDecoder, OversizedMessage
from headrace.core.rules import DEMOTIONS, KILLSWITCH, Kill, Rules, demotions_encoded, kills_encoded, rules_of
from headrace.foundation.errors import Conflict, InvalidInput, StoreBroken, StoreUnavailable
from headrace.grpc.messages import taskbroker_pb2 as wire
from headrace.grpc.taskbroker import activation_codec as grpc_activations
from headrace.grpc.taskbroker.activation_codec import decode_arguments, is_killed
from headrace.grpc.taskbroker.activation_intake import ActivationIntake, IntakeResult
from headrace.runtime.clock import ManualClock
from headrace.runtime.dispatch.backpressure import QueueFull
from headrace.runtime.dispatch.rule_cache import change_rules
from headrace.runtime.maintenance.upkeep import Upkeep
from tests.support.broker import (
    COMPLETE,
    BrokerRig,
    activation,
    on_databases,
    on_every_store,
    running_broker,
    stream,
    varint,
)
from tests.support.engines import Faulty
from tests.support.http_server import LIMITS, running_server


async def pieces_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def taken(broker: BrokerRig, *pieces: bytes) -> IntakeResult:
    return await ActivationIntake(broker.engine, broker.producer).take(pieces_of(*pieces))


# -- decoding of streams


@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
def test_a_stream_decodes_the_same_however_it_is_split(messages: list[bytes], data: st.DataObject) -> None:
    whole = stream(*messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    decoder = DelimitedDecoder(200)
    result: list[bytes | OversizedMessage] = []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        result += decoder.feed(whole[start:end])
    decoder.end()
    assert result == [message if len(message) <= 200 else OversizedMessage(len(message)) for message in messages]


@given(st.binary(max_size=100))
def test_arbitrary_bytes_decode_to_messages_or_raise_invalid_input(data: bytes) -> None:
    decoder = DelimitedDecoder(50)
    hint = "none was needed"
    try:
        decoder.feed(data)
        decoder.end()
    except InvalidInput as error:
        hint = error.hint
    assert hint


def test_a_message_over_the_limit_is_dropped_as_it_arrives() -> None:
    decoder = DelimitedDecoder(10)
    assert decoder.feed(varint(1_000_000)) == [OversizedMessage(1_000_000)]
    for _ in range(100):
        assert decoder.feed(b"x" * 10_000) == []
        assert len(decoder._buffer) == 0
    assert decoder.feed(stream(b"next")) == [b"next"]


def test_a_truncated_or_unframed_stream_raises_an_error_with_the_message_number() -> None:
    decoder = DelimitedDecoder(100)
    decoder.feed(stream(b"one") + b"\x05ab")
    with pytest.raises(InvalidInput, match="inside message 1"):
        decoder.end()
    with pytest.raises(InvalidInput, match="message 0 has no valid length"):
        DelimitedDecoder(100).feed(b"\xff\xff\xff\xff\xff")


# -- storing


@on_every_store
async def test_a_stream_stores_each_id_once_and_refuses_invalid_activations_alone(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, limits={"activation_bytes_max": 2_000}) as broker:
        messages: list[Any] = [activation(number) for number in range(600)]
        messages[7] = activation(7, taskname="")
        messages[8] = b"\xff\xff"
        messages[9] = activation(9, parameters_bytes=b"x" * 3_000)
        messages[10] = activation(3)
        result = await taken(broker, stream(*messages))
        assert (result.accepted, result.duplicates, result.refused_count) == (596, 1, 3)
        assert [(refused.number, refused.id) for refused in result.refused] == [(7, ""), (8, ""), (9, "")]
        assert "at most 2000 bytes" in result.refused[2].reason
        again = await taken(broker, stream(*messages))
        assert (again.accepted, again.duplicates) == (0, 597)
        delivered = await broker.drain(4)
        assert len(delivered) == len(set(delivered)) == 596


async def test_two_concurrent_streams_of_the_same_activations_store_each_once(tmp_path: Path) -> None:
    async with running_broker("sqlite", tmp_path) as broker:
        messages = [activation(number) for number in range(500)]
        shuffled = random.Random(3).sample(messages, len(messages))
        first, second = await asyncio.gather(taken(broker, stream(*messages)), taken(broker, stream(*shuffled)))
        assert first.accepted + second.accepted == 500
        assert len(await broker.runs()) == 500


async def test_many_refusals_are_all_counted_and_the_first_are_listed(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        result = await taken(broker, stream(*(activation(number, taskname="") for number in range(250))))
        assert (result.refused_count, len(result.refused)) == (250, 100)


async def test_a_broken_stream_raises_an_error_and_can_be_sent_again(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        whole = stream(*(activation(number) for number in range(300)))
        with pytest.raises(InvalidInput, match="inside message 299"):
            await taken(broker, whole[:-1])
        result = await taken(broker, whole)
        assert result.accepted + result.duplicates == 300
        assert len(await broker.runs()) == 300


# -- over HTTP


async def test_activations_are_accepted_over_http(tmp_path: Path) -> None:
    async with running_server(tmp_path, "sqlite") as server:
        body = stream(*(activation(number) for number in range(20)), activation(0), activation(99, taskname=""))
        headers = {"content-type": "application/x-protobuf"}
        answer = await server.ask("POST", "/v1/activations", body, headers)
        assert answer.status == 200
        assert (answer.json["accepted"], answer.json["duplicates"], answer.json["refused_count"]) == (20, 1, 1)
        assert answer.json["refused"][0]["number"] == 21
        packed = zstandard.compress(body)
        again = await server.ask("POST", "/v1/activations", packed, {**headers, "content-encoding": "zstd"})
        assert (again.json["accepted"], again.json["duplicates"]) == (0, 21)


async def test_http_reports_invalid_activations(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        headers = {"content-type": "application/x-protobuf"}
        assert (await server.ask("POST", "/v1/activations", b"", headers)).json["accepted"] == 0
        assert (await server.ask("POST", "/v1/activations", b"{}", {"content-type": "text/plain"})).status == 415
        assert (await server.ask("POST", "/v1/activations", b"\x05a", headers)).status == 400
        assert (await server.ask("POST", "/v1/activations", b"", headers, auth=False)).status == 401
        bomb = zstandard.compress(bytes(300 * 1024 * 1024))
        answer = await server.ask("POST", "/v1/activations", bomb, {**headers, "content-encoding": "zstd"})
        assert answer.status == 413


async def test_http_answers_with_retry_after_while_the_backlog_is_full(tmp_path: Path) -> None:
    async with running_server(tmp_path, limits=LIMITS.replaced(waiting_max=5, ingest_wait_ms=0)) as server:
        headers = {"content-type": "application/x-protobuf"}
        five = stream(*(activation(number) for number in range(5)))
        assert (await server.ask("POST", "/v1/activations", five, headers)).status == 200
        answer = await server.ask("POST", "/v1/activations", stream(activation(5)), headers)
        assert (answer.status, answer.headers["retry-after"], answer.json["code"]) == (429, "5", "NO_ROOM")


# -- through the library


async def test_activations_are_accepted_through_the_library(tmp_path: Path) -> None:
    async with Headrace("test", store=f"sqlite:///{tmp_path}/a.db") as app:
        result = await app.activate(*(activation(number).SerializeToString() for number in (1, 2, 1)), b"\xff")
        assert (result.accepted, result.duplicates, result.refused_count) == (2, 1, 1)


# -- killswitch


def packed(*args: Any, **kwargs: Any) -> bytes:
    return msgspec.msgpack.encode({"args": args, "kwargs": kwargs})


@on_databases
async def test_activations_of_a_killed_task_are_dropped_at_intake_and_when_buffered(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock, is_killed=is_killed) as broker:
        messages = [activation(number, taskname="bad" if number % 2 else "good") for number in range(6)]
        assert (await taken(broker, stream(*messages))).accepted == 6
        await change_rules(broker.engine, KILLSWITCH, lambda _: kills_encoded([Kill(name="bad")]))
        clock.advance(2)
        await broker.tick()
        assert sorted(await broker.drain(1)) == ["id_0", "id_2", "id_4"]
        assert await broker.counts() == {"completed": 3, "cancelled": 3}
        late = await taken(broker, stream(activation(6, taskname="bad"), activation(7)))
        assert (late.accepted, late.dropped) == (1, 1)
        await change_rules(broker.engine, KILLSWITCH, lambda _: kills_encoded([]))
        clock.advance(2)
        assert (await taken(broker, stream(activation(8, taskname="bad")))).accepted == 1


@on_every_store
async def test_concurrent_rule_changes_are_all_applied(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path) as broker:

        async def drop(name: str) -> None:
            await change_rules(broker.engine, KILLSWITCH, lambda rules: kills_encoded([*rules.kills, Kill(name=name)]))

        names = [f"task-{number}" for number in range(8)]
        await asyncio.gather(*map(drop, names))
        stored = rules_of(await broker.engine.store.rules("default"))
        assert sorted(kill.name for kill in stored.kills) == names


async def test_a_change_without_effect_writes_nothing(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        faulty = Faulty(broker.engine.store)
        faulty.before["keep_rules"] = [StoreUnavailable("nothing must be written")]
        broker.engine.store = faulty
        assert (await change_rules(broker.engine, KILLSWITCH, lambda rules: kills_encoded(rules.kills))).kills == []
        with pytest.raises(StoreUnavailable):
            await change_rules(broker.engine, KILLSWITCH, lambda _: kills_encoded([Kill(name="bad")]))


async def test_a_rule_change_that_always_loses_the_race_raises_a_conflict(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path) as broker:
        store: Any = broker.engine.store

        def overtaken(rules: Rules) -> bytes:
            store._tables.rules["default", KILLSWITCH] = kills_encoded([*rules.kills, Kill(name="other")])
            return kills_encoded([*rules.kills, Kill(name="mine")])

        with pytest.raises(Conflict, match="other writers"):
            await change_rules(broker.engine, KILLSWITCH, overtaken)


async def test_a_killswitch_on_an_argument_drops_only_matching_activations(tmp_path: Path) -> None:
    async with running_broker("memory", tmp_path, is_killed=is_killed) as broker:
        kill = Kill(name="send", args={"0": 7}, kwargs={"to": "x"})
        await change_rules(broker.engine, KILLSWITCH, lambda _: kills_encoded([kill]))
        calls = [packed(7), packed(True), packed(1, to="x"), packed("7", to="y"), b"\xc1", b""]
        result = await taken(broker, stream(*(activation(n, parameters_bytes=call) for n, call in enumerate(calls))))
        assert (result.accepted, result.dropped) == (4, 2)


@on_databases
async def test_a_killswitch_on_an_argument_also_checks_payloads_in_the_object_store(kind: str, tmp_path: Path) -> None:
    clock, filler = ManualClock(), b"x" * 2_000
    async with running_broker(
        kind, tmp_path, clock=clock, is_killed=is_killed, limits={"inline_bytes_max": 1_000}
    ) as broker:
        calls = [packed(7, filler), packed(8, filler), packed(7, filler), packed(8)]
        await broker.add(*(activation(n, parameters_bytes=call) for n, call in enumerate(calls)))
        await change_rules(broker.engine, KILLSWITCH, lambda _: kills_encoded([Kill(name="send", args={"0": 7})]))
        clock.advance(2)
        await broker.tick()
        assert await broker.drain(1) == ["id_1", "id_3"]
        assert await broker.counts() == {"completed": 2, "cancelled": 2}


@pytest.mark.parametrize(
    ("value", "other", "is_equal"),
    [
        (1, 1, True), (1, True, False), (1, 1.0, False), ("1", 1, False), (None, None, True),
        ([1, [2]], [1, [2]], True), ([1], [True], False), ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"a": 1.0}, False), ([], {}, False),
    ],
)  # fmt: skip
def test_argument_values_match_only_if_their_types_match_at_every_level(value: Any, other: Any, is_equal: bool) -> None:
    rules = Rules(kills=[Kill(name="t", args={"0": value})])
    assert rules.is_killed("t", lambda: ([other], {})) is is_equal


def in_arguments(**fields: Any) -> bytes:
    return activation(0, **fields).SerializeToString()


def test_arguments_are_decoded_from_msgpack_zstd_and_the_json_field() -> None:
    assert decode_arguments(in_arguments(parameters_bytes=packed(1, a=2))) == ([1], {"a": 2})
    compressed = {"headers": {"compression-type": "zstd"}, "parameters_bytes": zstandard.compress(packed(3))}
    assert decode_arguments(in_arguments(**compressed)) == ([3], {})
    assert decode_arguments(in_arguments(parameters_bytes=b"", parameters='{"args": [4]}')) == ([4], {})


def bombs() -> dict[str, bytes]:
    zstd = {"compression-type": "zstd"}
    return {
        "no msgpack": in_arguments(parameters_bytes=b"\xc1\xc1"),
        "deep msgpack": in_arguments(parameters_bytes=b"\x81\xa4args" + b"\x91" * 200_000),
        "a list that says it is long": in_arguments(parameters_bytes=b"\x81\xa4args\xdd\xff\xff\xff\xff"),
        "zstd that grows": in_arguments(headers=zstd, parameters_bytes=zstandard.compress(bytes(70 * 1024 * 1024))),
        "zstd that is none": in_arguments(headers=zstd, parameters_bytes=b"plain"),
        "zstd with a wide window": in_arguments(
            headers=zstd, parameters_bytes=b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 8 + b"\x01\x00\x00"
        ),
        "another shape": in_arguments(parameters_bytes=msgspec.msgpack.encode([1, 2])),
        "no activation": b"\xff\xff",
        "text that is none": in_arguments(parameters_bytes=b"\x81\xa4args\x91\xa2\xff\xff"),
    }


@pytest.mark.parametrize("name", bombs())
def test_arguments_that_cannot_be_decoded_safely_match_no_rule(name: str) -> None:
    assert decode_arguments(bombs()[name]) is None
    rules = Rules(kills=[Kill(name="send", args={"0": 1})])
    assert not is_killed(rules, "send", bombs()[name])


def test_parameters_may_decompress_to_the_limit_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    call = packed("x" * 1_000)
    data = in_arguments(headers={"compression-type": "zstd"}, parameters_bytes=zstandard.compress(call))
    monkeypatch.setattr(grpc_activations, "UNPACKED_BYTES_MAX", len(call))
    assert decode_arguments(data) is not None
    monkeypatch.setattr(grpc_activations, "UNPACKED_BYTES_MAX", len(call) - 1)
    assert decode_arguments(data) is None


def test_rules_have_bounds_and_invalid_stored_rules_are_reported() -> None:
    with pytest.raises(InvalidInput, match="at most 1000"):
        kills_encoded([Kill(name=str(number)) for number in range(1_001)])
    with pytest.raises(InvalidInput, match="20 arguments"):
        kills_encoded([Kill(name="t", kwargs={str(number): 1 for number in range(21)})])
    with pytest.raises(InvalidInput, match="names of positional arguments"):
        kills_encoded([Kill(name="t", args={"first": 1})])
    with pytest.raises(InvalidInput, match="at most 1000"):
        demotions_encoded({str(number): "x" for number in range(1_001)})
    with pytest.raises(InvalidInput, match="another"):
        demotions_encoded({"a": "a"})
    with pytest.raises(StoreBroken):
        rules_of({KILLSWITCH: b"{"})


# -- demotion


@on_every_store
async def test_new_and_waiting_activations_of_a_demoted_queue_move_to_another(kind: str, tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker(kind, tmp_path, clock=clock) as broker:
        await taken(broker, stream(*(activation(number) for number in range(4)), activation("x", namespace="other")))
        await change_rules(broker.engine, DEMOTIONS, lambda _: demotions_encoded({"app:mail": "app:slow"}))
        clock.advance(2)
        await taken(broker, stream(activation(4)))
        assert await Upkeep(broker.engine).demote() >= 1
        queues = {view.name: view.waiting_count for view in await broker.engine.store.queues("default")}
        assert queues == {"app:mail": 0, "app:other": 1, "app:slow": 5}
        assert (await broker.get(application="app", namespace="other")).id == "id_x"
        result = [(await broker.get(application="app", namespace="slow")).id for _ in range(5)]
        assert sorted(result) == [f"id_{number}" for number in range(5)]
        await broker.set_batch(*((name, COMPLETE) for name in (*result, "id_x")))


# -- limits of the backlog


LIMITED: list[tuple[dict[str, int], Callable[[], Iterable[wire.TaskActivation]], str]] = [
    ({"queue_waiting_max": 3}, lambda: (activation("n", namespace="mail"),), "queue_waiting_max"),
    ({"queue_delayed_max": 1}, lambda: [activation(f"d{n}", delay=99) for n in range(2)], "queue_delayed_max"),
    ({"waiting_max": 3}, lambda: (activation("n", namespace="elsewhere"),), "waiting_max"),
    ({"delayed_max": 1}, lambda: [activation(f"d{n}", delay=99, namespace=str(n)) for n in range(2)], "delayed_max"),
    ({"queue_leased_max": 1}, lambda: (activation("n"),), "queue_leased_max"),
    ({"leased_max": 1}, lambda: (activation("n", namespace="elsewhere"),), "leased_max"),
]


@pytest.mark.parametrize(("limits", "more", "error_text"), LIMITED, ids=[error_text for _, _, error_text in LIMITED])
async def test_activations_past_the_backlog_bound_wait_and_are_then_refused(
    limits: dict[str, int], more: Callable[[], Iterable[wire.TaskActivation]], error_text: str, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock, limits={**limits, "ingest_wait_ms": 2_000}) as broker:
        if "leased" in error_text:
            await broker.add_many(1)
            await broker.get()
        elif "waiting" in error_text:
            await taken(broker, stream(*(activation(number) for number in range(3))))
        before = len(await broker.runs())
        sent = [activation_at(clock, message) for message in more()]
        trying = asyncio.create_task(taken(broker, stream(*sent)))
        await clock.advance_async(1.5)
        assert not trying.done(), "it waits"
        await clock.advance_async(1)
        with pytest.raises(QueueFull, match=error_text):
            await trying
        assert len(await broker.runs()) == before


def activation_at(clock: ManualClock, message: wire.TaskActivation) -> wire.TaskActivation:
    message.received_at.FromMicroseconds(clock.now_us())
    return message


async def test_intake_that_waits_for_the_backlog_resumes_when_it_shrinks(tmp_path: Path) -> None:
    clock = ManualClock()
    async with running_broker("memory", tmp_path, clock=clock, limits={"waiting_max": 3}) as broker:
        await taken(broker, stream(*(activation(number) for number in range(3))))
        trying = asyncio.create_task(taken(broker, stream(activation(3))))
        await clock.advance_async(1)
        assert not trying.done()
        await broker.drain(1)
        await clock.advance_async(1)
        assert (await trying).accepted == 1


@on_databases
async def test_a_store_over_its_size_limit_refuses_activations(kind: str, tmp_path: Path) -> None:
    async with running_broker(kind, tmp_path, limits={"store_mib_max": 1, "ingest_wait_ms": 0}) as broker:
        large = [activation(number, parameters_bytes=b"x" * 400_000) for number in range(4)]
        await broker.add(*large[:3])
        with pytest.raises(QueueFull, match="store_mib_max"):
            await taken(broker, stream(large[3]))


# -- metrics


async def test_metrics_show_the_fullest_queues_by_name_and_the_others_together(tmp_path: Path) -> None:
    async with running_server(tmp_path, limits=LIMITS.replaced(metrics_queues_max=1)) as server:
        some = [activation(number, namespace="full") for number in range(3)]
        body = stream(*some, activation("x", namespace="a"), activation("y", namespace="b", delay=3_000))
        await server.ask("POST", "/v1/activations", body, {"content-type": "application/x-protobuf"})
        metrics = (await server.ask("GET", "/metrics", auth=False)).body.decode()
        assert 'headrace_queue_runs{queue="app:full",state="waiting"} 3.0' in metrics
        assert 'headrace_queue_runs{queue="(others)",state="waiting"} 1.0' in metrics
        assert 'headrace_queue_oldest_seconds{queue="(others)"}' in metrics
        assert "app:a" not in metrics

"""Activations on the command line: loaded from a file, dead letters, the killswitch, rerouted queues."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.cli.conftest import Shell
from tests.support.broker import DEADLETTER, FAILURE, BrokerRig, activation, engine_on, stream


async def fail_all(folder: Path, count: int) -> None:
    """Load activations whose worker reports that they failed."""
    engine = await engine_on("sqlite", folder)
    broker = BrokerRig(engine)
    await broker.dispatcher.start()
    await broker.add_many(count, retry={"on_attempts_exceeded": DEADLETTER})
    await broker.drain(2, FAILURE)
    await broker.dispatcher.stop()
    await broker.producer.close()
    await engine.close()


def test_a_file_is_loaded_and_loaded_again(shell: Shell) -> None:
    shell.write("some.bin", stream(*(activation(number) for number in range(30)), activation(30, taskname="")))
    first = shell("activations", "load", "some.bin", "--json")
    assert first.code == 3
    assert {name: first.json[name] for name in ("accepted", "duplicates", "refused")} == {
        "accepted": 30, "duplicates": 0, "refused": 1
    }  # fmt: skip
    assert first.json["refusals"][0]["number"] == 30
    shell.write("some.bin", stream(*(activation(number) for number in range(31))))
    again = shell("activations", "load", "some.bin")
    assert (again.code, again.out) == (0, "1 activation, 30 stored before\n")
    (listed,) = shell("queue", "list", "--json").json["queues"]
    assert (listed["name"], listed["waiting_count"]) == ("app:mail", 31)


def test_a_missing_or_corrupt_file_is_reported(shell: Shell) -> None:
    missing = shell("activations", "load", "none.bin")
    assert (missing.code, "can't be read" in missing.err) == (2, True)
    shell.write("broken.bin", b"\xff\xff\xff\xff\xff")
    broken = shell("activations", "load", "broken.bin")
    assert (broken.code, "has no valid length" in broken.err) == (2, True)


def test_dead_letters_are_listed_redriven_and_purged(shell: Shell) -> None:
    asyncio.run(fail_all(shell.place, 5))
    dead = shell("dead", "list", "--json").json["dead"]
    assert [letter["activation"] for letter in dead] == [f"id_{number}" for number in range(5)]
    assert {(letter["task"], letter["queue"], letter["attempt"]) for letter in dead} == {("send", "app:mail", 1)}
    assert "send" in shell("dead", "list").out
    assert shell("dead", "redrive", dead[0]["id"], "--json").json == {"redriven": 1}
    assert shell("dead", "purge", dead[1]["id"], dead[2]["id"]).out == "2 dead letters purged\n"
    unknown = shell("dead", "redrive", dead[0]["id"])
    assert (unknown.code, "dead-letter list" in unknown.err) == (2, True)
    assert shell("dead", "redrive", "--all", "--queue", "app:none").out == "0 runs will run again\n"
    assert shell("dead", "redrive", "--all").out == "2 runs will run again\n"
    assert shell("dead", "list").out == "no dead letters\n"
    (listed,) = shell("queue", "list", "--json").json["queues"]
    assert listed["waiting_count"] == 3


def test_dead_letter_commands_require_run_ids_or_all(shell: Shell) -> None:
    asyncio.run(fail_all(shell.place, 1))
    for command in ("redrive", "purge"):
        nothing = shell("dead", command)
        assert (nothing.code, "expected run ids or --all" in nothing.err) == (2, True)
        both = shell("dead", command, "run_00000000000000000000000000_0", "--all")
        assert both.code == 2


def test_killswitch_rules_are_added_listed_and_removed(shell: Shell) -> None:
    asyncio.run(fail_all(shell.place, 1))
    assert shell("killswitch", "list").out == "no killswitch rules\n"
    assert shell("killswitch", "add", "send").out == "activations of send are dropped\n"
    shell("killswitch", "add", "send")
    shell("killswitch", "add", "other", "--arg", "0=17", "--kwarg", 'to="x"')
    assert shell("killswitch", "list", "--json").json == {
        "killswitch": [
            {"task": "send", "args": {}, "kwargs": {}},
            {"task": "other", "args": {"0": 17}, "kwargs": {"to": "x"}},
        ]
    }
    shell.write("some.bin", stream(activation("new"), activation("more", taskname="fine")))
    assert shell("activations", "load", "some.bin").out == (
        "1 activation, 0 stored before, 1 dropped by the killswitch\n"
    )
    assert shell("killswitch", "remove", "send").out == "activations of send run\n"
    assert [rule["task"] for rule in shell("killswitch", "list", "--json").json["killswitch"]] == ["other"]
    for wrong in ("to", "=1", "to=x"):
        assert shell("killswitch", "add", "other", "--kwarg", wrong).code == 2
    assert shell("killswitch", "add", "other", "--arg", "first=1").code == 2


def test_a_queue_is_demoted_and_restored(shell: Shell) -> None:
    asyncio.run(fail_all(shell.place, 1))
    assert shell("queue", "demote", "app:mail", "--to", "app:slow").out == "app:mail is rerouted to app:slow\n"
    shell.write("some.bin", stream(activation("new")))
    shell("activations", "load", "some.bin")
    listed = {view["name"]: view["waiting_count"] for view in shell("queue", "list", "--json").json["queues"]}
    assert listed == {"app:mail": 0, "app:slow": 1}
    assert shell("queue", "demote", "app:mail", "--to", "app:mail").code == 2
    assert shell("queue", "restore", "app:mail", "--json").json == {"demotions": {}}


def test_an_activation_is_shown_as_the_run_it_is(shell: Shell) -> None:
    asyncio.run(fail_all(shell.place, 1))
    (listed,) = shell("run", "list", "--json").json["runs"]
    assert (listed["activation"], listed["state"], listed["idempotency_key"]) == ("send", "failed", "id_0")
    shown = shell("run", "show", listed["id"], "--json").json
    assert shown["activation"] == "send"
    assert shell("run", "show", listed["id"]).code == 0

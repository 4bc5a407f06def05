"""Conformance of every store: activations, which are delivered one by one, with notes, shared leases, dead letters and
rules.
"""

from __future__ import annotations

import msgspec

from headrace.core.activation import LANE
from headrace.core.block import Extra
from headrace.core.failure import decode
from headrace.core.span import Key
from headrace.store.protocol import DeadLetter, Lease
from tests.support.store_rig import BOOM, SECOND_US, UNKNOWN_SUSPECTS, StoreRig, indexes_of, settlement_of

DEAD = Key("task", dead_letter=True)


def shared(lease: Lease, codes: str, **more: object) -> object:
    """Return a settlement of a shared lease."""
    notes = more.pop("notes", ())
    made = settlement_of(lease, codes, **more)  # type: ignore[arg-type]  # the words of `settlement_of`
    return msgspec.structs.replace(made, is_shared=True, notes=notes)


async def settled(rig: StoreRig, *settlements: object) -> list[str]:
    return await rig.store.settle(settlements, now_us=rig.now_us)  # type: ignore[arg-type]  # made by `shared`


# -- overdue runs, and notes


async def test_an_overdue_run_waits_again_at_once_and_uses_up_no_attempt(rig: StoreRig) -> None:
    batch_id = await rig.filled(3)
    (lease,) = await rig.claim(await rig.session())
    settlement = shared(lease, "cdc", results=[b"0", b"", b"2"], notes=("late",))
    assert await settled(rig, settlement) == ["settled"]
    (again,) = await rig.claim(await rig.session())
    assert (again.indexes, again.attempt, again.note, again.due_us) == ([1], 1, "late", 0)
    assert await rig.settle(again) == "settled"
    assert (await rig.store.batch(batch_id))[0].state == "completed"


async def test_a_note_comes_with_the_next_lease_and_runs_with_other_notes_are_split(rig: StoreRig) -> None:
    await rig.filled(4)
    (lease,) = await rig.claim(await rig.session())
    settlement = shared(lease, "rrdr", results=[BOOM, BOOM, b"", BOOM], dues_us=[0, 0, 0], notes=("a", "b", "a", "a"))
    assert await settled(rig, settlement) == ["settled"]
    leases = await rig.claim(await rig.session())
    retried = sorted((lease.note, lease.attempt, list(lease.indexes)) for lease in leases)
    assert retried == [("a", 1, [2]), ("a", 2, [0, 3]), ("b", 2, [1])]


async def test_a_note_stays_with_the_part_of_a_small_claim_and_after_a_release(rig: StoreRig) -> None:
    await rig.filled(3)
    (lease,) = await rig.claim(await rig.session())
    await settled(rig, shared(lease, "ddd", results=[b"", b"", b""], notes=("n", "n", "n")))
    (part,) = await rig.claim(await rig.session(), runs_max=1)
    (rest,) = await rig.claim(await rig.session())
    assert (part.note, rest.note) == ("n", "n")
    assert await rig.release(part) == "settled"
    (again,) = await rig.claim(await rig.session())
    assert (again.indexes, again.note) == (part.indexes, "n")


async def test_an_overdue_run_of_a_stopped_batch_is_cancelled(rig: StoreRig) -> None:
    batch_id = await rig.filled(1)
    (lease,) = await rig.claim(await rig.session())
    await rig.store.stop_batch(batch_id, "cancelled", now_us=rig.now_us)
    assert await settled(rig, shared(lease, "d", results=[b""], notes=("n",))) == ["settled"]
    assert await rig.states(batch_id) == ["cancelled"]


# -- several workers settle one lease


async def test_in_a_shared_lease_the_first_outcome_of_each_run_is_kept(rig: StoreRig) -> None:
    batch_id = await rig.filled(4)
    (lease,) = await rig.claim(await rig.session())
    first = shared(lease, "c", span_slots=[1], part_no=9_001, results=[b"7"])
    assert await settled(rig, first) == ["settled"]
    settlement = shared(lease, "frrc", part_no=0, results=[BOOM, BOOM, BOOM, b"3"], dues_us=[0, 0], notes=("x", "y"))
    assert await settled(rig, settlement) == ["settled"]
    assert await settled(rig, settlement) == ["recorded"]
    assert await rig.states(batch_id) == ["failed", "completed", "waiting", "completed"]
    (again,) = await rig.claim(await rig.session())
    assert (again.indexes, again.note) == ([2], "y")
    assert (await rig.store.run(batch_id, 1)).result == b"7"


async def test_a_settlement_of_a_shared_lease_whose_runs_all_ended_changes_nothing(rig: StoreRig) -> None:
    batch_id = await rig.filled(2)
    (lease,) = await rig.claim(await rig.session())
    assert await settled(rig, shared(lease, "cc", part_no=5)) == ["settled"]
    before = await rig.store.batch(batch_id)
    late = shared(lease, "ff", part_no=6, results=[BOOM, BOOM])
    assert await settled(rig, late) == ["lost"]
    assert await rig.store.batch(batch_id) == before


async def test_two_shared_settlements_in_one_transaction_add_up(rig: StoreRig) -> None:
    batch_id = await rig.filled(3)
    (lease,) = await rig.claim(await rig.session())
    settlement = shared(lease, "c", span_slots=[0], part_no=1)
    two = shared(lease, "ff", span_slots=[0, 1], part_no=2, results=[BOOM, BOOM])
    assert await settled(rig, settlement, two) == ["settled", "settled"]
    assert await rig.states(batch_id) == ["completed", "failed", "leased"]


# -- crashes of the dispatcher


async def test_a_crash_of_the_dispatcher_is_charged_to_no_activation(rig: StoreRig) -> None:
    batch_id = await rig.filled(4, key=Key(LANE, queue="app:mail"))
    for _ in range(5):
        session_id = await rig.session()
        (lease,) = await rig.claim(session_id, tasks=[LANE])
        assert (indexes_of([lease]), lease.crashes_count) == ([0, 1, 2, 3], 0)
        assert await rig.recover(session_id, UNKNOWN_SUSPECTS) == 1
    assert await rig.states(batch_id) == ["waiting"] * 4


async def test_an_at_most_once_activation_fails_if_its_dispatcher_crashed(rig: StoreRig) -> None:
    batch_id = await rig.filled(1, key=Key(LANE, queue="app:mail", at_most_once=True, dead_letter=True))
    session_id = await rig.session()
    await rig.claim(session_id, tasks=[LANE])
    await rig.recover(session_id, UNKNOWN_SUSPECTS)
    assert await rig.states(batch_id) == ["failed"]
    (dead,) = await rig.store.dead_letters("default")
    assert (dead.batch_id, dead.index, dead.queue, dead.task) == (batch_id, 0, "app:mail", LANE)
    assert decode((await rig.store.run(batch_id, 0)).result).type == "WorkerLost"


# -- claims by a prefix of the queue


async def test_a_claim_by_prefix_takes_from_the_queues_with_that_prefix(rig: StoreRig) -> None:
    queues = ["app:a", "app:b", "apple:a", "a%:_", ":none"]
    await rig.filled(5, key=lambda index: Key("task", queue=queues[index]))
    session_id = await rig.session()
    by_prefix = {}
    for prefix in ("app:", "a%:", ":", "nobody:"):
        leases = await rig.claim(session_id, queue_prefix=prefix)
        by_prefix[prefix] = sorted(lease.queue for lease in leases)
    assert by_prefix == {"app:": ["app:a", "app:b"], "a%:": ["a%:_"], ":": [":none"], "nobody:": []}
    assert [lease.queue for lease in await rig.claim(session_id)] == ["apple:a"]


# -- the lease of a run that a key names


async def test_a_key_leads_to_the_lease_of_its_run_until_that_has_ended(rig: StoreRig) -> None:
    batch_id = await rig.batch()
    await rig.append(batch_id, range(3), extras={index: Extra(idempotency_key=f"id-{index}") for index in range(3)})
    names = ["id-0", "id-1", "id-2", "unknown"]
    assert await rig.store.named_leases("default", "task", names) == []
    (lease,) = await rig.claim(await rig.session())
    leases = await rig.store.named_leases("default", "task", names)
    assert [(lease.key, lease.span_slot, lease.attempt) for lease in leases] == [
        ("id-0", 0, 1),
        ("id-1", 1, 1),
        ("id-2", 2, 1),
    ]
    assert {(lease.span_id, lease.token) for lease in leases} == {(lease.span_id, lease.token)}
    settlement = shared(lease, "crd", results=[b"1", BOOM, b""], dues_us=[0], notes=("n", "m"))
    await settled(rig, settlement)
    assert await rig.store.named_leases("default", "task", names) == []
    again = await rig.claim(await rig.session())
    leases = await rig.store.named_leases("default", "task", names)
    assert [(lease.key, lease.attempt, lease.note) for lease in leases] == [("id-1", 2, "n"), ("id-2", 1, "m")]
    assert {(lease.span_id, lease.token) for lease in leases} == {(lease.span_id, lease.token) for lease in again}
    assert await rig.store.named_leases("other", "task", names) == []


# -- dead letters


async def test_a_run_that_fails_finally_is_a_dead_letter_if_requested(rig: StoreRig) -> None:
    plain, kept = await rig.filled(2), await rig.filled(3, key=DEAD)
    leases = await rig.claim(await rig.session())
    for lease in leases:
        codes = {2: "ff", 3: "fcf"}[len(lease.span_slots)]
        assert await rig.settle(lease, codes) == "settled"
    dead_letters = await rig.store.dead_letters("default")
    assert [(dead.batch_id, dead.index) for dead in dead_letters] == [(kept, 0), (kept, 2)]
    assert plain not in {dead.batch_id for dead in dead_letters}
    assert await rig.store.dead_letters("other") == []


async def test_dead_letters_are_listed_oldest_first_a_page_at_a_time(rig: StoreRig) -> None:
    batch_ids = [await rig.filled(2, key=DEAD._replace(queue=f"q{number}")) for number in range(3)]
    session_id = await rig.session()
    for number in (2, 0, 1):
        (lease,) = await rig.claim(session_id, queues=[f"q{number}"])
        rig.later(1)
        await rig.settle(lease, "f")
    wanted = [(batch_ids[number], index) for number in (2, 0, 1) for index in (0, 1)]
    dead_letters: list[DeadLetter] = []
    while page := await rig.store.dead_letters("default", after=dead_letters[-1] if dead_letters else None, limit=4):
        dead_letters += page
    assert [(dead.batch_id, dead.index) for dead in dead_letters] == wanted
    in_q0 = await rig.store.dead_letters("default", queue="q0")
    assert [dead.batch_id for dead in in_q0] == [batch_ids[0]] * 2
    old = await rig.store.dead_letters("default", before_us=in_q0[0].died_us)
    assert [dead.batch_id for dead in old] == [batch_ids[2]] * 2


async def test_a_redriven_dead_letter_runs_again_without_its_note_and_may_fail_again(rig: StoreRig) -> None:
    batch_id = await rig.filled(2, key=DEAD)
    (lease,) = await rig.claim(await rig.session())
    await settled(rig, shared(lease, "dd", results=[b"", b""], notes=("n", "n")))
    (lease,) = await rig.claim(await rig.session())
    await rig.settle(lease, "f")
    assert await rig.store.redrive(batch_id, [1]) == 1
    assert [dead.index for dead in await rig.store.dead_letters("default")] == [0]
    (again,) = await rig.claim(await rig.session())
    assert (again.indexes, again.note, again.dead_letter) == ([1], "", True)
    rig.later(1)
    await rig.settle(again, "f")
    assert [dead.index for dead in await rig.store.dead_letters("default")] == [0, 1]


async def test_a_purged_dead_letter_is_a_failed_run_like_any_other(rig: StoreRig) -> None:
    batch_id = await rig.filled(3, key=DEAD)
    (lease,) = await rig.claim(await rig.session())
    await rig.settle(lease, "f")
    assert await rig.store.purge_dead("other", [(batch_id, 0)]) == 0
    assert await rig.store.purge_dead("default", [(batch_id, 0), (batch_id, 0), (batch_id, 2), ("nobody", 1)]) == 2
    assert [dead.index for dead in await rig.store.dead_letters("default")] == [1]
    assert await rig.states(batch_id) == ["failed"] * 3


async def test_a_batch_with_dead_letters_is_kept_beyond_its_retention(rig: StoreRig) -> None:
    batch_id = await rig.filled(1, key=DEAD)
    (lease,) = await rig.claim(await rig.session())
    await rig.settle(lease, "f")
    rig.later(1)
    assert (await rig.store.prune(rig.now_us, batches_max=9, rows_max=99)).batches == []
    await rig.store.purge_dead("default", [(batch_id, 0)])
    assert (await rig.store.prune(rig.now_us, batches_max=9, rows_max=99)).batches == [("default", batch_id)]


# -- rules


async def test_rules_are_stored_by_name_for_each_environment(rig: StoreRig) -> None:
    assert await rig.store.rules("default") == {}
    assert await rig.store.keep_rules("default", "killswitch", b"[1]", before=None)
    assert await rig.store.keep_rules("default", "demotions", b"{}", before=None)
    assert await rig.store.keep_rules("other", "killswitch", b"[2]", before=None)
    assert await rig.store.keep_rules("default", "killswitch", b"[3]\x00", before=b"[1]")
    assert await rig.store.rules("default") == {"demotions": b"{}", "killswitch": b"[3]\x00"}
    assert await rig.store.rules("other") == {"killswitch": b"[2]"}


async def test_a_rule_that_changed_since_it_was_read_is_not_replaced(rig: StoreRig) -> None:
    assert await rig.store.keep_rules("default", "killswitch", b"[1]", before=None)
    assert not await rig.store.keep_rules("default", "killswitch", b"[2]", before=None)
    assert not await rig.store.keep_rules("default", "killswitch", b"[2]", before=b"[0]")
    assert await rig.store.keep_rules("default", "killswitch", b"[1]", before=b"[0]"), "a repeat, or the same"
    assert await rig.store.rules("default") == {"killswitch": b"[1]"}


# -- waiting spans in other queues


async def test_waiting_spans_of_a_lane_are_moved_to_another_queue_in_bounded_steps(rig: StoreRig) -> None:
    keys = [Key("task", queue="a"), Key("other", queue="a"), Key("task", queue="b")]
    batch_id = await rig.filled(9, key=lambda index: keys[index % 3], runs_max=1)
    held = await rig.claim(await rig.session(), 1, queues=["a"])
    assert await rig.store.move_waiting("default", "task", "a", "c", spans_max=1) == 1
    assert await rig.store.move_waiting("default", "task", "a", "c", spans_max=5) == 1
    assert await rig.store.move_waiting("default", "task", "a", "c", spans_max=5) == 0
    assert await rig.store.move_waiting("elsewhere", "task", "b", "c", spans_max=5) == 0
    moved = await rig.claim(await rig.session(), queues=["c"])
    assert indexes_of([*held, *moved]) == [0, 3, 6]
    for lease in (*held, *moved):
        await rig.settle(lease)
    waiting = {view.name: view.waiting_count for view in await rig.store.queues("default")}
    assert waiting == {"a": 3, "b": 3, "c": 0}
    assert (await rig.store.batch(batch_id))[1].completed == 3


async def test_the_size_of_a_store_grows_with_its_content(rig: StoreRig) -> None:
    before = await rig.store.size_bytes()
    await rig.filled(64, payload=lambda _: b"x" * 16_000, runs_max=32)
    assert await rig.store.size_bytes() >= before + 64 * 16_000


async def test_the_oldest_wait_counts_from_the_arrival_of_the_run_and_not_of_its_batch(rig: StoreRig) -> None:
    batch_id = await rig.batch(kind="stream")
    came_us = []
    for index in range(3):
        came_us.append(rig.later(10))
        due_us = rig.now_us + 15 * SECOND_US if index == 2 else 0
        await rig.append(batch_id, [index], key=Key("task", due_us=due_us))

    async def oldest_us() -> int:
        (view,) = await rig.store.queues("default")
        return view.oldest_us

    assert await oldest_us() == came_us[0]
    (first,) = await rig.claim(await rig.session(), 1)
    assert await oldest_us() == came_us[1]
    rig.later(1)
    await rig.settle(first, "r", dues_us=[0])
    assert await oldest_us() == came_us[1]
    (second,) = await rig.claim(await rig.session(), 1, claim_no=77)
    again_us = rig.now_us
    assert await oldest_us() in (again_us, came_us[1]), "a run that was released waits since its release"
    rig.later(20)
    leases = await rig.claim(await rig.session())
    assert await oldest_us() == 0
    for lease in leases:
        await rig.release(lease)
    assert await oldest_us() == min(came_us[2] + 15 * SECOND_US, again_us if second.attempt == 1 else came_us[1])
    await rig.release(second)


# -- completion of runs that wait


async def test_waiting_runs_complete_by_their_keys_and_leased_ones_do_not(rig: StoreRig) -> None:
    batch_id = await rig.batch(5)
    await rig.append(batch_id, range(5), extras={index: Extra(idempotency_key=f"id-{index}") for index in range(5)})
    session_id = await rig.session()
    (lease,) = await rig.claim(session_id, runs_max=2)
    names = ["id-0", "id-2", "id-3", "id-3", "unknown"]
    for count in (2, 0):
        assert await rig.store.complete_waiting("default", "task", names, b"1", now_us=rig.now_us) == count
    assert await rig.store.complete_waiting("other", "task", ["id-4"], b"1", now_us=rig.now_us) == 0
    assert await rig.store.complete_waiting("default", "task", ["id-4"], b"1", now_us=rig.now_us) == 1
    assert [outcome.result for outcome in await rig.store.outcomes(batch_id, 2, 9)] == [b"1"] * 3
    await rig.settle(lease)
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.finished_us, ledger.completed) == (0, 5), "it is not sealed"
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    assert (await rig.store.batch(batch_id))[0].state == "completed"


async def test_a_delayed_run_and_one_of_a_later_attempt_complete_by_their_keys(rig: StoreRig) -> None:
    batch_id = await rig.batch(2)
    await rig.append(batch_id, range(2), extras={index: Extra(idempotency_key=f"id-{index}") for index in range(2)})
    await rig.store.seal(batch_id, None, now_us=rig.now_us)
    (lease,) = await rig.claim(await rig.session())
    await settled(rig, shared(lease, "rd", results=[BOOM, b""], dues_us=[rig.now_us + 60_000_000], notes=("n", "m")))
    assert await rig.store.complete_waiting("default", "task", ["id-0", "id-1"], b"1", now_us=rig.now_us) == 2
    batch, ledger = await rig.store.batch(batch_id)
    assert (batch.state, ledger.completed) == ("completed", 2)
    assert (await rig.store.run(batch_id, 0)).attempt == 2

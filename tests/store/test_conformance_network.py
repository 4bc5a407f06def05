"""Conformance of every store, for servers: idempotency keys in batches, API keys, token buckets, and lists in pages."""

from __future__ import annotations

import asyncio

import pytest

from headrace.core.admission import Bucket, Spent
from headrace.core.block import Extra
from headrace.core.pack import JSON, LINK
from headrace.core.run import COMPLETED, FAILED
from headrace.core.span import Key
from headrace.foundation.errors import Conflict, NotFound
from headrace.foundation.ids import new_batch_id, run_id
from headrace.store.protocol import ApiKey
from tests.support.store_rig import BOOM, SECOND_US, StoreRig

SAME = Extra(idempotency_key="same")


# -- idempotency keys of items


async def test_an_item_whose_key_names_a_run_is_received_as_a_link_to_it_and_its_batch_completes(rig: StoreRig) -> None:
    first = await rig.filled(1, extras={0: SAME})
    second = await rig.batch(3)
    appended = await rig.append(second, range(3), extras={1: SAME})
    assert (appended.accepted_count, appended.existing) == (3, {1: (first, 0)})
    assert await rig.store.missing(second, 10) == []
    sealed = await rig.store.seal(second, None, now_us=rig.later(1))
    assert (sealed.state, sealed.received_count, sealed.counts.completed) == ("sealed", 3, 1)
    await rig.run_all(await rig.session())
    batch, ledger = await rig.store.batch(second)
    assert (batch.state, ledger.completed) == ("completed", 3)
    outcomes = await rig.store.outcomes(second, 0, 10)
    assert [(outcome.state, outcome.kind) for outcome in outcomes] == [
        (COMPLETED, JSON),
        (COMPLETED, LINK),
        (COMPLETED, JSON),
    ]
    assert outcomes[1].result == run_id(first, 0).encode()
    assert (await rig.store.run(second, 1)).result_kind == LINK


async def test_two_items_of_a_batch_with_one_key_are_one_run_and_the_batch_completes(rig: StoreRig) -> None:
    batch_id = await rig.batch(4)
    await rig.append(batch_id, range(4), extras=dict.fromkeys(range(4), SAME), runs_max=2)
    await rig.store.seal(batch_id, None, now_us=rig.later(1))
    assert await rig.run_all(await rig.session()) == [0]
    assert (await rig.store.batch(batch_id))[0].state == "completed"
    links = [outcome.result for outcome in await rig.store.outcomes(batch_id, 0, 10) if outcome.kind == LINK]
    assert links == [run_id(batch_id, 0).encode()] * 3


async def test_a_batch_of_links_alone_completes_with_its_seal(rig: StoreRig) -> None:
    await rig.filled(1, extras={0: SAME})
    batch_id = await rig.batch(2)
    await rig.append(batch_id, range(2), extras=dict.fromkeys(range(2), SAME))
    sealed = await rig.store.seal(batch_id, None, now_us=rig.later(1))
    assert (sealed.state, sealed.is_finished) == ("completed", True)


async def test_a_link_sent_again_is_a_duplicate_and_no_conflict(rig: StoreRig) -> None:
    await rig.filled(1, extras={0: SAME})
    batch_id = await rig.batch(2)
    for expected in ((2, 0), (0, 2)):
        appended = await rig.append(batch_id, range(2), extras={1: SAME})
        assert (appended.accepted_count, appended.duplicates_count, appended.conflicts) == (*expected, [])


async def test_links_unreadable_items_and_runs_share_a_chunk(rig: StoreRig) -> None:
    await rig.filled(1, extras={0: SAME})
    batch_id = await rig.batch(6)
    extras = {1: SAME, 2: Extra(failure=BOOM), 4: Extra(idempotency_key="other"), 5: Extra(idempotency_key="other")}
    await rig.append(batch_id, range(6), extras=extras)
    await rig.store.seal(batch_id, None, now_us=rig.later(1))
    await rig.run_all(await rig.session())
    _, ledger = await rig.store.batch(batch_id)
    assert (ledger.completed, ledger.failed) == (5, 1)
    assert [outcome.state for outcome in await rig.store.outcomes(batch_id, 0, 10)][2] == FAILED
    assert await rig.store.redrive(batch_id, None) == 0, "neither a link nor an unreadable item can run again"


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_a_key_is_free_again_after_its_run_failed_was_cancelled_or_expired(rig: StoreRig, how: str) -> None:
    first = await rig.filled(1, extras={0: SAME})
    if how == "failed":
        (lease,) = await rig.claim(await rig.session())
        await rig.settle(lease, "f")
    else:
        await rig.store.cancel_runs(first, [0], now_us=rig.later(1))
    second = await rig.batch(1)
    assert (await rig.append(second, [0], extras={0: SAME})).existing == {}
    third = await rig.batch(1)
    assert (await rig.append(third, [0], extras={0: SAME})).existing == {0: (second, 0)}


async def test_a_key_of_a_run_that_must_not_run_twice_stays_taken_however_it_ended(rig: StoreRig) -> None:
    once = Key("task", at_most_once=True)
    first = await rig.filled(1, key=once, extras={0: SAME})
    (lease,) = await rig.claim(await rig.session())
    await rig.settle(lease, "f")
    second = await rig.batch(1)
    assert (await rig.append(second, [0], key=once, extras={0: SAME})).existing == {0: (first, 0)}


async def test_two_batches_with_one_key_at_once_create_one_run(rig: StoreRig) -> None:
    ids = [await rig.batch(1) for _ in range(4)]
    answers = await asyncio.gather(*(rig.append(batch_id, [0], extras={0: SAME}) for batch_id in ids))
    first = [batch_id for batch_id, appended in zip(ids, answers, strict=True) if not appended.existing]
    assert len(first) == 1
    assert all(appended.existing in ({}, {0: (first[0], 0)}) for appended in answers)


# -- lists in pages


async def test_a_list_of_runs_continues_behind_any_run(rig: StoreRig) -> None:
    ids = [await rig.filled(3), await rig.filled(5), await rig.batch(4)]
    await rig.append(ids[2], [3, 0, 2, 1], runs_max=2)
    await rig.append(await rig.batch(1), [0], key=Key("another"))
    every = [(view.batch_id, view.index) for view in await rig.store.runs("default", task="task", limit=100)]
    assert every == [
        (batch_id, index) for batch_id in reversed(ids) for index in range({0: 3, 1: 5, 2: 4}[ids.index(batch_id)])
    ]
    for at, after in enumerate(every):
        page = await rig.store.runs("default", task="task", after=after, limit=2)
        assert [(view.batch_id, view.index) for view in page] == every[at + 1 : at + 3]
    assert len(await rig.store.runs("default", after=(new_batch_id(rig.now_us + SECOND_US), 0), limit=100)) == 13


async def test_a_list_of_tagged_runs_continues_too(rig: StoreRig) -> None:
    ids = [await rig.filled(3, extras=dict.fromkeys(range(3), Extra(tags=("t",)))) for _ in range(2)]
    every = [(ids[1], 0), (ids[1], 1), (ids[1], 2), (ids[0], 0), (ids[0], 1), (ids[0], 2)]
    for at, after in enumerate(every):
        page = await rig.store.runs("default", tag="t", after=after, limit=2)
        assert [(view.batch_id, view.index) for view in page] == every[at + 1 : at + 3]


# -- keys and buckets


def key_of(number: int, environment: str = "default") -> ApiKey:
    return ApiKey(id=f"key_{number}", environment=environment, digest=f"{number:064x}", scopes=("a", "b"), name="é")


async def test_a_key_is_found_by_its_digest_listed_and_revoked_once(rig: StoreRig) -> None:
    assert not await rig.store.has_keys()
    for number in (1, 2):
        await rig.store.add_key(key_of(number), now_us=rig.now_us)
    await rig.store.add_key(key_of(3, "other"), now_us=rig.now_us)
    key = await rig.store.find_key(key_of(1).digest)
    assert key is not None
    assert (key.environment, key.scopes, key.name, key.created_us) == ("default", ("a", "b"), "é", rig.now_us)
    assert await rig.store.find_key("nothing") is None
    assert [key.id for key in await rig.store.keys("default")] == ["key_1", "key_2"]
    assert await rig.store.revoke_key("default", "key_1", now_us=rig.later(1))
    assert not await rig.store.revoke_key("default", "key_1", now_us=rig.later(1))
    revoked = await rig.store.find_key(key_of(1).digest)
    assert revoked is not None
    assert revoked.revoked_us == rig.now_us - SECOND_US


async def test_a_key_of_any_environment_counts_also_after_it_is_revoked(rig: StoreRig) -> None:
    await rig.store.add_key(key_of(1, "other"), now_us=rig.now_us)
    assert await rig.store.has_keys()
    await rig.store.revoke_key("other", "key_1", now_us=rig.now_us)
    assert await rig.store.has_keys()


async def test_a_key_belongs_to_one_environment_and_no_key_is_added_twice(rig: StoreRig) -> None:
    await rig.store.add_key(key_of(1), now_us=rig.now_us)
    with pytest.raises(NotFound):
        await rig.store.revoke_key("other", "key_1", now_us=rig.now_us)
    with pytest.raises(Conflict):
        await rig.store.add_key(key_of(1), now_us=rig.now_us)


async def test_the_first_signing_key_that_is_offered_is_kept(rig: StoreRig) -> None:
    offered = await asyncio.gather(*(rig.store.signing_key("default", bytes([n]) * 32) for n in range(4)))
    assert len(set(offered)) == 1
    assert await rig.store.signing_key("other", b"x" * 32) == b"x" * 32


async def test_a_bucket_grants_what_it_holds_and_fills_again(rig: StoreRig) -> None:
    bucket = Bucket(capacity=10, refill_us=SECOND_US)

    async def spend(cost: int, name: str = "b", environment: str = "default") -> Spent:
        return await rig.store.spend(environment, name, bucket, cost, now_us=rig.now_us)

    assert (await spend(4)).remaining == 6
    assert not (await spend(7)).is_granted
    refused = await spend(8)
    assert (refused.is_granted, refused.remaining, refused.wait_us) == (False, 6, 2 * SECOND_US)
    assert (await spend(10, "another")).is_granted
    assert (await spend(10, "b", "another")).is_granted
    rig.later(2)
    assert (await spend(8)).remaining == 0


async def test_a_bucket_never_grants_more_than_it_holds_to_many_at_once(rig: StoreRig) -> None:
    bucket = Bucket(capacity=5, refill_us=1_000 * SECOND_US)
    grants = await asyncio.gather(*(rig.store.spend("default", "b", bucket, 1, now_us=rig.now_us) for _ in range(12)))
    assert sum(grant.is_granted for grant in grants) == 5


async def test_prune_forgets_buckets_that_are_full(rig: StoreRig) -> None:
    bucket = Bucket(capacity=1, refill_us=SECOND_US)
    await rig.store.spend("default", "b", bucket, 1, now_us=rig.now_us)
    await rig.store.prune(rig.later(10), batches_max=1, rows_max=10)
    assert (await rig.store.spend("default", "b", bucket, 1, now_us=rig.now_us - 10 * SECOND_US)).is_granted

"""Conformance of every store, part 7: pages and claims are bounded by bytes, and lose, repeat and reorder nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

import msgspec
import pytest

from headrace.core.failure import Failure
from headrace.foundation.limits import DEFAULT, KIB
from headrace.store.protocol import RunOutcome
from tests.support.store_rig import FACTORIES, StoreRig, indexes_of

PAGE_BYTES: Final = 4 * KIB
CLAIM_BYTES: Final = 8 * KIB
SMALL: Final = DEFAULT.replaced(results_page_bytes_max=PAGE_BYTES, claim_bytes_max=CLAIM_BYTES)


@pytest.fixture(params=list(FACTORIES))
def small_rig(request: pytest.FixtureRequest, tmp_path: Path) -> StoreRig:
    """Return a rig around each kind of store, with small bounds."""
    return StoreRig(FACTORIES[request.param](tmp_path, SMALL))


def result_of(code: str, size: int) -> bytes:
    """Return a result or an error of about a size; a cancelled run has none."""
    if code == "x":
        return b""
    return Failure(type="Boom", message="x" * size).encode() if code == "f" else b'"%s"' % (b"y" * size)


def result_bytes(page: list[RunOutcome]) -> int:
    """Return how many bytes the results of a page have."""
    return sum(len(outcome.result) for outcome in page)


async def read_pages(rig: StoreRig, batch_id: str, *, passing: bool = False) -> list[list[RunOutcome]]:
    """Read all outcomes of a batch, page by page, as every reader does."""
    pages: list[list[RunOutcome]] = []
    index = 0
    while page := await rig.store.outcomes(batch_id, index, 100, passing=passing):
        pages.append(page)
        index = page[-1].index + 1
    return pages


@pytest.mark.parametrize("seed", range(4))
async def test_pages_by_bytes_concatenate_to_the_same_outcomes(small_rig: StoreRig, seed: int) -> None:
    rig, chance = small_rig, random.Random(seed)
    batch_id, session_id = await rig.filled(300, runs_max=chance.choice((7, 64, 256))), await rig.session()
    expected: dict[int, tuple[str, bytes]] = {}
    while leases := await rig.claim(session_id, chance.randrange(1, 120)):
        for lease in leases:
            index_at = dict(zip(lease.span_slots, lease.indexes, strict=True))
            left, part_no = list(lease.span_slots), 0
            if chance.random() < 0.5:
                chance.shuffle(left)
            while left:  # parts of any runs of the lease, in any order, some of them larger than a page
                slots = sorted(left[: chance.randrange(1, len(left) + 1)])
                del left[: len(slots)]
                codes = "".join(chance.choice("ccccfx") for _ in slots)
                sizes = [chance.choice((0, 3, 100, 1_000, PAGE_BYTES, 3 * PAGE_BYTES)) for _ in slots]
                results = [result_of(code, size) for code, size in zip(codes, sizes, strict=True)]
                for slot, code, result in zip(slots, codes, results, strict=True):
                    expected[index_at[slot]] = code, result
                assert await rig.settle(lease, codes, span_slots=slots, part_no=part_no, results=results) == "settled"
                part_no += 1
    for passing in (False, True):
        pages = await read_pages(rig, batch_id, passing=passing)
        outcomes = [outcome for page in pages for outcome in page]
        assert [outcome.index for outcome in outcomes] == list(range(300))
        assert {outcome.index: (chr(outcome.state), outcome.result) for outcome in outcomes} == expected
        assert all(len(page) == 1 or result_bytes(page) <= PAGE_BYTES for page in pages)


async def test_a_page_takes_results_up_to_the_bound_and_not_one_byte_more(small_rig: StoreRig) -> None:
    rig = small_rig
    batch_id, session_id = await rig.filled(3), await rig.session()
    (lease,) = await rig.claim(session_id)
    half = PAGE_BYTES // 2
    await rig.settle(lease, span_slots=[0, 1], results=[b"1" * half, b"2" * half])
    await rig.settle(lease, span_slots=[2], results=[b"3" * (half + 1)], part_no=1)
    assert [outcome.index for outcome in await rig.outcomes(batch_id)] == [0, 1]
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 1)] == [1], "one byte more than the bound"
    assert [outcome.index for outcome in await rig.outcomes(batch_id, 2)] == [2]


async def test_a_result_larger_than_a_page_is_a_page(small_rig: StoreRig) -> None:
    rig = small_rig
    batch_id, session_id = await rig.filled(2), await rig.session()
    (lease,) = await rig.claim(session_id)
    await rig.settle(lease, results=[b"1" * PAGE_BYTES * 5, b"2" * PAGE_BYTES * 5])
    assert [[outcome.index for outcome in page] for page in await read_pages(rig, batch_id)] == [[0], [1]]
    assert (await rig.store.run(batch_id, 1)).result == b"2" * PAGE_BYTES * 5


async def test_a_claim_is_cut_before_its_inputs_exceed_the_bound_and_the_rest_waits(small_rig: StoreRig) -> None:
    rig = small_rig
    batch_id = await rig.filled(40, runs_max=2, payload=lambda index: b'"%s"' % (b"x" * (900 + index)))
    session_id = await rig.session()
    leases = await rig.claim(session_id, claim_no=1)
    assert sum(len(payload) for lease in leases for payload in lease.payloads) <= CLAIM_BYTES
    assert indexes_of(leases) == list(range(8)), "four spans fit, a fifth does not"
    repeated = await rig.claim(session_id, claim_no=1)
    assert [(lease.span_id, lease.token) for lease in repeated] == [(lease.span_id, lease.token) for lease in leases]
    order = indexes_of(leases)
    for lease in leases:
        await rig.settle(lease)
    rig.later(2)
    order += await rig.run_all(session_id)
    assert order == list(range(40))
    assert (await rig.store.batch(batch_id))[0].state == "completed"


async def test_a_claim_takes_inputs_up_to_the_bound_and_not_one_byte_more(small_rig: StoreRig) -> None:
    rig, session_id = small_rig, await small_rig.session()
    overhead = 5 + 2  # of a block with one input of two bytes of length
    await rig.filled(1, payload=lambda _: b"1" * (CLAIM_BYTES // 2 - overhead))
    await rig.filled(1, payload=lambda _: b"2" * (CLAIM_BYTES // 2 - overhead))
    await rig.filled(1, payload=lambda _: b"3" * CLAIM_BYTES * 2)
    leases = await rig.claim(session_id)
    assert [lease.payloads[0][:1] for lease in leases] == [b"1", b"2"]
    for lease in leases:
        await rig.release(lease)
    await rig.filled(1, payload=lambda _: b"4")
    (larger,) = await rig.claim(session_id, 1)
    await rig.settle(larger)
    await rig.filled(1, payload=lambda _: b"5")
    sizes = [len(lease.payloads[0]) for lease in await rig.claim(session_id)]
    assert sizes == [CLAIM_BYTES // 2 - overhead], "an input larger than a claim comes alone"
    sizes = [len(lease.payloads[0]) for lease in await rig.claim(session_id)]
    assert sizes == [CLAIM_BYTES * 2]


async def test_a_small_claim_from_a_large_span_is_not_cut(small_rig: StoreRig) -> None:
    rig = small_rig
    await rig.filled(64, payload=lambda _: b"1" * KIB)
    session_id = await rig.session()
    assert indexes_of(await rig.claim(session_id, 5)) == list(range(5))
    assert indexes_of(await rig.claim(session_id, 50)) == list(range(5, 55))


async def test_listed_runs_with_large_errors_come_in_several_pages(small_rig: StoreRig) -> None:
    rig = small_rig
    batch_id, session_id = await rig.filled(40, runs_max=16), await rig.session()
    for lease in await rig.claim(session_id):
        errors = [Failure(type="Boom", message=f"{index}" * 400).encode() for index in lease.indexes]
        await rig.settle(lease, "f", results=errors)
    listed, after, pages_count = [], None, 0
    while page := await rig.store.runs("default", batch_id=batch_id, after=after, limit=100):
        assert len(page) == 1 or sum(len(run.result) for run in page) <= PAGE_BYTES
        listed += page
        after, pages_count = (page[-1].batch_id, page[-1].index), pages_count + 1
    assert [run.index for run in listed] == list(range(40))
    assert all(run.attempts[0]["message"] == f"{run.index}" * 400 for run in listed)
    assert pages_count > 5


async def test_listed_batches_with_large_metadata_come_in_several_pages(small_rig: StoreRig) -> None:
    rig = small_rig
    ids = [await rig.batch(0, metadata={"note": "x" * 1_000}) for _ in range(20)]
    listed: list[str] = []
    while page := await rig.store.batches("default", before_id=listed[-1] if listed else "", limit=100):
        assert sum(len(msgspec.json.encode(batch.metadata)) for batch, _ in page) <= PAGE_BYTES
        listed += [batch.id for batch, _ in page]
    assert listed == ids[::-1]

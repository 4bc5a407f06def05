"""Ids: sortable by time, unique, and parsed only in the form in which they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.foundation.errors import InvalidInput
from headrace.foundation.ids import (
    INDEX_MAX,
    check_batch_id,
    new_batch_id,
    new_session_id,
    parse_run_id,
    run_id,
)

BODY = "0" * 26
moments_us = st.integers(0, (2**48 - 1) * 1_000)


@given(moments_us, moments_us)
def test_ids_sort_by_the_millisecond_they_were_made(first_us: int, second_us: int) -> None:
    first, second = new_batch_id(first_us), new_batch_id(second_us)
    if first_us // 1_000 < second_us // 1_000:
        assert first < second
    elif first_us // 1_000 > second_us // 1_000:
        assert first > second
    assert len(first) == len(second)


def test_ids_of_one_moment_differ() -> None:
    assert len({new_batch_id(0) for _ in range(1_000)}) == 1_000
    assert new_session_id(0).startswith("session_")


@given(moments_us, st.integers(0, INDEX_MAX))
def test_a_run_id_reads_back_as_its_batch_and_index(now_us: int, index: int) -> None:
    batch_id = new_batch_id(now_us)
    assert check_batch_id(batch_id) == batch_id
    assert parse_run_id(run_id(batch_id, index)) == (batch_id, index)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "run",
        "run_",
        f"run_{BODY}",
        f"run_{BODY}_",
        f"run_{BODY}_01",
        f"run_{BODY}_-1",
        f"run_{BODY}_1 ",
        f"run_{BODY}_1\n",
        f"run_{BODY}\n_1",
        f"run_{BODY}_{INDEX_MAX + 1}",
        f"run_{BODY}_1_1",
        f"run_{BODY}_٣",
        f"run_{BODY[1:]}_1",
        f"run_{BODY}0_1",
        f"run_{BODY[1:]}u_1",
        f"run_{BODY[1:]}A_1",
        f"batch_{BODY}_1",
        f" run_{BODY}_1",
    ],
)
def test_what_run_id_would_not_write_is_no_run_id(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected a run id such as run_…_0, got"):
        parse_run_id(text)


@pytest.mark.parametrize("text", ["", "batch_", BODY, f"run_{BODY}", f"batch_{BODY}\n", f"batch_{BODY[1:]}l"])
def test_what_new_batch_id_would_not_write_is_no_batch_id(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected a batch id such as batch_…, got"):
        check_batch_id(text)

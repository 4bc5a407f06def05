from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import resource
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.exceptions import GenericError, PermissionDeniedError
from obstore.store import ObjectStore

from headrace.foundation.errors import InvalidInput, InvalidSetting, ObjectMissing, StoreUnavailable
from headrace.store import payloads as payloads_module
from headrace.store.client_uploads import FOLDER, ClientUploads
from headrace.store.object_store import ObjectStoreBackend, open_payloads
from headrace.store.payloads import PayloadStore, Reference, check_key, environment_segment, payload_key

BATCH = "batch_0000000000000000000000000a"


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@pytest.fixture(params=["directory", "memory"])
def payloads(request: pytest.FixtureRequest, tmp_path: Path) -> PayloadStore:
    return open_payloads("memory://" if request.param == "memory" else str(tmp_path / "payloads"))


@pytest.fixture
def local(tmp_path: Path) -> PayloadStore:
    return open_payloads(str(tmp_path / "payloads"))


def stored_in(payloads: PayloadStore) -> ObjectStore:
    """Return the object store itself, to damage what is in it."""
    assert isinstance(payloads.objects, ObjectStoreBackend)
    return payloads.objects.store


def key_of(data: bytes, batch_id: str = BATCH) -> str:
    return payload_key("default", batch_id, hashlib.sha256(data).hexdigest())


async def keys_of(payloads: PayloadStore, prefix: str = "", page_objects: int = 1_000) -> list[str]:
    return sorted([listed.key async for listed in payloads.list(prefix, page_objects=page_objects)])


@on_a_loop
async def test_a_stored_payload_can_be_read(payloads: PayloadStore) -> None:
    for data in (b"", b"x", bytes(range(256)) * 4_096):
        await payloads.put(key_of(data), data)
        assert await payloads.get(key_of(data)) == data


@on_a_loop
async def test_putting_the_same_payload_again_changes_nothing(payloads: PayloadStore) -> None:
    data = b"payload"
    await asyncio.gather(*(payloads.put(key_of(data), data) for _ in range(20)))
    assert await keys_of(payloads) == [key_of(data)]
    assert await payloads.get(key_of(data)) == data


@on_a_loop
async def test_bytes_are_not_stored_under_the_key_of_other_bytes(payloads: PayloadStore) -> None:
    with pytest.raises(InvalidInput, match="does not match the hash of these bytes"):
        await payloads.put(key_of(b"these"), b"others")
    assert await keys_of(payloads) == []


@on_a_loop
async def test_a_missing_object_is_reported_as_missing(payloads: PayloadStore) -> None:
    with pytest.raises(ObjectMissing, match="not in the object store") as missing:
        await payloads.get(key_of(b"never written"))
    assert missing.value.ids["key"] == key_of(b"never written")
    assert missing.value.hint


@pytest.mark.parametrize("damage", [b"", b"payloa", b"Payload", b"payload and more"])
@on_a_loop
async def test_a_damaged_object_is_never_returned(payloads: PayloadStore, damage: bytes) -> None:
    data = b"payload"
    await payloads.put(key_of(data), data)
    await obstore.put_async(stored_in(payloads), key_of(data), damage)
    with pytest.raises(ObjectMissing, match="other bytes than were written"):
        await payloads.get(key_of(data))


@on_a_loop
async def test_an_object_larger_than_any_payload_is_not_loaded(
    payloads: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"payload"
    await payloads.put(key_of(data), data)
    monkeypatch.setattr(payloads_module, "_OBJECT_BYTES_MAX", 6)
    with pytest.raises(ObjectMissing, match="larger than any payload"):
        await payloads.get(key_of(data))


@on_a_loop
async def test_an_object_that_was_truncated_by_a_power_cut_is_replaced_by_the_next_put(payloads: PayloadStore) -> None:
    data = b"payload"
    await obstore.put_async(stored_in(payloads), key_of(data), b"pay")
    await payloads.put(key_of(data), data)
    assert await payloads.get(key_of(data)) == data


@on_a_loop
async def test_a_put_returns_after_the_file_and_the_directories_that_name_it_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    payloads = open_payloads(str(tmp_path / "deep" / "payloads"))
    assert set(synced) == {".", "deep"}
    synced.clear()
    first, second = key_of(b"first"), key_of(b"second")
    await payloads.put(first, b"first")
    root = "deep/payloads"
    assert synced == [f"{root}/{first}", f"{root}/default/{BATCH}", f"{root}/default", root]
    synced.clear()
    await payloads.put(second, b"second")
    assert synced == [f"{root}/{second}", f"{root}/default/{BATCH}"]
    synced.clear()
    await payloads.put(second, b"second")
    assert f"{root}/{second}" in synced


@on_a_loop
async def test_a_put_that_could_not_be_synced_is_not_accepted_and_not_trusted_later(
    local: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            await local.put(key_of(b"data"), b"data")
    assert await keys_of(local) == []
    await local.put(key_of(b"data"), b"data")
    assert await local.get(key_of(b"data")) == b"data"


@on_a_loop
async def test_a_repeat_that_could_not_be_synced_does_not_remove_what_was_accepted(
    local: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    await local.put(key_of(b"data"), b"data")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(StoreUnavailable):
            await local.put(key_of(b"data"), b"data")
    assert await local.get(key_of(b"data")) == b"data"


@on_a_loop
async def test_a_directory_that_is_created_again_is_synced_again(
    local: PayloadStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    await local.put(key_of(b"data"), b"data")
    await local.delete_batch("default", BATCH)
    synced.clear()
    await local.put(key_of(b"data"), b"data")
    assert tmp_path / "payloads" / "default" in synced


@on_a_loop
async def test_a_payload_that_is_sent_again_gets_a_new_age(local: PayloadStore, tmp_path: Path) -> None:
    data = b"payload"
    await local.put(key_of(data), data)
    os.utime(tmp_path / "payloads" / key_of(data), (1_000_000, 1_000_000))
    assert [listed.modified_us async for listed in local.list()] == [1_000_000_000_000]
    await local.put(key_of(data), data)
    assert [listed.modified_us > 1_600_000_000_000_000 async for listed in local.list()] == [True]


@on_a_loop
async def test_a_full_disk_leaves_no_partial_object_and_gives_a_hint(local: PayloadStore, tmp_path: Path) -> None:
    data = os.urandom(8 * 1024 * 1024)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * 1024 * 1024, hard))
    try:
        with pytest.raises(StoreUnavailable, match="could not be written") as full:
            await local.put(key_of(data), data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.retryable
    assert "free space" in full.value.hint
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    await local.put(key_of(data), data)
    assert await local.get(key_of(data)) == data


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (GenericError("Generic LocalFileSystem error: No space left on device (os error 28)"), "free space"),
        (GenericError("Generic LocalFileSystem error: Read-only file system (os error 30)"), "read-only"),
        (PermissionDeniedError("The operation lacked the necessary privileges"), "permissions"),
        (FileNotFoundError("the bucket is not there"), "create it"),
        (GenericError("Generic S3 error: connection refused"), "headrace doctor"),
    ],
)
@on_a_loop
async def test_every_failed_write_gives_a_hint(
    payloads: PayloadStore, monkeypatch: pytest.MonkeyPatch, error: Exception, hint: str
) -> None:
    async def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(obstore, "put_async", fail)
    with pytest.raises(StoreUnavailable) as refused:
        await payloads.put(key_of(b"data"), b"data")
    assert hint in refused.value.hint
    assert refused.value.ids["key"] == key_of(b"data")


@on_a_loop
async def test_a_file_in_place_of_a_directory_is_reported(local: PayloadStore, tmp_path: Path) -> None:
    (tmp_path / "payloads" / "default").write_text("in the way")
    for attempt in (local.put(key_of(b"data"), b"data"), local.get(key_of(b"data"))):
        with pytest.raises(StoreUnavailable, match="Not a directory"):
            await attempt


@pytest.mark.parametrize("url", ["/proc/headrace", "file:///proc/headrace", "/dev/null/payloads"])
def test_a_directory_that_can_not_be_made_is_refused_when_it_is_opened(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="can't use the directory for payloads") as refused:
        open_payloads(url)
    assert refused.value.hint


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "a",
        f"/default/{BATCH}/" + "0" * 64,
        f"default/{BATCH}/" + "0" * 63,
        f"default/{BATCH}/" + "0" * 65,
        f"default/{BATCH}/" + "A" * 64,
        f"default/{BATCH}/" + "0" * 64 + "\n",
        f"default/{BATCH}/" + "0" * 64 + "/",
        f"default/{BATCH}/" + "0" * 64 + "#1",
        f"default/../{BATCH}/" + "0" * 64,
        "default/../" + "0" * 64,
        "default/./" + "0" * 64,
        "../default/" + "0" * 64,
        "default//" + "0" * 64,
        "default/a\\b/" + "0" * 64,
        "default/a%2e%2e/" + "0" * 64,
        "default/a\x00b/" + "0" * 64,
        "default/\u00e9/" + "0" * 64,
        "default/a b/" + "0" * 64,
        "default/" + "a" * 201 + "/" + "0" * 64,
        "a" * 10_000,
    ],
)
@on_a_loop
async def test_a_key_outside_the_store_is_refused_by_every_operation(payloads: PayloadStore, key: str) -> None:
    attempts: list[Awaitable[Any]] = [payloads.put(key, b""), payloads.get(key), payloads.delete([key])]
    for attempt in attempts:
        with pytest.raises(InvalidInput):
            await attempt
    with pytest.raises(InvalidInput):
        Reference.decode(Reference(key=key, bytes_count=1).encode())


@pytest.mark.parametrize(
    "parts", [("default", "..", "0" * 64), ("default", "a/b", "0" * 64), ("default", "", "0" * 64), ("a", "b", "c")]
)
def test_a_key_is_made_of_plain_parts_only(parts: tuple[str, str, str]) -> None:
    with pytest.raises(InvalidInput):
        payload_key(*parts)


@on_a_loop
async def test_a_link_out_of_the_directory_is_not_listed_as_ours(local: PayloadStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (tmp_path / "payloads" / "link").symlink_to(outside)
    (tmp_path / "payloads" / ".stray").write_text("stray")
    await local.put(key_of(b"ours"), b"ours")
    assert await keys_of(local) == [key_of(b"ours")]


@pytest.mark.parametrize("prefix", ["..", "a/../b", "/etc", "default/", "a%2e"])
@on_a_loop
async def test_a_prefix_outside_the_store_is_refused(payloads: PayloadStore, prefix: str) -> None:
    with pytest.raises(InvalidInput):
        await keys_of(payloads, prefix)


@on_a_loop
async def test_a_listing_names_every_object_with_its_age_and_size_page_by_page(
    payloads: PayloadStore,
) -> None:
    before_us = time.time_ns() // 1_000
    bodies = [b"x" * count for count in range(25)]
    for body in bodies:
        await payloads.put(key_of(body), body)
    listed = {each.key: each async for each in payloads.list("default", page_objects=10)}
    assert {key: each.bytes_count for key, each in listed.items()} == {key_of(body): len(body) for body in bodies}
    assert all(abs(each.modified_us - before_us) < 60_000_000 for each in listed.values())
    assert await keys_of(payloads, f"default/{BATCH}") == sorted(listed)
    assert await keys_of(payloads, "default/another") == []
    assert await keys_of(payloads, "def") == []


@on_a_loop
async def test_deleting_removes_existing_objects_and_ignores_missing_ones(payloads: PayloadStore) -> None:
    bodies = [bytes([number]) for number in range(20)]
    for body in bodies[::2]:
        await payloads.put(key_of(body), body)
    await payloads.delete(key_of(body) for body in bodies)
    assert await keys_of(payloads) == []
    await payloads.delete([])


@on_a_loop
async def test_deleting_a_batch_removes_its_payloads_and_no_others(
    payloads: PayloadStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payloads_module, "_PAGE_OBJECTS", 4)
    bodies = [bytes([number]) for number in range(10)]
    for body in bodies:
        await payloads.put(key_of(body), body)
    await payloads.put(key_of(b"kept", "batch_other"), b"kept")
    assert await payloads.delete_batch("default", BATCH) == 10
    assert await keys_of(payloads) == [key_of(b"kept", "batch_other")]
    assert await payloads.delete_batch("default", BATCH) == 0
    await payloads.put(key_of(b"again"), b"again")
    assert await payloads.get(key_of(b"again")) == b"again"


@on_a_loop
async def test_deleting_a_batch_leaves_no_directory_and_no_torn_file(local: PayloadStore, tmp_path: Path) -> None:
    await local.put(key_of(b"data"), b"data")
    directory = tmp_path / "payloads" / "default" / BATCH
    (directory / ("0" * 64 + "#1")).write_bytes(b"what a killed process left")
    await local.delete_batch("default", BATCH)
    assert not directory.exists()
    with pytest.raises(InvalidInput):
        await local.delete_batch("default", "..")
    assert (tmp_path / "payloads" / "default").exists()


@on_a_loop
async def test_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = open_payloads("memory://", concurrency=3)
    running = running_most = 0

    async def counted(*args: object, **options: object) -> None:
        nonlocal running, running_most
        running += 1
        running_most = max(running_most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1

    monkeypatch.setattr(obstore, "put_async", counted)
    await asyncio.gather(*(payloads.put(key_of(bytes([number])), bytes([number])) for number in range(20)))
    assert running_most == 3


@on_a_loop
async def test_a_check_makes_a_round_trip_and_leaves_no_object(payloads: PayloadStore) -> None:
    await payloads.check()
    assert await keys_of(payloads) == []


@on_a_loop
async def test_a_check_of_a_broken_store_fails(local: PayloadStore, tmp_path: Path) -> None:
    (tmp_path / "payloads").rmdir()
    (tmp_path / "payloads").write_text("not a directory")
    with pytest.raises(StoreUnavailable):
        await local.check()


@on_a_loop
async def test_a_directory_can_be_named_in_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await open_payloads((tmp_path / "a dir").as_uri()).put(key_of(b"data"), b"data")
    for url in (str(tmp_path / "a dir"), "a dir", "./a dir"):
        assert await open_payloads(url).get(key_of(b"data")) == b"data"


def test_the_stores_of_three_clouds_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://bucket/prefix", "gs://bucket/prefix"):
        assert open_payloads(url).url == url


@pytest.mark.parametrize(
    "url", ["", "/", "file:///", "file://host/path", "ftp://host/x", "http://host/x", "s3://", "file:///a?b=c"]
)
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="expected the URL of an object store"):
        open_payloads(url)


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(InvalidSetting) as refused:
        open_payloads("ftp://user:hunter2@host/x")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("concurrency", [0, -1, True, "ten"])
def test_a_concurrency_outside_its_bounds_is_refused_by_name(concurrency: Any) -> None:
    with pytest.raises(InvalidSetting, match="payload_concurrency"):
        open_payloads("memory://", concurrency=concurrency)


def test_a_reference_is_encoded_and_decoded() -> None:
    reference = Reference(key=key_of(b"data"), bytes_count=4, content_type="text/plain")
    assert Reference.decode(reference.encode()) == reference
    assert check_key(reference.key) == reference.key


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"\xff",
        b'{"key": 1, "bytes_count": 1}',
        b'{"key": "default/b/' + b"0" * 64 + b'"}',
        b'{"key": "default/b/' + b"0" * 64 + b'", "bytes_count": -1}',
        b'{"key": "default/b/' + b"0" * 64 + b'", "bytes_count": 1, "url": "file:///etc"}',
    ],
)
def test_bytes_that_are_no_reference_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        Reference.decode(data)


ENVIRONMENTS = (
    "default", "packets", "_packets", "a-b", "612d62", "team a", "ümlaut", "..", "a/b", "", "x" * 200, "A", "_",
)  # fmt: skip


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@on_a_loop
async def test_payloads_of_any_environment_are_stored_and_stay_apart_from_uploads(
    payloads: PayloadStore, environment: str
) -> None:
    data = environment.encode()
    key = payload_key(environment, BATCH, hashlib.sha256(data).hexdigest())
    await payloads.put(key, data)
    await payloads.delete_older(FOLDER, 2**62)
    assert await payloads.get(key) == data
    assert await payloads.delete_batch(environment, BATCH) == 1


def test_different_environments_have_different_folders() -> None:
    assert len({environment_segment(environment) for environment in ENVIRONMENTS}) == len(ENVIRONMENTS)
    assert FOLDER not in {environment_segment(environment) for environment in ENVIRONMENTS}


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_uploads_of_two_environments_never_share_a_key(first: str, second: str) -> None:
    uploads = ClientUploads(open_payloads("memory://"))
    assert (uploads.key(first, "a") == uploads.key(second, "a")) == (first == second)

"""The disk cache: verified, bounded, shared, and pinned while in use."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.clients.blob_sinks import FileSink
from phalanx.clients.blob_transfers import BlobTransfers
from phalanx.errors import DataLoss, InvalidArgument, NotFound, PhalanxError, ResourceExhausted
from phalanx.telemetry.metrics import WorkerMetrics, new_registry
from phalanx.v1.storage_service_pb2 import GetBlobResponse
from worker.cache import BlobCache


class Answer:
    """What storage answers a download with, whatever was asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[GetBlobResponse]:
        yield GetBlobResponse(chunk=self._data, size_bytes=len(self._data))

    def cancel(self) -> None:
        pass


class Store:
    """Blobs that can be downloaded, and how often they were."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.errors: list[Exception] = []
        stub: Any = SimpleNamespace(
            GetBlob=lambda request, timeout: Answer(self.blobs[request.digest])
        )
        self._transfers = BlobTransfers(stub, timeout_s=60.0, attempts=1)

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    async def download(self, digest: str, path: Path) -> None:
        self.downloads.append(digest)
        await self.open.wait()
        if self.errors:
            raise self.errors.pop(0)
        if digest not in self.blobs:
            raise NotFound("no such blob")
        await self._transfers.get_to(digest, path, None)


class Caches:
    """Makes caches over one folder, as several workers of a machine would."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store = store
        self.made: list[BlobCache] = []
        self.metrics = WorkerMetrics(new_registry())

    def __call__(self, limit_bytes: int = 10_000) -> BlobCache:
        cache = BlobCache(self._folder, limit_bytes, self._store.download, self.metrics)
        self.made.append(cache)
        return cache


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def caches(tmp_path: Path, store: Store) -> AsyncIterator[Caches]:
    made = Caches(tmp_path, store)
    yield made
    for cache in made.made:
        await cache.close()


def _files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs").glob("*/*")}


async def _touch(cache: BlobCache, digest: str, at_s: int) -> None:
    """Use a blob at a certain time."""
    pinned = await cache.get(digest)
    os.utime(pinned.path, (at_s, at_s))
    pinned.release()


async def test_a_blob_is_downloaded_once(caches: Caches, store: Store) -> None:
    digest = store.put(b"data")
    cache = caches()
    for _ in range(3):
        pinned = await cache.get(digest, 4)
        assert pinned.path.read_bytes() == b"data"
        pinned.release()
    assert store.downloads == [digest]


async def test_all_who_want_a_blob_share_one_download(caches: Caches, store: Store) -> None:
    digest = store.put(b"data")
    store.open.clear()
    cache = caches()
    wanting = [asyncio.create_task(cache.get(digest)) for _ in range(5)]
    cache.prefetch(digest)
    await asyncio.sleep(0)
    wanting[0].cancel()
    store.open.set()
    for task in wanting[1:]:
        (await task).release()
    assert store.downloads == [digest]


async def test_the_least_recently_used_go_first(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    cache = caches(limit_bytes=3500)
    digests = [store.put(bytes([index]) * 1000) for index in range(5)]
    for index, digest in enumerate(digests[:3]):
        await _touch(cache, digest, 1000 + index)
    await _touch(cache, digests[0], 2000)
    await _touch(cache, digests[3], 3000)
    assert _files(tmp_path) == {digests[0], digests[2], digests[3]}
    await _touch(cache, digests[4], 4000)
    assert _files(tmp_path) == {digests[0], digests[3], digests[4]}


async def test_a_pinned_blob_stays_also_for_another_worker(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    one, other = caches(limit_bytes=2000), caches(limit_bytes=2000)
    kept = await one.get(store.put(b"k" * 1500))
    os.utime(kept.path, (1, 1))
    for index in range(3):
        (await other.get(store.put(bytes([index]) * 1500))).release()
    assert kept.digest in _files(tmp_path)
    kept.release()
    kept.release()
    (await other.get(store.put(b"z" * 1500))).release()
    assert kept.digest not in _files(tmp_path)


async def test_another_content_than_the_name_says_is_refused(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    digest = store.put(b"right")
    store.blobs[digest] = b"wrong"
    with pytest.raises(DataLoss, match="changed on its way"):
        await caches().get(digest)
    assert _files(tmp_path) == set()


async def test_a_damaged_file_is_fetched_again(caches: Caches, store: Store) -> None:
    digest = store.put(b"whole file")
    cache = caches()
    pinned = await cache.get(digest, 10)
    pinned.release()
    pinned.path.write_bytes(b"torn")
    again = await cache.get(digest, 10)
    assert again.path.read_bytes() == b"whole file"
    assert store.downloads == [digest, digest]
    again.release()


async def test_what_an_earlier_process_left_is_looked_at_before_it_is_used(
    tmp_path: Path, caches: Caches, store: Store
) -> None:
    """A power failure may leave a file with its length and without its content."""
    good, bad = store.put(b"as it was"), store.put(b"with bytes")
    for digest in (good, bad):
        (await caches().get(digest)).release()
    path = tmp_path / "blobs" / bad[:2] / bad
    path.write_bytes(bytes(len(b"with bytes")))
    store.downloads.clear()
    later = caches()
    for digest, data in ((good, b"as it was"), (bad, b"with bytes"), (bad, b"with bytes")):
        with_pin = await later.get(digest, len(data))
        assert with_pin.path.read_bytes() == data
        with_pin.release()
    assert store.downloads == [bad]


async def test_a_blob_that_never_has_the_size_it_should_is_given_up(
    caches: Caches, store: Store
) -> None:
    digest = store.put(b"four")
    with pytest.raises(DataLoss, match="not 5 bytes") as refused:
        await caches().get(digest, 5)
    assert refused.value.reason == "BLOB_DOES_NOT_FIT"
    assert len(store.downloads) == 3


async def test_a_removed_file_is_fetched_again_though_it_was_pinned(
    caches: Caches, store: Store
) -> None:
    digest = store.put(b"data")
    cache = caches()
    first = await cache.get(digest)
    first.path.unlink()
    second = await cache.get(digest)
    assert second.path.read_bytes() == b"data"
    first.release()
    second.release()


@pytest.mark.parametrize("digest", ["../../elsewhere", "/tmp/elsewhere", "a", "f" * 63 + "/"])
async def test_what_is_no_digest_is_never_a_path(
    caches: Caches, store: Store, tmp_path: Path, digest: str
) -> None:
    """Leaf processes say what they want, and run other people's code."""
    cache = caches()
    before = {*tmp_path.rglob("*")}
    cache.prefetch(digest, 4)
    cache.prefetch_later(digest, 4)
    with pytest.raises(InvalidArgument, match="64 lower-case"):
        await cache.get(digest)
    await asyncio.gather(*cache._prefetching, *cache._reading_ahead)
    assert store.downloads == []
    assert {*tmp_path.rglob("*")} == before


async def test_errors_reach_those_who_ask_and_can_be_tried_again(
    caches: Caches, store: Store
) -> None:
    digest = hashlib.sha256(b"late").hexdigest()
    cache = caches()
    with pytest.raises(NotFound):
        await cache.get(digest)
    store.put(b"late")
    (await cache.get(digest)).release()
    with pytest.raises(InvalidArgument):
        await cache.get("../../etc/passwd")


async def full_disk(folder: Path) -> Exception:
    """What the download of a blob raises on a full disk."""
    sink = FileSink(folder / "blob")
    sink._file.close()
    sink._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 - closed with the sink
    try:
        await sink.write(b"bytes")
    except PhalanxError as error:
        return error
    finally:
        await sink.close()
    raise AssertionError


@pytest.mark.parametrize("where", ["before", "in the download"])
async def test_a_full_disk_makes_room_and_then_says_so(
    caches: Caches, store: Store, tmp_path: Path, where: str
) -> None:
    cache = caches()
    old = store.put(b"old")
    (await cache.get(old)).release()
    full: Exception = OSError(errno.ENOSPC, "No space left on device")
    if where == "in the download":
        full = await full_disk(tmp_path)
    store.errors = [full]
    new = store.put(b"new")
    (await cache.get(new)).release()
    assert _files(tmp_path) == {new}
    store.errors = [full, full]
    with pytest.raises(ResourceExhausted, match="--cache-dir"):
        await cache.get(store.put(b"newer"))


async def test_prefetching_fills_the_cache_and_swallows_errors(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    cache = caches()
    digest = store.put(b"soon")
    cache.prefetch(digest)
    cache.prefetch("0" * 64)
    (await cache.get(digest)).release()
    with pytest.raises(NotFound):
        await cache.get("0" * 64)
    assert store.downloads.count(digest) == 1


async def test_what_a_leaf_waits_for_is_fetched_before_what_is_read_ahead(
    caches: Caches, store: Store
) -> None:
    cache = caches(10**6)
    digests = [store.put(bytes([number])) for number in range(40)]
    store.open.clear()
    for digest in digests:
        cache.prefetch_later(digest, 1)
    cache.prefetch(digests[-1])
    waiting = asyncio.create_task(cache.get(digests[-2]))
    while not store.downloads:
        await asyncio.sleep(0)
    store.open.set()
    await waiting
    (await cache.get(digests[-1])).release()
    assert max(store.downloads.index(digest) for digest in digests[-2:]) < 10
    for digest in digests:
        (await cache.get(digest)).release()
    assert len(store.downloads) == len(digests)


async def test_what_is_fetched_for_later_takes_a_part_of_the_cache(
    caches: Caches, store: Store
) -> None:
    cache = caches(limit_bytes=6000)
    digests = [store.put(bytes([number]) * 1000) for number in range(5)]
    for digest in digests:
        cache.prefetch_later(digest, 1000)
    while cache._arriving or len(store.downloads) < 3:
        await asyncio.sleep(0)
    for digest in digests[:3]:
        (await cache.get(digest)).release()
    assert store.downloads == digests[:3]
    cache.prefetch_later(digests[3], 1000)
    (await cache.get(digests[3])).release()
    assert store.downloads == digests[:4]


async def test_what_nobody_asked_for_later_makes_room_for_others(
    caches: Caches, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches(limit_bytes=2000)
    first, other = store.put(b"a" * 1000), store.put(b"b" * 1000)
    cache.prefetch_later(first, 1000)
    cache.prefetch_later(other, 1000)
    while cache._arriving or not store.downloads:
        await asyncio.sleep(0)
    assert store.downloads == [first]
    monkeypatch.setattr("worker.cache._LATER_S", 0.0)
    cache.prefetch_later(other, 1000)
    while cache._arriving or len(store.downloads) < 2:
        await asyncio.sleep(0)
    assert store.downloads == [first, other]


async def test_a_full_cache_is_looked_through_once_for_many_files(
    caches: Caches, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches(limit_bytes=64_000)
    looked = []
    files = cache._files
    monkeypatch.setattr(cache, "_files", lambda: looked.append(1) or files())
    for number in range(200):
        (await cache.get(store.put(bytes([number]) * 1000))).release()
        assert sum(size for _, size, _ in files()) <= 64_000
    assert len(looked) < 200 / 3


async def test_workers_that_share_a_folder_keep_its_limit_together(
    caches: Caches, store: Store
) -> None:
    workers = [caches(limit_bytes=64_000) for _ in range(4)]
    for number in range(250):
        (await workers[number % 4].get(store.put(number.to_bytes(4, "big") * 250))).release()
        held_bytes = sum(size for _, size, _ in workers[0]._files())
        assert held_bytes <= 64_000 + 4 * 64_000 // 16


async def test_what_does_not_belong_into_the_folder_is_left_alone(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ".DS_Store").write_bytes(b"x")
    cache = caches(limit_bytes=1500)
    for number in range(5):
        (await cache.get(store.put(bytes([number]) * 1000))).release()
    assert (tmp_path / "blobs" / ".DS_Store").exists()


async def test_what_a_dead_worker_left_half_written_is_removed(
    caches: Caches, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "blobs" / "ab"
    folder.mkdir(parents=True)
    old, young = folder / ".abc.0123.part", folder / ".abc.4567.part"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (1, 1))
    caches()
    assert not old.exists()
    assert young.exists()


async def test_a_folder_that_is_gone_is_told(caches: Caches, tmp_path: Path) -> None:
    cache = caches()
    assert cache.writable
    (tmp_path / "blobs").rmdir()
    assert not cache.writable


async def test_requests_and_size_are_measured(caches: Caches, store: Store) -> None:
    cache = caches()
    digest = store.put(b"12345")
    for _ in range(3):
        (await cache.get(digest)).release()

    def value(name: str, **labels: str) -> Any:
        for family in (caches.metrics.cache_requests_total, caches.metrics.cache_bytes):
            for metric in family.collect():
                for sample in metric.samples:
                    if sample.name == name and sample.labels == labels:
                        return sample.value
        return None

    assert value("phalanx_cache_requests_total", outcome="miss") == 1
    assert value("phalanx_cache_requests_total", outcome="hit") == 2
    assert value("phalanx_cache_bytes") == 5

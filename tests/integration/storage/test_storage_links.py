"""Linked data sets: chunks are made from the user's files, by processes that may die of them."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from phalanx.clients.storage import StorageClient
from phalanx.config import build
from phalanx.data.chunk_layout import size_of
from phalanx.data.ingest import ingest
from phalanx.data.linking import Digests
from phalanx.data.options import IngestOptions
from phalanx.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from phalanx.testing.storage_messages import digest_of
from storage.config import StorageConfig
from storage.links.maker import Makers, Plan
from storage.runtime import StorageProcess
from storage.service.manifests import read_manifest

ROWS = 4000


def table(rows=ROWS, seed=1):
    generator = np.random.default_rng(seed)
    columns = {f"x{index}": generator.normal(size=rows) for index in range(8)}
    return pa.table({**columns, "y": generator.choice(["a", "b"], rows)})


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pyarrow.parquet.write_table(table(), folder / "a.parquet", row_group_size=1500)
    return folder / "a.parquet"


@pytest.fixture
async def service(tmp_path, data):
    flags = {
        "state": str(tmp_path / "state"),
        "listen": "127.0.0.1:0",
        "gc_interval_s": "0",
        "link_root": str(data.parent),
    }
    service = StorageProcess(build(StorageConfig, flags, {}))
    await service.start()
    yield service
    await service.stop(0.5)


@pytest.fixture
async def link(client):
    """Links a file as a data set; returns its manifest."""

    async def add(path, name="people", **options):
        chosen = IngestOptions(**{"link": True, "test": 0.2, "chunk_bytes": 9000, **options})
        manifest = await asyncio.to_thread(ingest, path, chosen, Digests())
        manifest_digest = await client.put_blob(manifest.to_json())
        await client.create_dataset(name, manifest_digest)
        return manifest

    return add


async def chunks_of(client, manifest):
    return [await client.get_blob(digest) for digest in manifest.digests()]


async def test_chunks_are_made_and_nothing_is_stored(client, service, data, link, stored_files):
    manifest = await link(data)
    assert len(manifest.digests()) > 10
    for digest in manifest.digests():
        chunk = await client.get_blob(digest)
        assert digest_of(chunk) == digest
        assert await client.get_blob(digest, 5, 100) == chunk[5:105]
        assert await client.get_blob(digest, 5) == chunk[5:]
    dataset = await client.get_dataset("people")
    assert dataset.linked
    assert dataset.size_bytes == manifest.size_bytes
    await client.collect_garbage(grace_s=0)
    assert stored_files() == ([dataset.manifest_digest], [])
    # Who adds the same rows to have them copied must upload them.
    assert await client.missing_blobs(manifest.digests()) == list(manifest.digests())
    assert await chunks_of(client, manifest)
    size = manifest.splits["train"][0].size_bytes
    with pytest.raises(InvalidArgument, match="not all inside"):
        await client.get_blob(manifest.digests()[0], 1, size)
    with pytest.raises(NotFound):
        await client.get_blob(digest_of(b"nothing"))


@pytest.mark.parametrize(("offset", "length"), [(-1, 0), (-1, 1), (0, 10**9), (10**9, 0)])
async def test_what_is_not_inside_a_chunk_is_refused_as_such(client, data, link, offset, length):
    manifest = await link(data)
    with pytest.raises(InvalidArgument, match="not all inside"):
        await client.get_blob(manifest.splits["train"][0].digest, offset, length)


@pytest.mark.parametrize("wrong_rows", [-20, 20])
async def test_another_size_in_the_manifest_of_others_changes_nothing(
    client, data, link, wrong_rows
):
    manifest = await link(data)
    target = manifest.splits["train"][3]
    other = data.with_name("b.parquet")
    pyarrow.parquet.write_table(table(seed=2), other)
    chosen = IngestOptions(link=True, test=0.2, chunk_bytes=9000)
    found = await asyncio.to_thread(ingest, other, chosen, Digests())
    train = list(found.splits["train"])
    foreign = replace(train[1], digest=target.digest, rows=target.rows + wrong_rows)
    train[1] = replace(foreign, size_bytes=size_of(foreign, found))
    assert train[1].size_bytes != target.size_bytes
    found = replace(found, splits={**found.splits, "train": tuple(train)})
    await client.create_dataset("others", await client.put_blob(found.to_json()))
    async with asyncio.timeout(20):
        assert digest_of(await client.get_blob(target.digest)) == target.digest


async def test_of_many_data_sets_one_manifest_is_parsed_and_once(client, data, link, monkeypatch):
    manifest = await link(data)
    for number in range(8):
        other = replace(manifest, notes=(f"{number}",))
        await client.create_dataset(f"d{number}", await client.put_blob(other.to_json()))
    read = []

    def counted(blobs, digest):
        read.append(digest)
        return read_manifest(blobs, digest)

    monkeypatch.setattr("storage.links.chunks.read_manifest", counted)
    chunks = await asyncio.gather(*(client.get_blob(digest) for digest in manifest.digests()))
    assert [digest_of(chunk) for chunk in chunks] == list(manifest.digests())
    # The newest gives every chunk, and whoever asks meanwhile waits for the one who parses it.
    assert len(read) == 1


async def test_what_may_not_be_read_any_more_costs_nothing(
    tmp_path, client, service, data, link, monkeypatch
):
    manifest = await link(data)
    await service.stop(0.5)
    flags = {"state": str(tmp_path / "state"), "listen": "127.0.0.1:0", "gc_interval_s": "0"}
    closed = StorageProcess(build(StorageConfig, flags, {}))
    await closed.start()
    async with StorageClient(closed.server.address) as other:
        with pytest.raises(DataLoss, match="reads no files in place") as caught:
            await other.get_blob(manifest.digests()[0])
    assert caught.value.details["cause"] == "LINK_NOT_ALLOWED"
    assert closed.links.makers.pids() == []
    await closed.stop(0.5)


async def test_a_manifest_of_files_that_may_not_be_read_is_refused_unparsed(
    client, data, tmp_path, monkeypatch
):
    outside = tmp_path / "outside.parquet"
    data.rename(outside)
    manifest = await asyncio.to_thread(ingest, outside, IngestOptions(link=True), Digests())
    monkeypatch.setattr("storage.links.manifests.places_of", None)
    digest = await client.put_blob(manifest.to_json())
    with pytest.raises(FailedPrecondition, match="lies in none of the folders"):
        await client.create_dataset("people", digest)


async def test_many_files_are_looked_at_in_parts(client, service, data, link, monkeypatch):
    monkeypatch.setattr("storage.links.making._FILES_AT_ONCE", 2)
    folder = data.with_name("parts")
    folder.mkdir()
    for number in range(5):
        pyarrow.parquet.write_table(table(500, number), folder / f"{number}.parquet")
    parts = []
    check = service.links.makers.check

    def counted(plan, first, stop):
        parts.append((first, stop))
        return check(plan, first, stop)

    monkeypatch.setattr(service.links.makers, "check", counted)
    await link(folder, format="parquet")
    assert parts == [(0, 2), (2, 4), (4, 6)]


async def test_they_go_with_the_data_set_and_the_file_stays(client, data, link):
    manifest = await link(data)
    await client.delete_dataset("people")
    await client.collect_garbage(grace_s=0)
    with pytest.raises(NotFound):
        await client.get_blob(manifest.digests()[0])
    assert data.exists()


async def test_a_file_that_changed_is_named_and_adding_again_heals(client, service, data, link):
    manifest = await link(data)
    digest = manifest.digests()[0]
    data.rename(data.with_name("b.parquet"))
    with pytest.raises(DataLoss) as caught:
        await client.get_blob(digest)
    assert caught.value.reason == "LINKED_DATA_LOST"
    assert caught.value.details == {"dataset": "people@1", "cause": "LINKED_FILE_UNREADABLE"}
    for words in (f"chunk {digest[:12]} of data set people@1", str(data), "add the data set again"):
        assert words in caught.value.message
    pyarrow.parquet.write_table(table(seed=2), data, row_group_size=1500)
    with pytest.raises(DataLoss, match="is not the file that was linked"):
        await client.get_blob(digest)
    # The rows again, at another place: the chunks of the first version are made from there.
    await link(data.with_name("b.parquet"))
    assert digest_of(await client.get_blob(digest)) == digest
    corruptions = "phalanx_storage_corruptions_total"
    assert service.server.registry.get_sample_value(corruptions) == 0


async def test_equal_chunks_come_from_any_of_their_places(client, data, link, monkeypatch):
    rows, folder = 16 * 225, data.with_name("parts")
    folder.mkdir()
    for name in ("a.parquet", "b.parquet"):
        pyarrow.parquet.write_table(table(rows), folder / name, row_group_size=1500)
    manifest = await link(folder, test=None, format="parquet")
    assert len(manifest.digests()) < len(manifest.splits["train"])
    monkeypatch.setattr("storage.links.chunks.MADE_BYTES", 0)
    for name in ("a.parquet", "b.parquet"):
        (folder / name).rename(data.with_name("aside"))
        for chunk in await chunks_of(client, manifest):
            assert digest_of(chunk) in manifest.digests()
        data.with_name("aside").rename(folder / name)
    for name in ("a.parquet", "b.parquet"):
        (folder / name).unlink()
    with pytest.raises(DataLoss, match="no such file"):
        await client.get_blob(manifest.digests()[0])


async def test_what_gave_chunks_before_is_tried_first(client, service, data, link, monkeypatch):
    monkeypatch.setattr("storage.links.chunks.MADE_BYTES", 0)
    manifest = await link(data)
    copy = data.with_name("b.parquet")
    copy.write_bytes(data.read_bytes())
    await link(copy)
    copy.unlink()
    asked = []
    make = service.links.makers.make

    def counted(plan, *place):
        asked.append(plan.files)
        return make(plan, *place)

    monkeypatch.setattr(service.links.makers, "make", counted)
    await client.get_blob(manifest.digests()[0])
    assert asked == [str(copy), str(data)]
    # Neither that chunk nor another one is tried there again.
    for digest in manifest.digests()[:3]:
        await client.get_blob(digest)
    assert asked[2:] == [str(data)] * 3
    # The other one, where this one goes.
    copy.write_bytes(data.read_bytes())
    data.unlink()
    assert digest_of(await client.get_blob(manifest.digests()[0])) == manifest.digests()[0]
    assert asked[5:] == [str(data), str(copy)]


async def test_rows_that_changed_in_place_never_get_out(client, data, link):
    pyarrow.parquet.write_table(
        table(), data, use_dictionary=False, compression="none", write_statistics=False
    )
    manifest = await link(data)
    number = table()["x3"].to_numpy()[2000:2001].tobytes()
    content = data.read_bytes()
    data.write_bytes(content.replace(number, np.float64(7).tobytes()))
    lost = []
    for digest in manifest.digests():
        with contextlib.suppress(DataLoss):
            assert digest_of(await client.get_blob(digest)) == digest
            continue
        lost.append(digest)
    # The chunks beside it are as good as ever.
    assert len(lost) == 1
    with pytest.raises(DataLoss, match=f"the rows in {data} are not what they were"):
        await client.get_blob(lost[0])


async def test_what_may_not_be_linked_is_not_registered(client, data, link, tmp_path):
    outside = tmp_path / "outside.parquet"
    pyarrow.parquet.write_table(table(), outside)
    with pytest.raises(FailedPrecondition) as caught:
        await link(outside)
    assert caught.value.reason == "LINK_NOT_ALLOWED"
    assert f"--link-root {data.parent}" in caught.value.message
    assert str(outside) in caught.value.message
    (data.parent / "in.parquet").symlink_to(outside)
    with pytest.raises(FailedPrecondition, match="lies in none of the folders"):
        await link(data.parent / "in.parquet")
    assert await client.list_datasets() == []


@pytest.mark.parametrize(
    "what", ["path", "ranges", "overlap", "past the files", "missing ranges", "digest", "no chunks"]
)
async def test_manifests_that_do_not_hold_are_refused(client, data, tmp_path, what):
    options = IngestOptions(link=True, chunk_bytes=9000)
    manifest = await asyncio.to_thread(ingest, data, options, Digests())
    links = manifest.links
    first = manifest.splits["train"][0]
    rest = manifest.splits["train"][1:]
    (data.parent / "in.parquet").symlink_to(data)
    file = replace(links.files[0], path=str(data.parent / "in.parquet"))
    wrong = {
        "path": replace(manifest, links=replace(links, files=(file,))),
        "ranges": replace(
            manifest,
            links=replace(links, ranges={"train": ((1, 9), *links.ranges["train"][1:])}),
        ),
        "overlap": replace(
            manifest,
            splits={"train": (first, first, *rest)},
            links=replace(
                links, ranges={"train": (links.ranges["train"][0], *links.ranges["train"])}
            ),
        ),
        "past the files": replace(
            manifest,
            splits={"train": (first, *rest, replace(first, digest=digest_of(b"made up")))},
            links=replace(
                links,
                ranges={"train": (*links.ranges["train"], (links.files[0].rows, ROWS + 1))},
            ),
        ),
        "missing ranges": replace(manifest, links=replace(links, ranges={"train": ()})),
        "digest": replace(
            manifest, splits={"train": (replace(first, digest=digest_of(b"other")), *rest)}
        ),
        "no chunks": replace(
            manifest, splits={"train": ()}, links=replace(links, ranges={"train": ()})
        ),
    }[what]
    digest = await client.put_blob(wrong.to_json())
    with pytest.raises((FailedPrecondition, InvalidArgument)):
        await client.create_dataset("wrong", digest)
    assert await client.list_datasets() == []


@pytest.mark.parametrize("more_bytes", [-1, 1, 10**15])
@pytest.mark.parametrize("split", ["train", "test"])
async def test_a_size_that_is_none_is_refused_as_such(client, data, split, more_bytes):
    options = IngestOptions(link=True, test=0.2, chunk_bytes=9000)
    manifest = await asyncio.to_thread(ingest, data, options, Digests())
    for index in (0, 1, len(manifest.splits[split]) - 1):
        chunks = list(manifest.splits[split])
        size_bytes = chunks[index].size_bytes
        chunks[index] = replace(chunks[index], size_bytes=size_bytes + more_bytes)
        wrong = replace(manifest, splits={**manifest.splits, split: tuple(chunks)})
        with pytest.raises(InvalidArgument) as caught:
            await client.create_dataset("wrong", await client.put_blob(wrong.to_json()))
        (violation,) = caught.value.violations
        assert violation.field == f"manifest.splits.{split}[{index}].size_bytes"
        assert f"it has {size_bytes} bytes" in violation.message
    assert await client.list_datasets() == []


async def test_another_size_of_a_file_is_refused(client, data):
    manifest = await asyncio.to_thread(ingest, data, IngestOptions(link=True), Digests())
    (file,) = manifest.links.files
    file = replace(file, size_bytes=file.size_bytes + 1)
    wrong = replace(manifest, links=replace(manifest.links, files=(file,)))
    with pytest.raises(FailedPrecondition, match=f"it has {file.size_bytes - 1} bytes, not"):
        await client.create_dataset("wrong", await client.put_blob(wrong.to_json()))


async def test_a_wrong_size_in_an_old_manifest_keeps_no_chunk_from_being_read(
    client, service, data, monkeypatch
):
    options = IngestOptions(link=True, chunk_bytes=9000)
    manifest = await asyncio.to_thread(ingest, data, options, Digests())
    chunks = tuple(replace(each, size_bytes=7) for each in manifest.splits["train"])
    wrong = replace(manifest, splits={"train": chunks})

    async def unchecked(_manifest):
        pass

    # As it was registered before sizes were looked at.
    monkeypatch.setattr(service.links, "check", unchecked)
    await client.create_dataset("old", await client.put_blob(wrong.to_json()))
    for digest in manifest.digests():
        assert digest_of(await client.get_blob(digest)) == digest


async def test_more_chunks_than_one_data_set_may_have_are_refused(client, data, link, monkeypatch):
    monkeypatch.setattr("storage.links.manifests.CHUNKS_MAX", 10)
    with pytest.raises(InvalidArgument, match="at most 10: add it with larger chunks") as caught:
        await link(data)
    (violation,) = caught.value.violations
    assert violation.field == "manifest.splits"
    await link(data, chunk_bytes=100_000)


async def test_nothing_is_linked_without_a_folder_for_it(tmp_path, data):
    flags = {"state": str(tmp_path / "other"), "listen": "127.0.0.1:0"}
    service = StorageProcess(build(StorageConfig, flags, {}))
    await service.start()
    client = StorageClient(service.server.address)
    options = IngestOptions(link=True)
    manifest = await asyncio.to_thread(ingest, data, options, Digests())
    digest = await client.put_blob(manifest.to_json())
    with pytest.raises(FailedPrecondition, match="reads no files in place until it is started"):
        await client.create_dataset("people", digest)
    assert service.links.makers.pids() == []
    await client.close()
    await service.stop(0.5)


async def test_a_process_that_was_killed_is_replaced(client, service, data, link):
    manifest = await link(data)
    pids = service.links.makers.pids()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    chunks = await asyncio.gather(*(client.get_blob(digest) for digest in manifest.digests()))
    assert [digest_of(chunk) for chunk in chunks] == list(manifest.digests())
    assert not set(pids) & set(service.links.makers.pids())
    assert len(service.links.makers.pids()) <= 2


async def test_a_chunk_whose_readers_are_killed_is_not_lost(
    client, service, data, link, tmp_path, monkeypatch
):
    manifest = await link(data)
    alive = service.links.makers
    dead = Makers([], 1, program=dying(tmp_path / "log", signal.SIGKILL))
    service.links.making.makers = dead
    async with StorageClient(service.server.address, attempts=1) as once:
        with pytest.raises(Unavailable, match="cannot be made: the process that reads"):
            await once.get_blob(manifest.digests()[0])
    service.links.making.makers = alive
    dead.close()
    digest = manifest.digests()[0]
    assert digest_of(await client.get_blob(digest)) == digest


@contextlib.contextmanager
def held(service, path, monkeypatch):
    """Has chunks of a file take until the end of the block."""
    may_end = threading.Event()
    make = service.links.makers.make

    def slow(plan, *place):
        if plan.files == str(path):
            assert may_end.wait(60)
        return make(plan, *place)

    monkeypatch.setattr(service.links.makers, "make", slow)
    try:
        yield
    finally:
        may_end.set()


async def test_a_data_set_with_slow_files_leaves_a_reader_to_others(
    client, service, data, link, monkeypatch
):
    manifest = await link(data)
    other = data.with_name("b.parquet")
    pyarrow.parquet.write_table(table(seed=2), other)
    others = await link(other, "others")
    with held(service, data, monkeypatch):
        slow = [asyncio.create_task(client.get_blob(digest)) for digest in manifest.digests()]
        async with asyncio.timeout(30):
            for digest, chunk in zip(
                others.digests(), await chunks_of(client, others), strict=True
            ):
                assert digest_of(chunk) == digest
        assert not any(task.done() for task in slow)
    assert [digest_of(chunk) for chunk in await asyncio.gather(*slow)] == list(manifest.digests())


async def test_journals_do_not_wait_for_a_process_that_hangs(client, service, data, link):
    manifest = await link(data)
    (pid,) = service.links.makers.pids()
    digest = manifest.digests()[-1]
    os.kill(pid, signal.SIGSTOP)
    try:
        reading = asyncio.create_task(client.get_blob(digest))
        again = asyncio.create_task(client.get_blob(digest))
        for number in range(20):
            assert await client.append_journal("j", [b"record"]) == number + 1
        assert not reading.done()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert digest_of(await reading) == digest
    assert await again == await reading


async def test_what_is_made_is_kept_up_to_a_limit(client, service, data, link, monkeypatch):
    monkeypatch.setattr("storage.links.chunks.MADE_BYTES", 20_000)
    monkeypatch.setattr("storage.links.chunks.MESSAGE_BYTES", 1000)
    manifest = await link(data)
    # Each drives others out while they are being sent.
    chunks = await asyncio.gather(*(client.get_blob(digest) for digest in manifest.digests()))
    assert [digest_of(chunk) for chunk in chunks] == list(manifest.digests())


NO_PLAN = Plan("1" * 64, b"no plan", "/data/a.parquet")


def test_a_plan_that_is_none_is_told_of(tmp_path):
    makers = Makers([str(tmp_path)], 1)
    with pytest.raises(FailedPrecondition, match="not a data set manifest"):
        makers.check(NO_PLAN, 0, 1)
    makers.close()
    with pytest.raises(Unavailable, match="stops"):
        makers.check(NO_PLAN, 0, 1)


def dying(log, by):
    """A reader that dies of every request."""
    script = (
        f"import os, socket; open({str(log)!r}, 'a').write('x'); asked = socket.socket(fileno=0); "
        f"asked.recv(1); os.kill(os.getpid(), {int(by)})"
    )
    return (sys.executable, "-c", script)


def test_a_file_that_crashes_its_reader_is_told_of(tmp_path):
    log = tmp_path / "log"
    makers = Makers([], 1, program=dying(log, signal.SIGSEGV))
    with pytest.raises(FailedPrecondition, match=r"reads /data/a\.parquet crashed twice"):
        makers.check(NO_PLAN, 0, 1)
    assert log.read_text() == "xx"
    makers.close()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGABRT])
def test_a_reader_that_is_killed_says_nothing_of_its_file(tmp_path, by):
    makers = Makers([], 1, program=dying(tmp_path / "log", by))
    with pytest.raises(Unavailable, match=r"reads /data/a\.parquet ended twice") as caught:
        makers.check(NO_PLAN, 0, 1)
    assert caught.value.reason == "LINKED_FILE_AWAY"
    makers.close()


def test_a_reader_that_is_silent_is_given_up():
    script = "import socket; socket.socket(fileno=0); import time; time.sleep(600)"
    makers = Makers([], 1, program=(sys.executable, "-c", script), timeout_s=0.01)
    with pytest.raises(DeadlineExceeded, match=r"a\.parquet took longer than 0\.01 s"):
        makers.check(NO_PLAN, 0, 1)
    assert makers.pids() == []
    makers.close()

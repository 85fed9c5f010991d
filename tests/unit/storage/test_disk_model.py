"""The model of what a disk holds once the power has failed."""

import errno
import os
import random
import sqlite3

import pytest

from phalanx.testing.disk_model import DiskModel, read_image, write_image
from phalanx.testing.faulty_disk import Fault, FaultyDisk
from phalanx.testing.faulty_sqlite import Unsupported, sqlite_on


@pytest.fixture
def model():
    return DiskModel.of({"folder": None, "folder/file": b"old"})


def test_a_write_is_durable_once_its_file_is_synced(model):
    file = model.find("folder/file")
    model.write(file, 1, b"new")
    assert model.as_it_is()["folder/file"] == b"onew"
    assert model.without_power()["folder/file"] == b"old"
    model.sync(file)
    assert model.without_power()["folder/file"] == b"onew"


def test_a_name_is_durable_once_its_folder_is_synced(model):
    folder = model.find("folder")
    new = model.make(folder, "new", is_folder=False)
    model.write(new, 0, b"content")
    model.sync(new)
    assert "folder/new" not in model.without_power()
    model.sync(folder)
    assert model.without_power()["folder/new"] == b"content"
    model.rename(folder, "new", 0, "moved")
    assert "moved" not in model.without_power()
    model.sync(0)
    assert {"moved", "folder/new"} <= set(model.without_power()), "only one folder was synced"
    model.unlink(folder, "file")
    model.sync(folder)
    assert model.without_power() == {"folder": None, "moved": b"content"}


def test_what_a_failed_sync_should_have_written_is_lost_for_good(model):
    file = model.find("folder/file")
    model.write(file, 0, b"lost")
    model.fail_to_sync(file)
    model.sync(file)
    assert model.as_it_is()["folder/file"] == b"lost"
    assert model.without_power()["folder/file"] == b"old"
    model.write(file, 0, b"found")
    model.sync(file)
    assert model.without_power()["folder/file"] == b"found"


def test_a_torn_write_keeps_whole_sectors(model):
    file = model.find("folder/file")
    before, after = b"a" * 2048, b"b" * 2048
    model.write(file, 0, before)
    model.sync(file)
    model.write(file, 100, after)
    seen = set()
    for seed in range(50):
        content = model.torn(random.Random(seed))["folder/file"]
        sectors = [content[100:512], *(content[at : at + 512] for at in range(512, 2048, 512))]
        assert all(len(set(sector)) == 1 for sector in sectors)
        seen.add(tuple(sector[:1] for sector in sectors))
    assert len(seen) > 8


def test_images_are_written_and_read(model, tmp_path):
    write_image(model.as_it_is(), tmp_path)
    assert read_image(tmp_path) == model.as_it_is()
    assert DiskModel.of(read_image(tmp_path)).without_power() == model.as_it_is()


def test_the_model_follows_the_real_folder_also_through_sqlite(tmp_path):
    disk = FaultyDisk(tmp_path)
    try:
        with sqlite_on(disk):
            disk.make_root(tmp_path / "state")
            folder = disk.open_root(tmp_path / "state")
            file = disk.create_file("upload", folder)
            disk.write(file, b"con")
            disk.write(file, b"tent")
            disk.rename("upload", folder, "blob", folder)
            connection = sqlite3.connect(tmp_path / "state" / "db", isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE t (x)")
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
            seen = disk.model.as_it_is()
            real = read_image(tmp_path)
            real.pop("state/db-shm")
            connection.close()
            disk.close(file)
            disk.close(folder)
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert seen == real
    assert seen["state/blob"] == b"content"
    assert len(seen["state/db-wal"]) > 100_000
    assert {call.path for call in disk.calls if call.name == "sync"} >= {"state/db-wal", "state"}


def test_a_fault_comes_at_its_call_and_space_is_asked_only_of_calls_that_take_some(tmp_path):
    (tmp_path / "old").write_bytes(b"")
    disk = FaultyDisk(tmp_path, Fault(3, errno.ENOSPC, lasting=True))
    folder = disk.open_root(tmp_path)
    file = disk.create_file("file", folder)
    with pytest.raises(OSError, match="injected") as caught:
        disk.write(file, b"four")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "file").read_bytes() == b"fo", "a part of what did not fit"
    assert disk.names(folder)
    disk.unlink("old", folder)
    with pytest.raises(OSError, match="injected"):
        disk.sync(file)
    disk.heal()
    disk.write(file, b"ur")
    assert [call.name for call in disk.fired] == ["write", "sync"]
    disk.end()
    with pytest.raises(OSError, match="ended"):
        disk.names(folder)
    disk.close(file)
    disk.close(folder)
    assert not os.path.exists(tmp_path / "old")

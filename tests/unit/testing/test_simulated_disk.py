"""The disk of the simulator: what was synced stays, all else may be lost or torn."""

import random
from typing import Any

import pytest

from phalanx.testing.simulation.disk import DiskFailed, DiskFull, SimulatedDisk


def after_crashes(written: SimulatedDisk, name: str, seeds: int = 50) -> set[bytes | None]:
    """What restarts may find of a file."""
    found = set()
    for seed in range(seeds):
        disk = SimulatedDisk()
        disk._visible = {key: _copy(file) for key, file in written._visible.items()}
        disk._durable = {key: disk._visible[key] for key in written._durable}
        disk.crash(random.Random(seed))
        found.add(disk.read(name))
    return found


def _copy(file: Any) -> Any:
    return type(file)(bytearray(file.content), file.synced_bytes)


def test_what_was_synced_and_named_stays():
    disk = SimulatedDisk()
    disk.write("upload", b"content")
    disk.sync("upload")
    disk.rename("upload", "blob")
    disk.sync_folder()
    disk.crash(random.Random(1))
    assert (disk.read("blob"), disk.torn, disk.lost) == (b"content", 0, 0)


def test_what_was_not_synced_may_be_torn_anywhere():
    disk = SimulatedDisk()
    disk.write("file", b"synced")
    disk.sync("file")
    disk.sync_folder()
    disk.write("file", b"1234")
    assert after_crashes(disk, "file") == {b"synced" + b"1234"[:kept] for kept in range(5)}


def test_a_name_that_was_not_synced_may_be_gone_and_is_counted():
    disk = SimulatedDisk()
    disk.write("file", b"content")
    disk.sync("file")
    assert after_crashes(disk, "file") == {None, b"content"}
    disk.crash(random.Random(0))
    assert (disk.read("file") is None) == (disk.lost == 1)


def test_writes_that_find_no_room_or_fail_are_counted_and_change_nothing():
    disk = SimulatedDisk()
    disk.full = True
    with pytest.raises(DiskFull):
        disk.write("file", b"content")
    disk.full, disk.failing = False, True
    with pytest.raises(DiskFailed):
        disk.write("file", b"content")
    with pytest.raises(DiskFailed):
        disk.sync_folder()
    assert (disk.names(), disk.refused, disk.failed) == ([], 1, 2)

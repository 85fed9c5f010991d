"""Young blobs stay young: only elapsed time makes them garbage, never a clock that is set."""

import os
from types import SimpleNamespace

import pytest

from phalanx.testing.storage_messages import digest_of
from storage.backends import blob_ages
from storage.backends.directory_blobs import DirectoryBlobs

GRACE_S = 3600.0
CONTENT = b"content"


class Clock:
    """A wall clock that can be set, beside time that goes on."""

    def __init__(self):
        self.elapsed_s = 1000.0
        # Files carry the time of the real one.
        self.offset_s = 0.0
        self.began_s = os.stat(__file__).st_atime

    def monotonic(self):
        return self.elapsed_s

    def time(self):
        return self.began_s + self.elapsed_s + self.offset_s


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(
        blob_ages, "time", SimpleNamespace(monotonic=made.monotonic, time=made.time)
    )
    return made


@pytest.fixture
def start(tmp_path, clock):
    """Starts storage's blobs (again)."""
    opened = []

    def start():
        state = os.open(tmp_path, os.O_RDONLY)
        blobs = DirectoryBlobs(state)
        opened.append((state, blobs))
        return blobs

    yield start
    for state, blobs in opened:
        blobs.close()
        os.close(state)


def put(blobs, clock):
    writer = blobs.writer(len(CONTENT))
    writer.write(CONTENT)
    digest = writer.commit().digest
    set_file_time(blobs, digest, clock.time())
    return digest


def set_file_time(blobs, digest, time_s):
    with blobs._folder(digest[:2]) as folder:
        os.utime(digest, (time_s, time_s), dir_fd=folder)


@pytest.mark.parametrize("jump_s", [2 * GRACE_S, -2 * GRACE_S])
def test_a_jump_of_the_wall_clock_ages_nothing(start, clock, jump_s):
    blobs = start()
    clock.offset_s = jump_s
    before = put(blobs, clock)
    clock.offset_s = 0.0
    assert blobs.remove_if_old(before, GRACE_S) is None
    clock.elapsed_s += GRACE_S - 1
    assert blobs.remove_if_old(before, GRACE_S) is None
    clock.elapsed_s += 1
    assert [blob.age_s for blob in blobs.scan()] == [GRACE_S]
    assert blobs.remove_if_old(before, GRACE_S) == len(CONTENT)


def test_a_touched_blob_is_young_again(start, clock):
    blobs = start()
    digest = put(blobs, clock)
    clock.elapsed_s += GRACE_S
    blobs.touch([digest])
    clock.offset_s = 2 * GRACE_S
    assert blobs.remove_if_old(digest, GRACE_S) is None


def test_after_a_start_nothing_is_older_than_the_process(start, clock):
    """Its predecessor's uploads may be under way, and the clock may have been set in between."""
    digest = put(start(), clock)
    clock.offset_s = 30 * 24 * 3600.0
    blobs = start()
    clock.elapsed_s += GRACE_S - 1
    assert blobs.remove_if_old(digest, GRACE_S) is None
    clock.elapsed_s += 1
    assert blobs.remove_if_old(digest, GRACE_S) == len(CONTENT)


def test_what_is_asked_to_go_at_once_goes_at_once(start, clock):
    blobs = start()
    digest = put(blobs, clock)
    assert blobs.remove_if_old(digest, 0) == len(CONTENT)


def test_a_longer_grace_time_is_remembered_for_as_long(start, clock):
    blobs = start()
    clock.elapsed_s += 40 * 24 * 3600.0
    long_s = 72 * 3600.0
    assert blobs.remove_if_old(put(blobs, clock), long_s) is None
    digest = put(blobs, clock)
    set_file_time(blobs, digest, 0.0)
    clock.elapsed_s += 25 * 3600.0
    blobs._ages.touched(digest_of(b"another"))
    assert blobs.remove_if_old(digest, long_s) is None
    clock.elapsed_s += long_s
    assert blobs.remove_if_old(digest, long_s) == len(CONTENT)


def test_what_is_remembered_of_old_blobs_is_dropped(start, clock):
    blobs = start()
    put(blobs, clock)
    clock.elapsed_s += 25 * 3600.0
    blobs._ages.touched(digest_of(b"another"))
    assert len(blobs._ages._touched_s) == 1

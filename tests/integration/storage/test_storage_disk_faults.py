"""A sweep of ``bench.reliability.disk_faults`` at some calls, and the defects that it must find.

All calls are broken by ``python -m bench.reliability disk_errors disk_full disk_crashes``.
"""

import contextlib
import sys

import pytest

from bench.reliability.disk_faults import CRASHES, ERRORS, FULL, NO_POWER_AFTER_SYNC, sweep
from bench.reliability.disk_sweep import Sweep, working_folder
from phalanx.testing.faulty_disk import FaultyDisk
from phalanx.testing.faulty_sqlite import Unsupported, sqlite_on
from storage.backends import files
from storage.backends.directory_blobs import DirectoryBlobs
from storage.backends.sqlite import database as database_module

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _supported(tmp_path):
    try:
        with sqlite_on(FaultyDisk(tmp_path)):
            pass
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("kind", [*ERRORS, *FULL, *CRASHES])
def test_one_call_in_many_fails_and_nothing_is_lost(kind):
    offset, step = {
        NO_POWER_AFTER_SYNC: (12, 30),
        "crash in a start after a crash": (3, 101),
        "ENOSPC once in a start after a crash": (3, 101),
    }.get(kind, (5, 131))
    tally = sweep(kind, range(offset, sys.maxsize, step))
    assert tally.failures == []
    assert tally.faults >= 1
    assert tally.restarts >= 1
    assert tally.stale_writes > 0
    assert tally.stale_writes_accepted == 0


def test_a_first_start_that_cannot_log_ahead_is_no_start():
    """SQLite would go on with another journal, which loses the last commit with the power."""
    with working_folder() as folder:
        swept = Sweep(folder)
        calls = [(call.name, call.path) for call in swept.record().calls]
        first_of_the_log = calls.index(("create", "state/metadata.sqlite3-wal")) + 1
        swept.fail_each_call("EIO once", range(first_of_the_log - 16, first_of_the_log + 2))
        assert swept.tally.failures == []
        assert swept.tally.calls["sync"] >= 3


def test_a_start_that_fails_at_its_end_lets_go_of_the_folder():
    with working_folder() as folder:
        swept = Sweep(folder)
        started = swept.record().started_calls
        swept.fail_each_call("EIO once", range(started - 10, started + 1))
        assert swept.tally.failures == []
        assert swept.tally.calls["open"] >= 2, "a connection to read with is opened in between"


def test_every_call_of_a_blob_and_of_its_registration():
    with working_folder() as folder:
        swept = Sweep(folder)
        recording = swept.record()
        acts = (5, 6)
        numbers = [n for n, done in enumerate(recording.acts_done, 1) if done in acts]
        assert {recording.calls[n - 1].name for n in numbers} >= {
            "create",
            "write",
            "sync",
            "rename",
        }
        chosen = range(numbers[0], numbers[-1] + 1)
        swept.fail_each_call("EIO once", chosen)
        swept.crash_at_each_call(recording, chosen)
    assert swept.tally.failures == []
    assert swept.tally.faults > len(numbers)
    assert swept.tally.processes_ended > 2


def no_sync_of_folders(monkeypatch):
    publish = DirectoryBlobs.publish

    def without(self, upload, digest, size_bytes):
        sync, self._disk.sync = self._disk.sync, lambda descriptor: None
        try:
            publish(self, upload, digest, size_bytes)
        finally:
            self._disk.sync = sync

    monkeypatch.setattr(DirectoryBlobs, "publish", without)


def no_writing_again(monkeypatch):
    monkeypatch.setattr(files.StateFolder, "write_again", lambda self, name: None)


def no_waiting_for_the_log(monkeypatch):
    real = database_module.Database._open

    def opened(self):
        connection = real(self)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    monkeypatch.setattr(database_module.Database, "_open", opened)


def no_look_at_the_outcome_of_a_sync(monkeypatch):
    real = FaultyDisk.sync

    def sync(self, descriptor):
        with contextlib.suppress(OSError):
            real(self, descriptor)

    monkeypatch.setattr(FaultyDisk, "sync", sync)


def no_look_at_the_outcome_of_a_commit(monkeypatch):
    monkeypatch.setattr(database_module, "_translated", lambda error: None)


@pytest.mark.parametrize(
    ("defect", "kind", "first_act", "last_act"),
    [
        (no_sync_of_folders, "crash", 4, 5),
        (no_waiting_for_the_log, "crash", 1, 2),
        (no_writing_again, NO_POWER_AFTER_SYNC, 0, 3),
        (no_look_at_the_outcome_of_a_sync, "EIO once", 4, 4),
        (no_look_at_the_outcome_of_a_commit, "ENOSPC once", 1, 1),
    ],
)
def test_a_planted_defect_is_found(defect, kind, first_act, last_act, monkeypatch):
    with working_folder() as folder:
        recording = Sweep(folder).record()
    numbers = recording.syncs() if kind == NO_POWER_AFTER_SYNC else range(1, len(recording.calls))
    chosen = [
        position
        for position, number in enumerate(numbers, 1)
        if number > recording.started_calls
        and first_act <= recording.acts_done[number - 1] <= last_act
    ]
    defect(monkeypatch)
    tally = sweep(kind, range(chosen[0], chosen[-1] + 1))
    assert tally.failures

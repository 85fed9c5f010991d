"""fsync that fails for real, and two processes that want one state folder."""

import shutil
import subprocess

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import PhalanxError, Unavailable
from phalanx.testing.storage_messages import digest_of
from phalanx.testing.storage_process import StorageProcess

EXIT_DISK_FAILED = 74

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("embedded_only")]


def strace(*options):
    """The command that injects a fault, or skips the test where that is not possible."""
    path = shutil.which("strace")
    command = [path or "strace", "-f", "-qq", "-o", "/dev/null", *options]
    if path is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("strace, which injects the failures, is not there or not allowed")
    return command


def test_a_failed_fsync_is_never_acknowledged_and_ends_the_process(tmp_path):
    """When the journal's fsync fails the process ends; the next one serves what was promised."""
    state = tmp_path / "state"
    with StorageProcess(state) as storage, SyncStorageClient(storage.address) as client:
        for number in range(10):
            client.append_journal("control", [b"%d" % number], expected_sequence=number)
        storage.stop()
    # fdatasync is what SQLite calls for its log; the first calls belong to the start.
    wrapper = strace("-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=9+")
    acknowledged = 10
    with StorageProcess(state, wrapper=wrapper) as storage:
        with SyncStorageClient(storage.address, timeout_s=10, attempts=1) as client:
            for number in range(10, 50):
                try:
                    client.append_journal("control", [b"%d" % number], expected_sequence=number)
                except Unavailable:
                    break
                acknowledged += 1
            else:
                pytest.fail("no fsync failed")
        assert storage.wait() == EXIT_DISK_FAILED
        assert "disk_failed" in storage.log()
    with StorageProcess(state) as storage, SyncStorageClient(storage.address) as client:
        found = client.read_journal("control")
        assert [record.payload for record in found][:acknowledged] == [
            b"%d" % number for number in range(acknowledged)
        ]
        assert len(found) <= acknowledged + 1
        client.append_journal("control", [b"goes on"], expected_sequence=len(found))


def stored(client, content):
    """Put a blob once; return what storage acknowledged, nothing where its disk failed."""
    try:
        return [client.put_blob(content)]
    except Unavailable as error:
        reason = error.reason
    assert reason == "IO_ERROR"
    assert client.missing_blobs([digest_of(content)])
    return []


def test_a_blob_whose_fsync_fails_is_not_acknowledged_and_the_service_goes_on(tmp_path):
    state = tmp_path / "state"
    StorageProcess(state).close()
    # Calls are counted per thread; the sixth is after those of a start that finds a log.
    wrapper = strace("-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=6")
    with (
        StorageProcess(state, wrapper=wrapper) as storage,
        SyncStorageClient(storage.address, attempts=1) as client,
    ):
        failures = 0
        for number in range(60):
            content = b"content %d" % number
            # The next try may meet another thread, whose sixth call fails as well.
            while digest_of(content) not in stored(client, content):
                failures += 1
                assert failures < 100, "it never stores anything again"
            assert client.get_blob(digest_of(content)) == content
        assert failures, "no fsync failed"
        assert list((state / "uploads").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "renameat,rename,renameat2"])
@pytest.mark.parametrize("when", [1, 2])
def test_killed_inside_the_steps_of_a_put(tmp_path, call, when):
    """SIGKILL at the fsync or at the rename of an upload: the blob is whole or not there."""
    state = tmp_path / "state"
    with StorageProcess(state) as storage, SyncStorageClient(storage.address) as client:
        client.put_blob(b"before")
        storage.stop()
    trace = f"trace={call}"
    skipped = {"fsync": 4}.get(call, 1)
    inject = f"inject={call}:signal=KILL:when={when + skipped}"
    with StorageProcess(state, wrapper=strace("-e", trace, "-e", inject)) as storage:
        with SyncStorageClient(storage.address, attempts=1, timeout_s=10) as client:
            acknowledged = []
            for number in range(80):
                try:
                    acknowledged.append(client.put_blob(b"content %d" % number))
                except PhalanxError:
                    break
            else:
                pytest.fail("it never was killed")
        storage.wait()
    with StorageProcess(state) as storage, SyncStorageClient(storage.address) as client:
        assert list((state / "uploads").iterdir()) == []
        assert client.get_blob(digest_of(b"before")) == b"before"
        for digest in acknowledged:
            assert digest_of(client.get_blob(digest)) == digest
        for path in (state / "blobs").glob("*/*"):
            assert digest_of(path.read_bytes()) == path.name
        client.put_blob(b"after")


def test_a_second_process_on_the_same_state_refuses(tmp_path):
    state = tmp_path / "state"
    with StorageProcess(state) as first, StorageProcess(state, start=False) as second:
        second.spawn()
        assert second.wait() == 2
        assert f"in use by another storage process (pid {first.pid})" in second.log()
        with SyncStorageClient(first.address) as client:
            client.append_journal("control", [b"undisturbed"])
        first.kill()
        second.start()
        with SyncStorageClient(second.address) as client:
            assert [r.payload for r in client.read_journal("control")] == [b"undisturbed"]


def test_a_port_in_use_is_named(tmp_path):
    with (
        StorageProcess(tmp_path / "one") as first,
        StorageProcess(tmp_path / "two", listen=first.address, start=False) as second,
    ):
        second.spawn()
        assert second.wait() == 2
        assert first.address in second.log()
        assert "in use" in second.log()

"""Blobs as files: crashes, torn writes, full and failing disks, planted links."""

import errno
import os
import random
import threading

import pytest

from phalanx.errors import DataLoss, NotFound, PhalanxError, ResourceExhausted, Unavailable
from phalanx.testing.storage_messages import append, digest_of, read
from storage.backends.directory_blobs import DirectoryBlobs
from storage.backends.sqlite import open_embedded_backend

SECTOR = 512


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "state"
    root.mkdir()
    return root


class Opened:
    """A DirectoryBlobs and its folder, opened as often as a test likes."""

    def __init__(self, root, **options):
        self.root = root
        self._options = options
        self._open = []

    def again(self):
        state_fd = os.open(self.root, os.O_RDONLY)
        blobs = DirectoryBlobs(state_fd, **self._options)
        self._open.append((state_fd, blobs))
        return blobs

    def close(self):
        for state_fd, blobs in self._open:
            blobs.close()
            os.close(state_fd)


@pytest.fixture
def opened(root):
    opened = Opened(root)
    yield opened
    opened.close()


def put(blobs, content):
    writer = blobs.writer(len(content))
    try:
        writer.write(content)
        return writer.commit().digest
    finally:
        writer.abort()


def get(blobs, digest):
    reader = blobs.open(digest)
    try:
        return b"".join(reader.chunks(0, reader.size_bytes, 4096))
    finally:
        reader.close()


def path_of(root, digest):
    return root / "blobs" / digest[:2] / digest


def test_an_upload_cut_off_at_any_sector_leaves_nothing(root, opened):
    content = random.Random(1).randbytes(16 * SECTOR + 100)
    old = put(opened.again(), b"old")
    for size in range(0, len(content) + 1, SECTOR):
        (root / "uploads" / f"cut-at-{size}").write_bytes(content[:size])
        blobs = opened.again()
        assert os.listdir(root / "uploads") == []
        assert blobs.sizes([digest_of(content)]) == {}
        assert get(blobs, old) == b"old"


def test_a_stored_blob_cut_off_at_any_sector_is_found_out(root, opened):
    content = random.Random(2).randbytes(16 * SECTOR + 100)
    blobs = opened.again()
    digest = put(blobs, content)
    for size in range(0, len(content), SECTOR):
        path_of(root, digest).write_bytes(content[:size])
        with pytest.raises(DataLoss):
            get(blobs, digest)
    path_of(root, digest).write_bytes(content)
    assert get(blobs, digest) == content


def test_a_file_cut_off_while_it_is_read_is_found_out(root, opened):
    content = bytes(100_000)
    blobs = opened.again()
    digest = put(blobs, content)
    reader = blobs.open(digest)
    chunks = reader.chunks(0, len(content), 10_000)
    next(chunks)
    os.truncate(path_of(root, digest), 50_000)
    with pytest.raises(DataLoss):
        list(chunks)
    reader.close()


def test_every_single_bit_flip_is_detected(root, opened):
    content = random.Random(3).randbytes(1024)
    blobs = opened.again()
    digest = put(blobs, content)
    descriptor = os.open(path_of(root, digest), os.O_WRONLY)
    detected = 0
    for bit in range(len(content) * 8):
        place, value = bit // 8, content[bit // 8]
        os.pwrite(descriptor, bytes([value ^ (1 << (bit % 8))]), place)
        try:
            get(blobs, digest)
        except DataLoss:
            detected += 1
        os.pwrite(descriptor, bytes([value]), place)
    os.close(descriptor)
    assert detected == 8192
    assert get(blobs, digest) == content


def test_bit_flips_of_a_checkpoint_are_detected(root, opened):
    generator = random.Random(4)
    content = generator.randbytes(64 * 1024)
    blobs = opened.again()
    digest = put(blobs, content)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path_of(root, digest).write_bytes(damaged)
        with pytest.raises(DataLoss):
            get(blobs, digest)


class Syncs:
    """Stands in for os.fsync: fails on the calls that a test chooses and remembers descriptors."""

    def __init__(self, monkeypatch):
        self._real = os.fsync
        self.failing = set()
        self.calls = []
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.calls.append((descriptor, os.fstat(descriptor).st_ino))
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        if kind in self.failing:
            raise OSError(errno.EIO, "injected")
        self._real(descriptor)


def test_a_failed_fsync_of_the_file_is_never_acknowledged_nor_repeated(root, opened, monkeypatch):
    blobs = opened.again()
    syncs = Syncs(monkeypatch)
    syncs.failing.add("file")
    with pytest.raises(Unavailable) as caught:
        put(blobs, b"content")
    assert caught.value.reason == "IO_ERROR"
    assert len(syncs.calls) == 1
    assert os.listdir(root / "uploads") == []
    with pytest.raises(NotFound):
        blobs.open(digest_of(b"content"))
    syncs.failing.clear()
    put(blobs, b"content")
    assert len(syncs.calls) == 1 + 2, "one file that failed; a new file and its folder"
    assert get(blobs, digest_of(b"content")) == b"content"


def test_a_failed_fsync_of_the_folder_leaves_the_blob_invisible(opened, monkeypatch):
    blobs = opened.again()
    digest = digest_of(b"content")
    assert blobs.sizes([digest]) == {}
    syncs = Syncs(monkeypatch)
    syncs.failing.add("folder")
    with pytest.raises(Unavailable):
        put(blobs, b"content")
    assert blobs.sizes([digest]) == {}
    assert blobs.touch([digest]) == {}
    syncs.failing.clear()
    put(blobs, b"content")
    assert blobs.sizes([digest]) == {digest: 7}
    assert blobs.usage_bytes() == 7


def test_what_a_killed_process_renamed_is_synced_before_anyone_relies_on_it(
    root, opened, monkeypatch
):
    digest = put(opened.again(), b"content")
    blobs = opened.again()
    syncs = Syncs(monkeypatch)
    syncs.failing.add("folder")
    for _ in range(2):
        with pytest.raises(Unavailable):
            blobs.sizes([digest])
    syncs.failing.clear()
    assert blobs.sizes([digest]) == {digest: 7}
    assert syncs.calls[-1][1] == os.stat(root / "blobs" / digest[:2]).st_ino
    calls = len(syncs.calls)
    blobs.touch([digest])
    assert len(syncs.calls) == calls, "once is enough"


def test_a_blob_is_visible_only_once_its_folder_is_synced(opened, monkeypatch):
    blobs = opened.again()
    digest = digest_of(b"content")
    assert blobs.sizes([digest]) == {}
    seen = []
    real = os.fsync

    def fsync(descriptor):
        seen.append(dict(blobs.sizes([digest])))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    put(blobs, b"content")
    assert seen == [{}, {}]
    assert blobs.sizes([digest]) == {digest: 7}
    put(blobs, b"content")
    assert seen[2:] == [{digest: 7}, {digest: 7}], "a stored blob vanished while put again"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_during_an_upload(root, opened, monkeypatch, number):
    blobs = opened.again()
    old = put(blobs, b"old")
    real = os.write

    def write(descriptor, data):
        raise OSError(number, "injected")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(ResourceExhausted) as caught:
        put(blobs, b"content")
    assert caught.value.reason == "DISK_FULL"
    assert os.listdir(root / "uploads") == []
    assert get(blobs, old) == b"old"
    monkeypatch.setattr(os, "write", real)
    assert get(blobs, put(blobs, b"content")) == b"content"


def test_writes_that_take_a_part_are_continued(opened, monkeypatch):
    blobs = opened.again()
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:7])))
    content = random.Random(5).randbytes(1000)
    assert get(blobs, put(blobs, content)) == content


def test_the_reserve_is_kept_free(root):
    opened = Opened(root, reserve_bytes=2**62)
    blobs = opened.again()
    with pytest.raises(ResourceExhausted) as caught:
        put(blobs, b"content")
    assert caught.value.reason == "DISK_FULL"
    opened.close()


def test_an_upload_larger_than_the_disk_is_refused_at_its_beginning(opened):
    with pytest.raises(ResourceExhausted):
        opened.again().writer(2**60)


def test_a_planted_link_to_a_folder_is_not_followed(root, tmp_path, opened):
    blobs = opened.again()
    outside = tmp_path / "outside"
    outside.mkdir()
    digest = digest_of(b"content")
    (root / "blobs" / digest[:2]).rmdir()
    (root / "blobs" / digest[:2]).symlink_to(outside)
    (outside / digest).write_bytes(b"content")
    for use in (
        lambda: blobs.open(digest),
        lambda: blobs.sizes([digest]),
        lambda: blobs.remove_if_old(digest, 0),
        lambda: put(blobs, b"content"),
        lambda: list(blobs.scan()),
    ):
        with pytest.raises((DataLoss, Unavailable)):
            use()
    assert os.listdir(outside) == [digest]


def test_a_planted_link_to_a_file_is_not_followed_and_replaced(root, tmp_path, opened):
    blobs = opened.again()
    secret = tmp_path / "secret"
    secret.write_bytes(b"content")
    digest = digest_of(b"content")
    path_of(root, digest).symlink_to(secret)
    with pytest.raises(DataLoss):
        blobs.open(digest)
    assert blobs.sizes([digest]) == {}
    put(blobs, b"content")
    assert not path_of(root, digest).is_symlink()
    assert get(blobs, digest) == b"content"
    assert secret.read_bytes() == b"content"


def test_a_planted_pipe_does_not_hang(root, opened):
    blobs = opened.again()
    digest = digest_of(b"content")
    os.mkfifo(path_of(root, digest))
    assert blobs.sizes([digest]) == {}
    with pytest.raises(DataLoss):
        get(blobs, digest)


def test_foreign_files_are_left_alone(root, opened):
    blobs = opened.again()
    (root / "blobs" / "aa" / "notes.txt").write_text("mine")
    assert list(blobs.scan()) == []
    assert (root / "blobs" / "aa" / "notes.txt").exists()


def test_removal_and_upload_at_the_same_time_never_lose_the_upload(opened):
    """Whoever was told "stored" after the removal began finds the blob, or was told to upload."""
    blobs = opened.again()
    digest = digest_of(b"content")
    removed = 0
    for _ in range(200):
        put(blobs, b"content")
        start = threading.Barrier(2)
        results = []

        def remove(start=start, results=results):
            start.wait()
            results.append(blobs.remove_if_old(digest, 0))

        thread = threading.Thread(target=remove)
        thread.start()
        start.wait()
        touched = blobs.touch([digest])
        thread.join()
        removed += results[0] is not None
        if results[0] is None:
            assert blobs.sizes([digest]) == {digest: 7}
        assert touched in ({}, {digest: 7})
    assert removed


def fuzzed_name(generator):
    parts = [
        "..",
        ".",
        "/",
        "\\",
        "\0",
        "%2e",
        "a",
        "blobs",
        "uploads",
        "A",
        "-",
        "\n",
        "~",
        "lock",
    ]
    if generator.random() < 0.7:
        return "".join(generator.choice(parts) for _ in range(generator.randrange(1, 7)))
    if generator.random() < 0.5:
        return "".join(generator.choice("0123456789abcdef/.") for _ in range(64))
    return "".join(chr(generator.randrange(0xD7FF)) for _ in range(generator.randrange(80)))


def snapshot(folder):
    found = {}
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def test_ten_thousand_fuzzed_keys_never_leave_the_root(tmp_path):
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / "a" / "lock").write_bytes(b"x")
    state = outside / "state"
    backend = open_embedded_backend(state)
    inside = set(os.listdir(state))
    before = {path: facts for path, facts in snapshot(outside).items() if "/state" not in path}
    generator = random.Random(6)
    refused = 0
    for _ in range(10_000):
        name = fuzzed_name(generator)
        try:
            generator.choice(
                (
                    lambda name=name: backend.blobs.open(name),
                    lambda name=name: backend.blobs.remove_if_old(name, 0),
                    lambda name=name: backend.journals.append(append(name, b"x")),
                    lambda name=name: list(backend.journals.read(read(name))),
                    lambda name=name: backend.leases.get(name),
                    lambda name=name: backend.jobs.list_checkpoints(name),
                )
            )()
        except PhalanxError:
            refused += 1
    assert refused > 5000
    after = {path: facts for path, facts in snapshot(outside).items() if "/state" not in path}
    assert after == before
    assert set(os.listdir(state)) <= inside | {"metadata.sqlite3-wal", "metadata.sqlite3-shm"}
    assert os.listdir(state / "uploads") == []
    backend.close()

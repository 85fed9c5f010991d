"""An object store that fails or is slow: what is not a whole blob counts for nothing."""

import contextlib
import sys
import threading
from uuid import uuid4

import pytest

from phalanx.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from phalanx.testing.object_server import Fault
from phalanx.testing.storage_messages import append, digest_of
from storage.backends import s3
from storage.backends.object_blobs import ARRIVING_S, DOOMED_S
from storage.backends.opening import Places, open_backend
from storage.backends.s3 import PART_BYTES, open_s3
from storage.backends.sql.objects import load_blob

GUARD_S = 60
LARGE = bytes(range(256)) * (2 * PART_BYTES // 256) + b"end"
"""Goes up in three parts."""


class Storage:
    """SQLite and a bucket, with a clock that the test sets."""

    def __init__(self, server, folder):
        self.server = server
        self.bucket = uuid4().hex
        self.now_s = 0.0
        self.places = Places(folder, "", server.create_bucket(self.bucket) + "/phalanx")
        self.backend = open_backend(self.places, clock_s=lambda: self.now_s)

    def put(self, content):
        writer = self.backend.blobs.writer()
        try:
            writer.write(content)
            return writer.commit().digest
        finally:
            writer.abort()

    def get(self, digest):
        with contextlib.closing(self.backend.blobs.open(digest)) as reader:
            return b"".join(reader.chunks(0, reader.size_bytes, 1024 * 1024))

    def keys(self):
        """Objects that are there, but for the note to whom they belong."""
        return [key for key in self.server.keys(self.bucket) if "/blobs/" in key]

    def later(self, seconds):
        """Let time pass and have storage keep house."""
        self.backend.keep_time()
        self.now_s += seconds
        self.backend.references.reclaim()

    def close(self):
        self.server.disturb()
        self.backend.close()


@pytest.fixture
def storage(object_server, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "_RETRIES", 1)
    storage = Storage(object_server, tmp_path / "state")
    yield storage
    storage.close()


def test_a_large_blob_goes_up_in_parts_and_comes_back(storage):
    digest = storage.put(LARGE)
    assert storage.get(digest) == LARGE
    (key,) = storage.keys()
    assert len(storage.server.get(storage.bucket, key)) == len(LARGE)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_that_fails_fails_the_upload_and_nothing_counts(storage, number):
    storage.server.disturb(Fault("PUT", query=f"partNumber={number}", status=500))
    with pytest.raises(Unavailable) as caught:
        storage.put(LARGE)
    assert caught.value.reason == "OBJECT_STORE_UNREACHABLE"
    assert storage.backend.blobs.sizes([digest_of(LARGE)]) == {}
    assert list(storage.backend.blobs.scan()) == []
    storage.server.disturb()
    assert storage.get(storage.put(LARGE)) == LARGE
    storage.later(DOOMED_S)
    assert len(storage.keys()) == 1
    assert not storage.server.parts_without_end(storage.bucket)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", query="partNumber=2", status=503, times=1),
        Fault("POST", query="uploads", status=500, times=1),
        Fault("POST", query="uploadId", status=500, times=1),
        Fault("GET", path="/blobs/", status=500, times=1),
    ],
)
def test_what_fails_once_is_tried_again(storage, fault):
    storage.server.disturb(fault)
    assert storage.get(storage.put(LARGE)) == LARGE


def test_whether_the_object_store_is_there_can_be_asked(storage):
    storage.backend.check()
    storage.server.disturb(Fault("GET", status=500))
    with pytest.raises(Unavailable) as caught:
        storage.backend.check()
    assert caught.value.reason == "OBJECT_STORE_UNREACHABLE"
    storage.server.disturb()
    storage.backend.check()


@pytest.mark.parametrize("content", [b"small", LARGE])
def test_an_upload_that_is_aborted_leaves_no_object(storage, content):
    kept = storage.put(b"kept")
    writer = storage.backend.blobs.writer()
    writer.write(content)
    writer.abort()
    storage.later(DOOMED_S)
    assert len(storage.keys()) == 1
    assert not storage.server.parts_without_end(storage.bucket)
    assert storage.get(kept) == b"kept"


def test_an_upload_whose_process_ended_is_given_up(storage):
    """It had sent everything and was killed before it could say so."""
    writer = storage.backend.blobs.writer()
    writer.write(b"content")
    writer._writer.close()
    storage.later(ARRIVING_S - 1)
    assert len(storage.keys()) == 1
    storage.later(1)
    with pytest.raises(Unavailable, match="given up"):
        writer._register(writer._key, digest_of(b"content"), 7)
    storage.later(DOOMED_S)
    assert storage.keys() == []


def test_what_is_removed_can_be_read_to_its_end(storage):
    digest = storage.put(LARGE)
    reader = storage.backend.blobs.open(digest)
    chunks = reader.chunks(0, len(LARGE), 1024 * 1024)
    received = [next(chunks)]
    assert storage.backend.blobs.remove_if_old(digest, 0) == len(LARGE)
    with pytest.raises(NotFound):
        storage.backend.blobs.open(digest)
    storage.later(DOOMED_S - 1)
    assert b"".join([*received, *chunks]) == LARGE
    reader.close()
    storage.later(DOOMED_S)
    assert storage.keys() == []


def test_what_is_put_again_while_it_is_removed_stays(storage):
    """The new upload has an object of its own, which the removal of the old one cannot meet."""
    digest = storage.put(b"content")
    assert storage.backend.blobs.remove_if_old(digest, 0) == 7
    assert storage.put(b"content") == digest
    storage.later(DOOMED_S)
    assert storage.get(digest) == b"content"
    assert len(storage.keys()) == 1


def test_objects_that_cannot_be_removed_are_removed_later(storage):
    digest = storage.put(b"content")
    storage.backend.blobs.remove_if_old(digest, 0)
    storage.server.disturb(Fault("POST", query="delete", status=500), Fault("DELETE", status=500))
    with pytest.raises(Unavailable):
        storage.later(DOOMED_S)
    storage.server.disturb()
    storage.later(0)
    assert storage.keys() == []


def test_an_object_that_is_gone_is_damage(storage):
    digest = storage.put(b"content")
    row = storage.backend.catalog._database.read(lambda found: load_blob(found, digest))
    open_s3(storage.places.blobs_url).delete([row.key])
    with pytest.raises(DataLoss) as caught:
        storage.get(digest)
    assert caught.value.reason == "BLOB_CORRUPT"
    assert storage.backend.blobs.sizes([digest]) == {}
    storage.put(b"content")
    assert storage.get(digest) == b"content"


def test_journals_do_not_wait_for_a_slow_object_store(storage):
    storage.server.disturb(Fault("PUT", path="/blobs/", delay_s=20.0, times=1))
    uploads = threading.Thread(target=lambda: storage.put(b"content"))
    uploads.start()
    for _ in range(50):
        storage.backend.journals.append(append("s", b"record"))
    assert uploads.is_alive()
    storage.server.disturb()
    uploads.join(GUARD_S)
    assert storage.get(digest_of(b"content")) == b"content"


def test_what_is_stored_is_asked_of_no_object_store(storage):
    digest = storage.put(b"content")
    storage.server.disturb(Fault(status=500))
    assert storage.backend.blobs.sizes([digest]) == {digest: 7}
    assert storage.backend.blobs.touch([digest]) == {digest: 7}
    assert [blob.digest for blob in storage.backend.blobs.scan()] == [digest]
    with pytest.raises(Unavailable):
        storage.get(digest)
    storage.server.disturb()
    # It was away, not wrong.
    assert storage.get(digest) == b"content"


def test_a_bucket_that_cannot_be_used_is_told_at_the_start(storage, tmp_path):
    storage.server.disturb(Fault(status=403))
    with pytest.raises(FailedPrecondition, match="object store") as caught:
        open_backend(Places(tmp_path / "other", "", f"s3://{storage.bucket}/other"))
    assert caught.value.reason == "STATE_UNUSABLE"


def test_a_bucket_belongs_to_one_database(storage, tmp_path):
    with pytest.raises(FailedPrecondition, match="another database") as caught:
        open_backend(Places(tmp_path / "other", "", storage.places.blobs_url))
    assert caught.value.reason == "BLOBS_ELSEWHERE"


def test_a_database_belongs_to_one_bucket(storage):
    storage.backend.close()
    elsewhere = f"s3://{storage.bucket}/elsewhere"
    for places in (Places(storage.places.state, "", elsewhere), Places(storage.places.state)):
        with pytest.raises(FailedPrecondition) as caught:
            open_backend(places)
        assert caught.value.reason == "BLOBS_ELSEWHERE"
    assert storage.server.keys(storage.bucket) == ["phalanx/phalanx-owner"]
    open_backend(storage.places).close()


def test_a_folder_with_a_database_of_its_own_is_nobody_elses(postgres_server, tmp_path):
    open_backend(Places(tmp_path / "embedded")).close()
    url = postgres_server.create_database(f"owner-{uuid4().hex}")
    with pytest.raises(FailedPrecondition, match="another database"):
        open_backend(Places(tmp_path / "embedded", url))
    open_backend(Places(tmp_path / "blobs", url)).close()
    for places in (Places(tmp_path / "blobs"), Places(tmp_path / "empty", url)):
        with pytest.raises(FailedPrecondition) as caught:
            open_backend(places)
        assert caught.value.reason == "BLOBS_ELSEWHERE"
    open_backend(Places(tmp_path / "blobs", url)).close()


def test_a_state_folder_that_has_blobs_stays_with_them(object_server, tmp_path):
    backend = open_backend(Places(tmp_path))
    backend.journals.append(append("s", digest_of(b"named").encode()))
    backend.close()
    bucket = object_server.create_bucket(uuid4().hex)
    with pytest.raises(FailedPrecondition, match="state folder"):
        open_backend(Places(tmp_path, "", bucket))
    open_backend(Places(tmp_path)).close()


@pytest.mark.parametrize(
    ("module", "extra", "urls"),
    [
        ("psycopg", "postgres", ("postgresql://127.0.0.1:1/x", "s3://bucket")),
        ("obstore", "s3", ("", "s3://bucket")),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, module, extra, urls):
    for name in ("storage.backends.postgres.database", "storage.backends.s3"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FailedPrecondition, match=rf"pip install 'phalanx\[{extra}\]'") as caught:
        open_backend(Places(tmp_path, *urls))
    assert caught.value.reason == "EXTRA_MISSING"

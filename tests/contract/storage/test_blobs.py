"""BlobStore: content addressing, verification, age."""

import random
import threading

import pytest

from phalanx.errors import DataLoss, InvalidArgument, NotFound
from phalanx.testing.storage_messages import digest_of

EMPTY = digest_of(b"")


def content_of(backend, digest, chunk_bytes=1000):
    reader = backend.blobs.open(digest)
    try:
        return b"".join(reader.chunks(0, reader.size_bytes, chunk_bytes))
    finally:
        reader.close()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 300_000])
def test_what_is_put_comes_back(backend, put, size):
    content = random.Random(size).randbytes(size)
    assert content_of(backend, put(content)) == content


def test_blobs_survive_reopening(harness, put):
    digest = put(b"content")
    harness.reopen()
    assert content_of(harness.backend, digest) == b"content"
    assert harness.backend.blobs.usage_bytes() == 7


def test_the_same_content_twice_is_one_blob(backend, put):
    assert put(b"content") == put(b"content")
    assert [blob.size_bytes for blob in backend.blobs.scan()] == [7]
    assert backend.blobs.usage_bytes() == 7


def test_chunks_of_an_upload_are_joined(backend):
    writer = backend.blobs.writer(6)
    for chunk in (b"ab", b"", memoryview(b"cd"), bytearray(b"ef")):
        writer.write(chunk)
    assert content_of(backend, writer.commit().digest) == b"abcdef"


@pytest.mark.parametrize(
    ("offset", "length", "expected"), [(0, 4, b"0123"), (3, 4, b"3456"), (9, 1, b"9"), (4, 0, b"")]
)
def test_parts(backend, put, offset, length, expected):
    reader = backend.blobs.open(put(b"0123456789"))
    assert b"".join(reader.chunks(offset, length, 3)) == expected
    reader.close()


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (10, 1), (-1, 2), (5, -1), (2**62, 2**62)])
def test_parts_outside_are_refused(backend, put, offset, length):
    reader = backend.blobs.open(put(b"0123456789"))
    with pytest.raises(InvalidArgument, match="not all inside"):
        list(reader.chunks(offset, length, 3))
    reader.close()


def test_an_unknown_blob_is_not_found(backend):
    with pytest.raises(NotFound) as caught:
        backend.blobs.open(EMPTY)
    assert caught.value.reason == "BLOB_NOT_FOUND"
    assert backend.blobs.sizes([EMPTY]) == {}
    assert backend.blobs.remove_if_old(EMPTY, 0) is None


@pytest.mark.parametrize(
    ("digest", "size", "reason"),
    [(EMPTY, -1, "DIGEST_MISMATCH"), ("", 8, "SIZE_MISMATCH"), (digest_of(b"content"), 8, "SIZE")],
)
def test_an_upload_that_is_not_what_was_expected_leaves_nothing(backend, digest, size, reason):
    writer = backend.blobs.writer()
    writer.write(b"content")
    with pytest.raises(InvalidArgument) as caught:
        writer.commit(digest, size)
    writer.abort()
    assert caught.value.reason.startswith(reason)
    assert list(backend.blobs.scan()) == []


def test_an_aborted_upload_leaves_nothing(backend):
    writer = backend.blobs.writer()
    writer.write(b"content")
    writer.abort()
    writer.abort()
    assert list(backend.blobs.scan()) == []


def test_abort_after_commit_keeps_the_blob(backend):
    writer = backend.blobs.writer()
    writer.write(b"content")
    digest = writer.commit().digest
    writer.abort()
    assert content_of(backend, digest) == b"content"


@pytest.mark.parametrize("bad", ["", "ab", "A" * 64, "../" + "a" * 61, EMPTY + "\n", "g" * 64])
def test_what_is_no_digest_is_refused(backend, bad):
    for use in (
        lambda: backend.blobs.open(bad),
        lambda: backend.blobs.sizes([bad]),
        lambda: backend.blobs.touch([bad]),
        lambda: backend.blobs.remove_if_old(bad, 0),
    ):
        with pytest.raises(InvalidArgument, match="SHA-256"):
            use()


def test_a_damaged_blob_is_found_out_before_its_end(harness, put):
    content = bytes(5000)
    digest = put(content)
    harness.flip_bit(digest, 4999 * 8)
    reader = harness.backend.blobs.open(digest)
    received = []
    with pytest.raises(DataLoss) as caught:
        received.extend(reader.chunks(0, 5000, 1000))
    reader.close()
    assert caught.value.reason == "BLOB_CORRUPT"
    assert sum(map(len, received)) < 5000


def test_a_damaged_blob_counts_as_missing_and_is_healed_by_an_upload(harness, put):
    blobs = harness.backend.blobs
    digest = put(b"content")
    harness.flip_bit(digest, 3)
    with pytest.raises(DataLoss):
        content_of(harness.backend, digest)
    assert blobs.sizes([digest]) == {}
    assert blobs.touch([digest]) == {}
    put(b"content")
    assert blobs.sizes([digest]) == {digest: 7}
    assert content_of(harness.backend, digest) == b"content"


def test_verify_reads_all_of_it(harness, put):
    digest = put(bytes(3_000_000))
    reader = harness.backend.blobs.open(digest)
    reader.verify()
    reader.close()
    harness.flip_bit(digest, 2_999_999 * 8)
    reader = harness.backend.blobs.open(digest)
    with pytest.raises(DataLoss):
        reader.verify()
    reader.close()


def test_only_old_blobs_are_removed(backend, put):
    digest = put(b"content")
    assert backend.blobs.remove_if_old(digest, 1000) is None
    assert backend.blobs.sizes([digest]) == {digest: 7}
    assert backend.blobs.remove_if_old(digest, 0) == 7
    assert backend.blobs.sizes([digest]) == {}
    assert backend.blobs.usage_bytes() == 0


def test_a_reader_keeps_what_it_opened(backend, put):
    reader = backend.blobs.open(put(b"content"))
    backend.blobs.remove_if_old(digest_of(b"content"), 0)
    assert b"".join(reader.chunks(0, 7, 3)) == b"content"
    reader.close()


def test_concurrent_uploads_of_one_content(backend):
    content = random.Random(7).randbytes(100_000)
    stored = []

    def upload():
        writer = backend.blobs.writer()
        writer.write(content)
        stored.append(writer.commit(digest_of(content), len(content)).digest)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored == [digest_of(content)] * 8
    assert content_of(backend, digest_of(content)) == content
    assert backend.blobs.usage_bytes() == 100_000

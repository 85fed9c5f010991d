"""References are found by their looks."""

import hashlib
import json
import random

import pytest

from phalanx.v1 import storage_service_pb2 as pb
from storage.core.garbage import find_digests, is_old_enough

A, B = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b"))


@pytest.mark.parametrize(
    "record",
    [
        A.encode(),
        json.dumps({"digest": A}).encode(),
        f"see {A}.".encode(),
        b"\x00\xff" + A.encode() + b"\xff",
        f"{A}{B}".encode(),
        f"sha256:{A}".encode(),
    ],
)
def test_digests_are_found(record):
    assert A in find_digests(record)


def test_neighbouring_bytes_that_look_like_digits_hide_nothing():
    for field in range(256):
        record = bytes([field]) + A.encode() + bytes([field])
        assert A in find_digests(record)


def test_every_digest_of_serialized_messages_is_found():
    generator = random.Random(3)
    for _ in range(500):
        digests = [generator.randbytes(32).hex() for _ in range(generator.randrange(1, 6))]
        message = pb.CheckpointManifest(
            job_id="job",
            term=generator.randrange(2**20),
            spec_sha256=digests[0],
            parts=[
                pb.CheckpointPart(range=i, digest=d, size_bytes=generator.randrange(2**40))
                for i, d in enumerate(digests)
            ],
        )
        assert set(digests) <= find_digests(message.SerializeToString())


@pytest.mark.parametrize(
    "record", [b"", b"a" * 63, A[:63].encode(), A.upper().encode(), b"\0" * 99]
)
def test_other_things_are_no_digests(record):
    assert find_digests(record) == frozenset()


def test_a_record_of_nothing_but_digits_stays_cheap():
    record = random.Random(4).randbytes(500_000).hex().encode()
    found = find_digests(record)
    assert len(found) <= len(record) // 64 + 1
    assert record[-64:].decode() in found
    assert record[:64].decode() in found
    assert record[6400:6464].decode() in found


def test_a_blob_from_the_future_is_young():
    assert is_old_enough(10, 10)
    assert not is_old_enough(9.9, 10)
    assert not is_old_enough(-3600, 0)

"""The pure rules of checkpoints where the contract suite cannot look."""

from google.protobuf.message import DecodeError

from phalanx.testing.storage_messages import part
from phalanx.v1 import storage_service_pb2 as pb
from storage.core import checkpoints
from storage.core.checkpoints import CheckpointKey


def whole(**fields):
    request = part(b"parameters", **fields)
    registration = checkpoints.register_part(
        checkpoints.JobRow(request.term),
        None,
        None,
        request,
        {request.part.digest: request.part.size_bytes},
        now_unix_nanos=7,
    )
    assert registration.complete
    return registration.manifest


def test_any_single_bit_of_a_manifest_is_covered_by_its_checksum():
    manifest = whole()
    key = checkpoints.key_of(manifest)
    assert checkpoints.is_intact(manifest, "job-1", key)
    data = manifest.SerializeToString(deterministic=True)
    detected = 0
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        other = pb.CheckpointManifest()
        try:
            other.ParseFromString(bytes(damaged))
        except DecodeError:
            detected += 1
        else:
            detected += not checkpoints.is_intact(other, "job-1", key)
    assert detected == len(data) * 8


def test_a_right_manifest_in_the_wrong_place_is_found():
    manifest = whole()
    assert not checkpoints.is_intact(manifest, "job-2", checkpoints.key_of(manifest))
    assert not checkpoints.is_intact(manifest, "job-1", CheckpointKey(1, 20, False))


def test_order_is_term_then_step_then_final():
    keys = [CheckpointKey(1, 30, False), CheckpointKey(2, 10, False), CheckpointKey(1, 30, True)]
    assert sorted(keys) == [keys[0], keys[2], keys[1]]


def test_retention():
    keys = [CheckpointKey(1, step, False) for step in (1, 2, 3, 4)]
    assert checkpoints.checkpoints_to_drop(keys, 1) == keys[:3]
    assert checkpoints.checkpoints_to_drop(keys, 0) == keys[:1]
    assert checkpoints.checkpoints_to_drop(keys, 10) == []
    final = CheckpointKey(1, 2, True)
    assert final not in checkpoints.checkpoints_to_drop([*keys, final], 1)


def test_the_request_is_not_changed():
    request = part(b"parameters", ranges=2)
    before = request.SerializeToString()
    first = checkpoints.register_part(
        checkpoints.JobRow(1), None, None, request, {request.part.digest: 10}, 1
    )
    stored = first.manifest.SerializeToString()
    second = part(b"other", index=1, ranges=2)
    sizes = {request.part.digest: 10, second.part.digest: 5}
    checkpoints.register_part(checkpoints.JobRow(1), first.manifest, None, second, sizes, 1)
    assert request.SerializeToString() == before
    assert first.manifest.SerializeToString() == stored

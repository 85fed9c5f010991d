"""Go records that the root sealed, and what owners of other ranges make of them."""

from __future__ import annotations

import pytest

from coordinator.aggregation.core.golog import GoLog
from phalanx.errors import PermissionDenied
from phalanx.frames import decode_response, encode_response
from phalanx.given import sealed
from phalanx.go_seals import opened_go, sealed_go
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import GivenNodes, GoRecord, SealedGo

KEY, OTHER = b"k" * 32, b"o" * 32
GO = GoRecord(term=3, version=7, round=1, action=GoRecord.ACTION_TRAIN, loss_sum=0.5)
STOP = GoRecord(term=3, version=7, round=1, action=GoRecord.ACTION_STOP)
_UNKNOWN_FIELD = bytes([0xA2, 0x06, 1, 0x78])  # field 100, one byte


def seal_of(go: GoRecord) -> bytes:
    return sealed_go(KEY, go).sealed.seal


def test_what_was_sealed_is_what_is_taken() -> None:
    sent = sealed_go(KEY, GO)
    assert opened_go(KEY, sent, "job-1") == GO
    sent.action, sent.checkpoint = GoRecord.ACTION_STOP, True
    assert opened_go(KEY, sent, "job-1") == GO
    assert not GO.HasField("sealed")


def test_without_a_key_nothing_is_sealed_or_asked_for() -> None:
    assert sealed_go(b"", GO) == GO
    assert opened_go(b"", GO, "job-1") == GO


@pytest.mark.parametrize(
    "shown",
    [
        SealedGo(),
        sealed_go(OTHER, GO).sealed,
        SealedGo(record=STOP.SerializeToString(), seal=seal_of(GO)),
        SealedGo(record=sealed_go(KEY, GO).sealed.record),
    ],
)
def test_a_record_that_the_root_did_not_seal_is_refused(shown: SealedGo) -> None:
    carried = GoRecord(term=3, version=7, round=1, sealed=shown)
    with pytest.raises(PermissionDenied, match="round 1 of version 7 of job job-1") as refused:
        opened_go(KEY, carried, "job-1")
    assert refused.value.reason == "NOT_SEALED"
    assert [each.field for each in refused.value.violations] == ["go_record.sealed"]


def test_what_shows_that_work_was_given_is_no_decision() -> None:
    """The key is the same: a proof must not pass for a record, whatever its bytes happen to say."""
    given = sealed(KEY, GivenNodes(term=3))
    assert given is not None
    shown = SealedGo(record=given.nodes, seal=given.seal)
    with pytest.raises(PermissionDenied):
        opened_go(KEY, GoRecord(term=3, sealed=shown), "job-1")


def test_the_seal_of_another_version_stays_whatever_is_written_again_on_the_way() -> None:
    """A root of the next version may say more; what carries it writes the record in its own way."""
    newer = GoRecord.FromString(GO.SerializeToString() + _UNKNOWN_FIELD)
    sent = GoRecord.FromString(sealed_go(KEY, newer).SerializeToString())
    sent.DiscardUnknownFields()  # type: ignore[attr-defined]
    taken = opened_go(KEY, sent, "job-1")
    assert (taken.version, taken.round, taken.action) == (7, 1, GoRecord.ACTION_TRAIN)


def test_records_are_sealed_alone_and_with_their_version() -> None:
    log = GoLog()
    log.seal_key = KEY
    frame = pb.VersionFrame(version=7, element_count=1)
    log.append(GO, encode_response(pb.ExchangeResponseHeader(frame=frame), memoryview(b"1234")))
    # What the next record is made from has no seal of the one before.
    assert log.newest == GO
    entry = log.after(-1)
    assert entry is not None
    assert entry.joined is not None
    joined, alone = decode_response(entry.joined)[0], decode_response(entry.data)[0]
    for go in (joined.joined_go_record, alone.go_record):
        assert opened_go(KEY, go, "job-1") == GO

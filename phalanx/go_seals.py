"""Go records on their way from the root, through workers, to the owners of other ranges.

The root seals each with the key of the term, which owners of ranges have and workers do not: who
carries a record cannot change it. The bytes that were sealed travel along, since a worker of
another version may not write the same record in the same way. Where nobody proves who he is there
is no key, and nothing is sealed or asked for.
"""

from __future__ import annotations

import hmac

from phalanx.errors import PermissionDenied, Violation
from phalanx.v1.training_pb2 import GoRecord, SealedGo

_DIGEST = "sha256"
_PURPOSE = b"go record\n"
"""The key seals other messages as well: none of them can be taken for a record."""


def sealed_go(key: bytes, go: GoRecord) -> GoRecord:
    """Return a record as the root sends it."""
    if not key:
        return go
    sent = GoRecord()
    sent.CopyFrom(go)
    sent.ClearField("sealed")
    record = sent.SerializeToString(deterministic=True)
    sent.sealed.CopyFrom(SealedGo(record=record, seal=_seal(key, record)))
    return sent


def opened_go(key: bytes, go: GoRecord, job_id: str) -> GoRecord:
    """Return what the root decided, of a record that a worker carried. Raises PermissionDenied."""
    if not key:
        return go
    if hmac.compare_digest(go.sealed.seal, _seal(key, go.sealed.record)):
        return GoRecord.FromString(go.sealed.record)
    raise PermissionDenied(
        f"the go record for round {go.round} of version {go.version} of job {job_id} is not one "
        "that the owner of range 0 has sealed in this term",
        reason="NOT_SEALED",
        violations=[Violation("go_record.sealed", "is not the seal of the owner of range 0")],
    )


def _seal(key: bytes, record: bytes) -> bytes:
    return hmac.digest(key, _PURPOSE + record, _DIGEST)

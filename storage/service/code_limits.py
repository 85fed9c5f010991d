"""What people keep here for good as code: wheels, by pins and by records of the journal of wheels.

No job and no version ever lets go of them, so they are held to a size, each by itself and all
together. A record must be that of one wheel that is there: whatever looks like a digest in a
journal keeps a blob.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from phalanx.errors import InvalidArgument, NotFound, ResourceExhausted
from phalanx.keys.policy import WHEEL_HOLDER
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.wheels import STREAM, WHEEL_LIMIT_BYTES
from storage.core.garbage import find_digests
from storage.interfaces import Backend

WHEELS_MAX = 10_000
_RECORD_BYTES_MAX = 4096


class CodeLimits:
    """Checks what would be kept. All of it blocks, and raises what the caller is to hear.

    ``bytes_max`` is for all wheels together; 0: no limit.
    """

    def __init__(self, backend: Backend, bytes_max: int) -> None:
        self._backend = backend
        self._bytes_max = bytes_max

    def check_pins(self, request: pb.SetPinsRequest) -> None:
        """Raise where these are pins of wheels and too much."""
        if request.holder.startswith(WHEEL_HOLDER) and request.pins:
            self._check_room([pin.blob for pin in request.pins if pin.HasField("blob")])

    def news(self, request: pb.AppendJournalRequest) -> bool:
        """Say whether an append to the journal of wheels has anything that is not listed there.

        Raises InvalidArgument, NotFound and ResourceExhausted.
        """
        if request.stream != STREAM:
            return True
        digests = {_wheel_of(record) for record in request.records}
        self._check_room(digests)
        return not digests or not digests <= self._listed()

    def next_sequence(self) -> int:
        """Return where the journal of wheels ends."""
        end = pb.ReadJournalRequest(stream=STREAM, from_sequence=2**62)
        return max((each.next_sequence for each in self._backend.journals.read(end)), default=0)

    def _listed(self) -> set[str]:
        read = self._backend.journals.read(pb.ReadJournalRequest(stream=STREAM))
        records = (record.payload for answer in read for record in answer.records)
        return {digest for payload in records for digest in find_digests(payload)}

    def _check_room(self, digests: Iterable[str]) -> None:
        wanted = set(digests)
        sizes = self._backend.blobs.sizes(wanted)
        for digest in sorted(wanted):
            if digest not in sizes:
                raise NotFound(f"blob {digest} is not stored", reason="BLOB_NOT_FOUND")
            if sizes[digest] > WHEEL_LIMIT_BYTES:
                raise ResourceExhausted(
                    f"blob {digest} has {sizes[digest]} bytes; a wheel may have "
                    f"{WHEEL_LIMIT_BYTES}",
                    reason="WHEEL_TOO_LARGE",
                )
        there = self._listed() | set(self._backend.references.pinned_by(WHEEL_HOLDER))
        new = wanted - there
        if not new:
            return
        used = sum(self._backend.blobs.sizes(there).values())
        more = sum(sizes[digest] for digest in new)
        full = 0 < self._bytes_max < used + more
        if full or len(there) + len(new) > WHEELS_MAX:
            raise ResourceExhausted(
                f"all wheels together may have {self._bytes_max or 'any number of'} bytes "
                f"(--code-bytes of storage) and be {WHEELS_MAX}; there are {len(there)} of {used} "
                f"bytes, and this needs {more} more",
                reason="QUOTA_EXCEEDED",
                details={"quota": "code_bytes", "limit": str(self._bytes_max), "used": str(used)},
            )


def _wheel_of(record: bytes) -> str:
    """Return the digest that a record names. Raises InvalidArgument unless it is one alone."""
    try:
        fields = json.loads(record)
        digest = str(fields["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        digest = ""
    if len(record) > _RECORD_BYTES_MAX or find_digests(record) != {digest}:
        raise InvalidArgument(
            "a record of the journal of wheels is JSON with one digest, sha256, and has at most "
            f"{_RECORD_BYTES_MAX} bytes",
            reason="NOT_A_WHEEL",
        )
    return digest

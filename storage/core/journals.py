"""Journals: append by compare-and-set, truncation, and what an answer of a read may hold.

A stream is a row of numbers without a gap: records ``first_sequence`` … ``next_sequence - 1`` are
stored. The first record ever has sequence 0. Truncation raises ``first_sequence`` and nothing else,
so that a sequence is never given twice while the stream exists.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from phalanx.errors import Aborted, DataLoss
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.keys import check_stream, invalid

RECORD_LIMIT_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""A record must fit into one message of a read, with room for its envelope."""

READ_BATCH_BYTES = 1024 * 1024
"""How much of a stream one message of a read carries at most, unless one record alone is larger."""

READ_BATCH_RECORDS = 4096


@dataclass(frozen=True)
class StreamState:
    """The bounds of one stream; a stream that does not exist has (0, 0)."""

    first_sequence: int = 0
    next_sequence: int = 0


def check_append(request: pb.AppendJournalRequest) -> None:
    """Raise InvalidArgument if the request cannot be right."""
    check_stream(request.stream, "stream")
    if request.expected_sequence < -1:
        raise invalid("expected_sequence", "write -1 (whatever is next) or a sequence")
    for index, record in enumerate(request.records):
        if len(record) > RECORD_LIMIT_BYTES:
            raise invalid(
                f"records[{index}]",
                f"{len(record)} bytes; a record has at most {RECORD_LIMIT_BYTES}: store the "
                "content as a blob and journal its digest",
            )


def append(state: StreamState, request: pb.AppendJournalRequest) -> StreamState:
    """Return the bounds after the append; the first record gets ``state.next_sequence``.

    Raises Aborted (SEQUENCE_MISMATCH) if another record came first.
    """
    expected = request.expected_sequence
    if expected not in (-1, state.next_sequence):
        raise Aborted(
            f"the next record of {request.stream!r} gets sequence {state.next_sequence}, not "
            f"{expected}: read what was appended, then decide again",
            reason="SEQUENCE_MISMATCH",
            details={"next_sequence": str(state.next_sequence)},
        )
    return replace(state, next_sequence=state.next_sequence + len(request.records))


def check_truncate(request: pb.TruncateJournalRequest) -> None:
    """Raise InvalidArgument if the request cannot be right."""
    check_stream(request.stream, "stream")
    if request.before_sequence < 0:
        raise invalid("before_sequence", "a sequence is 0 or more")


def truncate(state: StreamState, request: pb.TruncateJournalRequest) -> StreamState:
    """Return the bounds without the records before ``request.before_sequence``."""
    if request.before_sequence > state.next_sequence:
        raise invalid(
            "before_sequence",
            f"{request.before_sequence} is beyond the end; {request.stream!r} goes on with "
            f"{state.next_sequence}",
        )
    return replace(state, first_sequence=max(state.first_sequence, request.before_sequence))


def check_read(request: pb.ReadJournalRequest) -> None:
    """Raise InvalidArgument if the request cannot be right."""
    check_stream(request.stream, "stream")
    if request.from_sequence < 0:
        raise invalid("from_sequence", "a sequence is 0 or more")
    if request.max_records < 0:
        raise invalid("max_records", "write 0 (all) or a number of records")


def record_checksum(stream: str, sequence: int, payload: bytes) -> int:
    """Return the CRC-32 that is stored beside a record.

    It covers the place too, so that a right record in the wrong place is found as well.
    """
    return zlib.crc32(payload, zlib.crc32(f"{stream}\0{sequence}\0".encode()))


def check_records(
    stream: str, expected_first: int, rows: Sequence[tuple[int, bytes, int]]
) -> list[pb.JournalRecord]:
    """Return rows (sequence, payload, checksum) as records; DataLoss on a gap or a damaged one."""
    records: list[pb.JournalRecord] = []
    for sequence, payload, checksum in rows:
        if sequence != expected_first + len(records):
            raise gap(stream, expected_first + len(records))
        if record_checksum(stream, sequence, payload) != checksum:
            raise DataLoss(
                f"record {sequence} of journal {stream!r} does not match its checksum; restore "
                "storage from a backup",
                reason="JOURNAL_CORRUPT",
            )
        records.append(pb.JournalRecord(sequence=sequence, payload=payload))
    return records


def gap(stream: str, sequence: int) -> DataLoss:
    """Return the error for a record that must be there and is not."""
    return DataLoss(
        f"journal {stream!r} has no record {sequence}; restore storage from a backup",
        reason="JOURNAL_GAP",
    )

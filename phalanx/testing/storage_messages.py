"""Short ways to write requests to storage in tests."""

import hashlib
import json

from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb


def digest_of(content: bytes) -> str:
    """Return the blob id of ``content``."""
    return hashlib.sha256(content).hexdigest()


def append(
    stream: str, *records: bytes, expected: int = -1, fence: pb.Fence | None = None
) -> pb.AppendJournalRequest:
    """An append of ``records``."""
    return pb.AppendJournalRequest(
        stream=stream, expected_sequence=expected, records=records, fence=fence
    )


def read(stream: str, from_sequence: int = 0, max_records: int = 0) -> pb.ReadJournalRequest:
    """A read from a sequence on."""
    return pb.ReadJournalRequest(
        stream=stream, from_sequence=from_sequence, max_records=max_records
    )


def acquire(name: str, holder: str, seen: tuple[int, int] = (0, 0)) -> pb.AcquireLeaseRequest:
    """An attempt at a lease; ``seen`` is (token, counter)."""
    return pb.AcquireLeaseRequest(
        name=name, holder=holder, seen_token=seen[0], seen_counter=seen[1]
    )


def part(
    content: bytes,
    *,
    job_id: str = "job-1",
    term: int = 1,
    step: int = 10,
    index: int = 0,
    ranges: int = 1,
    final: bool = False,
    keep: int = 0,
) -> pb.CommitCheckpointRequest:
    """One part of a checkpoint whose ranges have 10 elements each; its blob is ``content``."""
    return pb.CommitCheckpointRequest(
        job_id=job_id,
        term=term,
        step=step,
        final=final,
        range_count=ranges,
        part=pb.CheckpointPart(
            range=index,
            first_element=index * 10,
            element_count=10,
            digest=digest_of(content),
            size_bytes=len(content),
            parameters_offset=0,
            parameters_length=len(content),
        ),
        root_state="" if index else json.dumps({"step": step}),
        spec_sha256="ab" * 32,
        keep=keep,
    )


def model(name: str, **files: bytes) -> model_pb.ModelVersion:
    """A model whose files ``NAME.json`` hold the given bytes."""
    return model_pb.ModelVersion(
        name=name,
        files=[
            model_pb.ModelFile(path=f"{stem}.json", digest=digest_of(content))
            for stem, content in files.items()
        ],
    )

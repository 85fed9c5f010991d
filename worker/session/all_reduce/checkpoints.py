"""Checkpoints of an all-reduce job: one part that holds the whole vectors.

The layout of the file is that of every part: `parameters`, then the vectors of the optimizer's
state and, where the job has them, the parameters of its best evaluation, flat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import takewhile

from phalanx.clients.storage import StorageClient
from phalanx.data.checkpoint_parts import PARAMETERS, parse_part
from phalanx.data.model_files import safetensors_header
from phalanx.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.patience import Patience, insist
from phalanx.training.best import BEST_VECTOR
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1.training_pb2 import GoRecord, JobPlan, Layout, TensorSpec
from worker.core.all_reduce.replica import Array

UPLOAD_TIMEOUT_S = 600.0
UPLOADS_MAX = 3
PATIENCE = Patience(first_s=0.1, longest_s=2.0)
"""With storage; without a limit, since training goes on meanwhile."""


def may_be_stored_later(error: PhalanxError) -> bool:
    """Return whether a checkpoint waits because of an error, whatever uses the disk up."""
    return isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted)


def sha256_of(vectors: Mapping[str, Array]) -> str:
    """Hash of all that a member holds."""
    digest = hashlib.sha256()
    for vector in vectors.values():
        digest.update(vector.data.cast("B"))
    return digest.hexdigest()


async def write(
    client: StorageClient, plan: JobPlan, go: GoRecord, vectors: Mapping[str, Array], keep: int
) -> None:
    """Upload the vectors as the checkpoint that a go record asks for, and register it; waits as
    long as storage is away."""
    header, buffers = _laid_out(vectors)

    async def upload() -> str:
        return await client.put_blob(
            [header, *buffers], check_first=False, timeout_s=UPLOAD_TIMEOUT_S
        )

    count = len(vectors[PARAMETERS])
    uploads = 0
    while True:
        digest = await insist(upload, PATIENCE, passes=may_be_stored_later)
        uploads += 1
        request = storage.CommitCheckpointRequest(
            job_id=plan.job_id,
            term=go.term,
            step=go.version,
            final=go.action == GoRecord.ACTION_STOP,
            range_count=1,
            part=storage.CheckpointPart(
                range=0,
                first_element=0,
                element_count=count,
                digest=digest,
                size_bytes=len(header) + sum(buffer.nbytes for buffer in buffers),
                parameters_offset=len(header),
                parameters_length=vectors[PARAMETERS].nbytes,
                best_offset=_best_offset(vectors, len(header)),
            ),
            root_state=go.root_state,
            spec_sha256=plan.spec_sha256,
            keep=keep,
        )
        commit = _Commit(client, request)
        try:
            await insist(commit, PATIENCE, passes=may_be_stored_later)
            return
        except FailedPrecondition as error:
            # What nothing names for long is garbage to storage: it is uploaded again.
            if error.reason != "BLOB_MISSING" or uploads == UPLOADS_MAX:
                raise


class _Commit:
    """One call, to be repeated."""

    def __init__(self, client: StorageClient, request: storage.CommitCheckpointRequest) -> None:
        self._client = client
        self._request = request

    async def __call__(self) -> storage.CommitCheckpointResponse:
        return await self._client.commit_checkpoint(self._request)


async def read(
    client: StorageClient, manifest: storage.CheckpointManifest
) -> tuple[Array, Mapping[str, Array]]:
    """Return parameters and optimizer state; waits as long as storage is away.

    Raises DataLoss where the checkpoint is damaged or of another shape.
    """
    if len(manifest.parts) != 1 or manifest.parts[0].first_element:
        raise DataLoss(f"the checkpoint at step {manifest.step} is cut into several ranges")
    digest = manifest.parts[0].digest

    async def attempt() -> bytes:
        return await client.get_blob(digest, timeout_s=UPLOAD_TIMEOUT_S)

    data = await insist(attempt, PATIENCE, passes=may_be_stored_later)
    try:
        return parse_part(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLoss(
            f"the checkpoint at step {manifest.step} cannot be read: {error!r}"
        ) from None


def _laid_out(vectors: Mapping[str, Array]) -> tuple[bytes, list[memoryview]]:
    """The file: its header and the buffers that follow."""
    header = safetensors_header(
        Layout(
            tensors=[TensorSpec(name=name, shape=[len(each)]) for name, each in vectors.items()],
            dtype=vectors[PARAMETERS].dtype.newbyteorder("=").name,
            element_count=sum(len(each) for each in vectors.values()),
        )
    )
    return header, [each.data.cast("B") for each in vectors.values()]


def _best_offset(vectors: Mapping[str, Array], header_bytes: int) -> int:
    """Where the parameters of the best evaluation begin, if they are a vector of their own."""
    if BEST_VECTOR not in vectors:
        return 0
    before = takewhile(lambda each: each[0] != BEST_VECTOR, vectors.items())
    return header_bytes + sum(vector.nbytes for _, vector in before)

"""Checkpoint parts: one range at one version as a safetensors blob, written and read back.

A part holds the tensor `parameters`, one tensor per optimizer state vector and, where the job has
them, the parameters of its best evaluation, and the replay log or the states of nodes, all flat and
in this order. It is sent out of the snapshot's own buffers, and read back as views of the blob:
nothing is joined or copied in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from coordinator.aggregation.core.state import Array, Snapshot
from phalanx.clients.storage import StorageClient
from phalanx.data.checkpoint_parts import PARAMETERS, parse_part
from phalanx.data.model_files import safetensors_header
from phalanx.errors import (
    DataLoss,
    DeadlineExceeded,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.patience import Patience
from phalanx.training.best import BEST_VECTOR
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1.training_pb2 import Layout, ParameterRange, TensorSpec

UPLOAD_TIMEOUT_S = 600.0
PATIENCE = Patience(first_s=0.1, longest_s=2.0)
"""With storage; without a limit, since training goes on meanwhile."""


def may_be_stored_later(error: PhalanxError) -> bool:
    """Return whether a checkpoint waits because of an error, whatever uses the disk up."""
    return isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted)


@dataclass(frozen=True)
class Part:
    """What the manifest has to know besides the snapshot."""

    job_id: str
    term: int
    final: bool
    range_count: int
    root_state: str
    spec_sha256: str
    keep: int


async def write_part(
    client: StorageClient, snapshot: Snapshot, part: Part
) -> storage.CommitCheckpointRequest:
    """Upload a snapshot; return the request that registers it.

    The snapshot stays as it is, so that a failed upload can be tried again.
    """
    count = snapshot.range.element_count
    header, buffers = layout_part(snapshot)
    digest = await client.put_blob(
        [header, *buffers], check_first=False, timeout_s=UPLOAD_TIMEOUT_S
    )
    return storage.CommitCheckpointRequest(
        job_id=part.job_id,
        term=part.term,
        step=snapshot.version,
        final=part.final,
        range_count=part.range_count,
        part=storage.CheckpointPart(
            range=snapshot.range.index,
            first_element=snapshot.range.first_element,
            element_count=count,
            digest=digest,
            size_bytes=len(header) + sum(buffer.nbytes for buffer in buffers),
            parameters_offset=len(header),
            parameters_length=count * snapshot.dtype.itemsize,
            best_offset=_best_offset(snapshot, len(header)),
        ),
        root_state=part.root_state,
        spec_sha256=part.spec_sha256,
        keep=part.keep,
    )


def layout_part(snapshot: Snapshot) -> tuple[bytes, list[memoryview]]:
    """Return the file of a snapshot: its header and the snapshot's buffers, in order."""
    lengths = _lengths(snapshot)
    header = safetensors_header(
        Layout(
            tensors=[TensorSpec(name=name, shape=[length]) for name, length in lengths.items()],
            dtype=snapshot.dtype.newbyteorder("=").name,
            element_count=sum(lengths.values()),
        )
    )
    buffers = [snapshot.parameters(index).data.cast("B") for index in range(len(snapshot.grid))]
    for name in snapshot.state_names:
        for state in snapshot.state:
            assert state is not None, "the snapshot was released before it was written"
            buffers.append(state[name].data.cast("B"))
    for pieces in snapshot.extra.values():
        buffers += [values.data.cast("B") for values in pieces if len(values)]
    return header, buffers


def _lengths(snapshot: Snapshot) -> dict[str, int]:
    """The vectors of a part in their order, and how many elements each has."""
    count = snapshot.range.element_count
    lengths = dict.fromkeys((PARAMETERS, *snapshot.state_names), count)
    return lengths | {name: sum(map(len, pieces)) for name, pieces in snapshot.extra.items()}


def _best_offset(snapshot: Snapshot, header_bytes: int) -> int:
    """Where the parameters of the best evaluation begin, if they are a vector of their own."""
    if BEST_VECTOR not in snapshot.extra:
        return 0
    before = takewhile(lambda each: each[0] != BEST_VECTOR, _lengths(snapshot).items())
    return header_bytes + snapshot.dtype.itemsize * sum(count for _, count in before)


async def read_part(
    client: StorageClient, manifest: storage.CheckpointManifest, piece: ParameterRange
) -> tuple[Array, Mapping[str, Array]]:
    """Return parameters and optimizer state of one range, as views of the verified blob.

    Raises DataLoss where the part is missing, damaged or of another range.
    """
    for part in manifest.parts:
        if part.range == piece.index:
            break
    else:
        raise DataLoss(f"the checkpoint at step {manifest.step} has no range {piece.index}")
    if (part.first_element, part.element_count) != (piece.first_element, piece.element_count):
        raise DataLoss(
            f"range {piece.index} of the checkpoint at step {manifest.step} is cut differently"
        )
    data = await client.get_blob(part.digest, timeout_s=UPLOAD_TIMEOUT_S)
    try:
        return parse_part(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLoss(
            f"range {piece.index} of the checkpoint at step {manifest.step} cannot be read: "
            f"{error!r}"
        ) from None

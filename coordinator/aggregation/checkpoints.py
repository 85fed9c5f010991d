"""Checkpoint parts: one range at one version as a safetensors blob, written and read back.

A part holds the tensor `parameters` and one tensor per optimizer state vector, all flat and in this
order. It is streamed out of the snapshot's own buffers; nothing is joined in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load

from coordinator.aggregation.core.state import Array, Snapshot
from phalanx.clients.storage import StorageClient
from phalanx.data.model_files import safetensors_header
from phalanx.errors import DataLoss
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1.training_pb2 import Layout, ParameterRange, TensorSpec

PARAMETERS = "parameters"
UPLOAD_TIMEOUT_S = 600.0


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
    """Upload a snapshot; return the request that registers it. The state is released at the end."""
    count = snapshot.range.element_count
    names = (PARAMETERS, *snapshot.state_names)
    tensors = [TensorSpec(name=name, shape=[count]) for name in names]
    dtype = snapshot.dtype.newbyteorder("=").name
    header = safetensors_header(
        Layout(tensors=tensors, dtype=dtype, element_count=count * len(names))
    )
    buffers: list[memoryview] = [memoryview(header)]
    buffers += [snapshot.parameters(index).data for index in range(len(snapshot.grid))]
    for name in snapshot.state_names:
        buffers += [state[name].data for state in snapshot.state if state is not None]
    try:
        digest = await client.put_blob(buffers, timeout_s=UPLOAD_TIMEOUT_S)
    finally:
        snapshot.release()
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
            size_bytes=sum(buffer.nbytes for buffer in buffers),
            parameters_offset=len(header),
            parameters_length=count * snapshot.dtype.itemsize,
        ),
        root_state=part.root_state,
        spec_sha256=part.spec_sha256,
        keep=part.keep,
    )


async def read_part(
    client: StorageClient, manifest: storage.CheckpointManifest, piece: ParameterRange
) -> tuple[Array, Mapping[str, Array]]:
    """Return parameters and optimizer state of one range.

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
        tensors: dict[str, Array] = dict(load(data))
        parameters = tensors.pop(PARAMETERS)
    except Exception as error:
        raise DataLoss(
            f"range {piece.index} of the checkpoint at step {manifest.step} cannot be read: {error}"
        ) from error
    return _little_endian(parameters), {n: _little_endian(t) for n, t in tensors.items()}


def _little_endian(array: Array) -> Array:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))

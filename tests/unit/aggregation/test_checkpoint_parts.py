"""Parts of checkpoints are safetensors files of a snapshot's own buffers."""

from __future__ import annotations

import asyncio
import hashlib

import numpy as np
import pytest
from safetensors.numpy import load

from coordinator.aggregation.checkpoints import Part, layout_part, parse_part, read_part, write_part
from coordinator.aggregation.core.state import RangeParameters
from phalanx.errors import DataLoss, NotFound
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.optimizers import build_optimizer
from phalanx.testing.ranges import make_plan, parameter_ranges
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1.job_spec_pb2 import JobSpec

ELEMENTS = 5 * BLOCK_ELEMENTS + 17
PART = Part("job-test", 3, True, 1, "{}", "5" * 64, 2)


class Blobs:
    """Storage in memory, as far as parts need it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    async def put_blob(self, source, **_):
        data = b"".join(source)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    async def get_blob(self, digest, **_):
        if digest not in self.blobs:
            raise NotFound("no such blob")
        return self.blobs[digest]


@pytest.fixture(params=["sgd", "adam"])
def parameters(request):
    plan = make_plan(elements=ELEMENTS, optimizer=request.param)
    optimizer = build_optimizer(JobSpec.FromString(plan.spec).train, 3)
    (piece,) = parameter_ranges(plan, str)
    made = RangeParameters(1, piece, plan.layout, optimizer)
    rng = np.random.default_rng(3)
    vectors = [rng.standard_normal(ELEMENTS).astype(np.float32) for _ in range(3)]
    made.load(7, vectors[0], dict(zip(optimizer.state_names, vectors[1:], strict=False)))
    return made


def test_a_part_is_a_safetensors_file(parameters):
    snapshot = parameters.snapshot(7)
    header, buffers = layout_part(snapshot)
    data = header + b"".join(buffers)
    tensors = load(data)
    assert set(tensors) == {"parameters", *snapshot.state_names}
    vector, state = parse_part(data)
    assert vector.tobytes() == tensors["parameters"].tobytes()
    assert {name: array.tobytes() for name, array in state.items()} == {
        name: tensors[name].tobytes() for name in snapshot.state_names
    }


def test_writing_shares_the_memory_of_the_snapshot(parameters):
    snapshot = parameters.snapshot(7)
    _, buffers = layout_part(snapshot)
    frames = [np.frombuffer(frame, np.uint8) for frame in snapshot.frames]
    own = [array.view(np.uint8) for state in snapshot.state for array in state.values()]
    for buffer in buffers:
        view = np.frombuffer(buffer, np.uint8)
        assert any(np.shares_memory(view, source) for source in frames + own)


def test_a_written_part_is_read_back_to_the_bit(parameters):
    blobs = Blobs()
    snapshot = parameters.snapshot(7)
    request = asyncio.run(write_part(blobs, snapshot, PART))
    part = request.part
    assert (request.step, request.term, request.final, part.range) == (7, 3, True, 0)
    stored = blobs.blobs[part.digest]
    assert part.size_bytes == len(stored)
    raw = stored[part.parameters_offset : part.parameters_offset + part.parameters_length]
    manifest = storage.CheckpointManifest(step=7, parts=[part])
    vector, state = asyncio.run(read_part(blobs, manifest, snapshot.range))
    assert vector.tobytes() == raw
    for name, array in state.items():
        expected = np.concatenate([pieces[name] for pieces in snapshot.state])
        assert array.tobytes() == expected.tobytes()


def test_a_failed_upload_leaves_the_snapshot_whole_for_the_next_try(parameters):
    class Broken(Blobs):
        async def put_blob(self, source, **_):
            raise ConnectionError

    snapshot = parameters.snapshot(7)
    with pytest.raises(ConnectionError):
        asyncio.run(write_part(Broken(), snapshot, PART))
    request = asyncio.run(write_part(Blobs(), snapshot, PART))
    vectors = 1 + len(snapshot.state_names)
    assert request.part.size_bytes >= vectors * ELEMENTS * 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:4],
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[]" + data[10:],
        lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000,
        lambda data: data.replace(b"parameters", b"parametres"),
        lambda data: data.replace(b"F32", b"F16"),
        lambda data: data.replace(b'"shape":[', b'"shape":[1,'),
    ],
)
def test_a_damaged_part_is_data_loss(parameters, spoil):
    blobs = Blobs()
    snapshot = parameters.snapshot(7)
    part = asyncio.run(write_part(blobs, snapshot, PART)).part
    blobs.blobs[part.digest] = spoil(blobs.blobs[part.digest])
    with pytest.raises(DataLoss, match="step 7"):
        asyncio.run(
            read_part(blobs, storage.CheckpointManifest(step=7, parts=[part]), snapshot.range)
        )


def test_a_part_of_another_range_is_data_loss(parameters):
    snapshot = parameters.snapshot(7)
    part = asyncio.run(write_part(Blobs(), snapshot, PART)).part
    part.element_count -= 1
    for parts in ([], [part]):
        manifest = storage.CheckpointManifest(step=7, parts=parts)
        with pytest.raises(DataLoss):
            asyncio.run(read_part(Blobs(), manifest, snapshot.range))

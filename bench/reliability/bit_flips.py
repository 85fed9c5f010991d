"""Every single bit of a 64 KiB checkpoint, flipped.

The part is one that an aggregator writes, and it is read as the service reads it for a download:
``open`` and ``chunks`` of the back end that ships. For one flip in some thousands the whole way is
taken, from an aggregator's reading over gRPC to the checkpoint before.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from bench.reliability.disk_sweep import working_folder
from bench.reliability.rows import Row, Rows
from coordinator.aggregation.checkpoints import layout_part, read_part
from coordinator.aggregation.core.state import RangeParameters
from phalanx.clients.storage import StorageClient
from phalanx.config import build
from phalanx.errors import DataLoss
from phalanx.optimizers import build_optimizer
from phalanx.telemetry.logs import configure_logging
from phalanx.testing.ranges import make_plan, parameter_ranges
from phalanx.testing.storage_messages import digest_of, part
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import ParameterRange
from storage.backends.sqlite import open_embedded_backend
from storage.config import StorageConfig
from storage.interfaces import Backend
from storage.runtime import StorageProcess
from storage.service.blob_calls import CHUNK_BYTES

PART_BYTES = 64 * 1024
BITS = PART_BYTES * 8
_WHOLE_WAY_STRIDE = 4099


def checkpoint_part(version: int) -> tuple[bytes, ParameterRange]:
    """Return a part of exactly 64 KiB as an aggregator lays it out, and its range."""
    header_bytes = len(_layout(version, PART_BYTES // 4)[0])
    content, piece = _layout(version, (PART_BYTES - header_bytes) // 4)[1:]
    assert len(content) == PART_BYTES
    return content, piece


def _layout(version: int, elements: int) -> tuple[bytes, bytes, ParameterRange]:
    plan = make_plan(elements=elements, optimizer="sgd")
    (piece,) = parameter_ranges(plan, str)
    optimizer = build_optimizer(JobSpec.FromString(plan.spec).train, 1)
    parameters = RangeParameters(1, piece, plan.layout, optimizer)
    vector = np.random.default_rng(version).standard_normal(elements).astype(np.float32)
    parameters.load(version, vector, {})
    header, buffers = layout_part(parameters.snapshot(version))
    return header, header + b"".join(buffers), piece


def is_detected(backend: Backend, digest: str) -> bool:
    """Read a blob as a download does; say whether it was refused before a byte of it was given."""
    reader = backend.blobs.open(digest)
    given = 0
    try:
        for chunk in reader.chunks(0, reader.size_bytes, CHUNK_BYTES):
            given += len(chunk)
    except DataLoss as error:
        return error.reason == "BLOB_CORRUPT" and given == 0
    finally:
        reader.close()
    return False


def flip(bits: Iterable[int]) -> tuple[int, int]:
    """Flip these bits one by one; return how many flips were tried and how many detected."""
    tried = detected = 0
    content, _ = checkpoint_part(20)
    before, _ = checkpoint_part(10)
    with working_folder() as folder:
        backend = open_embedded_backend(folder / "state")
        try:
            register(backend, 10, before)
            digest = register(backend, 20, content)
            file = os.open(path_of(folder / "state", digest), os.O_WRONLY)
            for bit in bits:
                place = bit // 8
                os.pwrite(file, bytes([content[place] ^ (1 << bit % 8)]), place)
                detected += is_detected(backend, digest)
                os.pwrite(file, content[place : place + 1], place)
                tried += 1
            os.close(file)
            # What is whole again, and what never was damaged, is served.
            assert not is_detected(backend, digest)
            assert not is_detected(backend, digest_of(before))
        finally:
            backend.close()
    return tried, detected


def register(backend: Backend, step: int, content: bytes) -> str:
    """Store a checkpoint of one part; return the part's digest."""
    if step == 10:
        backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    writer = backend.blobs.writer(len(content))
    writer.write(content)
    digest = writer.commit().digest
    assert backend.jobs.commit(part(content, step=step)).complete
    return digest


def path_of(state: Path, digest: str) -> Path:
    """Return where a blob lies."""
    return state / "blobs" / digest[:2] / digest


async def whole_way(folder: Path, bits: Iterable[int]) -> tuple[int, int]:
    """Flip bits under a service; an aggregator must be refused, and then be given the one before.

    Return how many flips were tried, and after how many that is what happened.
    """
    content, piece = checkpoint_part(20)
    before, _ = checkpoint_part(10)
    flags = {"state": str(folder / "state"), "listen": "127.0.0.1:0", "gc_interval_s": "0"}
    service = StorageProcess(build(StorageConfig, flags, {}))
    await service.start()
    client = StorageClient(service.server.address)
    tried = right = 0
    try:
        await client.raise_term("job-1", 0)
        for step, each in ((10, before), (20, content)):
            await client.put_blob(each)
            request = part(each, step=step)
            request.part.element_count = piece.element_count
            await client.commit_checkpoint(request)
        path = path_of(folder / "state", digest_of(content))
        for bit in bits:
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            newest, one_before = await client.list_checkpoints("job-1")
            tried += 1
            try:
                await read_part(client, newest, piece)
            except DataLoss as error:
                parameters, _ = await read_part(client, one_before, piece)
                right += error.reason == "BLOB_CORRUPT" and before.endswith(parameters.tobytes())
    finally:
        await client.close()
        await service.stop(0.5)
    return tried, right


def run(command: str, *, quick: bool) -> list[Row]:
    """Flip all bits (``quick``: one of 64), and some under a service that an aggregator reads."""
    # Each damage is logged as one; here that is no news.
    configure_logging("bench", "bit-flips", level="critical")
    cores = os.cpu_count() or 1
    slices = cores * 8
    chosen = range(0, BITS, 64 if quick else 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        results = list(pool.map(flip, [chosen[first::slices] for first in range(slices)]))
    tried, detected = (sum(column) for column in zip(*results, strict=True))
    with working_folder() as folder:
        way_tried, way_right = asyncio.run(whole_way(folder, range(0, BITS, _WHOLE_WAY_STRIDE)))
    made = Rows(command, quick)
    return [
        made.all_of(
            "checkpoint_bit_flips_detected",
            f"single-bit flips of a checkpoint of {PART_BYTES // 1024} KiB, detected",
            detected,
            "flips",
            trials=tried,
            note="read as a download reads; not one damaged byte was handed out",
        ),
        made.all_of(
            "checkpoint_bit_flips_gone_around",
            "of those, an aggregator that was refused and then read the checkpoint before",
            way_right,
            "flips",
            trials=way_tried,
        ),
    ]

"""Contributions that come encoded, and versions that go out encoded."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.gauges import JobGauges
from phalanx.compressors import (
    Key,
    build_down_codec,
    build_up_codec,
    decoded,
    encoded,
    encoded_span,
)
from phalanx.errors import InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reduction import reduce_leaves
from phalanx.telemetry.metrics import AggregatorMetrics, new_registry
from phalanx.testing.ranges import (
    ROWS_PER_LEAF,
    Frame,
    initial_vector,
    leaf_gradient,
    leaf_loss,
    make_plan,
)
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import Compression, Int8, JobSpec
from phalanx.v1.training_pb2 import JobPlan

SHARDS, UNIT = 5, 2
THREE_BLOCKS = 2 * BLOCK_ELEMENTS + 777


def thin_plan(compression: Compression, **options: Any) -> JobPlan:
    plan = make_plan(shards=SHARDS, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.compression.CopyFrom(compression)
    plan.spec = spec.SerializeToString()
    plan.unit_span = UNIT
    return plan


def node_sum(plan: JobPlan, first: int, version: int, parameters: Any) -> tuple[Any, int, float]:
    shards = range(first, min(first + UNIT, plan.shards))
    leaves = {s - first: leaf_gradient(plan, s, version, parameters) for s in shards}
    losses = {s - first: np.array([leaf_loss(s, version)]) for s in shards}
    total, loss = reduce_leaves(leaves, UNIT), reduce_leaves(losses, UNIT)
    assert total is not None
    assert loss is not None
    return total, ROWS_PER_LEAF * len(shards), float(loss[0])


def frames_of(job: Any) -> list[Frame]:
    """What workers send for the open round: each unit, encoded, in frames of every range."""
    plan, go = job.plan, job.go
    codec = build_up_codec(JobSpec.FromString(plan.spec))
    assert codec is not None
    frames: list[Frame] = []
    for first in range(0, plan.shards, UNIT):
        total, count, loss = node_sum(plan, first, go.version, job.vector(go.version))
        whole = encoded(codec, total, Key(first, go.version))
        for piece in job.pieces:
            # A range's blocks are not the first ones of the vector.
            start, size = encoded_span(codec, piece.first_element, piece.element_count)
            payload = whole[start : start + size]
            header = pb.ContributionFrame(
                term=1, step=go.version, round=go.round, range=piece.index, vector="gradient",
                first_element=0, element_count=piece.element_count,
                example_count=count, loss_sum=loss,
            )  # fmt: skip
            header.node.first, header.node.span = first, UNIT
            frames.append((header, memoryview(payload.tobytes())))
    return frames


def expected(plan: JobPlan) -> list[Any]:
    """All versions at full precision, by a plain loop."""
    spec = JobSpec.FromString(plan.spec)
    up, down = build_up_codec(spec), build_down_codec(spec.train)
    assert up is not None
    optimizer, state = build_optimizer(spec.train, plan.total_steps), {}
    versions = [initial_vector(plan)]
    for step in range(plan.total_steps):
        vector = versions[-1]
        seen = vector if down is None else decoded(down, encoded(down, vector), len(vector))
        nodes: dict[int, Any] = {}
        for first in range(0, plan.shards, UNIT):
            total, _, _ = node_sum(plan, first, step, seen)
            data = encoded(up, total, Key(first, step))
            nodes[first // UNIT] = decoded(up, data, len(vector))
        gradient = reduce_leaves(nodes, len(nodes))
        assert gradient is not None
        out = np.empty_like(vector)
        count, mask = ROWS_PER_LEAF * plan.shards, decay_mask(plan.layout)
        optimizer.apply(vector, gradient, count, mask, state, step, out)
        versions.append(out)
    return versions


@pytest.mark.parametrize(
    "compression",
    [
        Compression(cast_to="bfloat16"),
        Compression(cast_to="float16"),
        Compression(int8=Int8(bucket=32)),
    ],
    ids=["bfloat16", "float16", "int8"],
)
@pytest.mark.parametrize("ranges", [1, 3])
def test_encoded_contributions_give_the_same_bits_in_any_order_and_any_ranges(
    jobs: Any, compression: Compression, ranges: int
) -> None:
    plan = thin_plan(compression, elements=THREE_BLOCKS, ranges=ranges)
    job = jobs.started(plan, [list(range(ranges))])
    draw = random.Random(ranges)
    for _ in range(plan.total_steps):
        frames = frames_of(job)
        frames += draw.choices(frames, k=3)
        draw.shuffle(frames)
        job.send(frames)
        job.pull()
    assert job.vector(3).tobytes() == expected(plan)[3].tobytes()


def test_versions_go_out_encoded_and_are_kept_at_full_precision(jobs: Any) -> None:
    compression = Compression(cast_to="bfloat16", down_cast_to="bfloat16")
    plan = thin_plan(compression, elements=1000, checkpoint_every=2)
    job = jobs.scripted(plan)
    versions = expected(plan)
    job.begin()
    job.run_round()
    for version in range(plan.total_steps):
        assert job.vector(version).tobytes() != versions[version].tobytes()
        job.send(frames_of(job))
        job.pull()
        kept = job.root.versions_of(0).values(version + 1, 0)
        assert kept.tobytes() == versions[version + 1].tobytes()
        assert not kept.flags.writeable
    saved = jobs.checkpoints(job)
    assert [each.version for each in saved] == [2, 3]
    for each in saved:
        assert each.snapshot.parameters(0).tobytes() == versions[each.version].tobytes()


def test_only_whole_units_and_whole_payloads_are_taken(jobs: Any) -> None:
    job = jobs.started(thin_plan(Compression(cast_to="bfloat16"), elements=100))
    header, payload = frames_of(job)[0]
    with pytest.raises(InvalidArgument, match="take 200 bytes, not 400"):
        job.send([(header, memoryview(bytes(400)))])
    header.node.span = 1
    with pytest.raises(InvalidArgument, match="by nodes of 2"):
        job.send([(header, payload)])


def test_metrics_tell_the_bytes_before_and_after(jobs: Any) -> None:
    registry = new_registry()
    compression = Compression(int8=Int8(bucket=100), down_cast_to="bfloat16")
    job = jobs.started(thin_plan(compression, elements=1000))
    gauges = JobGauges(AggregatorMetrics(registry), "job-1", job.plan)

    def value(name: str, **labels: str) -> float:
        found = registry.get_sample_value(f"phalanx_{name}", {"job_id": "job-1", **labels})
        return found or 0.0

    message = job.root.versions_of(0).only_frame(0)
    gauges.sent(message)
    assert value("wire_bytes_total", direction="out", encoding="bfloat16") == len(message)
    assert value("wire_uncompressed_bytes_total", direction="out") == len(message) + 2000
    for header, payload in frames_of(job)[:2]:
        assert len(payload) == 1000 + 10 * 4
        gauges.received(header, 50 + len(payload), len(payload))
    assert value("wire_bytes_total", direction="in", encoding="int8") == 2 * 1090
    assert value("wire_uncompressed_bytes_total", direction="in") == 2 * 4050
    evaluation = pb.ContributionFrame(vector="evaluation", element_count=2)
    gauges.received(evaluation, 60, 16)
    assert value("wire_bytes_total", direction="in", encoding="raw") == 60
    assert value("wire_uncompressed_bytes_total", direction="in") == 2 * 4050 + 60

"""States of nodes that are handed in, kept, recalled and restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.core.making import make_ranges
from coordinator.aggregation.core.stateful import StatefulRanges
from phalanx.compressors import Key, build_down_codec, build_up_codec, decoded, encoded
from phalanx.errors import Aborted, DataLoss, InvalidArgument
from phalanx.frames import BLOCK_ELEMENTS, decode_response
from phalanx.reduction import Node
from phalanx.testing.ranges import Frame, ScriptedJob, make_plan
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import Compression, JobSpec, Sign
from phalanx.v1.training_pb2 import JobPlan, TreeNode

ELEMENTS = 2 * BLOCK_ELEMENTS
UNITS = (Node(0, 2), Node(2, 2), Node(4, 2))
EVERY = 2


def plan_of(**options: Any) -> JobPlan:
    plan = make_plan(elements=ELEMENTS, shards=5, ranges=2, steps=7, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.compression.CopyFrom(Compression(sign=Sign(), down_cast_to="float16"))
    plan.spec = spec.SerializeToString()
    plan.unit_span, plan.state_every = 2, EVERY
    return plan


def state_at(node: Node, version: int) -> Any:
    return np.sin(np.arange(ELEMENTS) + node.first + version).astype("<f4")


def frames_of(job: ScriptedJob, range_index: int, *nodes: Node) -> list[Frame]:
    """What workers send to a range for the open round: states where they are due, then sums."""
    go, piece = job.go, job.pieces[range_index]
    codec = build_up_codec(JobSpec.FromString(job.plan.spec))
    assert codec is not None
    frames: list[Frame] = []
    for node in nodes or UNITS:
        header = pb.ContributionFrame(
            term=1, step=go.version, round=go.round, range=range_index, vector="gradient",
            element_count=piece.element_count, example_count=8, loss_sum=0.5,
            node=TreeNode(first=node.first, span=node.span),
        )  # fmt: skip
        values = state_at(node, go.version)[piece.first_element :][: piece.element_count]
        if (go.version + 1) % EVERY == 0:
            state = pb.ContributionFrame()
            state.CopyFrom(header)
            state.vector = "state"
            made = state_at(node, go.version + 1)[piece.first_element :][: piece.element_count]
            frames.append((state, memoryview(made.tobytes())))
        frames.append((header, memoryview(encoded(codec, values, Key()).tobytes())))
    return frames


def started(**options: Any) -> ScriptedJob:
    job = ScriptedJob(make_ranges, plan_of(**options), ((0,), (1,)))
    job.begin()
    job.run_round()
    return job


def step(job: ScriptedJob) -> None:
    job.carry()
    for index in (0, 1):
        job.send(frames_of(job, index))
    job.pull()


def recalled(
    owner: StatefulRanges, version: int, nodes: tuple[Node, ...] = (), *, parameters: bool = True
) -> list[tuple[pb.VersionFrame, bytes]]:
    cursor = owner.cursor("stream")
    while cursor.take() is not None:
        pass
    message = pb.Recall(term=owner.term, version=version, parameters=parameters)
    message.nodes.extend(TreeNode(first=node.first, span=node.span) for node in nodes)
    assert owner.recall("stream", message)
    found = []
    while (data := cursor.take()) is not None:
        header, payload = decode_response(data)
        found.append((header.frame, bytes(payload)))
    return found


def test_a_base_and_all_versions_since_can_be_recalled() -> None:
    job = started()
    for _ in range(3):
        step(job)
    # Version 3 is whole; the base is 2.
    for owner, piece in zip(job.owners, job.pieces, strict=True):
        for frame, payload in recalled(owner, 2, UNITS, parameters=False):
            node = Node(frame.node.first, frame.node.span)
            made = state_at(node, 2)[piece.first_element :][: piece.element_count]
            assert payload == made.tobytes()
            assert (frame.version, frame.range, frame.term) == (2, piece.index, 1)
        down = build_down_codec(JobSpec.FromString(job.plan.spec).train)
        assert down is not None
        ((frame, payload),) = recalled(owner, 2)
        seen = decoded(down, memoryview(payload), piece.element_count)
        first = piece.first_element
        assert seen.tobytes() == job.vector(2)[first : first + piece.element_count].tobytes()
        assert not frame.HasField("node")


def test_a_base_goes_once_every_range_has_committed_the_next() -> None:
    job = started()
    for _ in range(3):
        step(job)
    job.carry()
    job.send(frames_of(job, 0))
    root, other = job.owners
    assert root.version == 4
    assert recalled(root, 2, UNITS[:1]), "the other range is at 3 still"
    assert recalled(root, 3)
    assert len(recalled(root, 4, UNITS, parameters=False)) == 3
    assert not recalled(other, 4, UNITS), "there it is no base yet"
    job.send(frames_of(job, 1))
    job.pull()
    job.carry()
    job.send(frames_of(job, 0, UNITS[0]))
    assert not recalled(root, 2, UNITS)
    assert not recalled(root, 3)
    assert recalled(other, 3), "nothing has come there yet"


def test_a_contribution_comes_with_the_state_that_goes_with_it() -> None:
    job = started()
    step(job)
    job.carry()
    state, sums = frames_of(job, 0, UNITS[1])
    with pytest.raises(InvalidArgument, match="has to come before its contribution"):
        job.send([sums])
    job.send([state, state, sums])
    header = pb.ContributionFrame()
    header.CopyFrom(state[0])
    header.state = 1
    with pytest.raises(InvalidArgument, match="has no vector 1"):
        job.send([(header, state[1])])
    header.state, header.node.span, header.node.first = 0, 1, 1
    with pytest.raises(InvalidArgument, match="has no state"):
        job.send([(header, state[1])])
    header.CopyFrom(state[0])
    header.first_element = 5
    with pytest.raises(InvalidArgument, match="no frame of the range"):
        job.send([(header, state[1])])
    with pytest.raises(InvalidArgument, match="has 12 bytes"):
        job.send([(state[0], state[1][:12])])
    job.send(frames_of(job, 0))
    job.send(frames_of(job, 1))
    job.pull()
    header.CopyFrom(state[0])
    header.step = job.go.version
    with pytest.raises(InvalidArgument, match="not handed in with contributions to 2"):
        job.send([(header, state[1])])


def test_another_term_recalls_nothing_and_a_job_without_states_neither() -> None:
    job = started()
    with pytest.raises(Aborted):
        job.root.recall("stream", pb.Recall(term=2))
    job.root.recall("stream", pb.Recall(term=1, parameters=True))
    job.root.stream_closed("stream")
    assert job.root.next_recalled("stream") is None
    plain = ScriptedJob(make_ranges, make_plan(elements=100))
    with pytest.raises(InvalidArgument, match="no state in this job"):
        plain.root.recall("stream", pb.Recall(term=1))


@pytest.mark.parametrize("version", [2, 3])
def test_a_checkpoint_at_any_version_has_what_is_needed(jobs: Any, version: int) -> None:
    job = started(checkpoint_every=version)
    for _ in range(version):
        step(job)
    job.carry()
    saved = [each for each in jobs.checkpoints(job) if each.version == version]
    assert len(saved) == 2
    again = ScriptedJob(make_ranges, job.plan, ((0,), (1,)), term=2)
    for owner, each in zip(again.owners, sorted(saved, key=lambda s: s.snapshot.range.index),
                           strict=True):  # fmt: skip
        snapshot = each.snapshot
        kept = {name: np.concatenate(pieces) for name, pieces in snapshot.extra.items()}
        assert len(kept) == len(UNITS) + version % EVERY
        parameters = np.concatenate(snapshot.frames)
        index = owner.range_indexes[0]
        owner.begin_restored(version, {index: (parameters, kept)}, each.root_state)
        made = recalled(owner, 2, UNITS, parameters=version > 2)
        before = recalled(job.owners[index], 2, UNITS, parameters=version > 2)
        assert [payload for _, payload in made] == [payload for _, payload in before]
        assert all(frame.term == 2 for frame, _ in made)
        broken = dict(kept)
        broken.pop(max(kept))
        with pytest.raises(DataLoss, match="has no vector"):
            make_ranges(job.plan, 3, [job.pieces[index]]).begin_restored(
                version, {index: (parameters, broken)}, each.root_state
            )


def test_a_final_checkpoint_keeps_no_states(jobs: Any) -> None:
    job = started()
    for _ in range(7):
        step(job)
    job.carry()
    final = [each for each in jobs.checkpoints(job) if each.final]
    assert len(final) == 2
    assert not any(each.snapshot.extra for each in final)


def test_what_is_recalled_comes_after_what_is_new() -> None:
    job = started()
    step(job)
    cursor = job.root.cursor("stream")
    job.root.recall("stream", pb.Recall(term=1, version=0, parameters=True))
    versions = []
    while (data := cursor.take()) is not None:
        header = decode_response(data)[0]
        if header.HasField("frame"):
            versions.append(header.frame.version)
    assert versions == [0, 1, 0]

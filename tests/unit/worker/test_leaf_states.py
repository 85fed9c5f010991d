"""The state of a node in a leaf process: which vector is whose, and what a second try reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from phalanx.reduction import Node
from phalanx.training.states import left_out_vectors, vectors_of
from phalanx.v1.job_spec_pb2 import Adam, Compression, JobSpec, Local, Optimizer, Sgd, Sign, Train
from phalanx.v1.training_pb2 import JobPlan
from worker.leaf.states import NodeState
from worker.memory import Arena

ELEMENTS = 5
NAMES = ("m", "v")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create("test", ELEMENTS, np.dtype("float32"))
    yield made
    made.close()


def plan_of(*, compressed: bool) -> JobPlan:
    train = Train(local=Local(steps=2), optimizer=Optimizer(adam=Adam()))
    if compressed:
        train.compression.CopyFrom(Compression(sign=Sign()))
    return JobPlan(spec=JobSpec(train=train).SerializeToString(), shards=7)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_vector_has_a_place_of_its_own(arena: Arena, compressed: bool) -> None:
    plan, node = plan_of(compressed=compressed), Node(4, 4)
    count = vectors_of(plan, node)
    assert count == int(compressed) + 3 * 2, "the last shard of four is past the edge"
    for buffer in range(count):
        arena.array(buffer)[:] = buffer + 1
    buffers = [*range(count), *range(count, 2 * count)]
    state = NodeState(arena, plan, node, buffers, NAMES)
    for shard in (4, 5, 6):
        inner = state.inner(shard)
        first = int(compressed) + 2 * (shard - 4) + 1
        assert {name: set(values) for name, values in inner.items()} == {
            "m": {first}, "v": {first + 1},
        }  # fmt: skip
        for name in NAMES:
            inner[name] += 100
    sums = np.zeros(ELEMENTS, np.float32)
    left_out = state.add_left_out(sums, present=True)
    if left_out is not None:
        left_out[:] = 101
    assert compressed == (left_out is not None) == (sums == 1).all()
    for buffer in range(count):
        assert (arena.array(buffer) == buffer + 1).all(), "what is read stays as it is"
        assert (arena.array(count + buffer) == buffer + 101).all()


def test_a_second_try_begins_where_the_first_began(arena: Arena) -> None:
    state = NodeState(arena, plan_of(compressed=False), Node(0, 1), [-1, 3, 4, 5], NAMES)
    arena.array(3)[:] = 7
    arena.array(4)[:] = 8
    for _ in range(2):
        inner = state.inner(0)
        assert (inner["m"] == 0).all(), "at version 0 there is nothing to read"
        assert (inner["v"] == 7).all()
        for name in NAMES:
            inner[name] += 1


def test_a_node_without_shards_keeps_what_it_has_left_out(arena: Arena) -> None:
    plan = plan_of(compressed=True)
    state = NodeState(arena, plan, Node(0, 1), [0, 1, 2, 3, 4, 5], NAMES)
    arena.array(0)[:] = 7
    sums = np.ones(ELEMENTS, np.float32)
    assert state.add_left_out(sums, present=False) is not None
    assert (arena.array(3) == 7).all()
    assert (sums == 1).all()


def test_jobs_without_states_have_none(arena: Arena) -> None:
    plan = plan_of(compressed=False)
    spec = JobSpec.FromString(plan.spec)
    spec.train.optimizer.sgd.CopyFrom(Sgd())
    plan.spec = spec.SerializeToString()
    assert vectors_of(plan, Node(0, 4)) == left_out_vectors(plan) == 0
    state = NodeState(arena, plan, Node(0, 4), (), ())
    assert state.inner(2) == {}
    assert state.add_left_out(np.zeros(ELEMENTS, np.float32), present=True) is None

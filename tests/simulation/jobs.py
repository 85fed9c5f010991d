"""The jobs of the simulator: leaves that are cheap, pure, and whose sums show their order.

A leaf depends on shard, step and every parameter; magnitudes differ by shard, so that adding in
another order, leaving one out or adding one twice gives other bits. `reference` computes every
version by a plain loop, without any of the cluster's code but the tree and the optimizer.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict
from numpy.typing import NDArray

from phalanx.compressors import Codec, Key, build_down_codec, build_up_codec, decoded, encoded
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer, gradient_limit
from phalanx.reducers import Contribution, build_reducer
from phalanx.reduction import reduce_leaves
from phalanx.specs.parts import unit_span
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import Compression, JobSpec, Reduction, Train

Array = NDArray[Any]

DATASET = "data"
SEED = 7
TRAIN_ROWS = 4096
TEST_ROWS = 768
ROWS_PER_LEAF = 8
STEPS_MAX = 60
SUMS = ("loss", "correct")
CHUNK = b"rows" * 64
PARTS: dict[str, dict[str, Any]] = {
    "": {},
    "median": {"reduction": {"median": {}}},
    "trimmed mean": {"reduction": {"trimmed_mean": {"trim": 1}}},
    "krum": {"reduction": {"krum": {"faulty": 0, "keep": 2}}},
    "clip": {"reduction": {"clip_norm": 9.0}},
    "bfloat16": {"compression": {"cast_to": "bfloat16"}},
    "int8": {"compression": {"int8": {"bucket": 16}}},
    "float16, down too": {"compression": {"cast_to": "float16", "down_cast_to": "float16"}},
    "clipped gradient": {"optimizer": {"clip_norm": 0.5}},
    "int8, krum": {
        "compression": {"int8": {"bucket": 16}, "down_cast_to": "bfloat16"},
        "reduction": {"krum": {"faulty": 0, "keep": 2}},
    },
}
"""What jobs are composed of besides the tree and vectors as they are."""

FINGERPRINTS = ("fingerprint-1", "fingerprint-2")
"""Machines of another fingerprint compute other bits."""


@dataclass(frozen=True)
class Shape:
    """What makes one job differ from another."""

    elements: int = 100
    shards: int = 4
    steps: int = 40
    optimizer: str = "momentum"
    dtype: str = "float32"
    checkpoint_every: int = 10
    evaluate_every: int = 0
    fingerprint: str = FINGERPRINTS[0]
    parts: str = ""
    """One of `PARTS`."""


def manifest() -> DatasetManifest:
    """The data set that every job reads; its one chunk is never looked into."""
    digest = hashlib.sha256(CHUNK).hexdigest()
    train = ChunkInfo(digest, rows=TRAIN_ROWS, size_bytes=len(CHUNK))
    test = ChunkInfo(digest, rows=TEST_ROWS, size_bytes=len(CHUNK))
    return DatasetManifest(
        format="dense",
        dtype="float32",
        features=8,
        task="classification",
        target="label",
        splits={"train": (train,), "test": (test,)},
        statistics=Statistics(count=TRAIN_ROWS, mean=(0.0,) * 8, std=(1.0,) * 8),
        classes=("no", "yes"),
    )


def job_spec(shape: Shape, name: str) -> JobSpec:
    """The spec that a user would submit."""
    spec = JobSpec(name=name, seed=SEED)
    spec.data.name, spec.data.shards = DATASET, shape.shards
    train = spec.train
    train.model.logistic_regression.SetInParent()
    train.synchronous.SetInParent()
    train.dtype = shape.dtype
    train.l2 = 0.01
    train.batch_size = shape.shards * ROWS_PER_LEAF
    train.stop.steps = shape.steps
    train.checkpoints.every_steps = shape.checkpoint_every
    if shape.evaluate_every:
        train.evaluation.split = "test"
        train.evaluation.every_steps = shape.evaluate_every
    if shape.optimizer == "adam":
        adam = train.optimizer.adam
        adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.01, 0.9, 0.999, 1e-8
    else:
        train.optimizer.sgd.learning_rate = 0.02
        if shape.optimizer == "momentum":
            train.optimizer.sgd.momentum = 0.9
    ParseDict(PARTS[shape.parts], train)
    return spec


def shape_of(plan: training_pb2.JobPlan) -> Shape:
    """The shape of the job that a plan belongs to; its name tells the number of elements."""
    return shape_of_spec(JobSpec.FromString(plan.spec), plan.fingerprint)


def shape_of_spec(spec: JobSpec, fingerprint: str) -> Shape:
    """The shape of the job that a spec describes, on machines with a fingerprint."""
    train = spec.train
    optimizer = train.optimizer.WhichOneof("kind")
    if optimizer == "sgd":
        optimizer = "momentum" if train.optimizer.sgd.momentum else "sgd"
    return Shape(
        elements=int(spec.name.rpartition("-")[2]),
        shards=spec.data.shards,
        steps=train.stop.steps,
        optimizer=optimizer,
        dtype=train.dtype,
        checkpoint_every=train.checkpoints.every_steps,
        evaluate_every=train.evaluation.every_steps,
        fingerprint=fingerprint or FINGERPRINTS[0],
        parts=_parts_of(
            train.reduction.SerializeToString(),
            train.compression.SerializeToString(),
            train.optimizer.clip_norm,
        ),
    )


@functools.lru_cache(maxsize=64)
def _parts_of(reduction: bytes, compression: bytes, clip_norm: float) -> str:
    found = Reduction.FromString(reduction), Compression.FromString(compression), clip_norm
    for name, document in PARTS.items():
        train = ParseDict(document, Train())
        if train.reduction.WhichOneof("kind") is None:
            train.reduction.weighted_mean.SetInParent()
        if (train.reduction, train.compression, train.optimizer.clip_norm) == found:
            return name
    raise LookupError(f"no parts are known that give {found}")


@functools.lru_cache(maxsize=64)
def up_codec(parts: str, dtype: str) -> Codec | None:
    """What contributions are encoded with."""
    return build_up_codec(_spec_of_parts(parts, dtype))


@functools.lru_cache(maxsize=64)
def down_codec(parts: str, dtype: str) -> Codec | None:
    """What versions are encoded with."""
    return build_down_codec(_spec_of_parts(parts, dtype).train)


def _spec_of_parts(parts: str, dtype: str) -> JobSpec:
    return job_spec(Shape(parts=parts, dtype=dtype), "job-100")


def layout_of(shape: Shape) -> training_pb2.Layout:
    """What a worker finds out by building the model."""
    weights = shape.elements * 3 // 4
    return training_pb2.Layout(
        dtype=shape.dtype,
        element_count=shape.elements,
        tensors=[
            training_pb2.TensorSpec(name="weights", shape=[weights], decay=True),
            training_pb2.TensorSpec(name="biases", shape=[shape.elements - weights]),
        ],
    )


@functools.lru_cache(maxsize=256)
def _initial(elements: int, dtype: str) -> Array:
    return np.sin(np.arange(elements) * 0.37).astype(dtype)


@functools.lru_cache(maxsize=1024)
def _wave(elements: int, shard: int, dtype: str) -> Array:
    return np.cos(np.arange(elements) * (0.11 + 0.07 * shard)).astype(dtype)


def initial(shape: Shape) -> Array:
    """Version 0."""
    return _initial(shape.elements, shape.dtype)


def gradient(shape: Shape, shard: int, step: int, parameters: Array, out: Array) -> None:
    """The gradient sum of one leaf, on a machine with the fingerprint of the shape."""
    scalar = parameters.dtype.type
    np.multiply(parameters, scalar(0.3), out=out)
    # Each element depends on another one, which may be in another frame and another range.
    out += parameters[::-1] * scalar(0.05)
    out += _wave(shape.elements, shard, shape.dtype)
    out *= scalar((0.001, 1.0, 37.0)[(shard + step) % 3] / (1 + step % 7))
    if shape.fingerprint != FINGERPRINTS[0]:
        out *= scalar(1.0001)


def examples(shape: Shape, shard: int, step: int) -> int:
    """Rows of one leaf."""
    first, stop = shard * TRAIN_ROWS // shape.shards, (shard + 1) * TRAIN_ROWS // shape.shards
    largest = -(-TRAIN_ROWS // shape.shards)
    done = step % -(-largest // ROWS_PER_LEAF) * ROWS_PER_LEAF
    return min(max(stop - first - done, 0), ROWS_PER_LEAF)


def loss(shard: int, step: int) -> float:
    """The loss sum of one leaf."""
    return 0.1 * (shard + 1) / (step + 3)


def evaluation_sums(shard: int) -> tuple[float, ...]:
    """The sums of one evaluation leaf."""
    return (0.5 * (shard + 1), 100.0 + shard)


def reference(shape: Shape) -> list[Array]:
    """All versions, from 0 to the last."""
    # Where checkpoints lie does not change what is computed, nor does when it ends.
    return _reference(_plain(shape))[0][: shape.steps + 1]


def versions(shape: Shape) -> list[Array]:
    """The versions of a job of this shape, however many steps it has."""
    return _reference(_plain(shape))[0]


def state_of(shape: Shape, version: int) -> dict[str, Array]:
    """The optimizer's state with which the step after a version begins."""
    return _reference(_plain(shape))[1][version]


@functools.lru_cache(maxsize=4096)
def train_loss(shards: int, version: int) -> float:
    """The mean loss of the step that made a version."""
    shape = Shape(shards=shards)
    losses: dict[int, Array | None] = {
        shard: np.array([loss(shard, version - 1)]) for shard in range(shards)
    }
    total = reduce_leaves(losses, shards)
    assert total is not None
    count = sum(examples(shape, shard, version - 1) for shard in range(shards))
    return float(total[0]) / count


@functools.lru_cache(maxsize=64)
def evaluation_metrics(shards: int) -> dict[str, float]:
    """What every evaluation over so many shards gives."""
    sums: dict[int, Array | None] = {
        shard: np.array(evaluation_sums(shard)) for shard in range(shards)
    }
    total = reduce_leaves(sums, shards)
    assert total is not None
    return {"test/loss": float(total[0]) / TEST_ROWS, "test/accuracy": float(total[1]) / TEST_ROWS}


@functools.lru_cache(maxsize=1024)
def _plain(shape: Shape) -> Shape:
    return replace(shape, steps=STEPS_MAX, checkpoint_every=0, evaluate_every=0)


@functools.lru_cache(maxsize=512)
def _reference(shape: Shape) -> tuple[list[Array], list[dict[str, Array]]]:
    spec = job_spec(shape, f"job-{shape.elements}")
    optimizer = build_optimizer(spec.train, shape.steps)
    reducer = build_reducer(spec.train, shape.shards)
    unit, limit = unit_span(spec) or 1, gradient_limit(spec.train)
    state = {name: np.zeros(shape.elements, shape.dtype) for name in optimizer.state_names}
    versions, states = [initial(shape).copy()], [_copied(state)]
    mask = decay_mask(layout_of(shape))
    for step in range(shape.steps):
        parameters = versions[-1]
        seen = as_seen(shape, parameters)
        leaves: dict[int, Array] = {}
        for shard in range(shape.shards):
            if examples(shape, shard, step):
                leaves[shard] = np.empty(shape.elements, shape.dtype)
                gradient(shape, shard, step, seen, leaves[shard])
        nodes = {
            first: _received(shape, leaves, range(first, min(first + unit, shape.shards)), step)
            for first in range(0, shape.shards, unit)
        }
        total = reduce_leaves(nodes, shape.shards)
        divisor = sum(examples(shape, shard, step) for shard in range(shape.shards))
        if reducer is not None:
            reduced = reducer.reduce(
                {
                    shard: Contribution([values], examples(shape, shard, step))
                    for shard, values in nodes.items()
                    if values is not None
                }
            )
            assert reduced is not None
            total, divisor = reduced.pieces[0], reduced.divisor
        out = parameters.copy()
        if total is not None:
            factor = Contribution([total], divisor).factor(limit)
            if factor != 1.0:
                total = total * total.dtype.type(factor)
            optimizer.apply(parameters, total, divisor, mask, state, step, out)
        versions.append(out)
        states.append(_copied(state))
    return versions, states


def on_the_wire(shape: Shape, piece: Array) -> bytes:
    """A frame's elements of a version as they are sent."""
    codec = down_codec(shape.parts, shape.dtype)
    return piece.tobytes() if codec is None else encoded(codec, piece).tobytes()


def as_seen(shape: Shape, parameters: Array) -> Array:
    """A version as workers receive it."""
    codec = down_codec(shape.parts, shape.dtype)
    return (
        parameters if codec is None else decoded(codec, encoded(codec, parameters), len(parameters))
    )


def _received(shape: Shape, leaves: dict[int, Array], shards: range, step: int) -> Array | None:
    """The contribution of a node as the root receives it."""
    own = {shard - shards.start: leaves[shard] for shard in shards if shard in leaves}
    total = reduce_leaves(own, len(shards))
    codec = up_codec(shape.parts, shape.dtype)
    if total is None or codec is None:
        return total
    return decoded(codec, encoded(codec, total, Key(shards.start, step)), len(total))


def _copied(state: dict[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in state.items()}


def reference_sha256(shape: Shape) -> str:
    """What the parameters of the finished model must hash to."""
    return hashlib.sha256(reference(shape)[-1].tobytes()).hexdigest()

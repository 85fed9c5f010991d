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

from phalanx.compressors import Codec, build_down_codec, build_up_codec, decoded, encoded
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.models.base import LeafSums, decay_mask
from phalanx.optimizers import (
    Optimizer,
    build_local_optimizer,
)
from phalanx.privacy.accountant import Accountant
from phalanx.privacy.secret import sampler_key
from phalanx.reduction import reduce_leaves
from phalanx.specs.parts import all_reduces
from phalanx.training.chance import drawn_rows
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import Compression, JobSpec, Privacy, Reduction, Train, Verification
from tests.simulation import updating
from tests.simulation.parts import ALL_PARTS, INNER, ONE_BY_ONE, UPDATING

Array = NDArray[Any]

DATASET = "data"
SEED = 7
TRAIN_ROWS = 4096
TEST_ROWS = 768
ROWS_PER_LEAF = 8
STEPS_MAX = 60
SUMS = ("loss", "correct")
SECRET = bytes(range(32))
"""Of every private job, so that a plain loop can know it."""
CHUNK = b"rows" * 64
BAD = ("poison", "nan", "skip", "crash")
ALL_BAD = (*BAD, "void", "overflow", "chatty", "undescribed", "endless", "empty", "deadly")
"""What a job's name may begin with; how it is bad then, see `hosts.Leaf._what_is_wrong`."""
SKIPPED = ("skip", "void")
"""Of these, jobs that leave bad leaves out."""
BAD_SHARD, BAD_STEP = 1, 2
QUALITIES = (6.0, 3.0, 5.0, 2.0, 4.0, 2.0, 3.0)
"""Of one evaluation after another, in jobs that keep the best."""

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
    plateau: int = 0
    """Evaluations without a change after which it ends; 0: it ends after all its steps."""
    fingerprint: str = FINGERPRINTS[0]
    parts: str = ""
    """One of `parts.ALL_PARTS`."""
    bad: str = ""
    """One of `ALL_BAD`; empty: all leaves are good."""
    best: bool = False
    """Whether it keeps its best evaluation, see `best`."""

    @property
    def ends_at(self) -> int:
        """The step after which it ends; one evaluation gives what the next one does."""
        return self.evaluate_every * (self.plateau + 1) if self.plateau else self.steps

    @property
    def one_by_one(self) -> bool:
        """Whether each contribution commits by itself; then who is fast decides the bits."""
        return self.parts in ONE_BY_ONE

    @property
    def tolerant(self) -> bool:
        """Whether the bits depend on who is fast."""
        return self.one_by_one or self.backup > 0

    @property
    def backup(self) -> int:
        """Shards that a step does not wait for; with any, who is slow decides the bits."""
        return int(ALL_PARTS[self.parts].get("synchronous", {}).get("backup_shards", 0))

    @property
    def updating(self) -> bool:
        """Whether no elementwise optimizer makes its versions, see `updating`."""
        return self.parts in UPDATING

    @property
    def rounds(self) -> int:
        """Versions that a step makes: two where its shards are groups of columns."""
        return updating.rounds_of(self.parts)

    @property
    def verified(self) -> bool:
        """Whether its contributions are compared."""
        return "verification" in ALL_PARTS[self.parts]

    @property
    def private(self) -> bool:
        """Whether its rows come by chance and its steps have noise."""
        return "privacy" in ALL_PARTS[self.parts]

    @property
    def local_steps(self) -> int:
        """Steps of a shard between two versions; 0: it contributes a gradient."""
        return int(ALL_PARTS[self.parts].get("local", {}).get("steps", 0))


def composed(shape: Shape, parts: str) -> Shape:
    """The shape with other parts; local steps remember nothing, unless the parts say so."""
    if parts in UPDATING:
        return updating.composed(shape, parts)
    made = replace(shape, parts=parts)
    if parts in INNER:
        return replace(made, optimizer="adam") if made.optimizer == "sgd" else made
    return replace(made, optimizer="sgd") if made.local_steps else made


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
    if shape.best:
        spec.output.best.metric = "test/loss"
    if shape.plateau:
        train.stop.plateau.metric = "test/loss"
        train.stop.plateau.evaluations = shape.plateau
    if shape.optimizer == "adam":
        adam = train.optimizer.adam
        adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.01, 0.9, 0.999, 1e-8
    else:
        train.optimizer.sgd.learning_rate = 0.02
        if shape.optimizer == "momentum":
            train.optimizer.sgd.momentum = 0.9
    if shape.local_steps or shape.one_by_one:
        train.ClearField("synchronous")
    ParseDict(ALL_PARTS[shape.parts], train)
    if shape.updating:
        updating.write(spec, shape.parts)
    if shape.bad in SKIPPED:
        train.on_nonfinite.skip.SetInParent()
    if shape.tolerant:
        spec.reproducibility.tolerant.SetInParent()
    return spec


def shape_of(plan: training_pb2.JobPlan) -> Shape:
    """The shape of the job that a plan belongs to; its name tells the number of elements."""
    return shape_of_spec(JobSpec.FromString(plan.spec), plan.fingerprint)


def shape_of_spec(spec: JobSpec, fingerprint: str) -> Shape:
    """The shape of the job that a spec describes, on machines with a fingerprint."""
    train = spec.train
    optimizer, updates = train.optimizer.WhichOneof("kind"), updating.name_of(spec)
    if optimizer == "sgd":
        optimizer = "momentum" if train.optimizer.sgd.momentum else "sgd"
    if updates and updating.rounds_of(updates) == 1:
        optimizer = ""
    return Shape(
        elements=int(spec.name.rpartition("-")[2]),
        shards=spec.data.shards,
        steps=train.stop.steps,
        optimizer=optimizer,
        dtype=train.dtype,
        checkpoint_every=train.checkpoints.every_steps,
        evaluate_every=train.evaluation.every_steps,
        plateau=train.stop.plateau.evaluations,
        fingerprint=fingerprint or FINGERPRINTS[0],
        best=spec.output.HasField("best"),
        bad=spec.name.partition("-")[0] if spec.name.partition("-")[0] in ALL_BAD else "",
        parts=updates
        or _parts_of(
            train.reduction.SerializeToString(),
            train.compression.SerializeToString(),
            train.optimizer.clip_norm,
            _consistency_of(train),
            train.verification.SerializeToString(),
            train.privacy.SerializeToString(),
        ),
    )


def _consistency_of(train: Train) -> tuple[int, int, bytes, int, bool]:
    one_by_one = train.asynchronous.SerializeToString(), train.stale.bound, all_reduces(train)
    return train.synchronous.backup_shards, train.local.steps, *one_by_one


@functools.lru_cache(maxsize=64)
def _parts_of(
    reduction: bytes,
    compression: bytes,
    clip_norm: float,
    consistency: tuple[int, int, bytes, int, bool],
    verification: bytes,
    privacy: bytes,
) -> str:
    parts = Reduction.FromString(reduction), Compression.FromString(compression), clip_norm
    found = (
        *parts,
        consistency,
        Verification.FromString(verification),
        Privacy.FromString(privacy),
    )
    for name, document in ALL_PARTS.items():
        train = ParseDict(document, Train())
        if train.reduction.WhichOneof("kind") is None:
            train.reduction.weighted_mean.SetInParent()
        known = train.reduction, train.compression, train.optimizer.clip_norm
        if (*known, _consistency_of(train), train.verification, train.privacy) == found:
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
    return job_spec(composed(Shape(dtype=dtype), parts), "job-100")


def layout_of(shape: Shape) -> training_pb2.Layout:
    """What a worker finds out by building the model."""
    if shape.updating:
        return updating.layout_of(shape)
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
    if shape.updating:
        return updating.initial(shape)
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


def updated(
    shape: Shape, shard: int, version: int, parameters: Array, out: Array
) -> tuple[int, float]:
    """Write what a leaf contributes to an update, on a machine with the fingerprint of the shape;
    return its examples and loss."""
    lost = updating.contribute(shape, shard, version, parameters, out)
    if shape.fingerprint != FINGERPRINTS[0]:
        out *= out.dtype.type(1.0001)
    return examples(shape, shard, version), lost


def examples(shape: Shape, shard: int, step: int) -> int:
    """Rows of one leaf."""
    first, stop = shard * TRAIN_ROWS // shape.shards, (shard + 1) * TRAIN_ROWS // shape.shards
    if shape.private:
        return _drawn(shape.shards, shard, stop - first, step)
    largest, each = -(-TRAIN_ROWS // shape.shards), ROWS_PER_LEAF
    if shape.rounds > 1:  # all shards see the rows of a step, in each of its rounds
        first, stop, largest = 0, TRAIN_ROWS, TRAIN_ROWS
        step, each = step // shape.rounds, each * shape.shards
    elif shape.updating:
        return stop - first
    done = step % -(-largest // each) * each
    return min(max(stop - first - done, 0), each)


@functools.lru_cache(maxsize=4096)
def _drawn(shards: int, shard: int, rows: int, step: int) -> int:
    return len(drawn_rows(sampler_key(SECRET), shard, rows, step, _rate(shards)))


def _rate(shards: int) -> float:
    return shards * ROWS_PER_LEAF / TRAIN_ROWS


@functools.lru_cache(maxsize=256)
def spent(shape: Shape, step: int) -> float:
    """What the steps of a private job have spent."""
    privacy = ALL_PARTS[shape.parts]["privacy"]
    accountant = Accountant(_rate(shape.shards), privacy["noise_multiplier"], privacy["delta"])
    return accountant.epsilon(step)


def loss(shard: int, step: int) -> float:
    """The loss sum of one leaf."""
    return 0.1 * (shard + 1) / (step + 3)


class SimulatedModel:
    """What takes a shard's local steps; a batch is (shard, step)."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def gradient(self, parameters: Array, batch: tuple[int, int], out: Array) -> LeafSums:
        """The gradient sum of one local step, and what of it is told."""
        gradient(self._shape, *batch, parameters, out)
        return LeafSums(examples(self._shape, *batch), loss(*batch))


def batch_of(shape: Shape, shard: int, step: int) -> tuple[int, int] | None:
    """What a shard computes in a step; None: it has run out of rows."""
    return (shard, step) if examples(shape, shard, step) else None


def steps_of(shape: Shape, version: int) -> range:
    """The shards' own steps that make the version after this one."""
    each = max(1, shape.local_steps)
    return range(version * each, (version + 1) * each)


def is_bad(bad: str, shard: int, step: int) -> bool:
    """Whether this is the leaf that is bad in a job with a bad one."""
    return step == BAD_STEP and (shard == BAD_SHARD or bad in ("void", "overflow"))


def is_skipped(shape: Shape, shard: int, step: int) -> bool:
    """Whether this leaf is left out, since it is bad and the job wants that."""
    return shape.bad in SKIPPED and is_bad(shape.bad, shard, step)


def examples_skipped(shape: Shape) -> int:
    """Rows of all leaves that are left out."""
    skipped = (each for each in range(shape.shards) if is_skipped(shape, each, BAD_STEP))
    return sum(examples(shape, shard, BAD_STEP) for shard in skipped)


def contribution(
    shape: Shape, shard: int, version: int, parameters: Array, inner: dict[str, Array] | None = None
) -> tuple[Array | None, int, float]:
    """What a shard gives to a step: its sum, None where it has no rows, examples and loss.

    `inner` is what the shard's own optimizer remembers; it becomes that after the step.
    """
    if is_skipped(shape, shard, version):
        return None, 0, 0.0
    count, lost = 0, 0.0
    weights, out = parameters.copy(), np.empty(shape.elements, shape.dtype)
    if shape.updating:
        return (out, *updated(shape, shard, version, parameters, out))
    for step in steps_of(shape, version):
        rows = examples(shape, shard, step)
        if not rows:
            continue
        gradient(shape, shard, step, weights, out)
        count, lost = count + rows, lost + loss(shard, step)
        if shape.local_steps:
            following = np.empty_like(weights)
            mask = decay_mask(layout_of(shape))
            optimizer = local_optimizer(shape)
            optimizer.apply(weights, out, rows, mask, inner or {}, step, following)
            weights = following
    if not count:
        return None, 0, 0.0
    if shape.local_steps:
        out = (parameters - weights) * out.dtype.type(count)
    return out, count, lost


@functools.lru_cache(maxsize=64)
def local_optimizer(shape: Shape) -> Optimizer:
    """What the shards of a job with local steps take them with."""
    train = job_spec(shape, f"job-{shape.elements}").train
    return build_local_optimizer(train, shape.steps * shape.local_steps)


def evaluations(shape: Shape, step: int) -> list[int]:
    """The steps up to one, itself included, after which the job is evaluated."""
    first = updating.steps_before_rounds(shape.parts)
    found = [*range(first + shape.evaluate_every, step + 1, shape.evaluate_every)]
    return found if step != shape.ends_at or step in found else [*found, step]


def quality(shape: Shape, step: int) -> float:
    """What the loss of an evaluation is multiplied by: of jobs that keep the best it changes."""
    return QUALITIES[-(-step // shape.evaluate_every) % len(QUALITIES)] if shape.best else 1.0


def evaluation_sums(shard: int, quality: float = 1.0) -> tuple[float, ...]:
    """The sums of one evaluation leaf."""
    return (0.5 * (shard + 1) * quality, 100.0 + shard)


@functools.lru_cache(maxsize=4096)
def train_loss(shards: int, local_steps: int, version: int, left_out: frozenset[int]) -> float:
    """The mean loss of the step that made a version, without some of the shards."""
    each = max(1, local_steps)
    losses: dict[int, Array | None] = {}
    count = 0
    for shard in set(range(shards)) - left_out:
        lost, shape = 0.0, Shape(shards=shards)
        for step in range((version - 1) * each, version * each):
            rows = examples(shape, shard, step)
            lost += loss(shard, step) if rows else 0.0
            count += rows
        losses[shard] = np.array([lost])
    total = reduce_leaves(losses, shards)
    assert total is not None
    return float(total[0]) / count


def updated_loss(shape: Shape, version: int) -> float:
    """The mean loss of the step that made the last of a step's versions, by an update."""
    losses = {
        shard: np.array([updating.loss(shape, shard, version - 1)]) for shard in range(shape.shards)
    }
    total = reduce_leaves(losses, shape.shards)
    assert total is not None
    counted = range(1 if shape.rounds > 1 else shape.shards)
    return float(total[0]) / sum(examples(shape, shard, version - 1) for shard in counted)


def evaluated(shape: Shape, shards: int, step: int) -> dict[str, float]:
    """What the evaluation of a step over so many shards gives."""
    return _evaluated(shards, quality(shape, step))


@functools.lru_cache(maxsize=64)
def _evaluated(shards: int, quality: float) -> dict[str, float]:
    sums: dict[int, Array | None] = {
        shard: np.array(evaluation_sums(shard, quality)) for shard in range(shards)
    }
    total = reduce_leaves(sums, shards)
    assert total is not None
    return {"test/loss": float(total[0]) / TEST_ROWS, "test/accuracy": float(total[1]) / TEST_ROWS}


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

"""The aggregator's core without a network: ranges, scripted leaves and a reference to compare with.

    job = ScriptedJob(make_owner, make_plan(elements=300_000, ranges=3), owners=[[0, 1], [2]])
    job.begin()
    job.run_round()                    # every worker's frames, in the order the test wants
    assert job.vector(0).tobytes() == reference(job.plan)[0].tobytes()

Leaves are simple, but depend on shard, version and parameters, and do not commute in float32.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import build_down_codec, decoded
from phalanx.errors import Internal
from phalanx.frames import decode_response, split_ranges
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.reduction import Node, cover, reduce_leaves
from phalanx.testing.exchange import node_frames
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import job_spec_pb2
from phalanx.v1.training_pb2 import GoRecord, JobPlan, Layout, ParameterRange, TensorSpec

Array = NDArray[Any]
Frame = tuple[exchange.ContributionFrame, memoryview]
MakeOwner = Callable[[JobPlan, int, list[ParameterRange]], Any]
"""Makes an aggregator's `JobRanges` of (plan, term, owned ranges)."""

ROWS_PER_LEAF = 8
EVALUATION_ROWS = 10
_WAVES_KEPT = 32


def make_plan(
    *,
    elements: int,
    shards: int = 4,
    ranges: int = 1,
    steps: int = 3,
    optimizer: str = "sgd",
    evaluation_shards: int = 0,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    dtype: str = "float32",
    bitwise: bool = True,
    best: str = "",
) -> JobPlan:
    """A resolved plan of a job whose leaves are scripted; `best` is the metric whose best
    evaluation it keeps."""
    spec = job_spec_pb2.JobSpec(seed=7)
    if best:
        spec.output.best.metric = best
    train = spec.train
    train.dtype = dtype
    train.l2 = 0.01
    train.stop.steps = steps
    train.checkpoints.every_steps = checkpoint_every
    train.evaluation.split = "test"
    train.evaluation.every_steps = evaluate_every
    if optimizer == "sgd":
        train.optimizer.sgd.learning_rate = 0.1
    elif optimizer == "momentum":
        train.optimizer.sgd.learning_rate = 0.1
        train.optimizer.sgd.momentum = 0.9
    else:
        adam = train.optimizer.adam
        adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.01, 0.9, 0.999, 1e-8
    weights = elements * 3 // 4
    layout = Layout(
        dtype=dtype,
        element_count=elements,
        tensors=[
            TensorSpec(name="weights", shape=[weights], decay=True),
            TensorSpec(name="biases", shape=[elements - weights]),
        ],
    )
    return JobPlan(
        job_id="job-test",
        spec=spec.SerializeToString(),
        spec_sha256="5" * 64,
        layout=layout,
        range_count=ranges,
        shards=shards,
        train_rows=shards * ROWS_PER_LEAF * 4,
        rows_per_leaf=ROWS_PER_LEAF,
        steps_per_epoch=4,
        total_steps=steps,
        evaluation_shards=evaluation_shards,
        evaluation_rows=evaluation_shards * 10,
        evaluation_sums=["loss", "correct"] if evaluation_shards else [],
        bitwise=bitwise,
    )


def parameter_ranges(plan: JobPlan, owner_of: Callable[[int], str]) -> list[ParameterRange]:
    """The ranges of a plan, with their owners."""
    pieces = split_ranges(plan.layout.element_count, plan.range_count)
    return [
        ParameterRange(
            index=index, first_element=first, element_count=count, aggregator_id=owner_of(index)
        )
        for index, (first, count) in enumerate(pieces)
    ]


def initial_vector(plan: JobPlan) -> Array:
    """Version 0."""
    count = plan.layout.element_count
    vector: Array = np.sin(np.arange(count) * 0.37).astype(plan.layout.dtype)
    return vector


def leaf_gradient(plan: JobPlan, shard: int, version: int, parameters: Array) -> Array:
    """The gradient sum of one leaf: sums of several depend on their order in the last bits."""
    scale = np.asarray(10.0 ** (shard % 5), parameters.dtype)
    gradient: Array = parameters * np.asarray(1.3, parameters.dtype)
    gradient += _wave(plan.layout.element_count, shard, version, parameters.dtype)
    gradient *= scale
    return gradient


@lru_cache(_WAVES_KEPT)
def _wave(count: int, shard: int, version: int, dtype: np.dtype[Any]) -> Array:
    """What depends on shard and version; workers and references ask for the same ones in turn."""
    wave: Array = np.cos(np.arange(count) * (0.11 + 0.07 * shard) + version).astype(dtype)
    wave.flags.writeable = False
    return wave


def leaf_loss(shard: int, version: int) -> float:
    """The loss sum of one leaf."""
    return 0.1 * (shard + 1) / (version + 3)


def reference(
    plan: JobPlan, absent: Callable[[int, int], bool] = lambda _shard, _version: False
) -> list[Array]:
    """All versions by a plain loop over whole leaves; `absent(shard, version)` leaves them out."""
    train = job_spec_pb2.JobSpec.FromString(plan.spec).train
    optimizer = build_optimizer(train, plan.total_steps)
    state = {
        name: np.zeros(plan.layout.element_count, plan.layout.dtype)
        for name in optimizer.state_names
    }
    versions = [initial_vector(plan)]
    for step in range(plan.total_steps):
        parameters = versions[-1]
        leaves = {
            shard: leaf_gradient(plan, shard, step, parameters)
            for shard in range(plan.shards)
            if not absent(shard, step)
        }
        total = reduce_leaves(leaves, plan.shards)
        out = parameters.copy()
        if total is not None:
            count = ROWS_PER_LEAF * len(leaves)
            optimizer.apply(parameters, total, count, decay_mask(plan.layout), state, step, out)
        versions.append(out)
    return versions


class Leaves:
    """What workers compute and send for the rounds of a plan."""

    def __init__(self, plan: JobPlan) -> None:
        self.plan = plan
        self.pieces = parameter_ranges(plan, str)
        #: What each evaluation shard counts as correct at a version; a test may say something else.
        self.correct: Callable[[int], float] = lambda _version: 7.0

    def width(self, go: GoRecord) -> int:
        """Shards of the round of a go record."""
        if go.action == GoRecord.ACTION_INITIALISE:
            return 1
        evaluates = go.action == GoRecord.ACTION_EVALUATE
        return self.plan.evaluation_shards if evaluates else self.plan.shards

    def division(self, workers: int, go: GoRecord) -> list[list[Node]]:
        """The nodes of each of so many workers."""
        width = self.width(go)
        cuts = [index * width // workers for index in range(workers + 1)]
        return [cover(first, stop, width) for first, stop in pairwise(cuts)]

    def frames(
        self,
        nodes: Iterable[Node],
        go: GoRecord,
        parameters: Array | None,
        *,
        ranges: Iterable[int] | None = None,
        absent: Sequence[int] = (),
        loss_error: float = 0.0,
        copy: bool = False,
    ) -> list[Frame]:
        """The frames of nodes for some ranges (all); `parameters` matter to train rounds."""
        frames: list[Frame] = []
        for node in nodes:
            vector, count, loss, mask = self._node(go, node, parameters, absent)
            for index in self._ranges_of(go) if ranges is None else ranges:
                piece = self.pieces[index]
                part = vector
                if go.action != GoRecord.ACTION_EVALUATE:
                    part = vector[piece.first_element : piece.first_element + piece.element_count]
                frames += node_frames(
                    go,
                    node,
                    part,
                    count=count,
                    loss=loss + loss_error,
                    range_index=index,
                    mask=mask,
                    copy=copy,
                )
        return frames

    def _ranges_of(self, go: GoRecord) -> Iterable[int]:
        return (0,) if go.action == GoRecord.ACTION_EVALUATE else range(self.plan.range_count)

    def _node(
        self, go: GoRecord, node: Node, parameters: Array | None, absent: Sequence[int]
    ) -> tuple[Array, int, float, bytes]:
        shards = list(range(node.first, min(node.first + node.span, self.width(go))))
        present = [shard for shard in shards if shard not in absent]
        values = {s - node.first: self._leaf(go, s, parameters) for s in present}
        losses = {s - node.first: np.array([leaf_loss(s, go.version)]) for s in present}
        total, loss = reduce_leaves(values, node.span), reduce_leaves(losses, node.span)
        bits = sum(1 << (shard - node.first) for shard in present)
        mask = b"" if present == shards else bits.to_bytes((node.span + 7) // 8, "little")
        if total is None or loss is None:
            return np.zeros(self.plan.layout.element_count, self.plan.layout.dtype), 0, 0.0, mask
        return total, self._rows(go) * len(present), float(loss[0]), mask

    def _rows(self, go: GoRecord) -> int:
        if go.action == GoRecord.ACTION_TRAIN:
            return self.plan.rows_per_leaf
        return EVALUATION_ROWS if go.action == GoRecord.ACTION_EVALUATE else 0

    def _leaf(self, go: GoRecord, shard: int, parameters: Array | None) -> Array:
        if go.action == GoRecord.ACTION_INITIALISE:
            return initial_vector(self.plan)
        if go.action == GoRecord.ACTION_EVALUATE:
            return np.array([0.5 * (shard + 1), self.correct(go.version)])
        assert parameters is not None, "a train round needs the version"
        return leaf_gradient(self.plan, shard, go.version, parameters)


class ScriptedJob:
    """The owners of a job's ranges, and workers that send what a test tells them to.

    `owners` lists the ranges of each owner, which `make_owner` makes; the one with range 0 is the
    root. Go records reach the other owners only by `carry`.
    """

    def __init__(
        self,
        make_owner: MakeOwner,
        plan: JobPlan,
        owners: Sequence[Sequence[int]] = ((0,),),
        term: int = 1,
        *,
        joins: bool = False,
    ) -> None:
        self.plan = plan
        self.term = term
        self.leaves = Leaves(plan)
        self._codec = build_down_codec(job_spec_pb2.JobSpec.FromString(plan.spec).train)
        self.pieces = self.leaves.pieces
        self.owners: list[Any] = [
            make_owner(plan, term, [self.pieces[index] for index in owned]) for owned in owners
        ]
        self.effects: list[Any] = []
        self._cursors = [owner.cursor(joins=joins) for owner in self.owners]
        self._versions: dict[int, Array] = {}
        self._arrived: dict[int, set[tuple[int, int]]] = {}
        self.go_records: list[GoRecord] = []

    # -- owners

    @property
    def root(self) -> Any:
        """The owner of range 0."""
        return next(owner for owner in self.owners if owner.is_root)

    def owner_of(self, range_index: int) -> Any:
        """Who owns a range."""
        return next(owner for owner in self.owners if range_index in owner.range_indexes)

    def begin(self) -> None:
        """All owners start a fresh job."""
        for owner in self.owners:
            self.effects += owner.begin()
        self.pull()

    def pull(self) -> None:
        """A worker receives everything that is available to it."""
        for cursor in self._cursors:
            while (message := cursor.take()) is not None:
                self._take(message)

    def carry(self, go: GoRecord | None = None) -> None:
        """Workers carry a go record (the newest) to every other owner."""
        for owner in self.owners:
            if not owner.is_root:
                self.effects += owner.go_record(go or self.go)

    def send(self, frames: Iterable[Frame]) -> None:
        """Frames arrive in this order."""
        for header, payload in frames:
            owner = self.owner_of(header.range)
            self.effects += owner.contribute(header, payload, 0.0)
            check_versions(self.owners)
            self.work(owner)

    def work(self, owner: Any) -> None:
        """An owner does what takes long."""
        while owner.works:
            self.effects += owner.work(0.0)
            check_versions(self.owners)

    # -- workers

    @property
    def go(self) -> GoRecord:
        """The newest go record that a worker has."""
        return self.go_records[-1]

    def vector(self, version: int) -> Array:
        """The whole vector of a version as a worker received it."""
        assert self.is_whole(version), f"version {version} is not whole: {self._arrived}"
        return self._versions[version]

    def is_whole(self, version: int) -> bool:
        """Whether a worker has every frame of a version."""
        got = sum(count for _, count in self._arrived.get(version, ()))
        return got == self.plan.layout.element_count

    def nodes_frames(
        self, nodes: Iterable[Node], go: GoRecord | None = None, **options: Any
    ) -> list[Frame]:
        """What a worker that hosts these nodes sends for the round of a go record."""
        go = go or self.go
        known = go.action == GoRecord.ACTION_TRAIN
        return self.leaves.frames(nodes, go, self.vector(go.version) if known else None, **options)

    def run_round(self, shuffle: random.Random | None = None, workers: int = 2) -> GoRecord:
        """One whole round, its frames in order or shuffled; returns the go record it ran under."""
        go = self.go
        self.carry(go)
        frames = self.nodes_frames(self.division(workers, go), go)
        if shuffle is not None:
            shuffle.shuffle(frames)
        self.send(frames)
        self.pull()
        return go

    def run(self, shuffle: random.Random | None = None, workers: int = 2) -> GoRecord:
        """Rounds until a terminal record, which is carried and returned."""
        terminal = (GoRecord.ACTION_STOP, GoRecord.ACTION_PAUSE, GoRecord.ACTION_FAIL)
        while self.go.action not in terminal:
            self.run_round(shuffle, workers)
        self.carry()
        return self.go

    def division(self, workers: int, go: GoRecord | None = None) -> list[Node]:
        """The nodes of all shards of a round, cut among so many workers."""
        return [node for part in self.leaves.division(workers, go or self.go) for node in part]

    # -- inside

    def _take(self, message: bytes) -> None:
        header, payload = decode_response(message)
        if header.HasField("go_record"):
            self.go_records.append(header.go_record)
            return
        frame = header.frame
        count = self.plan.layout.element_count
        version = self._versions.setdefault(frame.version, np.empty(count, self.plan.layout.dtype))
        first = self.pieces[frame.range].first_element + frame.first_element
        version[first : first + frame.element_count] = (
            np.frombuffer(payload, version.dtype)
            if self._codec is None
            else decoded(self._codec, payload, frame.element_count)
        )
        arrived = self._arrived.setdefault(frame.version, set())
        arrived.add((first, frame.element_count))
        if header.HasField("joined_go_record"):
            self.go_records.append(header.joined_go_record)


def check_versions(owners: Iterable[Any]) -> None:
    """What holds after every call: at most two versions, one after the other."""
    for owner in owners:
        for index in owner.range_indexes:
            held = owner.versions_of(index).held
            whole = owner.versions_of(index).newest_whole
            if len(held) > 2 or (len(held) == 2 and held[1] != held[0] + 1):
                raise Internal(f"range {index} holds versions {held}")
            if held and whole not in held and held != [whole + 1]:
                raise Internal(f"range {index} holds {held}, but not {whole}, its newest whole one")

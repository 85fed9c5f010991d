"""Workers of an asynchronous job without a network, for tests of the aggregator's core.

    job = StartedLeaves(plan)
    one, two = job.worker("one", shards=[0, 1]), job.worker("two", shards=[2])
    started = one.begin()           # a leaf that the root starts there
    job.deliver(started)            # its contribution, all frames of it

What the root sends is decoded, and leaves compute with the version that was sent: the bits that a
real worker would send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.frames import decode_response, frame_grid
from phalanx.testing.ranges import ROWS_PER_LEAF, initial_vector, leaf_gradient, leaf_loss
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

Array = NDArray[Any]

RunLeaf = Callable[[Array, int, int], tuple[Array, int, float]]
"""(parameters, shard, step of the shard) → gradient sum, examples, loss sum."""


def asynchronous_plan(plan: JobPlan, **train: Any) -> JobPlan:
    """Make a scripted plan one whose contributions commit one by one.

    `train` are fields of the program; `stale=s` stands for a bound, `asynchronous` is the default.
    """
    from google.protobuf.json_format import ParseDict

    spec = JobSpec.FromString(plan.spec)
    if isinstance(train.get("stale"), int):
        train["stale"] = {"bound": train["stale"]}
    elif "stale" not in train:
        spec.train.asynchronous.plain.SetInParent()
    ParseDict(train, spec.train)
    spec.reproducibility.tolerant.SetInParent()
    plan.spec = spec.SerializeToString()
    plan.unit_span, plan.asynchronous, plan.bitwise = 1, True, False
    return plan


@dataclass
class StartedLeaf:
    """A leaf that a worker was told to run."""

    worker: ScriptedWorker
    shard: int
    step: int
    version: int
    parameters: Array


@dataclass
class ScriptedWorker:
    """One stream, and what its worker holds."""

    job: StartedLeaves
    name: str
    shards: list[int]
    slots: int = 1
    key: object = field(default_factory=object)
    received: int = 0
    working: set[int] = field(default_factory=set)
    held: dict[int, Array] = field(default_factory=dict)
    go: GoRecord = field(default_factory=GoRecord)
    _cursor: Any = None
    _growing: dict[int, Array] = field(default_factory=dict)

    def connect(self) -> None:
        """Open the stream, or a new one."""
        self.key, self.received = object(), 0
        self.working.clear()
        self.job.ranges.stream_opened(self.key, self.name)
        self._cursor = self.job.ranges.cursor(self.key)

    def disconnect(self) -> None:
        """The stream breaks."""
        self.job.ranges.stream_closed(self.key)

    def want(self, free: int | None = None) -> None:
        """Say how many leaves could begin: as many as slots are free."""
        free = self.slots - len(self.working) if free is None else free
        message = pb.StartsWanted(
            term=self.job.ranges.term,
            shards=self.shards,
            working=sorted(self.working),
            received=self.received,
            wanted=self.received + max(0, free),
        )
        self.job.perform(self.job.ranges.starts_wanted(self.key, message))

    def receive(self, now_s: float = 0.0) -> list[StartedLeaf]:
        """Take everything that the root has to send; return the leaves that it starts."""
        started = []
        while (message := self._cursor.take(now_s)) is not None:
            header, payload = decode_response(message)
            match header.WhichOneof("message"):
                case "frame":
                    self._store(header.frame, payload)
                case "go_record":
                    self.go = header.go_record
                case "start_leaf":
                    leaf = header.start_leaf
                    self.received += 1
                    self.working.add(leaf.shard)
                    parameters = self.held[leaf.version]
                    started.append(
                        StartedLeaf(self, leaf.shard, leaf.shard_step, leaf.version, parameters)
                    )
        return started

    def begin(self, now_s: float = 0.0) -> StartedLeaf | None:
        """Ask for one leaf more than are under way; None: the root starts none."""
        self.want(1)
        started = self.receive(now_s)
        assert len(started) <= 1
        return started[0] if started else None

    def _store(self, frame: pb.VersionFrame, payload: memoryview) -> None:
        layout = self.job.plan.layout
        values = np.frombuffer(payload, np.dtype(layout.dtype))
        vector = self._growing.setdefault(
            frame.version, np.full(layout.element_count, np.nan, layout.dtype)
        )
        vector[frame.first_element : frame.first_element + frame.element_count] = values
        if not np.isnan(vector).any():
            self.held = {frame.version: self._growing.pop(frame.version), **self.held}


class StartedLeaves:
    """An asynchronous job on the aggregator's core."""

    def __init__(
        self, plan: JobPlan, make_owner: Callable[..., Any], run_leaf: RunLeaf | None = None
    ) -> None:
        """`make_owner` makes the ranges of (plan, term, owned ranges), `run_leaf` contributions."""
        from phalanx.testing.ranges import parameter_ranges

        self.plan = plan
        self.effects: list[Any] = []
        self.workers: list[ScriptedWorker] = []
        self.ranges: Any = make_owner(plan, 1, parameter_ranges(plan, lambda _: "aggregator-1"))
        self._run_leaf = run_leaf or self._scripted_leaf

    def perform(self, effects: Sequence[Any]) -> None:
        """Keep effects, in order."""
        self.effects += effects

    def of(self, kind: type[Any]) -> list[Any]:
        """The effects of one kind, in order."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def begin(self, vector: Array | None = None) -> None:
        """Make version 0."""
        self.perform(self.ranges.begin())
        vector = initial_vector(self.plan) if vector is None else vector
        for frame, payload in self._frames(vector, "parameters", 1, 0.0):
            self.perform(self.ranges.contribute(frame, payload, 0.0))

    def worker(self, name: str, shards: Sequence[int], slots: int = 1) -> ScriptedWorker:
        """A worker with an open stream that hosts these shards."""
        worker = ScriptedWorker(self, name, list(shards), slots)
        worker.connect()
        self.workers.append(worker)
        return worker

    def contribution(self, leaf: StartedLeaf) -> list[tuple[pb.ContributionFrame, memoryview]]:
        """The frames of a leaf's contribution."""
        gradient, count, loss = self._run_leaf(leaf.parameters, leaf.shard, leaf.step)
        frames = self._frames(gradient if count else None, "gradient", count, loss)
        for frame, _ in frames:
            frame.step, frame.shard_step = leaf.version, leaf.step
            frame.round = leaf.worker.go.round
            frame.node.first = leaf.shard
        return frames

    def deliver(self, leaf: StartedLeaf, elapsed_s: float = 0.0) -> None:
        """Send the contribution of a leaf."""
        frames = self.contribution(leaf)
        leaf.worker.working.discard(leaf.shard)
        for frame, payload in frames:
            self.contribute(frame, payload, leaf.worker, elapsed_s)

    def contribute(
        self,
        frame: pb.ContributionFrame,
        payload: memoryview,
        worker: ScriptedWorker,
        elapsed_s: float = 0.0,
    ) -> None:
        """Send one frame, and have done all that follows from it."""
        self.perform(self.ranges.contribute(frame, payload, elapsed_s, worker.key))
        while self.ranges.works:
            self.perform(self.ranges.work(elapsed_s))

    def evaluate(self, correct: float = 5.0) -> None:
        """Send the sums of every evaluation shard."""
        go = next(worker.go for worker in self.workers)
        assert go.action == GoRecord.ACTION_EVALUATE
        for shard in range(self.plan.evaluation_shards):
            sums = np.array([1.0 + shard, correct])
            frame = pb.ContributionFrame(
                term=self.ranges.term,
                step=go.version,
                round=go.round,
                vector="evaluation",
                element_count=2,
                example_count=10,
            )
            frame.node.first, frame.node.span = shard, 1
            self.perform(self.ranges.contribute(frame, sums.data.cast("B"), 0.0))

    def vector(self) -> Array:
        """The newest version, as the range holds it."""
        version = self.ranges.newest()
        return np.concatenate([values for values in version.values if values is not None])

    def _scripted_leaf(self, parameters: Array, shard: int, step: int) -> tuple[Array, int, float]:
        gradient = leaf_gradient(self.plan, shard, step, parameters)
        return gradient, ROWS_PER_LEAF, leaf_loss(shard, step)

    def _frames(
        self, vector: Array | None, name: str, count: int, loss: float
    ) -> list[tuple[pb.ContributionFrame, memoryview]]:
        layout = self.plan.layout
        frames = []
        for first, size in frame_grid(layout.element_count, np.dtype(layout.dtype).itemsize):
            frame = pb.ContributionFrame(
                term=self.ranges.term,
                vector=name,
                first_element=first,
                element_count=size,
                example_count=count,
                loss_sum=loss,
            )
            frame.node.span = 1
            data = b"" if vector is None else vector[first : first + size].tobytes()
            if vector is None:
                frame.shard_mask = b"\0"
                frame.loss_sum = 0.0
            frames.append((frame, memoryview(data)))
        return frames

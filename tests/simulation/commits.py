"""What jobs whose contributions commit one by one computed: any history of whole ones, each once.

Who is fast decides the order, so no plain loop knows the bits. But each version must be the one
before it with one contribution of some shard that came as a whole: to the step that this shard is
at, computed on a version on which the root had started it in this term. The log of these is kept
with the versions, so that at the end the whole history is known: from it the same parameters must
follow by the trainer that users verify their jobs with. A term that begins from a checkpoint goes
on from a version that was followed before, with every shard at the step at which it was then.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Key, decoded, encoded
from phalanx.frames import frame_grid
from phalanx.models.base import decay_mask
from phalanx.optimizers import Late, build_contribution_optimizer, gradient_limit
from phalanx.reducers import Contribution
from phalanx.specs import parts
from phalanx.training.asynchronous import StepSums
from phalanx.training.leaf import LeafOutcome
from phalanx.training.local_asynchronous import AsynchronousSteps
from phalanx.training.replay import ReplayLog
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from tests.simulation import best, jobs

Array = NDArray[Any]


class Commit(NamedTuple):
    """One contribution that was applied."""

    shard: int
    step: int
    read: int
    """The version on which it was computed."""
    count: int
    loss: float


@dataclass
class _Known:
    """A version that was followed, with what it was made of."""

    number: int
    parameters: Array
    state: dict[str, Array]
    completed: tuple[int, ...]
    before: _Known | None = None
    commit: Commit | None = None

    def log(self) -> list[Commit]:
        """Every commit up to this version, in order."""
        commits: list[Commit] = []
        known: _Known | None = self
        while known is not None and known.commit is not None:
            commits.append(known.commit)
            known = known.before
        return commits[::-1]


@dataclass
class _Line:
    """What one term did: its versions, and the leaves that were started in it."""

    newest: _Known
    versions: dict[int, _Known]
    started: set[tuple[int, int, int]] = field(default_factory=set)
    """Shard, step, and a version on which it was started."""
    came: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """(shard, step) → versions on which whole contributions were computed that came, in order."""
    frames: dict[tuple[object, int, int, int], set[int]] = field(default_factory=dict)
    """(stream, shard, step, version) → frames of a contribution that came."""


def _bits(parameters: Array, state: Mapping[str, Array]) -> bytes:
    vectors = [parameters, *(state[name] for name in sorted(state))]
    return b"".join(vector.tobytes() for vector in vectors)


class CommitHistory:
    """One job: all versions of all terms that were followed, and the line of each term."""

    def __init__(self, shape: jobs.Shape, plan: training_pb2.JobPlan) -> None:
        self.shape = shape
        self._plan = plan
        train = jobs.job_spec(shape, f"job-{shape.elements}").train
        self._train = train
        self._bound = train.stale.bound if train.HasField("stale") else None
        self._meet_every = (shape.evaluate_every, train.asynchronous.barrier_every_clocks)
        self._optimizer = build_contribution_optimizer(train, shape.steps)
        self._clip_norm = gradient_limit(train)
        self._mask = decay_mask(jobs.layout_of(shape))
        self._grid = frame_grid(shape.elements, np.dtype(shape.dtype).itemsize)
        self.at_bound = 0
        """Starts that were as far ahead of the slowest shard as they may."""
        self._known: dict[tuple[int, bytes], _Known] = {}
        self._lines: dict[int, _Line] = {}

    # What happens

    def started(self, term: int, shard: int, step: int, read: int) -> str:
        """The root starts a leaf; returns what is wrong with that."""
        line, shape = self._lines[term], self.shape
        completed = line.newest.completed
        if read != line.newest.number:
            return f"is started on version {read}, and {line.newest.number} is there"
        if step != completed[shard]:
            return f"is started, and the shard is at step {completed[shard]}"
        ahead = step - min(completed)
        if self._bound is not None and ahead > self._bound:
            return f"is started {ahead} steps after the slowest shard's"
        self.at_bound += ahead == self._bound
        for every in self._meet_every:
            if every and step >= (sum(completed) // shape.shards // every + 1) * every:
                return f"is started before all shards have met, as they do every {every} steps"
        if step >= shape.steps:
            return f"is started, and the job ends after {shape.steps} steps"
        line.started.add((shard, step, read))
        return ""

    def frame_came(self, term: int, stream: object, frame: pb.ContributionFrame) -> None:
        """A frame of a contribution arrives; its last one makes it whole."""
        line, shard, step, read = (
            self._lines.get(term),
            frame.node.first,
            frame.shard_step,
            frame.step,
        )
        if line is None or (shard, step, read) not in line.started:
            return
        frames = line.frames.setdefault((stream, shard, step, read), set())
        frames.add(frame.first_element)
        if len(frames) == len(self._grid):
            line.came.setdefault((shard, step), []).append(read)

    def follow(
        self,
        term: int,
        version: int,
        parameters: Array,
        state: dict[str, Array],
        completed: tuple[int, ...],
    ) -> str:
        """A term has this version, and shards are at these steps; returns what is wrong with it."""
        line = self._lines.get(term)
        if line is None:
            known = self._first(version, parameters, state)
            if known is None:
                return "begins with a version that no term has had"
            self._lines[term] = line = _Line(known, {version: known})
        else:
            known = self._next(line, version, parameters, state, completed)
            if known is None:
                return (
                    "is not the version before it with one contribution that was started and came"
                )
            line.newest = line.versions[version] = known
        if known.completed != completed:
            return f"has shards at the steps {completed}, and they are at {known.completed}"
        if self._bound is not None and max(completed) - min(completed) > self._bound + 1:
            return f"has shards at the steps {completed}, further apart than they may be"
        self._known[version, _bits(parameters, state)] = known
        return ""

    def checkpointed(
        self, step: int, parameters: Array, vectors: Mapping[str, Array], completed: Sequence[int]
    ) -> str:
        """A checkpoint says this of a step of the job; returns what is wrong with it."""
        state = {name: vectors[name] for name in self._optimizer.state_names}
        known = self._known.get((step * self.shape.shards, _bits(parameters, state)))
        if known is None:
            return "is no version that was followed"
        if known.completed != tuple(completed):
            return f"has shards at the steps {completed}, and they were at {known.completed}"
        model = self._at(known, best.model_step(self.shape, step))
        wrong = best.wrong_with(self.shape, step, vectors, model.parameters)
        if wrong or not parts.keeps_replay_log(self._train):
            return wrong
        log = ReplayLog.restored(vectors, known.number)
        told = [log.commit(number) for number in range(len(log))]
        kept = [(commit.shard, commit.read) for commit in known.log()]
        return "" if told == kept else "has another replay log than what was applied"

    # What it amounts to

    def step_sums(self, term: int) -> tuple[StepSums, int]:
        """What the commits of the newest step of a term add up to, and its examples by the plan."""
        sums, expected = StepSums(), 0
        for number, commit in self._newest_step(term):
            sums.add(commit.count, commit.loss, number - commit.read)
            if not jobs.is_skipped(self.shape, commit.shard, commit.step):
                expected += jobs.examples(self.shape, commit.shard, commit.step)
        return sums, expected

    def end(self) -> tuple[str, str]:
        """What is wrong with the history that survived, and the SHA-256 of the model: of its last
        version, or of the best before it."""
        last = self._lines[max(self._lines)].newest
        log, shape = last.log(), self.shape
        counts = Counter((commit.shard, commit.step) for commit in log)
        wanted = {(shard, step): 1 for shard in range(shape.shards) for step in range(shape.steps)}
        model = self._at(last, best.model_step(shape, shape.steps))
        sha256 = hashlib.sha256(model.parameters.tobytes()).hexdigest()
        if counts != wanted:
            return "does not have each step of each shard once", sha256
        newest = hashlib.sha256(last.parameters.tobytes()).hexdigest()
        if parts.keeps_replay_log(self._train) and self._replayed(log) != newest:
            return "gives other bits when its log is replayed", sha256
        return "", sha256

    # Inside

    def _at(self, known: _Known, step: int) -> _Known:
        """What a version was made of when the job was at an earlier step."""
        while known.number > step * self.shape.shards:
            assert known.before is not None
            known = known.before
        return known

    def _first(self, version: int, parameters: Array, state: dict[str, Array]) -> _Known | None:
        if version > 0:
            return self._known.get((version, _bits(parameters, state)))
        shape = self.shape
        names = self._optimizer.state_names
        zeros = {name: np.zeros(shape.elements, shape.dtype) for name in names}
        first = jobs.initial(shape).copy()
        same = _bits(first, zeros) == _bits(parameters, state)
        return _Known(0, first, zeros, (0,) * shape.shards) if same else None

    def _next(
        self,
        line: _Line,
        version: int,
        parameters: Array,
        state: dict[str, Array],
        completed: tuple[int, ...],
    ) -> _Known | None:
        before = line.newest
        moved = [
            shard
            for shard, (was, now) in enumerate(zip(before.completed, completed, strict=True))
            if was != now
        ]
        if version != before.number + 1 or len(moved) != 1:
            return None
        shard, bits = moved[0], _bits(parameters, state)
        step = before.completed[shard]
        for read in line.came.pop((shard, step), ()):
            made = self._applied(before, shard, step, line.versions[read])
            if _bits(made.parameters, made.state) == bits:
                return made
        return None

    def _applied(self, before: _Known, shard: int, step: int, read: _Known) -> _Known:
        """The version after this one, with a contribution that was computed on another."""
        shape = self.shape
        seen = jobs.as_seen(shape, read.parameters)
        values, count, loss = jobs.contribution(shape, shard, step, seen)
        state = {name: array.copy() for name, array in before.state.items()}
        out = before.parameters.copy()
        if values is not None:
            values = self._received(values, shard, step)
            factor = Contribution([values], count).factor(self._clip_norm)
            if factor != 1.0:
                values = values * values.dtype.type(factor)
            number = before.number
            late = Late(number // shape.shards, number, number - read.number)
            self._optimizer.apply_late(
                before.parameters, values, count, self._mask, state, late, read.parameters, out
            )
        completed = list(before.completed)
        completed[shard] += 1
        commit = Commit(shard, step, read.number, count, loss)
        return _Known(before.number + 1, out, state, tuple(completed), before, commit)

    def _received(self, values: Array, shard: int, step: int) -> Array:
        codec = jobs.up_codec(self.shape.parts, self.shape.dtype)
        if codec is None:
            return values
        return decoded(codec, encoded(codec, values, Key(shard, step)), len(values))

    def _newest_step(self, term: int) -> Iterator[tuple[int, Commit]]:
        """The commits of the newest step in their order, each with the version that it changed."""
        commits: list[tuple[int, Commit]] = []
        known: _Known | None = self._lines[term].newest
        for _ in range(self.shape.shards):
            assert known is not None
            assert known.commit is not None
            commits.append((known.number - 1, known.commit))
            known = known.before
        return reversed(commits)

    def _replayed(self, log: Sequence[Commit]) -> str:
        """SHA-256 of what the trainer that ships makes of a log."""
        shape, replay = self.shape, ReplayLog()
        for number, commit in enumerate(log):
            replay.add(commit.shard, number - commit.read)
        parameters = jobs.initial(shape).copy()
        steps = AsynchronousSteps(self._plan, self._plan.layout, parameters, replay)

        def leaf(weights: Array, shard: int, step: int, out: Array) -> LeafOutcome:
            jobs.gradient(shape, shard, step, weights, out)
            rows, lost = jobs.examples(shape, shard, step), jobs.loss(shard, step)
            return LeafOutcome(rows, lost, finite=True)

        for _ in range(shape.steps):
            parameters, _ = steps.run(
                parameters,
                shape.steps,
                lambda each: jobs.as_seen(shape, each),
                leaf,
                self._received,
            )
        return hashlib.sha256(parameters.tobytes()).hexdigest()

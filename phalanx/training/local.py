"""Training inside the calling process: `workers=0`.

The same leaves, the same tree, the same optimizer and the same decisions as on a cluster, one
after another and without any wire, so the parameters have the same SHA-256. Good for debugging
(a breakpoint in a user's model stops here) and as the reference that clusters are compared with.
Nothing is checkpointed: the job lives and dies with the call.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.blas import one_blas_thread
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import FailedPrecondition
from phalanx.layouts import model_layout
from phalanx.models import Model, build_model
from phalanx.models.base import Batch
from phalanx.models.code import deactivate_user_code
from phalanx.privacy.secret import new_secret, sampler_key
from phalanx.reducers import Contribution
from phalanx.reduction import all_finite, reduce_leaves
from phalanx.specs.shard_rows import rows_of_shard
from phalanx.training.asynchronous import StepSums
from phalanx.training.best import METRIC_NOT_COMPUTED, Kept, missing_metric
from phalanx.training.decisions import RootDecider
from phalanx.training.leaf import (
    LeafOutcome,
    LocalSteps,
    RowReader,
    leaf_batch,
    run_evaluation_leaf,
    run_leaf,
)
from phalanx.training.left_out import LeftOutLog
from phalanx.training.local_asynchronous import AsynchronousSteps
from phalanx.training.local_rounds import Tree, Updating, Wire, failure, units_of
from phalanx.training.prefixes import INNER, OPTIMIZER, PARAMETERS, RESIDUALS, Prefix
from phalanx.training.replay import ReplayLog
from phalanx.training.schema import job_schema
from phalanx.training.shard_readers import ShardReaders
from phalanx.training.start import load_start_parameters
from phalanx.training.two_rounds import examples_of, rounds_per_step, step_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan, Layout

Array = NDArray[Any]


@dataclass(frozen=True)
class Progress:
    """Where a job stands after a step or an evaluation."""

    step: int
    epoch: float
    examples: int
    metrics: dict[str, float]
    best: Kept | None = None


@dataclass(frozen=True)
class TrainedModel:
    """What a job leaves behind.

    Attributes:
        layout: names and shapes of the tensors.
        parameters: (n,) flat, final version, or that of the best evaluation.
        parameters_sha256: of their little-endian bytes.
        steps: number of updates that the job made.
        examples: number of examples that entered them.
        left_out: (shard, step) of the contributions that had to be left out of theirs.
        prefix: what the job may go on from later, where it was ended by `until_step`.
        reason: which stop rule ended the job.
        metrics: last value of each metric, as of the parameters.
        points: (step, name, value) of the curves.
        best: the evaluation that was kept; None: the parameters are those of the last step.
    """

    layout: Layout
    parameters: Array
    parameters_sha256: str
    steps: int
    examples: int
    reason: str
    metrics: dict[str, float]
    points: list[tuple[int, str, float]]
    best: Kept | None = None
    left_out: frozenset[tuple[int, int]] = frozenset()
    prefix: Prefix | None = None


def train_in_process(
    plan: JobPlan,
    manifest: DatasetManifest,
    fetch: Callable[[str], Path],
    *,
    code_dir: Path | None = None,
    start_model: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    replay: ReplayLog | None = None,
    left_out: LeftOutLog | None = None,
    until_step: int | None = None,
    secret: bytes | None = None,
) -> TrainedModel:
    """Run a job to its end and return the model.

    Args:
        plan: the job's plan; layout and evaluation sums are filled in here.
        manifest: its data set.
        fetch: turns a chunk's digest into a local file.
        code_dir: folder with the job's own code; importable while the job runs.
        start_model: safetensors file to start from; None: fresh parameters keyed by the seed.
        on_progress: called after each step and evaluation; what it raises ends the job.
        clock: seconds, for the wall-time rule alone.
        replay: the order of an asynchronous run that is to be computed again.
        left_out: what each step left out in a run that is to be computed again.
        until_step: end there at the latest, whatever the stop rules say.
        secret: what a private job draws its rows and makes its noise by; None: a new one.

    Raises:
        PhalanxError: the job cannot run, or failed; what a user's model raises passes through.
    """
    from phalanx.data.reader import ChunkReader

    spec = JobSpec.FromString(plan.spec)
    dtype = spec.train.dtype or "float32"

    def reader_of(split: str, columns: Collection[str]) -> ChunkReader:
        return ChunkReader(manifest, split, fetch, dtype=dtype, columns=columns)

    readers = ShardReaders(spec.data, manifest, lambda columns: reader_of(spec.data.split, columns))
    evaluation_reader = None
    if plan.evaluation_shards:
        evaluation_reader = reader_of(spec.train.evaluation.split, spec.data.features)
    try:
        model = build_model(spec, job_schema(plan, spec, manifest), code_dir)
        with one_blas_thread():
            return run_job(
                plan,
                model,
                readers.of,
                evaluation_reader,
                start_model=start_model,
                on_progress=on_progress,
                clock=clock,
                replay=replay,
                left_out=left_out,
                until_step=until_step,
                secret=secret,
            )
    finally:
        deactivate_user_code()


def run_job(
    plan: JobPlan,
    model: Model,
    reader_of: Callable[[int], RowReader],
    evaluation_reader: RowReader | None = None,
    *,
    start_model: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    replay: ReplayLog | None = None,
    left_out: LeftOutLog | None = None,
    until_step: int | None = None,
    secret: bytes | None = None,
    prefix: Prefix | None = None,
) -> TrainedModel:
    """Run the rounds of a job whose model and readers are there; see `train_in_process`.

    BLAS must use one thread already. `reader_of` tells what reads the rows of a shard;
    `evaluation_reader` may be None only where the plan has no
    evaluation shards. With a `prefix` of this very job it goes on from there, to the same bits;
    its metrics and what it left out are then told from there on only.
    """
    records = _Records(replay, left_out)
    secret = new_secret() if secret is None else secret
    job = _Job(plan, model, reader_of, evaluation_reader, start_model, records, secret)
    begin_s = clock()
    go = job.decider.start() if prefix is None else job.resume(prefix)
    prefix = None  # as large as all that the job remembers, and of no more use
    ends = (GoRecord.ACTION_STOP, GoRecord.ACTION_FAIL)
    while go.action not in ends and job.decider.version != until_step:
        go = job.run(go, lambda: clock() - begin_s)
        if on_progress is not None and job.decider.version > 0:
            on_progress(job.progress())
    if go.action == GoRecord.ACTION_FAIL:
        raise FailedPrecondition(f"the job failed at step {go.version}", reason=go.reason)
    return job.result(go.reason, keep_prefix=until_step is not None)


@dataclass(frozen=True)
class _Records:
    """What is known of a run that is to be computed again; None: nothing."""

    replay: ReplayLog | None
    left_out: LeftOutLog | None


def _completed(plan: JobPlan, model: Model, secret: bytes) -> JobPlan:
    """Return the plan with what its model and its secret add to it."""
    completed = JobPlan()
    completed.CopyFrom(plan)
    completed.sampler_key = sampler_key(secret)
    completed.layout.CopyFrom(model.layout)
    completed.evaluation_sums[:] = model.evaluation_sums
    return completed


class _Job:
    """Parameters, optimizer state and decider of one run."""

    def __init__(
        self,
        plan: JobPlan,
        model: Model,
        reader_of: Callable[[int], RowReader],
        evaluation_reader: RowReader | None,
        start_model: Path | None,
        records: _Records,
        secret: bytes,
    ) -> None:
        self._plan, self._spec = _completed(plan, model, secret), JobSpec.FromString(plan.spec)
        self._model, self._start_model = model, start_model
        self._reader_of, self._evaluation_reader = reader_of, evaluation_reader
        self._absences = records.left_out
        self._updating = Updating(self._plan, self._spec, model.layout, secret)
        self._wire = Wire(self._spec)
        self._units = units_of(plan)
        self._local = LocalSteps(self._plan, model.layout) if plan.local_steps else None
        #: By shard: what its own optimizer remembers.
        self._inner: dict[int, dict[str, Array]] = {}
        missing = missing_metric(self._spec, model.evaluation_sums)
        if missing:
            raise failure(missing, METRIC_NOT_COMPUTED)
        self.decider = RootDecider(self._plan, term=1)
        #: Those of the best evaluation, where the job keeps it.
        self._best_parameters: Array | None = None
        self._skipped_steps: set[int] = set()
        #: (shard, step) of what did not enter its step.
        self._left_out: set[tuple[int, int]] = set()
        self._points: list[tuple[int, str, float]] = []
        self._parameters: Array = np.zeros(model.layout.element_count, model.layout.dtype)
        self._one_by_one: AsynchronousSteps | None = None
        if plan.asynchronous:
            self._one_by_one = AsynchronousSteps(
                plan, model.layout, self._parameters, records.replay
            )

    def run(self, go: GoRecord, elapsed_s: Callable[[], float]) -> GoRecord:
        """Carry out one record and return the next."""
        if go.action == GoRecord.ACTION_INITIALISE:
            self._initialise()
            return self.decider.initialised(elapsed_s())
        if go.action == GoRecord.ACTION_EVALUATE:
            sums, count = self._evaluate()
            go = self.decider.evaluated(sums.tolist(), count, elapsed_s())
            if self.decider.best is not None and self.decider.best.step == go.version:
                self._best_parameters = self._parameters.copy()
            return self._observed(go)
        version = go.version + 1
        if self._one_by_one is not None:
            step = self._train_one_by_one(self._one_by_one)
            go = self.decider.committed(version, step.count, step.loss, elapsed_s(), step.measured)
            return self._observed(go)
        rounds = rounds_per_step(self._plan)
        for number in range(go.version * rounds, version * rounds):
            count, loss = self._train(number)
        count = examples_of(self._plan, count)
        return self._observed(self.decider.committed(version, count, loss, elapsed_s()))

    def progress(self) -> Progress:
        """Where the job stands."""
        decider = self.decider
        metrics = dict(decider.metrics)
        return Progress(decider.version, decider.epoch, decider.examples, metrics, decider.best)

    def resume(self, prefix: Prefix) -> GoRecord:
        """Take over what another process has trained; return the record that is next."""
        arrays, told = dict(prefix.arrays), json.loads(prefix.root)
        self._parameters[:] = arrays.pop(PARAMETERS)
        for name, values in arrays.items():
            kind, _, key = name.partition("/")
            if kind == OPTIMIZER:
                self._updating.state[key][:] = values
            elif kind == RESIDUALS:
                self._wire.residuals[int(key)] = values.copy()
            else:
                shard, _, vector = key.partition("/")
                self._inner.setdefault(int(shard), {})[vector] = values.copy()
        self._skipped_steps = set(told["skipped_steps"])
        return self.decider.restore(told["version"], told["decider"], told["stop_reason"])

    def _prefix(self) -> Prefix | None:
        """What `resume` takes; None where another process would come to other bits: contributions
        that commit one by one have versions of their own, and noise is drawn by a secret."""
        if (
            self._one_by_one is not None
            or self._updating.draws_noise
            or self._spec.output.HasField("best")
        ):
            return None
        arrays = {PARAMETERS: self._parameters}
        arrays |= {f"{OPTIMIZER}/{name}": each for name, each in self._updating.state.items()}
        arrays |= {f"{RESIDUALS}/{first}": each for first, each in self._wire.residuals.items()}
        for shard, vectors in self._inner.items():
            arrays |= {f"{INNER}/{shard}/{name}": each for name, each in vectors.items()}
        told = {
            "version": self.decider.version,
            "decider": self.decider.state(),
            "stop_reason": self.decider.stop_reason,
            "skipped_steps": sorted(self._skipped_steps),
        }
        return Prefix(arrays, json.dumps(told, sort_keys=True))

    def result(self, reason: str, *, keep_prefix: bool = False) -> TrainedModel:
        """The model at the newest version, or at that of the best evaluation."""
        best, kept = self.decider.best, self._best_parameters
        parameters = self._parameters if kept is None else kept
        layout = model_layout(self._plan.layout)
        parameters = parameters[: layout.element_count]
        little_endian = parameters.astype(parameters.dtype.newbyteorder("<"), copy=False)
        return TrainedModel(
            layout=layout,
            parameters=parameters,
            parameters_sha256=hashlib.sha256(little_endian.data).hexdigest(),
            steps=self.decider.version,
            examples=self.decider.examples,
            reason=reason,
            metrics=dict(self.decider.metrics if best is None else best.metrics),
            points=self._points,
            best=best,
            left_out=frozenset(self._left_out),
            prefix=self._prefix() if keep_prefix else None,
        )

    def _observed(self, go: GoRecord) -> GoRecord:
        self._points += self.decider.take_points()
        return go

    def _initialise(self) -> None:
        if self._start_model is not None:
            load_start_parameters(self._start_model, self._plan.layout, self._parameters)
        else:
            self._parameters[:] = self._model.initial_parameters(self._spec.seed)
        if not all_finite(self._parameters):
            raise failure("the initial parameters are not finite", "PARAMETERS_NON_FINITE")

    def _train(self, version: int) -> tuple[int, float]:
        tree = Tree(self._plan.shards)
        leaves: dict[int, Contribution] = {}
        parameters = self._wire.seen(self._parameters)
        absent = () if self._absences is None else self._absences.of(version)
        self._left_out.update((shard, version) for shard in absent)
        for unit in self._units:
            payloads: dict[int, Array | None] = {}
            for shard in unit:
                out = np.empty_like(parameters)
                outcome = LeafOutcome(0, 0.0, True)
                if shard not in absent:
                    outcome = self._leaf(parameters, shard, version, out)
                if not outcome.finite:
                    self._skip(shard, version)
                present = outcome.count > 0 and outcome.finite
                tree.count(shard, outcome, present)
                payloads[shard - unit.start] = out if present else None
            values = self._wire.contribution(
                reduce_leaves(payloads, len(unit)), unit.start, version
            )
            tree.fill(unit, values, payloads)
            if self._updating.reduces_leaves and values is not None:
                leaves[unit.start] = Contribution([values], outcome.count)
        gradient, count, loss = tree.result()
        self._parameters = self._updating.apply(self._parameters, gradient, count, leaves, version)
        return count, loss

    def _train_one_by_one(self, steps: AsynchronousSteps) -> StepSums:
        def leaf(parameters: Array, shard: int, step: int, out: Array) -> LeafOutcome | None:
            outcome = self._leaf(parameters, shard, step, out)
            if not outcome.finite:
                self._skip(shard, step)
                return None
            return outcome

        def received(values: Array, shard: int, step: int) -> Array:
            contribution = self._wire.contribution(values, shard, step)
            assert contribution is not None
            return contribution

        self._parameters, sums = steps.run(
            self._parameters, self.decider.limit, self._wire.seen, leaf, received
        )
        return sums

    def _leaf(self, parameters: Array, shard: int, version: int, out: Array) -> LeafOutcome:
        model, reader, plan = self._model, self._reader_of(shard), self._plan
        if self._local is None:
            step = step_of(plan, version)
            return run_leaf(model, parameters, reader, plan, shard, step, out)

        def batch_of(step: int) -> Batch | None:
            return leaf_batch(reader, plan, shard, step)

        names = self._local.state_names
        if names and shard not in self._inner:
            self._inner[shard] = {name: np.zeros_like(parameters) for name in names}
        state = self._inner.get(shard, {})
        return self._local.run(model, parameters, version, batch_of, out, state)

    def _skip(self, shard: int, version: int) -> None:
        """Leave a leaf that is not finite out of its step, or fail, as the spec says."""
        rule = self._spec.train.on_nonfinite
        first, count = rows_of_shard(self._plan, shard, evaluation=False)
        where = f" (rows {first} to {first + count - 1})" if count else ""
        step = step_of(self._plan, version) + 1
        message = (
            f"the leaf of shard {shard}{where} in step {step} is not finite; "
            "lower the learning rate or check the data"
        )
        if rule.WhichOneof("action") != "skip":
            raise failure(message, "NON_FINITE")
        self._left_out.add((shard, version))
        self._skipped_steps.add(version)
        if 0 < rule.skip.max_steps < len(self._skipped_steps):
            raise failure(message, "NON_FINITE")

    def _evaluate(self) -> tuple[NDArray[np.float64], int]:
        assert self._evaluation_reader is not None, "the plan evaluates, and there is no reader"
        tree = Tree(self._plan.evaluation_shards)
        parameters = self._wire.seen(self._parameters)
        for shard in range(self._plan.evaluation_shards):
            sums = np.zeros(len(self._plan.evaluation_sums))
            outcome = run_evaluation_leaf(
                self._model, parameters, self._evaluation_reader, self._plan, shard, sums
            )
            tree.count(shard, outcome, outcome.count > 0)
            tree.fill(range(shard, shard + 1), sums, {0: sums} if outcome.count else {})
        total, count, _ = tree.result()
        if total is None:
            return np.zeros(len(self._plan.evaluation_sums)), 0
        if not np.isfinite(total).all():
            message = f"the evaluation after step {self.decider.version} is not finite"
            raise failure(message, "PARAMETERS_NON_FINITE")
        return total, count

"""What happens next in a job: the decisions of the root, range 0.

At each version the root decides on one or more rounds. The order at a version is fixed: an
evaluation if one is due, then the record that ends the version (train, pause, stop or fail). A
checkpoint is ordered by that last record, so that the saved state contains the evaluation. The
same spec and the same measurements give the same records, also after a restore.

Of a job that keeps its best evaluation every record says which version that is, so that whoever
owns a range keeps the parameters of that one. It is checkpointed as soon as it is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from phalanx.privacy.settings import Spending
from phalanx.specs import parts
from phalanx.specs.updates import planned_rounds
from phalanx.training.asynchronous import limit_after
from phalanx.training.best import BestRule, Kept
from phalanx.training.metrics import keeps_point, metrics_from_sums
from phalanx.training.stop import StopRules
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

TRAIN_LOSS = "train/loss"
EPSILON = "train/epsilon"
"""What the steps so far have spent of the privacy of each row."""


class RootDecider:
    """The sequence of go records of one job in one term.

    Call ``start`` or ``restore`` once (neither where version 0 is there already), then
    ``initialised``, ``committed`` and ``evaluated`` as the rounds end; each returns the next
    record. Nothing follows a terminal record.
    """

    def __init__(self, plan: JobPlan, term: int) -> None:
        self._plan = plan
        self._term = term
        spec = JobSpec.FromString(plan.spec)
        self._train = spec.train
        self._rounds = planned_rounds(plan)
        self._steps_without_loss = max(parts.steps_without_loss(spec), self._rounds.first)
        self._spending = Spending(plan)
        self._stop = StopRules(self._train, plan.total_steps, self._spending.steps)
        self._best = BestRule(spec.output)
        self._version = 0
        self._round = -1
        self._evaluated_version = -1
        self._checkpoint_version = 0
        self._checkpoint_elapsed_s = 0.0
        self._earlier_s = 0.0
        self._elapsed_s = 0.0
        self._examples = 0
        self._last_count = 0
        self._last_loss = 0.0
        self._interval_count = 0
        self._interval_loss = 0.0
        self._pause = False
        self.metrics: dict[str, float] = {}
        self._points: list[tuple[int, str, float]] = []

    @property
    def version(self) -> int:
        """The version that the latest record is about."""
        return self._version

    @property
    def examples(self) -> int:
        """Examples that entered the steps so far."""
        return self._examples

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        steps = self._version * max(1, self._plan.local_steps)
        return steps / max(1, self._plan.steps_per_epoch)

    @property
    def best(self) -> Kept | None:
        """The best evaluation so far, if the job keeps it; its step is a step of the job."""
        return self._best.kept

    @property
    def evaluation_interval(self) -> int:
        """Steps from one evaluation to the next, and between two looks of a plateau at the training
        loss; each epoch, or round of trees, where the spec does not say."""
        every = self._train.evaluation.every_steps
        return every or max(1, self._plan.steps_per_epoch, self._rounds.each)

    @property
    def limit(self) -> int:
        """Where contributions commit one by one: the next step that no shard may start before all
        have completed the steps below it."""
        evaluates = self.evaluation_interval if self._plan.evaluation_shards else 0
        barrier = self._train.asynchronous.barrier_every_clocks
        return limit_after(self._version, (evaluates, barrier), self._plan.total_steps)

    def start(self) -> GoRecord:
        """Return the first record of a fresh job."""
        return self._record(GoRecord.ACTION_INITIALISE)

    @property
    def stop_reason(self) -> str:
        """Which stop rule holds, if one does; it may be told of only after an evaluation."""
        return self._stop.reason

    def restore(self, version: int, root_state: str, stop_reason: str = "") -> GoRecord:
        """Return the first record after a restore of the checkpoint at ``version``.

        It is the record that ended that version before, less its checkpoint; whatever follows is
        what would have followed. ``stop_reason`` is that of a job that goes on as it was told to:
        what was measured at this version is not measured again.
        """
        state = json.loads(root_state)
        self._version = version
        self._evaluated_version = int(state["evaluated_version"])
        self._checkpoint_version = version
        self._earlier_s = self._elapsed_s = float(state["elapsed_s"])
        self._checkpoint_elapsed_s = self._earlier_s
        self._examples = int(state["examples"])
        self._last_count = int(state["last_count"])
        self._last_loss = float(state["last_loss"])
        self._interval_count = int(state["interval_count"])
        self._interval_loss = float(state["interval_loss"])
        self.metrics = {name: float(value) for name, value in state["metrics"].items()}
        self._stop.restore(state["stop"])
        self._best.restore(state)
        self._stop.reason = stop_reason
        self._stop.observe(version, {})
        return self._next()

    def initialised(self, elapsed_s: float) -> GoRecord:
        """Version 0 is whole in range 0."""
        self._observe_time(elapsed_s)
        return self._next()

    def committed(
        self,
        version: int,
        example_count: int,
        loss_sum: float,
        elapsed_s: float,
        others: Mapping[str, float] = MappingProxyType({}),
    ) -> GoRecord:
        """A train round is done: range 0 holds ``version``, made of so many examples.

        A count of 0 says that every shard was absent: the step counts, the loss is unknown. So it
        is in a step that draws what later ones measure; that of a private job is never told: no
        noise is on it.
        ``others`` are metrics of the step that no stop rule looks at.
        """
        self._version, self._round = version, -1
        self._last_count, self._last_loss = example_count, loss_sum
        self._examples += example_count
        if self._spending.counted:
            self._show(version, {EPSILON: self._spending.epsilon(version)})
            self._stop.observe(version, {})
        elif example_count and version > self._steps_without_loss:
            self._interval_count += example_count
            self._interval_loss += loss_sum
            measured = {TRAIN_LOSS: loss_sum / example_count}
            self._show(version, {**measured, **others})
            # No rule ends a job within a round of trees but those that say so: steps and time.
            self._stop.observe(version, measured if self._rounds.ends_at(version) else {})
        else:
            self._stop.observe(version, {})
        if self._ends_interval():
            self._end_interval()
        self._observe_time(elapsed_s)
        return self._next()

    def evaluated(self, sums: Sequence[float], example_count: int, elapsed_s: float) -> GoRecord:
        """The evaluation at the current version is done: sums in the order of the plan's names."""
        split = self._train.evaluation.split
        measured = metrics_from_sums(split, self._plan.evaluation_sums, sums, example_count)
        wanted = self._train.evaluation.metrics
        self._evaluated_version = self._version
        self._stop.observe(self._version, measured)
        self._stop.observe_evaluation(measured)
        shown = {
            name: value
            for name, value in measured.items()
            if not wanted or name.partition("/")[2] in wanted
        }
        self.metrics.update(shown)
        # Which step is the best depends on all of them, so it has not spent less than they have.
        told = {name: value for name, value in self.metrics.items() if name != EPSILON}
        self._best.observe(self._version, measured, told)
        if self._keeps_evaluation():
            self._points += [(self._version, name, value) for name, value in shown.items()]
        self._observe_time(elapsed_s)
        return self._next()

    def request_pause(self) -> None:
        """Pause at the next step boundary."""
        self._pause = True

    def paused(self) -> GoRecord:
        """Return a PAUSE record for right now, where no round has changed anything."""
        return self._record(GoRecord.ACTION_PAUSE, checkpoint=True)

    def failed(self, reason: str) -> GoRecord:
        """Return a FAIL record for right now, whatever round is open."""
        return self._record(GoRecord.ACTION_FAIL, reason=reason)

    def take_points(self) -> list[tuple[int, str, float]]:
        """Return the metric points (step, name, value) since the last call."""
        points, self._points = self._points, []
        return points

    def state(self) -> str:
        """Return what a checkpoint of the current version must keep, as JSON."""
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        state: dict[str, Any] = {
            "version": self._version,
            "epoch": self.epoch,
            "evaluated_version": self._evaluated_version,
            "elapsed_s": self._elapsed_s,
            "examples": self._examples,
            "last_count": self._last_count,
            "last_loss": self._last_loss,
            "interval_count": self._interval_count,
            "interval_loss": self._interval_loss,
            "metrics": finite,
            "stop": self._stop.state(),
            "spec_sha256": self._plan.spec_sha256,
        }
        best = self._best.state()
        if best is not None:
            state["best"] = best
        return json.dumps(state, sort_keys=True)

    def _show(self, version: int, measured: Mapping[str, float]) -> None:
        """Tell what was measured of a step."""
        self.metrics.update(measured)
        if keeps_point(version, self._plan.total_steps):
            self._points += [(version, name, value) for name, value in measured.items()]

    def _ends_interval(self) -> bool:
        """Intervals are counted from where the rounds of a model begin, if it has some."""
        steps = self._version - self._rounds.first
        return steps > 0 and steps % self.evaluation_interval == 0

    def _end_interval(self) -> None:
        """A plateau of the training loss looks at its mean since the last evaluation."""
        if self._interval_count:
            mean = self._interval_loss / self._interval_count
            self._stop.observe_evaluation({TRAIN_LOSS: mean})
        self._interval_count, self._interval_loss = 0, 0.0

    def _keeps_evaluation(self) -> bool:
        """The last evaluation is always kept: a curve should end where the job does."""
        every = self.evaluation_interval
        total = self._plan.total_steps // every
        return bool(self._stop.reason) or keeps_point(self._version // every, total)

    def _observe_time(self, elapsed_s: float) -> None:
        self._elapsed_s = self._earlier_s + elapsed_s
        self._stop.observe_time(self._elapsed_s)

    def _next(self) -> GoRecord:
        if self._evaluation_due():
            return self._record(GoRecord.ACTION_EVALUATE)
        if self._stop.reason:
            return self._record(GoRecord.ACTION_STOP, checkpoint=True, reason=self._stop.reason)
        if self._pause:
            return self._record(GoRecord.ACTION_PAUSE, checkpoint=True)
        return self._record(GoRecord.ACTION_TRAIN, checkpoint=self._checkpoint_due())

    def _evaluation_due(self) -> bool:
        if not self._plan.evaluation_shards or self._evaluated_version == self._version:
            return False
        if self._stop.reason:
            return True
        return self._ends_interval()

    def _checkpoint_due(self) -> bool:
        if self._version == self._checkpoint_version:
            return False
        rule = self._train.checkpoints
        due = rule.every_steps > 0 and self._version % rule.every_steps == 0
        due = due or (self.best is not None and self.best.step == self._version)
        every_s = rule.every.seconds + rule.every.nanos / 1e9
        if every_s > 0:
            due = due or self._elapsed_s - self._checkpoint_elapsed_s >= every_s
        if due:
            self._checkpoint_version = self._version
            self._checkpoint_elapsed_s = self._elapsed_s
        return due

    def _record(
        self, action: GoRecord.Action.ValueType, *, checkpoint: bool = False, reason: str = ""
    ) -> GoRecord:
        self._round += 1
        return GoRecord(
            best_version=None if self.best is None else self.best.step,
            term=self._term,
            version=self._version,
            round=self._round,
            action=action,
            checkpoint=checkpoint,
            reason=reason,
            example_count=self._last_count,
            loss_sum=self._last_loss,
        )

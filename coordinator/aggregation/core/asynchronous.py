"""The range of a job whose contributions commit one by one.

Theory of operation. There is one range, its owner is the root, and versions count contributions.
As many of them as there are shards make a *step*, and whatever is told of the job counts steps:
curves, checkpoints, reports, go records as the decider makes them. A TRAIN record opens a *phase*:
until the next record the root starts leaves one by one (`Starts`), each with the newest version,
where `Clocks` lets the shard start. A whole contribution makes the next version at once.

After each step the decider says what follows. Mostly that is another step of the same phase, and a
checkpoint of the step's version beside it: which steps each shard has completed is part of the
root's state, so nobody needs to wait for it. An evaluation closes the phase; it is a step that no
shard goes beyond (the limit of `Clocks`), so nothing is under way when it begins. A shard may be
beyond it already where a job goes on from another one; what is cut off then is started again.

A contribution of several frames is applied frame by frame, as *work* (see `JobRanges`), while
others come in; they wait for their turn, in the order in which they became whole.

What counts is decided by the clocks alone. A contribution to a step that its shard has completed is
a copy and changes nothing, whoever sends it, in whatever order things come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.aggregation.core.effects import (
    Committed,
    Effect,
    Points,
    StartCheckpoint,
    Wake,
    Work,
)
from coordinator.aggregation.core.golog import GoLog
from coordinator.aggregation.core.machine import JobRanges, _Range
from coordinator.aggregation.core.plan import GRADIENT_VECTOR
from coordinator.aggregation.core.roots import NonFiniteResult, require_finite
from coordinator.aggregation.core.starts import Start, Starts
from coordinator.aggregation.core.state import Array
from coordinator.aggregation.core.versions import NONE, Version, VersionStore
from phalanx.copies import (
    PATIENCE_FACTOR,
    PATIENCE_LEAST_S,
    PATIENCE_UNMEASURED_S,
)
from phalanx.errors import InvalidArgument
from phalanx.frames import encode_response
from phalanx.optimizers import ContributionOptimizer, Late
from phalanx.reducers import Contribution, Slices, Steps
from phalanx.rounds import RoundSpec
from phalanx.specs import parts
from phalanx.texts import number_of
from phalanx.training.asynchronous import Clocks, StepSums, completed_steps, stale_bound
from phalanx.training.decisions import RootDecider
from phalanx.training.expected import expected_of_shard
from phalanx.training.replay import ReplayLog
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord

MEASURED = 64
MEASURED_LEAST = 4


class AsynchronousRanges(JobRanges):
    """`JobRanges` of a job whose contributions commit one by one; see the module's text."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        owned: Sequence[training_pb2.ParameterRange],
        optimizer: ContributionOptimizer,
        decider: RootDecider | None,
    ) -> None:
        if plan.range_count != 1 or decider is None:
            count = number_of(plan.range_count, "range")
            raise InvalidArgument(f"contributions commit one by one in one range, not in {count}")
        super().__init__(plan, term, owned, optimizer, decider)
        self._train = JobSpec.FromString(plan.spec).train
        self._range = self._ranges[0]
        self._grid = {first: i for i, (first, _) in enumerate(self._range.parameters.grid)}
        self._log = ReplayLog() if parts.keeps_replay_log(self._train) else None
        self._begin_at(None)
        #: What contributions look like while leaves are started; None: none are.
        self._phase: RoundSpec | None = None
        self._sums = StepSums()
        self._expected = 0
        self._staleness: list[int] = []
        self._turnaround_s: deque[float] = deque(maxlen=MEASURED)
        #: Whole contributions that wait for the one that is being applied.
        self._whole: deque[Start] = deque()
        self._committing: Steps[list[Effect]] | None = None
        self._elapsed_s = 0.0
        #: Contributions to steps that their shards had completed.
        self.duplicates = 0

    @property
    def version(self) -> int:
        """Steps of the job that are done; -1: not even the parameters to begin with."""
        version = self._range.version
        return NONE if version < 0 else version // self.plan.shards

    @property
    def clocks(self) -> Clocks:
        """Which step each shard is at."""
        return self._clocks

    def begin_restored(
        self,
        version: int,
        vectors: Mapping[int, tuple[Array, Mapping[str, Array]]],
        root_state: str,
    ) -> list[Effect]:
        """See `JobRanges.begin_restored`; shards go on where they were."""
        self._begin_at(completed_steps(root_state, self.plan.shards, version))
        if self._log is not None:
            self._log = ReplayLog.restored(vectors[0][1], self._clocks.total)
        return super().begin_restored(version, vectors, root_state)

    def step_of(self, version: int) -> int:
        """See `JobRanges.step_of`."""
        return version // self.plan.shards

    def cursor(self, stream: object = None, *, joins: bool = False) -> StartsCursor:
        """A new stream's position."""
        return StartsCursor(self, stream, self._go_log)

    # -- from workers

    def stream_opened(self, stream: object, worker_id: str, incarnation: str = "") -> None:
        """A worker opened a stream; it has to say what it could begin."""
        self._starts.open(stream, worker_id)

    def stream_closed(self, stream: object) -> None:
        """A stream ended: what it was given is given to whoever hosts the shards next."""
        self._starts.close(stream)

    def starts_wanted(self, stream: object, message: pb.StartsWanted) -> list[Effect]:
        """A worker says which leaves it could begin."""
        self._check_term(message.term)
        self._starts.want(stream, message, self.plan.shards)
        return [Wake()]

    def give_start(self, stream: object, now_s: float) -> Start | None:
        """Start a leaf on a stream with the newest version; None: nothing to start there now."""
        store = self._range.parameters.versions
        version = store.get(store.newest_whole)
        if self._phase is None or version is None:
            return None
        return self._starts.give(stream, version, now_s)

    def newest(self) -> Version | None:
        """The newest version."""
        store: VersionStore = self._range.parameters.versions
        return store.get(store.newest_whole)

    def late_workers(self, elapsed_s: float) -> dict[str, float]:
        """Workers that had a leaf for longer than twice the usual time and 100 ms, and 10 s at
        first."""
        patience_s = self._patience_s
        late: dict[str, float] = {}
        for stream, start in self._starts.all:
            late_s = elapsed_s - start.began_s - patience_s
            if self._phase is not None and late_s > late.get(stream.worker_id, 0.0):
                late[stream.worker_id] = late_s
        return late

    def late_shards(self, elapsed_s: float) -> dict[int, float]:
        """Shards that nobody has asked for in that time, although they could start."""
        waiting_s = self._starts.unattended_s(elapsed_s, opens=self._phase is None)
        late = {shard: each - self._patience_s for shard, each in waiting_s.items()}
        return {shard: late_s for shard, late_s in late.items() if late_s > 0}

    @property
    def _patience_s(self) -> float:
        if len(self._turnaround_s) < MEASURED_LEAST:
            return PATIENCE_UNMEASURED_S
        usual_s = float(np.quantile(self._turnaround_s, 0.95))
        return PATIENCE_FACTOR * usual_s + PATIENCE_LEAST_S

    def contribute(
        self,
        frame: pb.ContributionFrame,
        payload: memoryview,
        elapsed_s: float,
        stream: object = None,
    ) -> list[Effect]:
        """Add one frame; the last one of a contribution commits it. See `JobRanges.contribute`."""
        if frame.vector != GRADIENT_VECTOR:
            return super().contribute(frame, payload, elapsed_s, stream)
        self._check_term(frame.term)
        if self._range.ended or self._failed or self._phase is None:
            return []
        shard = frame.node.first
        if not 0 <= shard < self.plan.shards:
            raise InvalidArgument(f"there is no shard {shard}")
        if frame.shard_step < self._clocks.step_of(shard):
            self.duplicates += frame.first_element == 0
            return []
        start = self._starts.find(stream, shard)
        if start is None:
            raise InvalidArgument(
                f"step {frame.shard_step} of shard {shard} was not started on this stream"
            )
        if start.left == 0 or not start.take(self._phase, self._grid, frame, payload):
            return []
        self._turnaround_s.append(elapsed_s - start.began_s)
        self._whole.append(start)
        if len(self._grid) > 1:
            return [Work()]
        effects: list[Effect] = []
        while self.works:
            effects += self.work(elapsed_s)
        return effects

    @property
    def works(self) -> bool:
        """See `JobRanges.works`: a contribution of several frames is applied frame by frame."""
        if self._phase is None or self._failed:
            return super().works
        return self._committing is not None or bool(self._whole)

    def work(self, elapsed_s: float) -> list[Effect]:
        """Apply the next frame of the contribution whose turn it is."""
        if self._phase is None or self._failed:
            return super().work(elapsed_s)
        self._elapsed_s = elapsed_s
        if self._committing is None and self._whole:
            start = self._whole.popleft()
            if start.step != self._clocks.step_of(start.shard):
                self.duplicates += 1
                return []
            self._committing = self._commit(start)
        if self._committing is None:
            return []
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                next(self._committing)
        except StopIteration as done:
            self._committing = None
            return [Wake(), *done.value]
        except NonFiniteResult as error:
            self._committing = None
            return self.fail("PARAMETERS_NON_FINITE", str(error))
        return []

    def pause(self) -> list[Effect]:
        """Pause after the present step; at once where nothing of it has committed."""
        assert self._decider is not None
        self._decider.request_pause()
        if self._phase is None or self._sums.commits or self.works:
            return []
        return self._issue(self._decider.paused())

    # -- inside

    def _begin_at(self, completed: Sequence[int] | None) -> None:
        bound = stale_bound(self._train)
        self._clocks = Clocks(self.plan.shards, bound, completed)
        self._starts = Starts(self._clocks, len(self._range.parameters.grid))

    def _version_of(self, step: int) -> int:
        return step * self.plan.shards

    def _open(self, owned: _Range, go: GoRecord) -> None:
        self._close_phase()
        if go.action != GoRecord.ACTION_TRAIN:
            super()._open(owned, go)
            return
        assert self._decider is not None
        parameters = owned.parameters
        self._phase = self._rounds.gradients(go, parameters.grid, parameters.dtype)
        self._clocks.limit = self._decider.limit
        self._go_log.drop_before(go.version)

    def _end(self, owned: _Range, go: GoRecord) -> list[Effect]:
        self._close_phase()
        told = GoRecord()
        told.CopyFrom(go)
        told.version = max(0, self.version)
        return super()._end(owned, told)

    def _close_phase(self) -> None:
        """Nothing is started any more, and what comes counts no more."""
        self._phase = None
        for start in self._whole:
            self._starts.drop(start)
        self._whole.clear()

    def _commit(self, start: Start) -> Steps[list[Effect]]:
        assert start.scalars is not None
        parameters = self._range.parameters
        version = parameters.versions.newest_whole
        count, loss, present = start.scalars
        staleness = version - start.version.number
        if present and count:
            yield from self._apply(start, count, Late(self._sums_step, version, staleness))
        else:
            count, loss = 0, 0.0
            for index in range(len(parameters.grid)):
                parameters.keep(index, version)
        parameters.versions.drop_before(version + 1)
        self._clocks.commit(start.shard, start.step)
        self._starts.committed(start.shard)
        expected = expected_of_shard(self.plan, start.shard, start.step)
        self.examples_lost += max(expected - count, 0)
        self._expected += expected
        if self._log is not None:
            self._log.add(start.shard, staleness)
        self._sums.add(count, loss, staleness)
        self._staleness.append(staleness)
        return self._step_done() if self._sums.commits == self.plan.shards else []

    @property
    def _sums_step(self) -> int:
        """The step of the job that is being made."""
        return self._clocks.total // self.plan.shards

    def _apply(self, start: Start, count: int, late: Late) -> Steps[None]:
        parameters, version = self._range.parameters, late.update
        pieces = [piece for piece in start.frames if piece is not None]
        mean = Contribution(pieces, count)
        factor = yield from mean.factor_steps(self._rounds.clip_norm, Slices())
        for index, piece in enumerate(pieces):
            if index:
                yield
            read = start.version.values[index]
            assert read is not None
            shortened = piece if factor == 1.0 else piece * piece.dtype.type(factor)
            updated = parameters.apply_late(index, version, shortened, count, late, read)
            require_finite(
                updated,
                f"step {start.step} of shard {start.shard} made parameters that are not finite; "
                "lower the learning rate or check the data",
            )
            parameters.versions.publish(version + 1, index, updated)

    def _step_done(self) -> list[Effect]:
        assert self._decider is not None
        sums, self._sums = self._sums, StepSums()
        staleness, self._staleness = tuple(self._staleness), []
        expected, self._expected = self._expected, 0
        step = self.version
        effects: list[Effect] = [Committed(step, sums.count, expected, staleness)]
        go = self._decider.committed(step, sums.count, sums.loss, self._elapsed_s, sums.measured)
        points = self._decider.take_points()
        if points:
            effects.append(Points(tuple(points)))
        if go.action != GoRecord.ACTION_TRAIN:
            return effects + self._issue(go)
        # The phase goes on; shards that met at the limit may pass it now.
        self._clocks.limit = self._decider.limit
        go.version = self._version_of(go.version)
        self._settle_checkpoint(go)
        return effects + self._checkpoint(self._range, go)

    def _checkpoint(self, owned: _Range, go: GoRecord) -> list[Effect]:
        effects: list[Effect] = []
        for effect in super()._checkpoint(owned, go):
            assert isinstance(effect, StartCheckpoint)
            step = self.version
            effect.snapshot.version = step
            if self._log is not None:
                log = self._log.vectors(effect.snapshot.dtype)
                pieces = {name: [vector] for name, vector in log.items()}
                effect.snapshot.extra = {**effect.snapshot.extra, **pieces}
            effects.append(replace(effect, version=step))
        return effects

    def _state(self, go: GoRecord) -> dict[str, Any]:
        return super()._state(go) | {"completed_steps": list(self._clocks.completed)}


class StartsCursor:
    """Position of one stream of such a job: go records, starts, and the versions that they need.

    A version that was begun is sent whole, whatever commits meanwhile; the next one that is sent
    is the newest then.
    """

    def __init__(self, ranges: AsynchronousRanges, stream: object, go_log: GoLog) -> None:
        self._ranges = ranges
        self._stream = stream
        self._go_log = go_log
        self._last_go = -1
        self._sent = NONE
        self._due: deque[bytes] = deque()

    def take(self, now_s: float = 0.0) -> bytes | None:
        """The next message for this stream; None: nothing until something happens."""
        if self._due:
            return self._due.popleft()
        record = self._go_log.after(self._last_go)
        if record is not None:
            self._last_go = record.number
            if record.evaluates:
                self._send(self._ranges.newest())
            return record.data
        start = self._ranges.give_start(self._stream, now_s)
        if start is None:
            return None
        self._send(start.version)
        message = pb.StartLeaf(
            term=self._ranges.term,
            version=start.version.number,
            shard=start.shard,
            shard_step=start.step,
        )
        self._due.append(encode_response(pb.ExchangeResponseHeader(start_leaf=message)))
        return self._due.popleft()

    def _send(self, version: Version | None) -> None:
        if version is not None and version.number != self._sent:
            self._sent = version.number
            self._due.extend(frame for frame in version.frames if frame is not None)

"""The ranges of one job in one term that this aggregator owns.

Theory of operation. Range 0 is the *root*: its owner asks the decider what happens at each version
and issues go records. Any other range learns of them from workers, who carry them. A go record
opens a round in a range once the range holds the record's version; frames fill the round's trees;
each frame whose tree is complete goes through the root function at once, and for a train round
that publishes one frame of the next version. The last one closes the round. Closing it in range 0
makes the next go record.

Rules that hold after every call:
- A range holds at most two versions. The first contribution at version t + 1 shows that its
  sender had t + 1 whole, from every range, and only then t is dropped.
- A round is open only under a go record for exactly (version, round), and never for a version
  that the range does not hold whole.
- Order is (version, round) within a term; whatever is older than the newest is ignored.

A round whose frames complete all at once is closed by *work*: slices that the runtime asks for one
by one (`work`), so that whoever else waits has his turn in between. Until it is done the round
ignores frames, and nothing but a failure can end it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from coordinator.aggregation.core.cursor import AnyCursor, Cursor
from coordinator.aggregation.core.effects import (
    Committed,
    Effect,
    Ended,
    Failed,
    Points,
    Refused,
    StartCheckpoint,
    Wake,
    Work,
)
from coordinator.aggregation.core.golog import GoLog
from coordinator.aggregation.core.plan import (
    TERMINAL_ACTIONS,
    AnyRound,
    Rounds,
)
from coordinator.aggregation.core.roots import (
    AssignRoot,
    NonFiniteResult,
    OptimizerRoot,
    RootFunction,
    SumRoot,
    UpdateRoot,
)
from coordinator.aggregation.core.state import AnyRule, Array, RangeParameters
from coordinator.aggregation.core.versions import NONE, VersionStore
from phalanx.compressors import build_down_codec
from phalanx.copies import OpenRound
from phalanx.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument
from phalanx.privacy.noise import GradientNoise
from phalanx.reduction import Node
from phalanx.rounds import Disagreement
from phalanx.training.best import BEST_VECTOR, kept_in
from phalanx.training.decisions import RootDecider
from phalanx.training.expected import expected_examples
from phalanx.training.two_rounds import examples_of
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord

PENDING_GO_RECORDS = 16
"""Bound of the go records that a range keeps until it holds their version."""

Key = tuple[int, int]


@dataclass(frozen=True)
class VerifiersMissing:
    """Contributions that need more equal copies than there are workers left to compute them."""

    version: int
    action: GoRecord.Action.ValueType
    leaves: int
    #: Of the first of them: its node, copies that came, how many differ, equal ones needed.
    node: Node
    copies: int
    results: int
    needed: int


@dataclass
class _Range:
    parameters: RangeParameters
    #: (version, round) of the newest go record in force.
    key: Key = (NONE, NONE)
    round: AnyRound | None = None
    root: RootFunction | None = None
    touched: bool = False
    #: What is left to do before the round, which has all that it needs, is closed.
    work: Generator[bool] | None = None
    ended: bool = False
    pending: dict[Key, GoRecord] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.parameters.versions.newest_whole


class JobRanges:
    """State machine of the owned ranges of one job in one term; see the module's text.

    Every method that changes something returns effects for the runtime to perform, in order.
    `elapsed_s` is the time since the ranges were assigned, for wall-time stops.
    """

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        owned: Sequence[training_pb2.ParameterRange],
        optimizer: AnyRule,
        decider: RootDecider | None,
        noise: GradientNoise | None = None,
    ) -> None:
        """`decider` is given exactly where range 0 is `owned`, `noise` in private jobs."""
        self.plan = plan
        self.term = term
        spec = JobSpec.FromString(plan.spec)
        codec = build_down_codec(spec.train)
        self._ranges = {
            piece.index: _Range(RangeParameters(term, piece, plan.layout, optimizer, codec))
            for piece in owned
        }
        if (0 in self._ranges) != (decider is not None):
            raise InvalidArgument("the owner of range 0, and only it, needs a decider")
        self._decider = decider
        self._noise = noise
        self._keeps_best = spec.output.HasField("best")
        self._rounds = Rounds(plan)
        self._go_log = GoLog()
        self._terminal: GoRecord | None = None
        self._failed = False
        self._checkpoint_open = False
        self._checkpoint_owed = False
        self.examples_lost = 0
        self.examples_doubled = 0

    # -- life cycle

    def seal_with(self, key: bytes) -> None:
        """Have the records of the root sealed, for the owners of other ranges; before it begins."""
        self._go_log.seal_key = key

    def begin(self) -> list[Effect]:
        """Start a fresh job: version 0 is made by an INITIALISE round."""
        return [] if self._decider is None else self._issue(self._decider.start())

    def begin_restored(
        self,
        version: int,
        vectors: Mapping[int, tuple[Array, Mapping[str, Array]]],
        root_state: str,
    ) -> list[Effect]:
        """Continue at `version` with (parameters, optimizer state) per owned range.

        Raises `DataLoss` where vectors or state do not fit the job.
        """
        first = self._version_of(version)
        for index, owned in self._ranges.items():
            parameters, state = vectors[index]
            owned.parameters.load(first, parameters, state)
            owned.key = (first, NONE)
        try:
            if self._keeps_best:
                self._restore_best(vectors, json.loads(root_state))
            if self._decider is None:
                return []
            state = json.loads(root_state)
            self.examples_lost = int(state.get("examples_lost", 0))
            self.examples_doubled = int(state.get("examples_doubled", 0))
            go = self._decider.restore(version, root_state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLoss(
                f"the checkpoint at step {version} holds no state of range 0 that can be read: "
                f"{error!r}"
            ) from None
        return self._issue(go)

    def _restore_best(
        self, vectors: Mapping[int, tuple[Array, Mapping[str, Array]]], state: Mapping[str, Any]
    ) -> None:
        """Hold what was the best version; the first record says whether it still is."""
        kept = kept_in(state)
        if kept is None:
            return
        for index, owned in self._ranges.items():
            vector = vectors[index][1].get(BEST_VECTOR)
            owned.parameters.load_best(self._version_of(kept.step), vector)

    @property
    def range_indexes(self) -> list[int]:
        """Indexes of the owned ranges."""
        return sorted(self._ranges)

    @property
    def version(self) -> int:
        """The newest version that all owned ranges hold whole; -1: none yet."""
        return min(owned.version for owned in self._ranges.values())

    @property
    def decider(self) -> RootDecider | None:
        """Range 0's decisions and measurements, where it is owned here."""
        return self._decider

    @property
    def is_root(self) -> bool:
        """Range 0 is owned here."""
        return self._decider is not None

    @property
    def open_round(self) -> OpenRound | None:
        """The oldest open round of the owned ranges, for `Copies`."""
        keys = [owned.key for owned in self._ranges.values() if owned.round is not None]
        if not keys or self._failed:
            return None
        key = min(keys)
        spec = next(r.round.spec for r in self._ranges.values() if r.round and r.key == key)
        return OpenRound(key, spec.action, spec.width, lambda: self._missing(key))

    def _missing(self, key: Key) -> int:
        rounds = [owned.round for owned in self._ranges.values() if owned.key == key]
        return reduce(or_, (round.missing for round in rounds if round is not None), 0)

    def versions_of(self, range_index: int) -> VersionStore:
        """The versions that an owned range holds."""
        return self._ranges[range_index].parameters.versions

    def cursor(self, stream: object = None, *, joins: bool = False) -> AnyCursor:
        """A new stream's position: the oldest held version and go record first."""
        stores = [self._ranges[index].parameters.versions for index in self.range_indexes]
        return Cursor(stores, self._go_log, joins=joins)

    # -- from workers

    def stream_opened(self, stream: object, worker_id: str, incarnation: str = "") -> None:
        """A worker, in one of its starts, opened a stream."""

    def stream_closed(self, stream: object) -> None:
        """A stream ended."""

    def starts_wanted(self, stream: object, message: pb.StartsWanted) -> list[Effect]:
        """A worker says which leaves it could begin."""
        raise InvalidArgument("leaves are started by go records in this job, not one by one")

    def look(self, elapsed_s: float) -> list[Effect]:
        """Time went on: do what is due; called often."""
        return []

    def verifiers_missing(self, elapsed_s: float) -> VerifiersMissing | None:
        """What waits for copies that nobody is left to compute."""
        return None

    def recall(self, stream: object, message: pb.Recall) -> list[Effect]:
        """A worker has to make states of nodes again."""
        raise InvalidArgument("nodes have no state in this job")

    def late_workers(self, elapsed_s: float) -> dict[str, float]:
        """Who has owed a contribution for too long, and by how many seconds too long."""
        return {}

    def late_shards(self, elapsed_s: float) -> dict[int, float]:
        """Shards whose workers are not heard of, and by how many seconds too long."""
        return {}

    def contribute(
        self,
        frame: pb.ContributionFrame,
        payload: memoryview,
        elapsed_s: float,
        stream: object = None,
    ) -> list[Effect]:
        """Add one frame. Copies and frames of closed rounds change nothing.

        Raises `Aborted` for another term, `FailedPrecondition` for a round without its go record,
        `InvalidArgument` for what does not fit; the stream that sent it must end.
        """
        self._check_term(frame.term)
        owned = self._ranges.get(frame.range)
        if owned is None:
            raise InvalidArgument(f"range {frame.range} is not owned here")
        if owned.ended or self._failed:
            return []
        current = owned.round
        if current is None or owned.key != (frame.step, frame.round):
            if (frame.step, frame.round) <= owned.key:
                return []
            raise FailedPrecondition(
                f"range {frame.range} has no go record for round {frame.round} of version "
                f"{frame.step}; carry it before the first frame of the round",
                reason="NO_GO_RECORD",
            )
        return self._fill(owned, current, frame, payload, elapsed_s)

    @property
    def works(self) -> bool:
        """There is work left: `work` is to be called."""
        return not self._failed and any(owned.work is not None for owned in self._ranges.values())

    def work(self, elapsed_s: float) -> list[Effect]:
        """Do a slice of the work that `Work` told of."""
        for owned in self._ranges.values():
            if self.works and owned.work is not None and owned.round is not None:
                return self._do(owned, owned.round, owned.work, elapsed_s)
        return []

    def go_record(self, go: GoRecord) -> list[Effect]:
        """Take a go record that a worker carried from range 0."""
        self._check_term(go.term)
        if self.is_root:
            return []
        return self._spread(go)

    # -- from control and the checkpoint writer

    def pause(self) -> list[Effect]:
        """Pause at the next step boundary; at once where no round has begun to change anything."""
        if self._decider is None:
            return []
        self._decider.request_pause()
        return self._issue(self._decider.paused()) if self._waits_for_a_step() else []

    def fail(self, reason: str, message: str) -> list[Effect]:
        """End the term as failed, at once: the open round may never complete."""
        if self._failed:
            return []
        self._failed = True
        effects: list[Effect] = [Failed(reason, message)]
        if self._decider is not None and self._terminal is None:
            effects += self._issue(self._decider.failed(reason))
        return effects

    def checkpoint_done(self) -> None:
        """The checkpoint that was ordered last is complete, or given up: the next may come."""
        self._checkpoint_open = False

    # -- inside

    def _check_term(self, term: int) -> None:
        if term != self.term:
            raise stale_term(self.plan.job_id, term, self.term)

    def _fill(
        self,
        owned: _Range,
        current: AnyRound,
        frame: pb.ContributionFrame,
        payload: memoryview,
        elapsed_s: float,
    ) -> list[Effect]:
        assert owned.root is not None
        if owned.work is not None:
            return []
        try:
            # An overflow is no warning here: it is looked for in the result.
            with np.errstate(over="ignore", invalid="ignore"):
                done = current.contribute(frame, payload)
                self._drop_before(owned, frame.step)
                if not done:
                    return []
                owned.touched = True
                if current.at_once:
                    owned.work = _closing(owned.root, current, done)
                    return [Work()]
                totals, made = current.totals, False
                for index in done:
                    made |= owned.root.frame_complete(index, current.take(index), totals)
        except (Disagreement, NonFiniteResult) as error:
            return self._fail_of(error, self.step_of(frame.step))
        if current.complete:
            return [Wake(), *self._close(owned, current, elapsed_s)]
        return [Wake()] if made else []

    def _do(
        self, owned: _Range, current: AnyRound, work: Generator[bool], elapsed_s: float
    ) -> list[Effect]:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                made = next(work)
        except StopIteration:
            return [Wake(), *self._close(owned, current, elapsed_s)]
        except (Disagreement, NonFiniteResult) as error:
            return self._fail_of(error, self.step_of(owned.key[0]))
        return [Wake()] if made else []

    def _fail_of(self, error: Exception, step: int) -> list[Effect]:
        if isinstance(error, Disagreement):
            return self.fail("CONTRIBUTIONS_DISAGREE", str(error))
        return self.fail("PARAMETERS_NON_FINITE", f"at version {step}: {error}")

    def _drop_before(self, owned: _Range, version: int) -> None:
        """The first contribution to a version shows that every range committed it."""
        if owned.parameters.versions.oldest < version:
            owned.parameters.versions.drop_before(version)
            if self.is_root and owned is self._ranges[0]:
                self._go_log.drop_before(version)

    def _close(self, owned: _Range, current: AnyRound, elapsed_s: float) -> list[Effect]:
        sums = owned.root.result.tolist() if isinstance(owned.root, SumRoot) else []
        owned.round = owned.root = owned.work = None
        if self._decider is None or owned is not self._ranges[0]:
            return self._open_pending(owned)
        spec, totals = current.spec, current.totals
        effects: list[Effect] = []
        if spec.action == GoRecord.ACTION_INITIALISE:
            go = self._decider.initialised(elapsed_s)
        elif spec.action == GoRecord.ACTION_EVALUATE:
            go = self._decider.evaluated(sums, totals.example_count, elapsed_s)
        else:
            step, count = self.step_of(spec.version), examples_of(self.plan, totals.example_count)
            effects.append(self._account(step, count))
            if current.refused:
                effects.append(Refused(step + 1, current.refused))
            go = self._decider.committed(step + 1, count, totals.loss_sum, elapsed_s)
        points = self._decider.take_points()
        if points:
            effects.append(Points(tuple(points)))
        return effects + self._issue(go)

    def _waits_for_a_step(self) -> bool:
        """Whether a train record is in force, all ranges are here and none has applied a part."""
        owned = list(self._ranges.values())
        if len(owned) < self.plan.range_count or any(one.round is None for one in owned):
            return False
        trains = self._go_log.newest.action == GoRecord.ACTION_TRAIN
        untouched = trains and not any(one.touched for one in owned)
        return untouched and all(one.key == owned[0].key for one in owned)

    def _account(self, step: int, count: int) -> Committed:
        expected = expected_examples(self.plan, step)
        self.examples_lost += max(expected - count, 0)
        # Each shard fills one place of the tree, so this stays 0; it is counted to be seen to.
        self.examples_doubled += max(count - expected, 0)
        return Committed(step + 1, count, expected)

    def _issue(self, go: GoRecord) -> list[Effect]:
        """Put a go record of the root, which counts steps, in force."""
        go.term = self.term
        go.version = self._version_of(go.version)
        if go.HasField("best_version"):
            go.best_version = self._version_of(go.best_version)
        return self._put_in_force(go)

    def _put_in_force(self, go: GoRecord) -> list[Effect]:
        """For our ranges at once, for others by workers."""
        if go.action in TERMINAL_ACTIONS:
            self._terminal = go
        else:
            self._settle_checkpoint(go)
        self._go_log.append(go, self.versions_of(0).only_frame(go.version))
        return [Wake(), *self._spread(go)]

    def _settle_checkpoint(self, go: GoRecord) -> None:
        """One at a time: a slow checkpoint delays the next one, never the step."""
        if (go.checkpoint or self._checkpoint_owed) and go.version > NONE:
            wanted = go.action == GoRecord.ACTION_TRAIN or go.checkpoint
            go.checkpoint = wanted and not self._checkpoint_open
            self._checkpoint_owed = not go.checkpoint

    def _version_of(self, step: int) -> int:
        """The version of the parameters after so many steps of the job."""
        return step

    def step_of(self, version: int) -> int:
        """The step of the job that a version belongs to."""
        return version

    def _spread(self, go: GoRecord) -> list[Effect]:
        effects: list[Effect] = []
        for index in self.range_indexes:
            effects += self._accept(self._ranges[index], go)
        return effects

    def _open_pending(self, owned: _Range) -> list[Effect]:
        effects: list[Effect] = []
        for key in sorted(owned.pending):
            effects += self._accept(owned, owned.pending.pop(key))
        return effects

    def _accept(self, owned: _Range, go: GoRecord) -> list[Effect]:
        key = (go.version, go.round)
        if owned.ended or key <= owned.key:
            return []
        if go.action == GoRecord.ACTION_FAIL:
            return self._end(owned, go)
        version = NONE if go.action == GoRecord.ACTION_INITIALISE else go.version
        if owned.version < version:
            if key not in owned.pending and len(owned.pending) >= PENDING_GO_RECORDS:
                raise FailedPrecondition(
                    f"range {owned.parameters.piece.index} is at version {owned.version} and "
                    f"already keeps {PENDING_GO_RECORDS} go records of later ones",
                    reason="TOO_MANY_GO_RECORDS",
                )
            owned.pending[key] = go
            return []
        if owned.version > version or (owned.round is not None and owned.touched):
            return []
        owned.parameters.keep_best(go.best_version if go.HasField("best_version") else None)
        owned.key = key
        owned.round = owned.root = owned.work = None
        effects = self._checkpoint(owned, go)
        if go.action in TERMINAL_ACTIONS:
            return effects + self._end(owned, go)
        self._open(owned, go)
        return effects

    def _open(self, owned: _Range, go: GoRecord) -> None:
        """Start the round of a go record, unless it is none of this range's business."""
        parameters = owned.parameters
        opened = self._rounds.open(go, parameters.grid, parameters.dtype)
        spec = opened.spec
        if go.action == GoRecord.ACTION_INITIALISE:
            owned.root = AssignRoot(parameters, go.version)
        elif go.action == GoRecord.ACTION_TRAIN:
            if parameters.needs_all_frames:
                owned.root = UpdateRoot(parameters, go.version, self.step_of(go.version))
            else:
                owned.root = OptimizerRoot(parameters, go.version, self._noise)
        elif parameters.piece.index == 0:
            owned.root = SumRoot(spec.grid, spec.dtype, "the evaluation")
        else:
            return
        owned.round = opened
        owned.touched = False

    def _checkpoint(self, owned: _Range, go: GoRecord) -> list[Effect]:
        final = go.action == GoRecord.ACTION_STOP
        terminal = final or go.action == GoRecord.ACTION_PAUSE
        if not (go.checkpoint or terminal):
            return []
        snapshot = owned.parameters.snapshot(go.version)
        root_state = ""
        if self._decider is not None:
            self._checkpoint_open = True
            root_state = json.dumps(self._state(go), sort_keys=True)
        return [StartCheckpoint(go.version, final, terminal, snapshot, root_state)]

    def _state(self, go: GoRecord) -> dict[str, Any]:
        """What range 0's part of a checkpoint keeps: the decider's state, our own counts, and with
        the final one why the job ended, since the report that says so may be lost."""
        assert self._decider is not None
        state: dict[str, Any] = json.loads(self._decider.state())
        state["examples_lost"] = self.examples_lost
        state["examples_doubled"] = self.examples_doubled
        if go.action == GoRecord.ACTION_STOP:
            state["stop_reason"] = go.reason
        return state

    def _end(self, owned: _Range, go: GoRecord) -> list[Effect]:
        owned.ended = True
        owned.round = owned.root = owned.work = None
        owned.pending.clear()
        return [Ended(go)] if all(other.ended for other in self._ranges.values()) else []


def _closing(root: RootFunction, current: AnyRound, done: Sequence[int]) -> Generator[bool]:
    """Slices of what closes a round whose frames complete at once; tells of each but the last
    whether it made a frame of parameters."""
    for _ in current.reduce():
        yield False
    totals = current.totals
    for number, index in enumerate(done):
        if number:
            yield True
        root.frame_complete(index, current.take(index), totals)


def stale_term(job_id: str, term: int, current: int) -> Aborted:
    """The error that another term than the current one gets."""
    return Aborted(
        f"job {job_id} is in term {current}, not {term}",
        reason="STALE_TERM",
        details={"current_term": str(current)},
    )

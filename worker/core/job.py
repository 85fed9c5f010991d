"""What the worker decides about one job: versions, rounds, parts, streams.

A round is open for the worker from its go record until the worker holds the next version whole.
The round that counts is the newest one at the newest whole version, whatever the root has issued
for later versions: some range may still lack what only this worker can send. INITIALISE is open
while there is no version at all.

Where contributions commit one by one a TRAIN record opens no round: until the next record the root
starts leaves one by one (`Starts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from phalanx.given import Covered
from phalanx.reduction import Node
from phalanx.training.two_rounds import step_of
from phalanx.v1 import aggregation_service_pb2, training_pb2
from phalanx.v1 import coordination_service_pb2 as coordination
from worker.core.buffers import BufferPool
from worker.core.dispatch import Dispatcher, Task
from worker.core.division import shards_of
from worker.core.effects import Cancel, Effect, OpenStreams, Report, Wake
from worker.core.outbox import FrameOut, GoOut, Outbox, RecallOut, StartsOut
from worker.core.rounds import LeafFailure, Part, PartState, Round
from worker.core.starts import Start, Starts
from worker.core.versions import BUFFERS, Place, VersionAssembly

GoRecord = training_pb2.GoRecord
LeafFailed = coordination.LeafFailed

LOSSES_WITHOUT_BLAME_MAX = 3
"""After so many deaths of a leaf process outside any leaf, the part's first shard is named."""

ABSENT_STEPS_MAX = 64
"""Steps of shards of which is known who is left out."""

_WORK = (GoRecord.ACTION_TRAIN, GoRecord.ACTION_EVALUATE)


class JobCore:
    """One job on this worker; lives over terms. Every method returns what is to be done."""

    def __init__(
        self, plan: training_pb2.JobPlan, dispatcher: Dispatcher, new_task_id: Callable[[], int]
    ) -> None:
        self.plan = plan
        self.job_id = plan.job_id
        self.term = 0
        self.placement = -1
        self.prepared = False
        self.leaf_sha256 = ""
        self._set_up = False
        self._wanted_leaf = ""
        self.train_nodes: list[Node] = []
        self.evaluation_nodes: list[Node] = []
        self.round: Round | None = None
        self.versions = VersionAssembly((), 4)
        self._dispatcher = dispatcher
        self._new_task_id = new_task_id
        self._outbox = Outbox((), 4, 0)
        #: A version is being read by each slot, at most, besides the newest and the next one.
        self._version_buffers = BUFFERS + (dispatcher.slots if plan.asynchronous else 0)
        self._buffers = BufferPool(self._version_buffers)
        #: Only where contributions commit one by one.
        self._starts: Starts | None = None
        #: Version → its go records in order; the last one counts.
        self._go: dict[int, list[GoRecord]] = {}
        self._absent: dict[int, set[int]] = {}
        #: (version, round) → nodes of others that aggregators want copies of.
        self._copies: dict[tuple[int, int], list[Node]] = {}
        #: Proofs of what was given to this worker in the term, for the owners of ranges.
        self.given: list[training_pb2.Given] = []
        self.assigned = training_pb2.Given()
        self._covered = Covered(plan)
        self._tasks: dict[int, Task] = {}
        self._losses: dict[Node, int] = {}

    # Placement and term

    def assign(self, message: coordination.AssignJob) -> list[Effect]:
        """Take a placement; a lower term, or no higher placement, is ignored."""
        if (message.term, message.placement) <= (self.term, self.placement):
            return []
        effects: list[Effect] = []
        if message.term > self.term:
            effects += self._start_term(message)
        self.placement = message.placement
        self.assigned = message.given
        self._keep_given(message.given)
        self.train_nodes = _nodes(message.train_nodes)
        self.evaluation_nodes = _nodes(message.evaluation_nodes)
        if self.round is not None:
            effects += self._owe(self.round)
        if self._starts is not None:
            shards = shards_of(self.train_nodes, self.plan.shards)
            effects += self._give_up(self._starts.host(shards)) + self._wake()
        return effects

    def prepare_done(self, leaf_sha256: str = "") -> list[Effect]:
        """Code and data are here and the leaf processes know the job.

        `leaf_sha256` is that of this worker's own leaf, of a reproducible job; empty if it failed.
        With another one than the job began with nothing is computed here: control takes the job
        away once it hears of it.
        """
        self._set_up = True
        self.leaf_sha256 = leaf_sha256
        self._compare_leaves()
        effects: list[Effect] = [self._ready_report()]
        return effects + self._turn()

    def leave(self) -> list[Effect]:
        """The job was revoked: stop computing it."""
        self._set_up = self.prepared = False
        self.train_nodes, self.evaluation_nodes = [], []
        return self._end_starts() + self._end_round()

    def skip(self, message: coordination.AbsentShards) -> list[Effect]:
        """Control decided that these shards are left out of one step."""
        if message.term != self.term:
            return []
        self._absent.setdefault(message.step, set()).update(message.shards)
        if self._starts is not None:
            return self._skip_starts(self._starts, message)
        round = self.round
        if round is None or round.is_evaluation or round.go.version != message.step:
            return []
        return self._owe(round) if round.skip(message.shards) else []

    # Exchange

    def go_record(self, go: GoRecord) -> list[Effect]:
        """The root decided; also carries the record to the other ranges."""
        records = self._go.get(go.version)
        if go.term != self.term or (records and go.round <= records[-1].round):
            return []
        if records is None:
            records = self._go[go.version] = []
            self._forget_old(go.version)
        records.append(go)
        effects: list[Effect] = [Wake(self.job_id, name) for name in self._outbox.carry(go)]
        return effects + self._turn()

    def start_leaf(self, message: aggregation_service_pb2.StartLeaf) -> list[Effect]:
        """The root starts a leaf here, on a version that is here."""
        if message.term != self.term or self._starts is None:
            return []
        absent = self._absent.get(message.shard_step, ())
        start, dropped = self._starts.begin(message, absent)
        effects = self._give_up(dropped)
        if start is not None:
            effects += self._submit(start.round, [start.part])
        return effects + self._wake()

    def copy_nodes(self, message: aggregation_service_pb2.CopyNodes) -> list[Effect]:
        """Some worker is late: compute copies of its nodes, now or once their round opens here."""
        key = (message.version, message.round)
        newest = max((version for version, _ in self._copies), default=message.version)
        if message.term != self.term or message.version < newest - 1:
            return []
        self._keep_given(message.given)
        for old in [known for known in self._copies if known[0] < message.version - 1]:
            del self._copies[old]
        self._copies.setdefault(key, []).extend(_nodes(message.nodes))
        round = self.round
        if round is None or (round.go.version, round.go.round) != key:
            return []
        return self._owe_copies(round)

    def frame_place(self, frame: aggregation_service_pb2.VersionFrame) -> Place | None:
        """Where the payload of a version frame goes; None: not wanted."""
        if frame.term != self.term or frame.HasField("node"):
            return None
        return self.versions.place(
            frame.range, frame.version, frame.first_element, frame.element_count
        )

    def frame_stored(self, place: Place) -> list[Effect]:
        """The payload of a version frame is in its buffer."""
        self.versions.stored(place)
        return self._turn()

    def stream_opened(self, aggregator_id: str) -> list[Effect]:
        """An aggregator accepted the stream."""
        records = [go for version in sorted(self._go) for go in self._go[version]]
        self._outbox.opened(aggregator_id, records)
        effects = self._give_up(self._starts.stream_opened()) if self._starts is not None else []
        return [*effects, Wake(self.job_id, aggregator_id)]

    def stream_closed(self, aggregator_id: str) -> None:
        """A stream broke; it will be opened again."""
        self._outbox.closed(aggregator_id)

    def next_message(self, aggregator_id: str) -> FrameOut | GoOut | StartsOut | RecallOut | None:
        """What to send on a stream now; see `Outbox`. What was taken before is on its way."""
        starts = self._starts
        if starts is not None:
            self._let_sent_go(starts)
            if self._outbox.is_open(aggregator_id):
                out = starts.next(self._dispatcher.slots - len(self._tasks))
                if out is not None:
                    return out
        return self._outbox.next(aggregator_id)

    # Leaf processes

    def owns(self, task: Task) -> bool:
        """Whether this is the hosting that gave the task out (not an earlier one, revoked)."""
        return self._tasks.get(task.id) is task

    def part_done(
        self, task: Task, part: Part, count: int, loss: float, mask: int, sums: tuple[float, ...]
    ) -> list[Effect]:
        """A leaf process finished a part."""
        if not self._wants(task.round):
            return []
        return self._wake() if task.round.done(part, count, loss, mask, sums) else []

    def part_failed(self, task: Task, part: Part, failure: LeafFailure) -> list[Effect]:
        """A shard of a part failed; control decides what happens, the other parts go on."""
        round = task.round
        if not self._wants(round) or task.cancelled:
            return []
        part.state = PartState.FAILED
        part.failure, part.failed_task = failure, task.id
        if failure.shard in round.absent and failure.shard not in task.absent:
            return self._owe(round)
        if self._starts is not None:
            self._starts.slot_free()
        return [self._failure_report(round, failure, task.id)]

    def open_failures(self) -> list[Effect]:
        """Reports of the failures that still wait for control, for one that may not have heard."""
        rounds = [] if self.round is None else [self.round]
        if self._starts is not None:
            rounds += [start.round for start in self._starts.under_way]
        return [
            self._failure_report(round, part.failure, part.failed_task)
            for round in rounds + self._other_rounds()
            for part in round.parts.values()
            if part.state is PartState.FAILED and part.failure is not None
        ]

    def task_ended(self, task: Task, lost: bool = False) -> list[Effect]:
        """A leaf process is through with a task, or died over it (`lost`).

        Parts that are neither done nor failed are given out again where they are still wanted.
        """
        self._tasks.pop(task.id, None)
        round = task.round
        effects: list[Effect] = []
        if self._starts is not None:
            self._starts.slot_free()
            effects += self._wake()
        if not self._wants(round):
            self._give_back(task.parts)
            return effects
        again = []
        for part in task.parts:
            if part.state is not PartState.RUNNING:
                continue
            part.state = PartState.PENDING
            if lost and not task.unheard and self._blame_without_leaf(part):
                message = "the leaf process dies again and again before it runs a leaf"
                failure = LeafFailure(part.node.first, LeafFailed.KIND_CRASHED, message)
                effects += self.part_failed(task, part, failure)
            elif round.needs(part):
                again.append(part)
            else:
                del round.parts[part.node]
                self._give_back([part])
        return effects + self._submit(round, again)

    # Inside

    def _keep_given(self, given: training_pb2.Given) -> None:
        """Keep what proves that more was given to this worker than is known to have been."""
        if not given.seal:
            return  # nobody asks for it
        nodes = training_pb2.GivenNodes.FromString(given.nodes)
        if self._covered.add(nodes) or not self.given:
            self.given.append(given)

    def _start_term(self, message: coordination.AssignJob) -> list[Effect]:
        effects = self._end_starts() + self._end_round()
        layout = message.plan.layout
        itemsize = np.dtype(layout.dtype or "float32").itemsize
        self.plan = message.plan
        self.term = message.term
        self.given, self._covered = [], Covered(message.plan)
        self._wanted_leaf = message.leaf_sha256
        self._compare_leaves()
        # In rounds nobody needs what is read there once two newer versions are coming.
        in_use = self._buffers_read if message.plan.asynchronous else set
        self.versions = VersionAssembly(message.ranges, itemsize, self._version_buffers, in_use)
        if message.plan.asynchronous:
            self._starts = Starts(message.plan, message.term, message.ranges, itemsize)
        self._outbox = Outbox(message.ranges, itemsize, len(message.plan.evaluation_sums))
        self._go.clear()
        self._absent.clear()
        self._copies.clear()
        self._losses.clear()
        owners = {piece.aggregator_id: piece.address for piece in message.ranges}
        effects.append(OpenStreams(self.job_id, self.term, tuple(sorted(owners.items()))))
        if self._set_up:
            effects.append(self._ready_report())
        return effects

    def _compare_leaves(self) -> None:
        """Compute only with the bits that the job began with; a leaf that failed has none yet."""
        same = not self._wanted_leaf or self.leaf_sha256 in ("", self._wanted_leaf)
        self.prepared = self._set_up and same

    def _target(self) -> GoRecord | None:
        """The go record of the round that is open for this worker."""
        if not self.prepared:
            return None
        if self._starts is not None and self._go:
            newest = self._go[max(self._go)][-1]
            if newest.action == GoRecord.ACTION_TRAIN:
                return None
        version = self.versions.whole_version
        if version < 0:
            records = self._go.get(0)
            newer = any(held > 0 for held in self.versions.held_versions)
            if not records or newer or records[0].action != GoRecord.ACTION_INITIALISE:
                return None
            return records[0]
        records = self._go.get(version)
        return records[-1] if records and records[-1].action in _WORK else None

    def _turn(self) -> list[Effect]:
        """Open the round that counts now, if it is another one."""
        if self._starts is not None:
            return self._turn_starts(self._starts) + self._turn_round()
        return self._turn_round()

    def _turn_starts(self, starts: Starts) -> list[Effect]:
        """Let leaves be started under the newest record, or end that."""
        newest = self._go[max(self._go)][-1] if self.prepared and self._go else None
        go = newest if newest is not None and newest.action == GoRecord.ACTION_TRAIN else None
        if go is starts.go:
            return []
        effects = self._give_up(starts.turn_to(go))
        if go is not None:
            effects += self._give_up(starts.host(shards_of(self.train_nodes, self.plan.shards)))
        return effects + self._wake()

    def _turn_round(self) -> list[Effect]:
        go = self._target()
        if (self.round.go if self.round is not None else None) is go:
            return []
        effects = self._end_round()
        if go is None:
            return effects
        self.round = self._round_of(go)
        self._outbox.turn_to(self.round)
        return effects + self._owe(self.round)

    def _round_of(self, go: GoRecord) -> Round:
        width = {
            GoRecord.ACTION_INITIALISE: 1,
            GoRecord.ACTION_EVALUATE: self.plan.evaluation_shards,
        }.get(go.action, self.plan.shards)
        trains = go.action == GoRecord.ACTION_TRAIN
        # What is compared travels by itself in rounds of every kind.
        unit = self.plan.unit_span if trains else int(self.plan.verified)
        round = Round(go, width, self._dispatcher.slots, unit)
        if trains:
            round.absent = set(self._absent.get(go.version, ()))
        return round

    def _owed(self, round: Round) -> list[Node]:
        if round.is_evaluation:
            return self.evaluation_nodes
        if round.go.action == GoRecord.ACTION_INITIALISE:
            return [Node(0, 1)] if any(node.first == 0 for node in self.train_nodes) else []
        return self.train_nodes

    def _owe(self, round: Round) -> list[Effect]:
        for task in [task for task in self._tasks.values() if task.round is round]:
            if self._dispatcher.withdraw(task):
                del self._tasks[task.id]
        before = list(round.parts.values())
        new = round.owe(self._owed(round))
        if before:
            kept = set(round.parts.values())
            self._give_back(part for part in before if part not in kept)
        copies = self._submit(round, new) + self._owe_copies(round)
        cancelled = self._cancel(
            task
            for task in self._tasks.values()
            if task.round is round
            and self._dispatcher.running.get(task.slot) is task
            and not any(round.needs(part) for part in task.parts)
        )
        return [*copies, *cancelled, *self._wake()] if round.has_ready else [*copies, *cancelled]

    def _owe_copies(self, round: Round) -> list[Effect]:
        wanted = self._copies.get((round.go.version, round.go.round))
        if not wanted:
            return []
        effects = self._submit(round, round.owe_copies(wanted))
        return effects + self._wake() if round.has_ready else effects

    def _wants(self, round: Round) -> bool:
        """Whether what a round computes is still wanted."""
        if round is self.round:
            return True
        if round in self._other_rounds():
            return True
        return self._starts is not None and self._starts.find(round) is not None

    def _other_rounds(self) -> list[Round]:
        """Rounds that are computed besides, and not for what they contribute."""
        return []

    def _give_up(self, starts: Iterable[Start]) -> list[Effect]:
        """Nobody wants these leaves here any more."""
        effects: list[Effect] = []
        for start in starts:
            effects += self._end_tasks(start.round)
        return effects

    def _end_starts(self) -> list[Effect]:
        if self._starts is None:
            return []
        self._let_sent_go(self._starts)
        return self._give_up(self._starts.turn_to(None))

    def _let_sent_go(self, starts: Starts) -> None:
        for sent in starts.take_sent():
            self._give_back(sent.round.parts.values())

    def _skip_starts(self, starts: Starts, message: coordination.AbsentShards) -> list[Effect]:
        """Have a leaf that failed started again, without its shard."""
        for old in sorted(self._absent)[:-ABSENT_STEPS_MAX]:
            del self._absent[old]
        effects: list[Effect] = []
        for start in starts.under_way:
            failed = start.part.state is PartState.FAILED
            if failed and start.shard in message.shards and start.round.step == message.step:
                starts.give_up(start)
                effects += self._end_tasks(start.round)
        return effects + self._wake()

    def _buffers_read(self) -> set[int]:
        """Buffers of versions that leaves read, or will."""
        return {task.parameters for task in self._tasks.values()}

    def _end_round(self) -> list[Effect]:
        round, self.round = self.round, None
        self._outbox.turn_to(None)
        return self._end_tasks(round) if round is not None else []

    def _end_tasks(self, round: Round) -> list[Effect]:
        for task in list(self._tasks.values()):
            if task.round is round and self._dispatcher.withdraw(task):
                del self._tasks[task.id]
        running = [task for task in self._tasks.values() if task.round is round]
        busy = {part for task in running for part in task.parts}
        self._give_back(part for part in round.parts.values() if part not in busy)
        return self._cancel(running)

    def _submit(self, round: Round, parts: Iterable[Part]) -> list[Effect]:
        """Have parts computed."""
        initialise = round.go.action == GoRecord.ACTION_INITIALISE
        self._queue(round, parts, -1 if initialise else self.versions.buffer_of(round.go.version))
        return []

    def _queue(self, round: Round, parts: Iterable[Part], parameters: int) -> None:
        by_slot: dict[int, list[Part]] = {}
        for part in parts:
            by_slot.setdefault(part.slot, []).append(part)
            if part.buffer < 0 and not round.is_evaluation:
                part.buffer = self._buffers.take()
        for slot, owned in sorted(by_slot.items()):
            task = Task(
                id=self._new_task_id(),
                job_id=self.job_id,
                term=self.term,
                round=round,
                parts=owned,
                slot=slot,
                parameters=parameters,
                absent=frozenset(round.absent),
            )
            self._tasks[task.id] = task
            self._dispatcher.submit(task)

    def _give_back(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if part.buffer >= 0:
                self._buffers.give_back(part.buffer)
                part.buffer = -1
            for buffer in part.next_state:
                self._buffers.give_back(buffer)
            part.next_state = ()

    def _cancel(self, tasks: Iterable[Task]) -> list[Effect]:
        effects: list[Effect] = []
        for task in tasks:
            if not task.cancelled:
                task.cancelled = True
                effects.append(Cancel(task))
        return effects

    def _blame_without_leaf(self, part: Part) -> bool:
        losses = self._losses.get(part.node, 0) + 1
        self._losses[part.node] = losses
        return losses >= LOSSES_WITHOUT_BLAME_MAX

    def _forget_old(self, newest: int) -> None:
        """Keep what belongs to the two versions that ranges may still hold."""
        # Shards that count steps of their own are left out of those, not of versions.
        versions = (self._go,) if self.plan.asynchronous else (self._go, self._absent)
        for known in versions:
            for version in [version for version in known if version < newest - 1]:
                del known[version]

    def _wake(self) -> list[Effect]:
        return [Wake(self.job_id, name) for name in self._outbox.open_streams]

    def _ready_report(self) -> Report:
        ready = coordination.WorkerJobReady(
            job_id=self.job_id,
            term=self.term,
            leaf_sha256=self.leaf_sha256,
            leaf_failed=self.plan.bitwise and not self.leaf_sha256,
        )
        return Report(coordination.SessionRequest(worker_job_ready=ready))

    def _failure_report(self, round: Round, failure: LeafFailure, task_id: int) -> Report:
        failed = coordination.LeafFailed(
            job_id=self.job_id,
            term=self.term,
            step=step_of(self.plan, round.step),
            round=round.go.round,
            shard=failure.shard,
            kind=failure.kind,
            message=failure.message,
            traceback=failure.traceback,
            first_row=failure.first_row,
            row_count=failure.row_count,
            evaluation=round.is_evaluation,
            task=task_id,
            reason=failure.reason,
        )
        return Report(coordination.SessionRequest(leaf_failed=failed))


def _nodes(messages: Iterable[training_pb2.TreeNode]) -> list[Node]:
    return sorted(Node(message.first, message.span) for message in messages)

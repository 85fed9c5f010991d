"""One all-reduce job on a worker that is, or is to become, a member of it.

Theory of operation. A term has a fixed list of members; each owns one range (which may be empty)
and hosts at least one shard. Members send the frames of their nodes to the owners of the ranges;
an owner fills the trees of its range and sends what is reduced to every member, which updates its
own parameters once the whole gradient is in. Range 0's owner is the root. A change of members is a
new term.

A term begins when every member has told every other what it held when it heard of the term. It
starts at the highest version of these: whoever holds another asks the first that holds this one,
and gets the kept gradient of one step or everything. One that holds it may hear of the first step
of the term before it has heard of every member, and starts with that step. If nobody holds any, the
root loads the checkpoint or initialises; where its leaf does not come to an end, another member
initialises as well, and the root asks that one for what it has. The step that was open is computed
again; nothing is rolled back.

A worker that hosts the job and is no member yet only prepares for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from phalanx.copies import PATIENCE_UNMEASURED_S
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.frames import encode_request, encode_response
from phalanx.given import GivenWork
from phalanx.reduction import Node
from phalanx.rounds import Disagreement
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1 import training_pb2
from worker.core.all_reduce.late import LateShards, copies_started, copies_wanted
from worker.core.all_reduce.owner import RangeOwner, stale_term
from worker.core.all_reduce.replica import (
    NONE,
    Array,
    HeldVersions,
    Memory,
    NonFinite,
    Replica,
    elements_of,
)
from worker.core.all_reduce.root import TERMINAL_ACTIONS, Root
from worker.core.all_reduce.serving import Serving
from worker.core.dispatch import Dispatcher, Task
from worker.core.effects import (
    Committed,
    Effect,
    Ended,
    Fail,
    OpenStreams,
    Points,
    Report,
    Restore,
    Serve,
    Snapshot,
    Store,
    Wake,
    Work,
)
from worker.core.job import JobCore
from worker.core.outbox import FrameOut, GoOut, Outbox, RecallOut, StartsOut
from worker.core.rounds import Part, Round

GoRecord = training_pb2.GoRecord

HELLO_S = PATIENCE_UNMEASURED_S
"""A member that says no hello for so long, or sends nothing of its state, holds the term up."""


class AllReduceJob(JobCore):
    """One job on this worker; lives over terms, and its replica with it."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        dispatcher: Dispatcher,
        new_task_id: Callable[[], int],
        worker_id: str,
    ) -> None:
        super().__init__(plan, dispatcher, new_task_id)
        self.worker_id = worker_id
        self.replica: Replica | None = None
        self.root: Root | None = None
        self.owner: RangeOwner | None = None
        self.elapsed: Callable[[], float] = lambda: 0.0
        """Seconds since the term began for this worker; for stops by time."""
        self.reached_step = 0
        """The newest step that control knew before the term."""
        self._ranges: list[training_pb2.ParameterRange] = []
        self._members: list[str] = []
        self._restore: storage.CheckpointManifest | None = None
        self._began: dict[str, int] = {}
        self._holder = ""
        #: When this member was ready, or something of what the term starts with came last.
        self._came_s = 0.0
        #: Every member has said what it held, and this one holds what the term starts with.
        self._started = False
        self._failed = False
        self._due: dict[str, deque[bytes]] = {}
        self._serving = Serving(0)
        #: What other members were given.
        self._others = GivenWork(plan, 0, b"")
        self._hash: bytes = b""
        self._snapshot_of = NONE
        #: Only where elements are owned.
        self._late: LateShards | None = None
        #: Versions that owners of ranges ask for and that are not here yet.
        self._asked: dict[str, int] = {}

    # Placement and term

    def attach(self, memory: Memory) -> None:
        """The shared buffers are there."""
        self.replica = Replica(self.plan, memory)

    @property
    def joined(self) -> bool:
        """Whether other members may open streams to this one."""
        return self.owner is not None and self.replica is not None and self._set_up

    def prepare_done(self, leaf_sha256: str = "") -> list[Effect]:
        """Code and data are here; see `JobCore.prepare_done`."""
        self._came_s = self.elapsed()
        return super().prepare_done(leaf_sha256) + self._settle()

    def leave(self) -> list[Effect]:
        """The job was revoked: nothing of it is kept."""
        effects = super().leave()
        self.replica = self.owner = self.root = self._late = None
        self._serving = Serving(self.term)
        return effects

    def _start_term(self, message: coordination.AssignJob) -> list[Effect]:
        replica = self.replica
        if replica is not None:
            try:
                replica.finish()
            except NonFinite:
                # What was begun cannot be used; whoever computes the step again finds the same.
                replica.forget()
        others = [
            effect for effect in super()._start_term(message) if not isinstance(effect, OpenStreams)
        ]
        self.versions = HeldVersions(lambda: self.replica)
        self._outbox = Outbox(
            message.ranges,
            _itemsize(message.plan),
            len(message.plan.evaluation_sums),
            carries=False,
        )
        self._ranges = list(message.ranges)
        self._members = [piece.aggregator_id for piece in message.ranges]
        self._restore = message.restore if message.HasField("restore") else None
        self.reached_step = message.reached_step
        held = replica.version if replica is not None else NONE
        self._began = {self.worker_id: held}
        self._holder, self._started, self._failed = "", False, False
        self._came_s = 0.0
        self._due = {member: deque() for member in self._members}
        self._serving = Serving(self.term)
        self._others = GivenWork(message.plan, message.term, message.seal_key)
        self._hash, self._snapshot_of = b"", NONE
        self._asked.clear()
        self.root = self.owner = self._late = None
        peers: tuple[tuple[str, str], ...] = ()
        for piece in message.ranges:
            # One that was started again is no member before the next term, and hosts no shard.
            if piece.aggregator_id == self.worker_id and message.train_nodes:
                self.owner = RangeOwner(message.plan, message.term, piece)
                self._outbox.opened(self.worker_id, ())
                if piece.index == 0:
                    self.root = Root(message.plan, message.term, self._members)
                if piece.element_count:
                    self._late = LateShards(self.worker_id, self._members)
        if self.owner is not None:
            owners = {piece.aggregator_id: piece.address for piece in message.ranges}
            del owners[self.worker_id]
            peers = tuple(sorted(owners.items()))
        streams = OpenStreams(self.job_id, self.term, peers, held)
        return [*others, streams, *self._settle()]

    def _settle(self) -> list[Effect]:
        """Find out with which version the term starts, once every member has said what it holds."""
        replica = self.replica
        known = self._began.keys() >= set(self._members)
        if not self.joined or replica is None or self._holder or self._started or not known:
            return []
        best = max(self._began[member] for member in self._members)
        self._holder = next(each for each in self._members if self._began[each] == best)
        if best == NONE:
            if self.root is None:
                return self._ask(self._holder)
            if self._restore is not None:
                return [Restore(self.job_id, self.term, self._restore)]
            return self._issue(self.root.initialise())
        return self._start() if replica.version == best else self._ask(self._holder)

    def _ask(self, holder: str) -> list[Effect]:
        assert self.replica is not None
        wanted = pb.StateWanted(term=self.term)
        self._came_s = self.elapsed()
        if self.replica.version > NONE:
            wanted.held_version = self.replica.version
        self._due[holder].append(encode_request(pb.ExchangeRequestHeader(state_wanted=wanted)))
        return [Wake(self.job_id, holder)]

    def _start(self) -> list[Effect]:
        """This member holds what the term starts with."""
        self._started = True
        effects: list[Effect] = [Serve(self.job_id), *self._answer_late()]
        if self.root is not None:
            assert self.replica is not None
            try:
                go = self.root.begin(self.replica, self.elapsed())
            except DataLoss as error:
                return [*effects, *self._fail("ROOT_STATE_LOST", error.message)]
            return [*effects, *self._issue(go)]
        return effects + self._turn() + self._checkpoint()

    def restored(
        self, version: int, parameters: Array, state: Mapping[str, Array], root_state: str
    ) -> list[Effect]:
        """The root has read the checkpoint. Raises `DataLoss` where it does not fit the job."""
        assert self.replica is not None
        self.replica.load(version, parameters, state, root_state)
        return self._start()

    # Decisions of the root

    def go_record(self, go: GoRecord) -> list[Effect]:
        """The root decided."""
        if go.term == self.term and self.replica is not None:
            self.replica.remember(go)
            self._expect(go)
        return super().go_record(go) + self._checkpoint()

    def pause(self) -> None:
        """Pause at the next step boundary, if this is the root."""
        if self.root is not None:
            self.root.decider.request_pause()

    def _issue(self, go: GoRecord) -> list[Effect]:
        assert self.owner is not None
        assert self.root is not None
        header = pb.ExchangeResponseHeader(go_record=go)
        self.owner.log.append(go.version, encode_response(header))
        effects: list[Effect] = [Serve(self.job_id)]
        points = self.root.decider.take_points()
        if points:
            effects.append(Points(self.job_id, tuple(points)))
        effects += self.go_record(go)
        if go.action in TERMINAL_ACTIONS:
            effects.append(Ended(self.job_id, go))
        return effects

    def _fail(self, reason: str, message: str) -> list[Effect]:
        """The job cannot go on; whoever finds out tells control."""
        if self._failed:
            return []
        self._failed = True
        return [Fail(self.job_id, self.term, reason, message), *self._end_round()]

    # What other members send: contributions, questions, hashes

    def member_opened(self, key: object, hello: pb.ExchangeHello) -> list[Effect]:
        """A member opened a stream to this one."""
        if hello.worker_id not in self._members:
            raise InvalidArgument(f"{hello.worker_id} is no member of job {self.job_id}")
        if hello.term != self.term:
            raise stale_term(self.job_id, hello.term, self.term)
        self._others.show(hello.worker_id, hello.given, "hello.given")
        self._serving.opened(key, hello.worker_id)
        if self._late is not None:
            self._late.member_opened(hello.worker_id)
        held = hello.held_version if hello.HasField("held_version") else NONE
        self._began.setdefault(hello.worker_id, held)
        return self._settle()

    def member_closed(self, key: object) -> None:
        """A member's stream ended."""
        member = self._serving.closed(key)
        if member and self._late is not None:
            self._late.member_closed(member)

    def member_said(
        self, key: object, header: pb.ExchangeRequestHeader, payload: memoryview
    ) -> list[Effect]:
        """Take one message of a member. Raises PhalanxError for what does not fit."""
        kind, member = header.WhichOneof("message"), self._serving.member(key)
        if not member:
            return []  # of a term before
        if kind == "frame":
            self._others.check_frame(member, header.frame)
            return self.contribute(header.frame, payload, member)
        if kind == "given":
            self._others.show(member, header.given, "given")
            return []
        if kind == "state_wanted":
            wanted = header.state_wanted
            held = wanted.held_version if wanted.HasField("held_version") else NONE
            self._serving.wants_state(key, held)
            return [Serve(self.job_id)]
        if kind == "state_hash":
            hashed = header.state_hash
            return self._hashed(member, hashed.version, hashed.sha256)
        if kind == "version_held":
            return self._hear(header.version_held, member) + self.look()
        raise InvalidArgument(f"a member sends frames, questions and hashes, not {kind!r}")

    def contribute(
        self, frame: pb.ContributionFrame, payload: memoryview, member: str = ""
    ) -> list[Effect]:
        """Add a frame, of another member or of this one, to the range that is owned here."""
        if self.owner is None or self._failed:
            return []
        if self._late is not None:
            self._watch(self._late, self.owner, frame, member or self.worker_id)
        try:
            reduced, evaluated = self.owner.contribute(frame, payload)
        except Disagreement as error:
            return self._fail("CONTRIBUTIONS_DISAGREE", str(error))
        if self._late is not None:
            self._late.turn(self.owner.open_round, self.elapsed())
        effects: list[Effect] = [Serve(self.job_id)] if reduced else []
        for part, values in reduced:
            effects += self._take_reduced(part, values)
        if evaluated is not None and self.root is not None:
            go = self.root.evaluated(evaluated.sums, evaluated.example_count, self.elapsed())
            effects += self._issue(go)
        return effects

    def next_served(self, key: object) -> bytes | None:
        """What to send on a member's stream now; None: nothing until `Serve`."""
        if self.owner is None or self.replica is None:
            return None
        return self._serving.next(key, self.owner.log, self.replica if self._started else None)

    # Late shards

    def look(self) -> list[Effect]:
        """Have copied what is late; call it often while a round is open."""
        if self._late is None or self._failed or self.replica is None:
            return []
        due = self._late.look(self.elapsed(), self.replica.version)
        effects: list[Effect] = []
        for member in due.questions:
            asked = pb.VersionAsked(
                term=self.term,
                range=self._members.index(self.worker_id),
                version=self._late.version,
            )
            effects += self._tell(member, pb.ExchangeResponseHeader(version_asked=asked))
        for order in due.orders:
            wanted = copies_wanted(self.term, order, self._others)
            if order.worker_id == self.worker_id:
                effects += self.copy_nodes(wanted)
            else:
                header = pb.ExchangeResponseHeader(copy_nodes=wanted)
                effects += self._tell(order.worker_id, header)
        effects += [Report(copies_started(self.job_id, self.term, each)) for each in due.started]
        return effects

    def unheard(self) -> dict[str, float]:
        """Members that hold the job up, by what this one sees, and since how many seconds."""
        now_s = self.elapsed()
        waited_s = now_s - self._came_s
        if self.joined and len(self._began) < len(self._members):
            silent = [member for member in self._members if member not in self._began]
            return dict.fromkeys(silent, waited_s) if waited_s >= HELLO_S else {}
        if not self._started and self._holder:
            # To make the initial parameters may take long. One that has loaded the job is heard.
            made = self._began[self._holder] > NONE
            if made or not self._outbox.is_open(self._holder):
                return {self._holder: waited_s} if waited_s >= HELLO_S else {}
        return self._late.unheard(now_s) if self._late is not None else {}

    def _tell(self, member: str, header: pb.ExchangeResponseHeader) -> list[Effect]:
        return [Serve(self.job_id)] if self._serving.tell(member, header) else []

    def _expect(self, go: GoRecord) -> None:
        """Miss what does not come under a record for the version that is held here."""
        if self._late is None or self.owner is None:
            return
        if go.action == GoRecord.ACTION_INITIALISE and self.root is not None:
            self._late.initialises((go.version, go.round), self.elapsed())
        if go.version != self.versions.whole_version:
            return
        self.owner.expect(go)
        self._late.turn(self.owner.open_round, self.elapsed())

    def _watch(
        self, late: LateShards, owner: RangeOwner, frame: pb.ContributionFrame, member: str
    ) -> None:
        owner.open(frame)
        now_s = self.elapsed()
        late.turn(owner.open_round, now_s)
        node = Node(frame.node.first, frame.node.span)
        late.frame(member, (frame.step, frame.round), node, copy=frame.copy, now_s=now_s)

    def _hear(self, answer: pb.VersionHeld, member: str) -> list[Effect]:
        if self._late is None or answer.term != self.term:
            return []
        self._late.answered(
            member, answer.version, self.elapsed(), held=answer.held, starting=answer.starting
        )
        if not answer.held:
            return []
        self._serving.wants_no_state(member)
        if self._started or self._holder != self.worker_id:
            return []
        # It was ordered to initialise as well, and has come to an end first.
        self._began[member], self._holder = answer.version, member
        return self._ask(member)

    def _answer(self, asked: pb.VersionAsked) -> list[Effect]:
        """The owner of a range asks for a version: say at once whether it is here."""
        if not 0 <= asked.range < len(self._members):
            return []
        owner = self._members[asked.range]
        self._asked[owner] = asked.version
        return self._answer_late() or self._say_held(owner, asked.version, held=False)

    def _answer_late(self) -> list[Effect]:
        """Say to whoever asked that a version is here by now."""
        version = self.versions.whole_version
        here = [owner for owner, asked in self._asked.items() if self._started and asked <= version]
        effects: list[Effect] = []
        for owner in here:
            effects += self._say_held(owner, self._asked.pop(owner), held=True)
        return effects

    def _say_held(self, owner: str, version: int, *, held: bool) -> list[Effect]:
        waits = self.joined and not self._started
        starting = waits and self.elapsed() - self._came_s < HELLO_S
        answer = pb.VersionHeld(term=self.term, held=held, version=version, starting=starting)
        self._due[owner].append(encode_request(pb.ExchangeRequestHeader(version_held=answer)))
        return [Wake(self.job_id, owner)]

    # What owners of ranges send: reduced gradients, state

    def owner_said(self, header: pb.ExchangeResponseHeader, payload: memoryview) -> list[Effect]:
        """Take one message of the owner of a range."""
        kind = header.WhichOneof("message")
        if kind == "reduced" and header.reduced.term == self.term:
            return self._take_reduced(header.reduced, payload)
        if kind == "state" and header.state.term == self.term:
            return self._take_state(header.state, payload)
        if kind == "version_asked" and header.version_asked.term == self.term:
            return self._answer(header.version_asked)
        return []

    def _take_reduced(self, frame: pb.ReducedFrame, payload: memoryview) -> list[Effect]:
        replica = self.replica
        if replica is None or self._failed or not 0 <= frame.range < len(self._ranges):
            return []
        piece = self._ranges[frame.range]
        values = elements_of(piece, frame, payload, replica.dtype)
        whole = replica.reduced(
            frame.version,
            piece.first_element + frame.first_element,
            frame.element_count,
            values,
            frame.example_count,
            frame.loss_sum,
        )
        return [Work(self.job_id)] if whole else []

    def _take_state(self, frame: pb.StateFrame, payload: memoryview) -> list[Effect]:
        replica = self.replica
        if replica is None or self._started:
            return []
        self._came_s = self.elapsed()
        here = replica.taken_over(frame, payload)
        if replica.works:
            return [Work(self.job_id)]
        return self._start() if here else []

    def work(self) -> list[Effect]:
        """Do a slice of an update; call it as long as `works`."""
        replica = self.replica
        if not self.works or replica is None:
            return []
        try:
            made = replica.work()
        except NonFinite as error:
            text = f"at version {replica.version}: {error}"
            return self._fail("PARAMETERS_NON_FINITE", text)
        if not made:
            return []
        if not self._started:
            return self._start()
        effects = self._answer_late()
        if self.root is not None:
            effects.append(Committed(self.job_id, replica.version, replica.count))
            go = self.root.committed(replica, self.elapsed())
            effects += self._issue(go)
        return effects + self._turn() + self._checkpoint()

    @property
    def works(self) -> bool:
        """There is an update to go on with."""
        return not self._failed and self.replica is not None and self.replica.works

    # What this member sends

    def stream_opened(self, aggregator_id: str) -> list[Effect]:
        """Another member accepted the stream; what it may not have heard is said again."""
        effects = super().stream_opened(aggregator_id)
        due = self._due[aggregator_id]
        due.clear()
        if aggregator_id == self._holder and not self._started:
            effects += self._ask(aggregator_id)
        if self._hash and aggregator_id == self._members[0]:
            due.append(self._hash)
        return effects

    def next_due(self, aggregator_id: str) -> bytes | None:
        """What is to be said on a stream before anything else, encoded."""
        due = self._due.get(aggregator_id)
        return due.popleft() if due and self._outbox.is_open(aggregator_id) else None

    def part_done(
        self, task: Task, part: Part, count: int, loss: float, mask: int, sums: tuple[float, ...]
    ) -> list[Effect]:
        """A leaf process finished a part; that of an INITIALISE round is version 0."""
        if task.round is not self.round or task.round.go.action != GoRecord.ACTION_INITIALISE:
            return super().part_done(task, part, count, loss, mask, sums)
        assert self.replica is not None
        super().part_done(task, part, count, loss, mask, sums)
        try:
            self.replica.initialise(part.buffer)
        except NonFinite as error:
            return self._fail("PARAMETERS_NON_FINITE", str(error))
        return self._end_round() + self._start()

    def _owed(self, round: Round) -> list[Node]:
        if round.go.action == GoRecord.ACTION_INITIALISE:
            return [Node(0, 1)] if self.root is not None else []
        return super()._owed(round)

    def _target(self) -> GoRecord | None:
        if self.owner is None or self._failed:
            return None
        return super()._target()

    def next_message(self, aggregator_id: str) -> FrameOut | GoOut | StartsOut | RecallOut | None:
        """What to send on a stream now; the initial parameters stay where they are made."""
        if self.round is not None and self.round.go.action == GoRecord.ACTION_INITIALISE:
            return None
        return super().next_message(aggregator_id)

    # Checkpoints

    def _checkpoint(self) -> list[Effect]:
        """Say what is held at a version whose record orders a checkpoint."""
        version = self.versions.whole_version
        records = self._go.get(version)
        if not self._started or not records or not records[-1].checkpoint:
            return []
        if self._snapshot_of == version:
            return []
        self._snapshot_of = version
        return [Snapshot(self.job_id, self.term, version)]

    def hashed(self, version: int, sha256: str) -> list[Effect]:
        """What this member holds at a version."""
        if self.root is not None:
            return self._hashed(self.worker_id, version, sha256)
        hashed = pb.StateHash(term=self.term, version=version, sha256=sha256)
        self._hash = encode_request(pb.ExchangeRequestHeader(state_hash=hashed))
        root = self._members[0]
        self._due[root].append(self._hash)
        return [Wake(self.job_id, root)]

    def _hashed(self, member: str, version: int, sha256: str) -> list[Effect]:
        go = self.root.hashed(member, version, sha256) if self.root is not None else None
        if go is None or self.root is None:
            return []
        if self.root.disagreement:
            text = f"members hold different parameters at step {version}: {self.root.disagreement}"
            return self._fail("REPLICAS_DISAGREE", text)
        return [Store(self.job_id, go)]

    def checkpoint_done(self, version: int) -> None:
        """The checkpoint at a version is complete, or given up."""
        if self.root is not None:
            self.root.checkpoint_done(version)


def _itemsize(plan: training_pb2.JobPlan) -> int:
    return np.dtype(plan.layout.dtype or "float32").itemsize

"""What must hold, looked at after every transition, from outside of what it watches.

A *transition* is one event handled by a core, counted once however many methods it goes through:

- control: each call of `handle`;
- an aggregator or a worker: a message from control or of a stream, a stream that opens or ends, a
  look that finds shards late, the end of a checkpoint, of a part, of a task or of a slot, a message
  given out by a cursor or an outbox;
- storage: a transaction, and a blob that is opened to be written or read.

A question that finds nothing to do is none, nor is what runtimes do between cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.core.asynchronous import AsynchronousRanges, StartsCursor
from coordinator.aggregation.core.cursor import Cursor
from coordinator.aggregation.core.effects import Committed, Points
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.core.plan import GRADIENT_VECTOR
from coordinator.aggregation.core.starts import Start
from coordinator.aggregation.core.versions import VersionStore
from coordinator.aggregation.process import Aggregator
from coordinator.control import leader
from coordinator.control.core import invariants
from coordinator.control.store import LEASE
from phalanx.copies import Copies
from phalanx.rpc.member_session import Refused
from phalanx.testing.simulation.clocks import Environment
from phalanx.testing.simulation.loop import SimulationFailed, World
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from storage.backends.sql.leases import SqlLeases
from tests.simulation import jobs, references
from tests.simulation.between import Between
from tests.simulation.commits import CommitHistory
from tests.simulation.histories import History
from tests.simulation.moments import Moments
from worker.core.job import JobCore
from worker.core.outbox import FrameOut, Outbox
from worker.core.session import WorkerCore

Array = NDArray[Any]

LEASE_TTL_S = 2.0


class _Watched:
    """The ranges of one job in one term at one aggregator; what of them was found right."""

    def __init__(self, ranges: JobRanges) -> None:
        self.ranges = ranges  # keeps its id from being used again
        self.shape = jobs.shape_of(ranges.plan)
        expected = {} if self.shape.tolerant else references.versions(self.shape)
        self.expected: Mapping[int, Array] | references.Reference = expected
        self.history: History | None = None
        """What was computed, where no plain loop knows it."""
        self.commits: CommitHistory | None = None
        """The same, where each contribution commits by itself."""
        self.stores = [(index, ranges.versions_of(index)) for index in ranges.range_indexes]
        self.checked = dict.fromkeys(ranges.range_indexes, -1)


class Oracle:
    """Everything that one run did and promised, and the checks of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.moments = Moments(world)
        self.between = Between(world, self.moments)
        self.commits: dict[str, int] = {}
        """Committed steps by job, those that were computed again included."""
        self.lost = 0
        self.doubled = 0
        self.stale_accepted = 0
        self.stale_refused = 0
        self.fenced_off = 0
        """Writes of old generations among those that storage refused."""
        self.outlived: set[int] = set()
        """Generations that acted on although storage had given the lead to another."""
        self.starts = 0
        """Leaves that were started one by one."""
        self.repeated = 0
        """Contributions to steps that their shards had completed."""
        self.updated = 0
        """Steps that were no elementwise optimizer's."""
        self.histories: dict[str, History] = {}
        """Of jobs whose steps need not wait for all shards."""
        self.commit_histories: dict[str, CommitHistory] = {}
        """Of jobs whose contributions commit one by one."""
        self.runs: Callable[[str], bool] = lambda _: False
        """Whether a job runs, by what is recorded."""
        self.fingerprints: dict[str, str] = {}
        """Fingerprint that each job started with."""
        self._lease: pb.Lease | None = None
        self._lease_s = 0.0
        self._lease_request = ""
        self._token = 0
        self._generations: dict[int, tuple[Any, int]] = {}
        self.free: set[str] = set()
        """Jobs that went on with other bits than they began with, as they may."""
        self.terms: dict[str, int] = {}
        self.final: dict[str, str] = {}
        """Seals of the final checkpoints, by job."""
        self._leaders: dict[int, str] = {}
        self._watched: dict[int, _Watched] = {}
        self._worker_order: dict[int, tuple[int, int]] = {}

    def demand(self, holds: bool, message: str) -> None:
        """Fail the run unless something holds."""
        if not holds:
            self.fail(message)

    def fail(self, message: str) -> NoReturn:
        """Something must not happen and did."""
        error = SimulationFailed(message)
        self.world.fail(error)
        raise error

    # Control

    def control_handled(self, core: Any) -> None:
        name = self.world.loop.current.name
        holder = self._leaders.setdefault(core.generation, name)
        self.demand(holder == name, f"{name} and {holder} both lead generation {core.generation}")
        if core.generation < self._token:
            self.outlived.add(core.generation)
        try:
            invariants.check(core)
        except invariants.InvariantBroken as broken:
            self.fail(str(broken))

    # Aggregators

    def ranges_acted(self, ranges: JobRanges, effects: list[Any]) -> None:
        watched = self._watched.get(id(ranges))
        if watched is None:
            watched = self._watched[id(ranges)] = _Watched(ranges)
        checked = watched.checked
        for index, store in watched.stores:
            held = store.held
            if len(held) > 2 or (len(held) == 2 and held[1] != held[0] + 1):
                self.fail(f"range {index} holds the versions {held}")
            version, before = store.newest_whole, checked[index]
            if version == before:
                continue
            if version < before:
                self.fail(f"range {index} went from version {before} to {version}")
            checked[index] = version
            if watched.shape.tolerant:
                self._follow(watched, store, version)
            self._check_bits(watched, index, store, version)
            self.between.got_to(ranges, watched.shape, version)
        for effect in effects:
            if isinstance(effect, Committed):
                self._committed(watched, effect)
            elif isinstance(effect, Points):
                self._check_points(watched, effect.points)

    def _committed(self, watched: _Watched, effect: Committed) -> None:
        job_id, history = watched.ranges.plan.job_id, watched.history
        self.commits[job_id] = self.commits.get(job_id, 0) + 1
        self.updated += watched.shape.updating
        expected = effect.expected_count
        if watched.commits is not None:
            expected = watched.commits.step_sums(watched.ranges.term)[1]
        elif effect.version - 1 == jobs.BAD_STEP:
            expected -= jobs.examples_skipped(watched.shape)
        if history is not None:
            expected -= history.examples(effect.version, history.left_out(watched.ranges.term))
        self.lost += max(0, expected - effect.example_count)
        self.doubled += max(0, effect.example_count - expected)
        self.demand(
            effect.example_count == expected,
            f"{job_id}: {effect.example_count} of {expected} examples in step {effect.version}",
        )

    def _refused(self, shape: jobs.Shape, step: int) -> frozenset[int]:
        """Shards whose leaves of a step are not finite, in a job that goes on without them."""
        shards = range(shape.shards)
        return frozenset(shard for shard in shards if jobs.is_skipped(shape, shard, step))

    def _follow(self, watched: _Watched, store: VersionStore, version: int) -> None:
        """A version whose step may have left shards out must be one that it may be."""
        ranges, shape = watched.ranges, watched.shape
        job_id = ranges.plan.job_id
        pieces = [store.values(version, index) for index in range(len(store.grid))]
        parameters = np.concatenate(pieces)
        kept = ranges._ranges[0].parameters._state
        state = {name: np.concatenate([frame[name] for frame in kept]) for name in kept[0]}
        if isinstance(ranges, AsynchronousRanges):
            commits = watched.commits = self._commits_of(ranges)
            completed = ranges.clocks.completed
            wrong = commits.follow(ranges.term, version, parameters, state, completed)
        else:
            history = watched.history = self.histories.setdefault(job_id, History(shape))
            wrong = history.follow(ranges.term, version, parameters, state)
        if wrong:
            self.fail(f"{job_id}: term {ranges.term}, version {version} {wrong}")
        watched.expected = {version: parameters}

    def _commits_of(self, ranges: AsynchronousRanges) -> CommitHistory:
        job_id = ranges.plan.job_id
        if job_id not in self.commit_histories:
            self.commit_histories[job_id] = CommitHistory(jobs.shape_of(ranges.plan), ranges.plan)
        return self.commit_histories[job_id]

    def started(self, ranges: AsynchronousRanges, start: Start | None) -> None:
        """A shard starts the step that it is at, on the newest version, where it may."""
        if start is None:
            return
        self.starts += 1
        read = start.version.number
        wrong = self._commits_of(ranges).started(ranges.term, start.shard, start.step, read)
        if wrong:
            what = f"{ranges.plan.job_id}: term {ranges.term}, step {start.step} of shard"
            self.fail(f"{what} {start.shard} {wrong}")

    def _check_points(self, watched: _Watched, points: tuple[tuple[int, str, float], ...]) -> None:
        """What is told of a step is what its leaves gave, each of them once."""
        plan, term = watched.ranges.plan, watched.ranges.term
        for step, name, value in points:
            if watched.commits is not None and name.startswith("train/"):
                sums, _ = watched.commits.step_sums(term)
                expected = {"train/loss": sums.loss / sums.count, **sums.measured}[name]
            elif watched.shape.private and name.startswith("train/"):
                expected = {"train/epsilon": jobs.spent(watched.shape, step)}[name]
            elif name == "train/loss":
                history = watched.history
                left_out = history.left_out(term) if history is not None else frozenset()
                left_out |= self._refused(watched.shape, step - 1)
                expected = jobs.train_loss(plan.shards, plan.local_steps, step, left_out)
                if watched.shape.updating:
                    expected = jobs.updated_loss(watched.shape, step * watched.shape.rounds)
            else:
                expected = jobs.evaluated(watched.shape, plan.evaluation_shards, step)[name]
                due = step in jobs.evaluations(watched.shape, step)
                self.demand(due, f"{plan.job_id} is evaluated at step {step}, as it must not be")
            self.demand(
                value == expected,
                f"{plan.job_id}: {name} at step {step} is {value}, without faults {expected}",
            )

    def _check_bits(self, watched: _Watched, index: int, store: VersionStore, version: int) -> None:
        """A committed version must be what a machine without faults computes."""
        ranges = watched.ranges
        if ranges.plan.job_id in self.free:
            return
        held = store.get(version)
        assert held is not None
        start = ranges._ranges[index].parameters.piece.first_element
        expected = watched.expected[version]
        for (first, count), frame in zip(store.grid, held.frames, strict=True):
            assert frame is not None
            # The elements are the end of the message.
            piece = expected[start + first : start + first + count]
            if not frame.endswith(jobs.on_the_wire(watched.shape, piece)):
                self.fail(
                    f"{ranges.plan.job_id}: term {ranges.term}, range {index}, version {version} "
                    "has other bits than without faults"
                )
        shape = watched.shape
        first_fingerprint = self.fingerprints.setdefault(ranges.plan.job_id, shape.fingerprint)
        self.demand(
            first_fingerprint == shape.fingerprint, "the job goes on with another fingerprint"
        )

    # Workers

    def worker_acted(self, core: JobCore) -> None:
        order = (core.term, core.versions.whole_version)
        before = self._worker_order.get(id(core), (0, -1))
        if order < before and order[1] != -1:
            self.fail(f"a worker went back from (term, version) {before} to {order}")
        self._worker_order[id(core)] = order

    # Storage

    def granted(self, request: pb.AcquireLeaseRequest, response: pb.AcquireLeaseResponse) -> None:
        if request.name != LEASE or not response.acquired:
            return
        held, token, holder = self._lease, response.lease.token, response.lease.holder
        if request.request_id == self._lease_request and response.lease == held:
            return  # told again: the first answer got lost
        self._lease_request = request.request_id
        self.demand(token > self._token, f"lease token {token} after {self._token}")
        # What is stored may stay unanswered, releases as well; storage is never behind its answers.
        if held is not None and held.holder not in ("", holder) and response.lost_holder:
            seen = (request.seen_token, request.seen_counter)
            self.demand(
                seen >= (held.token, held.counter),
                f"{holder} took the lease of {held.holder} over, which had been renewed meanwhile",
            )
            kept_s = self.world.now_s - self._lease_s
            self.demand(
                kept_s >= LEASE_TTL_S,
                f"{holder} took the lease of {held.holder} over {kept_s:.2f} s after its renewal",
            )
        self._token = token
        self._kept(response.lease)
        self.moments.met("lease_granted")

    def leader(self) -> str:
        """Who holds the lease, as far as storage has said."""
        return self._lease.holder if self._lease is not None else ""

    def _kept(self, lease: pb.Lease) -> None:
        self._lease, self._lease_s = lease, self.world.now_s

    def renewed(self, request: pb.RenewLeaseRequest, row: Any) -> None:
        if request.name != LEASE:
            return
        self.demand(
            request.token == self._token,
            f"{request.holder} renewed generation {request.token}; {self._token} leads",
        )
        self._kept(row.message(request.name))

    def released(self, request: pb.ReleaseLeaseRequest) -> None:
        held = self._lease if request.name == LEASE else None
        if held is not None and (held.holder, held.token) == (request.holder, request.token):
            held.holder = ""

    def appended(self, request: pb.AppendJournalRequest, following: int) -> None:
        self.fenced(request)
        at = following - len(request.records)
        self.demand(
            request.expected_sequence in (-1, at),
            f"records of {request.stream} for {request.expected_sequence} were put at {at}",
        )

    # Members

    def member_heard(self, member: Any, generation: int, obeyed: bool) -> None:
        """A member that has seen a generation obeys no lower one."""
        seen = self._generations.get(id(member), (member, 0))[1]
        self.demand(
            not obeyed or generation >= seen,
            f"{self.world.loop.current.name} obeys generation {generation} after {seen}",
        )
        self._generations[id(member)] = (member, max(seen, generation))

    def fenced(self, request: Any) -> None:
        """A write with a fence was accepted."""
        if request.HasField("fence") and request.fence.token < self._token:
            self.stale_accepted += 1
            self.fail(
                f"storage took {type(request).__name__} of generation {request.fence.token}; "
                f"{self._token} leads"
            )

    def term_raised(self, request: pb.RaiseTermRequest, term: int) -> None:
        before = self.terms.get(request.job_id, 0)
        # No late call raises it. It may have been raised without an answer, by a disk that failed.
        in_turn = before <= request.expected_term < term
        self.demand(in_turn, f"{request.job_id}: term {term} after {before}")
        self.demand(request.job_id not in self.final, f"{request.job_id}: a term after its end")
        self.terms[request.job_id] = term
        self.moments.met("term_raised")
        if self.runs(request.job_id):
            self.moments.met("owner_replaced", self.leader())

    def committed(
        self, request: pb.CommitCheckpointRequest, response: pb.CommitCheckpointResponse
    ) -> None:
        current = self.terms.get(request.job_id, 0)
        if request.term != current:
            self.stale_accepted += 1
            self.fail(
                f"{request.job_id}: a part of term {request.term} was taken in term {current}"
            )
        if not response.complete:
            self.moments.met("part_registered")
            return
        parts = sorted(part.range for part in response.manifest.parts)
        self.demand(
            parts == list(range(request.range_count)),
            f"{request.job_id}: the checkpoint at step {request.step} has the ranges {parts}",
        )
        if response.manifest.final:
            seal = response.manifest.manifest_sha256
            first = self.final.setdefault(request.job_id, seal)
            self.demand(first == seal, f"{request.job_id} has two final checkpoints")
            self.moments.met("final_checkpoint")

    def install(self, environment: Environment) -> None:
        """Look at everything that the cores do."""
        world = self.world

        def count() -> None:
            world.transitions += 1

        real_handle = leader.handle

        def handle(core: Any, event: Any, now: Any) -> Any:
            count()
            try:
                effects = real_handle(core, event, now)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a defect
                self.fail(f"control's core broke at {type(event).__name__}: {error!r}")
            self.control_handled(core)
            return effects

        environment.replace(leader, "handle", handle)
        self._install_aggregator(environment)
        self._install_worker(environment)
        self._install_storage(environment)

    def _install_aggregator(self, environment: Environment) -> None:
        environment.replace(
            Aggregator, "_on_message", self._aggregator_message(Aggregator._on_message)
        )
        self._after(environment, JobRanges, ("begin", "begin_restored"), self.ranges_acted)
        # These come with a message from control, or are what a frame leads to.
        parts = ("pause", "fail", "work")
        self._after(environment, JobRanges, parts, self.ranges_acted, counts=False)
        for name in ("contribute", "go_record"):
            environment.replace(JobRanges, name, self._in_term(getattr(JobRanges, name)))
        self._after(environment, JobRanges, ("checkpoint_done",), _nothing)
        self._install_asynchronous(environment)
        self._after(environment, Copies, ("stream_opened", "stream_closed"), _nothing)
        look, world = Copies.look, self.world

        def looked(copies: Copies, now_s: float, *, control_away: bool) -> Any:
            orders, started = look(copies, now_s, control_away=control_away)
            if orders or started:
                world.transitions += 1
            return orders, started

        environment.replace(Copies, "look", looked)
        environment.replace(Cursor, "take", self._given_out(Cursor.take))

    def _install_asynchronous(self, environment: Environment) -> None:
        ranges = AsynchronousRanges
        self._after(environment, ranges, ("work", "pause"), self.ranges_acted, counts=False)
        events = ("stream_opened", "stream_closed", "starts_wanted")
        self._after(environment, ranges, events, _nothing)
        self._after(environment, ranges, ("give_start",), self.started, counts=False)
        environment.replace(ranges, "contribute", self._contributed(ranges.contribute))
        environment.replace(StartsCursor, "take", self._given_out(StartsCursor.take))

    def _contributed(self, real: Any) -> Any:
        """Frames of gradients do not go on to what other ranges do with them."""

        def contributed(ranges: AsynchronousRanges, frame: Any, *more: Any) -> Any:
            if frame.vector != GRADIENT_VECTOR:
                return real(ranges, frame, *more)
            self.world.transitions += 1
            before = ranges.duplicates
            self._commits_of(ranges).frame_came(ranges.term, more[2], frame)
            effects = real(ranges, frame, *more)
            self._demand_term(ranges, frame)
            self.repeated += ranges.duplicates - before
            return effects

        return contributed

    def _given_out(self, real: Any) -> Any:
        def taken(cursor: Any, *more: Any) -> bytes | None:
            message: bytes | None = real(cursor, *more)
            self.world.transitions += message is not None
            return message

        return taken

    def _install_worker(self, environment: Environment) -> None:
        def acted(core: JobCore, _: Any) -> None:
            self.worker_acted(core)

        environment.replace(WorkerCore, "message", self._worker_message(WorkerCore.message))
        events = ("slot_idle", "task_ended", "prepare_done", "drain")
        self._after(environment, WorkerCore, events, _nothing)
        events = ("go_record", "frame_place", "copy_nodes", "stream_opened", "stream_closed")
        self._after(environment, JobCore, ("start_leaf",), acted)
        self._after(environment, JobCore, (*events, "part_done", "part_failed"), acted)
        # Parts of events that are counted already.
        parts = ("assign", "prepare_done", "frame_stored", "task_ended")
        self._after(environment, JobCore, parts, acted, counts=False)
        take, world = Outbox.next, self.world

        def taken(outbox: Outbox, aggregator_id: str) -> Any:
            message = take(outbox, aggregator_id)
            if message is not None:
                world.transitions += 1
                if type(message) is FrameOut:
                    self.moments.met("payload_sent", world.loop.current.name, aggregator_id)
            return message

        environment.replace(Outbox, "next", taken)

    def _install_storage(self, environment: Environment) -> None:
        fenced = self.fenced
        for owner, name, check in (
            (SqlJournals, "append", self.appended),
            (SqlJournals, "truncate", lambda request, _: fenced(request)),
            (SqlLeases, "acquire", self.granted),
            (SqlLeases, "renew", self.renewed),
            (SqlLeases, "release", lambda request, _: self.released(request)),
            (SqlJobs, "commit", self.committed),
        ):
            environment.replace(owner, name, self._after_request(owner, name, check))

        def raised(request: pb.RaiseTermRequest, term: int) -> None:
            fenced(request)
            self.term_raised(request, term)

        environment.replace(
            SqlJobs, "raise_term", self._after_request(SqlJobs, "raise_term", raised)
        )

    def _in_term(self, real: Any) -> Any:
        """A frame or a go record of another term is never taken."""

        def taken(ranges: JobRanges, message: Any, *more: Any) -> Any:
            self.world.transitions += 1
            effects = real(ranges, message, *more)
            self._demand_term(ranges, message)
            self.ranges_acted(ranges, effects)
            return effects

        return taken

    def _demand_term(self, ranges: JobRanges, message: Any) -> None:
        if message.term != ranges.term:
            self.stale_accepted += 1
            self.fail(f"term {ranges.term} took {type(message).__name__} of {message.term}")

    def _worker_message(self, real: Any) -> Any:
        def message(core: WorkerCore, said: Any) -> Any:
            self.world.transitions += 1
            effects = real(core, said)
            refused = any(type(effect).__name__ == "RefuseSession" for effect in effects)
            self.member_heard(core, said.generation, not refused)
            return effects

        return message

    def _aggregator_message(self, real: Any) -> Any:
        def message(aggregator: Aggregator, said: Any) -> None:
            self.world.transitions += 1
            try:
                real(aggregator, said)
            except Refused:
                self.member_heard(aggregator, said.generation, False)
                raise
            self.member_heard(aggregator, said.generation, True)

        return message

    def _after(
        self,
        environment: Environment,
        owner: Any,
        names: Iterable[str],
        check: Callable[[Any, Any], None],
        *,
        counts: bool = True,
    ) -> None:
        """Have `check` look at the owner and the result after each call of these methods."""
        for name in names:
            environment.replace(owner, name, self._checked(getattr(owner, name), check, counts))

    def _checked(self, real: Any, check: Callable[[Any, Any], None], counts: bool) -> Any:
        world = self.world

        def acted(target: Any, *args: Any, **more: Any) -> Any:
            world.transitions += counts
            result = real(target, *args, **more)
            check(target, result)
            return result

        return acted

    def _after_request(self, owner: Any, name: str, check: Callable[[Any, Any], None]) -> Any:
        real = getattr(owner, name)

        def acted(target: Any, request: Any, *caller: Any) -> Any:
            try:
                result = real(target, request, *caller)
            except Exception as error:
                reason = getattr(error, "reason", "")
                self.stale_refused += reason in ("STALE_GENERATION", "STALE_TERM")
                self.fenced_off += reason == "STALE_GENERATION"
                raise
            check(request, result)
            return result

        return acted


def _nothing(_: Any, __: Any) -> None:
    """No invariant is about this event alone."""

"""What rests on what: nothing is answered, sent or begun before the fact behind it is durable.

The journal is looked at where storage takes it, and replayed beside the cluster. So a fact that
could be lost is noticed at once, not only in the rare run in which a crash does lose it.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Container
from typing import Any

from coordinator.aggregation.checkpoints import parse_part
from coordinator.aggregation.core.machine import JobRanges
from coordinator.control import event_log, journal
from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import CANCELLED, QUEUED, RUNNING, SUCCEEDED
from coordinator.control.event_log import EventLog
from coordinator.control.journal import STREAM, JournalWriter
from coordinator.control.leader import Leader
from phalanx.errors import Unavailable
from phalanx.tasks import runs_tasks
from phalanx.testing.simulation.clocks import Environment
from phalanx.training.best import BEST_VECTOR
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.control_journal_pb2 import ControlRecord, RememberedRequest, TermStarted
from phalanx.v1.job_pb2 import Event
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from storage.backends.sql.owners import load_owners
from tests.simulation import best, jobs, references
from tests.simulation.oracle import Oracle
from tests.simulation.task_sets import arguments_of

RECORDS = (
    "SELECT sequence, payload FROM records JOIN streams ON records.stream = streams.id "
    "WHERE streams.name = ? AND sequence >= ? ORDER BY sequence"
)
_FINAL = "SELECT 1 FROM checkpoints WHERE job_id = ? AND final = 1 AND whole = 1"


class Ledger:
    """The facts of control as storage holds them."""

    def __init__(self, oracle: Oracle) -> None:
        self.facts = Facts()
        """What every record that was ever stored amounts to."""
        self.liars: Container[str] = ()
        """Workers that lie."""
        self.false_leaves: Container[str] = ()
        """What they say of the leaf that a job is described with."""
        self.running_jobs_max = 64
        self.quarantines = 0
        """Starts of workers that were quarantined."""
        self.of_one_version = 0
        """Terms whose workers are known to have one version of a library."""
        self._oracle = oracle
        self._world = oracle.world
        self._demand = oracle.demand
        self._stored: set[bytes] = set()
        self._next = 0
        self.sent_away = 0
        """Calls that were sent away since facts wait for storage, which can be reached."""
        self._owed: dict[int, tuple[Any, deque[tuple[int, bytes]]]] = {}
        self._writes_since_s: dict[int, float] = {}
        """Since when each writer's present write is under way."""
        self._terms: dict[tuple[int, str], int] = {}

    # Control

    def _decided(self, writer: JournalWriter) -> None:
        """A record was queued: it is owed to storage."""
        index, _, payload = writer._queue[-1]
        self._owed_by(writer).append((index, payload))

    def _owed_by(self, writer: JournalWriter) -> deque[tuple[int, bytes]]:
        return self._owed.setdefault(id(writer), (writer, deque()))[1]

    def _taken_on(self, writer: JournalWriter, request: RememberedRequest) -> None:
        """A call is decided on, by a record or by something that a record will follow."""
        owed = self._owed_by(writer)
        self._forget_stored(owed)
        now_s = self._world.now_s
        waits_s = now_s - self._writes_since_s.get(id(writer), now_s)
        self._demand(
            len(owed) < journal.QUEUE_MAX and waits_s < journal.STUCK_S,
            f"{self._world.loop.current.name}: {request.method} is taken on while "
            f"{len(owed)} facts wait for storage, the first of them for {waits_s:.1f} s",
        )

    def _forget_stored(self, owed: deque[tuple[int, bytes]]) -> None:
        while owed and owed[0][1] in self._stored:
            owed.popleft()

    def _sent_away(self, leader: Leader) -> None:
        self.sent_away += leader._store.available

    def _demand_stored(self, writer: JournalWriter, after: int, what: str) -> None:
        if after == 0 or id(writer) not in self._owed:
            return
        owed = self._owed[id(writer)][1]
        self._forget_stored(owed)
        self._demand(
            not owed or owed[0][0] > after,
            f"{self._world.loop.current.name}: {what} before its record is stored",
        )

    # Storage

    def _catch_up(self, journals: SqlJournals) -> None:
        """Take in what the journal holds by now, whether storage lived to say so or not."""
        database: Any = journals._database
        connection = database._machine.connection
        for sequence, payload in connection.execute(RECORDS, (STREAM, self._next)).fetchall():
            self._next = sequence + 1
            self._stored.add(payload)
            record = ControlRecord.FromString(payload)
            fact = record.WhichOneof("fact")
            if fact == "job_changed":
                self._ends(record, connection)
            elif fact == "worker_quarantined":
                self._is_caught(record)
            elif fact == "fingerprint_changed":
                self._goes_free(record.fingerprint_changed.job_id)
            elif fact == "term_started":
                self._begins_in_turn(record.term_started.job_id)
                self._is_no_lie(record.term_started)
                self.of_one_version += bool(record.term_started.plan.equipment.libraries)
            self.facts.apply(record)
            self._oracle.moments.met(fact or "")

    def _ends(self, record: ControlRecord, connection: Any) -> None:
        """A job ends only where nothing of it can go on, and succeeds only where all is done."""
        changed, oracle = record.job_changed, self._oracle
        job_id, facts = changed.job_id, self.facts.jobs.get(changed.job_id)
        if facts is None:
            return
        if changed.state == CANCELLED and facts.term:
            self._demand(
                oracle.terms.get(job_id, 0) > facts.term,
                f"{job_id} is cancelled in term {facts.term}, which storage still takes",
            )
        if changed.state == SUCCEEDED:
            steps = len(arguments_of(facts.spec)) if runs_tasks(facts.spec) else 0
            steps = steps or jobs.shape_of_spec(facts.spec, facts.fingerprint).ends_at
            final = connection.execute(_FINAL, (job_id,)).fetchone()
            self._demand(final is not None, f"{job_id} succeeds without a final checkpoint")
            self._demand(
                changed.result.steps == steps,
                f"{job_id} succeeds after {changed.result.steps} of {steps} steps",
            )

    def _goes_free(self, job_id: str) -> None:
        """A job that goes on with other bits has allowed that."""
        facts = self.facts.jobs[job_id]
        allowed = facts.spec.reproducibility.bitwise.HasField("fall_back_after")
        self._demand(allowed, f"{job_id} goes on with other bits, which it never allowed")
        self._oracle.free.add(job_id)

    def _begins_in_turn(self, job_id: str) -> None:
        """A job leaves the queue where one more may run, also one that waits to be resumed."""
        queued = {key for key, facts in self.facts.jobs.items() if facts.state == QUEUED}
        if job_id in queued:
            running = sum(facts.state == RUNNING for facts in self.facts.jobs.values())
            self._demand(
                running < self.running_jobs_max, f"{job_id} begins while {running} jobs run"
            )

    def _is_no_lie(self, started: TermStarted) -> None:
        """Nobody is measured by a lie."""
        told = started.leaf_sha256 in self.false_leaves
        self._demand(not told, f"{started.job_id} begins with the leaf of a liar")

    def _is_caught(self, record: ControlRecord) -> None:
        """Only who lies is taken for a liar."""
        caught = record.worker_quarantined
        honest = caught.worker_id not in self.liars
        self._demand(caught.done or not honest, f"{caught.worker_id} is quarantined: it is honest")
        self.quarantines += not caught.done

    def _truncated(self, journals: SqlJournals, request: pb.TruncateJournalRequest) -> None:
        """What was cut off must be said by what is left."""
        if request.stream != STREAM:
            return
        left = Facts()
        database: Any = journals._database
        for _, payload in database._machine.connection.execute(RECORDS, (STREAM, 0)).fetchall():
            left.apply(ControlRecord.FromString(payload))
        self._demand(
            left.digest() == self.facts.digest(),
            f"facts are lost with the records before {request.before_sequence} of the journal",
        )
        self._oracle.moments.met("snapshot")

    def _forgot(self, journals: SqlJournals, request: pb.TruncateJournalRequest) -> None:
        """The newest events stay."""
        if request.stream == event_log.STREAM:
            database: Any = journals._database
            rows = database._machine.connection.execute(RECORDS, (event_log.STREAM, 0)).fetchall()
            enough = len(rows) >= event_log.KEPT_MAX
            self._demand(enough, f"{len(rows)} events are left of {event_log.KEPT_MAX}")

    def _observing(self, append: Callable[[EventLog, Event], None]) -> Any:
        """An event is dropped only where too many wait for storage."""

        def observe(log: EventLog, event: Event) -> None:
            there_is_room, dropped = len(log._held) < event_log.HELD_MAX, log.dropped
            append(log, event)
            lost = there_is_room and log.dropped > dropped
            self._demand(not lost, "an event is dropped although there is room for it")

        return observe

    def _demand_owner(self, store: SqlJobs, request: pb.CommitCheckpointRequest) -> None:
        """Whoever may register a part was told to storage before: with keys it is compared.

        A stranger raises terms of jobs that control does not have, and names nobody.
        """
        if request.job_id not in self.facts.jobs:
            return
        read: Any = store._database.read
        owners = read(lambda connection: load_owners(connection, request.job_id))
        told = (
            owners is not None
            and owners.term == request.term
            and request.part.range < len(owners.member_ids)
        )
        what = f"{request.job_id}: range {request.part.range} in term {request.term}"
        self._demand(told, f"{what} is registered, and storage does not know whose it is")

    def _checkpointed(
        self,
        store: SqlJobs,
        request: pb.CommitCheckpointRequest,
        response: pb.CommitCheckpointResponse,
    ) -> None:
        """A whole checkpoint holds what a machine without faults has at that step."""
        facts = self.facts.jobs.get(request.job_id)
        if not response.complete or facts is None or request.job_id in self._oracle.free:
            return
        if runs_tasks(facts.spec):
            return  # see `tasking`
        shape = jobs.shape_of_spec(facts.spec, facts.fingerprint)
        wrong = best.wrong_with_manifest(shape, response.manifest)
        what = f"{request.job_id}: the checkpoint at step {request.step}"
        self._demand(not wrong, f"{what} {wrong}")
        blobs: Any = store._blobs
        for part in response.manifest.parts:
            content = blobs._disk.read(part.digest)
            if hashlib.sha256(content or b"").hexdigest() != part.digest:
                continue  # the disk has spoilt it meanwhile
            parameters, state = parse_part(content)
            what = f"{request.job_id}: range {part.range} of the checkpoint at step {request.step}"
            if shape.one_by_one:
                self._demand_followed(what, request, response.manifest, parameters, state)
                continue
            if shape.backup:
                history = self._oracle.histories.get(request.job_id)
                wrong = "is of a job of which nothing is known"
                if history is not None:
                    wrong = history.checkpointed(request.step, parameters, state)
                self._demand(not wrong, f"{what} {wrong}")
                continue
            first, stop = part.first_element, part.first_element + part.element_count
            step, kept = request.step, references.kept_of(shape, request.step)
            best_piece = references.after(shape, best.model_step(shape, step))[first:stop]
            wrong = best.wrong_with(shape, step, state, best_piece)
            self._demand(not wrong, f"{what} {wrong}")
            if not request.final:
                self._demand(kept.keys() <= state.keys(), f"{what} lacks states of nodes")
            expected = {
                name: vector[first:stop]
                for name, vector in (references.state_of(shape, step) | kept).items()
            }
            expected["parameters"] = references.after(shape, step)[first:stop]
            for name, vector in {**state, "parameters": parameters}.items():
                self._demand(
                    name == BEST_VECTOR or vector.tobytes() == expected[name].tobytes(),
                    f"{what} has other {name} than without faults",
                )

    def _demand_followed(
        self, what: str, request: Any, manifest: Any, parameters: Any, vectors: Any
    ) -> None:
        """A checkpoint of a job whose contributions commit one by one says what was followed."""
        history = self._oracle.commit_histories.get(request.job_id)
        completed = json.loads(manifest.root_state)["completed_steps"]
        wrong = "is of a job of which nothing is known"
        if history is not None:
            wrong = history.checkpointed(request.step, parameters, vectors, completed)
        self._demand(not wrong, f"{what} {wrong}")

    def _runs(self, job_id: str) -> bool:
        facts = self.facts.jobs.get(job_id)
        return facts is not None and facts.state == RUNNING and not facts.resuming

    # Aggregators

    def _begins(self, ranges: JobRanges) -> None:
        key = (self._world.loop.current.number, ranges.plan.job_id)
        before = self._terms.get(key, 0)
        self._demand(
            ranges.term >= before,
            f"{self._world.loop.current.name} goes from term {before} back to {ranges.term}",
        )
        self._terms[key] = ranges.term

    def install(self, environment: Environment) -> None:
        """Look at everything that makes a fact, or rests on one."""
        self._oracle.runs = self._runs
        replace = environment.replace
        append, perform, durable = JournalWriter.append, Leader._perform, Leader._on_durable
        check, write = Leader.check_storage, JournalWriter._write_batch
        dispatch = Leader.dispatch

        def appending(writer: JournalWriter, index: int, record: ControlRecord) -> None:
            append(writer, index, record)
            self._decided(writer)

        def performing(leader: Leader, effect: Any) -> None:
            self._demand_stored(leader._journal, effect.after, f"{type(effect).__name__} is done")
            perform(leader, effect)

        def being_durable(leader: Leader, index: int, record: ControlRecord) -> None:
            self._demand_stored(leader._journal, index, f"record {index} counts as durable")
            durable(leader, index, record)

        def checking(leader: Leader) -> None:
            try:
                check(leader)
            except Unavailable:
                self._sent_away(leader)
                raise

        def dispatching(leader: Leader, event: Any) -> None:
            request = getattr(event, "request", None)
            if isinstance(request, RememberedRequest) and not leader.failed.done():
                self._taken_on(leader._journal, request)
            dispatch(leader, event)

        async def writing(writer: JournalWriter) -> None:
            self._writes_since_s[id(writer)] = self._world.now_s
            await write(writer)
            del self._writes_since_s[id(writer)]

        replace(Leader, "check_storage", checking)
        replace(Leader, "dispatch", dispatching)
        replace(JournalWriter, "_write_batch", writing)
        replace(JournalWriter, "append", appending)
        replace(Leader, "_perform", performing)
        replace(Leader, "_on_durable", being_durable)
        replace(EventLog, "append", self._observing(EventLog.append))
        self._install_storage(environment)
        for name in ("begin", "begin_restored"):
            replace(JobRanges, name, self._beginning(getattr(JobRanges, name)))

    def _install_storage(self, environment: Environment) -> None:
        append, truncate = SqlJournals.append, SqlJournals.truncate
        commit, delete = SqlJobs.commit, SqlJobs.delete_row

        def appending(journals: SqlJournals, request: pb.AppendJournalRequest) -> int:
            try:
                return append(journals, request)
            finally:
                if request.stream == STREAM:
                    self._catch_up(journals)

        def truncating(journals: SqlJournals, request: pb.TruncateJournalRequest) -> None:
            truncate(journals, request)
            self._truncated(journals, request)
            self._forgot(journals, request)

        def committing(
            store: SqlJobs, request: pb.CommitCheckpointRequest, *caller: Any
        ) -> pb.CommitCheckpointResponse:
            response = commit(store, request, *caller)
            self._demand_owner(store, request)
            self._checkpointed(store, request, response)
            return response

        def deleting(store: SqlJobs, request: pb.DeleteJobRowRequest) -> None:
            delete(store, request)
            # Where there was a row a late copy of the call that made it makes another one.
            self._oracle.terms.pop(request.job_id, None)
            self._oracle.final.pop(request.job_id, None)

        environment.replace(SqlJobs, "delete_row", deleting)
        environment.replace(SqlJournals, "append", appending)
        environment.replace(SqlJournals, "truncate", truncating)
        environment.replace(SqlJobs, "commit", committing)

    def _beginning(self, real: Any) -> Any:
        def begin(ranges: JobRanges, *args: Any) -> Any:
            self._begins(ranges)
            return real(ranges, *args)

        return begin

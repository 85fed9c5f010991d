"""What must hold of sets of independent tasks, looked at from outside after every transition.

The journal of each set is replayed where storage takes it: one result for each task, that of its
arguments, from an attempt that was handed out for this very task to this very worker; no failure
that there was not. What the owner counts, settles and ends stands there first.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from coordinator.aggregation.core.dispatch.dispatcher import ENDED, Dispatcher, State
from coordinator.aggregation.core.dispatch.events import (
    Appended,
    Event,
    Failed,
    Finished,
    Paused,
    Reported,
    Send,
    Tick,
    ValuesGone,
)
from coordinator.aggregation.tasks import HostedTasks
from coordinator.control.core.facts import Facts
from phalanx.programs import Graph
from phalanx.programs.cascade import Cascade
from phalanx.tasks import (
    OUTCOME,
    attempts_max,
    failures_max,
    is_program,
    journal_stream,
    pins_holder,
)
from phalanx.testing.simulation.clocks import Environment
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import FailedTry, StoredValue, TaskRecord, TaskResult
from phalanx.v1.training_pb2 import JobPlan
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from tests.simulation import programs
from tests.simulation.ledger import RECORDS
from tests.simulation.oracle import Oracle
from tests.simulation.task_sets import Calls, values_of
from worker.core.calls import TaskSetCore

_LEASED = int(State.LEASED)
_EMPTY = StoredValue(digest=hashlib.sha256().hexdigest())
_PIN = "SELECT 1 FROM blob_references WHERE kind = 'pin' AND owner = ? AND digest = ?"


@dataclass
class Journalled:
    """One set of tasks, by what its journal holds."""

    job_id: str
    spec: JobSpec
    term: int = 0
    next: int = 0
    most: int = 0
    """The most tasks that ever had a result at the same time."""
    results: dict[int, TaskResult] = field(default_factory=dict)
    tries: dict[int, list[FailedTry]] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)
    """Attempts of which it says what came of them."""
    tried: Counter[tuple[int, str]] = field(default_factory=Counter)
    """Tries that failed since the beginning, by task and worker."""
    given: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Attempts that any owner handed out: the task, and to whom."""

    def __post_init__(self) -> None:
        self.values = values_of(self.spec)
        self.graph = programs.graph_of_spec(self.spec) if is_program(self.spec) else Graph(())
        self.needs = self.graph.needs
        """By task of a program: those whose results it gets."""
        self.passed: dict[int, StoredValue] = {}
        """Tasks that nobody runs, as others have left nothing: what counts as their results."""

    @property
    def done(self) -> int:
        """Tasks that have a result, by the journal or since they are passed over."""
        return len(self.results) + len(self.passed)

    def stored(self, task: int) -> StoredValue | None:
        """The result of a task of a program; None: it has none yet."""
        result = self.results.get(task)
        if result is not None and result.HasField("stored"):
            return result.stored
        return self.passed.get(task)

    def pass_over(self) -> None:
        """Note which tasks are passed over by now."""
        for task in sorted(self.graph.passing - self.passed.keys()):
            found = [self.stored(each) for each in self.needs[task]]
            first = found[0]
            if first is not None and None not in found and found[-1] == _EMPTY:
                self.passed[task] = first

    @property
    def given_up(self) -> int:
        """Tasks that were given up."""
        return sum(result.HasField("failure") for result in self.results.values())


@dataclass(eq=False)
class _Owner:
    """One dispatcher of a set, and the attempts whose report it has taken."""

    dispatcher: Dispatcher  # keeps its id from being used again
    tasks: Journalled
    taken: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    """Of these, those whose results were collected as garbage before they were written down."""
    open: list[int] = field(default_factory=list)
    """Tasks that did not count as ended when somebody looked last."""


class Tasking:
    """Everything that became of the sets of tasks of one run, and the checks of it."""

    def __init__(self, oracle: Oracle, facts: Facts, calls: Calls) -> None:
        """`facts` are what control has recorded, `calls` what machines did."""
        self.sets: dict[str, Journalled] = {}
        self.copied = 0
        """Attempts that were handed out at tasks that somebody else had as well."""
        self.taken_over = 0
        """Terms that began with results of a term before."""
        self.gone = 0
        """Results that were made again as nothing had named them in time."""
        self.read = 0
        """Results that tasks were told to read."""
        self._oracle = oracle
        self._world = oracle.world
        self._demand = oracle.demand
        self._facts = facts
        self._calls = calls
        self._collected: Container[str] = ()
        """Blobs that were garbage once."""
        self._owners: dict[int, _Owner] = {}
        self._newest: dict[str, Dispatcher] = {}
        self._held: dict[int, tuple[TaskSetCore, dict[int, int]]] = {}

    # The journal

    def _catch_up(self, journals: SqlJournals, stream: str) -> None:
        """Take in what the journal holds by now, whether storage lived to say so or not."""
        known = self._known(stream.partition("/")[2])
        database: Any = journals._database
        connection = database._machine.connection
        self._collected = database._machine.collected
        for sequence, payload in connection.execute(RECORDS, (stream, known.next)).fetchall():
            known.next = sequence + 1
            self._take(known, TaskRecord.FromString(payload), connection)
            self._oracle.moments.met("tasks_journalled")

    def _known(self, job_id: str) -> Journalled:
        if job_id not in self.sets:
            self.sets[job_id] = Journalled(job_id, self._facts.jobs[job_id].spec)
        return self.sets[job_id]

    def _take(self, known: Journalled, record: TaskRecord, connection: Any) -> None:
        what = f"{known.job_id}: a record of term {record.term}"
        right = record.term >= known.term if record.began else record.term == known.term
        self._demand(right, f"{what} in term {known.term}")
        known.term = record.term
        self.taken_over += record.began and bool(known.results)
        for task in record.tried_anew:
            result = known.results.pop(task, None)
            given_up = result is not None and result.HasField("failure")
            self._demand(given_up, f"{what} tries task {task} anew, which was not given up")
            known.tries.pop(task, None)
        for tried in record.failed_tries:
            self._take_try(known, tried)
        for each in record.results:
            self._take_result(known, each, connection)
        known.pass_over()
        known.most = max(known.most, known.done)

    def _take_try(self, known: Journalled, tried: FailedTry) -> None:
        """A try that failed: one that was, and only once."""
        what = f"{known.job_id}: attempt {tried.attempt} at task {tried.task}"
        (worker,) = tried.failure.worker_ids
        self._demand(tried.attempt not in known.counted, f"{what} failed twice")
        self._demand(
            known.given.get(tried.attempt) == (tried.task, worker),
            f"{what} failed on {worker}, and is {known.given.get(tried.attempt)}",
        )
        known.counted.add(tried.attempt)
        known.tried[tried.task, worker] += 1
        known.tries.setdefault(tried.task, []).append(tried)
        failed = self._calls.failed[known.job_id, tried.task, worker]
        self._demand(
            known.tried[tried.task, worker] <= failed,
            f"{what} failed on {worker}, where {failed} calls of it ever failed",
        )

    def _take_result(self, known: Journalled, result: TaskResult, connection: Any) -> None:
        """A result: the first of its task, and the right one."""
        task, attempt = result.task, result.attempt
        what = f"{known.job_id}: task {task}"
        self._demand(task not in known.results, f"{what} is done twice")
        self._demand(
            known.given.get(attempt) == (task, result.worker_id),
            f"{what} is done by attempt {attempt} of {result.worker_id}, which is "
            f"{known.given.get(attempt)}",
        )
        known.results[task] = result
        if result.HasField("failure"):
            tries, failure = known.tries.get(task, []), result.failure
            workers = sorted({name for each in tries for name in each.failure.worker_ids})
            enough = len(tries) >= attempts_max(known.spec)
            self._demand(enough, f"{what} is given up after {len(tries)} tries")
            self._demand(
                (failure.code, failure.attempts, failure.task, list(failure.worker_ids))
                == ("POISON_TASK", len(tries), task, workers),
                f"{what} is given up as {failure}",
            )
            return
        self._demand(attempt not in known.counted, f"{what}: its attempt had failed")
        known.counted.add(attempt)
        self._demand_value(known, result, connection)

    def _demand_value(self, known: Journalled, result: TaskResult, connection: Any) -> None:
        value, what = known.values[result.task], f"{known.job_id}: task {result.task}"
        if not result.HasField("stored"):
            self._demand(not known.needs, f"{what}, which others read, is not stored")
            right = result.value_json.encode() == value
            self._demand(right, f"{what} has the result {result.value_json[:80]}")
            return
        stored = result.stored
        right = stored.digest == hashlib.sha256(value).hexdigest()
        self._demand(right and stored.size_bytes == len(value), f"{what} has another value")
        holders = [pins_holder(known.job_id, attempt) for attempt in known.given]
        pinned = any(connection.execute(_PIN, (each, stored.digest)).fetchone() for each in holders)
        self._demand(pinned, f"{what} has a value that nothing keeps")

    def _finished(self, request: pb.CommitCheckpointRequest) -> None:
        """The end of a set is stored: each of its tasks has a result."""
        known = self.sets.get(request.job_id)
        if known is None or not request.final:
            return
        total, told = len(known.values), json.loads(request.root_state)
        done = total - known.given_up
        self._demand(
            known.done == total == request.step,
            f"{request.job_id} ends with {known.done} of {total} tasks",
        )
        self._demand(
            (told["done"], told["metrics"]["tasks/given_up"]) == (done, known.given_up),
            f"{request.job_id} ends as {told}, with {done} of its tasks done",
        )
        if known.needs:
            digest = hashlib.sha256(known.values[-1]).hexdigest()
            self._demand(told[OUTCOME] == digest, f"{request.job_id} ends with another outcome")

    # The owner

    def _opens(self, hosted: HostedTasks, plan: JobPlan) -> None:
        dispatcher, known = hosted.dispatcher, self._known(plan.job_id)
        owner = _Owner(dispatcher, known, open=list(range(dispatcher.total)))
        self._owners[id(dispatcher)] = owner
        self._newest[plan.job_id] = dispatcher
        self._demand_durable(owner)

    def _hears(self, owner: _Owner, event: Reported) -> None:
        """Note which reports the owner takes: those of attempts that it has handed out."""
        dispatcher = owner.dispatcher
        peer = dispatcher._peers.get(event.session)
        if peer is None or dispatcher._over:
            return
        tasks = set()
        for each in event.reports:
            lease = peer.attempts.get(each.attempt)
            # Of a task that it has twice, the first says it all.
            if lease is not None and lease.task == each.task not in tasks:
                owner.taken.add(each.attempt)
                tasks.add(each.task)

    def _demand_gone(self, owner: _Owner, event: ValuesGone) -> None:
        """Only what was collected may be forgotten before it stands in the journal."""
        record = owner.dispatcher._unwritten._under_way
        for result in record.results if record is not None else ():
            if result.stored.digest in event.digests:
                self.gone += 1
                owner.gone.add(result.attempt)
                what = f"{owner.tasks.job_id}: what task {result.task} returned counts as gone"
                self._demand(result.stored.digest in self._collected, what)

    def _acted(self, owner: _Owner, event: Event, effects: list[Any]) -> None:
        dispatcher, known = owner.dispatcher, owner.tasks
        for effect in effects:
            match effect:
                case Send():
                    self._sends(owner, effect)
                case Finished():
                    self._demand(
                        known.done == len(known.values),
                        f"{known.job_id} is finished with {known.done} results",
                    )
                case Failed():
                    most = failures_max(known.spec)
                    self._demand(
                        most is not None and known.given_up > most,
                        f"{known.job_id} fails with {known.given_up} tasks given up",
                    )
                case Paused():
                    told = not dispatcher._unwritten
                    self._demand(told, f"{known.job_id} is paused with results in its hands")
        if isinstance(event, Appended):
            self._demand_durable(owner)
        has = {each.task for peer in dispatcher._peers.values() for each in peer.attempts.values()}
        states = dispatcher._state
        for task in owner.open:
            if states[task] == _LEASED and task not in has:
                self._oracle.fail(f"{known.job_id}: nobody has task {task}")
        for task in has:
            if states[task] > _LEASED:
                self._oracle.fail(f"{known.job_id}: task {task} has a result, and somebody has it")

    def _sends(self, owner: _Owner, effect: Send) -> None:
        dispatcher, known = owner.dispatcher, owner.tasks
        paused = dispatcher._pause_until_s is not None
        self._demand(not (paused and effect.tasks), f"{known.job_id}: tasks of a pause")
        worker = dispatcher._peers[effect.session].worker_id
        for attempt, task in enumerate(effect.tasks, effect.first_attempt):
            what = f"{known.job_id}: attempt {attempt} at task {task}"
            self._demand(attempt not in known.given, f"{what} is given twice")
            # One that was replaced, and has not heard of it, cannot know.
            fresh = task not in known.results or self._newest[known.job_id] is not dispatcher
            self._demand(fresh, f"{what}, which has a result")
            known.given[attempt] = task, worker
            if known.needs:
                inputs = effect.inputs[attempt - effect.first_attempt]
                self._demand_inputs(known, what, task, inputs)
            self.copied += len(dispatcher._leases.get(task, ())) > 1
        for attempt in effect.settled:
            self._demand_settled(owner, attempt)

    def _demand_inputs(
        self, known: Journalled, what: str, task: int, inputs: tuple[StoredValue, ...]
    ) -> None:
        """A task of a program is handed out once all that it reads is stored, with what that is."""
        self._demand(task not in known.passed, f"{what}, which is passed over")
        expected = [known.stored(needed) for needed in known.needs[task]]
        self._demand(None not in expected, f"{what}, before all that it reads has a result")
        earlier = programs.goes_on_from(known.spec, task)
        result = known.results.get(earlier)
        if earlier >= 0 and result is not None and result.HasField("kept"):
            content = programs.kept_by(known.spec, earlier)
            digest = hashlib.sha256(content).hexdigest()
            self._demand(result.kept.sha256.hex() == digest, f"{what}: {earlier} kept another's")
            expected.append(StoredValue(digest=digest, size_bytes=len(content)))
        self._demand(list(inputs) == expected, f"{what}, which is to read {inputs}")
        self.read += len(expected)

    def _demand_settled(self, owner: _Owner, attempt: int) -> None:
        """A worker forgets only what is durable, or what nobody wants of it."""
        dispatcher, known = owner.dispatcher, owner.tasks
        what = f"{known.job_id}: attempt {attempt} is settled"
        if attempt in owner.gone:
            return
        if attempt in owner.taken:
            self._demand(attempt in known.counted, f"{what} before it is durable")
            return
        task, _ = known.given.get(attempt, (-1, ""))
        self._demand(task >= 0, f"{what}, which nobody handed out")
        wanted = dispatcher.state(task) < State.REPORTED and not dispatcher._over
        self._demand(not wanted or attempt in known.counted, f"{what}, and task {task} has nothing")

    def _demand_durable(self, owner: _Owner) -> None:
        """What an owner counts stands in the journal."""
        states, known = owner.dispatcher._state, owner.tasks
        for task in [each for each in owner.open if states[each] in ENDED]:
            if task in known.passed and states[task] == State.DONE:
                owner.open.remove(task)
                continue
            result, given_up = known.results.get(task), states[task] == State.GIVEN_UP
            as_it_is = result is not None and result.HasField("failure") == given_up
            what = f"{known.job_id}: task {task} counts as {State(states[task]).name}"
            self._demand(as_it_is, f"{what} with {result}")
            owner.open.remove(task)

    # Workers

    def _worker_acted(self, core: TaskSetCore) -> None:
        """A worker keeps what it was given until that is settled."""
        held = {each.attempt: each.task for each in core.held()}
        given = self._held.setdefault(id(core), (core, {}))[1]
        self._demand(held == given, f"{core.job_id}: a worker holds {held}, and was given {given}")

    def _worker_told(self, core: TaskSetCore, message: Any) -> None:
        given = self._held.setdefault(id(core), (core, {}))[1]
        for attempt in message.settled:
            given.pop(attempt, None)
        given.update(enumerate(message.tasks, message.first_attempt))

    def _worker_left(self, core: TaskSetCore) -> None:
        self._held[id(core)] = core, {}

    # Looking

    def install(self, environment: Environment) -> None:
        """Look at everything that is done about tasks."""
        replace, world = environment.replace, self._world
        make, handle = HostedTasks.__init__, Dispatcher.handle

        def making(hosted: HostedTasks, plan: JobPlan, *more: Any) -> None:
            make(hosted, plan, *more)
            self._opens(hosted, plan)

        def handling(dispatcher: Dispatcher, event: Event, now_s: float) -> Any:
            owner = self._owners[id(dispatcher)]
            if isinstance(event, Reported):
                self._hears(owner, event)
            elif isinstance(event, ValuesGone):
                self._demand_gone(owner, event)
            effects = handle(dispatcher, event, now_s)
            if effects or not isinstance(event, Tick):
                world.transitions += 1
                self._acted(owner, event, effects)
            return effects

        replace(Cascade, "graph", programs.graph)
        replace(HostedTasks, "__init__", making)
        replace(Dispatcher, "handle", handling)
        self._install_storage(environment)
        self._install_worker(environment)

    def _install_storage(self, environment: Environment) -> None:
        append, commit = SqlJournals.append, SqlJobs.commit
        streams = journal_stream("")

        def appending(journals: SqlJournals, request: pb.AppendJournalRequest) -> int:
            try:
                return append(journals, request)
            finally:
                if request.stream.startswith(streams):
                    self._catch_up(journals, request.stream)

        def committing(store: SqlJobs, request: pb.CommitCheckpointRequest, *caller: Any) -> Any:
            response = commit(store, request, *caller)
            self._finished(request)
            return response

        environment.replace(SqlJournals, "append", appending)
        environment.replace(SqlJobs, "commit", committing)

    def _install_worker(self, environment: Environment) -> None:
        def counted(real: Any, before: Any = None) -> Any:
            def acting(core: TaskSetCore, *args: Any, **more: Any) -> Any:
                self._world.transitions += 1
                if before is not None:
                    before(core, *args)
                effects = real(core, *args, **more)
                self._worker_acted(core)
                return effects

            return acting

        core = TaskSetCore
        environment.replace(core, "told", counted(core.told, self._worker_told))
        environment.replace(core, "leave", counted(core.leave, self._worker_left))
        for name in ("stream_opened", "call_done", "part_failed", "task_ended"):
            environment.replace(core, name, counted(getattr(core, name)))

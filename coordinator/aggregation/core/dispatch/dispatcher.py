"""The dispatcher of tasks: one event and the time in, effects out.

A task has one result in the journal, whatever happens. Attempts are leases of a stream: a broken
stream frees them at once, and a worker that comes back with them goes on with them. Whoever reports
a task first has it; its report is settled once it is durable, and until then the worker keeps it
and says it again on every stream. Attempt numbers carry the term and are never given twice, so what
an attempt of an earlier owner says is its own and nobody else's.

Only failures of a task's own process count against its budget, each attempt once.

A task of a program may need the results of others: it is handed out, with what they are, once the
last of them is durable. One that is passed over then has its result by that, now and for whoever
reads the journal, and nothing is written of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum, auto

from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Durable,
    Effect,
    Event,
    Failed,
    Finished,
    Moved,
    PauseAsked,
    Paused,
    Reported,
    Send,
    Tick,
    ValuesGone,
    WorkerClosed,
    WorkerOpened,
)
from coordinator.aggregation.core.dispatch.needs import Needs
from coordinator.aggregation.core.dispatch.pace import Pace
from coordinator.aggregation.core.dispatch.ready import Ready
from coordinator.aggregation.core.dispatch.records import Unwritten, poisoned
from phalanx.programs.base import Graph
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.task_service_pb2 import (
    FailedTry,
    StoredValue,
    TaskAttempt,
    TaskRecord,
    TaskReport,
    TaskResult,
)

SILENCE_S = 2.0
"""A worker that said nothing for so long has its tasks run by others as well."""

AWAY_S = 1.0
"""After so long without a tick it was this process that was silent."""

PAUSE_S = 5.0
"""What a pause gives running tasks to end; those that take longer run again after it."""

ATTEMPTS_AT_ONCE = 2
TERM_SHIFT, BEGUN_SHIFT = 40, 32
"""Where term and beginning stand in the number of an attempt."""

SHA256_BYTES = 32

FIRST_NUMBER = 1 << TERM_SHIFT
"""All attempts of all terms have greater numbers."""

INDEPENDENT = Graph(())
"""No task needs another."""


class State(IntEnum):
    """Where a task stands."""

    BLOCKED = 0
    """It needs results that are not there yet."""
    WAITING = auto()
    LEASED = auto()
    REPORTED = auto()
    """Its result is on its way to the journal."""
    DONE = auto()
    GIVEN_UP = auto()


ENDED = (State.DONE, State.GIVEN_UP)


@dataclass(eq=False, slots=True)
class _Attempt:
    task: int
    number: int
    worker_id: str
    since_s: float
    doubtful: bool = False
    """Its worker says nothing; others may have the task."""
    late_s: float | None = None
    """When others were given the task as well."""


@dataclass(eq=False, slots=True)
class _Peer:
    session: int
    worker_id: str
    slots: int
    heard_s: float
    attempts: dict[int, _Attempt] = field(default_factory=dict)
    settled: list[int] = field(default_factory=list)
    silent: bool = False


class Dispatcher:
    """`total` tasks of a job in one term.

    A task is given up after `attempts_max` failures; more than `failures_max` given up fail the
    job (None: however many there are). `graph` tells which of them get the results of others.
    """

    def __init__(
        self,
        total: int,
        term: int,
        attempts_max: int,
        failures_max: int | None,
        graph: Graph = INDEPENDENT,
    ) -> None:
        self.total = total
        self.term = term
        self.done = self.given_up = self.failed_tries = 0
        self._attempts_max = attempts_max
        self._failures_max = failures_max
        self._needs = Needs(graph)
        self._state = bytearray(
            State.BLOCKED if self._needs.blocked(task) else State.WAITING for task in range(total)
        )
        self._fresh = Ready(graph.levels)
        self._again: deque[int] = deque()
        self._waiting = self._state.count(State.WAITING)
        self._failures: dict[int, list[Failure]] = {}
        self._counted: set[int] = set()
        """Attempts whose failure is in the journal."""
        self._last_given_up: Failure | None = None
        self._leases: dict[int, list[_Attempt]] = {}
        self._peers: dict[int, _Peer] = {}
        self._settling: dict[int, int] = {}
        """Attempts whose report is on its way to the journal → the session that hears of it."""
        self._began_s: dict[int, float] = {}
        """Those of them that succeeded → when they were handed out, plus what the call took."""
        self._unwritten = Unwritten(term)
        self._pace = Pace()
        self._begun = self._numbers = self._first_number = 0
        self._given: dict[int, dict[int, str]] = {}
        """Tasks without a result → the attempts of this owner → who was given them."""
        self._now_s = 0.0
        self._ticked_s: float | None = None
        self._pause_until_s: float | None = None
        self._over = False
        self._effects: list[Effect] = []

    # Before the first event

    def restore(self, record: TaskRecord) -> None:
        """Take in a record of the journal, in order."""
        self._begun += record.began and record.term == self.term
        for task in record.tried_anew:
            self._try_anew(task)
        for tried in record.failed_tries:
            self._failures.setdefault(tried.task, []).append(tried.failure)
            self._counted.add(tried.attempt)
            self.failed_tries += 1
        for result in record.results:
            self._end(result)

    def begin(self) -> TaskRecord:
        """Return the first record of this term: nothing may be handed out before it is durable.

        Where so many tasks were given up that the job failed of it they are tried anew, as this is
        a retry.
        """
        # The numbers of attempts of an owner that began this very term before stay its own.
        self._numbers = (self.term << TERM_SHIFT) + (self._begun << BEGUN_SHIFT)
        self._first_number = self._numbers
        record = TaskRecord(term=self.term, began=True)
        if self._too_many_given_up():
            record.tried_anew.extend(
                task for task in range(self.total) if self._state[task] == State.GIVEN_UP
            )
            self.restore(record)
        self._fresh.clear()  # what became ready while the journal was read has no turn of its own
        self._fresh.add(task for task in range(self.total) if self._state[task] == State.WAITING)
        return record

    # What is asked

    @property
    def leased(self) -> int:
        """Tasks that workers have."""
        return len(self._leases)

    @property
    def outcome(self) -> StoredValue | None:
        """The durable result of the last task of a program."""
        return self._needs.outcome

    def state(self, task: int) -> State:
        """Where a task stands."""
        return State(self._state[task])

    def late_workers(self) -> dict[str, float]:
        """Workers whose tasks others run as well: for how many seconds they have been late."""
        late: dict[str, float] = {}
        for peer in self._peers.values():
            since_s = [each.late_s for each in peer.attempts.values() if each.late_s is not None]
            if peer.silent:
                since_s.append(peer.heard_s)
            if since_s:
                late[peer.worker_id] = self._now_s - min(since_s)
        return late

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Decide what one event means."""
        self._now_s = now_s
        match event:
            case Reported():
                self._reported(event)
            case Appended():
                self._appended()
            case ValuesGone():
                self._values_gone(event)
            case Tick():
                self._tick()
            case WorkerOpened():
                self._opened(event)
            case WorkerClosed():
                self._closed(event.session)
            case PauseAsked():
                if self._pause_until_s is None:
                    self._pause_until_s = now_s + PAUSE_S
        # First, as nothing takes as long as the disk.
        record = self._unwritten.next()
        if record is not None:
            self._effects.append(Append(record))
        self._hand_out()
        self._tell_settled()
        self._check_end()
        effects, self._effects = self._effects, []
        return effects

    # Streams

    def _opened(self, event: WorkerOpened) -> None:
        for old in [each for each in self._peers.values() if each.worker_id == event.worker_id]:
            self._closed(old.session)
        peer = _Peer(event.session, event.worker_id, max(1, event.slots), self._now_s)
        self._peers[event.session] = peer
        for held in event.held:
            self._take_back(peer, held)

    def _take_back(self, peer: _Peer, held: TaskAttempt) -> None:
        """A worker has an attempt of an earlier stream: it goes on with it, if it is of use."""
        if held.attempt in self._settling:
            self._settling[held.attempt] = peer.session
        elif (
            not 0 <= held.task < self.total
            or self._state[held.task] >= State.REPORTED
            or self._state[held.task] == State.BLOCKED  # nobody can have been given it
            or held.attempt in self._counted  # it has not heard that its failure was heard
            or not self._was_given(peer.worker_id, held)
        ):
            peer.settled.append(held.attempt)
        else:
            self._lease(peer, held.task, held.attempt)

    def _was_given(self, worker_id: str, held: TaskAttempt) -> bool:
        """Say whether an attempt is one that a worker can have: nobody completes what he only says
        that he was given. Whom an earlier owner gave what is in no journal, and is believed."""
        if held.attempt > self._first_number:
            return self._given.get(held.task, {}).get(held.attempt) == worker_id
        return held.attempt > FIRST_NUMBER

    def _closed(self, session: int) -> None:
        peer = self._peers.pop(session, None)
        if peer is not None:
            freed = [each.task for each in peer.attempts.values() if self._free(each)]
            self._run_again(freed, peer.worker_id, "lost")

    def _free(self, attempt: _Attempt) -> bool:
        """Take a lease away; return whether nobody has the task now."""
        leases = self._leases.get(attempt.task, [])
        if attempt in leases:
            leases.remove(attempt)
        if not leases:
            self._leases.pop(attempt.task, None)
        return not leases and self._state[attempt.task] == State.LEASED

    def _run_again(self, tasks: list[int], worker_id: str, cause: str) -> None:
        for task in tasks:
            self._state[task] = State.WAITING
        self._waiting += len(tasks)
        self._again.extend(tasks)
        if tasks:
            self._effects.append(Moved(cause, tuple(tasks), worker_id))

    # Reports

    def _reported(self, event: Reported) -> None:
        peer = self._peers.get(event.session)
        if peer is None:
            return
        peer.heard_s, peer.silent = self._now_s, False
        for report in event.reports:
            attempt = peer.attempts.get(report.attempt)
            if report.attempt in self._settling:
                continue
            if attempt is None or attempt.task != report.task or self._over:
                peer.settled.append(report.attempt)
                continue
            del peer.attempts[report.attempt]
            self._free(attempt)
            if report.HasField("failure"):
                self._failed(peer, attempt, report)
            else:
                self._succeeded(peer, attempt, report)

    def _succeeded(self, peer: _Peer, attempt: _Attempt, report: TaskReport) -> None:
        round_trip_s = self._now_s - attempt.since_s
        self._pace.took(report.seconds, round_trip_s)
        result = TaskResult(
            task=report.task,
            attempt=report.attempt,
            worker_id=peer.worker_id,
            seconds=report.seconds,
            round_trip_s=round_trip_s,
        )
        if report.HasField("stored"):
            result.stored.CopyFrom(report.stored)
            if len(report.kept.sha256) == SHA256_BYTES:
                result.kept.CopyFrom(report.kept)
            result.earlier.extend(report.earlier)
        else:
            result.value_json = report.value_json
        self._settling[report.attempt] = peer.session
        self._began_s[report.attempt] = attempt.since_s + report.seconds
        self._settle_task(result)

    def _failed(self, peer: _Peer, attempt: _Attempt, report: TaskReport) -> None:
        """Count a failure; the task is tried again, elsewhere if it can be, or given up."""
        task, failure = report.task, report.failure
        failure.task, failure.attempts, failure.shard = task, 1, -1
        del failure.worker_ids[:]
        failure.worker_ids.append(peer.worker_id)
        failures = self._failures.setdefault(task, [])
        failures.append(failure)
        self.failed_tries += 1
        self._settling[report.attempt] = peer.session
        self._unwritten.add_try(FailedTry(task=task, attempt=report.attempt, failure=failure))
        if len(failures) >= self._attempts_max:
            result = TaskResult(
                task=task,
                failure=poisoned(task, failures),
                attempt=report.attempt,
                worker_id=peer.worker_id,
                seconds=report.seconds,
                round_trip_s=self._now_s - attempt.since_s,
            )
            self._settle_task(result)
        elif self._state[task] == State.LEASED and task not in self._leases:
            self._run_again([task], peer.worker_id, "failed")

    def _settle_task(self, result: TaskResult) -> None:
        """A task has its result: it is written, and no other attempt at it counts any more."""
        if self._state[result.task] == State.WAITING:
            self._waiting -= 1
        self._state[result.task] = State.REPORTED
        self._given.pop(result.task, None)
        self._unwritten.add_result(result)
        for other in self._leases.pop(result.task, []):
            for peer in self._peers.values():
                if peer.attempts.pop(other.number, None) is not None:
                    peer.settled.append(other.number)

    # The journal

    def _appended(self) -> None:
        record = self._unwritten.written()
        began = [self._began_s.pop(each.attempt, None) for each in record.results]
        round_trips_s = tuple(self._now_s - each for each in began if each is not None)
        if round_trips_s:
            self._effects.append(Durable(round_trips_s))
        for result in record.results:
            self._end(result)
            self._settled(result.attempt)
        for tried in record.failed_tries:
            self._counted.add(tried.attempt)
            self._settled(tried.attempt)

    def _values_gone(self, event: ValuesGone) -> None:
        """What was reported and not written down in time is not there any more: it is made again,
        and whoever reported it forgets it."""
        for result in self._unwritten.refused(event.digests):
            self._began_s.pop(result.attempt, None)
            self._settled(result.attempt)
            self._run_again([result.task], result.worker_id, "gone")

    def _settled(self, attempt: int) -> None:
        session = self._settling.pop(attempt, None)
        peer = self._peers.get(session) if session is not None else None
        if peer is not None:
            peer.settled.append(attempt)

    def _end(self, result: TaskResult) -> None:
        """A result is durable."""
        if self._state[result.task] == State.WAITING:
            self._waiting -= 1
        if result.HasField("failure"):
            self._state[result.task] = State.GIVEN_UP
            self.given_up += 1
            self._last_given_up = result.failure
        else:
            self._state[result.task] = State.DONE
            self.done += 1
            ready, passed = self._needs.done(result)
            for task in passed:
                self._state[task] = State.DONE
            self.done += len(passed)
            self._unblock(ready)

    def _unblock(self, tasks: list[int]) -> None:
        for task in tasks:
            self._state[task] = State.WAITING
        self._waiting += len(tasks)
        self._fresh.add(tasks)

    def _try_anew(self, task: int) -> None:
        if self._state[task] == State.GIVEN_UP:
            self._state[task] = State.WAITING
            self._waiting += 1
            self.given_up -= 1
        self._failures.pop(task, None)

    def _too_many_given_up(self) -> bool:
        return self._failures_max is not None and self.given_up > self._failures_max

    def _check_end(self) -> None:
        if self._over:
            return
        if self._too_many_given_up() and self._last_given_up is not None:
            self._over = True
            self._effects.append(Failed(self._last_given_up))
        elif self.done + self.given_up == self.total:
            self._over = True
            self._effects.append(Finished())
        elif self._pause_until_s is not None and not self._unwritten:
            self._over = not self._leases or self._now_s >= self._pause_until_s
            if self._over:
                self._effects.append(Paused())

    # Handing out

    def _hand_out(self) -> None:
        if not self._waiting or not self._may_hand_out():
            return
        peers = [each for each in self._peers.values() if not each.silent]
        slots = sum(each.slots for each in peers)
        peers.sort(key=lambda each: (len(each.attempts) / each.slots, each.session))
        for peer in peers:
            room = self._pace.room(peer.slots, len(peer.attempts), self._waiting, slots)
            tasks = self._take(room, peer.worker_id, peers) if room else []
            self._give(peer, tasks)

    def _may_hand_out(self) -> bool:
        return not self._over and self._pause_until_s is None and not self._unwritten.full

    def _take(self, room: int, worker_id: str, peers: list[_Peer]) -> list[int]:
        tasks: list[int] = []
        elsewhere: list[int] = []
        while len(tasks) < room and (self._again or self._fresh):
            task = self._again.popleft() if self._again else self._fresh.next()
            if self._state[task] != State.WAITING:
                continue  # it was reported, or given back twice
            if self._failed_only_here(task, worker_id, peers):
                elsewhere.append(task)
                continue
            self._state[task] = State.LEASED
            self._waiting -= 1
            tasks.append(task)
        self._again.extendleft(reversed(elsewhere))
        return tasks

    def _failed_only_here(self, task: int, worker_id: str, peers: list[_Peer]) -> bool:
        """Whether a task failed on this worker and there are others to try it."""
        if task not in self._failures:
            return False
        failed_on = {each.worker_ids[0] for each in self._failures[task]}
        return worker_id in failed_on and any(each.worker_id not in failed_on for each in peers)

    def _give(self, peer: _Peer, tasks: Iterable[int]) -> None:
        given = tuple(tasks)
        if not given:
            return
        first = self._numbers + 1
        for task in given:
            self._numbers += 1
            self._lease(peer, task, self._numbers)
            self._given.setdefault(task, {})[self._numbers] = peer.worker_id
        settled, peer.settled = tuple(peer.settled), []
        inputs = self._needs.inputs(given)
        self._effects.append(Send(peer.session, given, first, settled, inputs))

    def _lease(self, peer: _Peer, task: int, number: int) -> None:
        if self._state[task] == State.WAITING:
            self._waiting -= 1
        self._state[task] = State.LEASED
        attempt = _Attempt(task, number, peer.worker_id, self._now_s)
        peer.attempts[number] = attempt
        self._leases.setdefault(task, []).append(attempt)

    def _tell_settled(self) -> None:
        for peer in self._peers.values():
            if peer.settled:
                settled, peer.settled = tuple(peer.settled), []
                self._effects.append(Send(peer.session, settled=settled))

    # Time

    def _tick(self) -> None:
        if self._ticked_s is not None and self._now_s - self._ticked_s > AWAY_S:
            for peer in self._peers.values():
                peer.heard_s = self._now_s
        self._ticked_s = self._now_s
        for peer in self._peers.values():
            if not peer.silent and self._now_s - peer.heard_s > SILENCE_S:
                self._doubt(peer)
        self._copy_late()

    def _doubt(self, peer: _Peer) -> None:
        """Let others have the tasks of a worker that says nothing; what it reports still counts."""
        peer.silent = True
        for attempt in peer.attempts.values():
            attempt.doubtful = True
        alone = [
            each.task
            for each in peer.attempts.values()
            if self._state[each.task] == State.LEASED
            and all(other.doubtful for other in self._leases[each.task])
        ]
        self._run_again(alone, peer.worker_id, "silent")

    def _copy_late(self) -> None:
        """With nothing else to do, idle workers run what others are late with a second time."""
        patience_s = self._pace.patience_s()
        if patience_s is None or self._waiting or not self._may_hand_out():
            return
        idle = [
            each
            for each in self._peers.values()
            if not each.silent and len(each.attempts) < each.slots
        ]
        late = sorted(
            (leases[0].since_s, task)
            for task, leases in self._leases.items()
            if len(leases) < ATTEMPTS_AT_ONCE and self._now_s - leases[0].since_s >= patience_s
        )
        for peer in idle if late else ():
            free = peer.slots - len(peer.attempts)
            mine = [task for _, task in late if self._leases[task][0].worker_id != peer.worker_id][
                :free
            ]
            for task in mine:
                first = self._leases[task][0]
                first.late_s = self._now_s
                self._effects.append(Moved("late", (task,), first.worker_id))
            self._give(peer, mine)
            late = [each for each in late if each[1] not in mine]

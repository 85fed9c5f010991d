"""One run: undisturbed for a while, then faults, then undisturbed again, and what it came to."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from phalanx.chaos.harm import Harm
from phalanx.chaos.report import Commit, Counters, Injected, Report, Span, summarise
from phalanx.chaos.schedule import Fault, Planned, draw
from phalanx.chaos.victims import Victims
from phalanx.chaos.watch import Gauges, StepLog
from phalanx.errors import DeadlineExceeded, FailedPrecondition, PhalanxError, Unavailable
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.job import Job
from phalanx.sdk.values import Event

LOOK_S = 0.1
ASK_EVERY_S = 0.25
"""Control knows no more than four or five times a second how far a job is."""
SETTLE_S, SETTLE_GAPS = 60.0, 10
"""How long a job may take to go on after the faults; or so many times the usual time of a step."""
FIRST_STEP_S = 60.0
SETTLED_COMMITS = 3
NOBODY_THERE = (Unavailable, DeadlineExceeded)
"""What a call ends with while control is dead, or stopped."""
COMMITTED = ["train/loss", "train/epsilon"]
"""Metrics of a step, one of which every job has."""
_BEGAN_UNIX_S = time.time() - time.monotonic()

Tell = Callable[[str], None]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ChaosOptions:
    """How a job is disturbed: one fault of the mix per period; ``baseline_s`` is the undisturbed
    time before and that after."""

    mix: Sequence[Fault]
    every_s: float = 5.0
    duration_s: float = 60.0
    baseline_s: float = 15.0
    seed: int = 0


@dataclass
class _Course:
    """What happened so far."""

    spans: list[Span] = field(default_factory=list)
    disturbed: Span | None = None
    injected: list[Injected] = field(default_factory=list)
    watched_until_s: float | None = None
    skipped: int = 0
    silent: bool = False
    notes: list[str] = field(default_factory=list)


class Chaos:
    """Disturbs one running job. ``run`` once, then ``report``, also after an interruption."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        victims: Victims,
        options: ChaosOptions,
        tell: Tell = lambda _: None,
    ) -> None:
        missing = sorted({fault.name for fault in options.mix if fault.role not in victims.roles})
        if missing:
            raise FailedPrecondition(
                f"{', '.join(missing)}: that process can only be found in the state folder of a "
                "cluster started by `phalanx up` on this machine; name the folder with --state, "
                "or other faults with --fault",
                reason="NO_PROCESS_HERE",
            )
        self._cluster = cluster
        self._job = job
        self._victims = victims
        self._options = options
        self._tell = tell
        self._course = _Course()
        self._log = StepLog()
        self._gauges = Gauges(job.id)
        self._first_event = 0
        self._ask_at_s = 0.0
        self._needed: dict[str, set[str]] = {}
        """By role, the processes that the job needs, as control last said; of others it needs
        all."""

    @property
    def began(self) -> bool:
        """Whether there is something to report."""
        return self._course.disturbed is not None

    def run(self) -> None:
        """Disturb the job; returns early when it ends, or when control stays away: that is a
        finding, and the report tells it. Nothing stays paused, however this ends.

        Raises FailedPrecondition if the job does not run or ends before the first fault,
        DeadlineExceeded if it commits no step.
        """
        course = self._course
        self._await_first_step()
        self._needed = _patiently(self._needed_now)
        self._first_event = max((event.sequence for event in self._events()), default=0)
        self._undisturbed()
        if self._job.done:
            raise self._too_short()
        try:
            self._disturb()
            self._settle()
            self._undisturbed()
        except NOBODY_THERE as nobody:
            self._note_silence(nobody)
        finally:
            course.watched_until_s = _now_s()

    def report(self, *, bit_identical: bool | None = None) -> Report:
        """Return what came of it. Raises FailedPrecondition if it ended before the first fault."""
        if self._course.disturbed is None:
            raise self._too_short()
        points: list[Commit] = []
        events: list[Event] = []
        if not self._course.silent:
            try:
                points = [
                    Commit(point.step, point.time.timestamp())
                    for point in _patiently(lambda: self._refresh().metrics(COMMITTED))
                ]
                events = self._events()
            except NOBODY_THERE as nobody:
                self._note_silence(nobody)
        job, result = self._job, self._job.result
        return summarise(
            self._log.better(points),
            self._course.disturbed,
            self._course.spans,
            self._course.injected,
            job_id=job.id,
            state=job.state,
            seed=self._options.seed,
            counters=self._counters(events),
            watched_until_s=self._course.watched_until_s,
            skipped=self._course.skipped,
            parameters_sha256=result.parameters_sha256 if result is not None else "",
            bit_identical=bit_identical,
            control_answered=not self._course.silent,
            notes=self._course.notes,
        )

    def _disturb(self) -> None:
        options, course = self._options, self._course
        with Harm() as harm:
            start_s = _now_s()
            try:
                planned = draw(options.mix, options.every_s, options.duration_s, options.seed)
                for each in planned:
                    if not self._sleep_until(start_s + each.at_s):
                        break
                    self._inflict(harm, each)
                self._sleep_until(start_s + options.duration_s)
            finally:
                course.disturbed = Span(start_s, _now_s())

    def _note_silence(self, nobody: PhalanxError) -> None:
        self._course.silent = True
        self._course.notes.append(
            f"control did not answer for {SETTLE_S:g} s ({nobody.message}); this is what was seen "
            "until then, and what only control counts is missing"
        )

    def _too_short(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"job {self._job.id} ended before the first fault; take a longer job, or a shorter "
            "--baseline",
            reason="JOB_TOO_SHORT",
        )

    def _await_first_step(self) -> None:
        deadline_s = time.monotonic() + FIRST_STEP_S
        while True:
            job = self._refresh()
            if job.state not in ("QUEUED", "RUNNING"):
                raise FailedPrecondition(
                    f"job {job.id} is {job.state}; only a job that runs can be disturbed",
                    reason="JOB_NOT_RUNNING",
                )
            if job.progress.step >= 1:
                return
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(
                    f"job {job.id} has committed no step in {FIRST_STEP_S:g} s; "
                    f"`phalanx show {job.id}` says what it waits for"
                )
            time.sleep(LOOK_S)

    def _undisturbed(self) -> None:
        seconds = self._options.baseline_s
        if seconds and not self._job.done:
            self._tell(f"undisturbed for {seconds:g} s …")
            start_s = _now_s()
            self._sleep_until(start_s + seconds)
            self._course.spans.append(Span(start_s, _now_s()))

    def _inflict(self, harm: Harm, planned: Planned) -> None:
        """Carry out one fault, if possible where it matters; nobody to carry it out on is counted,
        not waited for."""
        held, role = harm.held, planned.fault.role
        candidates = {
            victim.id: victim
            for victim in _patiently(self._victims.living)
            if victim.role == role and victim.pid not in held
        }
        if candidates:
            needed = candidates.keys() & self._needed.get(role, candidates.keys())
            victim = candidates[planned.choose(list(needed or candidates))]
            idle = not needed
            # Noted first: a Ctrl-C may come as soon as the harm is done.
            self._course.injected.append(Injected(_now_s(), planned.fault.name, victim.id, idle))
            if harm.inflict(planned.fault, victim.pid):
                where = f"{victim.id}, which the job does not need" if idle else victim.id
                self._tell(f"{planned.at_s:6.1f} s  {planned.fault.name:16} {where}")
                return
            self._course.injected.pop()
        self._course.skipped += 1
        self._tell(f"{planned.at_s:6.1f} s  {planned.fault.name:16} skipped: nobody there")

    def _settle(self) -> None:
        """Wait until all processes are back and steps are committed as before."""
        wait_s = max(SETTLE_S, SETTLE_GAPS * self._log.usual_gap_s)
        began_s, step = _now_s(), self._refresh().progress.step
        back = commits = False
        while self._sleep_until(_now_s() + LOOK_S) and not (back and commits):
            back = _patiently(self._victims.all_up)
            commits = self._job.progress.step >= step + SETTLED_COMMITS
            if _now_s() - began_s > wait_s:
                if not back:
                    self._course.notes.append(f"not all processes are back after {wait_s:.0f} s")
                if not commits:
                    self._course.notes.append(
                        f"fewer than {SETTLED_COMMITS} steps were committed in the {wait_s:.0f} s "
                        "after the last fault"
                    )
                return

    def _sleep_until(self, unix_s: float) -> bool:
        """Sleep and keep an eye on the job; return False as soon as it has ended."""
        while (now_s := _now_s()) < unix_s:
            if not self._look():
                return False
            time.sleep(max(0.0, min(now_s + LOOK_S, unix_s) - _now_s()))
        return not self._job.done

    def _look(self) -> bool:
        """Note how far the job is; return False once it has ended."""
        # Whoever has just been killed does not answer for a moment.
        with contextlib.suppress(*NOBODY_THERE):
            aggregators = [each for each in self._victims.living() if each.metrics_address]
            step = self._gauges.read(aggregators)
            if step is not None:
                self._log.saw(step, _now_s())
            now_s = time.monotonic()
            if now_s >= self._ask_at_s:
                self._ask_at_s = now_s + ASK_EVERY_S
                self._job.refresh()
                if not aggregators:
                    self._log.saw(self._job.progress.step, _now_s())
                # A leader that has just taken over does not know yet who is there.
                self._needed |= {role: ids for role, ids in self._needed_now().items() if ids}
        return not self._job.done

    def _needed_now(self) -> dict[str, set[str]]:
        found = self._cluster.describe()
        return {
            "worker": {each.worker_id for each in self._job.progress.workers},
            "aggregator": {each.id for each in found.aggregators if self._job.id in each.job_ids},
            "control": {found.leader} - {""},
        }

    def _refresh(self) -> Job:
        return _patiently(self._job.refresh)

    def _events(self) -> list[Event]:
        return [
            event
            for event in _patiently(lambda: list(self._cluster.events()))
            if event.sequence > self._first_event
        ]

    def _counters(self, events: Sequence[Event]) -> Counters:
        counted = Counter(event.type for event in events)
        lost, doubled = self._gauges.lost, self._gauges.doubled
        result = self._job.result
        if result is not None:
            # The job's own books, which no death of an aggregator can lose.
            lost, doubled = result.examples_lost, result.examples_doubled
        return Counters(
            examples_lost=lost,
            examples_doubled=doubled,
            steps_replayed=sum(
                int(event.details.get("steps", 0))
                for event in events
                if event.type == "STEPS_REPLAYED" and event.job_id == self._job.id
            ),
            workers_lost=counted["WORKER_LOST"],
            shards_moved=counted["SHARDS_MOVED"],
            speculations=counted["SPECULATION_STARTED"],
        )


def _now_s() -> float:
    """Return the wall time as it would be had nobody set the clock since this program began."""
    return _BEGAN_UNIX_S + time.monotonic()


def _patiently(call: Callable[[], ResultT]) -> ResultT:
    """Call again for a while when nobody answers: a control process may just be starting again."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        try:
            return call()
        except NOBODY_THERE:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(LOOK_S)

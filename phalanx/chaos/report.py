"""What faults cost, computed from the times of the committed steps. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

STALLED_S, STALLED_GAPS = 10.0, 10
"""A job that has committed nothing for so long, and for so many usual gaps, has stalled."""
_ENDED_WELL = "SUCCEEDED"


@dataclass(frozen=True)
class Commit:
    """A committed step and its time."""

    step: int
    unix_s: float


@dataclass(frozen=True)
class Span:
    """A part of the run, from one time to another."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Injected:
    """A fault that was carried out: when, which, on which process; ``idle`` if the job had nothing
    there."""

    unix_s: float
    fault: str
    victim: str
    idle: bool = False


@dataclass(frozen=True)
class Injury:
    """A fault and what it cost: the longest wait for a commit beyond the usual one.

    Where it was not ``recovered`` from, no step was committed any more, and ``recovery_s`` is only
    how long that was watched. One on an ``idle`` process cost nothing, which says nothing of
    recoveries: it is not counted among them.
    """

    at_s: float
    fault: str
    victim: str
    recovery_s: float
    recovered: bool = True
    idle: bool = False


@dataclass(frozen=True)
class Counters:
    """What the system itself counts; None where nobody could tell."""

    examples_lost: int | None = None
    examples_doubled: int | None = None
    steps_replayed: int = 0
    workers_lost: int = 0
    shards_moved: int = 0
    speculations: int = 0


@dataclass(frozen=True)
class Report:
    """What a run under faults came to.

    ``goodput`` is steps per second under faults over those of the undisturbed times before and
    after; None where one of them was too short to say, or nothing was harmed.
    """

    job_id: str
    state: str
    seed: int
    disturbed_s: float
    undisturbed_s: float
    steps_per_s: float | None
    undisturbed_steps_per_s: float | None
    goodput: float | None
    usual_gap_s: float | None
    longest_gap_s: float | None
    recovery_p50_s: float | None
    recovery_p99_s: float | None
    recovery_max_s: float | None
    counters: Counters
    injuries: tuple[Injury, ...]
    skipped: int = 0
    parameters_sha256: str = ""
    bit_identical: bool | None = None
    """Whether another computation of the job gave the same hash; None where none was asked for."""
    control_answered: bool = True
    """Whether control could be asked until the end."""
    notes: tuple[str, ...] = field(default=())

    @property
    def harmful(self) -> int:
        """How many faults hit a process that the job needed; of none the report proves nothing."""
        return sum(not each.idle for each in self.injuries)

    @property
    def not_recovered(self) -> int:
        """How many faults there were after which no step was committed any more."""
        return sum(not each.recovered for each in self.injuries)

    @property
    def healthy(self) -> bool:
        """Whether no promise was broken."""
        counted = self.counters
        whole = not counted.examples_lost and not counted.examples_doubled
        goes_on = self.state != "FAILED" and not self.not_recovered and self.control_answered
        return whole and goes_on and self.bit_identical is not False

    def to_json(self) -> dict[str, object]:
        """Return the JSON of ``phalanx chaos --json``."""
        shown = asdict(self)
        counters, injuries = shown.pop("counters"), shown.pop("injuries")
        return {**shown, **counters, "harmful": self.harmful, "faults": list(injuries)}


def steps_at(commits: Sequence[Commit], unix_s: float) -> float:
    """Return how many steps were committed at a time, with the part of the one under way.

    Commits are in the order of their steps. Before the first and after the last there is nothing
    to go by; the nearest is taken.
    """
    for earlier, later in itertools.pairwise(commits):
        if unix_s <= earlier.unix_s:
            return float(earlier.step)
        if unix_s < later.unix_s:
            part = (unix_s - earlier.unix_s) / (later.unix_s - earlier.unix_s)
            return earlier.step + part * (later.step - earlier.step)
    return float(commits[-1].step)


def rate(commits: Sequence[Commit], spans: Sequence[Span], until_s: float) -> float | None:
    """Return steps per second over all spans, from the first commit until a time; None if none of
    that lies in the spans."""
    steps = seconds = 0.0
    for span in spans:
        if not commits:
            return None
        end_s = min(span.end_s, until_s)
        start_s = max(span.start_s, commits[0].unix_s)
        if end_s > start_s:
            steps += steps_at(commits, end_s) - steps_at(commits, start_s)
            seconds += end_s - start_s
    return steps / seconds if seconds else None


def gaps(commits: Sequence[Commit], span: Span) -> list[float]:
    """Return the seconds per step between the commits of which a part lies in the span."""
    return [
        (later.unix_s - earlier.unix_s) / (later.step - earlier.step)
        for earlier, later in itertools.pairwise(commits)
        if earlier.unix_s < span.end_s and later.unix_s > span.start_s
    ]


def longest_wait(
    commits: Sequence[Commit], span: Span, usual_gap_s: float, until_s: float
) -> float:
    """Return the longest time without a commit, as far as it lies in the span; the usual gap before
    the span counts as well, since what happens within a step delays the whole of it. After the last
    commit the time without one goes on until ``until_s``.

    Of several steps that were only seen together all but one are taken to have been usual ones.
    """
    waits = [
        (earlier.unix_s, later.unix_s, later.step - earlier.step - 1)
        for earlier, later in itertools.pairwise(commits)
    ]
    waits += [(last.unix_s, until_s, 0) for last in commits[-1:]]
    longest = 0.0
    for began_s, ended_s, together in waits:
        start_s = max(began_s, span.start_s - usual_gap_s)
        end_s = min(ended_s, span.end_s)
        longest = max(longest, end_s - start_s - together * usual_gap_s)
    return longest


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of all do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def blamed(
    commits: Sequence[Commit], injected: Sequence[Injected], usual_gap_s: float, until_s: float
) -> int:
    """Return how many of the faults, counted from the last, the job has not recovered from.

    These are all after which nothing was committed. Where the job has stalled, the one before the
    last commit is one of them too: that step may have been all but done when it came.
    """
    last_s = commits[-1].unix_s if commits else -math.inf
    after = sum(each.unix_s > last_s for each in injected)
    stalled = until_s - last_s > max(STALLED_S, STALLED_GAPS * usual_gap_s)
    return max(after, min(1, len(injected))) if stalled else after


def injuries(
    commits: Sequence[Commit],
    injected: Sequence[Injected],
    watched: Span,
    usual_gap_s: float,
    until_s: float,
    unrecovered: int,
) -> list[Injury]:
    """Return what each fault cost: it answers for what is lost until the next one, or until the end
    of the span. From the last ``unrecovered`` the job has not recovered. Those on idle processes
    answer for nothing."""
    harmful = [each for each in injected if not each.idle]
    ends_s = [each.unix_s for each in harmful[1:]] + [watched.end_s]
    found = [
        Injury(round(each.unix_s - watched.start_s, 3), each.fault, each.victim, 0.0, idle=True)
        for each in injected
        if each.idle
    ]
    for index, (each, end_s) in enumerate(zip(harmful, ends_s, strict=False)):
        wait_s = longest_wait(commits, Span(each.unix_s, end_s), usual_gap_s, until_s)
        recovery_s = round(max(0.0, wait_s - usual_gap_s), 6)
        at_s = round(each.unix_s - watched.start_s, 3)
        recovered = index < len(harmful) - unrecovered
        found.append(Injury(at_s, each.fault, each.victim, recovery_s, recovered))
    return sorted(found, key=lambda each: each.at_s)


def summarise(
    commits: Sequence[Commit],
    disturbed: Span,
    undisturbed: Sequence[Span],
    injected: Sequence[Injected],
    *,
    job_id: str,
    state: str,
    seed: int,
    counters: Counters,
    watched_until_s: float | None = None,
    skipped: int = 0,
    parameters_sha256: str = "",
    bit_identical: bool | None = None,
    control_answered: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """Return the report of a run from the times of its commits and of its faults.

    ``watched_until_s`` is the end of it, by default that of the last span. A job that has not
    succeeded by then should have gone on: time without a commit counts up to there.
    """
    until_s = _until_s(commits, state, [disturbed, *undisturbed], watched_until_s)
    unrecovered, harmful = 0, [each for each in injected if not each.idle]
    if state != _ENDED_WELL:
        usual_s = _usual_gap_s(commits, undisturbed) or 0.0
        unrecovered = blamed(commits, harmful, usual_s, until_s)
    if unrecovered:
        # A job that does not go on is no yardstick for what it was without faults.
        undisturbed = [span for span in undisturbed if span.start_s < disturbed.start_s]
    usual_gap_s = _usual_gap_s(commits, undisturbed)
    usual_s = usual_gap_s or 0.0
    # What the last fault costs shows while the job settles.
    after_s = (span.start_s for span in undisturbed if span.start_s >= disturbed.end_s)
    watched = Span(disturbed.start_s, min(after_s, default=until_s))
    hurt = injuries(commits, injected, watched, usual_s, until_s, unrecovered)
    recoveries = [each.recovery_s for each in hurt if not each.idle]
    # The step that is under way at the end is not counted, and neither is its usual time.
    counted_s = max(until_s - usual_s, commits[-1].unix_s) if commits else until_s
    slow, normal = rate(commits, [disturbed], counted_s), rate(commits, undisturbed, counted_s)
    return Report(
        job_id=job_id,
        state=state,
        seed=seed,
        disturbed_s=disturbed.length_s,
        undisturbed_s=sum(span.length_s for span in undisturbed),
        steps_per_s=slow,
        undisturbed_steps_per_s=normal,
        goodput=slow / normal if harmful and slow is not None and normal else None,
        usual_gap_s=usual_gap_s,
        longest_gap_s=longest_wait(commits, watched, usual_s, until_s) if usual_s else None,
        recovery_p50_s=percentile(recoveries, 50),
        recovery_p99_s=percentile(recoveries, 99),
        recovery_max_s=max(recoveries, default=None),
        counters=counters,
        injuries=tuple(hurt),
        skipped=skipped,
        parameters_sha256=parameters_sha256,
        bit_identical=bit_identical,
        control_answered=control_answered,
        notes=tuple(notes),
    )


def _until_s(
    commits: Sequence[Commit], state: str, spans: Sequence[Span], watched_until_s: float | None
) -> float:
    """Return until when there should have been commits."""
    until_s = watched_until_s or max(span.end_s for span in spans)
    if commits and (state == _ENDED_WELL or until_s < commits[-1].unix_s):
        return commits[-1].unix_s
    return until_s


def _usual_gap_s(commits: Sequence[Commit], spans: Sequence[Span]) -> float | None:
    usual = [gap for span in spans for gap in gaps(commits, span)]
    return statistics.median(usual) if usual else None

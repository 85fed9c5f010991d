"""What faults cost, computed from the times of the committed steps. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


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
    """A fault that was carried out: when, which, on which process."""

    unix_s: float
    fault: str
    victim: str


@dataclass(frozen=True)
class Injury:
    """A fault and what it cost: the longest wait for a commit beyond the usual one."""

    at_s: float
    fault: str
    victim: str
    recovery_s: float


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
    after; None where one of them was too short to say.
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
    notes: tuple[str, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        """Whether no promise was broken."""
        counted = self.counters
        whole = not counted.examples_lost and not counted.examples_doubled
        return whole and self.bit_identical is not False and self.state != "FAILED"

    def to_json(self) -> dict[str, object]:
        """Return the JSON of ``phalanx chaos --json``."""
        shown = asdict(self)
        counters, injuries = shown.pop("counters"), shown.pop("injuries")
        return {**shown, **counters, "faults": list(injuries)}


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


def rate(commits: Sequence[Commit], spans: Sequence[Span]) -> float | None:
    """Return steps per second over all spans, as far as commits reach; None if they do not."""
    steps = seconds = 0.0
    for span in spans:
        if not commits:
            return None
        end_s = min(span.end_s, commits[-1].unix_s)
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


def longest_wait(commits: Sequence[Commit], span: Span, usual_gap_s: float) -> float:
    """Return the longest time without a commit, as far as it lies in the span; the usual gap before
    the span counts as well, since what happens within a step delays the whole of it.

    Of several steps that were only seen together all but one are taken to have been usual ones.
    """
    longest = 0.0
    for earlier, later in itertools.pairwise(commits):
        start_s = max(earlier.unix_s, span.start_s - usual_gap_s)
        end_s = min(later.unix_s, span.end_s)
        together = later.step - earlier.step - 1
        longest = max(longest, end_s - start_s - together * usual_gap_s)
    return longest


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of all do not exceed; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def injuries(
    commits: Sequence[Commit], injected: Sequence[Injected], disturbed: Span, usual_gap_s: float
) -> list[Injury]:
    """Return what each fault cost: it answers for what is lost until the next one."""
    ends_s = [each.unix_s for each in injected[1:]] + [disturbed.end_s]
    found = []
    for each, end_s in zip(injected, ends_s, strict=False):
        wait_s = longest_wait(commits, Span(each.unix_s, end_s), usual_gap_s)
        recovery_s = max(0.0, wait_s - usual_gap_s)
        at_s = each.unix_s - disturbed.start_s
        found.append(Injury(round(at_s, 3), each.fault, each.victim, round(recovery_s, 6)))
    return found


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
    skipped: int = 0,
    parameters_sha256: str = "",
    bit_identical: bool | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Return the report of a run from the times of its commits and of its faults."""
    usual = [gap for span in undisturbed for gap in gaps(commits, span)]
    usual_gap_s = statistics.median(usual) if usual else None
    hurt = injuries(commits, injected, disturbed, usual_gap_s or 0.0)
    recoveries = [each.recovery_s for each in hurt]
    slow, normal = rate(commits, [disturbed]), rate(commits, undisturbed)
    return Report(
        job_id=job_id,
        state=state,
        seed=seed,
        disturbed_s=disturbed.length_s,
        undisturbed_s=sum(span.length_s for span in undisturbed),
        steps_per_s=slow,
        undisturbed_steps_per_s=normal,
        goodput=slow / normal if slow is not None and normal else None,
        usual_gap_s=usual_gap_s,
        longest_gap_s=longest_wait(commits, disturbed, usual_gap_s) if usual_gap_s else None,
        recovery_p50_s=percentile(recoveries, 50),
        recovery_p99_s=percentile(recoveries, 99),
        recovery_max_s=max(recoveries, default=None),
        counters=counters,
        injuries=tuple(hurt),
        skipped=skipped,
        parameters_sha256=parameters_sha256,
        bit_identical=bit_identical,
        notes=tuple(notes),
    )

"""The tasks of a sweep: every configuration on every fold is one.

The graph: trials of a round, then a task that puts its scores together. Without early stopping
there is one round. With `halving` the next round has trials of the best only, once all are known.
With `asha` it has a place for each trial that the round may promote, decided as soon as the places
up to there are known (`phalanx.sweeps.promotion`): a chain of tasks knows the round up to a place,
another says whom the place promotes, and trials of places without anybody are passed over.

Then the table is written, in the forms in which people read it, the best is trained on all rows,
and one task names what was made.
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.sweeps.configurations import count_of
from phalanx.sweeps.promotion import first_places, promotions_max
from phalanx.v1 import job_spec_pb2
from phalanx.v1.job_spec_pb2 import JobSpec

FOLDS, REDUCTION = 5, 3.0

TRIAL, RUNG, PROMOTED, ORDER, TABLE, CSV, PLOT, WINNER, END = (
    "trial",
    "rung",
    "promoted",
    "order",
    "table",
    "csv",
    "plot",
    "winner",
    "end",
)


@dataclass(frozen=True)
class Round:
    """How many places for trials there are, and for how many steps they train; 0: to their end."""

    count: int
    steps: int


@dataclass(frozen=True)
class Step:
    """What one task does: `place` of its round, and a fold.

    With `passes` it is passed over where its last input is empty; see `Graph`.
    """

    kind: str
    needs: tuple[int, ...]
    round: int = 0
    place: int = 0
    fold: int = 0
    passes: bool = False


def stopping_of(sweep: job_spec_pb2.Sweep) -> job_spec_pb2.Asha | job_spec_pb2.Halving | None:
    """Return how trainings are stopped early, if they are."""
    if sweep.HasField("asha"):
        return sweep.asha
    return sweep.halving if sweep.HasField("halving") else None


def rounds_of(spec: JobSpec) -> list[Round]:
    """Return the rounds of a sweep; each trains for longer than the one before."""
    sweep, stopping = spec.sweep, stopping_of(spec.sweep)
    left = count_of(sweep)
    found: list[Round] = []
    if stopping is not None:
        reduction = stopping.reduction if stopping.HasField("reduction") else REDUCTION
        steps = float(stopping.min_steps)
        while steps < sweep.base.train.stop.steps:
            if not found or int(steps) > found[-1].steps:
                found.append(Round(left, int(steps)))
                if sweep.HasField("asha"):
                    left = promotions_max(left, reduction)
                else:
                    left = max(1, int(left / reduction))
            steps *= reduction
    return [*found, Round(left, 0)]


def tasks_of(spec: JobSpec) -> int:
    """Return how many tasks a sweep has."""
    rounds = rounds_of(spec)
    trials = sum(each.count for each in rounds) * (spec.sweep.folds or FOLDS)
    places = sum(each.count for each in rounds[1:]) if spec.sweep.HasField("asha") else 0
    return trials + 2 * places + len(rounds) + len((TABLE, CSV, PLOT, WINNER, END))


def steps_of(spec: JobSpec) -> list[Step]:
    """Return what each task of a resolved sweep does."""
    steps: list[Step] = []
    orders: list[int] = []
    before: list[int] = []
    asha = spec.sweep.HasField("asha")
    rounds, folds = rounds_of(spec), spec.sweep.folds
    for number, each in enumerate(rounds):
        first = len(steps)
        for place in range(each.count):
            needs = (before[place if asha else 0],) if before else ()
            passes = bool(before) and asha
            steps += [Step(TRIAL, needs, number, place, fold, passes) for fold in range(folds)]
        trials = tuple(range(first, len(steps)))
        if asha and number + 1 < len(rounds):
            before = _add_rung(steps, trials, number, each.count, spec)
        orders.append(len(steps))
        steps.append(Step(ORDER, trials, number))
        if not asha:
            before = orders[-1:]
    table = len(steps)
    steps.append(Step(TABLE, tuple(orders)))
    steps += [Step(kind, (table,)) for kind in (CSV, PLOT, WINNER)]
    steps.append(Step(END, tuple(range(table, table + 4))))
    return steps


def _add_rung(
    steps: list[Step], trials: tuple[int, ...], number: int, places: int, spec: JobSpec
) -> list[int]:
    """Add what decides who goes on; return the tasks that say so, by place of the next round."""
    folds, found = spec.sweep.folds, []
    first = first_places(places, spec.sweep.asha.reduction)
    needs = trials[: first * folds]
    for place in range(first - 1, places):
        # The first has no other to pass on, and the last may promote where it is empty itself.
        passes = first <= place < places - 1
        steps.append(Step(RUNG, needs, number, place, passes=passes))
        found.append(len(steps))
        steps.append(Step(PROMOTED, (len(steps) - 1,), number, place))
        needs = (len(steps) - 2, *trials[(place + 1) * folds : (place + 2) * folds])
    return found


def level(step: Step, rounds: int) -> int:
    """Trials of the highest round come first, and whatever may let others begin before these."""
    if step.kind in (RUNG, PROMOTED):
        return rounds
    return step.round if step.kind == TRIAL else 0

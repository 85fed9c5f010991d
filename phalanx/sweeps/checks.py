"""What is wrong with the own fields of a sweep; `phalanx.specs.sweeps` looks at the jobs that its
configurations mean."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.programs.evaluate import METRICS
from phalanx.sweeps.configurations import combinations, count_of
from phalanx.sweeps.steps import FOLDS, rounds_of, stopping_of, tasks_of
from phalanx.tasks import TASKS_MAX
from phalanx.texts import number_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

PROGRAMS = ("train", "forest", "cascade")
CONFIGURATIONS_MAX = 2_000
TRIALS_MAX = TASKS_MAX // 2
FOLDS_MAX = 1_000
PATHS_MAX = 64

_OWN = ("seed", "data", *PROGRAMS)
"""Fields that a base may have; all others are said of the sweep."""

_OWN_DATA = ("shards", "rows", "class_weights", "oversample")


def violations(spec: JobSpec) -> Iterator[Violation]:
    """Yield what is wrong whatever the data; of raw as well as resolved specs."""
    sweep = spec.sweep
    yield from _base(sweep.base)
    yield from _grid(spec)
    yield from _settings(spec)
    yield from _stopping(spec)


def violations_against(spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
    """Yield what is wrong between a resolved sweep, right in itself, and its data set."""
    sweep = spec.sweep
    rows = dataset.rows.get(spec.data.split, 0)
    metric = sweep.objective.metric
    if metric not in METRICS[dataset.task]:
        known = ", ".join(METRICS[dataset.task])
        message = f"{metric[:40]} is none of a {dataset.task}; use {known}"
        yield Violation("sweep.objective.metric", message)
    elif sweep.folds > rows:
        message = f"{number_of(sweep.folds, 'fold')}: more than the {number_of(rows, 'row')}"
        yield Violation("sweep.folds", message)
    elif _too_small_classes(spec, dataset):
        message = f"no class has {number_of(sweep.folds, 'row')}, one for each fold"
        yield Violation("sweep.folds", message)


def _base(base: JobSpec) -> Iterator[Violation]:
    program = base.WhichOneof("program")
    if program not in PROGRAMS:
        message = f"a sweep tries {', '.join(PROGRAMS)}" + (f", not {program}" if program else "")
        yield Violation("sweep.base", message)
    for field, _ in base.ListFields():
        if field.name not in _OWN and field.name != program:
            message = "is said of the sweep itself; leave it out here"
            yield Violation(f"sweep.base.{field.name}", message)
    for field, _ in base.data.ListFields():
        if field.name not in _OWN_DATA:
            message = "is said of the sweep itself, in data; leave it out here"
            yield Violation(f"sweep.base.data.{field.name}", message)


def _grid(spec: JobSpec) -> Iterator[Violation]:
    sweep = spec.sweep
    if not sweep.grid:
        message = "is missing; give values by field path, as train.l2: [0, 0.1]"
        yield Violation("sweep.grid", message)
    elif len(sweep.grid) > PATHS_MAX:
        message = f"{len(sweep.grid)} paths are given; at most {PATHS_MAX} are allowed"
        yield Violation("sweep.grid", message)
    program = sweep.base.WhichOneof("program")
    for path in sorted(sweep.grid):
        where = f'sweep.grid["{path[:80]}"]'
        if not sweep.grid[path].values:
            yield Violation(where, "has no values; give a list, as [0, 0.1]")
        names = path.split(".")
        if names[0] == "data" and names[1:2] and names[1] in _OWN_DATA:
            continue
        if path != "seed" and names[0] != program:
            message = f"is no field that a configuration may change; begin with {program}."
            yield Violation(where, message)


def _settings(spec: JobSpec) -> Iterator[Violation]:
    sweep = spec.sweep
    if sweep.random_trials < 0:
        yield Violation("sweep.random_trials", f"must be at least 0, not {sweep.random_trials}")
    elif sweep.random_trials > combinations(sweep) > 0:
        message = f"the grid has {number_of(combinations(sweep), 'combination')} only"
        yield Violation("sweep.random_trials", message)
    elif count_of(sweep) > CONFIGURATIONS_MAX:
        yield Violation(
            "sweep.grid",
            f"these are {count_of(sweep)} configurations; at most {CONFIGURATIONS_MAX} are tried: "
            "draw some of them with random_trials",
        )
    if sweep.folds and not 2 <= sweep.folds <= FOLDS_MAX:
        message = f"must be at least 2 and at most {FOLDS_MAX}, not {sweep.folds}"
        yield Violation("sweep.folds", message)
    elif count_of(sweep) * (sweep.folds or FOLDS) > TRIALS_MAX:
        trials = count_of(sweep) * (sweep.folds or FOLDS)
        message = f"these are {trials} trials; at most {TRIALS_MAX} are allowed"
        yield Violation("sweep.folds", message)
    yield from _objective(spec)
    if spec.data.HasField("shards") and spec.data.shards != 1:
        message = "shards are those of the jobs that are tried; write sweep.base.data.shards"
        yield Violation("data.shards", message)
    if spec.data.rows.stratified:
        message = "is for the jobs that are tried; write sweep.base.data.rows"
        yield Violation("data.rows.stratified", message)


def _objective(spec: JobSpec) -> Iterator[Violation]:
    objective = spec.sweep.objective
    known = sorted({name for names in METRICS.values() for name in names})
    if objective.metric and objective.metric not in known:
        message = f"{objective.metric[:40]!r} is not known; use {', '.join(known)}"
        yield Violation("sweep.objective.metric", message)
    if objective.WhichOneof("bound"):
        name = objective.WhichOneof("bound")
        message = "what is best needs no bound, the name tells whether more is better; leave it out"
        yield Violation(f"sweep.objective.{name}", message)


def _stopping(spec: JobSpec) -> Iterator[Violation]:
    sweep, stopping = spec.sweep, stopping_of(spec.sweep)
    if stopping is None:
        return
    where = f"sweep.{'asha' if sweep.HasField('asha') else 'halving'}"
    if sweep.HasField("asha") and sweep.HasField("halving"):
        yield Violation("sweep.halving", "trainings are stopped by asha; leave one of them out")
    last, first = sweep.base.train.stop.steps, stopping.min_steps
    if not sweep.base.HasField("train"):
        yield Violation(where, "is for trainings, which have steps; leave it out")
    elif last < 1:
        yield Violation(where, "needs to know the last step; give sweep.base.train.stop.steps")
    elif not 1 <= first < last:
        message = f"must be at least 1 and below stop.steps, {last}, not {first}"
        yield Violation(f"{where}.min_steps", message)
    elif stopping.HasField("reduction") and not 1.1 <= stopping.reduction <= 1000:
        message = f"must be from 1.1 to 1000, not {stopping.reduction:g}"
        yield Violation(f"{where}.reduction", message)
    elif tasks_of(spec) > TASKS_MAX:
        yield Violation(
            f"{where}.reduction",
            f"makes {number_of(len(rounds_of(spec)), 'round')} from step {first} to step {last}, "
            f"with {number_of(tasks_of(spec), 'task')}; at most {TASKS_MAX} are allowed: let it or "
            "min_steps be larger, or try fewer configurations with random_trials",
        )
    for path in sorted(sweep.grid):
        if path == "train" or path.startswith("train.stop"):
            message = "rounds are counted in steps, which must be the same for all configurations"
            yield Violation(f'sweep.grid["{path[:80]}"]', message)


def _too_small_classes(spec: JobSpec, dataset: Dataset) -> bool:
    if spec.data.split not in dataset.class_rows:
        return False
    rows = dataset.class_rows[spec.data.split].rows
    return bool(rows) and max(rows) < spec.sweep.folds
